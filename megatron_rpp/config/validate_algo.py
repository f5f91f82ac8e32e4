"""The rules of credit and loss: sections algo, correction, stats, critic, and what they ask of reward and rollout."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rpp.config.correction import correction_effects, correction_problems, correction_warnings
from megatron_rpp.config.problems import Problem
from megatron_rpp.config.schema import NORMALISED, Algo, Config, Critic, Stats

MAX_LIMBS = 8  # of stats/wire.py
# What a response is compared with in these is its own group: their values are centred before any normalisation.
NEED_GROUPS = ("reinforce_pp_baseline", "rloo", "grpo", "dr_grpo")


def algo_problems(cfg: Config) -> Iterator[Problem]:
    """Every broken rule."""
    yield from _ranges(cfg)
    yield from _groups(cfg)
    yield from _truncation(cfg)
    yield from correction_problems(cfg.correction)
    yield from _models(cfg)


def algo_warnings(cfg: Config) -> Iterator[str]:
    """What is allowed and worth a second look."""
    algo, rollout = cfg.algo, cfg.rollout
    if rollout.top_p < 1:
        yield f"rollout.top_p {rollout.top_p}: the engine samples from a cut distribution, so logp_rollout is not comparable with logp_old"
    if algo.kl_reward_coef > 0 and algo.kl_loss_coef > 0:
        yield "algo.kl_reward_coef and algo.kl_loss_coef both pull to the reference; one of them is the usual choice"
    if algo.kl_loss_coef > 0 and algo.kl_loss == "k1":
        yield "algo.kl_loss k1 has an expected gradient of 0: it pulls nowhere; k1_unbiased or k2_unbiased do"
    if algo.kl_reward_coef > 0 and algo.kl_reward != "k1":
        yield f"algo.kl_reward {algo.kl_reward} is never negative, so it lowers long responses; k1 is the one whose sum is a divergence"
    if rollout.keep_groups == "informative" and algo.estimator in ("reinforce_pp", "gae"):
        yield f"rollout.keep_groups informative leaves out prompts that algo.estimator {algo.estimator} would learn from"
    bounds = (algo.clip_low, algo.clip_high, algo.dual_clip)
    if algo.minibatches == 1 and algo.loss != "reinforce" and bounds != (Algo().clip_low, Algo().clip_high, Algo().dual_clip):
        yield "algo.clip_low, clip_high and dual_clip hold nothing: with algo.minibatches 1 new is old, and every ratio 1"
    if algo.loss == "reinforce" and algo.minibatches > 1:
        yield f"algo.loss reinforce has no ratio: from the second of {algo.minibatches} minibatches on its gradient is of another policy"
    if algo.loss == "gspo" and max(algo.clip_low, algo.clip_high) > 0.01:
        bounds = f"algo.clip_low {algo.clip_low}, clip_high {algo.clip_high}"
        yield f"{bounds}: ratios of whole responses stay far inside; the paper has 3e-4, 4e-4"
    if algo.loss == "gspo" and algo.aggregate != "seq_mean_token_mean":
        yield f"algo.loss gspo with algo.aggregate {algo.aggregate} weighs responses by their length; the paper: seq_mean_token_mean"
    yield from correction_warnings(cfg.correction)


def _ranges(cfg: Config) -> Iterator[Problem]:
    algo = cfg.algo
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(algo, name) <= 1:
            yield Problem(f"algo.{name}", f"must be in [0, 1], got {getattr(algo, name)}")
    if cfg.critic.gae_lambda is not None and not 0 <= cfg.critic.gae_lambda <= 1:
        yield Problem("critic.gae_lambda", f"must be in [0, 1], got {cfg.critic.gae_lambda}; VC-PPO and VAPO have 1")
    if algo.loss != "cispo" and not 0 < algo.clip_low < 1:
        yield Problem("algo.clip_low", f"must be in (0, 1), got {algo.clip_low}; set e.g. 0.2")
    if algo.loss == "cispo" and not algo.clip_low > 0:
        yield Problem("algo.clip_low", f"must be more than 0, got {algo.clip_low}; 1 or more leaves small ratios alone")
    if not algo.clip_high > 0:
        yield Problem("algo.clip_high", f"must be more than 0, got {algo.clip_high}; set e.g. 0.2")
    if algo.dual_clip is not None and not algo.dual_clip > 1:
        yield Problem("algo.dual_clip", f"must be more than 1, got {algo.dual_clip}; set e.g. 3.0")
    if algo.reward_clip is not None and not algo.reward_clip[0] < algo.reward_clip[1]:
        yield Problem("algo.reward_clip", f"must be [lowest, highest], got {list(algo.reward_clip)}")
    if cfg.stats.limbs is not None and cfg.stats.limbs > MAX_LIMBS:
        yield Problem("stats.limbs", f"must be at most {MAX_LIMBS}, which carry a float64, got {cfg.stats.limbs}")
    if not cfg.stats.recentre and normalises(algo, cfg.stats) and algo.estimator not in NEED_GROUPS:
        message = f"false divides values that algo.estimator {algo.estimator} does not centre by their deviation"
        yield Problem("stats.recentre", f"{message}, 1e4 times too much where all scores of a batch are equal; set true")
    if algo.kl_target is not None and (algo.kl_reward_coef > 0) == (algo.kl_loss_coef > 0):
        got = f"{algo.kl_reward_coef} and {algo.kl_loss_coef}"
        yield Problem("algo.kl_target", f"moves the one of algo.kl_reward_coef and algo.kl_loss_coef that is not 0, got {got}")


def normalises(algo: Algo, stats: Stats) -> bool:
    """Whether advantages are whitened over the global batch."""
    return {"auto": algo.estimator in NORMALISED, "on": True, "off": False}[stats.normalise]


def _groups(cfg: Config) -> Iterator[Problem]:
    estimator, samples = cfg.algo.estimator, cfg.rollout.samples_per_prompt
    if estimator in NEED_GROUPS and samples == 1:
        message = f"algo.estimator {estimator} compares the responses to a prompt, which leaves nothing of a single one"
        yield Problem("rollout.samples_per_prompt", f"{message}; set at least 2, or algo.estimator: reinforce_pp")
    if cfg.rollout.keep_groups == "informative" and samples == 1 and estimator != "remax":
        yield Problem("rollout.keep_groups", "a prompt with one response never has differing scores; raise rollout.samples_per_prompt")


def _truncation(cfg: Config) -> Iterator[Problem]:
    reward = cfg.reward
    if not 0 <= reward.overlong_frac < 1:
        yield Problem("reward.overlong_frac", f"must be in [0, 1), got {reward.overlong_frac}; DAPO has 0.2")
    if reward.truncated_coef is not None and not 0 <= reward.truncated_coef <= 1:
        yield Problem("reward.truncated_coef", f"must be in [0, 1], got {reward.truncated_coef}")
    if reward.truncated_coef is not None and reward.truncated_score is not None:
        yield Problem("reward.truncated_score", "replaces what reward.truncated_coef would multiply; set one of them")


def _models(cfg: Config) -> Iterator[Problem]:
    algo, megatron = cfg.algo, cfg.model.megatron
    if algo.estimator == "gae" and cfg.model.megatron_checkpoint is not None and cfg.critic.hf is None:
        yield Problem("critic.hf", "model.megatron_checkpoint has no weights for a critic; set the HF directory that it starts from")
    if algo.estimator == "gae" and cfg.critic.warmup_steps >= cfg.run.steps:
        yield Problem("critic.warmup_steps", f"leaves the policy none of the {cfg.run.steps} steps, got {cfg.critic.warmup_steps}")
    cut = cfg.parallel.tp * cfg.parallel.cp
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if megatron.get(name) and algo.aggregate != "token_mean":
            message = "Megatron scales it by tokens, and the loss is divided by responses"
            yield Problem(f"model.megatron.{name}", f"{message} (algo.aggregate {algo.aggregate}); set 0, or algo.aggregate: token_mean")
        elif megatron.get(name) and cut > 1:
            message = f"megatron-core makes it tp x cp = {cut} times too small where these cut a sequence (NVIDIA/Megatron-LM#1652)"
            yield Problem(f"model.megatron.{name}", f"{message}; set 0, or parallel.tp and parallel.cp: 1")
    if "+" in str(megatron.get("cp_comm_type", "")):
        yield Problem("model.megatron.cp_comm_type", f"needs groups that are not made here, got {megatron['cp_comm_type']}; set p2p")


def effect_problems(cfg: Config) -> Iterator[Problem]:
    """Settings that nothing would read."""
    algo, stats, plain = cfg.algo, cfg.stats, Algo()
    if algo.estimator != "gae" and cfg.critic != Critic():
        yield Problem("critic", f"is there for algo.estimator gae only, got {algo.estimator}")
    if algo.estimator != "gae" and (algo.gae_lambda != 1.0 or algo.gae_length_alpha is not None):
        yield Problem("algo.gae_lambda", f"and gae_length_alpha are there for algo.estimator gae only, got {algo.estimator}")
    if algo.gae_length_alpha is not None and algo.gae_lambda != 1.0:
        yield Problem("algo.gae_length_alpha", "takes the place of algo.gae_lambda; set one of them")
    if algo.estimator != "grpo" and (algo.grpo_std, algo.grpo_std_unbiased, algo.grpo_std_eps) != ("group", True, 1e-6):
        yield Problem("algo.grpo_std", f"and its settings are there for algo.estimator grpo only, got {algo.estimator}")
    if algo.dual_clip is not None and algo.loss != "ppo_clip":
        yield Problem("algo.dual_clip", f"bounds the ratio of algo.loss ppo_clip only, got {algo.loss}")
    if algo.loss == "reinforce" and (algo.clip_low, algo.clip_high) != (plain.clip_low, plain.clip_high):
        yield Problem("algo.clip_low", "and clip_high bound a ratio, which algo.loss reinforce has none of")
    if algo.aggregate_tokens is not None and algo.aggregate != "constant_length":
        yield Problem("algo.aggregate_tokens", f"is the length of algo.aggregate constant_length, got {algo.aggregate}")
    if algo.kl_loss != plain.kl_loss and algo.kl_loss_coef == 0:
        yield Problem("algo.kl_loss", "has no effect while algo.kl_loss_coef is 0")
    if algo.kl_reward != plain.kl_reward and algo.kl_reward_coef == 0:
        yield Problem("algo.kl_reward", "has no effect while algo.kl_reward_coef is 0")
    if algo.kl_horizon != plain.kl_horizon and algo.kl_target is None:
        yield Problem("algo.kl_horizon", "has no effect without algo.kl_target")
    if cfg.reward.overlong_penalty != 1.0 and cfg.reward.overlong_frac == 0:
        yield Problem("reward.overlong_penalty", "has no effect while reward.overlong_frac is 0")
    if cfg.rollout.max_refills != 3 and cfg.rollout.keep_groups == "all":
        yield Problem("rollout.max_refills", "has no effect with rollout.keep_groups: all")
    if not normalises(algo, stats):
        reason = f"stats.normalise {stats.normalise} with algo.estimator {algo.estimator} leaves advantages as they are"
        for name in ("population", "scope", "recentre"):
            if getattr(stats, name) != getattr(Stats(), name):
                yield Problem(f"stats.{name}", f"has no effect: {reason}")
    if stats.limbs is not None and stats.wire != "fp8":
        yield Problem("stats.limbs", f"counts the FP8 numbers of stats.wire fp8, got {stats.wire}")
    if stats.scope == "domain" and cfg.data.domain_key is None:
        yield Problem("stats.scope", "domain needs data.domain_key to tell one from another")
    yield from correction_effects(cfg.correction)
    if cfg.model.ref is not None and algo.kl_reward_coef == algo.kl_loss_coef == 0:
        yield Problem("model.ref", "has no effect while algo.kl_reward_coef and algo.kl_loss_coef are 0")
