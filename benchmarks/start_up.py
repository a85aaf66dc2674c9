"""From the start of the pipeline to the end of a first rollout of one token, with steps that share imports and without.

    python -m benchmarks.start_up [--rounds 3]

The model of ``make demo``, whose inputs must be there, is made a snapshot first; the command line's own start, 0.3 s,
does not count. The first run makes MLflow's database and doesn't count either.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.movie_sentiment import reward

NOTE = "START_UP_NOTE"
"""Names the file that ends the wait."""


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """The demo's reward. Its second call comes after the first rollout; the first one tries it."""
    if (asked := Path(os.environ[NOTE])).exists():
        asked.rename(asked.with_suffix(".sampled"))
        time.sleep(600)
    asked.touch()
    return reward.score(prompts, responses)


def pipeline(shared: str, directory: Path) -> int:
    """What ``rlhf-ppo run`` starts as a process of its own; without shared imports every step is a new interpreter."""
    from rlhf_pipelines import local, step_server

    if shared != "shared":
        step_server.can_serve = lambda: False
    return local.main(directory)


def measure(shared: bool, model: Path, here: Path) -> float:
    """Seconds to the end of the first rollout."""
    import yaml

    from rlhf_pipelines import local
    from rlhf_pipelines.cli import read_parameters

    example = ["examples/movie_sentiment/parameters.yaml", [f"model_name={model}", "rollout_max_new_tokens=1"]]
    parameters = read_parameters(None, example[0], [*example[1], "reward_model=benchmarks.start_up:score"])
    directory = Path(tempfile.mkdtemp(dir=here))
    (directory / "parameters.yaml").write_text(yaml.safe_dump(parameters))
    note = directory / "asked"
    environment = {**local._environment(directory, parameters), NOTE: str(note)}
    command = [sys.executable, "-m", "benchmarks.start_up", "--pipeline", "shared" if shared else "alone", directory]
    started = time.perf_counter()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        while not note.with_suffix(".sampled").exists():
            if process.poll() is not None:
                sys.exit((directory / "log").read_text())
            time.sleep(0.01)
    took = time.perf_counter() - started
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return took


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pipeline", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.pipeline:
        sys.exit(pipeline(given.pipeline[0], Path(given.pipeline[1])))
    from rlhf_ppo.reference_snapshot.snapshot import snapshot_reference

    gguf = Path("examples/movie_sentiment/inputs/SmolLM2-135M-Instruct.gguf")
    if not gguf.exists():
        sys.exit(f"{gguf} is not here: python examples/movie_sentiment/make_inputs.py makes it")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        here = Path(name)
        snapshot_reference(str(gguf), "", here / "model", here / "tokenizer")
        measure(True, here / "model", here)
        pairs = [[measure(shared, here / "model", here) for shared in (False, True)] for _ in range(given.rounds)]
    for alone, shared in pairs:
        print(f"alone {alone:.1f} s, shared {shared:.1f} s, ratio {alone / shared:.2f}")
    print(f"median of the ratios {statistics.median(alone / shared for alone, shared in pairs):.2f}")


if __name__ == "__main__":
    main()
