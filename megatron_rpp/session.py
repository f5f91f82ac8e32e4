"""A training run with all its parts open, and what the loop need not show of each step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from megatron_rpp.algo.kl import adapted_coef
from megatron_rpp.algo.mismatch import Mismatch, mismatch, summarise
from megatron_rpp.collect import Collector
from megatron_rpp.config.schema import Algo, Config
from megatron_rpp.credit import Credit, Credited, truncation_warning
from megatron_rpp.dist.activity import doing
from megatron_rpp.dist.collectives import all_gather, barrier, gather_objects, sum_float64
from megatron_rpp.draw import Drawn, draw
from megatron_rpp.engines import Sampler, await_engines, open_engines, open_path, record_engines
from megatron_rpp.errors import NumericsError, StaleWeightsError
from megatron_rpp.heldout import evaluate, held_out_sampling
from megatron_rpp.inputs import Inputs, held_out_limit, many_truncated_warning, read_inputs
from megatron_rpp.mcore.critic import Critic
from megatron_rpp.mcore.policy import Policy
from megatron_rpp.observe.clock import StepClock
from megatron_rpp.observe.rollout import rollout_metrics
from megatron_rpp.placement import Colocated
from megatron_rpp.process import Process, open_critic, open_policy, open_process
from megatron_rpp.resume import RunState, begin_save, commit_save, drop_later, partial_dir, read_state, step_dir
from megatron_rpp.rollout.request import Sampling
from megatron_rpp.signals import take_warning
from megatron_rpp.types import Group, PackedBatch, Prompt, UpdateStats

# Healthy gaps are about 3e-7 in float32 and 1e-3 to 1e-2 in bfloat16; a wrong weight shows far above either.
DEFAULT_ALARM = {"float32": 1e-3, "bfloat16": 0.1}
# With the engine's matrices and their inputs in block FP8, whatever the rest is in: 0.01 to 0.05 in small models, 0.1 to 0.15 where
# others publish a KL of 0.006 to 0.011 (half of the mean square); with keys and values of one layer swapped, 0.6 and more.
FP8_ALARM = 0.3


@dataclass(frozen=True, slots=True)
class Models:
    """ref: None where no term of the loss or reward looks at it. critic: None but for estimator gae."""

    policy: Policy
    ref: Policy | None
    critic: Critic | None


@dataclass(frozen=True, slots=True)
class Improved:
    """What the optimiser steps of one step did. policy: None while only the critic is trained; critic: None without one."""

    policy: UpdateStats | None
    critic: UpdateStats | None


class Session:
    """Made by `Session.open`. Every method is called by every rank alike."""

    def __init__(self, process: Process, inputs: Inputs, sampler: Sampler, models: Models, place: Colocated) -> None:
        cfg = process.cfg
        self.cfg, self.process, self.groups, self.log = cfg, process, process.groups, process.log
        self.policy, self.ref, self.critic, self.place = models.policy, models.ref, models.critic, place
        self.credit = Credit(cfg, process.groups, deadline_s=process.deadline_s)
        if cfg.stats.wire == "fp8":
            self.log.say(f"        statistics: FP8 travels as {'float8_e4m3fn' if self.credit.sends_float8 else 'bytes'}")
        self.algo = first_algo(cfg)  # that of the next step: a KL coefficient may move
        self.clock = StepClock()
        self.dp_rank, self.dp_size = self.groups.coords.dp, self.groups.dp_size
        self._sampling = Sampling(
            max_tokens=cfg.rollout.max_response_tokens,
            temperature=cfg.rollout.temperature,
            top_p=cfg.rollout.top_p,
            stop_token_ids=inputs.codec.stop.ids,
        )
        self._collector = Collector(cfg, self.groups, sampler.rollouts, sampler.pool)
        self._codec, self._prompts, self._held_out = inputs.codec, inputs.train, inputs.held_out
        self._saved_step = -1
        self._empty_steps = 0  # the last ones, in a row, of which filtering left no token

    @classmethod
    @contextmanager
    def open(cls, cfg: Config) -> Iterator[Session]:
        """Everything a training run needs, the prompts read and the engines up. Raises: RppError, on every rank alike."""
        with open_process(cfg, "train") as process:
            inputs = read_inputs(process)  # first: a bad row must not cost the start of the engines
            longest = cfg.data.max_prompt_tokens + max(cfg.rollout.max_response_tokens, cfg.eval.max_response_tokens or 0)
            with open_engines(process, inputs.codec.decode, max_sequence_tokens=longest) as sampler:
                # The engines load while the policy is built.
                policy, live = open_policy(process)
                models = Models(policy, open_reference(process), open_critic(process) if cfg.algo.estimator == "gae" else None)
                path = open_path(process, live, sampler)
                place = Colocated(
                    [policy] if models.critic is None else [policy, models.critic],
                    sampler.engine,
                    path,
                    process.groups,
                    deadline_s=process.deadline_s,
                    start_deadline_s=cfg.rollout.start_deadline_s,
                    warn=process.log.warn,
                    on_restart=partial(record_engines, process, sampler),
                )
                session = cls(process, inputs, sampler, models, place)
                await_engines(process, sampler)
                yield session

    # -- the life of a run ------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Finished steps: 0, or those of the checkpoint that was just loaded.

        Raises: CheckpointError when the checkpoint cannot be read.
        """
        step, ledger = self.process.resumed_step, self.process.dir.path / "ledger"
        if self.process.is_first:
            if step == 0:  # what lies there was written by weights that nobody can vouch for
                shutil.rmtree(ledger, ignore_errors=True)
            drop_later(ledger, step)
        if step > 0:
            self._load(step)
        self.place.sleep()
        return step

    def _load(self, step: int) -> None:
        where = step_dir(self.process.dir.checkpoints, step)
        state = read_state(where)
        self.policy.load(where / "policy")
        if self.critic is not None:
            self.critic.load(where / "critic")
        if state.kl_coef is not None:
            self.algo = replace(self.algo, **{moving_coef(self.cfg.algo): state.kl_coef})
        self._prompts.load_state_dict(state.prompts)
        self._saved_step = step
        self.log.say(f"going on from step {step} ({where})")

    def is_asked_to_stop(self, step: int) -> bool:
        """Whether Slurm warned any rank of the time limit, since the run began. Collective, so that all stop after the same step."""
        flags = gather_objects(take_warning(), self.groups.world_cpu, name="asked to stop?", deadline_s=self.process.deadline_s)
        is_asked = any(flags)
        if is_asked:
            self.log.say(f"asked to stop after step {step}: saving, then ending")
        return is_asked

    def finish(self, step: int) -> None:
        """The last checkpoint and, after the last step, the last evaluation, where they have not been made.

        The checkpoint comes first: a run that was told to stop has little time, and one that goes on evaluates where it would have.
        """
        if step not in (self._saved_step, 0):
            self._save(step)
        if step == self.cfg.run.steps:
            self._evaluate_once(step)

    # -- one step ---------------------------------------------------------------------------------------------------

    def sample(self, step: int) -> Drawn:
        """Groups of the next prompts, sampled by the engines and scored; with dynamic sampling, until enough of them can teach."""
        rollout = self.cfg.rollout

        def collect(prompts: Sequence[Prompt], refill: int) -> tuple[Group, ...]:
            return self._collector.collect(
                prompts,
                step=step,
                version=self.place.version,
                num_samples=rollout.samples_per_prompt,
                sampling=self._sampling,
                with_greedy=self.cfg.algo.estimator == "remax",
                name=f"step-{step:06d}.{refill}" if refill else None,
                progress=partial(self.log.progress, f"step {step}" + (f", refill {refill}" if refill else "")),
            )

        drawn = draw(self._prompts, collect, rollout, least=self.cfg.algo.minibatches)
        if len(drawn.kept) < rollout.prompts_per_step:
            found = f"{len(drawn.kept)} of {rollout.prompts_per_step} prompts after {drawn.refills} refills"
            self.log.say(f"        step {step}: {found}; the scores differ in {drawn.informative_frac:.0%} of the sampled groups")
        if text := truncation_warning(drawn.kept, self.cfg.reward):
            self.log.warn(f"step {step}: {text}", once="truncated_coef")
        if text := many_truncated_warning(drawn.truncated_frac, "rollout.max_response_tokens", self._codec):
            self.log.warn(f"step {step}: {text}", once="many_truncated")
        return drawn

    def admit(self, groups: Sequence[Group], *, version: int) -> None:
        """Raises: StaleWeightsError for a response that other weights than `version` wrote."""
        for group in groups:
            for response in group.everything:
                if response.version != version:
                    raise StaleWeightsError(
                        "a response was written by other weights",
                        where=f"response {response.prompt_uid}/{response.sample}",
                        expected=f"version {version}",
                        got=f"version {response.version}",
                        fix="this is a defect of the roll-out: please report it with the ledger",
                    )

    def measure_mismatch(self, batch: PackedBatch, step: int) -> Mismatch:
        """|logp_old - logp_rollout| over all tokens of the step.

        Raises: NumericsError above observe.mismatch_alarm when observe.mismatch_action is stop; else it warns.
        """
        sums, largest = mismatch(batch.logp_old_T, batch.logp_rollout_T, batch.mask_T)
        everywhere = all_gather(largest, self.groups.dp, name="largest mismatch", deadline_s=self.process.deadline_s)
        seen = summarise(sum_float64(sums, self.groups.dp), torch.stack(everywhere).max())
        is_fp8 = self.cfg.rollout.dtype == "fp8_block"
        alarm = self.cfg.observe.mismatch_alarm or (FP8_ALARM if is_fp8 else DEFAULT_ALARM[self.cfg.model.dtype])
        if not seen.mean_abs <= alarm:
            found = NumericsError(
                "the training and the roll-out engine disagree about the same tokens",
                where=f"step {step}",
                expected=f"mean |logp_old - logp_rollout| <= {alarm:g} (observe.mismatch_alarm)",
                got=f"mean {seen.mean_abs:.3g}, max {seen.max_abs:.3g}, k3 {seen.k3:.3g}, ESS {seen.ess_frac:.3f}",
                fix="the weights in the engine are wrong, or its precision differs: compare with "
                + ("rollout.dtype model" if is_fp8 else "rollout.sglang.dtype float32"),
            )
            if self.cfg.observe.mismatch_action == "stop":
                raise found
            self.log.warn(str(found))
        return seen

    def improve(self, step: int, credit: Credited) -> Improved:
        """The optimiser steps on one roll-out: the critic's, where there is one, then the policy's.

        Raises: NumericsError, before anything is published or saved, when one is not finite.
        """
        cfg, algo = self.cfg, self.algo
        value = policy = None
        if self.critic is not None:
            value = self.critic.update(credit.batch, credit.return_T, minibatches=algo.minibatches, value_clip=cfg.critic.value_clip)
            _check_finite(value, f"step {step}, critic", "critic.lr")
        if self.critic is None or step > cfg.critic.warmup_steps:
            policy = self.policy.update(credit.batch, credit.adv_T, algo, temperature=cfg.rollout.temperature)
            _check_finite(policy, f"step {step}, policy", "optim.lr")
        num_skipped = algo.minibatches - (policy or value).num_minibatches
        self._empty_steps = self._empty_steps + 1 if num_skipped == algo.minibatches else 0
        if self._empty_steps:
            self.log.warn(
                f"step {step} is skipped: algo.filter_truncated or the correction leaves no token to learn from, so no "
                f"optimizer step is made; empty steps in a row: {self._empty_steps}, "
                f"the run stops at {cfg.run.max_empty_steps} (run.max_empty_steps)"
            )
        elif num_skipped:
            self.log.warn(
                f"step {step}: {num_skipped} of {algo.minibatches} minibatches have no token to learn from and make no optimiser step: "
                "algo.filter_truncated or the correction leaves nothing of them (policy/skipped_minibatches counts them)",
                once="skipped_minibatches",
            )
        return Improved(policy, value)

    def adapt_kl(self, drawn: Drawn, credit: Credited, update: Improved) -> None:
        """Move the KL coefficient towards algo.kl_target, by the divergence that it was paid for."""
        if self.cfg.algo.kl_target is None or update.policy is None or update.policy.num_minibatches == 0:
            return  # nothing was paid for
        name = moving_coef(self.cfg.algo)
        coef = adapted_coef(
            getattr(self.algo, name),
            kl=update.policy.kl_loss if name == "kl_loss_coef" else credit.metrics["adv/kl_reward"],
            target=self.cfg.algo.kl_target,
            num_samples=sum(len(group.responses) for group in drawn.kept),
            horizon=self.cfg.algo.kl_horizon,
        )
        self.algo = replace(self.algo, **{name: coef})

    def record(self, step: int, drawn: Drawn, credit: Credited, *, mismatch: Mismatch, update: Improved) -> None:
        """One record and one row."""
        values = rollout_metrics(drawn.sampled, drawn.kept) | credit.metrics
        values |= {f"mismatch/{name}": float(value) for name, value in asdict(mismatch).items() if name != "num_tokens"}
        if self.cfg.rollout.keep_groups == "informative":
            values |= {"draw/refills": drawn.refills, "draw/kept_groups": len(drawn.kept)}
        if self.cfg.algo.kl_target is not None:
            values["policy/kl_coef"] = getattr(self.algo, moving_coef(self.cfg.algo))
        if update.policy is not None:
            values |= {f"policy/{name}": getattr(update.policy, name) for name in ("loss", "policy_loss", "kl_loss", "grad_norm")}
            values |= {f"policy/{name}": value for name, value in update.policy.values.items()}
            values["policy/skipped_minibatches"] = self.algo.minibatches - update.policy.num_minibatches
        if update.critic is not None:
            values |= {f"critic/{name}": getattr(update.critic, name) for name in ("loss", "grad_norm")}
            values |= {f"critic/{name}": value for name, value in update.critic.values.items()}
        if self._empty_steps:
            values["batch/empty_steps"] = 1
        spent = self.clock.take()
        sampled_tokens = sum(len(response.tokens) for group in drawn.sampled for response in group.responses)
        spent["tokens_per_s"] = sampled_tokens / max(spent.get("rollout_s", 0.0), 1e-9)
        self.log.step(step, values, timing=spent)

    # -- evaluation and checkpoints ---------------------------------------------------------------------------------

    def evaluate_if_due(self, step: int) -> None:
        """Before the first step, and then every eval.every steps."""
        if step == 0 or (self.cfg.eval.every and step % self.cfg.eval.every == 0):
            self._evaluate_once(step)

    def _evaluate_once(self, step: int) -> None:
        is_done = gather_objects(self.log.has("eval", step), self.groups.world_cpu, name="evaluated?", deadline_s=self.process.deadline_s)
        if self._held_out is None or is_done[0]:
            return
        clock = StepClock()
        with self.place.rollout():
            result = evaluate(
                self._collector,
                self._held_out.prompts[: self.cfg.eval.max_prompts],
                version=self.place.version,
                sampling=held_out_sampling(self.cfg, self._codec.stop.ids),
                table=self.process.dir.path / "eval" / f"step-{step:06d}.jsonl",
                progress=partial(self.log.progress, f"evaluation at step {step}"),
            )
        if text := many_truncated_warning(result.truncated_frac, held_out_limit(self.cfg), self._codec):
            self.log.warn(f"evaluation at step {step}: {text}", once="many_truncated_eval")
        self.log.evaluation(step, result.as_metrics(), timing={"eval_s": clock.take()["step_s"]})
        self.clock.take()

    def save_if_due(self, step: int) -> None:
        """Every checkpoint.every steps, and before too many empty steps end the run. Raises: NumericsError in that case."""
        is_hopeless = self._empty_steps >= self.cfg.run.max_empty_steps
        if is_hopeless or (self.cfg.checkpoint.every and step % self.cfg.checkpoint.every == 0):
            self._save(step)
        if is_hopeless:
            raise NumericsError(
                f"too many steps in a row left no token to learn from; a checkpoint of step {step} is written",
                where=f"step {step}",
                expected=f"fewer than {self.cfg.run.max_empty_steps} empty steps in a row (run.max_empty_steps)",
                got=self._empty_steps,
                fix="raise rollout.max_response_tokens, set algo.filter_truncated: false, loosen correction.reject, or raise "
                "run.max_empty_steps",
            )

    def _save(self, step: int) -> None:
        """All ranks write under a temporary name; then rank 0 renames once. A crash in between costs nothing."""
        root, deadline_s = self.process.dir.checkpoints, self.process.deadline_s
        kl_coef = None if self.cfg.algo.kl_target is None else getattr(self.algo, moving_coef(self.cfg.algo))
        state = RunState(step=step, prompts=self._prompts.state_dict(), digest=self.process.digest, kl_coef=kl_coef)

        def begin() -> None:
            self.process.dir.check_held()
            begin_save(root, step)

        self.process.together("begin a checkpoint", begin, here=self.process.is_first)
        with doing("save"):
            self.policy.save(partial_dir(root, step) / "policy")
        if self.critic is not None:
            self.critic.save(partial_dir(root, step) / "critic")
        barrier(self.groups.world_cpu, name="all ranks have written the checkpoint", deadline_s=deadline_s)
        self.process.together(
            "finish a checkpoint", lambda: commit_save(root, state, keep=self.cfg.checkpoint.keep), here=self.process.is_first
        )
        self._saved_step = step


def open_reference(process: Process) -> Policy | None:
    """The frozen reference; None where no term of the loss or reward looks at it."""
    algo = process.cfg.algo
    if algo.kl_reward_coef == 0 and algo.kl_loss_coef == 0:
        return None
    return open_policy(process, trainable=False, hf=process.cfg.model.ref or process.cfg.model.hf)[0]


def _check_finite(update: UpdateStats, where: str, rate: str) -> None:
    if not update.is_finite:
        raise NumericsError(
            "the loss or its gradient is not finite; nothing of this step is published or saved",
            where=where,
            got=f"loss {update.loss}, gradient norm {update.grad_norm}",
            fix=f"lower {rate} or optim.clip_grad; the last checkpoint is whole",
        )


def first_algo(cfg: Config) -> Algo:
    """The settings of credit and loss with nothing left open."""
    tokens = cfg.algo.aggregate_tokens or cfg.rollout.max_response_tokens
    return replace(cfg.algo, aggregate_tokens=tokens if cfg.algo.aggregate == "constant_length" else None)


def moving_coef(algo: Algo) -> str:
    """Which coefficient algo.kl_target moves: the one that is not 0."""
    return "kl_reward_coef" if algo.kl_reward_coef > 0 else "kl_loss_coef"
