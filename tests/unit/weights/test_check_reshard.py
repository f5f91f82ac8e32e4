"""tools/check_reshard.py: what it prints, what it refuses, and that it sees a wrong plan."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.weights.models import CONFIGS, MOE_CONFIGS
from tools import check_reshard


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[Any], str]:
    """(exit status, JSON lines, what went to stderr)."""
    monkeypatch.setattr(sys, "argv", ["check_reshard.py", *arguments])
    status = check_reshard.main()
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A model of one layer that can be counted by hand."""
    sizes = dict(num_hidden_layers=1, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, vocab_size=128)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    return str(tmp_path / "config.json")


def test_one_pair_counted_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str) -> None:
    """tp 2 on both sides: each rank's halves are the engine's, but for the vocabulary: 128 of 256 rows against 64 of 128.

    The first trainer rank holds all 128 tokens of embedding and head, so the second engine rank fetches 64 rows of each.
    """
    for bytes_only, equal in (((), True), (("--bytes-only",), None)):
        status, (row,), err = run(monkeypatch, capsys, "--hf-config", config, "--src", "tp=2", "--dst", "tp=2", *bytes_only)
        assert (status, err) == (0, "")
        assert row.pop("plan_s") >= 0
        count = 2 * 64 * 8 * 2
        moved = {"bytes_moved": count, "lower_bound": count, "ratio": 1.0, "max_rank_bytes": count, "buckets": 1}
        assert row == {"src": "tp=2", "dst": "tp=2", "equal": equal, **moved}


def test_several_engines_and_a_full_copy_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str) -> None:
    """Two trainer ranks that halve every matrix, two engines of one rank: each lacks half of the matrices, not the vocabulary."""
    _, (row,), _ = run(monkeypatch, capsys, "--hf-config", config, "--src", "tp=2", "--dst", "tp=1")
    halves = (4 * 8 * 8 + 3 * 8 * 16) // 2
    assert row["bytes_moved"] == row["lower_bound"] == 2 * (2 * halves + 2 * 128 * 8)
    assert row["max_rank_bytes"] == 2 * (halves + 2 * 128 * 8)


@pytest.mark.parametrize("wrong", ["lost", "misplaced"])
def test_a_wrong_plan_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str, wrong: str) -> None:
    """Nothing travels between one rank and itself, so only the comparison of values can tell."""
    true_plan = check_reshard.plan

    def broken(*layouts: Any, **named: Any) -> SimpleNamespace:
        found = true_plan(*layouts, **named)
        first, *rest = found.transfers
        more = (
            [] if wrong == "lost" else [replace(first, rect=replace(first.rect, row=0, rows=1), src_piece=replace(first.src_piece, row=1))]
        )
        return SimpleNamespace(buckets=found.buckets, schedule=found.schedule, transfers=[*more, *rest] if more else rest)

    monkeypatch.setattr(check_reshard, "plan", broken)
    status, (row,), _ = run(monkeypatch, capsys, "--hf-config", config)
    assert (status, row["equal"], row["ratio"]) == (1, False, 1.0)


def fp8_config(folder: Path, **more: int) -> str:
    """Whole blocks everywhere: two ranks hold halves of 256 rows or columns."""
    sizes = dict(num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2, head_dim=128)
    (folder / "fp8.json").write_text(json.dumps({"model_type": "llama", **sizes, "vocab_size": 128, **more}))
    return str(folder / "fp8.json")


def test_a_pair_in_fp8_counted_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two trainer ranks, two engines of one rank: each lacks half of the matrices, a byte an element and 4 for 128 x 128 of them."""
    elements = (4 * 256 * 128 + 3 * 128 * 256) // 2
    halves = elements + 4 * elements // 128**2
    vocabulary = 2 * 2 * 128 * 128  # embedding and head, of which the second rank holds nothing
    for bytes_only, equal in (((), True), (("--bytes-only",), None)):
        config = fp8_config(tmp_path)
        status, (row,), _ = run(monkeypatch, capsys, "--hf-config", config, "--src", "tp=2", "--dst", "tp=1", "--fp8", *bytes_only)
        assert (status, row["equal"], row["ratio"], row["wide_tensors"]) == (0, equal, 1.0, 0)
        assert row["bytes_moved"] == row["lower_bound"] == 2 * halves + vocabulary
        assert row["max_rank_bytes"] == halves + vocabulary


def test_what_the_trainer_cuts_inside_a_block_travels_wide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An MLP of 384: three of the seven matrices cost two bytes an element."""
    config = fp8_config(tmp_path, intermediate_size=384)
    status, (row,), _ = run(monkeypatch, capsys, "--hf-config", config, "--src", "tp=2", "--dst", "tp=1", "--fp8")
    assert (status, row["equal"], row["wide_tensors"]) == (0, True, 3)
    attention, mlp = 4 * 256 * 128 // 2, 3 * 128 * 384 // 2
    assert row["bytes_moved"] == 2 * (attention + 4 * attention // 128**2 + 2 * mlp) + 2 * 2 * 128 * 128


def test_the_fp8_matrix_refuses_what_has_no_fp8_form_and_sees_other_bits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = list(check_reshard.pairs(check_reshard.FP8_MODELS))
    assert {name for name, *_ in everything} == set(check_reshard.MODELS)
    chosen = [("llama", "tp=2,pp=2", "tp=2"), ("qwen2, tied", "tp=4,pp=3", "tp=2"), ("qwen2, tied", "tp=4,pp=3", "tp=8")]
    chosen += [("deepseek_v3", "tp=2,ep=4,etp=2", "tp=4,ep=2"), ("qwen3_moe", "tp=8,ep=4,pp=2", "tp=8,ep=2")]
    some = [pair for pair in everything if (pair[0], *pair[2:]) in chosen]
    monkeypatch.setattr(check_reshard, "pairs", lambda models: some)
    status, rows, _ = run(monkeypatch, capsys, "--matrix", "--fp8")
    assert rows[-1].pop("seconds") >= 0
    assert (status, rows[-1]) == (0, {"pairs": 4, "equal": 4, "wrong": 0, "worst_ratio": 1.0, "refused": 1})
    assert [row["dst"] for row in rows[:-1] if "inside a block" in row.get("refused", "")] == ["tp=8"]
    assert any(row.get("wide_tensors") for row in rows) and any(row.get("wide_tensors") == 0 for row in rows)
    true_quantise = check_reshard.quantise
    monkeypatch.setattr(check_reshard, "quantise", lambda weight: true_quantise(weight, scales="power_of_two"))
    status, rows, _ = run(monkeypatch, capsys, "--matrix", "--fp8")
    assert (status, rows[-1]["wrong"]) == (1, 4)


def test_the_matrix_is_several_hundred_pairs_of_every_family() -> None:
    found = [(name, src, dst) for name, _, src, dst in check_reshard.pairs()]
    assert len(set(found)) == len(found) >= 300
    kinds = {config["model_type"] for config in check_reshard.MODELS.values()}
    assert kinds == {config["model_type"] for config in (*CONFIGS.values(), *MOE_CONFIGS.values())}


def test_the_matrix_ends_with_its_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    some = list(check_reshard.pairs())[-40::6]
    monkeypatch.setattr(check_reshard, "pairs", lambda models: some)
    status, rows, _ = run(monkeypatch, capsys, "--matrix")
    assert status == 0
    assert len(rows) == len(some) + 1
    assert rows[-1].pop("seconds") >= 0
    assert rows[-1] == {"pairs": len(some), "equal": len(some), "wrong": 0, "worst_ratio": 1.0}
    monkeypatch.setattr(check_reshard, "lower_bound", lambda src, dst: 1)
    status, rows, _ = run(monkeypatch, capsys, "--matrix")
    assert (status, rows[-1]["wrong"]) == (1, len(some))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--hf-config: which model?; expected: a config.json, or --matrix"),
        (
            ["--hf-config", "CONFIG", "--fp8", "--dst", "tp=2"],
            "qkv_proj.weight: the engine cuts this parameter inside a block of 128 x 128",
        ),
        (["--hf-config", "/nowhere/config.json"], "/nowhere/config.json: cannot read the file"),
        (["--hf-config", "CONFIG", "--src", "tp=two"], "--src: not a split; expected: some of tp=N, pp=N, vpp=N"),
        (["--hf-config", "CONFIG", "--dst", "pp=2"], "--dst: not a split; expected: some of tp=N, ep=N, attn_dp=N; got: pp=2"),
        (["--hf-config", "CONFIG", "--src", "pp=2"], "1 layers do not make 2 stages"),
        (["--hf-config", "CONFIG", "--src", "tp=3"], "tp cuts a head"),
        (["--hf-config", "CONFIG", "--src", "dp=3", "--dst", "tp=2"], "engines do not fill the trainer's ranks; expected: a divisor of 3"),
        (["--hf-config", "CONFIG", "--dst", "tp=2,attn_dp=2"], "no data-parallel attention"),
        (["--hf-config", "CONFIG", "--dst", "ep=2,tp=2"], "0 experts cannot be shared by 2 ranks"),
        (["--hf-config", "CONFIG", "--gpus-per-node", "0"], "--gpus-per-node: not a number of GPUs"),
        (["--hf-config", "EXAMPLES/llama-3.1-70b.json"], "70,553,706,496 parameters are too many to carry here; fix: --bytes-only"),
    ],
)
def test_a_mistake_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str, arguments: list[str], message: str
) -> None:
    examples = str(Path(check_reshard.__file__).parents[1] / "examples" / "models")
    words = [word.replace("CONFIG", config).replace("EXAMPLES", examples) for word in arguments]
    status, rows, err = run(monkeypatch, capsys, *words)
    assert (status, rows) == (2, [])
    assert message in err
    assert err.count("\n") == 1
