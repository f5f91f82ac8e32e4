"""Accuracy on a fixed set of prompts, through the same engine, verifier and prompt template as training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_rpp.collect import Collector, Progress
from megatron_rpp.config.schema import Config
from megatron_rpp.display import printable
from megatron_rpp.files import make_inside, write_whole
from megatron_rpp.rollout.request import Sampling
from megatron_rpp.types import Group, Prompt

# Evaluation draws its seeds from a range of steps that training never reaches, so that it shifts no training seed.
EVAL_STEP = -1


@dataclass(frozen=True, slots=True)
class EvalResult:
    """accuracy: mean score; response_tokens: mean length; the rest are fractions."""

    accuracy: float
    num_prompts: int
    response_tokens: float
    truncated_frac: float
    failed_frac: float

    def as_metrics(self) -> dict[str, float | int]:
        return {
            "eval/accuracy": self.accuracy,
            "eval/num_prompts": self.num_prompts,
            "eval/response_tokens": self.response_tokens,
            "eval/truncated_frac": self.truncated_frac,
            "eval/reward_failed_frac": self.failed_frac,
        }


def held_out_sampling(cfg: Config, stop_token_ids: tuple[int, ...]) -> Sampling:
    """How the answers of an evaluation are drawn."""
    return Sampling(
        max_tokens=cfg.eval.max_response_tokens or cfg.rollout.max_response_tokens,
        temperature=cfg.eval.temperature,
        stop_token_ids=stop_token_ids,
    )


def evaluate(
    collector: Collector,
    prompts: tuple[Prompt, ...],
    *,
    version: int,
    sampling: Sampling,
    num_samples: int = 1,
    table: Path | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Sample every prompt `num_samples` times and average the scores (avg@k; greedy pass@1 at k = 1).

    What an interrupted evaluation of the same version finished is not sampled again, where it was sampled in the same way.

    table: on rank 0, every answer is written there as one JSON line, so that two evaluations can be compared. A file in a folder
    of the run directory.
    Returns the same result on every rank.
    """
    way = hashlib.blake2b(repr(sampling).encode(), digest_size=4).hexdigest()
    groups = collector.collect(
        prompts,
        step=EVAL_STEP,
        version=version,
        num_samples=num_samples,
        sampling=sampling,
        name=f"eval-{version:06d}.{way}",
        progress=progress,
    )
    if table is not None and collector.groups.rank == 0:
        _write_table(groups, table)
    responses = [response for group in groups for response in group.responses]
    count = max(len(responses), 1)
    return EvalResult(
        accuracy=sum(response.score for response in responses) / count,
        num_prompts=len(groups),
        response_tokens=sum(len(response.tokens) for response in responses) / count,
        truncated_frac=sum(response.is_truncated for response in responses) / count,
        failed_frac=sum(response.reward_failed is not None for response in responses) / count,
    )


def _write_table(groups: tuple[Group, ...], path: Path) -> None:
    """In a folder of the run directory, which must exist. Raises: StorageError."""
    make_inside(path.parent.parent, path.parent)
    rows = (
        {
            "uid": group.prompt.uid,
            "prompt": group.prompt.text,
            "answer": group.prompt.answer,
            "response": response.text,
            "score": response.score,
            "num_tokens": len(response.tokens),
        }
        for group in groups
        for response in group.responses
    )
    lines = [printable(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows]  # to be read on a terminal; it stays JSON
    write_whole(path, "".join(lines))
