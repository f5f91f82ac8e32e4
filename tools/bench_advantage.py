"""Time the statistics of the advantages and the returns, and say how wrong each way to compute them is.

    python tools/bench_advantage.py [--tokens N] [--ranks N] [--sequences N] [--length N] [--repeats N] [--json FILE]

Whitening: --ranks ranks of --tokens tokens each. Two gloo processes time it, with one rank's tokens each: every wire, the obvious
loop over tokens, and one pass of float32 sums. Errors are those of all ranks' tokens: what each rank would send is handed over
in this process. They are the largest |adv - exact| / max(|exact|, 1); exact comes from correctly rounded sums (math.fsum).
Returns: compute_returns of --sequences responses of --length tokens, and the loop over tokens. All values differ by less than 1e-9,
or the exit status is 1. Medians of wall time, and of processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.algo.returns import compute_returns
from megatron_rpp.dist.float8 import gathers_float8
from megatron_rpp.stats.local import collect
from megatron_rpp.stats.moments import agree, header_words, whiten
from megatron_rpp.stats.wire import VARIANCE_FLOOR, Wire

PROCESSES, TIMEOUT_S = 2, 600.0
WIRES = {"fp64": Wire(), "fp32": Wire("fp32"), "fp8": Wire("fp8"), "fp8, 1 limb": Wire("fp8", 1)}
# Ordinary advantages, and values close together far from 0: name -> (mean, deviation).
BATCHES = {"mean 0.1, deviation 1": (0.1, 1.0), "mean 1e4, deviation 1e-2": (1e4, 1e-2)}
SAMPLE = 10_000  # values of each rank that errors are looked for among
Constants = tuple[float, float]  # what is subtracted, what is multiplied by


def values_of(rank: int, tokens: int, batch: str) -> Tensor:
    mean, deviation = BATCHES[batch]
    return mean + deviation * torch.randn(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


# ---- the other ways ----


def loop_constants(totals: Callable[[list[float]], list[float]], values: Sequence[float]) -> Constants:
    """Mean first, then centred squares, one token after the other; `totals` adds over ranks."""
    total = 0.0
    for value in values:
        total += value
    total, n = totals([total, float(len(values))])
    mean, squares = total / n, 0.0
    for value in values:
        squares += (value - mean) ** 2
    return mean, 1 / math.sqrt(max(totals([squares])[0] / n, VARIANCE_FLOOR))


def loop_whiten(x_T: Tensor) -> Tensor:
    values = x_T.tolist()
    mean, scale = loop_constants(lambda sums: added(torch.tensor(sums, dtype=torch.float64)).tolist(), values)
    return torch.tensor([(value - mean) * scale for value in values], dtype=torch.float64)


def float32_sums(x_T: Tensor) -> Tensor:
    x_T = x_T.float()
    return torch.stack([x_T.sum(), x_T.square().sum(), torch.tensor(float(x_T.numel()))])


def float32_constants(sums: Tensor) -> Constants:
    total, squares, n = sums
    mean = total / n
    return float(mean), float((squares / n - mean * mean).clamp(min=VARIANCE_FLOOR).rsqrt())


def float32_whiten(x_T: Tensor) -> Tensor:
    mean, scale = float32_constants(added(float32_sums(x_T)))
    return (x_T.float() - mean) * scale


def added(sums: Tensor) -> Tensor:
    dist.all_reduce(sums)
    return sums


def loop_returns(reward_T: Tensor, cu_len_S1: Tensor, gamma: float) -> Tensor:
    rewards, found = reward_T.tolist(), [0.0] * reward_T.numel()
    bounds = cu_len_S1.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        later = 0.0
        for t in range(end - 1, start - 1, -1):
            found[t] = later = rewards[t] + gamma * later
    return torch.tensor(found, dtype=torch.float64)


# ---- time ----


def timed(ways: dict[str, Callable[[], Any]], repeats: int, before: Callable[[], Any] = lambda: None) -> dict[str, dict[str, float]]:
    """Median milliseconds of each way, taken in turn, so that a busy spell of the machine falls on all of them."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for name in (*ways, *(name for _ in range(repeats) for name in ways)):  # the first round warms up
        before()
        wall, cpu = time.perf_counter(), time.process_time()
        ways[name]()
        taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    columns = {name: zip(*taken[name][1:], strict=True) for name in ways}
    return {
        name: dict(zip(("wall_ms", "cpu_ms"), (1e3 * statistics.median(one) for one in both), strict=True))
        for name, both in columns.items()
    }


def whiten_on_rank(rank: int, tokens: int, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=TIMEOUT_S))
    x_T = values_of(rank, tokens, next(iter(BATCHES)))
    mask_T, sequence_T = torch.ones(tokens, dtype=torch.bool), torch.arange(tokens) // 1000
    common = partial(whiten, x_T, mask_T, sequence_T=sequence_T, group=dist.group.WORLD, deadline_s=TIMEOUT_S)
    ways: dict[str, Callable[[], Any]] = {name: partial(common, wire=wire.name, limbs=wire.limbs) for name, wire in WIRES.items()}
    ways["fp64, sample population"] = partial(common, population="sample")
    ways |= {"float32, one pass": partial(float32_whiten, x_T), "loop over tokens": partial(loop_whiten, x_T)}
    few = partial(whiten, x_T[:8], mask_T[:8], sequence_T=sequence_T[:8], group=dist.group.WORLD, deadline_s=TIMEOUT_S)
    ways |= {f"{name}, 8 tokens": partial(few, wire=wire.name, limbs=wire.limbs) for name, wire in WIRES.items()}
    times = timed(ways, repeats, before=dist.barrier)
    answer = {"times": times, "float8": gathers_float8(dist.group.WORLD)}
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def whitening_times(tokens: int, repeats: int) -> dict[str, Any]:
    """Of the slower process, each way."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        torch.multiprocessing.start_processes(whiten_on_rank, args=(tokens, repeats, folder), nprocs=PROCESSES, start_method="forkserver")
        answers = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    times = {name: max((one["times"][name] for one in answers), key=lambda taken: taken["wall_ms"]) for name in answers[0]["times"]}
    return {"times": times, "float8": answers[0]["float8"]}


# ---- errors ----


def exact_constants(parts: Sequence[Tensor], centre: float) -> Constants:
    """From correctly rounded sums of the deviations from a number close to the mean; their squares by an exact product."""
    deviations = torch.cat(list(parts)) - centre
    squares = deviations * deviations
    split = 134217729.0 * deviations  # Veltkamp and Dekker: the square is `squares` + `tails` exactly
    high = split - (split - deviations)
    low = deviations - high
    tails = ((high * high - squares) + 2 * high * low) + low * low
    offset = math.fsum(deviations.tolist()) / deviations.numel()
    variance = math.fsum([*squares.tolist(), *tails.tolist()]) / deviations.numel() - offset * offset
    return offset, 1 / math.sqrt(variance)


def errors(tokens: int, ranks: int, batch: str) -> dict[str, dict[str, Any]]:
    parts = [values_of(rank, tokens, batch) for rank in range(ranks)]
    centre = BATCHES[batch][0]
    offset, scale = exact_constants(parts, centre)
    some = torch.cat([part[:SAMPLE] for part in parts])
    exact = ((some - centre) - offset) * scale

    def error(adv: Tensor) -> float:
        return float(((adv.double() - exact).abs() / exact.abs().clamp(min=1)).max())

    mask_T = torch.ones(tokens, dtype=torch.bool)
    locals_ = [collect(part, mask_T, None, None, num_domains=1) for part in parts]
    found = {}
    for name, wire in WIRES.items():
        agreement = agree([header_words(one, wire) for one in locals_], wire, name="bench")
        seen = agreement.conclude([agreement.encode(one) for one in locals_])
        adv = ((some - seen.mean) - seen.mean_tail) * seen.scale
        found[name] = {"error": error(adv), "bound": sum(seen.bound), "bytes": seen.wire_bytes, "limbs": seen.limbs}
    mean, rsqrt = float32_constants(torch.stack([float32_sums(part) for part in parts]).sum(0))
    found["float32, one pass"] = {"error": error((some.float() - mean) * rsqrt), "bytes": 12}
    values = [value for part in parts for value in part.tolist()]
    mean, rsqrt = loop_constants(lambda sums: sums, values)
    found["loop over tokens"] = {"error": error((some - mean) * rsqrt), "bytes": 24}
    return found


def returns(sequences: int, length: int, repeats: int) -> dict[str, Any]:
    reward_T = torch.randn(sequences * length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask_T, cu_len_S1 = torch.ones_like(reward_T, dtype=torch.bool), torch.arange(sequences + 1) * length
    ways = {
        "compute_returns": partial(compute_returns, reward_T, mask_T, cu_len_S1, 0.999),
        "loop over tokens": partial(loop_returns, reward_T, cu_len_S1, 0.999),
    }
    apart = float((ways["compute_returns"]() - ways["loop over tokens"]()).abs().max())
    return {"times": timed(ways, repeats), "apart": apart}


def report(result: dict[str, Any]) -> None:
    def times(title: str, rows: dict[str, dict[str, float]], base: str) -> None:
        print(f"\n{title}")
        for name, taken in rows.items():
            ratio = taken["cpu_ms"] / rows[base]["cpu_ms"]
            print(f"  {name:<26} {taken['wall_ms']:10.2f} ms wall {taken['cpu_ms']:10.2f} ms cpu  {ratio:8.2f} x {base}")

    times(f"whitening, {result['tokens']} tokens on each of {PROCESSES} processes", result["whitening"]["times"], "fp64")
    print(f"  float8 is gathered as such: {result['whitening']['float8']}")
    for batch, rows in result["errors"].items():
        print(f"\nerrors, {result['ranks']} ranks of {result['tokens']} tokens, {batch}")
        for name, row in rows.items():
            bound = f"{row['bound']:9.1e}" if row.get("bound") else "        -"
            limbs = f", {row['limbs']} limbs" if row.get("limbs") else ""
            print(f"  {name:<26} {row['error']:9.1e} of bound {bound} {row['bytes']:5d} bytes a rank{limbs}")
    times(f"returns, {result['sequences']} x {result['length']} tokens", result["returns"]["times"], "compute_returns")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the statistics of advantages and the returns.")
    for name, default in (("tokens", 1_000_000), ("ranks", 8), ("sequences", 64), ("length", 32_768), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="where to write all of it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {name: getattr(options, name) for name in ("tokens", "ranks", "sequences", "length", "repeats")}
    result: dict[str, Any] = {
        **sizes,
        "whitening": whitening_times(options.tokens, options.repeats),
        "errors": {batch: errors(options.tokens, options.ranks, batch) for batch in BATCHES},
        "returns": returns(options.sequences, options.length, options.repeats),
    }
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["returns"]["apart"] < 1e-9 else 1


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["torch"])
    sys.exit(main())
