"""Megatron's GPT with another end: log-probabilities of chosen tokens where the stock model returns all logits.

Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rpp.mcore.vocab_logprob import VocabShard, vocab_parallel_logp


@dataclass(frozen=True, slots=True)
class LogpQuery:
    """Which tokens' log-probabilities a forward pass shall answer. N tokens are asked for.

    position_N: where, on this context-parallel rank, the token before each asked token stands. target_N: the asked tokens' ids.
    """

    position_N: Tensor
    target_N: Tensor
    temperature: float


class LogpModel(GPTModel):
    """A GPTModel that, given a LogpQuery as `labels`, returns [2, N]: log-probabilities, then entropies, both float32.

    The output projection runs on the asked positions only: prompts, often most of the tokens, cost no logits. It stays inside
    forward, so that the DDP wrapper and the pipeline schedule see an ordinary module. Without labels it is the stock model.
    """

    def __init__(self, *, true_vocab_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.true_vocab_size = true_vocab_size  # the rows beyond it are padding

    def _postprocess(self, hidden_states, *, labels=None, **rest):
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, **rest)
        return self._answer(hidden_states, labels)

    def _answer(self, hidden_T1D: Tensor, query: LogpQuery) -> Tensor:
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # the gather's backward sums the ranks' partial gradients while it scatters them
            hidden_T1D = tensor_parallel.gather_from_sequence_parallel_region(hidden_T1D, tensor_parallel_output_grad=True, group=tp_group)
        else:
            hidden_T1D = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_T1D, group=tp_group)
        weight_VD = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        logp_N, entropy_N = vocab_parallel_logp(
            hidden_T1D[:, 0].index_select(0, query.position_N),
            weight_VD,
            query.target_N,
            VocabShard.of_rank(self.true_vocab_size, weight_VD.shape[0], tp_group.rank(), tp_group),
            temperature=query.temperature,
        )
        return torch.stack([logp_N, entropy_N])
