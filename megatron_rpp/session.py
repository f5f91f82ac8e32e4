"""A training run with all its parts open, and what the loop need not show of each step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from megatron_rpp.algo.advantage import AdvantageStats
from megatron_rpp.algo.baselines import Scores
from megatron_rpp.algo.mismatch import Mismatch, mismatch, summarise
from megatron_rpp.collect import Collector
from megatron_rpp.config.schema import Config
from megatron_rpp.data.prompts import PromptSet, PromptStream, load_prompts
from megatron_rpp.data.template import load_tokenizer
from megatron_rpp.dist.collectives import all_gather, barrier, gather_objects, sum_float64
from megatron_rpp.engines import Sampler, await_engines, open_engines, open_path, record_engines
from megatron_rpp.errors import CheckpointError, NumericsError, StaleWeightsError
from megatron_rpp.heldout import evaluate
from megatron_rpp.mcore.policy import Policy
from megatron_rpp.observe.rollout import rollout_metrics
from megatron_rpp.placement import Colocated
from megatron_rpp.process import Process, open_policy, open_process
from megatron_rpp.resume import RunState, begin_save, commit_save, drop_later, partial_dir, read_state, step_dir
from megatron_rpp.rollout.request import Sampling
from megatron_rpp.signals import take_warning
from megatron_rpp.stats.moments import whiten
from megatron_rpp.types import Group, PackedBatch, UpdateStats

# Healthy gaps are about 3e-7 in float32 and 1e-3 to 1e-2 in bfloat16; a wrong weight shows far above either.
DEFAULT_ALARM = {"float32": 1e-3, "bfloat16": 0.1}
# With the engine's matrices and their inputs in block FP8, whatever the rest is in: 0.01 to 0.05 in small models, 0.1 to 0.15 where
# others publish a KL of 0.006 to 0.011 (half of the mean square); with keys and values of one layer swapped, 0.6 and more.
FP8_ALARM = 0.3


@dataclass(slots=True)
class Clock:
    """Seconds of each phase of the step under way: `with clock("update"): ...`."""

    spent: dict[str, float] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            name = f"{phase}_s"
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - start

    def take(self) -> dict[str, float]:
        """The phases since the last call, and the whole as step_s."""
        now = time.monotonic()
        spent, self.spent = {**self.spent, "step_s": now - self._start}, {}
        self._start = now
        return spent


class Session:
    """Made by `Session.open`. Every method is called by every rank alike."""

    def __init__(self, process: Process, sampler: Sampler, policy: Policy, ref: Policy | None, place: Colocated) -> None:
        cfg = process.cfg
        self.cfg, self.process, self.groups, self.log = cfg, process, process.groups, process.log
        self.policy, self.ref, self.place = policy, ref, place
        self.clock = Clock()
        self.dp_rank, self.dp_size = self.groups.coords.dp, self.groups.dp_size
        self.normaliser = partial(whiten, group=self.groups.dp, deadline_s=process.deadline_s)
        self._sampling = Sampling(max_tokens=cfg.rollout.max_response_tokens, temperature=cfg.rollout.temperature, top_p=cfg.rollout.top_p)
        self._collector = Collector(cfg, self.groups, sampler.rollouts, sampler.pool)
        self._prompts: PromptStream | None = None
        self._held_out: PromptSet | None = None
        self._saved_step = -1

    @classmethod
    @contextmanager
    def open(cls, cfg: Config) -> Iterator[Session]:
        """Everything a training run needs, the engines up and the prompts read. Raises: RppError, on every rank alike."""
        with open_process(cfg, can_resume=True) as process:
            tokenizer = load_tokenizer(cfg.model.hf)
            longest = cfg.data.max_prompt_tokens + max(cfg.rollout.max_response_tokens, cfg.eval.max_response_tokens or 0)
            detokenise = partial(tokenizer.decode, skip_special_tokens=True)
            with open_engines(process, detokenise, max_sequence_tokens=longest) as sampler:
                # The engines load while the policy is built and the prompts are read.
                policy, live = open_policy(process)
                ref = open_reference(process)
                path = open_path(process, live, sampler)
                place = Colocated(
                    policy,
                    sampler.engine,
                    path,
                    process.groups,
                    deadline_s=process.deadline_s,
                    start_deadline_s=cfg.rollout.start_deadline_s,
                    warn=process.log.warn,
                    on_restart=partial(record_engines, process, sampler),
                )
                session = cls(process, sampler, policy, ref, place)
                session._read_prompts(tokenizer)
                await_engines(process, sampler)
                yield session

    def _read_prompts(self, tokenizer) -> None:
        data = self.cfg.data
        train = load_prompts(data, tokenizer)
        self._prompts = PromptStream(train.prompts, self.cfg.run.seed)
        self._held_out = load_prompts(data, tokenizer, path=data.eval) if data.eval is not None else None
        for prompts in (train, self._held_out):
            if prompts is not None and prompts.bad_rows:
                self.log.warn(f"{prompts.path}: {len(prompts.bad_rows)} rows left out, see bad_rows.jsonl (data.on_bad_row=skip)")
        bad = [row for prompts in (train, self._held_out) if prompts is not None for row in prompts.bad_rows]
        if bad and self.process.is_first:
            self.process.dir.write_json("bad_rows.json", [asdict(row) for row in bad])

    # -- the life of a run ------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Finished steps: 0, or those of the checkpoint that was just loaded.

        Raises: CheckpointError when the checkpoint belongs to another experiment or cannot be read.
        """
        step, ledger = self.process.resumed_step, self.process.dir.path / "ledger"
        if self.process.is_first:
            if step == 0:  # what lies there was written by weights that nobody can vouch for
                shutil.rmtree(ledger, ignore_errors=True)
            drop_later(ledger, step + 1)
        if step == 0:
            return 0
        where = step_dir(self.process.dir.checkpoints, step)
        state = read_state(where)
        if state.digest != self.process.digest:
            raise CheckpointError(
                "the checkpoint belongs to a run with other settings",
                where=str(where),
                expected=f"settings with digest {state.digest}",
                got=f"{self.process.digest} (config.yaml of this directory)",
                fix="restore the settings, choose another run.dir, or set run.resume: never",
            )
        self.policy.load(where / "policy")
        self._prompts.load_state_dict(state.prompts)
        self.log.say(f"going on from step {step} ({where})")
        return step

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

    def sample(self, step: int) -> tuple[Group, ...]:
        """Groups of the next prompts, sampled by the engines and scored."""
        rollout = self.cfg.rollout
        prompts = self._prompts.take(rollout.prompts_per_step)
        return self._collector.collect(
            prompts,
            step=step,
            version=self.place.version,
            num_samples=rollout.samples_per_prompt,
            sampling=self._sampling,
            progress=partial(self.log.progress, f"step {step}"),
        )

    def admit(self, groups: Sequence[Group], *, version: int) -> None:
        """Raises: StaleWeightsError for a response that other weights than `version` wrote."""
        for group in groups:
            for response in group.responses:
                if response.version != version:
                    raise StaleWeightsError(
                        "a response was written by other weights",
                        where=f"response {response.prompt_uid}/{response.sample}",
                        expected=f"version {version}",
                        got=f"version {response.version}",
                        fix="this is a defect of the roll-out: please report it with the ledger",
                    )

    def scores(self, groups: Sequence[Group]) -> Scores:
        """The scores of all responses of the step; a group's mean needs them wherever its responses are packed."""
        pairs = [(number, response.score) for number, group in enumerate(groups) for response in group.responses]
        return Scores(
            score_S=torch.tensor([score for _, score in pairs], dtype=torch.float64),
            group_S=torch.tensor([number for number, _ in pairs], dtype=torch.int64),
            prompt_uids=tuple(group.prompt.uid for group in groups),
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

    def check_finite(self, update: UpdateStats, step: int) -> None:
        """Raises: NumericsError before anything is published or saved, when the update was not finite."""
        if not update.is_finite:
            raise NumericsError(
                "the loss or its gradient is not finite; the weights of the step before are kept",
                where=f"step {step}",
                got=f"loss {update.loss}, gradient norm {update.grad_norm}",
                fix="lower optim.lr or optim.clip_grad; the last checkpoint is whole",
            )

    def record(self, step: int, groups: Sequence[Group], *, adv_stats: AdvantageStats, mismatch: Mismatch, update: UpdateStats) -> None:
        """One record and one row."""
        values = rollout_metrics(groups)
        values |= {f"adv/{name}": float(value) for name, value in asdict(adv_stats).items()}
        values |= {f"mismatch/{name}": float(value) for name, value in asdict(mismatch).items() if name != "num_tokens"}
        values |= {f"policy/{name}": getattr(update, name) for name in ("loss", "policy_loss", "kl_loss", "grad_norm")}
        values |= {f"policy/{name}": value for name, value in update.values.items()}
        spent = self.clock.take()
        spent["tokens_per_s"] = values["batch/response_tokens"] / max(spent.get("rollout_s", 0.0), 1e-9)
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
        clock = Clock()
        with self.place.rollout():
            result = evaluate(
                self._collector,
                self._held_out.prompts[: self.cfg.eval.max_prompts],
                version=self.place.version,
                sampling=Sampling(
                    max_tokens=self.cfg.eval.max_response_tokens or self.cfg.rollout.max_response_tokens,
                    temperature=self.cfg.eval.temperature,
                ),
                table=self.process.dir.path / "eval" / f"step-{step:06d}.jsonl",
                progress=partial(self.log.progress, f"evaluation at step {step}"),
            )
        self.log.evaluation(step, result.as_metrics(), timing={"eval_s": clock.take()["step_s"]})
        self.clock.take()

    def save_if_due(self, step: int) -> None:
        if self.cfg.checkpoint.every and step % self.cfg.checkpoint.every == 0:
            self._save(step)

    def _save(self, step: int) -> None:
        """All ranks write under a temporary name; then rank 0 renames once. A crash in between costs nothing."""
        root, deadline_s = self.process.dir.checkpoints, self.process.deadline_s
        state = RunState(step=step, prompts=self._prompts.state_dict(), digest=self.process.digest)
        self.process.together("begin a checkpoint", lambda: begin_save(root, step), here=self.process.is_first)
        self.policy.save(partial_dir(root, step) / "policy")
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
