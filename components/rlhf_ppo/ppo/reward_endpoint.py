"""A reward behind HTTP: prompts and responses go there as JSON, scores come back."""

from __future__ import annotations

import datetime
import email.utils
import os
import random
import time
from typing import Any
from urllib.parse import urlsplit

from rlhf_ppo.errors import InputError
from rlhf_ppo.settings import RewardSettings

TOKEN_VARIABLE = "RLHF_PPO_REWARD_TOKEN"
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
FIRST_PAUSE = 0.5
"""Seconds before the second try; doubled for each further one, with up to as much again by chance."""
LONGEST_PAUSE = 30.0
LARGEST_ANSWER = 64 * 1024 * 1024


class RewardEndpoint:
    """Asks ``url`` for scores, in requests of ``reward_batch_size`` texts.

    POST {"prompts": [...], "responses": [...], "response_ids": [[...], ...]}; the answer is {"scores": [...]} with a
    number for each response, or a list with one for each of its tokens. What may pass is tried again until
    ``reward_deadline_seconds`` are over. The token in RLHF_PPO_REWARD_TOKEN goes along as a bearer token; redirects are
    not followed. Raises InputError where an answer says that no further try will help.
    """

    def __init__(self, url: str, settings: RewardSettings) -> None:
        import requests

        self.url, self.settings = url, settings
        self.session = requests.Session()
        # The environment's netrc could put other credentials in the place of the token.
        self.session.auth = _bearer(_token(url))

    def __call__(
        self, prompts: list[str], responses: list[str], response_ids: list[list[int]] | None = None
    ) -> list[Any]:
        """The scores of ``responses``."""
        found: list[Any] = []
        for start in range(0, len(responses), self.settings.reward_batch_size):
            part = slice(start, start + self.settings.reward_batch_size)
            body: dict[str, Any] = {"prompts": prompts[part], "responses": responses[part]}
            if response_ids is not None:
                body["response_ids"] = response_ids[part]
            found += self._ask(body)
        return found

    def _ask(self, body: dict[str, Any]) -> list[Any]:
        deadline, tries, pause = time.monotonic() + self.settings.reward_deadline_seconds, 0, FIRST_PAUSE
        while True:
            tries += 1
            answer, failure, wished = self._try(body, deadline - time.monotonic())
            if answer is not None:
                return answer
            wait = max(pause * (1 + random.random()), wished)
            pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() + wait >= deadline:
                raise InputError(
                    f"reward_model={self.url!r} gave no scores in reward_deadline_seconds="
                    f"{self.settings.reward_deadline_seconds:g} and {tries} tries; the last: {failure}"
                )
            time.sleep(wait)

    def _try(self, body: dict[str, Any], left: float) -> tuple[list[Any] | None, str, float]:
        """The scores; or None, why not, and how many seconds the server wants to be left alone."""
        import requests

        try:
            with self.session.post(
                self.url, json=body, timeout=max(left, 0.01), allow_redirects=False, stream=True
            ) as answer:
                text = _read(answer, time.monotonic() + left)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            return None, f"{type(error).__name__}: {error}"[:300], 0.0
        if answer.status_code in TRANSIENT:
            return None, f"HTTP {answer.status_code}: {text[:300]}", _wished(answer.headers.get("Retry-After"))
        if answer.is_redirect:
            raise InputError(
                f"reward_model={self.url!r} redirects to {answer.headers.get('Location')!r}, and a token would go "
                "along: give that address if it is the right one"
            )
        if not answer.ok:
            raise InputError(f"reward_model={self.url!r} answered HTTP {answer.status_code}: {text[:300]}")
        return self._scores(answer, text, len(body["responses"])), "", 0.0

    def _scores(self, answer: Any, text: str, wanted: int) -> list[Any]:
        import json

        try:
            scores = json.loads(text)["scores"]
        except (ValueError, KeyError, TypeError):
            scores = None
        if not isinstance(scores, list) or len(scores) != wanted:
            what = text[:300] if not isinstance(scores, list) else f"{len(scores)} scores"
            raise InputError(
                f"reward_model={self.url!r} answered {what!r} to {wanted} responses: "
                f'{{"scores": [...]}} with one entry each is needed'
            )
        return scores


def _bearer(token: str) -> Any:
    def sign(request: Any) -> Any:
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    return sign


def _token(url: str) -> str:
    """The token for ``url``. Raises InputError where it would cross an open network in clear text."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    host = urlsplit(url).hostname or ""
    inside = "." not in host or host.endswith((".svc", ".svc.cluster.local")) or host == "127.0.0.1"
    if token and urlsplit(url).scheme != "https" and not inside:
        raise InputError(
            f"reward_model={url!r}: the token in {TOKEN_VARIABLE} would go there in clear text: give an https address"
        )
    if not token.isascii() or not token.isprintable():
        raise InputError(f"{TOKEN_VARIABLE} holds characters that no token has: store the token alone")
    return token


def _read(answer: Any, deadline: float) -> str:
    """The whole body, if it is of a sensible size and comes before ``deadline``."""
    import requests

    read = bytearray()
    for block in answer.iter_content(1 << 16):
        read += block
        if len(read) > LARGEST_ANSWER:
            raise InputError(f"reward_model={answer.url!r} answered with more than {LARGEST_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise requests.Timeout("the answer came too slowly")
    return read.decode("utf-8", errors="replace")


def _wished(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date."""
    if not header:
        return 0.0
    if header.strip().isdigit():
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
