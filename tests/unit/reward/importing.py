"""A reward whose module forks, and writes to the pool's socket where the environment says so, while it is imported."""

import os

from megatron_rpp.reward.base import RewardInput
from tests.unit.reward.attacks import FORKS, sockets

if os.environ.get("RPP_TEST_IMPORT") == "write":
    for _fd in sockets():
        os.write(_fd, b"\0\0\0\2{}")
else:
    FORKS[os.environ["RPP_TEST_IMPORT"]]()


def score(item: RewardInput) -> float:
    return float(item.response)
