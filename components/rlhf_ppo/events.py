"""What a step tells the person who started it: progress, errors, results, one JSON object a line.

A local run names a file in ``RLHF_PPO_EVENTS`` and shows what is appended there; on a cluster the same lines go to the
log of the pod.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

EVENTS_VARIABLE = "RLHF_PPO_EVENTS"


def emit(kind: str, **data: Any) -> None:
    """Append one event. ``data`` must be JSON; numbers that are not finite become null."""
    line = json.dumps({"kind": kind, "time": time.time(), **_finite(data)}, ensure_ascii=False)
    path = os.environ.get(EVENTS_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    else:
        print(line, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
