"""What push_to_hub_if_best_kwargs may hold; checked before a run starts and again before the push."""

from __future__ import annotations

from typing import Any

KWARGS = {"repo_id": str, "private": bool, "commit_message": str, "revision": str}
"""What push_to_hub_if_best_kwargs may hold; ``revision`` is the branch, made where it is missing."""


def kwargs_problems(kwargs: dict[str, Any]) -> list[str]:
    """What is wrong with push_to_hub_if_best_kwargs. Values are not repeated: one of them may be a token."""
    found = []
    for name, value in kwargs.items():
        if name == "token":
            found.append("push_to_hub_if_best_kwargs must not hold token: parameters are public; set HF_TOKEN instead")
        elif name not in KWARGS:
            found.append(f"push_to_hub_if_best_kwargs has {name}: it may hold {', '.join(sorted(KWARGS))}")
        elif not isinstance(value, KWARGS[name]):
            found.append(
                f"push_to_hub_if_best_kwargs: {name} is a {type(value).__name__}, not a {KWARGS[name].__name__}"
            )
    return found
