"""`rpp` whose engines' ranks lie on the GPUs of their trainer ranks in reverse: what a run on two ranks never chooses by itself."""

from __future__ import annotations

import sys

from megatron_rpp import __main__, engines
from megatron_rpp.config.schema import Config
from megatron_rpp.dist.layout import EngineGroup


def crossed(cfg: Config, group: EngineGroup, count: int) -> tuple[int, ...]:
    return group.ranks[::-1]


if __name__ == "__main__":
    engines.places_of = crossed
    sys.exit(__main__.main())
