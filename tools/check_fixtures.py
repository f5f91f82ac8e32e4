"""Run a file of advantage fixtures through the package's own functions and compare every expected field.

    python tools/check_fixtures.py                      # tests/golden/advantage_fixtures.json
    python tools/check_fixtures.py FILE --ranks 4 --wire fp8

A fixture is {"id", "estimator", "inputs", "expected", optionally "note" and "variants"}. What it expects is compared in float64 with
the file's tolerance. Of the variants, which hold other conventions, those that an option of ours selects are compared too; the names
of the others are printed. An input or an estimator that this tool does not know is refused, because it would be ignored; whole
estimators can be left out by name. The families are in tools/fixtures/, their inputs in forms.py there, the format in
docs/golden_numbers.md.

--ranks N: the rows of each batch are spread at random over N gloo processes, and what their parts come to must be what is
expected of the whole.
--wire fp32 | fp8, --limbs K: the statistics of the normalisation travel so (stats/wire.py); what is computed may then differ by
the wire's own bound for the fixture's batch, on top of the file's tolerance. Exit codes: 0 all passed, 1 a failure, 2 a file or an
option that cannot be used, which is one line on stderr.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixtures import credit, losses, statistics
from fixtures.correction import check_correction
from fixtures.forms import check_inputs
from fixtures.kinds import (
    ANSWER,
    COUNT,
    NAME,
    OBJECT,
    TEXT,
    UnusableFileError,
    check_names,
    check_value,
    is_number,
    one_of,
    several,
    show,
)
from fixtures.ranks import FAILURES, Ranks
from fixtures.rows import EXPECTED, Family, PerToken, Setting, Values

from megatron_rpp.stats.wire import MAX_LIMBS

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "advantage_fixtures.json"
FAMILIES: dict[str, Family] = {**credit.FAMILIES, **losses.FAMILIES, **statistics.FAMILIES}


FIXTURES = several(OBJECT)
CONVENTIONS = dict.fromkeys(("layout", "reward_position", "default_normaliser", "variants", "kl", "tolerance", "singletons"), TEXT)
CONVENTIONS |= {"dtype": one_of("float64")}
FILE = {"version": one_of(1), "digits": COUNT, "conventions": OBJECT, "fixtures": FIXTURES}
REQUIRED = {"id": NAME, "estimator": NAME, "inputs": OBJECT, "expected": OBJECT}
FIXTURE = REQUIRED | {"note": TEXT, "variants": OBJECT}


def differences(expected: Any, got: Any, tolerance: tuple[float, float], where: str) -> list[str]:
    """What differs, one phrase for each place; nested lists and numbers."""
    if isinstance(expected, list):
        if isinstance(got, PerToken) and not any(isinstance(row, list) for row in expected):
            got = got.per_row()
        if not isinstance(got, list):
            return [f"{where}: expected a list, got the one value {got!r}"]
        if len(expected) != len(got):
            return [f"{where}: expected {len(expected)} values, got {len(got)}"]
        return [text for i, (e, g) in enumerate(zip(expected, got, strict=True)) for text in differences(e, g, tolerance, f"{where}[{i}]")]
    if isinstance(got, list):
        return [f"{where}: expected one value, got {len(got)}"]
    if isinstance(expected, bool) and not isinstance(got, bool):
        return [f"{where}: expected {str(expected).lower()}, got the number {got!r}"]
    value, (rtol, atol) = float(got), tolerance
    return [] if abs(value - expected) <= atol + rtol * abs(expected) else [f"{where}: expected {expected}, got {value!r}"]


def check(fixture: Values, setting: Setting, tolerance: tuple[float, float]) -> tuple[list[str], list[str]]:
    """The failures of one fixture, one line each, none when every field agrees; and the variants that no option of ours selects."""
    setting.allowances.clear()
    try:
        answers = FAMILIES[fixture["estimator"]]({"note": fixture.get("note", ""), **fixture["inputs"]}, setting)
    except FAILURES as error:
        return [f"{fixture['id']}: {type(error).__name__}: {' '.join(str(error).split())}"], []
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
    return problems, [variant for variant in fixture.get("variants", {}) if variant not in answers]


def load(path: Path) -> tuple[list[Values], tuple[float, float]]:
    """The fixtures of a file and its (rtol, atol). Inputs are checked by `check_known`, once it is clear which fixtures are meant.

    Raises: UnusableFileError.
    """
    content = read(path)
    check_value(content, OBJECT, str(path))
    check_names(content, str(path), required={"fixtures": FIXTURES}, known=FILE.__contains__, names=", ".join(FILE))
    for name, value in content.items():
        check_value(value, FILE[name], f"{path}: {name}")
    if not content["fixtures"]:
        raise UnusableFileError("no fixture", where=f"{path}: fixtures", expected="at least one", got="an empty list", fix="add a fixture")
    seen: dict[str, int] = {}
    for number, fixture in enumerate(content["fixtures"]):
        where = f"{path}: fixtures[{number}]"
        check_names(fixture, where, required=REQUIRED, known=FIXTURE.__contains__, names=", ".join(FIXTURE))
        for name, value in fixture.items():
            check_value(value, FIXTURE[name], f"{where}.{name}")
        for name, value in [
            (f"{part}.{name}", value) for part in ("expected", "variants") for name, value in fixture.get(part, {}).items()
        ]:
            check_value(value, ANSWER, f"{where}.{name}")
        if not fixture["expected"]:
            raise UnusableFileError("no field", where=f"{where}.expected", expected="at least one", got="{}", fix="add what must come out")
        if seen.setdefault(fixture["id"], number) != number:
            got = f"{show(fixture['id'])}, as in fixtures[{seen[fixture['id']]}]"
            raise UnusableFileError("an id is given twice", where=f"{where}.id", expected="another id", got=got, fix="rename one of them")
    return content["fixtures"], tolerance_of(content.get("conventions", {}), f"{path}: conventions")


def read(path: Path) -> Any:
    """The JSON in a file, in which no name stands twice.

    Raises: UnusableFileError.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UnusableFileError("a name is given twice", where=str(path), expected="once", got=show(twice), fix="remove one of them")
        return dict(pairs)

    expected, fix = "a JSON file of fixtures", "give a file in the format of docs/golden_numbers.md"
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=once)
    except OSError as error:
        raise UnusableFileError("the file cannot be read", where=str(path), expected=expected, got=error.strerror, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise UnusableFileError("not JSON", where=str(path), expected=expected, got=" ".join(str(error).split()), fix=fix) from error


def tolerance_of(conventions: Values, where: str) -> tuple[float, float]:
    """(rtol, atol).

    Raises: UnusableFileError for a tolerance that cannot be read, or an entry that is not known.
    """
    check_names(conventions, where, required={}, known=CONVENTIONS.__contains__, names=", ".join(CONVENTIONS))
    for name, value in conventions.items():
        check_value(value, CONVENTIONS[name], f"{where}.{name}")
    text = conventions.get("tolerance", "rtol 1e-8, atol 1e-9")
    number = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
    found = re.fullmatch(f"rtol {number}, atol {number}", text)
    if found is None or not all(is_number(float(part)) and float(part) < 1 for part in found.groups()):
        expected = "such as 'rtol 1e-8, atol 1e-9', both below 1"
        raise UnusableFileError("wrong value", where=f"{where}.tolerance", expected=expected, got=show(text), fix="correct the value")
    return float(found[1]), float(found[2])


def check_known(fixtures: Sequence[Values], path: Path, chosen: Sequence[str]) -> None:
    """Raises: UnusableFileError for the first of the chosen estimators, or of their inputs, that this tool does not know."""
    for number, fixture in enumerate(fixtures):
        name, where = fixture["estimator"], f"{path}: fixtures[{number}]"
        if name not in chosen:
            continue
        if name not in FAMILIES:
            close = difflib.get_close_matches(name, FAMILIES, n=1)
            fix = f"write {close[0]}, or " if close else ""
            raise UnusableFileError(
                "unknown estimator",
                where=f"{where}.estimator",
                expected=", ".join(FAMILIES),
                got=show(name),
                fix=f"{fix}leave it out with --exclude {name}",
            )
        check_inputs(name, fixture["inputs"], f"{where}.inputs")
        if name == "rollout_is":
            check_correction(fixture["inputs"], fixture.get("note", ""), f"{where}.inputs")


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
    if options.limbs is not None and options.wire != "fp8":
        parser.error(f"--limbs counts the FP8 numbers of --wire fp8, got --wire {options.wire}")
    try:
        fixtures, tolerance = load(options.file)
        names = list(dict.fromkeys(fixture["estimator"] for fixture in fixtures))
        absent = [name for name in [*(options.estimator or []), *options.exclude] if name not in names]
        chosen = [name for name in (options.estimator or names) if name not in options.exclude]
        if absent or not chosen:
            got, fix = ", ".join(absent) or "none of them", "correct --estimator or --exclude"
            raise UnusableFileError("no such fixture", where=str(options.file), expected=", ".join(names), got=got, fix=fix)
        check_known(fixtures, options.file, chosen)
    except UnusableFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with Ranks(options.ranks, seed=options.seed) as ranks:
        num_failed = report(
            [fixture for fixture in fixtures if fixture["estimator"] in chosen], Setting(ranks, options.wire, options.limbs), tolerance
        )
    return 1 if num_failed else 0


def report(fixtures: Sequence[Values], setting: Setting, tolerance: tuple[float, float]) -> int:
    """Prints what failed, and a summary; the number of fixtures that did."""
    failed = 0
    not_compared: set[str] = set()
    for fixture in fixtures:
        problems, variants = check(fixture, setting, tolerance)
        failed += bool(problems)
        not_compared.update(variants)
        for problem in problems:
            print(f"FAIL {problem}")
    if not_compared:
        print(f"variants that no option here selects, not compared: {', '.join(sorted(map(show, not_compared)))}", file=sys.stderr)
    print(f"{len(fixtures) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["torch"])  # imported once, for all ranks of all fixtures
    sys.exit(main())
