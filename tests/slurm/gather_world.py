"""One rank of the Slurm test job: finds its place, meets the others on gloo, and prints what it saw."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import timedelta

import torch
from torch import distributed as dist

from megatron_rpp.dist.world import World

world = World.from_env()
address = f"tcp://{world.master_addr}:{world.master_port}"
dist.init_process_group("gloo", init_method=address, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=60))
total = torch.tensor([world.rank + 1.0])
dist.all_reduce(total)
print(json.dumps({**asdict(world), "sum": total.item(), "node": os.environ["SLURMD_NODENAME"]}), flush=True)
dist.destroy_process_group()
