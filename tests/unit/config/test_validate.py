"""Rules between settings: each refuses what it should, lets the edge through, and none hides another."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from megatron_rpp.config.geometry import derive
from megatron_rpp.config.load import load, load_with_lines
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.hf.model import read_model
from tests.unit.config.conftest import QWEN, Write


def check(project: Path, *overrides: str, world_size: int | None = None, for_sft: bool = False) -> tuple[str, ...]:
    """The warnings."""
    return validate(load(project, overrides), world_size=world_size, for_sft=for_sft).warnings


# The model of the fixture: 4 layers, 4 heads, 2 key-value heads, feed-forward 128, 4096 positions.
REFUSED = [
    # bounds and ranges
    ("run.steps=0", "run.steps: must be at least 1, got 0"),
    ("run.seed=-1", "run.seed: must be 0 or more, got -1"),
    ("run.seed=4294967296", "run.seed: must be below 2^32"),
    ("run.deadline_s=0", "run.deadline_s: must be from 0.001 to 1209600 seconds (14 days), got 0.0"),
    ("optim.lr=.nan", "optim.lr: must be a finite number, got nan"),
    ("parallel.tp=0", "parallel.tp: must be at least 1, got 0"),
    ("rollout.temperature=0", "rollout.temperature: must be more than 0"),
    ("rollout.top_p=0", "rollout.top_p: must be in (0, 1], got 0.0"),
    ("rollout.top_p=1.1", "rollout.top_p: must be in (0, 1], got 1.1"),
    ("rollout.engines=0", "rollout.engines: must be at least 1, got 0"),
    ("eval.max_prompts=0", "eval.max_prompts: must be at least 1, got 0"),
    ("algo.gamma=1.01", "algo.gamma: must be in [0, 1], got 1.01"),
    ("algo.kl_reward_coef=-0.1", "algo.kl_reward_coef: must be 0 or more, got -0.1"),
    ("algo.kl_loss_coef=-0.1", "algo.kl_loss_coef: must be 0 or more, got -0.1"),
    ("algo.clip_low=0", "algo.clip_low: must be in (0, 1), got 0.0; set e.g. 0.2"),
    ("algo.clip_high=0", "algo.clip_high: must be more than 0, got 0.0; set e.g. 0.2"),
    ("algo.reward_clip=[1, 1]", "algo.reward_clip: must be [lowest, highest], got [1.0, 1.0]"),
    ("optim.beta2=1", "optim.beta2: must be in [0, 1), got 1.0"),
    ("optim.microbatch_tokens=0", "optim.microbatch_tokens: must be at least 1"),
    ("checkpoint.keep=0", "checkpoint.keep: must be at least 1"),
    ("rollout.samples_per_prompt=1", "rollout.samples_per_prompt: algo.estimator reinforce_pp_baseline"),
    ("algo.gae_lambda=1.5", "algo.gae_lambda: must be in [0, 1], got 1.5"),
    ("algo.dual_clip=1", "algo.dual_clip: must be more than 1, got 1.0"),
    ("algo.kl_target=0.1", "algo.kl_target: moves the one of algo.kl_reward_coef and algo.kl_loss_coef that is not 0, got 0.0 and 0.0"),
    ("reward.overlong_frac=1", "reward.overlong_frac: must be in [0, 1), got 1.0"),
    ("reward.truncated_coef=2", "reward.truncated_coef: must be in [0, 1], got 2.0"),
    ("critic.gae_lambda=1", "critic: is there for algo.estimator gae only, got reinforce_pp_baseline"),
    ("correction.veto=1", "correction.veto: must be in (0, 1), got 1.0"),
    (
        "correction.reject=token",
        "correction.reject_outside: must be set with correction.reject token: [low, high] of the ratio old / rollout",
    ),
    ("stats.limbs=0", "stats.limbs: must be at least 1"),
    # settings that would have no effect
    ("correction.weight_clip=null", "correction.weight_clip: has no effect while correction.weight is none"),
    ("correction.weight_normalize=true", "correction.weight_normalize: has no effect while correction.weight is none"),
    ("correction.reject_outside=[0.5, 2]", "correction.reject_outside: has no effect while correction.reject is none"),
    ("correction.reject_mode=zero", "correction.reject_mode: has no effect without correction.reject or correction.veto"),
    ("critic.lr=1e-4", "critic: is there for algo.estimator gae only, got reinforce_pp_baseline"),
    ("algo.kl_loss=k3", "algo.kl_loss: has no effect while algo.kl_loss_coef is 0"),
    ("algo.kl_reward=k2", "algo.kl_reward: has no effect while algo.kl_reward_coef is 0"),
    ("algo.kl_horizon=10", "algo.kl_horizon: has no effect without algo.kl_target"),
    ("reward.overlong_penalty=2", "reward.overlong_penalty: has no effect while reward.overlong_frac is 0"),
    ("rollout.max_refills=5", "rollout.max_refills: has no effect with rollout.keep_groups: all"),
    ("stats.scope=domain", "stats.scope: domain needs data.domain_key"),
    ("algo.gae_lambda=0.95", "algo.gae_lambda: and gae_length_alpha are there for algo.estimator gae only"),
    ("algo.grpo_std=batch", "algo.grpo_std: and its settings are there for algo.estimator grpo only"),
    ("algo.aggregate_tokens=100", "algo.aggregate_tokens: is the length of algo.aggregate constant_length, got token_mean"),
    ("stats.limbs=2", "stats.limbs: counts the FP8 numbers of stats.wire fp8, got fp64"),
    ("eval.every=5", "eval.every: has no effect without data.eval"),
    ("eval.temperature=0.7", "eval.temperature: has no effect without data.eval"),
    ("model.megatron.mtp_num_layers=1", "model.megatron.mtp_num_layers: cannot be set here"),
    ("optim.min_lr=1e-9", "optim.min_lr: has no effect with optim.schedule: constant"),
    ("model.ref=model", "model.ref: has no effect while"),
    # inputs
    ("data.train=nowhere.jsonl", "data.train: no such file"),
    ("model.megatron_checkpoint=nowhere", "model.megatron_checkpoint: no such directory"),
    ("data.eval=train.csv", "data.eval: must be a .jsonl or .parquet file"),
    ("model.hf=nowhere", "/nowhere/config.json: cannot read the file"),
    # geometry
    ("parallel.vpp=2", "parallel.vpp: virtual chunks need a pipeline"),
    ("parallel.pp=3", "parallel.pp: the 4 layers do not divide into pp 3 x vpp 1 = 3 chunks"),
    ("parallel.tp=3", "parallel.tp: the 4 attention heads do not divide by 3"),
    ("rollout.tp=2", "rollout.tp: the 1 ranks do not divide into engines of 2"),
    ("rollout.engines=2", "rollout.engines: 2 engines of 1 ranks need 2 ranks, there are 1"),
    ("algo.minibatches=65", "algo.minibatches: 65 minibatches cannot be cut from 64 prompts"),
    ("data.max_prompt_tokens=3073", "rollout.max_response_tokens: 1024 after data.max_prompt_tokens 3073 makes 4097 tokens"),
    ("eval.max_response_tokens=3073", "eval.max_response_tokens: 3073 after data.max_prompt_tokens 1024 makes 4097 tokens"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_a_broken_rule_is_refused_and_is_the_only_one(project: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(project, override)
    lines = [line for line in str(caught.value).splitlines()[1:] if not line.startswith("    ")]  # the rest explains them
    assert message in lines[0]
    assert all(line.split(":")[0] == lines[0].split(":")[0] for line in lines), lines


ACCEPTED = [
    (),
    ("rollout.samples_per_prompt=1", "algo.estimator=reinforce_pp"),
    ("algo.clip_high=1.5", "algo.clip_low=0.001", "algo.gamma=0", "algo.reward_clip=null"),
    ("algo.loss=cispo", "algo.clip_low=1", "algo.clip_high=4"),
    ("correction.kind=icepop", "correction.low=0.5", "correction.high=5", "correction.veto=1e-4"),
    ("correction.kind=tis",),
    ("correction.veto=1e-4",),
    ("correction.weight=sequence", "correction.weight_normalize=true", "correction.veto=1e-4", "correction.reject_mode=zero"),
    ("correction.weight=token", "correction.reject=geometric", "correction.reject_outside=[0.999, 1.001]"),
    ("algo.estimator=gae", "critic.gae_lambda=0"),
    ("algo.estimator=gae", "critic.gae_lambda=1", "algo.gae_length_alpha=0.05"),
    ("algo.estimator=gae", "algo.gae_length_alpha=0.05", "rollout.samples_per_prompt=1", "critic.lr=1e-4"),
    ("algo.kl_target=0.1", "algo.kl_reward_coef=0.1"),
    ("stats.wire=fp8", "stats.limbs=1"),
    ("data.max_prompt_tokens=3072",),
    ("parallel.tp=4",),  # more ranks than key-value heads: they are shared
    ("parallel.pp=2", "parallel.vpp=2"),
    ("parallel.pp=3", "model.megatron.num_layers_in_first_pipeline_stage=2"),
    ("optim.min_lr=1e-9", "optim.schedule=cosine"),
    ("model.ref=model", "algo.kl_loss_coef=0.1"),
    ("eval.every=5", "data.eval=train.jsonl"),
    ("parallel.dp=3", "rollout.tp=2", "rollout.engines=1"),
    ("eval.temperature=0", "checkpoint.every=0", "optim.lr=0"),
]


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_the_edge_of_a_rule_is_let_through(project: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent)
    check(project, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("algo.loss=reinforce", "algo.clip_high=0.3"), "algo.clip_low: and clip_high bound a ratio"),
        (("algo.estimator=gae", "critic.warmup_steps=100"), "critic.warmup_steps: leaves the policy none of the 100 steps"),
        (("algo.estimator=gae", "critic.gae_lambda=1.01"), "critic.gae_lambda: must be in [0, 1], got 1.01; VC-PPO and VAPO have 1"),
        (("algo.estimator=gae", "critic.gae_lambda=-0.1"), "critic.gae_lambda: must be in [0, 1], got -0.1"),
        (("algo.estimator=gae", "critic.gae_lambda=.nan"), "critic.gae_lambda: must be a finite number, got nan"),
        (("correction.weight=token", "correction.weight_clip=[2, 2]"), "correction.weight_clip: must be [low, high] with 0 <= low < high"),
        (("correction.weight=token", "correction.weight_clip=[0, .inf]"), "correction.weight_clip: must be [low, high]"),
        (("correction.weight=token", "correction.weight_clip=[.nan, 2]"), "correction.weight_clip: must be [low, high]"),
        (
            ("correction.reject=token", "correction.reject_outside=[0, 2]"),
            "correction.reject_outside: must be [low, high] with 0 < low < high",
        ),
        (("stats.wire=fp8", "stats.limbs=9"), "stats.limbs: must be at most 8, which carry a float64, got 9"),
        (("algo.estimator=gae", "critic.hf=nowhere"), "/nowhere/config.json: cannot read the file"),
        (("algo.estimator=gae", "model.megatron_checkpoint=."), "critic.hf: model.megatron_checkpoint has no weights for a critic"),
        (("preset=grpo", "model.megatron.moe_aux_loss_coeff=0.01"), "model.megatron.moe_aux_loss_coeff: Megatron scales it by tokens"),
        (("parallel.cp=2", "model.megatron.moe_z_loss_coeff=0.01"), "model.megatron.moe_z_loss_coeff: megatron-core makes it tp x cp = 2"),
        (("parallel.cp=2", "model.megatron.cp_comm_type=a2a+p2p"), "model.megatron.cp_comm_type: needs groups that are not made here"),
        (("algo.estimator=reinforce_pp", "stats.recentre=false"), "stats.recentre: false divides values that algo.estimator reinforce_pp"),
        (("algo.estimator=rloo", "stats.population=sample"), "stats.population: has no effect: stats.normalise auto with"),
        (("stats.normalise=off", "stats.recentre=false"), "stats.recentre: has no effect: stats.normalise off"),
        (("optim.schedule=linear", "optim.warmup_steps=100"), "optim.warmup_steps: leaves the schedule none of the 100 optimiser steps"),
        (
            ("algo.estimator=gae", "critic.warmup_steps=50", "optim.schedule=cosine", "optim.warmup_steps=60"),
            "optim.warmup_steps: leaves the schedule none of the 50 optimiser steps of the policy, got 60",
        ),
    ],
)
def test_a_rule_between_two_settings_is_refused(project: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(project, *overrides)
    assert message in str(caught.value).splitlines()[1]


def test_a_roll_out_that_is_too_long_is_no_mistake_of_an_evaluation_that_follows_it(project: Path) -> None:
    def lines(*overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            check(project, *overrides)
        return [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]

    assert lines("rollout.max_response_tokens=4000") == ["rollout.max_response_tokens"]
    assert lines("data.max_prompt_tokens=5000") == ["rollout.max_response_tokens"]
    assert lines("data.max_prompt_tokens=5000", "eval.max_response_tokens=1") == ["rollout.max_response_tokens", "eval.max_response_tokens"]


def test_all_broken_rules_are_reported_at_once_with_their_lines(project: Path, write: Write) -> None:
    path = write("bad.yaml", "extends: run.yaml\nalgo:\n  clip_low: 3\nparallel:\n  tp: 3\n  pp: 3\n")
    cfg, lines = load_with_lines(path, ["rollout.temperature=0", "data.eval=none.jsonl"])
    with pytest.raises(ConfigError) as caught:
        validate(cfg, world_size=8, lines=lines, source="bad.yaml")
    assert type(caught.value) is ConfigError
    text = str(caught.value)
    assert text.startswith("bad.yaml: 8 settings are wrong\n")
    for line in (
        "  command line  rollout.temperature: must be more than 0",
        f"  {path}:3  algo.clip_low: must be in (0, 1)",
        "  command line  data.eval: no such file",
        "  parallel.dp: tp 3 x cp 1 x dp 1 x pp 3 = 9 ranks, but there are 8 processes; one replica takes 9 ranks",
        f"  {path}:6  parallel.pp: the 4 layers do not divide",
        f"  {path}:5  parallel.tp: the 4 attention heads do not divide by 3",
        f"  {path}:5  parallel.tp: the feed-forward width 128 does not divide by 3",
        f"  {path}:5  parallel.tp: must divide the 2 key-value heads",
    ):
        assert line in text


def test_only_layouts_wrong_is_a_geometry_error(project: Path) -> None:
    with pytest.raises(GeometryError, match=r"parallel\.dp: 2 would fit"):
        check(project, "parallel.tp=2", world_size=4)
    assert check(project, "parallel.tp=2", "parallel.dp=2", world_size=4) == ()


def test_sft_needs_its_own_settings_only_when_it_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent)
    check(project)
    with pytest.raises(ConfigError) as caught:
        check(project, for_sft=True)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == ["sft.train", "sft.out", "sft.steps"]
    words = ("sft.train=train.jsonl", "sft.out=tuned", "sft.steps=1")
    check(project, *words, "sft.warmup_steps=0", for_sft=True)
    with pytest.raises(ConfigError, match=r"sft\.warmup_steps: leaves the schedule none of the 1 sft\.steps, got 20"):
        check(project, *words, for_sft=True)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (("rollout.top_p=0.9",), "rollout.top_p 0.9: the engine samples from a cut distribution"),
        (("model.dtype=bfloat16",), "bfloat16 on a CPU"),
        (("algo.kl_loss_coef=0.1", "algo.kl_reward_coef=0.1"), "both pull to the reference"),
        (("algo.kl_loss=k1", "algo.kl_loss_coef=0.1"), "algo.kl_loss k1 has an expected gradient of 0"),
        (("algo.kl_reward=k3", "algo.kl_reward_coef=0.1"), "k3 is never negative, so it lowers long responses"),
        (("algo.estimator=reinforce_pp", "rollout.keep_groups=informative"), "leaves out prompts that algo.estimator reinforce_pp"),
        (("algo.loss=reinforce", "algo.minibatches=2"), "no ratio: from the second of 2 minibatches"),
        (("algo.loss=gspo", "algo.minibatches=2", "algo.aggregate=seq_mean_token_mean"), "the paper has 3e-4, 4e-4"),
        (
            ("algo.loss=gspo", "algo.minibatches=2", "algo.clip_low=3e-4", "algo.clip_high=4e-4"),
            "algo.aggregate token_mean weighs responses by their length",
        ),
        (("algo.minibatches=3",), "64 prompts do not divide into algo.minibatches 3"),
        (("rollout.prompts_per_step=1", "parallel.dp=8"), "some ranks train on nothing"),
        (("algo.clip_high=0.28",), "hold nothing: with algo.minibatches 1 new is old"),
        (("parallel.dp=2", "rollout.engines=1"), "1 of 2 ranks have no engine"),
    ],
)
def test_what_is_allowed_but_odd_is_a_warning(project: Path, overrides: tuple[str, ...], warning: str) -> None:
    warnings = check(project, *overrides)
    assert len(warnings) == 1
    assert warning in warnings[0]


def test_derived_numbers_are_those_of_a_calculation_by_hand(project: Path) -> None:
    """tp 2 x pp 2 x dp 3 = 12 ranks; engines of 4 -> 3. 10 prompts in 4 minibatches: 3, 3, 2, 2 prompts of 2 responses."""
    overrides = ["parallel.tp=2", "parallel.pp=2", "parallel.dp=3", "rollout.tp=4", "rollout.prompts_per_step=10"]
    overrides += ["rollout.samples_per_prompt=2", "algo.minibatches=4", "run.steps=5", "data.max_prompt_tokens=100"]
    geometry = validate(load(project, overrides)).geometry
    assert (geometry.num_ranks, geometry.ranks_per_replica, geometry.num_engines, geometry.idle_ranks) == (12, 4, 3, 0)
    assert (geometry.responses_per_step, geometry.optimiser_steps, geometry.responses_per_optimiser_step) == (20, 20, (4, 6))
    even = validate(load(project, [*overrides, "rollout.prompts_per_step=8"])).geometry
    assert even.responses_per_optimiser_step == (4, 4)
    assert (geometry.max_sequence_tokens, geometry.layers_per_chunk, geometry.heads_per_rank) == (1124, 2, 2)


def test_the_parameter_count_is_that_of_a_real_model(tmp_path: Path) -> None:
    """Llama-3.1-70B has 70,553,706,496 weights (its card's safetensors total)."""
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    llama = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    assert read_model(tmp_path).num_parameters == 70_553_706_496


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    ("model_type", "head_dim", "tied"), [("llama", None, 99_008), ("llama", 24, 117_440), ("qwen2", None, 99_392), ("qwen3", 32, 136_064)]
)
def test_the_parameter_count_of_each_family_is_that_of_transformers(
    tmp_path: Path, model_type: str, head_dim: int | None, tied: int, is_tied: bool
) -> None:
    """`tied` is what transformers 5.12.1 allocates for 3 layers of these sizes; untied, the head adds 100 x 64 weights."""
    sizes = {**QWEN, "model_type": model_type, "num_hidden_layers": 3, "intermediate_size": 96, "tie_word_embeddings": is_tied}
    (tmp_path / "config.json").write_text(json.dumps(sizes | ({} if head_dim is None else {"head_dim": head_dim})))
    assert read_model(tmp_path).num_parameters == tied + (0 if is_tied else 6_400)


def test_uneven_layers_leave_the_layers_of_a_chunk_open(project: Path) -> None:
    cfg = load(project, ["parallel.pp=3", "model.megatron.num_layers_in_first_pipeline_stage=2"])
    assert derive(cfg, read_model(cfg.model.hf)).layers_per_chunk is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: cannot read the file as JSON"),
        ("[]", "config.json: the file does not hold a JSON object\n  got: a list"),
        ("null", "config.json: the file does not hold a JSON object\n  got: null"),
        (
            json.dumps({**QWEN, "hidden_size": "wide"}),
            "hidden_size: this entry is not a size\n  expected: a positive whole number\n  got: 'wide'",
        ),
        (json.dumps({key: value for key, value in QWEN.items() if key != "vocab_size"}), "vocab_size: this entry is missing"),
        (json.dumps({**QWEN, "num_attention_heads": 0}), "num_attention_heads: this entry is not a size"),
        (json.dumps({**QWEN, "num_hidden_layers": [4]}), "num_hidden_layers: this entry is not a size"),
        (json.dumps({**QWEN, "rms_norm_eps": "tiny"}), "rms_norm_eps: this entry is not a number"),
        (json.dumps({**QWEN, "tie_word_embeddings": "false"}), "tie_word_embeddings: this entry is not a flag"),
        (json.dumps({**QWEN, "layer_types": "full_attention"}), "layer_types: this entry is not a list"),
        (json.dumps({**QWEN, "rope_scaling": "yarn"}), "rope_scaling: this entry is not an object"),
    ],
)
def test_a_config_json_that_is_no_decoder_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_model(tmp_path)


def test_every_number_in_the_schema_has_a_bound_or_a_stated_reason(project: Path) -> None:
    """A new numeric setting must be given a rule: a senseless value of each is refused."""
    free = {"reward.failed_score", "reward.truncated_score"}  # any score may stand for a verifier's failure, or a cut response
    cfg = load(project)
    for section in fields(cfg):
        values = getattr(cfg, section.name)
        for spec in fields(values) if is_dataclass(values) else ():
            name = f"{section.name}.{spec.name}"
            kinds = str(spec.type)
            if ("int" in kinds or "float" in kinds) and "dict" not in kinds and "tuple" not in kinds and name not in free:
                with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
                    check(project, f"{name}=-7")
    assert is_dataclass(cfg)
