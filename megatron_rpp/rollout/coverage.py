"""One weight update inside a scheduler process: what must come, what has come, and how it gets into the model.

Two kinds. Whole tensors under HF names go through the model's own load_weights and are checked against the HF directory that
the engine was started from. Shards come under SGLang's names, already cut for this rank, and are copied straight into the
parameters; the trainer says before how many elements of each parameter it will bring.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_rpp.errors import EngineError
from megatron_rpp.input_file import open_file, parse_json, read_object
from megatron_rpp.rollout import device_memory, worker

WHOLE_FILE = "expected.json"  # HF name -> shape of every tensor of the HF directory
TENSORS_FILE = "tensors.json"  # the same, in an HF directory that has no weights
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_NAMED = 3  # names spelt out in an error
CACHE_SCALES = (".k_scale", ".v_scale")  # endings of parameters that belong to the key-value cache of an FP8 model, not to its weights

Expected = dict[str, tuple[list[int], int]]  # SGLang name -> shape of the parameter on one rank, elements that come


class Update(Protocol):
    """The part of a weight update that one process sees. session: which update it belongs to."""

    session: str

    def take(self, model: nn.Module, bucket: dict[str, Any]) -> None:
        """Fill the model from a bucket of the trainer's memory. Raises: ValueError naming what does not fit."""
        ...

    def finish(self, model: nn.Module) -> None:
        """Nothing more will come. Raises: ValueError naming what is missing."""
        ...


def open_update(session: str, is_sharded: bool, rank: int, model: nn.Module) -> Update:
    """Raises: ValueError when the model's parameters are not those that shards are announced for."""
    _reset_cache_scales(model)
    if not is_sharded:
        return WholeTensors(session, json.loads((worker.folder() / WHOLE_FILE).read_text(encoding="utf-8")))
    announced = json.loads(_shards_file(rank).read_text(encoding="utf-8"))
    return Shards(session, {name: (shape, elements) for name, (shape, elements) in announced.items()}, model)


@torch.no_grad()
def _reset_cache_scales(model: nn.Module) -> None:
    """Say that there are none: an engine that was started without weights has random ones. SGLang makes 1 of it when an update ends."""
    for name, parameter in model.named_parameters():
        if name.endswith(CACHE_SCALES):
            parameter.fill_(-1.0)


@dataclass
class WholeTensors:
    """Every tensor of the HF directory, once, in its shape, and nothing else."""

    session: str
    expected: dict[str, list[int]]
    seen: set[str] = field(default_factory=set)

    def take(self, model: nn.Module, bucket: dict[str, Any]) -> None:
        for name, _, shape, _ in bucket["tensors"]:
            self._check(name, shape)
        device = next(model.parameters()).device
        model.load_weights((name, tensor.to(device)) for name, tensor in device_memory.unpack(bucket))

    def _check(self, name: str, shape: list[int]) -> None:
        if name not in self.expected:
            raise ValueError(f"unknown tensor {name}")
        if name in self.seen:
            raise ValueError(f"tensor {name} came twice")
        if shape != self.expected[name]:
            raise ValueError(f"tensor {name} has shape {shape}, the engine's is {self.expected[name]}")
        self.seen.add(name)

    def finish(self, model: nn.Module) -> None:
        missing = sorted(self.expected.keys() - self.seen)
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.expected)} tensors never came: {_some(missing)}")


class Shards:
    """Every parameter of this rank of the engine, in rectangles [rows, cols] that together are as many elements as announced.

    A rectangle's name is [parameter, leading indices, row, column]: where its first element belongs. What is not announced of a
    parameter pads its vocabulary and is zeroed.
    """

    def __init__(self, session: str, expected: Expected, model: nn.Module) -> None:
        self.session, self._left = session, {name: elements for name, (_, elements) in expected.items()}
        self._touched: set[str] = set()
        self._parameters = {name: tensor for name, tensor in model.named_parameters() if not name.endswith(CACHE_SCALES)}
        unknown, missing = expected.keys() - self._parameters.keys(), self._parameters.keys() - expected.keys()
        if unknown or missing:
            raise ValueError(f"announced but not in the model: {_some(unknown)}; in the model but not announced: {_some(missing)}")
        for name, (shape, _) in expected.items():
            if list(self._parameters[name].shape) != shape:
                raise ValueError(f"parameter {name} has shape {list(self._parameters[name].shape)}, announced is {shape}")

    @torch.no_grad()
    def take(self, model: nn.Module, bucket: dict[str, Any]) -> None:
        for (name, index, row, col), tensor in device_memory.unpack(bucket):
            if name not in self._parameters:
                raise ValueError(f"unknown parameter {name}")
            parameter = self._parameters[name]
            if tensor.dtype != parameter.dtype:
                raise ValueError(f"a part of {name} is {tensor.dtype}, the parameter {parameter.dtype}")
            if name not in self._touched:
                self._touched.add(name)
                if self._left[name] < parameter.numel():
                    parameter.zero_()
            target = _matrix(parameter, index)[row : row + tensor.shape[0], col : col + tensor.shape[1]]
            if target.shape != tensor.shape:
                raise ValueError(f"a part of {name}, {list(tensor.shape)} at {[*index, row, col]}, leaves its {list(parameter.shape)}")
            target.copy_(tensor)
            self._left[name] -= tensor.numel()

    def finish(self, model: nn.Module) -> None:
        wrong = sorted(name for name, left in self._left.items() if left)
        if wrong:
            which = {"never came whole": [name for name in wrong if self._left[name] > 0], "came twice in part": []}
            which["came twice in part"] = [name for name in wrong if self._left[name] < 0]
            what = "; ".join(f"{len(names)} parameters {how}: {_some(names)}" for how, names in which.items() if names)
            raise ValueError(what)
        if hasattr(model, "post_load_weights"):  # MLA keeps matrices that it derives from kv_b_proj
            model.post_load_weights()


def _matrix(parameter: Tensor, index: list[int]) -> Tensor:
    for i in index:
        parameter = parameter[i]
    return parameter if parameter.dim() == 2 else parameter[:, None]


def _some(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return (", ".join(names[:MAX_NAMED]) + more) or "none"


def _shards_file(rank: int) -> Path:
    return worker.folder() / f"shards-{rank}.json"


def announce_shards(expected: list[dict[str, Any]]) -> None:
    """Note what shards each rank of the engine will get. Called by the server."""
    for rank, parameters in enumerate(expected):
        worker.write_json(_shards_file(rank), parameters)


def write_expected(hf: Path) -> int:
    """Note the tensors that an update of whole ones must bring, from the headers of the HF directory's files; their number.

    A directory without weights names them in TENSORS_FILE. A tied output matrix that the files hold all the same is left out:
    SGLang skips it. Raises: EngineError when a header cannot be read.
    """
    found: dict[str, list[int]] = {}
    for path in sorted(hf.glob("*.safetensors")):
        found |= _shapes(path)
    if (hf / TENSORS_FILE).exists():
        found = read_object(hf / TENSORS_FILE, EngineError)
    if read_object(hf / "config.json", EngineError).get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    worker.write_json(worker.folder() / WHOLE_FILE, found)
    return len(found)


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of the tensors in a safetensors file."""
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, _MAX_HEADER_BYTES)))
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise EngineError("cannot read the file", where=str(path), got=error.strerror) from None
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise EngineError("the header is not that of a safetensors file", where=str(path), got=error) from None
