"""What being cut off, or nearly, does to a response: to its score before any baseline, and to its place in the loss.

Truncated is what the engine stopped for its length; a length alone tells nothing (AReaL takes the longest row of every batch).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_rpp.algo.baselines import Scores
from megatron_rpp.algo.sequences import masked_lengths, sequence_of
from megatron_rpp.config.schema import Reward
from megatron_rpp.types import PackedBatch


def shaped(score_S: Tensor, length_S: Tensor, is_truncated_S: Tensor, reward: Reward, *, max_tokens: int) -> Tensor:
    """A score after truncation and length have been held against it.

    kept  = truncated_score, or else truncated_coef * score, for a truncated response; score for any other
    out   = kept - overlong_penalty(length)
    With scores of -1 and 1 a coefficient of 0 would reward cutting off a wrong answer: use truncated_score there.

    length_S: tokens that the policy wrote. max_tokens: the engine's limit on them.
    Shapes: score_S [S], length_S [S] int64, is_truncated_S [S] bool -> [S] float64
    Source: truncated_coef as ProRL v2 ("stop properly"), truncated_score as OpenRLHF; the penalty DAPO arXiv 2503.14476 Eq. 13.
    """
    score_S = score_S.double()
    if reward.truncated_score is not None:
        score_S = torch.where(is_truncated_S, reward.truncated_score, score_S)
    elif reward.truncated_coef is not None:
        score_S = torch.where(is_truncated_S, reward.truncated_coef * score_S, score_S)
    return score_S - overlong_penalty(length_S, reward, max_tokens=max_tokens)


def overlong_penalty(length_S: Tensor, reward: Reward, *, max_tokens: int) -> Tensor:
    """0 for a response that leaves the last share of its budget alone, then growing in proportion, overlong_penalty at its end.

    cache   = overlong_frac * max_tokens
    penalty = overlong_penalty * clip((length - (max_tokens - cache)) / cache, 0, 1);  0 with overlong_frac 0
    Shapes: length_S [S] int64 -> [S] float64
    Units: those of a score.
    Source: DAPO arXiv 2503.14476 Eq. 13, which stops at the limit as this does; verl, NeMo-RL and AReaL go on beyond it.
    """
    cache = reward.overlong_frac * max_tokens
    if cache == 0.0:
        return torch.zeros(length_S.shape, dtype=torch.float64, device=length_S.device)
    return reward.overlong_penalty * ((length_S.double() - (max_tokens - cache)) / cache).clamp(0.0, 1.0)


def shape_scores(scores: Scores, reward: Reward, *, max_tokens: int) -> Scores:
    """`shaped` for all responses of a step. Raw scores remain what dynamic sampling and metrics look at. `shape_batch` must go along.

    Raises: ValueError when the scores come without the responses' lengths and ends.
    """
    if scores.lengths_S is None or scores.is_truncated_S is None:
        raise ValueError("shape_scores needs lengths_S and is_truncated_S of the scores; one is missing")
    return replace(scores, score_S=shaped(scores.score_S, scores.lengths_S, scores.is_truncated_S, reward, max_tokens=max_tokens))


def shape_batch(batch: PackedBatch, reward: Reward, *, max_tokens: int) -> PackedBatch:
    """`shaped` for this rank's share of the same responses: the same bits as in `shape_scores`. Before `drop_truncated`."""
    length_S = masked_lengths(batch.mask_T, batch.cu_len_S1)
    return replace(batch, score_S=shaped(batch.score_S, length_S, batch.is_truncated_S, reward, max_tokens=max_tokens))


def drop_truncated(batch: PackedBatch) -> PackedBatch:
    """The batch whose truncated responses are outside mask_T: out of the loss and out of the normalisation's statistics.

    Their scores remain in `Scores`, hence in the mean of their group: leaving them out would call the rest of it better than it is.
    Source: DAPO arXiv 2503.14476 section 3.4 (overlong filtering).
    """
    return replace(batch, mask_T=batch.mask_T & ~batch.is_truncated_S[sequence_of(batch.cu_len_S1)])
