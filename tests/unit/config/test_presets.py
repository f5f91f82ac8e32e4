"""A preset lies under the user's settings, is said to be where a value comes from, and holds together with the defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpp.config.load import dump, load, load_with_lines
from megatron_rpp.config.presets import PRESETS
from megatron_rpp.config.schema import Correction
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError
from tests.unit.config.conftest import Write


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_accepted_without_a_warning_and_changes_something(project: Path, name: str) -> None:
    cfg = load(project, [f"preset={name}"])
    assert validate(cfg).warnings == ()
    changed = [(section, setting) for section, values in PRESETS[name].items() for setting in values]
    assert changed
    for section, setting in changed:
        assert getattr(getattr(cfg, section), setting) == PRESETS[name][section][setting]


def test_what_the_user_writes_lies_over_the_preset_wherever_it_is_written(project: Path, write: Write) -> None:
    path = write("own.yaml", "extends: run.yaml\nalgo: {clip_high: 0.3}\npreset: dapo\n")
    assert (load(path).algo.clip_high, load(path).algo.estimator) == (0.3, "grpo")
    assert load(path, ["algo.estimator=rloo"]).algo.estimator == "rloo"
    cfg, lines = load_with_lines(path, ["preset=prorl_v2"])  # the command line's preset, the file's bound
    assert (cfg.preset, cfg.algo.clip_high, cfg.correction.reject_mode) == ("prorl_v2", 0.3, "zero")
    assert lines["algo.clip_high"] == f"{path}:2"
    assert lines["correction.reject"] == "preset prorl_v2"
    assert "correction.weight" in lines
    assert "algo.gamma" not in lines


def test_a_file_that_was_written_out_gives_the_same_settings_again(project: Path, write: Write) -> None:
    cfg = load(project, ["preset=dapo", "algo.clip_high=0.3"])
    assert load(write("again/config.yaml", dump(cfg))) == cfg
    assert load(project, ["preset=null"]) == load(project)


@pytest.mark.parametrize("value", ["dappo", "[dapo]", "{dapo: 1}", "3"])
def test_an_unknown_preset_is_one_clear_error(project: Path, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(project, [f"preset={value}"])
    assert "1 setting is wrong" in str(caught.value)
    assert "command line  preset: expected 'reinforce_pp', 'reinforce_pp_baseline'" in str(caught.value)


def test_a_rule_that_a_preset_breaks_says_so(project: Path) -> None:
    cfg, lines = load_with_lines(project, ["preset=dapo", "rollout.samples_per_prompt=1"])
    with pytest.raises(ConfigError, match=r"preset dapo  rollout.keep_groups: a prompt with one response"):
        validate(cfg, lines=lines)


def test_what_a_preset_sets_is_no_mistake_where_the_user_lays_something_over_a_part_of_it(project: Path) -> None:
    cfg, lines = load_with_lines(project, ["preset=grpo", "algo.kl_loss_coef=0"])  # its kl_loss is then read by nobody
    assert validate(cfg, lines=lines).warnings == ()
    cfg, lines = load_with_lines(project, ["algo.kl_loss=k3"])
    with pytest.raises(ConfigError, match=r"algo.kl_loss: has no effect"):
        validate(cfg, lines=lines)


PRORL = Correction(weight="token", weight_clip=None, reject="token", reject_outside=(0.5, 5.0), reject_mode="zero")


def test_another_correction_leaves_the_settings_of_the_presets_own(project: Path) -> None:
    def correction(*overrides: str) -> Correction:
        cfg, lines = load_with_lines(project, ["preset=prorl_v2", *overrides])
        validate(cfg, lines=lines)
        return cfg.correction

    assert correction() == PRORL
    assert correction("correction.weight=none", "correction.reject=none") == Correction()
    assert correction("correction.reject=none") == Correction(weight="token", weight_clip=None)
    assert correction("correction.weight=sequence") == replace(PRORL, weight="sequence", weight_clip=(0.0, 2.0))
    assert correction("correction.reject_outside=[0.5, 3]") == replace(PRORL, reject_outside=(0.5, 3.0))
    geometric = ("correction.reject=geometric", "correction.reject_outside=[0.9, 1.1]")
    assert correction(*geometric) == Correction(weight="token", weight_clip=None, reject="geometric", reject_outside=(0.9, 1.1))


def test_old_names_over_a_preset_mean_what_they_meant(project: Path) -> None:
    assert load(project, ["preset=prorl_v2", "correction.kind=none"]).correction == Correction()
    assert load(project, ["preset=prorl_v2", "correction.kind=tis"]).correction == Correction(weight="token")
    assert load(project, ["preset=prorl_v2", "correction.high=3"]).correction == replace(PRORL, reject_outside=(0.5, 3.0))
    assert load(project, ["preset=prorl_v2", "correction.level=sequence"]).correction == replace(PRORL, reject="sequence")
    assert load(project, ["preset=prorl_v2", "correction.kind=mis", "correction.low=0.8"]).correction == Correction(
        weight="token", weight_clip=None, reject="token", reject_outside=(0.8, 2.0)
    )
