"""The values that travel between the layers.

Shape letters, used as name suffixes everywhere: P prompts, G responses of one prompt, S sequences in this
data-parallel rank's batch, S1 = S + 1 offsets, T packed tokens (prompt and response tokens of all S sequences, end
to end, no padding), V vocabulary, V_tp one tensor-parallel shard of it.

`logp_T[t]` is the log-probability of token t given the tokens before it in its own sequence; it is 0 on the first
token of a sequence and wherever `mask_T` is False. `version` counts finished training steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, already tokenised.

    uid: stable over runs and files' order (hash of the row's content), the key of groups and of seeds.
    tokens: prompt token ids after the chat template. text: what the reward function is shown.
    end: what the chat template wrote after the last message; a reward sees there whether a thought is open.
    """

    uid: str
    tokens: tuple[int, ...]
    text: str
    answer: str
    domain: str = "default"
    end: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer. tokens includes the end token when the model wrote it.

    logp_rollout: one float for each token, from the engine, at the sampling temperature.
    version: the engine's weights when it was sampled. score: None until a reward has looked at it.
    reward_failed: why the verifier gave no score (timeout, crash); score is then the configured stand-in.
    """

    prompt_uid: str
    sample: int
    tokens: tuple[int, ...]
    logp_rollout: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    version: int
    score: float | None = None
    reward_failed: str | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logp_rollout):
            raise ValueError(f"Response {self.prompt_uid}/{self.sample}: {len(self.tokens)} tokens, {len(self.logp_rollout)} logp_rollout")

    @property
    def is_truncated(self) -> bool:
        """True when the engine stopped for length; never inferred from the number of tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Group:
    """All sampled responses to one prompt, in order of `sample`; and the greedy one, where an estimator compares with it."""

    prompt: Prompt
    responses: tuple[Response, ...]
    greedy: Response | None = None

    @property
    def everything(self) -> tuple[Response, ...]:
        """All responses that there are, the greedy one last."""
        return self.responses if self.greedy is None else (*self.responses, self.greedy)

    @property
    def scores(self) -> tuple[float, ...]:
        """The raw scores that an estimator compares with each other, that of the greedy response among them."""
        return tuple(response.score for response in self.everything)

    @property
    def is_even(self) -> bool:
        """Whether they are all the same. By comparison: the deviation of equal floats is not 0."""
        return max(self.scores) == min(self.scores)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The sequences of one data-parallel rank, flat. The same on every tp, cp and pp peer of that rank.

    tokens_T int64; cu_len_S1 int32 offsets; mask_T bool, True on tokens the policy sampled; logp_* float32;
    score_S float64; group_S int64, equal for responses to one prompt over all ranks; domain_S int64, equal for prompts of one
    domain over all ranks; version_S int64; is_truncated_S bool. A batch may be empty (S = 0, T = 0).

    Filled in before the update: logp_old_T, logp_ref_T; value_T float32, the critic's estimate of the return from token t on,
    before it is written; weight_T float32, what a token's policy loss is multiplied by (the roll-out engine's correction).
    All four mean something on mask_T only.
    """

    tokens_T: Tensor
    cu_len_S1: Tensor
    mask_T: Tensor
    logp_rollout_T: Tensor
    score_S: Tensor
    group_S: Tensor
    domain_S: Tensor
    version_S: Tensor
    is_truncated_S: Tensor
    logp_old_T: Tensor | None = None
    logp_ref_T: Tensor | None = None
    value_T: Tensor | None = None
    weight_T: Tensor | None = None

    def __post_init__(self) -> None:
        tokens, sequences = self.tokens_T.numel(), self.score_S.numel()
        assert self.cu_len_S1.numel() == sequences + 1, (self.cu_len_S1.shape, sequences)
        assert int(self.cu_len_S1[-1]) == tokens, (self.cu_len_S1, tokens)
        for name in self.__slots__:
            value, size = getattr(self, name), {"_T": tokens, "_S": sequences}.get(name[-2:])
            assert size is None or value is None or value.shape == (size,), (name, value.shape, size)
        assert self.mask_T.dtype == torch.bool

    @property
    def num_sequences(self) -> int:
        return self.score_S.numel()

    @property
    def num_tokens(self) -> int:
        """All packed tokens, prompts included."""
        return self.tokens_T.numel()

    def with_logp(self, *, old: Tensor, ref: Tensor | None, value: Tensor | None = None) -> PackedBatch:
        """The same batch with the training engine's and the reference's log-probabilities, and the critic's values."""
        return replace(self, logp_old_T=old, logp_ref_T=ref, value_T=value)


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What the optimiser steps of one training step did, reduced over all ranks (equal on each).

    loss is what was minimised, aggregated as algo.aggregate says. Every other float is a token mean over the step unless its
    name says otherwise. grad_norm is the mean over minibatches before clipping. values: further named diagnostics
    (clip_frac_low, clip_frac_high, kl_k1, kl_k3, entropy, lr ...).
    """

    loss: float
    policy_loss: float
    kl_loss: float
    grad_norm: float
    num_minibatches: int
    num_tokens: int
    is_finite: bool
    values: dict[str, float]
