"""Every request of a push fails, in every way: one commit, complete, and its revision is the answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import CUT, HALF, MIDWAY, RESET, SILENT, Commit, Fault, Hub, Repository
from rlhf_ppo.parameters import decode
from test_hub_push import WRITE, compared_with, outputs

__all__ = ["outputs"]  # a fixture

# One process for all cases: to start one takes longer than a push. It pushes for each line, with that much patience.
PUSHES = """
import sys, time
from pathlib import Path
# The client waits a second before it asks again.
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 1000)
from rlhf_ppo import hub
from rlhf_ppo.hub_push.push import publish
from rlhf_ppo.parameters import RunSettings
settings = RunSettings.from_json(sys.argv[1])
for line in sys.stdin:
    hub.LONGEST_SILENCE = float(line)
    try:
        found = publish(settings, Path("policy"), Path("evaluation"), "run-1", {"MLflow run": "m1"})
        print("REVISION", found[1], flush=True)
    except Exception as error:
        print("REVISION", f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
"""
STATUSES = (408, 409, 412, 425, 429, 500, 502, 503, 504)
BEFORE = (*STATUSES, CUT, RESET, SILENT)
"""The server says so, or nothing, and has done nothing."""
DURING = (MIDWAY,)
"""The connection breaks while the server is being asked; it does nothing."""
AFTER = (*STATUSES, CUT, RESET, SILENT, HALF)
"""The server has done what it was asked, and its answer is lost, or something on the way says this in its place."""
CASES = [(status, False) for status in (*BEFORE, *DURING)] + [(status, True) for status in AFTER]
"""What goes wrong, and whether the request takes effect even so."""
BRANCHES = {"a first release": "main", "a release after another, on a branch": "candidate"}
BEFORE_IT = {"model-00002-of-00002.safetensors": b"x", "pytorch_model.bin": b"x", "LICENSE": b"theirs"}


def start(hub: Hub, place: Path, branch: str) -> subprocess.Popen[str]:
    """A process that pushes to a branch of a hub when it is told to."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RLHF_"))},
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "hf"), "HF_TOKEN": WRITE,
        "RLHF_PPO_RETRY_PAUSE": "0.001", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    needed = {"model_name": "org/base", "query_dataset": "d", "reward_model": "m:f"}
    given = {"push_to_hub_if_best_kwargs": {"repo_id": "me/film", "revision": branch}}
    command = [sys.executable, "-c", PUSHES, decode({**needed, **given}).to_json()]
    return subprocess.Popen(
        command, cwd=place, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def tell(process: subprocess.Popen[str], patience: float = 30) -> None:
    """Have a process push."""
    assert process.stdin
    print(patience, file=process.stdin, flush=True)


def answer_of(process: subprocess.Popen[str]) -> str:
    """What a process answers that was told to push."""
    assert process.stdout
    while not (line := process.stdout.readline()).startswith("REVISION "):
        assert line, "the process has ended"
    return line.removeprefix("REVISION ").strip()


class Pusher:
    """Pushes to a hub, one run after the other: to one without the repository, or to a branch with another release."""

    def __init__(self, hub: Hub, place: Path, branch: str) -> None:
        self.hub, self.branch = hub, branch
        self.before: list[Commit] = []
        if branch != "main":
            published = Repository(private=True)
            compared_with(place, published.commit("published", BEFORE_IT))
            self.before = published.commits
        self.process = start(hub, place, branch)
        self.push()  # The first of a process asks more.
        self.revision = self.push()
        self.files, self.requests = self.commits()[-1][2], list(hub.paths)

    def push(self) -> str:
        """Push once more, to a hub as it was before; what the step answers."""
        self.reset()
        return self.answer()

    def reset(self) -> None:
        """Let the hub be as it was before."""
        self.hub.repositories.clear()
        self.hub.blobs.clear()
        if self.before:
            self.hub.repositories["me/film"] = Repository(True, {"main": list(self.before)})
        self.hub.paths.clear()

    def answer(self) -> str:
        """Push; what the step answers."""
        silent = any(fault.status == SILENT for fault in self.hub.fault_at.values())
        tell(self.process, 0.2 if silent else 30)
        return answer_of(self.process)

    def commits(self) -> list[Commit]:
        """Those of the run, on all branches."""
        repository = self.hub.repositories.get("me/film", Repository(True))
        found = [commit for branch in repository.branches.values() for commit in branch]
        return [commit for commit in found if commit[1].endswith("(pipeline run run-1)")]

    def problem(self, answer: str) -> str:
        """What is wrong with the hub after a push, or with the answer; empty if nothing is."""
        commits = self.commits()
        if [commit[0] for commit in commits] != [answer]:
            return f"{len(commits)} commits, and the answer {answer}"
        if commits[0][2] != self.files:
            return f"other files: {sorted(commits[0][2])}"
        tags = self.hub.repositories["me/film"].tags
        return "" if tags == {"run-run-1": answer} else f"the tags {tags}"


@pytest.fixture(params=BRANCHES.values(), ids=BRANCHES)
def pusher(outputs: Path, request: pytest.FixtureRequest) -> Iterator[Pusher]:
    hub = Hub({WRITE: ("me", "write")})
    found = Pusher(hub, outputs, request.param)
    yield found
    found.process.kill()
    found.process.wait()
    hub.close()


def test_whatever_fails_once_there_is_one_whole_commit_and_its_revision_is_the_answer(pusher: Pusher) -> None:
    assert pusher.problem(pusher.revision) == "" and len(pusher.requests) > 8
    wrong = []
    for number, request in enumerate(pusher.requests):
        for status, takes_effect in CASES:
            pusher.hub.fault_at = {number: Fault("", "", status, takes_effect=takes_effect)}
            problem = pusher.problem(pusher.push()) or ("the fault was not met" if pusher.hub.fault_at else "")
            if problem:
                wrong.append((request, status, "after" if takes_effect else "before", problem))
    print(f"{len(pusher.requests) * len(CASES)} cases")
    assert wrong == [], "\n".join(map(str, wrong))
    assert pusher.push() == pusher.revision


@pytest.mark.parametrize("takes_effect", [False, True])
def test_a_step_that_the_hub_leaves_alone_anywhere_fails_and_the_next_one_makes_it_good(
    pusher: Pusher, takes_effect: bool
) -> None:
    """The hub is away from a request on, which takes effect or doesn't, for longer than the step has patience."""
    for number, request in enumerate(pusher.requests):
        first = Fault("", "", 503, takes_effect=takes_effect)
        pusher.hub.fault_at = {number: first, **{later: Fault("", "", 503) for later in range(number + 1, 200)}}
        answer = pusher.push()
        assert "did not answer in 6 tries" in answer and "start again" in answer, (request, answer)
        assert len(pusher.commits()) <= 1
        pusher.hub.fault_at = {}
        assert pusher.problem(pusher.answer()) == "", request


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_repetition_mends_ends_the_push_at_once_with_the_remedy(pusher: Pusher, status: int) -> None:
    for number, request in enumerate(pusher.requests):
        pusher.hub.fault_at = {number: Fault("", "", status)}
        answer = pusher.push()
        makes_repository = request == "POST /api/repos/create"
        if makes_repository and pusher.before and status != 404:
            # A token without the right to make repositories may have the right to write into this one.
            assert pusher.problem(answer) == ""
            continue
        assert answer.startswith("InputError: hub_repo_id='me/film': ") and f"(HTTP {status})" in answer, request
        assert "HF_TOKEN" in answer and WRITE not in answer
        # The client looks whether the repository is there.
        assert len(pusher.hub.paths) <= number + 1 + makes_repository, request


def test_a_second_run_of_the_step_finds_the_first_ones_commit_whatever_fails(pusher: Pusher) -> None:
    first = pusher.push()
    pusher.hub.paths.clear()
    assert pusher.answer() == first
    for number in range(len(pusher.hub.paths)):
        for status in (429, 500, CUT):
            pusher.hub.paths.clear()
            pusher.hub.fault_at = {number: Fault("", "", status)}
            assert pusher.answer() == first and not pusher.hub.fault_at
    assert pusher.problem(first) == ""


def test_steps_of_one_run_that_push_at_the_same_time_come_to_one_commit(pusher: Pusher, outputs: Path) -> None:
    """As a retry does beside the pod before it, which was given up too early."""
    processes = [pusher.process, *(start(pusher.hub, outputs, pusher.branch) for _ in range(2))]
    for _ in range(15):
        pusher.reset()
        for process in processes:
            tell(process)
        (answer,) = {answer_of(process) for process in processes}
        assert pusher.problem(answer) == ""
    for process in processes[1:]:
        process.kill()
        process.wait()
