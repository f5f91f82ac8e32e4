"""Make everything the quickstart needs, from nothing: `python examples/quickstart/make_assets.py OUT [--seed N] [--hard]`.

OUT/model         a tiny Qwen3 with random weights and its tokenizer, an HF directory
OUT/sft.jsonl     the warm-up corpus, rows {"prompt", "response"}
OUT/train.jsonl   reinforcement-learning problems, rows {"prompt", "answer"}
OUT/eval.jsonl    held-out problems that are in neither of the other files

--hard makes the harder problems that tools/reproduce_presets.py --hard compares presets on (see chains.py).
The same seed gives the same bytes. Takes a few seconds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from chains import HARD_WORKED_FRAC, WORKED_FRAC, Chain, draw, draw_different, draw_hard, draw_slips, with_slips
from tiny_model import save_model, save_tokenizer

NUM_SFT, NUM_TRAIN, NUM_EVAL = 12_000, 2_048, 512


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's model and data.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hard", action="store_true", help="longer chains modulo 10 and a corpus with mistakes")
    args = parser.parse_args()
    num_parameters = make_assets(args.out, args.seed, hard=args.hard)
    print(f"{args.out}: a model of {num_parameters:,} parameters, {NUM_SFT:,} warm-up rows, {NUM_TRAIN:,} problems, {NUM_EVAL} held out")


def make_assets(out: Path, seed: int, *, hard: bool = False) -> int:
    """Write all files. Returns the model's number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    (write_hard_data if hard else write_data)(out, seed)
    return save_model(out / "model", save_tokenizer(out / "model"), seed)


def write_data(out: Path, seed: int) -> None:
    rng = random.Random(seed)
    corpus = _write_problems(out, rng, draw)
    _write(out / "sft.jsonl", (_example(chain, chain.worked if rng.random() < WORKED_FRAC else chain.bare) for chain in corpus))


def write_hard_data(out: Path, seed: int) -> None:
    """Problems and bare answers are right; the worked solutions of the corpus have slips."""
    rng = random.Random(seed)
    slips = draw_slips(rng)
    corpus = _write_problems(out, rng, draw_hard)
    responses = (with_slips(chain, slips, rng) if rng.random() < HARD_WORKED_FRAC else chain.bare for chain in corpus)
    _write(out / "sft.jsonl", map(_example, corpus, responses))


def _write_problems(out: Path, rng: random.Random, draw: Callable[[random.Random], Chain]) -> list[Chain]:
    """The problems to train on and those held out. Returns the chains of the warm-up corpus, none of which is among them."""
    taken: set[str] = set()
    held_out, train, corpus = (draw_different(rng, count, taken, draw) for count in (NUM_EVAL, NUM_TRAIN, NUM_SFT))
    _write(out / "eval.jsonl", map(_problem, held_out))
    _write(out / "train.jsonl", map(_problem, train))
    return corpus


def _problem(chain: Chain) -> dict[str, str]:
    return {"prompt": chain.prompt, "answer": str(chain.answer)}


def _example(chain: Chain, response: str) -> dict[str, str]:
    return {"prompt": chain.prompt, "response": response}


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


if __name__ == "__main__":
    main()
