"""Score reference answers against themselves, and wrong answers, with the reward `math`.

    python tools/check_rewards.py DIR [--limit N] [--num-workers N]

Reads DIR/*/*.jsonl in the formats of GSM8K, MATH, AIME and AMC: rows with a "solution" that ends in a box, or an "answer"
(a number, an expression, or GSM8K's text before "#### "). Every reference is scored in several wordings, which must all
count, then against two wrong answers, the next integer and another row's answer, which must not. Every miss is printed.
Exit status 1 when more than one reference in a thousand is refused in any wording.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rpp.reward.base import RewardInput, Verdict
from megatron_rpp.reward.final_answer import explicit_answer
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.reward.score_file import add_pool_arguments

MAX_REFUSED_FRAC = 0.001
RIGHT = ("as written", "boxed", "in a sentence", "restyled")
WRONG = ("next integer", "another answer", "another, in a sentence")


@dataclass(frozen=True, slots=True)
class Case:
    data_set: str
    line: int
    wording: str
    item: RewardInput


def main() -> int:
    parser = argparse.ArgumentParser(description="Score reference answers against themselves and against wrong ones.")
    parser.add_argument("dir", type=Path)
    parser.add_argument("--limit", type=int, help="rows of each file")
    add_pool_arguments(parser, timeout_s=30.0)
    args = parser.parse_args()
    cases = [case for path in sorted(args.dir.glob("*/*.jsonl")) for case in cases_of(path, args.limit)]
    if not cases:
        print(f"no */*.jsonl with reference answers under {args.dir}")
        return 2
    with RewardPool("math", args.timeout_s, args.num_workers) as pool:
        verdicts = score(pool, cases)
    return report(cases, verdicts)


def cases_of(path: Path, limit: int | None) -> Iterator[Case]:
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    references = [reference_of(json.loads(line)) for line in lines]
    finals = [explicit_answer(text) or text for text in references]
    for number, (reference, final) in enumerate(zip(references, finals, strict=True), start=1):
        other = next((text for text in finals[number:] + finals[:number] if text != final), None)
        for wording, response in wordings(reference, final, other):
            yield Case(path.parent.name, number, wording, RewardInput("", response, reference))


def reference_of(row: dict[str, object]) -> str:
    """The row's answer, or its solution when that is where the answer stands."""
    value = row.get("answer", row.get("solution"))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def wordings(reference: str, final: str, other: str | None) -> Iterator[tuple[str, str]]:
    yield "as written", reference
    yield "boxed", rf"Some thought about $x=3$. \boxed{{ {final} }}"
    yield "in a sentence", f"Some thought about $x=3$. The final answer is ${final}$."
    if (restyled := restyle(final)) != final:
        yield "restyled", rf"\boxed{{{restyled}}}"
    if re.fullmatch(r"-?\d+", final):
        yield "next integer", rf"\boxed{{{int(final) + 1}}}"
    if other is not None:
        yield "another answer", rf"\boxed{{{other}}}"
        yield "another, in a sentence", f"Some thought about $x=3$. The final answer is ${other}$."


def restyle(final: str) -> str:
    """The same value in other characters, so that no comparison of texts can find it equal."""
    if re.fullmatch(r"-?\d+", final):
        return final + ".0"
    return final.replace(r"\frac", r"\dfrac").replace(r"\left", "").replace(r"\right", "").replace(r"\pi", r"{\pi}")


def score(pool: RewardPool, cases: list[Case]) -> list[Verdict]:
    verdicts = []
    shown = time.monotonic()
    for future in [pool.submit(case.item) for case in cases]:
        verdicts.append(future.result())
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"  {len(verdicts)} of {len(cases)}", file=sys.stderr, flush=True)
    return verdicts


def report(cases: list[Case], verdicts: list[Verdict]) -> int:
    total, hits, failed = Counter(), Counter(), Counter()
    for case, verdict in zip(cases, verdicts, strict=True):
        key = (case.data_set, case.wording)
        total[key] += 1
        hits[key] += verdict.score == 1.0
        failed[key] += verdict.reward_failed is not None
        if (verdict.score == 1.0) != (case.wording in RIGHT):
            what = verdict.reward_failed or ("refused" if case.wording in RIGHT else "ACCEPTED")
            final = explicit_answer(case.item.answer) or case.item.answer
            print(f"{case.data_set}:{case.line} {case.wording}, {what}: {case.item.response[-90:]!r} against {final[-90:]!r}")
    print(f"{'data set':<12} {'wording':<23} {'rows':>6} {'score 1':>8} {'frac':>8} {'failed':>7}")
    for data_set, wording in sorted(total, key=lambda key: (key[0], (*RIGHT, *WRONG).index(key[1]))):
        key = (data_set, wording)
        print(f"{data_set:<12} {wording:<23} {total[key]:>6} {hits[key]:>8} {hits[key] / total[key]:>8.5f} {failed[key]:>7}")
    right = {wording: sum(count for key, count in total.items() if key[1] == wording) for wording in RIGHT}
    refused = {wording: right[wording] - sum(count for key, count in hits.items() if key[1] == wording) for wording in RIGHT}
    return int(any(refused[wording] > MAX_REFUSED_FRAC * right[wording] for wording in RIGHT))


if __name__ == "__main__":
    sys.exit(main())
