"""One rank of the Slurm test job: finds its place, meets the others on gloo, and prints what it saw."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from megatron_rpp.dist.store import open_run_store
from megatron_rpp.dist.world import World

world = World.from_env()
store = open_run_store(world, Path("run"), 60.0)
dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=60))
total = torch.tensor([world.rank + 1.0])
dist.all_reduce(total)
print(json.dumps({**asdict(world), "sum": total.item(), "node": os.environ["SLURMD_NODENAME"]}), flush=True)
dist.destroy_process_group()
