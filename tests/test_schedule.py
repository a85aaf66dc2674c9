"""Schedules in a file made the recurring runs of a server, by the real kfp client, and whatever breaks on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hub_server import CUT, Fault
from kfp_server import Kfp
from rlhf_pipelines import reconcile
from rlhf_pipelines.compile import packaged
from rlhf_pipelines.kubeflow import KubeflowError, connect
from rlhf_pipelines.schedules import Schedule, problem_of_cron, read_schedules
from rlhf_ppo.errors import InputError

GIVEN = {"model_name": "org/model", "query_dataset": "org/data", "reward_model": "org/reward"}


def spec() -> dict[str, Any]:
    pipeline, platform = yaml.safe_load_all(packaged())
    return {"pipeline_spec": pipeline, "platform_spec": platform}


SPEC = spec()


@pytest.fixture
def kfp() -> Iterator[Kfp]:
    server = Kfp()
    server.upload("rlhf-ppo", "v1", SPEC, display_name="RLHF with PPO")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_RETRY_PAUSE", "0.0001")
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIE", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def entry(name: str = "nightly", **more: Any) -> dict[str, Any]:
    return {"name": name, "cron": "0 0 2 * * *", "parameters": GIVEN, **more}


def write(path: Path, *entries: dict[str, Any], owner: str = "team-a") -> str:
    path.write_text(yaml.safe_dump({"owner": owner, "schedules": list(entries)}))
    return str(path)


def schedule(name: str = "nightly", **more: Any) -> Schedule:
    return Schedule(**{"name": name, "cron": "0 0 2 * * *", "parameters": GIVEN, **more})


def apply(kfp: Kfp, *schedules: Schedule, owner: str = "team-a", namespace: str = "") -> list[str]:
    """Plan and apply; the kinds and names of what was planned."""
    server = connect(kfp.url, namespace)
    changes = reconcile.plan(server, owner, schedules)
    reconcile.apply(server, changes, lambda text: None)
    return [f"{change.kind} {change.name}" for change in changes]


def cli(kfp: Kfp, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf_pipelines.cli", "schedule", "apply", "--host", kfp.url, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, input="")


def there(kfp: Kfp) -> dict[str, str]:
    """Name and state of each recurring run; fails where two have one name."""
    found = {each["display_name"]: each["status"] for each in kfp.recurring.values()}
    assert len(found) == len(kfp.recurring), "two recurring runs have one name"
    return found


def changing(asked: list[str]) -> list[str]:
    return [request for request in asked if not request.startswith("GET")]


# 1. The file


@pytest.mark.parametrize(
    "cron",
    ["0 0 2 * * *", "0 */15 8-18 * * MON-FRI", "30 0 0 1,15 jan-mar ?", "0 0/30 * * * 0", "59 59 23 31 12 6"],
)
def test_a_cron_that_kfp_takes_is_taken(cron: str) -> None:
    assert problem_of_cron(cron) == ""


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("0 2 * * *", "KFP would take the first for seconds"),  # KFP: at 2 minutes past every hour.
        ("@daily", "has 1 fields, not six"),
        ("0 0 24 * * *", "has '24' for the hours: give numbers from 0 to 23"),
        ("0 60 0 * * *", "has '60' for the minutes"),
        ("0 0 0 0 * *", "has '0' for the day of the month"),
        ("0 0 0 * 13 *", "has '13' for the month"),
        ("0 0 0 * * 7", "has '7' for the day of the week: give numbers from 0 to 6"),  # robfig/cron knows no 7.
        ("0 0 0 * * mon", ""),
        ("0 0 0 mon * *", "has 'mon' for the day of the month"),
        ("0 0 5-2 * * *", "has '5-2' for the hours"),
        ("0 0 1-2-3 * * *", "has '1-2-3'"),
        ("0 */0 * * * *", "has '*/0'"),
        ("0 */x * * * *", "has '*/x'"),
        ("0 0 1,,2 * * *", "has '1,,2'"),
        ("0 0 ² * * *", "has '²'"),
    ],
)
def test_a_cron_that_kfp_refuses_or_misreads_is_refused(cron: str, words: str) -> None:
    problem = problem_of_cron(cron)
    assert words in problem and bool(problem) is bool(words)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry(cron="0 2 * * *")], "schedule nightly: cron='0 2 * * *' has 5 fields"),
        ([entry(time_zone="Europe/Berlin")], "schedule nightly: time_zone is no field of a schedule: KFP reads every"),
        ([entry(concurrency=11)], "concurrency=11 is not within 1 and 10"),
        ([entry(concurrency=True)], "concurrency=True is no int"),
        ([entry(enabled="yes")], "enabled='yes' is no bool"),
        ([entry(when="now")], "when is no field of a schedule; there are: name, cron, enabled"),
        ([{"cron": "0 0 2 * * *"}], "schedule 1: name is missing"),
        (["nightly"], "schedule 1: 'nightly' is no mapping"),
        ([entry(name=" ")], "name=' ' is none"),
        ([entry(pipeline="")], "pipeline is empty"),
        ([entry(), entry()], "there are two schedules called nightly"),
        ([entry(parameters={**GIVEN, "learning_rat": 1})], "schedule nightly: learning_rat"),
        ([entry(parameters={**GIVEN, "batch_size": "many"})], "schedule nightly: batch_size='many'"),
        ([entry(parameters={**GIVEN, "batch_size": None})], "schedule nightly: batch_size=None"),
        ([entry(parameters={"model_name": "org/model"})], "schedule nightly: query_dataset"),
        ([entry(parameters=["a"])], "parameters=['a'] is no mapping"),
        ([entry(parameters_file="no.yaml")], "no.yaml can't be read"),
        ([entry(preset="best")], "preset='best' is none: give one of"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_before_a_server_is_asked(
    kfp: Kfp, entries: list[Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        read_schedules(write(tmp_path / "s.yaml", *entries))
    assert words in "\n".join(caught.value.problems)
    assert all(problem.startswith(str(tmp_path / "s.yaml")) for problem in caught.value.problems)


def test_a_file_without_owner_or_list_is_refused_by_the_command(kfp: Kfp, tmp_path: Path) -> None:
    for text, words in (
        ("schedules: []", "give owner (a name) and schedules (a list, empty for none)"),
        ("owner: a\nschedules: {}", "give owner (a name) and schedules"),
        ("owner: Team A\nschedules: []", "owner='Team A' is no name"),
        ("owner: [", "can't be read"),
    ):
        (tmp_path / "s.yaml").write_text(text)
        done = cli(kfp, str(tmp_path / "s.yaml"), "--yes")
        assert done.returncode == 2 and words in done.stderr
    assert kfp.asked == []


def test_a_file_of_parameters_lies_beside_the_schedules_and_is_weaker_than_they(tmp_path: Path) -> None:
    (tmp_path / "gpu.yaml").write_text("node_accelerator: nvidia.com/gpu\nnode_accelerator_count: 2\nseed: 5\n")
    path = write(tmp_path / "s.yaml", entry(parameters_file="gpu.yaml", parameters={**GIVEN, "seed": 0}))
    _, (found,) = read_schedules(path)
    assert found.parameters == {**GIVEN, "node_accelerator": "nvidia.com/gpu", "node_accelerator_count": 2, "seed": 0}


# 2. What becomes of it on the server


def test_a_recurring_run_is_made_as_declared(kfp: Kfp, tmp_path: Path) -> None:
    version = kfp.upload("rlhf-ppo", "v2", SPEC)
    path = write(
        tmp_path / "s.yaml",
        entry(cron="0  0 2 * * *", service_account="runner"),
        entry("weekly", version="v2", enabled=False, concurrency=3, experiment="mine"),
    )
    done = cli(kfp, path, "--yes")
    assert done.returncode == 0, done.stderr
    nightly, weekly = kfp.recurring.values()
    (pipeline,) = kfp.pipelines
    assert nightly["trigger"] == weekly["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}
    assert nightly["pipeline_version_reference"] == {"pipeline_id": pipeline}, "the latest, as of each run"
    assert weekly["pipeline_version_reference"] == {"pipeline_id": pipeline, "pipeline_version_id": version}
    assert [each["status"] for each in (nightly, weekly)] == ["ENABLED", "DISABLED"]
    assert [each["max_concurrency"] for each in (nightly, weekly)] == ["1", "3"]
    assert nightly["no_catchup"] is weekly["no_catchup"] is True
    assert nightly["runtime_config"]["parameters"] == GIVEN, "what is not named stays the pipeline's"
    assert nightly["service_account"] == "runner" and "service_account" not in weekly
    names = [kfp.experiments[each["experiment_id"]]["display_name"] for each in (nightly, weekly)]
    assert names == ["rlhf-ppo", "mine"]
    assert done.stdout.splitlines()[:2] == [
        "create   nightly: 0 0 2 * * *, rlhf-ppo latest",
        "create   weekly: 0 0 2 * * *, rlhf-ppo v2, switched off",
    ]


def test_a_second_time_changes_nothing(kfp: Kfp, tmp_path: Path) -> None:
    kfp.upload("rlhf-ppo", "v2", SPEC)
    path = write(
        tmp_path / "s.yaml", entry(version="v1"), entry("off", enabled=False), entry("x", cron="0 0 0 * * mon")
    )
    assert cli(kfp, path, "--yes").returncode == 0
    before, kfp.asked = dict(kfp.recurring), []
    done = cli(kfp, path)
    assert (done.returncode, done.stdout, changing(kfp.asked)) == (0, "nothing to change\n", [])
    assert kfp.recurring == before
    kfp.upload("rlhf-ppo", "v3", SPEC)
    assert cli(kfp, path).stdout == "nothing to change\n", (
        "the latest version is taken by each run, and needs no change"
    )


def test_nothing_is_changed_unless_that_is_wanted(kfp: Kfp, tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", entry())
    shown = cli(kfp, path, "--dry-run")
    asked = cli(kfp, path)
    assert (shown.returncode, asked.returncode) == (0, 2) and "add --yes" in asked.stderr
    assert shown.stdout == asked.stdout == "create   nightly: 0 0 2 * * *, rlhf-ppo latest\n"
    assert changing(kfp.asked) == [] and not kfp.recurring and not kfp.experiments


def test_a_changed_schedule_takes_the_old_one_s_place_and_says_what_differs(kfp: Kfp, tmp_path: Path) -> None:
    apply(kfp, schedule())
    path = write(tmp_path / "s.yaml", entry(cron="0 0 3 * * *", concurrency=2, parameters={**GIVEN, "seed": 4}))
    done = cli(kfp, path, "--yes")
    assert done.stdout.splitlines()[0] == (
        'replace  nightly: cron "0 0 2 * * *" → "0 0 3 * * *", concurrency "1" → "2", seed null → 4'
    )
    (found,) = kfp.recurring.values()
    assert (found["trigger"]["cron_schedule"]["cron"], found["status"]) == ("0 0 3 * * *", "ENABLED")


@pytest.mark.parametrize(
    "change", [{"version": "v1"}, {"service_account": "a"}, {"experiment": "e"}, {"cron": "0 0 3 * * *"}]
)
def test_whatever_differs_is_seen(kfp: Kfp, change: dict[str, Any]) -> None:
    apply(kfp, schedule())
    assert apply(kfp, schedule(**change)) == ["replace nightly"]
    assert apply(kfp, schedule(**change)) == []


def test_a_pipeline_or_experiment_made_anew_is_seen(kfp: Kfp) -> None:
    apply(kfp, schedule())
    kfp.experiments.clear()
    assert apply(kfp, schedule()) == ["replace nightly"] and len(kfp.experiments) == 1
    kfp.pipelines.clear()
    kfp.versions.clear()
    kfp.upload("rlhf-ppo", "v1", SPEC)
    assert apply(kfp, schedule()) == ["replace nightly"] and there(kfp) == {"nightly": "ENABLED"}


def test_switching_off_keeps_it_and_switching_on_makes_a_new_one(kfp: Kfp) -> None:
    apply(kfp, schedule())
    (first,) = kfp.recurring
    assert apply(kfp, schedule(enabled=False)) == ["disable nightly"]
    assert list(kfp.recurring) == [first] and there(kfp) == {"nightly": "DISABLED"}
    assert apply(kfp, schedule(enabled=False)) == []
    # KFP would make up at once for the time that it missed while it was off.
    assert apply(kfp, schedule()) == ["enable nightly"]
    assert list(kfp.recurring) != [first] and there(kfp) == {"nightly": "ENABLED"}


def test_only_what_the_owner_owns_is_deleted(kfp: Kfp) -> None:
    server = connect(kfp.url)
    experiment = server.experiment("rlhf-ppo")
    (pipeline,), (version,) = kfp.pipelines, kfp.versions
    server.client.create_recurring_run(
        experiment, "by hand", cron_expression="0 0 1 * * *", params=GIVEN, pipeline_id=pipeline, version_id=version
    )
    apply(kfp, schedule("theirs"), owner="team-b")
    apply(kfp, schedule("a"), schedule("b"))
    assert apply(kfp, schedule("b")) == ["delete a"]
    assert apply(kfp) == ["delete b"]
    assert set(there(kfp)) == {"by hand", "theirs"}
    for name, words in (("by hand", "not made by rlhf-ppo schedule apply"), ("theirs", "that of team-b")):
        with pytest.raises(InputError, match=words):
            apply(kfp, schedule(name))
    assert set(there(kfp)) == {"by hand", "theirs"}


def test_what_the_server_does_not_have_is_said_before_anything_is_changed(kfp: Kfp, tmp_path: Path) -> None:
    old = spec()
    del old["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]["seed"]
    kfp.upload("old", "v0", old)
    wrong = [
        schedule("p", pipeline="nope"),
        schedule("v", version="v9"),
        schedule("s", pipeline="old", parameters={**GIVEN, "seed": 3}),
    ]
    with pytest.raises(InputError) as caught:
        apply(kfp, schedule("right"), *wrong)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "schedule p",
        "schedule v",
        "schedule s",
    ]
    assert "v9 is no version of rlhf-ppo; there are: v1" in caught.value.problems[1]
    assert "seed is no parameter of old, version v0" in caught.value.problems[2]
    assert changing(kfp.asked) == []


def test_in_a_profile_all_happens_in_its_namespace_with_shared_pipelines(kfp: Kfp) -> None:
    kfp.multi_user = True
    apply(kfp, schedule(), namespace="team")
    assert apply(kfp, schedule(), namespace="team") == []
    (found,) = kfp.recurring.values()
    assert found["namespace"] == "team"
    assert apply(kfp, schedule(cron="0 0 3 * * *"), namespace="team") == ["replace nightly"]


# 3. Runs that go on


def running(kfp: Kfp, recurring_run_id: str) -> dict[str, Any]:
    run = {"run_id": f"run-of-{recurring_run_id}", "recurring_run_id": recurring_run_id, "display_name": "nightly 7",
           "state": "RUNNING", "created_at": "2026-01-01T00:00:00Z"}  # fmt: skip
    kfp.runs[run["run_id"]] = run
    return run


@pytest.mark.parametrize("target", [[schedule(cron="0 0 3 * * *")], []], ids=["replaced", "deleted"])
def test_a_run_that_goes_on_is_never_ended_by_a_change(kfp: Kfp, target: list[Schedule]) -> None:
    apply(kfp, schedule())
    (old,) = kfp.recurring
    run = running(kfp, old)
    ended = {**run, "run_id": "ended", "state": "SUCCEEDED"}
    kfp.runs["ended"] = ended
    apply(kfp, *target)
    assert run["state"] == "RUNNING" and kfp.recurring[old]["status"] == "DISABLED"
    assert [each["status"] for name, each in kfp.recurring.items() if name != old] == ["ENABLED"] * len(target)
    kfp.asked.clear()
    assert apply(kfp, *target) == ["wait nightly"] and changing(kfp.asked) == []
    run["state"] = "SUCCEEDED"
    assert apply(kfp, *target) == ["delete nightly"]
    assert old not in kfp.recurring and len(kfp.recurring) == len(target) and apply(kfp, *target) == []


def test_who_waits_is_told_for_what(kfp: Kfp, tmp_path: Path) -> None:
    apply(kfp, schedule())
    running(kfp, *kfp.recurring)
    path = write(tmp_path / "s.yaml")
    done = cli(kfp, path, "--yes")
    assert done.returncode == 0 and "stays until its run run-of-" in done.stdout
    done = cli(kfp, path)
    assert done.returncode == 0 and done.stdout.startswith("wait     nightly: the old one is switched off, and stays")


# 4. Whatever breaks


BEFORE = (schedule("changed"), schedule("on", enabled=False), schedule("off"), schedule("gone"), schedule("same"))
AFTER = (
    schedule("changed", cron="0 0 3 * * *", experiment="new"),
    schedule("on"),
    schedule("off", enabled=False),
    schedule("same"),
    schedule("new", concurrency=2),
)
EXPECTED = {"changed": "ENABLED", "on": "ENABLED", "off": "DISABLED", "same": "ENABLED", "new": "ENABLED"}


def never_twice(kfp: Kfp) -> Callable[[], None]:
    def look() -> None:
        on = [each["display_name"] for each in kfp.recurring.values() if each["status"] == "ENABLED"]
        twice.extend(name for name in set(on) if on.count(name) > 1)

    twice: list[str] = []
    kfp.watch = look
    kfp.twice = twice  # type: ignore[attr-defined]
    return look


def prepare(kfp: Kfp) -> None:
    for store in (kfp.recurring, kfp.experiments, kfp.runs):
        store.clear()
    kfp.dead_after, kfp.fault_at = None, {}
    apply(kfp, *BEFORE)
    never_twice(kfp)
    kfp.asked.clear()


def requests_of_a_change(kfp: Kfp) -> list[str]:
    prepare(kfp)
    apply(kfp, *AFTER)
    assert there(kfp) == EXPECTED and kfp.twice == []  # type: ignore[attr-defined]
    return list(kfp.asked)


def test_a_crash_after_any_request_is_mended_by_the_next_time(kfp: Kfp) -> None:
    requests = requests_of_a_change(kfp)
    assert len(changing(requests)) >= 10
    for number, request in enumerate(requests):
        prepare(kfp)
        kfp.dead_after = number
        with pytest.raises(KubeflowError):
            apply(kfp, *AFTER)
        kfp.dead_after = None
        apply(kfp, *AFTER)
        assert there(kfp) == EXPECTED, (number, request)
        assert kfp.twice == [], (number, request)  # type: ignore[attr-defined]
        assert apply(kfp, *AFTER) == []
    print(f"{len(requests)} cases")


def test_whatever_fails_once_the_same_comes_out(kfp: Kfp) -> None:
    requests, cases = requests_of_a_change(kfp), 0
    for number, request in enumerate(requests):
        for status, takes_effect in ((429, False), (CUT, False), (500, True), (CUT, True)):
            prepare(kfp)
            kfp.fault_at = {number: Fault("", "", status, takes_effect=takes_effect)}
            apply(kfp, *AFTER)
            assert not kfp.fault_at
            assert there(kfp) == EXPECTED, (request, status, takes_effect)
            assert kfp.twice == [], (request, status, takes_effect)  # type: ignore[attr-defined]
            cases += 1
    print(f"{cases} cases")


def test_a_killed_command_is_mended_by_the_next_one(kfp: Kfp, tmp_path: Path) -> None:
    """SIGKILL the moment the server has made each change."""
    changes = len(changing(requests_of_a_change(kfp)))
    path = tmp_path / "s.yaml"
    write(path, *(
        {**entry(each.name, cron=each.cron, enabled=each.enabled, concurrency=each.concurrency),
         "experiment": each.experiment} for each in AFTER
    ))  # fmt: skip
    command = [sys.executable, "-m", "rlhf_pipelines.cli", "schedule", "apply", "--host", kfp.url, str(path), "--yes"]
    for number in range(1, changes + 1, 3):
        prepare(kfp)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def kill(process: subprocess.Popen[bytes] = process, number: int = number) -> None:
            if len(changing(kfp.asked)) == number:
                process.send_signal(signal.SIGKILL)

        kfp.watch = kill
        assert process.wait(60) == -signal.SIGKILL
        kfp.watch = None
        assert subprocess.run(command, capture_output=True).returncode == 0
        assert there(kfp) == EXPECTED
