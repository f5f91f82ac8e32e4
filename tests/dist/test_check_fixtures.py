"""tools/check_fixtures.py as a user calls it: on fixtures worked out by hand here, on wrong ones, and on unusable files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.dist.fixture_tool import ROOT, TOOL, Capture, imported, refused, write

# Each expected value follows from the inputs by the arithmetic in its note.
FIXTURES: list[dict[str, Any]] = [
    {
        "id": "reinforce_pp-a",
        "estimator": "reinforce_pp",
        "note": "returns 1 1 | -1: mean 1/3, variance 1 - 1/9 = 8/9; by samples mean 0, variance 1; 1 / sqrt(8/9) = 1.0606601718",
        "inputs": {"rewards": [1, -1], "mask": [[1, 1], [1, 0]], "beta": 0.0, "gamma": 1.0},
        "expected": {
            "returns": [[1, 1], [-1, 0]],
            "n_tokens": 3,
            "mean": 0.3333333333,
            "var_population": 0.8888888889,
            "advantages": [[0.7071067812, 0.7071067812], [-1.414213562, 0]],
        },
        "variants": {
            "sample_weighted_population": [[1, 1], [-1, 0]],
            "std_only_no_recentring": [[1.060660172, 1.060660172], [-1.060660172, 0]],
            "some_other_convention": [[9, 9], [9, 9]],
        },
    },
    {
        "id": "reinforce_pp_baseline-a",
        "estimator": "reinforce_pp_baseline",
        "note": "group a: 1 0 centred +-1/2; a lone response of group b is its own mean; variance 2 * 1/4 / 3 = 1/6, 0.5 * sqrt(6)",
        "inputs": {"rewards": [1, 5, 0], "group": ["a", "b", "a"], "mask": [[1], [1], [1]], "beta_in_reward": 0.0},
        "expected": {
            "centred": [0.5, 0, -0.5],
            "mean": 0,
            "var_population": 0.1666666667,
            "advantages": [[1.224744871], [0], [-1.224744871]],
        },
    },
    {
        "id": "dist_whiten-a",
        "estimator": "dist_whiten",
        "note": "two ranks, mean (2 + 4 + 6) / 3 = 4, variance 8 / 3, 2 / sqrt(8 / 3) = 1.2247448714",
        "inputs": {"rank0": [[2, 4]], "rank1": [[6]]},
        "expected": {"n": 3, "mean": 4, "var_population": 2.6666666667, "var_unbiased": 4, "out": [[-1.224744871, 0], [1.224744871]]},
    },
    {
        "id": "dist_whiten-b",
        "estimator": "dist_whiten",
        "inputs": {"a": [1, 0.0, 0.0], "b": [1, 2.0, 0.0]},
        "expected": {"n": 2, "mean": 1, "M2": 2},
    },
    {
        "id": "ppo_clip-a",
        "estimator": "ppo_clip",
        "inputs": {"cases": [[2.0, 1.0, 0.2, 0.3, None], [2.0, -1.0, 0.2, 0.3, 1.5]]},
        "expected": {"loss": [-1.3, 1.5], "dloss_dlogp": [0, 0]},
    },
    {
        "id": "kl-a",
        "estimator": "kl",
        "inputs": {"x": [1, 0], "ratio": [2, 3]},
        "expected": {"k1": [1, 0], "k2": [0.5, 0], "k3": [0.3678794412, 0], "ratio_k2": [1, 0]},
    },
    {
        "id": "aggregate-a",
        "estimator": "aggregate",
        "inputs": {"loss": [[1, 3], [5, 0]], "mask": [[1, 1], [1, 0]], "L_const": 2},
        "expected": {"token_mean": 3, "seq_mean_token_mean": 3.5, "seq_mean_token_sum": 4.5, "const_len": 2.25},
    },
    {
        "id": "rloo-a",
        "estimator": "rloo",
        "note": "the other's score, and a lone response as its own other; 2 / (2 - 1) is asked of even groups only",
        "inputs": {"rewards": [1, 0, 1], "group": [0, 0, 9]},
        "expected": {"advantages": [1, -1, 0], "baseline": [0, 1, 1]},
    },
    {
        "id": "rloo-b",
        "estimator": "rloo",
        "note": "less a fifth of the divergence: 0.9 and -0.05",
        "inputs": {"rewards": [1, 0], "group": [0, 0], "kl": [0.5, 0.25], "beta": 0.2},
        "expected": {"advantages": [0.95, -0.95], "scale": 2},
    },
    {
        "id": "remax-a",
        "estimator": "remax",
        "note": "0.5 still to come less the greedy 0.25; what is stored on the tool's token is not read",
        "inputs": {"rewards": [0.5], "greedy_rewards": [0.25], "mask": [[1, 0, 1]], "token_rewards": [[0.125, 9, 0.375]]},
        "expected": {"advantages": [[0.25, 0, 0.125]]},
    },
    {
        "id": "grpo-a",
        "estimator": "grpo",
        "note": "1 / (sqrt(2) + 0.5); by n 1 / (1 + 0.5)",
        "inputs": {"rewards": [2, 0], "group": [0, 0], "eps": 0.5},
        "expected": {"advantages": [0.5224077499, -0.5224077499], "std_unbiased": [1.4142135624, 1.4142135624]},
        "variants": {"population_std_same_eps": [0.6666666667, -0.6666666667]},
    },
    {
        "id": "grpo-b",
        "estimator": "grpo",
        "note": "batch-level std: mean 1.75, squares 6.75 over 3, so 1.5",
        "inputs": {"rewards": [1, 0, 3, 3], "group": [0, 0, 1, 1], "eps": 0},
        "expected": {"advantages": [0.3333333333, -0.3333333333, 0, 0]},
    },
    {
        "id": "dr_grpo-a",
        "estimator": "dr_grpo",
        "note": "-1/2 once and 1/2 three times: 1 over 2 * 4, over 4 tokens, and by responses nothing",
        "inputs": {"rewards": [1, 0], "group": [0, 0], "mask": [[1, 0, 0], [1, 1, 1]], "L_const": 4},
        "expected": {"advantages": [0.5, -0.5], "loss_const_len": 0.125, "loss_token_mean": 0.25, "loss_seq_mean_token_mean": 0},
    },
    {
        "id": "gae-a",
        "estimator": "gae",
        "note": "delta 0.5 * 0.25 - 0.5 = -0.375 and 0.75; -0.375 + 0.25 * 0.75 = -0.1875; whitened two values are -1 and 1",
        "inputs": {"token_rewards": [[0, 5, 1]], "values": [[0.5, 7, 0.25]], "mask": [[1, 0, 1]], "gamma": 0.5, "lam": 0.5},
        "expected": {"advantages": [[-0.1875, 0, 0.75]], "returns": [[0.3125, 0, 1]], "whitened": [[-1, 0, 1]]},
    },
    {
        "id": "overlong-a",
        "estimator": "overlong",
        "inputs": {"lengths": [8, 9, 10, 11], "L_max": 10, "cache": 2, "factor": 0.5},
        "expected": {"penalty": [0, -0.25, -0.5, -0.5]},
    },
    {
        "id": "overlong-b",
        "estimator": "overlong",
        "note": "a quarter of what was cut off: 0.25 and 0, mean 0.125",
        "inputs": {"rewards": [1, 0], "truncated": [True, False], "coef": 0.25},
        "expected": {"rewards": [0.25, 0], "centred": [0.125, -0.125]},
    },
    {
        "id": "overlong-c",
        "estimator": "overlong",
        "note": "centred 0.5 and -0.5; what is left has one value, so nothing is left after the normalisation",
        "inputs": {"rewards": [1, 0], "group": [0, 0], "mask": [[1, 1], [1, 1]], "truncated": [False, True]},
        "expected": {"centred": [0.5, -0.5], "effective_mask": [[1, 1], [0, 0]], "advantages": [[0, 0], [0, 0]]},
    },
    {
        "id": "dynamic_sampling-a",
        "estimator": "dynamic_sampling",
        "inputs": {"groups": [[0.1, 0.1], [-1, 1]]},
        "expected": {"keep": [False, True]},
    },
    {
        "id": "gspo-a",
        "estimator": "gspo",
        "note": "0.2 and -0.2 have the mean 0, so the ratio is 1; -2 and 1; -2 / 2 tokens",
        "inputs": {
            "logp": [[-1, -1], [-1, 0]],
            "logp_old": [[-1.2, -0.8], [-1, 0]],
            "mask": [[1, 1], [1, 0]],
            "advantages": [2, -1],
            "eps_low": 0.1,
            "eps_high": 0.1,
        },
        "expected": {"seq_ratio": [1, 1], "seq_loss": [-2, 1], "loss": -0.5, "clipped": [False, False], "grad_logp_per_token": [-1, 1]},
    },
    {
        "id": "cispo-a",
        "estimator": "cispo",
        "note": "a ratio of 2 held at 1.5: 1.5 * 2 * 1 and 1 * 2 * 3, mean 4.5; gradients -3 and -2 over 2 tokens",
        "inputs": {
            "logp": [[-1, -3]],
            "logp_old": [[-1.6931471806, -3]],
            "mask": [[1, 1]],
            "advantages": [2],
            "eps_low": 1.0,
            "eps_high": 0.5,
        },
        "expected": {"weights": [[1.5, 1]], "loss": 4.5, "grad_logp": [[-1.5, -1]]},
    },
    {
        "id": "rollout_is-a",
        "estimator": "rollout_is",
        "note": "MIS: e^-1 is below a half",
        "inputs": {"logp_train_old": [[0, -1]], "logp_rollout": [[0, 0]], "mask": [[1, 1]], "low": 0.5, "high": 2},
        "expected": {"weights": [[1, 0]], "kept": [[1, 0]], "denominator_tokens": 1},
    },
    {
        "id": "rollout_is-b",
        "estimator": "rollout_is",
        "note": "sequence TIS: e^0.5 times e^-0.5 is 1",
        "inputs": {"logp_train_old": [[0.5, -0.5]], "logp_rollout": [[0, 0]], "mask": [[1, 1]], "cap": 2},
        "expected": {"weights": [[1, 1]], "token": [[1.6487212707, 0.6065306597]], "sequence": [1], "ess_fraction": 1},
    },
    {
        "id": "e2e-a",
        "estimator": "e2e",
        "note": "centred +-1/2 becomes +-1; ratio 1; k2 = 2 and 0, mean 1, times 0.1; gradient (-1 + 0.1 * 2) / 2 and +1 / 2",
        "inputs": {
            "rewards": [1, 0],
            "group": [0, 0],
            "mask": [[1], [1]],
            "logp_old": [[-1], [-1]],
            "logp_new": [[-1], [-1]],
            "logp_ref": [[-3], [-1]],
            "k2_loss_coef": 0.1,
            "eps_low": 0.2,
            "eps_high": 0.2,
        },
        "expected": {
            "advantages": [[1], [-1]],
            "policy_loss": 0,
            "k2_loss": 1,
            "total": 0.1,
            "grad_logp_new": [[-0.4], [0.5]],
            "clip_fraction": 0,
        },
    },
]


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as the fixtures of dist_whiten start processes themselves."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=200, env=env, check=False
    )


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    with imported() as module:
        yield module


def test_hand_made_fixtures_of_every_family_pass(tmp_path: Path) -> None:
    done = _run(write(tmp_path / "good.json", FIXTURES))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{len(FIXTURES)} passed, 0 failed"), done.stdout + done.stderr


def test_they_pass_when_each_batch_is_spread_over_ranks(tmp_path: Path) -> None:
    """Each seed deals the rows out anew. Three ranks have no row at all of most of these batches."""
    path = write(tmp_path / "good.json", FIXTURES)
    done = _run(path, "--ranks", "4", "--seed", "1")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{len(FIXTURES)} passed, 0 failed"), done.stdout + done.stderr


def test_what_all_ranks_refuse_is_one_failure_and_the_next_fixture_goes_on(tmp_path: Path) -> None:
    """A variance beyond any float: both ranks raise the same error, and both are there for the next batch."""
    endless = {"id": "z", "estimator": "reinforce_pp", "inputs": {"rewards": [1e200, 0], "mask": [[1], [1]]}, "expected": {"mean": 0}}
    done = _run(write(tmp_path / "endless.json", [endless, FIXTURES[0]]), "--ranks", "2")
    *lines, summary = done.stdout.splitlines()
    assert (done.returncode, summary) == (1, "1 passed, 1 failed"), done.stdout + done.stderr
    assert "the variance is beyond float64" in lines[0]


def test_every_wrong_field_is_named(tmp_path: Path, tool: ModuleType, capsys: Capture) -> None:
    """One number of each kind is moved by 1e-6: a field, an entry, a gradient, a variant that an option of ours selects."""
    wrong = {fixture["id"]: fixture for fixture in json.loads(json.dumps(FIXTURES))}
    wrong["reinforce_pp-a"]["variants"]["sample_weighted_population"][0][1] += 1e-6
    wrong["reinforce_pp_baseline-a"]["expected"]["centred"][0] += 1e-6
    wrong["ppo_clip-a"]["expected"]["dloss_dlogp"][1] += 1e-6
    wrong["kl-a"]["expected"]["k9"] = [0, 0]
    wrong["rloo-a"]["expected"]["advantages"][2] += 1e-6
    wrong["grpo-a"]["variants"]["population_std_same_eps"][1] += 1e-6
    wrong["dynamic_sampling-a"]["expected"]["keep"][0] = True
    wrong["e2e-a"]["expected"]["grad_logp_new"][1][0] += 1e-6
    names = ("reinforce_pp-a", "reinforce_pp_baseline-a", "ppo_clip-a", "kl-a", "rloo-a", "grpo-a", "dynamic_sampling-a", "e2e-a")
    chosen = [wrong[name] for name in names]
    assert tool.main([str(write(tmp_path / "wrong.json", chosen))]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary == "0 passed, 8 failed"
    assert [line.split(": expected")[0] for line in lines] == [
        "FAIL reinforce_pp-a: variant sample_weighted_population[0][1]",
        "FAIL reinforce_pp_baseline-a: centred[0]",
        "FAIL ppo_clip-a: dloss_dlogp[1]",
        "FAIL kl-a: the tool computes no field 'k9'",
        "FAIL rloo-a: advantages[2]",
        "FAIL grpo-a: variant population_std_same_eps[1]",
        "FAIL dynamic_sampling-a: keep[0]",
        "FAIL e2e-a: grad_logp_new[1][0]",
    ]


def test_an_unknown_estimator_is_refused_until_it_is_left_out_by_name(tmp_path: Path, tool: ModuleType, capsys: Capture) -> None:
    strange = {"id": "moon-01", "estimator": "moon", "inputs": {}, "expected": {"light": 1}}
    path = write(tmp_path / "strange.json", [FIXTURES[6], strange])
    said = refused(path, tool, capsys)
    assert "fixtures[1].estimator: unknown estimator; expected: reinforce_pp," in said
    assert "fix: leave it out with --exclude moon" in said
    assert tool.main([str(path), "--exclude", "moon"]) == 0
    assert tool.main([str(path), "--estimator", "aggregate"]) == 0
    assert capsys.readouterr().out == "1 passed, 0 failed\n" * 2
    assert tool.main([str(path), "--estimator", "sun"]) == 2
    assert tool.main([str(path), "--exclude", "sun"]) == 2
    assert tool.main([str(path), "--exclude", "moon", "aggregate"]) == 2


def test_variants_that_are_not_compared_are_named(tmp_path: Path, tool: ModuleType, capsys: Capture) -> None:
    assert tool.main([str(write(tmp_path / "file.json", FIXTURES[:1]))]) == 0
    assert capsys.readouterr().err == "variants that no option here selects, not compared: 'some_other_convention'\n"


@pytest.mark.parametrize("options", [(), ("--ranks", "4", "--seed", "4"), ("--ranks", "2", "--wire", "fp8")], ids=" ".join)
def test_the_golden_numbers_pass(options: tuple[str, ...]) -> None:
    done = _run(*options)
    assert (done.returncode, done.stdout) == (0, "62 passed, 0 failed\n"), done.stdout + done.stderr
