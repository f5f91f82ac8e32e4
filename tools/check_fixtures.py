"""Run a file of advantage fixtures through the package's own functions and compare every expected field.

    python tools/check_fixtures.py                      # tests/golden/advantage_fixtures.json
    python tools/check_fixtures.py FILE --ranks 4 --wire fp8

A fixture is {"id", "estimator", "inputs", "expected", optionally "variants"}. What it expects is compared in float64 with the
file's tolerance. Of the variants, which hold other conventions, those that an option of ours selects are compared too. An
estimator that this tool does not know is a failure unless it is left out by name. The families are in tools/fixtures/, the format
in docs/golden_numbers.md.

--ranks N: the rows of each batch are spread at random over N gloo processes, and what their parts come to must be what is
expected of the whole.
--wire fp32 | fp8, --limbs K: the statistics of the normalisation travel so (stats/wire.py); what is computed may then differ by
the wire's own bound for the fixture's batch, on top of the file's tolerance. Exit codes: 0 all passed, 1 a failure, 2 a file
that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixtures import credit, losses, statistics
from fixtures.ranks import Ranks
from fixtures.rows import EXPECTED, Family, PerToken, Setting, Values

from megatron_rpp.errors import RppError
from megatron_rpp.stats.wire import MAX_LIMBS

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "advantage_fixtures.json"
FAMILIES: dict[str, Family] = {**credit.FAMILIES, **losses.FAMILIES, **statistics.FAMILIES}


class UnusableFileError(Exception):
    """The file cannot be read as fixtures. The message is all that is printed."""


def differences(expected: Any, got: Any, tolerance: tuple[float, float], where: str) -> list[str]:
    """What differs, one phrase for each place; nested lists and numbers."""
    if isinstance(expected, list):
        if isinstance(got, PerToken) and not any(isinstance(row, list) for row in expected):
            got = got.per_row()
        got = got if isinstance(got, list) else [got]
        if len(expected) != len(got):
            return [f"{where}: expected {len(expected)} values, got {len(got)}"]
        return [text for i, (e, g) in enumerate(zip(expected, got, strict=True)) for text in differences(e, g, tolerance, f"{where}[{i}]")]
    if isinstance(got, list):
        return [f"{where}: expected one value, got {len(got)}"]
    value, (rtol, atol) = float(got), tolerance
    return [] if abs(value - expected) <= atol + rtol * abs(expected) else [f"{where}: expected {expected}, got {value!r}"]


def check(fixture: Values, setting: Setting, tolerance: tuple[float, float]) -> list[str]:
    """The failures of one fixture, one line each; none when every field agrees."""
    setting.allowances.clear()
    try:
        answers = FAMILIES[fixture["estimator"]]({"note": fixture.get("note", ""), **fixture["inputs"]}, setting)
    except KeyError as error:
        return [f"{fixture['id']}: this tool does not understand the inputs {sorted(fixture['inputs'])} (looked for {error})"]
    except (RppError, ValueError, AssertionError, RuntimeError, TypeError) as error:
        return [f"{fixture['id']}: {type(error).__name__}: {' '.join(str(error).split())}"]
    # Of several batches in one fixture the worst wire.
    tolerance = tuple(own + max((allowed[i] for allowed in setting.allowances), default=0.0) for i, own in enumerate(tolerance))
    problems = []
    for field, expected in fixture["expected"].items():
        if field not in answers[EXPECTED]:
            problems.append(f"{fixture['id']}: the tool computes no field {field!r}")
        else:
            problems += [f"{fixture['id']}: {text}" for text in differences(expected, answers[EXPECTED][field], tolerance, field)]
    for variant, expected in fixture.get("variants", {}).items():
        if variant in answers:
            problems += [f"{fixture['id']}: {text}" for text in differences(expected, answers[variant], tolerance, f"variant {variant}")]
    return problems


def load(path: Path) -> tuple[list[Values], tuple[float, float]]:
    """The fixtures of a file and its (rtol, atol).

    Raises: UnusableFileError.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UnusableFileError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnusableFileError(f"{path}: not JSON: {error}") from error
    fixtures = content.get("fixtures") if isinstance(content, dict) else None
    if not isinstance(fixtures, list) or not fixtures:
        raise UnusableFileError(f"{path}: expected an object with a list of fixtures under 'fixtures'")
    for number, fixture in enumerate(fixtures):
        missing = [key for key in ("id", "estimator", "inputs", "expected") if not isinstance(fixture, dict) or key not in fixture]
        if missing:
            raise UnusableFileError(f"{path}: fixture {number} lacks {', '.join(missing)}")
    text = str(content.get("conventions", {}).get("tolerance", "rtol 1e-8, atol 1e-9"))
    found = re.fullmatch(r"rtol ([\d.e+-]+), atol ([\d.e+-]+)", text)
    if found is None:
        raise UnusableFileError(f"{path}: cannot read conventions.tolerance {text!r}; expected such as 'rtol 1e-8, atol 1e-9'")
    return fixtures, (float(found[1]), float(found[2]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check advantage fixtures against the package's own functions.")
    parser.add_argument("file", type=Path, nargs="?", default=GOLDEN, help="default: the golden numbers of this repository")
    parser.add_argument("--estimator", nargs="+", action="extend", metavar="NAME", help="only these")
    parser.add_argument("--exclude", nargs="+", action="extend", metavar="NAME", default=[], help="all but these")
    parser.add_argument("--ranks", type=int, default=1, help="gloo processes that share each batch")
    parser.add_argument("--seed", type=int, default=0, help="of the shares")
    parser.add_argument("--wire", choices=("fp64", "fp32", "fp8"), default="fp64", help="how statistics travel between the processes")
    parser.add_argument("--limbs", type=int, choices=range(1, MAX_LIMBS + 1), help="FP8 numbers for each that travels; left out: enough")
    options = parser.parse_args(arguments)
    if options.ranks < 1:
        parser.error(f"--ranks must be at least 1, got {options.ranks}")
    try:
        fixtures, tolerance = load(options.file)
        names = list(dict.fromkeys(fixture["estimator"] for fixture in fixtures))
        absent = [name for name in options.estimator or [] if name not in names]
        if absent:
            raise UnusableFileError(f"{options.file}: no fixture of estimator {', '.join(absent)}; it has {', '.join(names)}")
    except UnusableFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [name for name in (options.estimator or names) if name not in options.exclude]
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown:
        print(f"unknown estimators in {options.file}: {', '.join(unknown)}; leave them out with --exclude {' '.join(unknown)}")
    with Ranks(options.ranks, seed=options.seed) as ranks:
        num_failed = report(
            [fixture for fixture in fixtures if fixture["estimator"] in chosen], Setting(ranks, options.wire, options.limbs), tolerance
        )
    return 1 if num_failed or not chosen else 0


def report(fixtures: Sequence[Values], setting: Setting, tolerance: tuple[float, float]) -> int:
    """Prints what failed, and a summary; the number of fixtures that did."""
    failed = 0
    for fixture in fixtures:
        known = fixture["estimator"] in FAMILIES
        problems = check(fixture, setting, tolerance) if known else [f"{fixture['id']}: unknown estimator {fixture['estimator']!r}"]
        failed += bool(problems)
        for problem in problems:
            print(f"FAIL {problem}")
    print(f"{len(fixtures) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["torch"])  # imported once, for all ranks of all fixtures
    sys.exit(main())
