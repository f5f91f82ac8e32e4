"""The settings of a paper or recipe under one name: `preset: dapo` in the file, or `preset=dapo` on the command line.

A preset lies under whatever the user writes: a file that says `preset: dapo` and `algo: {clip_high: 0.3}` has DAPO's settings
but for that bound. It says nothing about sizes (prompts, samples, tokens, learning rate), which belong to the model and the
machine. `rpp check` prints what it says and what lies over it.
"""

from __future__ import annotations

from typing import Any, get_args

from megatron_rpp.config.schema import PresetName

Tree = dict[str, Any]

PRESETS: dict[PresetName, Tree] = {
    # arXiv 2501.03262 Eq. 4, 5: k1 in the reward, no group. The token mean is that of the authors' code; Eq. 1 has one by response.
    # beta 0.001 is v1's Table 1 for mathematics; v9 prints none.
    "reinforce_pp": {"algo": {"estimator": "reinforce_pp", "kl_reward_coef": 1e-3, "kl_reward": "k1"}},
    # arXiv 2501.03262 Eq. 6 to 8: group mean, k2 as a loss. lambda is not printed there; 1e-5 is the authors' recipe (OpenRLHF).
    "reinforce_pp_baseline": {"algo": {"estimator": "reinforce_pp_baseline", "kl_loss_coef": 1e-5, "kl_loss": "k2_unbiased"}},
    # ProRL v2 (NVIDIA), as the recipes of OpenRLHF and NeMo-RL have it; 8 updates are OpenRLHF's (512 x 16 responses in 1024s), NeMo-RL
    # makes one. Both have k2 without the ratio, which is the same in the first of them.
    "prorl_v2": {
        "algo": {
            "estimator": "reinforce_pp_baseline",
            "kl_loss_coef": 1e-4,
            "kl_loss": "k2_unbiased",
            "clip_low": 0.2,
            "clip_high": 0.27,
            "minibatches": 8,
        },
        "correction": {
            "weight": "token",
            "weight_clip": None,
            "reject": "token",
            "reject_outside": (0.5, 5.0),
            "reject_mode": "zero",
        },
        "reward": {"truncated_coef": 0.0},
        "rollout": {"keep_groups": "informative"},
    },
    # arXiv 2503.14476: clip higher, token mean, dynamic sampling, a soft penalty over the last 4096 of 20480 tokens, no KL; 16 updates on
    # a roll-out (section 4.1), without which no ratio is ever clipped.
    "dapo": {
        "algo": {"estimator": "grpo", "clip_low": 0.2, "clip_high": 0.28, "aggregate": "token_mean", "minibatches": 16},
        "reward": {"overlong_frac": 0.2, "overlong_penalty": 1.0},
        "rollout": {"keep_groups": "informative"},
    },
    # arXiv 2402.03300 Eq. 3, 4: deviation of the group, k3 as a loss with beta 0.04, mean over responses of their means.
    "grpo": {"algo": {"estimator": "grpo", "kl_loss_coef": 0.04, "kl_loss": "k3", "aggregate": "seq_mean_token_mean"}},
    # arXiv 2503.20783 Eq. 3: no deviation, a constant length, no KL.
    "dr_grpo": {"algo": {"estimator": "dr_grpo", "aggregate": "constant_length"}},
    # arXiv 2402.14740: one action is the whole response: plain REINFORCE, KL inside the score before the baseline, sum over tokens.
    "rloo": {
        "algo": {
            "estimator": "rloo",
            "loss": "reinforce",
            "aggregate": "seq_mean_token_sum",
            "kl_reward_coef": 0.03,
            "kl_reward": "k1",
        },
    },
    # arXiv 2310.10505 Algorithm 2: the greedy response's score is the baseline; plain REINFORCE, a response's log-probability as a sum,
    # KL in the reward with 0.05, which is in the authors' scripts. Their code differs from the paper: each token pays its own KL alone,
    # gamma is 0.99, the mean is over tokens.
    "remax": {
        "algo": {
            "estimator": "remax",
            "loss": "reinforce",
            "aggregate": "seq_mean_token_sum",
            "kl_reward_coef": 0.05,
            "kl_reward": "k1",
        },
    },
    # arXiv 2507.18071 section 5.1: one ratio for a response, clipped within 3e-4 and 4e-4, four minibatches.
    "gspo": {
        "algo": {
            "estimator": "grpo",
            "loss": "gspo",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregate": "seq_mean_token_mean",
            "minibatches": 4,
        },
    },
    # arXiv 1707.06347 with the token-level KL in the reward of arXiv 1909.08593; gamma and lambda 1, as for one score at the end.
    "ppo": {"algo": {"estimator": "gae", "gamma": 1.0, "gae_lambda": 1.0, "kl_reward_coef": 1e-3, "kl_reward": "k1"}},
}
assert set(PRESETS) == set(get_args(PresetName))
