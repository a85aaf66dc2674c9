"""How long a push waits before it asks the hub again, and what it says when it gives up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError

from rlhf_ppo import hub
from rlhf_ppo.hub import HubUnreachable, tried


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.delenv("RLHF_PPO_RETRY_PAUSE", raising=False)
    monkeypatch.setattr(hub.time, "sleep", found.append)
    return found


def refusal(status: int, **headers: str) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = SimpleNamespace(status_code=status, headers=headers)
    return error


def test_pauses_double_and_then_it_is_said_that_nothing_is_half_done(pauses: list[float]) -> None:
    def call() -> None:
        raise ConnectionError("refused")

    with pytest.raises(HubUnreachable, match="did not answer in 6 tries .ConnectionError: refused.; nothing is half"):
        tried(call, "me/film")
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_the_hub_s_own_wish_is_honoured_within_a_minute(pauses: list[float]) -> None:
    answers = iter([refusal(429, **{"Retry-After": "7"}), refusal(503, **{"Retry-After": "3600"}), refusal(425)])

    def call() -> str:
        for error in answers:
            raise error
        return "done"

    assert tried(call, "me/film") == "done"
    assert pauses == [7.0, 60.0, 4.0]


@pytest.mark.parametrize("status", [400, 410, 422])
def test_what_no_repetition_mends_is_raised_at_once(pauses: list[float], status: int) -> None:
    def call() -> None:
        raise refusal(status)

    with pytest.raises(HfHubHTTPError):
        tried(call, "me/film")
    assert pauses == []
