"""The two ways in which a step ends badly: the user's input is wrong, or something else went wrong."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong; nothing expensive has been started and nothing was written.

    ``problems`` holds one sentence each: the parameter, its value, and what would be valid.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
