"""Who holds what: a layout is a pure function from a rank to its `Local`s.

The planner reads two layouts and nothing else, so a new training or engine layout is one dataclass here. Layouts are frozen
and compare by value: every rank builds its own and all of them agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.families.parameter import Model, Parameter
from megatron_rpp.weights.rect import Local, Piece, Rect, Shape, as_matrix

VOCAB_MULTIPLE = 128  # Megatron's default make_vocab_size_divisible_by, for each tp rank


class Layout(Protocol):
    """What the planner asks of a layout. Implementations are frozen dataclasses (hashable, equal by value)."""

    @property
    def ranks(self) -> int:
        """Ranks are 0 .. ranks - 1; the same number on both sides of a plan means the same GPU."""
        ...

    def stage(self, rank: int) -> int:
        """Pipeline stage of a rank: buckets draw on all stages at once. 0 where there are none."""
        ...

    def locals(self, rank: int) -> tuple[Local, ...]:
        """The tensors of a rank, in a fixed order; names are unique within the rank."""
        ...


@dataclass(frozen=True)
class MegatronLayout:
    """Megatron's layout, rank = tp_rank + tp * (replica + replicas * pp_rank); replicas = cp * dp hold equal dense weights.

    Within a stage, rank i = tp_rank + tp * replica holds of the routed experts what etp_rank = i % etp and
    ep_rank = (i // etp) % ep say: Megatron's order "tp-cp-ep-dp-pp" counts twice, once for experts. Experts are contiguous:
    ep_rank has [ep_rank * E / ep, (ep_rank + 1) * E / ep), and etp cuts each of them as tp cuts a dense MLP.
    layers: for every pipeline stage the layers it really holds (from 0, over the whole model). Read them off live modules:
    uneven stages and account_for_embedding_in_pipeline_split make any arithmetic wrong. `even` is for tests and estimates.
    padded_vocab: rows of the embedding over all tp ranks.
    Raises: GeometryError for layers that are not held exactly once, and for heads and experts that do not divide.
    """

    model: Model
    tp: int
    layers: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    padded_vocab: int
    replicas: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        dims, held = self.model.dims, sorted(n for stage in self.layers for n in stage)
        if held != list(range(dims.layers)):
            raise GeometryError("layers not held exactly once", where="pipeline", expected=f"0..{dims.layers - 1}", got=self.layers)
        if dims.heads % self.tp or (dims.kv_heads % self.tp and self.tp % dims.kv_heads):
            got = f"{dims.heads} heads, {dims.kv_heads} KV heads, tp {self.tp}"
            fix = "tp must divide the heads, and divide the KV heads or be a multiple of them"
            raise GeometryError("tp cuts a head", where="parallel.tp", got=got, fix=fix)
        if self.padded_vocab < dims.vocab or self.padded_vocab % self.tp:
            got = f"{self.padded_vocab} rows for {dims.vocab} tokens, tp {self.tp}"
            raise GeometryError("the padded vocabulary does not hold the vocabulary in equal parts", where="layout", got=got)
        check_experts(dims.experts, self.ep, where="parallel.ep")
        if self.stage_ranks % (self.ep * self.etp):
            got = f"{self.stage_ranks} ranks for ep {self.ep} x etp {self.etp}"
            raise GeometryError("the ranks of a stage do not make equal expert groups", where="parallel.ep", got=got)

    @classmethod
    def even(cls, model: Model, *, pp: int = 1, vpp: int = 1, tp: int = 1, dtype: torch.dtype, **more: int) -> MegatronLayout:
        """The default placement: as many layers on every stage and chunk, interleaved over stages when vpp > 1.

        more: replicas, ep, etp. Raises: GeometryError when the layers do not divide.
        """
        layers = model.dims.layers
        if layers % (pp * vpp) or (vpp > 1 and pp == 1):
            raise GeometryError(f"{layers} layers do not make {pp} stages of {vpp} chunks", where="pipeline", fix="vpp > 1 needs pp > 1")
        each = layers // (pp * vpp)
        held = tuple(
            tuple(n for chunk in range(vpp) for n in range((chunk * pp + stage) * each, (chunk * pp + stage + 1) * each))
            for stage in range(pp)
        )
        return cls(model, tp, held, dtype, pad_vocab(model.dims.vocab, VOCAB_MULTIPLE * tp), **more)

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.layers)

    @property
    def stage_ranks(self) -> int:
        """Ranks of one stage."""
        return self.tp * self.replicas

    @property
    def ranks(self) -> int:
        return self.stage_ranks * self.pp

    def stage(self, rank: int) -> int:
        return rank // self.stage_ranks

    def locals(self, rank: int) -> tuple[Local, ...]:
        index = rank % self.stage_ranks
        key = (self.stage(rank), index % self.tp, index % self.etp, index // self.etp % self.ep)
        if key not in self._made:
            self._made[key] = tuple(self._locals(*key))
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple[int, int, int, int], tuple[Local, ...]]:
        """Locals by (stage, tp rank, etp rank, ep rank); replicas share them. Filled as ranks are asked for."""
        return {}

    def _locals(self, stage: int, tp_rank: int, etp_rank: int, ep_rank: int) -> Iterator[Local]:
        own = expert_range(self.model.dims.experts, self.ep, ep_rank)
        for parameter in self.parameters(stage):
            if parameter.expert is None:
                yield parameter.local(tp_rank, self.tp, dtype=self.dtype, padded_vocab=self.padded_vocab)
            elif parameter.expert in own:
                yield parameter.local(etp_rank, self.etp, dtype=self.dtype, padded_vocab=self.padded_vocab)

    def parameters(self, stage: int) -> tuple[Parameter, ...]:
        """The parameters of a stage: the embedding with the first, the final norm and the head with the last."""
        found = [self.model.embedding] if stage == 0 else []
        found += [parameter for n in self.layers[stage] for parameter in self.model.layers[n]]
        if stage == self.pp - 1:
            found.append(self.model.final_norm)
            # One stage alone multiplies by the embedding itself; two keep a copy each, made equal by Megatron.
            if self.model.head is not None and not (self.model.dims.is_tied and self.pp == 1):
                found.append(self.model.head)
        return tuple(found)


def pad_vocab(vocab: int, multiple: int) -> int:
    """Rows of an embedding whose padding makes them a multiple of `multiple`."""
    return -(-vocab // multiple) * multiple


def check_experts(experts: int, ep: int, *, where: str) -> None:
    """Raises: GeometryError when ep ranks cannot share the experts equally; a dense model has none to share."""
    if (experts or 1) % ep:
        raise GeometryError(f"{experts} experts cannot be shared by {ep} ranks", where=where, fix="ep must divide the experts")


def expert_range(experts: int, ep: int, ep_rank: int) -> range:
    """The experts of an ep rank, contiguous on both sides."""
    return range(ep_rank * experts // ep, (ep_rank + 1) * experts // ep)


@dataclass(frozen=True)
class HFLayout:
    """Whole HF tensors on each of `holders` (engine leaders, or the one rank that writes a file); nothing elsewhere.

    dtypes: of the tensors that have one of their own; all others take `dtype`.
    """

    shapes: tuple[tuple[str, Shape], ...]
    dtype: torch.dtype
    ranks: int
    holders: tuple[int, ...]
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()

    @classmethod
    def of(cls, model: Model, *, dtype: torch.dtype, ranks: int, holders: tuple[int, ...]) -> HFLayout:
        """The layout of a model's HF tensors. Raises: GeometryError when a holder is no rank, or there is none."""
        if not holders or not all(0 <= rank < ranks for rank in holders):
            raise GeometryError("the holders are not ranks", where="HFLayout", expected=f"some of 0..{ranks - 1}", got=holders)
        return cls(tuple(model.hf_shapes.items()), dtype, ranks, holders, tuple(model.hf_dtypes.items()))

    def stage(self, rank: int) -> int:
        return 0

    def locals(self, rank: int) -> tuple[Local, ...]:
        return self._whole if rank in self.holders else ()

    @cached_property
    def _whole(self) -> tuple[Local, ...]:
        own = dict(self.dtypes)
        return tuple(
            Local(name, shape, own.get(name, self.dtype), (Piece(Rect(name, 0, 0, *as_matrix(shape))),)) for name, shape in self.shapes
        )
