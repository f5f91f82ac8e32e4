"""Whether a process group carries FP8 numbers as such."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.dist.collectives import DEFAULT_DEADLINE_S, all_gather
from megatron_rpp.dist.groups import ProcessGroup
from megatron_rpp.errors import RppError


def gathers_float8(group: ProcessGroup, *, deadline_s: float = DEFAULT_DEADLINE_S) -> bool:
    """Tries, once, to gather float8_e4m3fn; the same answer on every rank. Where it is False, the same bytes travel as uint8.

    nccl takes the type in some builds, gloo does not. No reduction is tried: a sum in FP8 would round.
    Entered by every rank. Units: deadline_s in seconds. Raises: DeadlineError when a peer does not come.
    """
    works = _tried(torch.tensor([1.0, -0.4375, 448.0]).to(torch.float8_e4m3fn), group, deadline_s)
    # A rank that was refused has sent nothing; the others are told.
    answers = all_gather(torch.tensor([works], dtype=torch.uint8), group, name="FP8: answers", deadline_s=deadline_s)
    return all(bool(answer) for answer in answers)


def _tried(values: Tensor, group: ProcessGroup, deadline_s: float) -> bool:
    try:
        parts = all_gather(values, group, name="FP8: a try", deadline_s=deadline_s)
    except RppError:
        raise
    except (RuntimeError, TypeError, ValueError):  # the backends name no type of their own for "not this dtype"
        return False
    return all(torch.equal(part.view(torch.uint8), values.view(torch.uint8)) for part in parts)
