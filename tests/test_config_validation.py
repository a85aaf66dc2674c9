"""The first step: what is wrong is said at once and before anything else runs; what may change is pinned."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rlhf_ppo.config_validation import sources
from rlhf_ppo.config_validation.validate import cache_keys, validate_config
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import RunSettings, decode, defaults

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """Knows the model and the dataset me/thing, each with the revisions of COMMITS."""

    asked: list[str] = []

    def do_GET(self) -> None:
        """Answer as the hub does, with the error codes that its client looks for."""
        self.asked.append(self.path)
        kind, _, rest = self.path.removeprefix("/api/").partition("/")
        repository, _, revision = rest.partition("/revision/")
        if kind not in ("models", "datasets") or repository != "me/thing":
            self.answer(404, {"error": "not found"}, "RepoNotFound")
        elif (revision or "main") not in COMMITS:
            self.answer(404, {"error": "not found"}, "RevisionNotFound")
        else:
            self.answer(200, {"id": repository, "sha": COMMITS[revision or "main"]})

    def answer(self, code: int, body: dict[str, str], error: str = "") -> None:
        """Send ``body`` as JSON."""
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Stay silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(Hub, "asked", [])
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model, prompts and a reward of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "own_reward.py").write_text("number = 3\ndef length(prompts, responses): return [1.0]\n")
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    (tmp_path / "exiting_reward.py").write_text("import sys\nsys.exit(3)\n")
    return tmp_path


def given(**changes: Any) -> dict[str, Any]:
    """Every parameter, with sources that are there."""
    local = {"model_name": "model", "query_dataset": "prompts.jsonl", "reward_model": "own_reward:length"}
    return {**defaults(), **local, **changes}


def problems(**changes: Any) -> list[str]:
    """What is wrong with the parameters."""
    with pytest.raises(InputError) as caught:
        validate_config(given(**changes))
    return caught.value.problems


def test_valid_parameters_come_back_as_json_of_the_settings() -> None:
    settings = RunSettings.from_json(validate_config(given(batch_size=8, max_grad_norm=0.0)))
    assert settings.ppo.batch_size == 8 and settings.ppo.max_grad_norm is None
    assert settings.ppo.model_name == "model" and settings.model.model_revision == ""


def test_everything_that_is_wrong_is_said_at_once() -> None:
    found = problems(
        batch_size=-1, lam=2.0, data_split=3, model_name="./none", reward_model="none:f", query_dataset="/no"
    )
    for start in ("batch_size=-1", "lam=2.0", "data_split=3", "model_name='./none'", "query_dataset='/no'"):
        assert len([problem for problem in found if problem.startswith(start)]) == 1, start
    assert len([problem for problem in found if problem.startswith("reward_model='none:f'")]) == 1
    assert len(found) == 6


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [
        ("model_name", "models/of/mine", "does not exist"),
        ("model_name", "smollm.gguf", "does not exist"),
        ("model_name", "prompts.jsonl", "is a file, but no GGUF file"),
        ("model_name", "s3://bucket/model", "is a URL"),
        ("model_name", "two words", "neither a path that exists nor a hub id"),
        ("query_dataset", "mine.jsonl", "does not exist"),
        ("query_dataset", "../data", "does not exist"),
        ("query_dataset", "two words", "neither a path that exists nor a hub id"),
        ("reward_model", "./classifier", "does not exist"),
        ("reward_model", "prompts.jsonl", "is a file, not a model directory"),
        ("reward_model", "no_such_module:score", "can't be imported (ModuleNotFoundError"),
        ("reward_model", "broken_reward:score", "can't be imported (ZeroDivisionError"),
        ("reward_model", "exiting_reward:score", "can't be imported (SystemExit: 3"),
        ("reward_model", "own_reward:score", "has no score"),
        ("reward_model", "own_reward:number", "is 3: give a function"),
        ("reward_model", "https:///score", "names no server"),
        ("ppo_value_head", "heads/none", "does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_named_with_what_would_be_valid(parameter: str, value: str, words: str) -> None:
    (problem,) = problems(**{parameter: value})
    assert problem.startswith(f"{parameter}={value!r} ") and words in problem


def test_a_model_without_safe_weights_is_refused(here: Path) -> None:
    (here / "model" / "model.safetensors").rename(here / "model" / "pytorch_model.bin")
    (problem,) = problems()
    assert "model_name='model' has no weights as *.safetensors" in problem
    (problem,) = problems(model_name="me/thing", reward_model="model", model_revision="c" * 40)
    assert "reward_model='model' has no weights as *.safetensors" in problem
    (here / "model" / "config.json").unlink()
    assert "has no config.json" in problems()[0]
    (here / "model" / "small.gguf").write_text("GGUF")
    validate_config(given())
    validate_config(given(model_name="model/small.gguf"))


@pytest.mark.parametrize("name", ["a/b/c", "my repo", "me/--model"])
def test_a_repository_whose_name_the_hub_would_refuse_is_refused(name: str) -> None:
    (problem,) = problems(hub_repo_id=name)
    assert problem.startswith(f"hub_repo_id={name!r} can't be a repository: ")
    (problem,) = problems(push_to_hub_if_best_kwargs={"repo_id": name})
    assert problem.startswith(f"push_to_hub_if_best_kwargs' repo_id={name!r} can't be a repository: ")
    validate_config(given(hub_repo_id="me/my-model", push_to_hub_if_best_kwargs={"repo_id": "me/my-model"}))


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    for name in ("seed", "eval_seed"):
        assert problems(**{name: 2**32}) == [f"{name}={2**32} is not valid: give an integer >= 0 and <= {2**32 - 1}"]


def test_a_revision_of_something_local_is_refused() -> None:
    found = problems(model_revision="v1", data_revision="v2", reward_revision="v3")
    assert [problem.partition(" ")[0] for problem in found] == [
        "model_revision='v1'",
        "data_revision='v2'",
        "reward_revision='v3'",
    ]


def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems(log_with="wandb")
    assert problem.startswith("log_with='wandb'") and "rlhf-ppo[wandb]" in problem


def test_whatever_may_move_on_the_hub_becomes_a_commit(hub: type[Hub]) -> None:
    config = validate_config(
        given(model_name="me/thing", model_revision="v1", query_dataset="me/thing", reward_model="me/thing")
    )
    settings = RunSettings.from_json(config)
    assert settings.model.model_revision == COMMITS["v1"]
    assert settings.data.data_revision == settings.reward.reward_revision == COMMITS["main"]
    assert cache_keys(config) == (COMMITS["v1"], "", COMMITS["main"], "")


def test_the_parts_of_a_sum_are_looked_at_and_pinned_like_the_reward_itself(hub: type[Hub]) -> None:
    weights = {"own_reward:length": 0.5, "me/thing": 1.0, "me/thing@v1": 2.0, "https://rewards.mine/score": 3.0}
    settings = RunSettings.from_json(validate_config(given(reward_sum=weights)))
    assert settings.reward.reward_sum == {
        "own_reward:length": 0.5,
        f"me/thing@{COMMITS['main']}": 1.0,
        f"me/thing@{COMMITS['v1']}": 2.0,
        "https://rewards.mine/score": 3.0,
    }
    (wrong,) = problems(reward_sum={"own_reward:width": 1.0})
    assert wrong.startswith("reward_sum has 'own_reward:width', which is not there")
    (unknown,) = problems(reward_sum={"me/else": 1.0})
    assert "me/else" in unknown and unknown.startswith("reward_sum=")


def test_an_adapter_can_be_pushed_alone_only_where_there_is_one_and_its_base_is_on_the_hub(hub: type[Hub]) -> None:
    validate_config(given(model_name="me/thing", hub_adapter=True, model_lora_r=8))
    (wrong,) = problems(model_name="me/thing", hub_adapter=True)
    assert wrong == "hub_adapter=True needs an adapter: set model_lora_r, e.g. to 16, or hub_adapter=False"
    (wrong,) = problems(hub_adapter=True, model_lora_r=8)
    assert "needs a model that the adapter can refer to, and model_name=" in wrong and "is not on the hub" in wrong


@pytest.mark.parametrize("name", ["me/film", "a:b", "it's", "a\nb"])
def test_a_registered_model_has_a_name_that_mlflow_takes(hub: type[Hub], name: str) -> None:
    (wrong,) = problems(mlflow_registered_model=name)
    assert wrong.startswith(f"mlflow_registered_model={name!r} is no name of a model")


def test_the_registered_model_is_named_like_the_repository() -> None:
    needed = {"model_name": "m", "query_dataset": "d", "reward_model": "m:f"}
    assert decode({**needed, "hub_repo_id": "me/film"}).registered_model == "me--film"
    assert decode({**needed, "hub_repo_id": "me/film", "mlflow_registered_model": "x"}).registered_model == "x"
    assert decode(needed).registered_model == ""


def test_a_judge_is_looked_at_and_pinned_like_the_reward_itself(hub: type[Hub]) -> None:
    settings = RunSettings.from_json(validate_config(given(eval_judge="me/thing@v1")))
    assert settings.evaluation.eval_judge == f"me/thing@{COMMITS['v1']}"
    (wrong,) = problems(eval_judge="own_reward:width")
    assert wrong.startswith("eval_judge='own_reward:width' is not there")
    (wrong,) = problems(eval_judge="https://me:pw7@host/x")
    assert "eval_judge holds a password" in wrong and "pw7" not in wrong


def test_a_password_in_the_address_of_a_reward_is_refused_and_not_repeated() -> None:
    for changes in ({"reward_model": "https://me:pw7@host/x"}, {"reward_sum": {"https://me:pw7@host/x": 1.0}}):
        (problem,) = problems(**changes)
        assert "RLHF_PPO_REWARD_TOKEN" in problem and "pw7" not in problem


def test_a_commit_is_not_asked_for(hub: type[Hub]) -> None:
    config = validate_config(given(model_name="me/thing", model_revision="c" * 40))
    assert cache_keys(config)[:2] == ("c" * 40, "") and hub.asked == []


def test_what_the_hub_does_not_know_is_refused_at_once(hub: type[Hub]) -> None:
    found = problems(model_name="me/other", query_dataset="me/thing", data_revision="v9", reward_model="me/else")
    assert [problem.partition(" ")[0] for problem in found] == [
        "model_name='me/other'",
        "data_revision='v9'",
        "reward_model='me/else'",
    ]


def test_a_hub_out_of_reach_stops_nothing_and_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    config = validate_config(given(model_name="me/thing", model_revision="v1"))
    first, second = cache_keys(config), cache_keys(config)
    assert first.model_revision == second.model_revision == "v1"
    assert first.model_digest != second.model_digest
    assert first.data_digest == second.data_digest


def test_the_digest_changes_with_the_content_and_only_with_it(here: Path) -> None:
    config = validate_config(given())
    before = cache_keys(config)
    assert cache_keys(config) == before and before.model_revision == before.data_revision == ""
    (here / "prompts.jsonl").touch()
    assert cache_keys(config) == before
    (here / "prompts.jsonl").write_text('{"prompt": "hellO"}\n')
    after = cache_keys(config)
    assert after.data_digest != before.data_digest and after.model_digest == before.model_digest
    (here / "model" / "model.safetensors").rename(here / "model" / "other.safetensors")
    assert cache_keys(config).model_digest != before.model_digest


def test_a_url_is_told_by_its_version_and_never_taken_for_unchanged(here: Path) -> None:
    url = (here / "prompts.jsonl").as_uri()
    before = sources.digest_of_url(url)
    assert sources.digest_of_url(url) == before
    (here / "prompts.jsonl").write_text("something longer than it was before\n")
    assert sources.digest_of_url(url) != before
    assert sources.digest_of_url((here / "model").as_uri()) == sources.digest_of_url((here / "model").as_uri())
    # A store that tells nothing but names and sizes, and one that can't be reached.
    fsspec.filesystem("memory").pipe_file("/prompts.jsonl", b"{}")
    unknown = "memory://prompts.jsonl"
    assert sources.digest_of_url(unknown) != sources.digest_of_url(unknown)
    assert sources.digest_of_url("nosuch://a") != sources.digest_of_url("nosuch://a")
