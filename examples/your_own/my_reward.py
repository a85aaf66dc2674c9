"""A reward of your own: any function that maps prompts and responses to one number each."""

from __future__ import annotations

IDEAL_WORDS = 12


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Prefer one sentence of about a dozen words that ends in a full stop."""
    return [
        float(response.rstrip().endswith(".")) - abs(len(response.split()) - IDEAL_WORDS) / IDEAL_WORDS
        for response in responses
    ]
