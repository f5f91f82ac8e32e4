"""Under which keys a Megatron checkpoint holds a model, whatever layout it was saved from.

A key stands for the tensor of tp 1. Layers that are all alike share one tensor with the layer as its first axis; a model with
experts has a key for each layer, and the experts of a layer share one tensor in the same way.
Source: sharded_state_dict of megatron.core's TransformerBlock, TEGroupedMLP and SequentialMLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rpp.weights.families.parameter import Model, Parameter
from megatron_rpp.weights.rect import Shape

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.mlp\.experts\.(linear_fc\d)\.weight\d+$")
_NO_STATE = ("embedding.word_embeddings", "router")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter of the model lies: element `index` of the first len(index) axes, of sizes `lead`, of tensor `key`."""

    parameter: Parameter
    key: str
    index: Shape = ()
    lead: Shape = ()

    @property
    def matrix(self) -> Shape:
        """The other axes, without padding."""
        rows, cols = sum(block.rows for block in self.parameter.blocks), self.parameter.blocks[0].cols
        return (rows, cols) if self.parameter.ndim == 2 else (rows,)


def places(model: Model, *, by_layer: bool | None = None) -> Iterator[Place]:
    """All parameters in the order of the forward pass; a tied head is the embedding and has no place of its own.

    by_layer: a key for each layer. None: as Megatron does for this model.
    """
    by_layer = has_experts(model) if by_layer is None else by_layer
    for parameter in model.parameters():
        if model.dims.is_tied and parameter is model.head:
            continue
        key, index, lead = parameter.name, (), ()
        if (layer := _LAYER.match(key)) is not None and not by_layer:
            key, index, lead = "decoder.layers." + key[layer.end() :], (int(layer[1]),), (model.dims.layers,)
        if parameter.expert is not None:
            key = _EXPERT.sub(r".mlp.experts.experts.\1.weight", key)
            index, lead = (*index, parameter.expert), (*lead, model.dims.experts)
        yield Place(parameter, key, index, lead)


def has_experts(model: Model) -> bool:
    """Whether some parameter belongs to a routed expert."""
    return any(parameter.expert is not None for layer in model.layers for parameter in layer)


def state_keys(model: Model) -> Iterator[str]:
    """Keys of the objects that Transformer Engine keeps beside weights (its fp8 state), one for each layer or expert.

    More than any one model has: which modules have state depends on the version, and Megatron asks for all that its own have.
    """
    seen: dict[str, None] = {}
    for place in places(model):
        module = place.key.rpartition(".")[0]
        if module.endswith(_NO_STATE):
            continue
        index, lead = place.index or (0,), place.lead or (1,)
        shard = f"shard_{'.'.join(map(str, index))}_{'.'.join(map(str, lead))}"
        seen[f"{module}._extra_state/{shard}"] = None
        if ".self_attention." in place.key:
            seen[f"{module.partition('.self_attention.')[0]}.self_attention.core_attention._extra_state/{shard}"] = None
    yield from seen
