"""The normalisation over real gloo processes: the same bits for every split, empty ranks, and errors that nobody waits for."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.dist.float8 import gathers_float8
from megatron_rpp.errors import DeadlineError, NumericsError
from megatron_rpp.stats.moments import Population, distributed_moments, whiten
from megatron_rpp.stats.wire import Wire
from tests.dist.ranks import run_ranks
from tests.unit.stats.batches import cut, dealt, responses
from tests.unit.stats.split import Response, over_ranks

WIRES = (Wire(), Wire("fp32"), Wire("fp8"), Wire("fp8", 1), Wire("fp8", 3))
NUM_DOMAINS = 3
EXACT, PIECES, LOSSY = 2000, 2000, 500  # examples


def _whitened(batch: list[Response], *, wire: Wire, **options: Any) -> tuple[list[list[float]], Population]:
    """This process's responses over the whole group; the whitened values of each."""
    x_T = torch.tensor([value for one in batch for value in one.values], dtype=torch.float64)
    mask_T = torch.tensor([flag for one in batch for flag in one.mask], dtype=torch.bool)
    sequence_T = torch.tensor([number for number, one in enumerate(batch) for _ in one.values], dtype=torch.int64)
    domain_S = torch.tensor([one.domain for one in batch], dtype=torch.int64)
    fixed = {"sequence_T": sequence_T, "domain_S": domain_S, "num_domains": NUM_DOMAINS, "wire": wire.name, "limbs": wire.limbs}
    out_T, seen = whiten(x_T, mask_T, **fixed, **options)
    values = iter(out_T.tolist())
    return [[next(values) for _ in one.values] for one in batch], seen


def _example(number: int, ranks: int) -> tuple[list[Response], list[list[tuple[int, range]]], dict[str, Any]]:
    """A batch, what each rank holds of it, and settings; all ranks draw alike. Of the batch and the settings any number of ranks
    makes the same, but for the pieces of a lossy wire."""
    dice = random.Random(number)
    batch = responses(dice, num_domains=NUM_DOMAINS)
    options = {"population": dice.choice(("token", "sample")), "scope": dice.choice(("global", "domain")), "wire": WIRES[0]}
    cps = {2: (1, 2), 4: (1, 2, 4)}[ranks]
    if number < EXACT:
        cp = 1
    elif number < EXACT + PIECES:
        options["population"], cp = "token", dice.choice(cps[1:])
    else:
        options["wire"] = dice.choice(WIRES[1:])
        cp = 1 if options["population"] == "sample" else dice.choice(cps)
    return batch, dealt(dice, [len(one.values) for one in batch], ranks // cp, cp), options


def _answers(rank: int, ranks: int) -> list[tuple[str, str]]:
    """The whitened values of each piece that this rank holds, and what it saw, of all examples."""
    answers = []
    for number in range(EXACT + PIECES + LOSSY):
        batch, shares, options = _example(number, ranks)
        out, seen = _whitened([cut(batch[i], places) for i, places in shares[rank]], group=dist.group.WORLD, deadline_s=60.0, **options)
        answers.append((repr(out), repr(seen)))
    return answers


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_split_over_ranks_gives_the_same_bits(ranks: int) -> None:
    """One start of processes: EXACT batches dealt as whole responses in both populations, PIECES as the pieces of data- and
    context-parallel ranks, LOSSY on the other wires; domains that some ranks lack, empty ranks. On the exact wire: what one process
    has from the whole batch, bit for bit. On the others: what the ranks' numbers come to when they are handed over in one process."""
    of_rank = run_ranks(ranks, _answers, ranks, timeout_s=240)
    for number, answers in enumerate(zip(*of_rank, strict=True)):
        batch, shares, options = _example(number, ranks)
        if options["wire"] == WIRES[0]:
            whole_out, whole = _whitened(batch, group=None, **options)
            expected = [[whole_out[i][places.start : places.stop] for i, places in share] for share in shares]
            assert [out for out, _ in answers] == [repr(out) for out in expected], number
        else:
            parts = [[cut(batch[i], places) for i, places in share] for share in shares]
            num_domains = NUM_DOMAINS if options["scope"] == "domain" else 1
            by_sequence = options["population"] == "sample"
            whole, _ = over_ranks(parts, wire=options["wire"], by_sequence=by_sequence, num_domains=num_domains)
        assert [seen for _, seen in answers] == [repr(whole)] * ranks, number


def _counted(rank: int) -> list[int]:
    """How many collectives one normalisation makes, and the largest number of bytes that it sends at once for a statistic."""
    calls: list[int] = []
    original = dist.all_gather

    def counting(parts: Any, mine: Tensor, **kwargs: Any) -> Any:
        calls.append(mine.nbytes)
        return original(parts, mine, **kwargs)

    dist.all_gather = counting
    answers = []
    for wire in WIRES:
        for population, scope in (("token", "global"), ("sample", "global"), ("sample", "domain")):
            calls.clear()
            batch = [Response((1.0, rank), (True, True), domain) for domain in range(NUM_DOMAINS)]
            _, seen = _whitened(batch, wire=wire, group=dist.group.WORLD, population=population, scope=scope)
            assert sum(calls) == seen.wire_bytes
            answers += [len(calls), max(calls) // (NUM_DOMAINS if scope == "domain" else 1)]
    return answers


def test_a_normalisation_takes_two_collectives_of_at_most_64_bytes_a_statistic() -> None:
    for answers in run_ranks(2, _counted):
        assert answers[::2] == [2] * 3 * len(WIRES)
        assert max(answers[1::2]) == 64


def _moments_of(rank: int, values: list[list[float]]) -> tuple[int, float, float, float, float]:
    x_T: Tensor = torch.tensor(values[rank], dtype=torch.float64)
    seen = distributed_moments(x_T, torch.ones_like(x_T, dtype=torch.bool), dist.group.WORLD)
    return seen.n, seen.mean, seen.variance, seen.min, seen.max


def test_two_ranks_by_hand_with_one_of_them_empty() -> None:
    """2 and 4: mean 3, variance 1, known to the rank that has nothing too."""
    assert run_ranks(2, _moments_of, [[2.0, 4.0], []]) == [(2, 3.0, 1.0, 2.0, 4.0)] * 2


def _errors_of(rank: int, cases: list[list[list[float]]]) -> list[str]:
    """What each case is refused with, by every wire and scope; the group is used on after each."""
    said = []
    for values, wire, scope in ((values, wire, scope) for values in cases for wire in WIRES[:3] for scope in ("global", "domain")):
        batch = [Response((value,), (True,), domain) for domain, value in enumerate(values[rank])]
        try:
            _whitened(batch, wire=wire, group=dist.group.WORLD, scope=scope, deadline_s=20.0)
        except NumericsError as error:
            said.append(str(error))
    return said


def test_a_batch_that_cannot_be_used_raises_the_same_error_on_every_rank() -> None:
    nan, inf = float("nan"), float("inf")
    cases = [[[], [], []], [[1.0], [nan, 2.0], []], [[inf], [], [1.0, -inf, nan]]]
    errors = run_ranks(3, _errors_of, cases)
    assert errors == [errors[0]] * 3
    messages = ("none on any of 3 ranks", "got: 1 of 2 on rank 1 of the group", "1 of 1 on rank 0 of the group, 2 of 3 on rank 2")
    for i, message in enumerate(messages):
        assert all(message in said for said in errors[0][6 * i : 6 * (i + 1)]), errors[0]
    assert len(errors[0]) == 3 * 6


def _float8(rank: int) -> tuple[bool, list[float]]:
    answer = gathers_float8(dist.group.WORLD, deadline_s=20.0)
    parts = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(parts, torch.tensor([float(rank)]))
    return answer, [float(part) for part in parts]


def test_gloo_is_found_not_to_take_float8_and_is_usable_after_it_was_asked() -> None:
    assert run_ranks(2, _float8) == [(False, [0.0, 1.0])] * 2


def _absent(rank: int) -> str:
    every_T, sequence_T = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    normalise = partial(whiten, torch.arange(2.0), every_T, sequence_T=sequence_T, group=dist.group.WORLD)
    normalise()
    if rank == 1:
        time.sleep(4)
        return "left"
    start = time.monotonic()
    try:
        normalise(deadline_s=1)
    except DeadlineError as error:
        return f"{time.monotonic() - start < 3} {error}"
    return "no error"


def test_a_rank_that_never_normalises_is_an_error_within_the_deadline() -> None:
    said = run_ranks(2, _absent, timeout_s=30)[0]
    assert said.startswith("True wait 'normalise advantages: sizes'"), said
