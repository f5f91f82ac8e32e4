"""HF directories in block FP8: read as the wide model that they stand for, and made from one, a strip of rows at a time.

The format is that of DeepSeek-V3's published checkpoints: beside `X.weight` in E4M3 lies `X.weight_scale_inv`, a number for every
block of 128 x 128, and config.json has a quantization_config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.weights.compare import Described, Part, Source
from megatron_rpp.weights.hf_io import HFCheckpoint, open_hf
from megatron_rpp.weights.quantise import (
    BLOCK,
    DTYPE,
    QUANTIZATION_CONFIG,
    SCALE_ENDING,
    Scales,
    checkpoint_shapes,
    is_quantised,
    quantise,
    scale_shape,
)
from megatron_rpp.weights.rect import Rect, Shape, as_matrix
from megatron_rpp.weights.safetensors_file import WIDE_DTYPES

KEY = "quantization_config"  # of config.json
_STRIP_BYTES = 8 * 2**20  # of the float32 numbers in work at a time; one row of blocks where that is more
_MEANING = {name: QUANTIZATION_CONFIG[name] for name in ("quant_method", "weight_block_size")}


def quantization_config(scales: Scales) -> dict[str, Any]:
    """The entry of config.json. scale_fmt: as DeepSeek-V3.1 says it."""
    return {**QUANTIZATION_CONFIG, **({"scale_fmt": "ue8m0"} if scales == "power_of_two" else {})}


def scales_of(config: Mapping[str, Any]) -> Scales | None:
    """Which scales a config.json speaks of; None where it speaks of no FP8."""
    said = config.get(KEY)
    if said is None:
        return None
    return "power_of_two" if said.get("scale_fmt") == "ue8m0" else "float32"


def wide_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without its entry on quantization: that of the same model in wide tensors."""
    return {name: value for name, value in config.items() if name != KEY}


def open_wide(folder: Path | str) -> HFCheckpoint:
    """Opens an HF directory; one in block FP8 as the wide tensors that it stands for.

    Raises: CheckpointError as `open_hf`, for a quantisation of another kind, and for scales that are missing or of a wrong shape.
    """
    stored = open_hf(folder)
    said = stored.config.get(KEY)
    if said is None:
        return stored
    if not isinstance(said, dict) or any(said.get(name) != value for name, value in _MEANING.items()):
        got = {name: said.get(name) for name in _MEANING} if isinstance(said, dict) else said
        fix = "fetch the model in bfloat16, or dequantise it with its publisher's program"
        raise CheckpointError(
            "quantised in a way that is not read here", where=f"{folder}/config.json", expected=_MEANING, got=got, fix=fix
        )
    return Dequantised(stored)


class Dequantised(HFCheckpoint):
    """A directory in block FP8 with weight * scale_inv in the dtype of config.json (bfloat16 where it names none) for tensors.

    The product is taken in float32 and rounded once, as DeepSeek-V3's fp8_cast_bf16 does. config has no quantization_config.
    """

    def __init__(self, stored: HFCheckpoint) -> None:
        config = wide_config(stored.config)
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch."), None)
        if dtype not in WIDE_DTYPES.values():
            raise CheckpointError("not a dtype of weights", where=f"{stored.dir}/config.json", expected=sorted(WIDE_DTYPES), got=dtype)
        in_fp8 = {name for name, entry in stored.entries.items() if entry.dtype == DTYPE}
        for name in in_fp8:
            entry, scales = stored.entries[name], stored.entries.get(name + SCALE_ENDING)
            if scales is None:
                raise CheckpointError(f"{name} is in FP8 and has no scales", where=str(entry.file), expected=name + SCALE_ENDING)
            if len(entry.shape) != 2 or scales.shape != scale_shape(entry.shape) or scales.dtype == DTYPE:
                expected = f"one for each block of 128 x 128 of {entry.shape}"
                raise CheckpointError(f"{name} has other scales", where=str(scales.file), expected=expected, got=scales.shape)
        endings = {name + SCALE_ENDING for name in in_fp8}
        entries = {
            name: replace(entry, dtype=dtype) if name in in_fp8 else entry for name, entry in stored.entries.items() if name not in endings
        }
        super().__init__(stored.dir, config, entries)
        self._stored, self._in_fp8 = stored, in_fp8

    def close(self) -> None:
        self._stored.close()

    def read(self, rect: Rect) -> Tensor:
        if rect.hf not in self._in_fp8:
            return self._stored.read(rect)
        taken = torch.empty(rect.rows, rect.cols, dtype=self.entries[rect.hf].dtype)
        for strip in _strips(rect):
            values = self._stored.read(strip).to(torch.float32)
            top, left = strip.row // BLOCK, strip.col // BLOCK
            rows, cols = _ceil(strip.row + strip.rows) - top, _ceil(strip.col + strip.cols) - left
            scales = self._stored.read(Rect(strip.hf + SCALE_ENDING, top, left, rows, cols)).to(torch.float32)
            of_row = torch.arange(strip.row, strip.row + strip.rows) // BLOCK - top
            of_col = torch.arange(strip.col, strip.col + strip.cols) // BLOCK - left
            at = strip.row - rect.row
            taken[at : at + strip.rows] = values.mul_(scales[:, of_col][of_row])
        return taken


@dataclass(frozen=True, slots=True)
class Described8:
    """Shape and dtype of one tensor of the FP8 form."""

    shape: Shape
    dtype: torch.dtype


class Quantised:
    """The block-FP8 form of wide tensors: a Source whose weights and scales are made as they are read.

    dtypes: what each wide tensor is cast to before it is quantised. entries: in the order of a file, a weight's scales after it.
    """

    def __init__(self, source: Source, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], scales: Scales) -> None:
        self._source, self._dtypes, self._scales = source, dtypes, scales
        self.entries: dict[str, Described] = {name: self._entry(name, shape) for name, shape in checkpoint_shapes(shapes).items()}
        # The scales of the weight that was read last, by row of blocks: they are asked for right after it.
        self._kept: tuple[str, dict[int, Tensor]] = ("", {})

    def _entry(self, name: str, shape: Shape) -> Described8:
        if name.endswith(SCALE_ENDING):
            return Described8(shape, torch.float32)
        return Described8(shape, DTYPE if is_quantised(name) else self._dtypes[name])

    def read(self, rect: Rect) -> Tensor:
        """The rectangle. Raises: what reading the wide tensor raises; NumericsError for an element that is not finite."""
        if rect.hf.endswith(SCALE_ENDING):
            return self._read_scales(rect)
        if self.entries[rect.hf].dtype != DTYPE:
            return self._source.read(rect).to(self._dtypes[rect.hf])
        taken = torch.empty(rect.rows, rect.cols, dtype=DTYPE)
        rows, cols = as_matrix(self.entries[rect.hf].shape)
        first, last = rect.row // BLOCK * BLOCK, min(_ceil(rect.row + rect.rows) * BLOCK, rows)
        for strip in _strips(Rect(rect.hf, first, 0, last - first, cols)):
            values = self._quantise(strip)
            start, stop = max(strip.row, rect.row), min(strip.row + strip.rows, rect.row + rect.rows)
            part = values[start - strip.row : stop - strip.row, rect.col : rect.col + rect.cols]
            taken[start - rect.row : stop - rect.row] = part
        return taken

    def _read_scales(self, rect: Rect) -> Tensor:
        name, found = rect.hf.removesuffix(SCALE_ENDING), []
        rows, cols = self.entries[name].shape
        for row in range(rect.row, rect.row + rect.rows):
            if self._kept[0] != name or row not in self._kept[1]:
                self._quantise(Rect(name, row * BLOCK, 0, min(BLOCK, rows - row * BLOCK), cols))
            found.append(self._kept[1][row][rect.col : rect.col + rect.cols])
        return torch.stack(found)

    def _quantise(self, strip: Rect) -> Tensor:
        values, scales = quantise(self._source.read(strip).to(self._dtypes[strip.hf]), scales=self._scales, name=strip.span)
        if self._kept[0] != strip.hf:
            self._kept = (strip.hf, {})
        self._kept[1].update({strip.row // BLOCK + number: row for number, row in enumerate(scales)})
        return values


def fp8_part(stored: HFCheckpoint, shapes: Mapping[str, Shape]) -> Source:
    """Of a directory in block FP8 what belongs to the tensors `shapes`, as it is stored."""
    wanted = checkpoint_shapes(shapes)
    return Part({name: entry for name, entry in stored.entries.items() if name in wanted}, stored.read)


def _ceil(size: int) -> int:
    return math.ceil(size / BLOCK)


def _strips(rect: Rect) -> Iterator[Rect]:
    """Runs of rows that end where a row of blocks does, or with the rectangle."""
    step = max(1, _STRIP_BYTES // (4 * rect.cols * BLOCK)) * BLOCK
    row, end = rect.row, rect.row + rect.rows
    while row < end:
        stop = min(row // BLOCK * BLOCK + step, end)
        yield Rect(rect.hf, row, rect.col, stop - row, rect.cols)
        row = stop
