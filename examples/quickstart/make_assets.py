"""Make everything the quickstart needs, from nothing: `python examples/quickstart/make_assets.py OUT [--seed N]`.

OUT/model         a tiny Qwen3 with random weights and its tokenizer, an HF directory
OUT/sft.jsonl     the warm-up corpus, rows {"prompt", "response"}
OUT/train.jsonl   reinforcement-learning problems, rows {"prompt", "answer"}
OUT/eval.jsonl    held-out problems that are in neither of the other files

The same seed gives the same bytes. Takes a few seconds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from chains import WORKED_FRAC, Chain, draw_different
from tiny_model import save_model, save_tokenizer

NUM_SFT, NUM_TRAIN, NUM_EVAL = 12_000, 2_048, 512


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's model and data.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_parameters = make_assets(args.out, args.seed)
    print(f"{args.out}: a model of {num_parameters:,} parameters, {NUM_SFT:,} warm-up rows, {NUM_TRAIN:,} problems, {NUM_EVAL} held out")


def make_assets(out: Path, seed: int) -> int:
    """Write all files. Returns the model's number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    write_data(out, seed)
    return save_model(out / "model", save_tokenizer(out / "model"), seed)


def write_data(out: Path, seed: int) -> None:
    rng = random.Random(seed)
    taken: set[str] = set()
    held_out = draw_different(rng, NUM_EVAL, taken)
    train = draw_different(rng, NUM_TRAIN, taken)
    corpus = draw_different(rng, NUM_SFT, taken)
    _write(out / "eval.jsonl", map(_problem, held_out))
    _write(out / "train.jsonl", map(_problem, train))
    _write(out / "sft.jsonl", (_example(chain, rng) for chain in corpus))


def _problem(chain: Chain) -> dict[str, str]:
    return {"prompt": chain.prompt, "answer": str(chain.answer)}


def _example(chain: Chain, rng: random.Random) -> dict[str, str]:
    return {"prompt": chain.prompt, "response": chain.worked if rng.random() < WORKED_FRAC else chain.bare}


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


if __name__ == "__main__":
    main()
