"""How often the gate is wrong, both ways, by simulation: python benchmarks/gate_error_rates.py [PAIRS]

Scores of a prompt's two responses share the prompt's own difficulty; what differs is how much better the policy is, in
standard deviations of a response's score. The gate has its defaults. With a gain of 0 a passed policy is noise that was
promoted; with a gain above 0 a held policy is an improvement that was missed.
"""

from __future__ import annotations

import sys

import numpy

from rlhf_ppo.policy_evaluation.gate import decide
from rlhf_ppo.policy_evaluation.statistics import Samples, compare
from rlhf_ppo.settings import GateSettings

GAINS = (0.0, 0.1, 0.25, 0.5, 1.0)
PROMPTS = (50, 100, 256)
KINDS = {
    "normal": lambda generator, n: generator.normal(size=n),
    "heavy tails": lambda generator, n: generator.standard_t(3, size=n) / numpy.sqrt(3),
    "two values": lambda generator, n: numpy.where(generator.random(n) < 0.5, 1.0, -1.0),
}


def passed(kind: str, prompts: int, gain: float, pairs: int) -> float:
    """The share of ``pairs`` simulated evaluations that the gate passes."""
    generator = numpy.random.default_rng([prompts, round(gain * 100), len(kind)])
    texts = [f"a{row} b{row} c{row} d{row} e{row}" for row in range(prompts)]
    count = 0
    for _ in range(pairs):
        difficulty = generator.normal(size=prompts)
        policy, reference = (KINDS[kind](generator, prompts) for _ in range(2))
        if kind == "two values":
            policy = numpy.where(generator.random(prompts) < 0.5 + gain / 2, 1.0, -1.0)
            difficulty, gained = numpy.zeros(prompts), 0.0
        else:
            gained = gain
        nothing = ([5] * prompts, [True] * prompts, [2.0] * prompts)
        kl = generator.gamma(4.0, 1.5, prompts).tolist()
        found = compare(
            Samples(texts, (difficulty + policy + gained).tolist(), *nothing),
            Samples(texts, (difficulty + reference).tolist(), *nothing),
            kl,
            kl,
            1,
        )
        count += decide(found, GateSettings()).passed
    return count / pairs


def main(pairs: int) -> None:
    """Print a table for each kind of scores, and the worst of both errors."""
    print(f"share of {pairs} evaluations that the gate passes, by gain in standard deviations of a score")
    promoted, missed = [], []
    for kind in KINDS:
        print(f"\n{kind}\n{'prompts':>8}" + "".join(f"{gain:>8g}" for gain in GAINS))
        for prompts in PROMPTS:
            shares = [passed(kind, prompts, gain, pairs) for gain in GAINS]
            print(f"{prompts:>8}" + "".join(f"{share:>8.1%}" for share in shares), flush=True)
            promoted.append(shares[0])
            missed.append(1 - shares[-1])
    print(f"\nof equal policies it promotes at most {max(promoted):.1%}")
    print(f"of policies better by {GAINS[-1]:g} it holds at most {max(missed):.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
