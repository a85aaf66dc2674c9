"""The hub as its callers need it: tried again where it may yet answer, with the remedy where it never will."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

from rlhf_ppo.errors import InputError

TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}
TRIES = 6
LONGEST_PAUSE = 60.0
LONGEST_SILENCE = 120.0
"""Seconds without a word from the hub after which a request has failed; huggingface_hub itself would wait for ever."""
WEIGHTS = ".safetensors"
Result = TypeVar("Result")


def write_token(repo_id: str, parameter: str = "hub_repo_id") -> str:
    """The token that the environment has for a push. Raises InputError where there is none, or it can't be one."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise InputError(
            f"{parameter}={repo_id!r} needs a token that may write there: set HF_TOKEN, on a cluster through the key "
            "HF_TOKEN of the secret hf-token"
        )
    # The client would repeat the token in its complaint.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("HF_TOKEN holds characters that no token has, a line break perhaps: store the token alone")
    return token


def weights_of(api: Any, repo_id: str, revision: str) -> dict[str, str]:
    """The files of weights at a revision by name, with what tells their content; empty where there are none."""
    return {
        entry.path: entry.blob_id
        for entry in api.list_repo_tree(repo_id, revision=revision, recursive=True)
        if entry.path.endswith(WEIGHTS)
    }


class HubUnreachable(RuntimeError):
    """The hub does not answer, or not with sense."""


def tried(call: Callable[[], Result], repo_id: str, parameter: str = "hub_repo_id") -> Result:
    """The result of ``call``, tried again with growing pauses where the hub may yet answer.

    Raises InputError with the remedy where it never will; it names ``parameter``, which gave ``repo_id``. Raises
    HubUnreachable where it still doesn't.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    _end_silence()
    for number in range(TRIES):
        last = number == TRIES - 1
        wish = None
        try:
            return _called(call)
        except HFValidationError as error:
            raise InputError(f"{parameter}={repo_id!r} can't be a repository: {error}") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403, 404):
                raise InputError(f"{parameter}={repo_id!r}: {_remedy(status)}") from None
            if status not in TRANSIENT:
                raise
            if last:
                raise _unreachable(error, parameter, repo_id) from error
            wish = error.response.headers.get("Retry-After")
        except _broken_connection() as error:
            # Whether the hub did what it was asked is seen at the next try.
            if last:
                raise _unreachable(error, parameter, repo_id) from error
        time.sleep(_pause(number, wish))
    raise AssertionError("unreachable")


@cache
def _end_silence() -> None:
    """Let requests of huggingface_hub fail after LONGEST_SILENCE, also those that it makes without any limit."""
    http: Any = importlib.import_module("huggingface_hub.utils._http")
    if hasattr(http, "set_client_factory"):  # since 1.0
        http.set_client_factory(partial(_limited_client, http.default_client_factory))
    else:
        http.configure_http_backend(partial(_limited_session, http._default_backend_factory))


def _limited_client(make: Callable[[], Any]) -> Any:
    """A client of httpx."""

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {name: LONGEST_SILENCE if s is None else s for name, s in limits.items()}

    client = make()
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
    return client


def _limited_session(make: Callable[[], Any]) -> Any:
    """A session of requests."""

    def limited(send: Callable[..., Any], request: Any, **given: Any) -> Any:
        return send(request, **{**given, "timeout": given.get("timeout") or LONGEST_SILENCE})

    session = make()
    for adapter in session.adapters.values():
        adapter.send = partial(limited, adapter.send)
    return session


def _called(call: Callable[[], Result]) -> Result:
    """What ``call`` gives; errors of the connection are taken out of those that huggingface_hub makes of them."""
    try:
        return call()
    except RuntimeError as error:  # an upload that failed
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise
    except ValueError as error:
        if type(error).__name__ == "HfUriError":  # a conflict that is not said to be one with an existing repository
            raise ConnectionError(f"the hub's answer names no repository: {error}") from error
        raise


def _broken_connection() -> tuple[type[Exception], ...]:
    """What a broken connection raises: huggingface_hub speaks through requests, since 1.0 httpx, since 2.0 httpx2."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError]
    found += [sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules]
    found += [sys.modules["requests"].RequestException] if "requests" in sys.modules else []
    return tuple(found)


def _pause(number: int, wish: str | None) -> float:
    """Seconds before the next try: 1, 2, 4 …, and no less than the hub asks for, within a minute."""
    pause = float(os.environ.get("RLHF_PPO_RETRY_PAUSE", "1")) * 2**number
    return min(max(pause, float(wish)) if wish and wish.isdigit() else pause, LONGEST_PAUSE)


def _unreachable(error: Exception, parameter: str, repo_id: str) -> HubUnreachable:
    from huggingface_hub import constants

    said = (str(error).splitlines() or [""])[0]
    return HubUnreachable(
        f"{parameter}={repo_id!r}: the hub at {constants.ENDPOINT} did not answer in {TRIES} tries "
        f"({type(error).__name__}: {said}); nothing is half done, start again when it does"
    )


def _remedy(status: int) -> str:
    said = {
        401: "the hub does not know the token in HF_TOKEN: make a new one",
        403: "the token in HF_TOKEN may not write there: give it write access to the repository's owner",
        404: "the hub knows no such owner, repository or branch, or the token in HF_TOKEN may not see it",
    }
    return f"{said[status]} (HTTP {status})"
