"""Megatron's GPT with a value at the end: one number for each asked token, in place of logits.

Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.nn import functional

from megatron_rpp.mcore.logp_model import LogpQuery


class ValueModel(GPTModel):
    """A GPTModel that, given a LogpQuery as `labels`, returns [1, N] float32: the value of the state before each asked token.

    value[t] = value_head . final_norm(hidden[t - 1])
    The head is a row of the hidden size, whole on every tensor-parallel rank and 0 until it is trained: the first values are 0 and the
    first advantages those of REINFORCE. There is no output layer, and a tied embedding is an embedding only.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(share_embeddings_and_output_weights=False, **kwargs)
        if self.post_process:
            weight = self.output_layer.weight
            del self.output_layer
            self.value_head = torch.nn.Linear(self.config.hidden_size, 1, bias=False, dtype=weight.dtype, device=weight.device)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        # LanguageModule's own looks for the output layer and its tie.
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)

    def _postprocess(self, hidden_states, *, labels=None, **rest):
        return self._answer(hidden_states, labels) if self.post_process else hidden_states

    def _answer(self, hidden_T1D: Tensor, query: LogpQuery) -> Tensor:
        if self.config.sequence_parallel:
            # Every rank computes the same values from the same gradient: its share of it is a slice, not a sum.
            hidden_T1D = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_T1D, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        asked_ND = hidden_T1D[:, 0].index_select(0, query.position_N)
        return functional.linear(asked_ND.float(), self.value_head.weight.float()).t()
