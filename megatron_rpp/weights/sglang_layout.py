"""SGLang's layout: names, shapes and contents of the parameters of every engine rank. Pure data; nothing here imports sglang.

What a family says about SGLang is in Parameter.engine; this module deals the parameters out to ranks.
Source: SGLang 0.5.21, srt/layers/{linear,vocab_parallel_embedding}.py and layers/moe/fused_moe_triton/layer.py, as
tests/sglang/test_sglang_layout.py proves on its own model classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.weights.families.parameter import Model, Parameter
from megatron_rpp.weights.layout import check_experts, expert_range, pad_vocab
from megatron_rpp.weights.rect import Local

VOCAB_MULTIPLE = 64  # SGLang's DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True)
class SGLangLayout:
    """Engines of `tp` ranks each; rank r of engine k lives on global rank places[k * tp + r], by default k * tp + r itself.

    Routed experts: ep_rank = r // (tp / ep) holds a contiguous range of them in slots 0.. of w13_weight and w2_weight, cut by
    rank r % (tp / ep). Attention and the embedding: cut into tp / attn_dp parts, of which r % (tp / attn_dp) is held; everything
    else is cut by tp. A KV head lives on several ranks where there are fewer heads than parts.
    Assumes: one pipeline stage, no expert replication (EPLB), shared experts not fused, an lm_head over all ranks, no quantisation.
    Raises: GeometryError when something does not divide; ConfigError for a model that SGLang cannot run so.
    """

    model: Model
    tp: int
    dtype: torch.dtype
    ep: int = 1
    attn_dp: int = 1
    engines: int = 1
    places: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        dims = self.model.dims
        if self.model.not_in_engine:
            raise ConfigError(self.model.not_in_engine, where="rollout")
        if self.attn_dp > 1 and not self.model.has_attention_dp:
            raise ConfigError("SGLang's class of this model has no data-parallel attention", where="rollout.attn_dp", got=self.attn_dp)
        if self.tp % self.attn_dp or self.tp % self.ep:
            got = f"tp {self.tp}, ep {self.ep}, attn_dp {self.attn_dp}"
            raise GeometryError("an engine's ranks do not divide", where="rollout", got=got, fix="ep and attn_dp must divide tp")
        heads_tp = self.tp // self.attn_dp
        if dims.heads % heads_tp or (dims.kv_heads % heads_tp and heads_tp % dims.kv_heads):
            got = f"{dims.heads} heads, {dims.kv_heads} KV heads, {heads_tp} ranks for attention"
            raise GeometryError("an engine's ranks cut a head", where="rollout.tp", got=got)
        check_experts(dims.experts, self.ep, where="rollout.ep")
        if self.places and (len(self.places) != self.tp * self.engines or len({*self.places}) != len(self.places)):
            expected = f"{self.engines} x {self.tp} different ranks"
            raise GeometryError("the engines' places do not fit", where="rollout", expected=expected, got=self.places)

    @property
    def ranks(self) -> int:
        return max(self.places) + 1 if self.places else self.tp * self.engines

    def stage(self, rank: int) -> int:
        return 0

    def engine_rank(self, rank: int) -> int | None:
        """Which rank of its engine a global rank is; None where no engine runs."""
        return self._engine_ranks.get(rank)

    def locals(self, rank: int) -> tuple[Local, ...]:
        own = self.engine_rank(rank)
        return () if own is None else self.engine_locals(own)

    def engine_locals(self, engine_rank: int) -> tuple[Local, ...]:
        """The parameters of one rank of any engine, under SGLang's names."""
        if engine_rank not in self._made:
            self._made[engine_rank] = tuple(self._locals(engine_rank))
        return self._made[engine_rank]

    @cached_property
    def _made(self) -> dict[int, tuple[Local, ...]]:
        return {}

    @cached_property
    def _engine_ranks(self) -> dict[int, int]:
        places = self.places or tuple(range(self.tp * self.engines))
        return {place: number % self.tp for number, place in enumerate(places)}

    @cached_property
    def _parameters(self) -> tuple[tuple[Parameter, ...], ...]:
        """SGLang's parameters; each routed one as the list of its experts."""
        by_name: dict[str, list[Parameter]] = {}
        for parameter in self.model.engine_parameters():
            by_name.setdefault(parameter.name, []).append(parameter)
        return tuple(tuple(found) for found in by_name.values())

    def _locals(self, rank: int) -> Iterator[Local]:
        heads_tp, expert_tp = self.tp // self.attn_dp, self.tp // self.ep
        own = expert_range(self.model.dims.experts, self.ep, rank // expert_tp)
        for parameters in self._parameters:
            if parameters[0].expert is not None:
                held = [p for p in parameters if p.expert in own]
                yield _stacked([p.local(rank % expert_tp, expert_tp, dtype=self.dtype, padded_vocab=0) for p in held])
            elif parameters[0].over == "attention":
                yield self._dense(parameters[0], rank % heads_tp, heads_tp)
            else:
                yield self._dense(parameters[0], rank, self.tp)

    def _dense(self, parameter: Parameter, rank: int, size: int) -> Local:
        rows = pad_vocab(self.model.dims.vocab, VOCAB_MULTIPLE)
        if rows % size:
            rows = pad_vocab(self.model.dims.vocab, VOCAB_MULTIPLE * size)
        return parameter.local(rank, size, dtype=self.dtype, padded_vocab=rows)


def _stacked(locals_: list[Local]) -> Local:
    """One tensor with a leading index, of equal matrices."""
    pieces = tuple(replace(piece, index=(slot,)) for slot, local in enumerate(locals_) for piece in local.pieces)
    return replace(locals_[0], shape=(len(locals_), *locals_[0].shape), pieces=pieces)
