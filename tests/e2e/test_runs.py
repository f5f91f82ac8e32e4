"""What a user relies on: runs repeat to the byte, survive kill -9, and do not depend on the layout."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e import runs


def test_a_run_learns_and_the_engine_agrees_with_the_policy_at_every_step(uninterrupted: runs.Finished) -> None:
    assert [record["step"] for record in uninterrupted.records("step")] == [1, 2, 3, 4, 5, 6]
    assert max(uninterrupted.column("mismatch/max_abs")) <= 1e-4
    assert max(uninterrupted.column("mismatch/mean_abs")) > 0, "two engines that agree to the last bit were one and the same"
    held_out = {record["step"]: record["eval/accuracy"] for record in uninterrupted.records("eval")}
    assert list(held_out) == [0, 2, 4, 6]
    assert held_out[6] > held_out[0] + 0.3


def test_the_run_directory_holds_what_its_readme_says(uninterrupted: runs.Finished) -> None:
    for name in ("config.yaml", "versions.json", "patches.json", "eval/step-000006.jsonl", "logs/rank-1.log", "logs/engine-0.log"):
        assert (uninterrupted.dir / name).exists(), name


def test_every_process_of_the_run_reports_its_patches(uninterrupted: runs.Finished) -> None:
    processes = json.loads((uninterrupted.dir / "patches.json").read_text())
    active = {(each["role"], str(each["rank"])): {row["id"] for row in each["patches"] if row["active"]} for each in processes}
    assert sorted(active) == [("scheduler", "tp0-pp0"), ("server", "0"), ("trainer", "0"), ("trainer", "1")]
    assert any(name.startswith("p001") for name in active["trainer", "1"]), active
    assert any(name.startswith("p103") for name in active["scheduler", "tp0-pp0"]), active


def test_a_second_run_with_the_same_seed_writes_the_same_bytes(yaml: Path, uninterrupted: runs.Finished, tmp_path: Path) -> None:
    """By the other path of the weights, in more buckets: the engine gets the same bits."""
    again = runs.train(yaml, tmp_path / "again", "weights.path=gather", "weights.bucket_mib=1")
    assert again.code == 0, again.output
    assert again.metrics == uninterrupted.metrics
    assert runs.checkpoint_digest(again.dir, 6, tmp_path) == runs.checkpoint_digest(uninterrupted.dir, 6, tmp_path)


def test_kill_9_and_resume_changes_no_byte_of_metrics_and_checkpoint(yaml: Path, stateful: runs.Finished, tmp_path: Path) -> None:
    """3 steps, a checkpoint, a step that is lost; kill -9 of the launcher; nothing survives; 3 more steps.

    With a critic, a KL coefficient that moves and refills; the run that is not killed goes on for longer.
    """
    run_dir = tmp_path / "killed"
    with runs.training(yaml, run_dir, *runs.STATEFUL) as process:
        runs.await_record(run_dir, 4, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    limit = time.monotonic() + 10
    while (left := runs.processes_of(run_dir)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not left, f"10 s after kill -9: {left}"
    ledger = runs.ledger(run_dir)
    resumed = runs.train(yaml, run_dir, *runs.STATEFUL)
    assert resumed.code == 0, resumed.output
    assert "going on from step 3" in resumed.output
    assert stateful.metrics.startswith(resumed.metrics)
    assert [record["step"] for record in resumed.records("step")] == [1, 2, 3, 4, 5, 6]
    for model in ("policy", "critic"):
        assert runs.checkpoint_digest(run_dir, 6, tmp_path, of=model) == runs.checkpoint_digest(stateful.dir, 6, tmp_path, of=model)
    assert (runs.checkpoint(run_dir, 6) / "state.json").read_bytes() == (runs.checkpoint(stateful.dir, 6) / "state.json").read_bytes()
    refills, coefs = resumed.column("draw/refills"), resumed.column("policy/kl_coef")
    assert coefs[0] == coefs[1] and len(set(coefs[1:])) == 5, coefs
    assert max(refills[:3]) > 0 and max(refills[4:]) > 0, refills
    # The lost step's roll-out and its refills were read from the ledger.
    lost = {name: written for name, written in ledger.items() if name.startswith("step-000004")}
    assert sorted(lost) == ["step-000004"] + [f"step-000004.{n + 1}" for n in range(int(refills[3]))]
    assert runs.ledger(run_dir).items() >= lost.items()


def test_a_rank_that_is_stopped_in_its_roll_out_is_named_in_time_and_nothing_of_the_run_is_left(yaml: Path, tmp_path: Path) -> None:
    """Rank 0 with its engine: it hosts the store, and the other rank waits for it with a limit of hours."""
    run_dir, deadline_s = tmp_path / "stopped", 12.0
    words = (f"run.deadline_s={deadline_s:g}", "rollout.max_response_tokens=200", "rollout.prompts_per_step=16", "eval.every=0")
    with runs.training(yaml, run_dir, *words) as process:
        runs.await_record(run_dir, 1, process)
        while not any(path.stat().st_size for path in run_dir.glob("ledger/*/step-000002*")):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(deadline_s / 10)  # two beats
        ranks = [each for each in psutil.Process(process.pid).children() if "RANK" in each.environ()]
        everyone = [*ranks, *ranks[0].children(recursive=True)]
        assert any("megatron_rpp.rollout.server" in each.cmdline() for each in everyone)
        for each in (ranks[0], *ranks[0].children(recursive=True)):
            each.suspend()
        stopped = time.monotonic()
        assert process.wait(timeout=90) == 1
        took_s = time.monotonic() - stopped
    output = run_dir.with_suffix(".out").read_text()
    assert "rank 1, rollout / wait 'roll-out 2': rank 0 has been silent for" in output
    assert output.count("the last one said: rollout / sampling step 2 for") == 2  # to its peer, and to the launcher
    assert "Traceback" not in output
    assert took_s < deadline_s + 30.0
    assert not [each for each in everyone if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert not runs.processes_of(run_dir)


def test_sigusr1_saves_and_ends_and_the_run_goes_on_later(yaml: Path, uninterrupted: runs.Finished, tmp_path: Path) -> None:
    run_dir = tmp_path / "warned"
    with runs.training(yaml, run_dir, "checkpoint.every=0") as process:
        runs.await_record(run_dir, 1, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 0
    saved = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert len(saved) == 1, saved
    resumed = runs.train(yaml, run_dir, "checkpoint.every=0")
    assert resumed.code == 0, resumed.output
    assert f"going on from step {int(saved[0][-6:])}" in resumed.output
    assert resumed.column("score/mean") == uninterrupted.column("score/mean")


def test_a_warning_while_the_run_is_starting_ends_it_before_its_first_step(yaml: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "warned-early"
    with runs.training(yaml, run_dir, "eval.every=0") as process:
        runs.await_file(run_dir / "config.yaml", process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=runs.LIMIT_S) == 0
    assert "asked to stop after step 0" in run_dir.with_suffix(".out").read_text()
    assert not runs.processes_of(run_dir)


def test_torchrun_starts_a_run_and_the_engine_follows_the_policy_for_twenty_updates(stateful: runs.Finished) -> None:
    """Seen through the tokens of every step: all 20 published versions are the policy's weights, none lags or drifts. With a critic."""
    steps = stateful.records("step")
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert [record["step"] for record in steps if "policy/grad_norm" not in record] == [1]  # only the critic learns
    assert min(record["policy/grad_norm"] for record in steps[1:]) > 0
    assert min(stateful.column("critic/grad_norm")) > 0
    assert max(stateful.column("mismatch/max_abs")) <= 1e-4
    assert "rank-1.log" in {path.name for path in (stateful.dir / "logs").iterdir()}


@pytest.mark.parametrize(
    "layout",
    [("parallel.tp=1", "parallel.cp=2"), ("parallel.tp=2", "parallel.pp=2"), ("parallel.tp=1", "parallel.dp=2", "rollout.engines=2")],
)
def test_other_layouts_follow_the_same_curve(layout: tuple[str, ...], yaml: Path, uninterrupted: runs.Finished, tmp_path: Path) -> None:
    """The first roll-out is the same to the bit; later ones as long as no sampled token falls between two roundings."""
    other = runs.train(yaml, tmp_path / "-".join(layout), "run.steps=3", "checkpoint.every=0", "eval.every=0", *layout)
    assert other.code == 0, other.output
    assert other.column("score/mean") == pytest.approx(uninterrupted.column("score/mean")[:3], abs=1e-3)
    assert other.column("adv/return_std")[0] == uninterrupted.column("adv/return_std")[0]
    assert other.column("policy/grad_norm")[0] == pytest.approx(uninterrupted.column("policy/grad_norm")[0], rel=1e-4)
    assert max(other.column("mismatch/max_abs")) <= 1e-4


def test_the_gsm8k_example_runs_through_chat_template_packing_and_the_math_verifier(assets: Path, tmp_path: Path) -> None:
    """A random model boxes nothing, so the verifier's word is 0 each time; a run without it would not end so.

    With dynamic sampling no prompt is worth keeping: each step ends at the cap, with a group for each of the two minibatches. The
    correction rejects every token of them, so that each step is skipped, which is said each time.
    """
    yaml = runs.ROOT / "examples" / "gsm8k" / "tiny.yaml"
    words = ("preset=prorl_v2", "rollout.max_refills=1", "correction.low=1.5", "algo.kl_loss_coef=0")
    run = runs.train(yaml, tmp_path / "gsm8k", f"model.hf={assets / 'model'}", "observe.console=plain", *words)
    assert run.code == 0, run.output
    steps = run.records("step")
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [(record["draw/refills"], record["draw/kept_groups"], record["batch/prompts"]) for record in steps] == [(1, 2, 2.0)] * 3
    assert run.column("adv/is_degenerate") == [1.0] * 3
    assert [(record["policy/skipped_minibatches"], record["policy/grad_norm"]) for record in steps] == [(2, 0.0)] * 3
    assert run.column("batch/empty_steps") == [1] * 3
    assert [run.output.count(f"step {step} is skipped: ") for step in (1, 2, 3)] == [1, 1, 1]
    assert "step 1: 2 of 4 prompts after 1 refills; the scores differ in 0% of the sampled groups" in run.output
    assert run.column("score/failed_frac") == [0.0] * 3
    assert run.column("score/mean") == [0.0] * 3
    assert max(run.column("mismatch/max_abs")) <= 1e-4
    answers = [json.loads(line) for line in (run.dir / "eval" / "step-000003.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in answers] == ["19", "1,400", "11", "200", "63", "270", "30", "-5"]


def test_an_engine_that_dies_under_an_update_is_started_anew_and_changes_no_number(
    yaml: Path, uninterrupted: runs.Finished, tmp_path: Path
) -> None:
    run_dir = tmp_path / "dying"
    words = ("train", str(yaml), f"run.dir={run_dir}", "parallel.tp=1", "run.steps=3", "eval.every=0")
    code, output = runs.rpp(*words, module="tests.e2e.dying_engine")
    assert code == 0, output
    assert "publish version 2 failed on rank 0" in output
    assert "starting the engines anew, once" in output
    run = runs.Finished(run_dir, code, output)
    killed = int(re.search(r"killed scheduler (\d+)", output)[1])
    pids = [each["pid"] for each in json.loads((run_dir / "patches.json").read_text()) if each["role"] == "scheduler"]
    assert len(pids) == 1
    assert killed not in pids, "patches.json tells of the engine that died"
    assert max(run.column("mismatch/max_abs")) <= 1e-4
    assert run.column("score/mean") == pytest.approx(uninterrupted.column("score/mean")[:3], abs=1e-3)


def test_experts_on_two_ranks_and_the_engine_agree_at_every_step(assets: Path, yaml: Path, tmp_path: Path) -> None:
    """DeepSeek-V3 with expert parallelism: half of the experts come from the other rank, to the slots that the engine keeps them in."""
    model = runs.make_deepseek(assets, tmp_path / "model")
    words = (f"model.hf={model}", "parallel.tp=1", "parallel.dp=2", "parallel.ep=2", "run.steps=3", "eval.every=0")
    run = runs.train(yaml, tmp_path / "run", *words)
    assert run.code == 0, run.output
    assert [record["step"] for record in run.records("step")] == [1, 2, 3]
    assert min(run.column("policy/grad_norm")) > 0
    assert max(run.column("mismatch/max_abs")) <= 1e-4


def test_an_engine_in_block_fp8_follows_a_wide_policy_at_the_price_of_its_rounding(assets: Path, yaml: Path, tmp_path: Path) -> None:
    """Healthy runs of this model lie at 0.03 to 0.05; keys and values of one layer that change places at 0.6."""
    model = runs.make_of_whole_blocks(assets, tmp_path / "model")
    words = (f"model.hf={model}", "rollout.dtype=fp8_block", "run.steps=3", "eval.every=0", "observe.mismatch_action=stop")
    run = runs.train(yaml, tmp_path / "run", *words)
    assert run.code == 0, run.output
    assert [record["step"] for record in run.records("step")] == [1, 2, 3]
    assert 1e-3 < min(run.column("mismatch/mean_abs")) <= max(run.column("mismatch/mean_abs")) < 0.1
    assert "mismatch_alarm" not in run.output
    assert not list((run.dir / "engine").glob("*.safetensors"))


def test_an_engine_of_two_ranks_in_another_order_follows_a_policy_of_two_stages(yaml: Path, tmp_path: Path) -> None:
    """Each engine rank takes half of every layer, each trainer rank holds half of the layers and packs for the other's engine rank."""
    small = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_response_tokens=6", "run.steps=2", "eval.every=0")
    torchrun = ("--nproc-per-node=2", "--standalone", "-m", "tests.e2e.crossed_places")  # `rpp` would start ranks of its own
    words = ("train", str(yaml), f"run.dir={tmp_path / 'split'}", "parallel.tp=1", "parallel.pp=2", "rollout.tp=2", *small)
    run = runs.Finished(tmp_path / "split", *runs.rpp(*torchrun, *words, module="torch.distributed.run"))
    assert run.code == 0, run.output
    assert re.search(r"weights: (\d+) of (\d+) bytes stay on their GPU", run.output)
    assert [record["step"] for record in run.records("step")] == [1, 2]
    assert max(run.column("mismatch/max_abs")) <= 1e-4


@pytest.mark.parametrize("path", ["direct", "gather"])
def test_a_sync_that_swaps_keys_and_values_of_one_layer_raises_the_alarm(path: str, yaml: Path, tmp_path: Path) -> None:
    """Every tensor arrives, in its shape, under a valid name: only the log-probabilities can tell."""
    words = ("train", str(yaml), f"run.dir={tmp_path / 'swapped'}", "parallel.tp=1", "observe.mismatch_action=stop", f"weights.path={path}")
    code, output = runs.rpp(*words, module="tests.e2e.swapped_sync")
    assert code == 1, output
    assert "the training and the roll-out engine disagree about the same tokens" in output
    assert "observe.mismatch_alarm" in output
    assert "Traceback" not in output
