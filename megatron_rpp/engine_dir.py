"""The HF directory that an engine in block FP8 is started from: the model's, with a config.json that says FP8.

It lies in the run's directory and is made anew by every run; model.hf is only read. An engine that is given its weights needs
none in it; one that reads them itself, for `rpp eval`, gets them quantised, with the bits that an update would bring.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.rollout.coverage import TENSORS_FILE
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.hf_io import HFCheckpoint, carry_over, open_hf, save_hf
from megatron_rpp.weights.quantise import DTYPE, QUANTIZATION_CONFIG, SCALE_ENDING, checkpoint_shapes, checkpoint_tensors, is_quantised
from megatron_rpp.weights.rect import Rect, Shape, as_matrix

FOLDER = "engine"  # in the run's directory
BLACKWELL = 10


def server_args(*, reads_weights: bool, capability: int | None) -> dict[str, Any]:
    """What SGLang is told beside the directory. capability: the GPU's major number, None on a CPU.

    From Blackwell on SGLang's own choice, DeepGEMM, turns the scales into packed powers of two when it has loaded weights, and
    then has no place for others; Triton's kernels take them as they are.
    """
    args: dict[str, Any] = {} if reads_weights else {"load_format": "dummy"}
    if capability is not None and capability >= BLACKWELL:
        args["fp8_gemm_runner_backend"] = "triton"
    return args


def write_engine_dir(folder: Path, hf: Path, *, dtype: torch.dtype, with_weights: bool) -> None:
    """Make `folder`, in place of one that is there, from the HF directory `hf`.

    dtype: of what is not quantised, and what the rest is cast to before it is.
    Raises: CheckpointError; NumericsError for a weight that is not finite; OSError.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with open_hf(hf) as checkpoint:
        if with_weights:
            _write_weights(folder, checkpoint, dtype)
        else:
            folder.mkdir(parents=True)
            shapes = checkpoint_shapes({name: entry.shape for name, entry in checkpoint.entries.items()})
            (folder / TENSORS_FILE).write_text(json.dumps(shapes), encoding="utf-8")
    carry_over(hf, folder, dtype, quantization=QUANTIZATION_CONFIG)


def _write_weights(folder: Path, checkpoint: HFCheckpoint, dtype: torch.dtype) -> None:
    model = describe(checkpoint.config)
    shapes = checkpoint_shapes(model.hf_shapes)
    dtypes = dict(model.hf_dtypes)
    dtypes |= {name: DTYPE for name in model.hf_shapes if is_quantised(name)}
    dtypes |= {name: torch.float32 for name in shapes if name.endswith(SCALE_ENDING)}
    tensors = checkpoint_tensors(_whole_tensors(checkpoint, model.hf_shapes, model.hf_dtypes, dtype))
    save_hf(folder, tensors, shapes=shapes, dtype=dtype, own_dtypes=dtypes, source=checkpoint.dir)


def _whole_tensors(
    checkpoint: HFCheckpoint, shapes: dict[str, Shape], own_dtypes: dict[str, torch.dtype], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, checkpoint.read(Rect(name, 0, 0, *as_matrix(shape))).view(shape).to(own_dtypes.get(name, dtype))
