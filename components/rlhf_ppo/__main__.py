"""``python -m rlhf_ppo --version`` and ``python -m rlhf_ppo doctor``: what an image is, and whether it can train."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlhf_ppo import __version__


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if list(arguments) == ["--version"]:
        print(f"rlhf-ppo {__version__}")
        return 0
    if list(arguments) == ["doctor"]:
        from rlhf_ppo.doctor import doctor

        return doctor()
    print("usage: python -m rlhf_ppo --version | doctor", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
