"""tools/check_fixtures.py as a user calls it: on fixtures worked out by hand here, on wrong ones, and on unusable files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_fixtures.py"
SHARED = ROOT.parent / "shared" / "fixtures" / "advantage_fixtures.json"

Main = Callable[[Sequence[str]], int]
Capture = pytest.CaptureFixture[str]

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


def _run(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as the fixtures of dist_whiten start processes themselves."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(TOOL), str(path), *options], capture_output=True, text=True, timeout=200, env=env, check=False
    )


@pytest.fixture(scope="module")
def main() -> Main:
    spec = importlib.util.spec_from_file_location("check_fixtures", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def _write(path: Path, fixtures: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"conventions": {"tolerance": "rtol 1e-8, atol 1e-9"}, "fixtures": fixtures}))
    return path


def test_hand_made_fixtures_of_every_family_pass(tmp_path: Path) -> None:
    done = _run(_write(tmp_path / "good.json", FIXTURES))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "8 passed, 0 failed"), done.stdout + done.stderr


def test_every_wrong_field_is_named(tmp_path: Path, main: Main, capsys: Capture) -> None:
    """One number of each kind is moved by 1e-6: a field, an entry, a gradient, a variant that an option of ours selects."""
    wrong = json.loads(json.dumps(FIXTURES))
    wrong[0]["variants"]["sample_weighted_population"][0][1] += 1e-6
    wrong[1]["expected"]["centred"][0] += 1e-6
    wrong[4]["expected"]["dloss_dlogp"][1] += 1e-6
    wrong[5]["expected"]["k9"] = [0, 0]
    wrong[7]["expected"]["grad_logp_new"][1][0] += 1e-6
    assert main([str(_write(tmp_path / "wrong.json", [wrong[i] for i in (0, 1, 4, 5, 7)]))]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary == "0 passed, 5 failed"
    assert [line.split(": expected")[0] for line in lines] == [
        "FAIL reinforce_pp-a: variant sample_weighted_population[0][1]",
        "FAIL reinforce_pp_baseline-a: centred[0]",
        "FAIL ppo_clip-a: dloss_dlogp[1]",
        "FAIL kl-a: the tool computes no field 'k9'",
        "FAIL e2e-a: grad_logp_new[1][0]",
    ]


def test_inputs_that_the_tool_does_not_understand_are_a_failure(tmp_path: Path, main: Main, capsys: Capture) -> None:
    strange = {"id": "kl-z", "estimator": "kl", "inputs": {"moon": "full"}, "expected": {}}
    assert main([str(_write(tmp_path / "strange.json", [strange]))]) == 1
    assert "kl-z: this tool does not understand the inputs ['moon']" in capsys.readouterr().out


def test_an_unknown_estimator_fails_until_it_is_left_out_by_name(tmp_path: Path, main: Main, capsys: Capture) -> None:
    strange = {"id": "gae-01", "estimator": "gae", "inputs": {}, "expected": {}}
    path = str(_write(tmp_path / "strange.json", [FIXTURES[6], strange]))
    assert main([path]) == 1
    said = capsys.readouterr().out
    assert "unknown estimators" in said
    assert "--exclude gae" in said
    assert said.endswith("1 passed, 1 failed\n")
    assert main([path, "--exclude", "gae"]) == 0
    assert main([path, "--estimator", "aggregate"]) == 0
    assert capsys.readouterr().out == "1 passed, 0 failed\n" * 2
    assert main([path, "--estimator", "rloo"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "list of fixtures"),
        ('{"fixtures": []}', "list of fixtures"),
        ('{"fixtures": [{"id": "a", "estimator": "kl"}]}', "fixture 0 lacks inputs, expected"),
        ('{"fixtures": [{"id": 1, "estimator": "kl", "inputs": {}, "expected": {}}], "conventions": {"tolerance": "low"}}', "tolerance"),
    ],
)
def test_an_unusable_file_is_one_line(tmp_path: Path, main: Main, capsys: Capture, content: str | None, message: str) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not beside this checkout")
def test_the_shared_fixtures_pass() -> None:
    known = ["reinforce_pp", "reinforce_pp_baseline", "dist_whiten", "ppo_clip", "kl", "aggregate", "e2e"]
    done = _run(SHARED, "--estimator", *known)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("passed, 0 failed\n")
