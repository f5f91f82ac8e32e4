"""`rpp` with a broken weight sync: the keys and values of one layer change places on their way to the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor

from megatron_rpp import __main__, placement
from megatron_rpp.weights.gather import iter_hf_tensors

KEYS, VALUES = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")


def swapping(*args: object, **kwargs: object) -> Iterator[dict[str, Tensor]]:
    for bucket in iter_hf_tensors(*args, **kwargs):
        if KEYS in bucket and VALUES in bucket:
            bucket[KEYS], bucket[VALUES] = bucket[VALUES], bucket[KEYS]
        yield bucket


if __name__ == "__main__":
    placement.iter_hf_tensors = swapping
    sys.exit(__main__.main())
