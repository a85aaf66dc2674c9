"""Every request of a push fails once, in every way: one commit, complete, and its revision is the answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import CUT, HALF, Fault, Hub
from rlhf_ppo.parameters import decode
from test_hub_push import WRITE, outputs

# One process for all cases: to start one takes longer than a push. It pushes for each line with a run's name.
PUSHES = """
import sys, time
from pathlib import Path
# The client waits a second before it asks again.
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)
from rlhf_ppo.hub_push.push import publish
from rlhf_ppo.parameters import RunSettings
settings = RunSettings.from_json(sys.argv[1])
for line in sys.stdin:
    try:
        found = publish(settings, Path("policy"), Path("evaluation"), line.strip(), {"MLflow run": "m1"})
        print("REVISION", found[1], flush=True)
    except Exception as error:
        print("REVISION", f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
"""
BEFORE = (408, 409, 412, 425, 429, 500, 502, 503, 504, CUT)
"""The server says so, or nothing, and has done nothing."""
AFTER = (500, 504, CUT, HALF)
"""The server has done what it was asked, and its answer is lost."""


class Pusher:
    """Pushes to a hub, one run after the other."""

    def __init__(self, hub: Hub, place: Path) -> None:
        self.hub = hub
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RLHF_"))},
            "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "hf"), "HF_TOKEN": WRITE,
            "RLHF_PPO_RETRY_PAUSE": "0.001", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        needed = {"model_name": "org/base", "query_dataset": "d", "reward_model": "m:f", "hub_repo_id": "me/film"}
        command = [sys.executable, "-c", PUSHES, decode(needed).to_json()]
        self.process = subprocess.Popen(
            command, cwd=place, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def push(self) -> str:
        """Push once more, to a hub without the repository; what the step answers."""
        self.hub.repositories.clear()
        self.hub.blobs.clear()
        self.hub.paths.clear()
        return self.answer()

    def answer(self) -> str:
        """Push; what the step answers."""
        assert self.process.stdin and self.process.stdout
        print("run-1", file=self.process.stdin, flush=True)
        while not (line := self.process.stdout.readline()).startswith("REVISION "):
            assert line, "the process has ended"
        return line.removeprefix("REVISION ").strip()


@pytest.fixture
def pusher(outputs: Path) -> Iterator[Pusher]:
    hub = Hub({WRITE: ("me", "write")})
    found = Pusher(hub, outputs)
    yield found
    found.process.kill()
    found.process.wait()
    hub.close()


def test_whatever_fails_once_there_is_one_whole_commit_and_its_revision_is_the_answer(pusher: Pusher) -> None:
    hub = pusher.hub
    pusher.push()  # The first of a process asks more.
    first = pusher.push()
    expected, requests = hub.repositories["me/film"].commits[-1][2], list(hub.paths)
    assert len(hub.repositories["me/film"].commits) == 2 and len(requests) > 8
    cases = [(status, False) for status in BEFORE] + [(status, True) for status in AFTER]
    wrong = []
    for number, request in enumerate(requests):
        for status, takes_effect in cases:
            hub.fault_at = {number: Fault("", "", status, takes_effect=takes_effect)}
            answer = pusher.push()
            commits = hub.repositories["me/film"].commits if "me/film" in hub.repositories else []
            whole = bool(commits) and commits[-1][2] == expected
            ours = [commit for commit in commits if commit[1].endswith("(pipeline run run-1)")]
            tags = hub.repositories["me/film"].tags if commits else {}
            if hub.fault_at or len(ours) != 1 or not whole or answer != ours[0][0] or tags != {"run-run-1": answer}:
                wrong.append((request, status, "after" if takes_effect else "before", answer, len(ours), whole))
    print(f"{len(requests) * len(cases)} cases")
    assert wrong == [], "\n".join(map(str, wrong))
    assert pusher.push() == first


def test_a_second_run_of_the_step_finds_the_first_ones_commit_whatever_fails(pusher: Pusher) -> None:
    hub = pusher.hub
    first = pusher.push()
    hub.paths.clear()
    assert pusher.answer() == first
    for number in range(len(hub.paths)):
        for status in (429, 500, CUT):
            hub.paths.clear()
            hub.fault_at = {number: Fault("", "", status)}
            assert pusher.answer() == first and not hub.fault_at
    assert len(hub.repositories["me/film"].commits) == 2
    assert json.dumps(sorted(hub.repositories)) == '["me/film"]'
