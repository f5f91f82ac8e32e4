"""The random states of a rank, into a checkpoint and back.

Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

_NUMPY_WORDS = 624  # of the Mersenne Twister, whose position is an index into them


def random_states() -> dict[str, Any]:
    """The state of every generator of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore_random_states(state: dict[str, Any]) -> None:
    """Undo what happened since `random_states`.

    Raises: ValueError, TypeError, KeyError or RuntimeError for what is not its result.
    """
    tracker = tensor_parallel.get_cuda_rng_tracker()
    name, words, position, *_ = state["numpy"]
    if name != "MT19937" or words.shape != (_NUMPY_WORDS,) or not 0 <= position <= _NUMPY_WORDS:
        raise ValueError("numpy's random state is not one")  # numpy itself would read beyond its words
    mine = tracker.get_states()
    if state["megatron"].keys() != mine.keys():
        raise ValueError(f"random states {sorted(map(str, state['megatron']))}, not {sorted(mine)}")
    for one in state["megatron"].values():
        torch.Generator("cuda" if torch.cuda.is_available() else "cpu").set_state(one)  # the tracker would keep anything
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tracker.set_states(state["megatron"])
