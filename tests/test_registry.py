"""MLflow's model registry, on a real server: who is champion, whatever comes twice, late or broken off."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_server import MLflowServer
from rlhf_ppo.registry import CHAMPION, REVISION_TAG, crown, source_of, version_at
from rlhf_ppo.tracking import Tracker, resend


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    started = MLflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield started
    started.kill()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


class Registry:
    """One registered model, and runs that tell of it as the steps do."""

    def __init__(self, server: MLflowServer, name: str, place: Path) -> None:
        self.server, self.name, self.place, self.client = server, name, place, server.client()

    def tell(self, run_id: str, alias: str, uri: str = "/steps/policy", **tags: str) -> Path:
        """One step's word to the registry; returns its spool."""
        step = "push_to_hub" if alias == CHAMPION else "evaluate_policy"
        spool = self.place / run_id / step
        with Tracker.for_step(step, run_id, tracking_uri=self.server.url, experiment="registry", spool=spool) as told:
            told.log_model(self.name, uri, tags, alias)
        return spool

    def release(self, run_id: str) -> None:
        """What a run does whose policy passes the gate."""
        self.tell(run_id, "challenger")
        self.tell(run_id, CHAMPION, **{REVISION_TAG: f"commit-of-{run_id}"})

    def aliases(self) -> dict[str, str]:
        """The runs that the aliases stand for."""
        found = self.client.get_registered_model(self.name).aliases
        return {
            alias: self.client.get_model_version(self.name, number).tags["rlhf_ppo.run_id"]
            for alias, number in found.items()
        }

    def versions(self) -> list[Any]:
        """All versions, the oldest first."""
        return sorted(self.client.search_model_versions(f"name='{self.name}'"), key=lambda v: int(v.version))


def again(*spools: Path) -> None:
    """Deliver them once more."""
    for spool in spools:
        for mark in spool.rglob("sent"):
            mark.unlink()
        assert resend(spool) == []


@pytest.fixture
def registry(server: MLflowServer, tmp_path: Path, request: pytest.FixtureRequest) -> Registry:
    return Registry(server, request.node.name.replace("[", "-").replace("]", ""), tmp_path)


def test_what_passes_is_challenger_what_is_pushed_champion_and_the_one_before_previous(registry: Registry) -> None:
    registry.tell("a", "challenger")
    assert registry.aliases() == {"challenger": "a"}
    registry.tell("a", CHAMPION, **{REVISION_TAG: "c0ffee"})
    assert registry.aliases() == {"champion": "a"}
    registry.release("b")
    assert registry.aliases() == {"champion": "b", "previous": "a"}
    registry.tell("c", "challenger")
    assert registry.aliases() == {"champion": "b", "previous": "a", "challenger": "c"}
    first = registry.versions()[0]
    assert first.tags[REVISION_TAG] == "c0ffee" and len(registry.versions()) == 3
    parent = registry.client.get_run(first.run_id)
    assert parent.data.tags["rlhf_ppo.run_id"] == "a" and parent.data.tags["rlhf_ppo.step"] == "pipeline"


def test_a_version_is_a_reference_and_no_copy(registry: Registry, tmp_path: Path) -> None:
    registry.tell("a", "challenger", uri="minio://mlpipeline/v2/artifacts/policy")
    registry.tell("b", "challenger", uri=str(tmp_path / "policy"))
    store, here = (version.source for version in registry.versions())
    assert store == "s3://mlpipeline/v2/artifacts/policy"
    # MLflow's server takes no path of another machine.
    assert here == f"local://{socket.gethostname()}{tmp_path}/policy"
    assert source_of("/steps/policy", "sqlite:////runs/mlflow.db") == "/steps/policy"


def test_what_is_told_twice_changes_nothing(registry: Registry) -> None:
    registry.release("a")
    spool = registry.tell("b", CHAMPION)
    before = registry.aliases()
    again(spool)
    assert registry.aliases() == before == {"champion": "b", "previous": "a"}
    assert len(registry.versions()) == 2


def test_what_is_told_late_moves_no_alias_back(registry: Registry) -> None:
    late = [registry.tell(run_id, alias) for run_id, alias in (("a", CHAMPION), ("b", "challenger"))]
    registry.release("b")
    registry.release("c")
    again(*late)
    assert registry.aliases() == {"champion": "c", "previous": "b"}
    earlier = registry.tell("d", "challenger")
    registry.tell("e", "challenger")
    again(*late, earlier)
    assert registry.aliases() == {"champion": "c", "previous": "b", "challenger": "e"}


class Failing:
    """A client whose call of a given number fails, after it was carried out or before."""

    def __init__(self, client: Any, number: int, carried_out: bool) -> None:
        self.client, self.left, self.carried_out = client, number, carried_out

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.carried_out:
                raise ConnectionError(name)
            found = getattr(self.client, name)(*given, **named)
            if self.left == 0:
                raise ConnectionError(name)
            return found

        return call


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_change_of_champion_that_broke_off_anywhere_is_made_good(registry: Registry, carried_out: bool) -> None:
    registry.release("a")
    cases = 0
    while True:
        run_id = f"b{cases}"
        before = registry.aliases()["champion"]
        registry.tell(run_id, "challenger")
        version = str(registry.versions()[-1].version)
        client = Failing(registry.client, cases + 1, carried_out)
        since = 10**13 + cases
        try:
            crown(client, registry.name, version, since)
            break
        except ConnectionError:
            crown(registry.client, registry.name, version, since)
        assert registry.aliases() == {"champion": run_id, "previous": before}
        cases += 1
    assert cases == 6


def test_a_version_is_found_by_its_commit_on_the_hub(registry: Registry) -> None:
    registry.release("a")
    registry.release("b")
    assert version_at(registry.client, "commit-of-a") == (registry.name, registry.versions()[0].version)
    assert version_at(registry.client, "commit-of-x") is None


def test_a_model_that_somebody_deleted_is_registered_anew(registry: Registry) -> None:
    registry.release("a")
    registry.client.delete_registered_model(registry.name)
    registry.release("b")
    assert registry.aliases() == {"champion": "b"}
    shutil.rmtree(registry.place)
