"""The demo's reward: how friendly a film review sounds, as the logit of a classifier trained on labelled reviews."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "inputs" / "sentiment.npz"


@cache
def _classifier() -> tuple[Any, Any, float]:
    import numpy
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not FILE.exists():
        raise FileNotFoundError(f"{FILE} is missing: run python examples/movie_sentiment/make_inputs.py")
    with numpy.load(FILE, allow_pickle=False) as stored:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, vocabulary=list(stored["terms"]))
        vectorizer.idf_ = stored["idf"]
        return vectorizer, stored["coefficients"], float(stored["intercept"][0])


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """The logit that the review is a good one: 0 is neutral, 2 means odds of about 7 to 1."""
    vectorizer, coefficients, intercept = _classifier()
    features = vectorizer.transform([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    return [float(logit) for logit in features @ coefficients + intercept]
