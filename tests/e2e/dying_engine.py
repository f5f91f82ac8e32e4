"""`rpp` with an engine whose worker is killed when the weights of the second step are about to reach it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_rpp import __main__
from megatron_rpp.rollout.engine import Engine

real_update, killed = Engine.update_shards, []


def dying(engine: Engine, version: int, *args: Any, **kwargs: Any) -> Any:
    if version == 2 and not killed:
        killed.append(next(report["pid"] for report in engine.info.reports if report["role"] == "scheduler"))
        os.kill(killed[0], signal.SIGKILL)
        print(f"killed scheduler {killed[0]}", flush=True)
    return real_update(engine, version, *args, **kwargs)


if __name__ == "__main__":
    Engine.update_shards = dying
    sys.exit(__main__.main())
