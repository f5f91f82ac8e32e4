"""The section `correction` in the names that it had before: the same rule, or one error that names the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.__main__ import main
from megatron_rpp.config.correction import describe
from megatron_rpp.config.load import dump, load, load_with_lines
from megatron_rpp.config.schema import Correction
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError
from tests.unit.config.conftest import Write

HELD = Correction(weight="token", weight_clip=(0.5, 5.0))
KEPT = Correction(weight="token", weight_clip=None, reject="geometric", reject_outside=(0.5, 5.0))


@pytest.mark.parametrize(
    ("older", "current"),
    [
        ("{kind: tis}", Correction(weight="token")),
        ("{kind: tis, low: 0.5, high: 5}", HELD),
        ("{kind: tis, level: geometric, veto: 1e-4}", Correction(weight="geometric", reject_mode="zero", veto=1e-4)),
        (
            "{kind: icepop, level: geometric, low: 0.5, high: 5, veto: 1e-4}",
            Correction(weight="token", weight_clip=None, reject="geometric", reject_outside=(0.5, 5.0), reject_mode="zero", veto=1e-4),
        ),
        ("{kind: mis, level: geometric, low: 0.5, high: 5}", KEPT),
        ("{kind: none}", Correction()),
    ],
)
def test_a_file_with_the_old_names_is_the_same_rule(project: Path, write: Write, older: str, current: Correction) -> None:
    cfg, lines = load_with_lines(write("own.yaml", f"extends: run.yaml\ncorrection: {older}\n"))
    assert cfg.correction == current
    validate(cfg, lines=lines)
    assert load(write("again.yaml", dump(cfg))).correction == current


def test_the_command_line_goes_on_in_the_words_of_the_file(project: Path, write: Write) -> None:
    path = write("own.yaml", "extends: run.yaml\ncorrection: {kind: tis, low: 0.5}\n")
    assert load(path, ["correction.high=5"]).correction == HELD
    assert load(path, ["correction.kind=mis", "correction.level=geometric", "correction.high=5"]).correction == KEPT


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("correction.kind=tis", "correction.weight=token"),
            "correction.kind: is an old name and cannot be combined with correction.weight; "
            "write instead weight: LEVEL, weight_clip: [low, high]",
        ),
        (
            ("correction.high=3", "correction.reject_outside=[1, 2]"),
            "correction.high: is an old name and cannot be combined with correction.reject_outside; write instead level as",
        ),
        (("correction.kind=miss",), "correction.kind: expected 'none', 'tis', 'icepop', 'mis', got 'miss'"),
        (("correction.kind=[tis]",), "correction.kind: expected 'none', 'tis', 'icepop', 'mis', got ['tis']"),
        (("correction.kind=tis", "correction.level=word"), "correction.level: expected 'token', 'sequence', 'geometric', got 'word'"),
        (("correction.kind=tis", "correction.low=true"), "correction.low: expected a number, got True"),
        (("correction.high=3",), "correction.kind: none leaves correction's other settings without effect; set tis, icepop or mis"),
        (("correction.kind=none", "correction.veto=0.1"), "correction.kind: none leaves correction's other settings without effect"),
        (("correction.kind=mis",), "correction.low: 0 drops no small weight, and mis means to; set e.g. 0.5, or correction.kind: tis"),
        (("correction.knd=mis",), "correction.knd: unknown setting"),
    ],
)
def test_old_names_that_mean_nothing_are_one_error(project: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(project, overrides)
    first, *lines = str(caught.value).splitlines()
    assert "1 setting is wrong" in first
    assert len(lines) == 1
    assert lines[0].startswith(f"  command line  {message}")


def test_what_is_wrong_with_an_old_name_is_told_together_with_the_rest(project: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(project, ["correction.kind=miss", "algo.gamma=word"])
    assert [line.split(": ")[0].split()[-1] for line in str(caught.value).splitlines()[1:]] == ["correction.kind", "algo.gamma"]


def test_a_broken_bound_of_an_old_name_names_its_line(project: Path, write: Write) -> None:
    path = write("own.yaml", "extends: run.yaml\ncorrection:\n  kind: tis\n  low: 3\n")
    cfg, lines = load_with_lines(path)
    with pytest.raises(ConfigError, match=r"own.yaml:[34]  correction.weight_clip: must be \[low, high\]"):
        validate(cfg, lines=lines)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Correction(), "none"),
        (Correction(weight="token"), "token weight, truncated to [0, 2]"),
        (
            Correction(weight="token", weight_normalize=True, reject="geometric", reject_outside=(0.999, 1.001), veto=1e-4),
            "token weight, truncated to [0, 2], divided by its mean; geometric ratio outside [0.999, 1.001] rejected; "
            "response with a token below 0.0001 rejected; rejected tokens leave the loss mask",
        ),
        (
            Correction(weight="token", weight_clip=None, reject="token", reject_outside=(0.5, 5.0), reject_mode="zero"),
            "token weight, not truncated; token ratio outside [0.5, 5] rejected; rejected tokens get weight 0",
        ),
    ],
)
def test_the_combination_in_force_is_one_line(rule: Correction, words: str) -> None:
    assert describe(rule) == words


def test_a_product_that_nothing_bounds_is_a_warning(project: Path) -> None:
    cfg = load(project, ["correction.weight=sequence", "correction.weight_clip=null"])
    assert [warning.partition(":")[0] for warning in validate(cfg).warnings] == [
        "correction.weight sequence without correction.weight_clip"
    ]
    bounded = (
        "correction.weight=sequence",
        "correction.weight_clip=null",
        "correction.reject=sequence",
        "correction.reject_outside=[0.5, 2]",
    )
    assert validate(load(project, bounded)).warnings == ()


def test_check_prints_the_correction_and_both_lambdas(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(*overrides: str) -> dict[str, str]:
        assert main(["check", str(project), *overrides]) == 0
        return {line[2:32].strip(): line[33:] for line in capsys.readouterr().out.splitlines()}

    plain = lines()
    assert plain["correction"] == "none"
    assert "gae lambda" not in plain
    assert lines("correction.weight=token", "correction.veto=0.1")["correction"].startswith("token weight, truncated to [0, 2]; response")
    gae = ("algo.estimator=gae", "algo.gae_lambda=0.95")
    assert lines(*gae)["gae lambda"] == "policy 0.95, critic 0.95"
    assert lines(*gae, "critic.gae_lambda=1")["gae lambda"] == "policy 0.95, critic 1.0"
    by_length = lines("algo.estimator=gae", "algo.gae_length_alpha=0.05")["gae lambda"]
    assert by_length == "policy 1 - 1 / (0.05 * tokens of the response), critic 1.0"
