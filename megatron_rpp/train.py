"""The loop. Every rank runs it; the numbered comments are the steps of the paper (REINFORCE++, arXiv 2501.03262)."""

from __future__ import annotations

from megatron_rpp.config.schema import Config
from megatron_rpp.data.packing import pack_groups
from megatron_rpp.session import Session


def train(cfg: Config) -> None:
    """Train `cfg.model.hf` for `cfg.run.steps` steps, or go on from the newest checkpoint of `cfg.run.dir`.

    Raises: RppError, on every rank alike, for whatever a user can act on.
    """
    with Session.open(cfg) as run:
        place, policy, ref, critic, clock = run.place, run.policy, run.ref, run.critic, run.clock
        step = run.restore()
        place.publish(version=step)
        run.evaluate_if_due(step)

        while step < cfg.run.steps and not run.is_asked_to_stop(step):
            step += 1

            # 1. Sample and score: answers are scored while others are still being written; a failed verifier is data.
            with place.rollout(), clock("rollout"):
                drawn = run.sample(step)

            # 2. Admit: every response was written by the weights of the step before this one.
            run.admit(drawn.sampled, version=step - 1)

            # 3. Pack: flat tokens, this dp rank's share, the same on all tp, cp and pp peers.
            batch = pack_groups(drawn.kept, run.dp_rank, run.dp_size, num_minibatches=cfg.algo.minibatches)

            with place.training():
                # 4. The four policies of one token: rollout (given), old (recomputed), ref (frozen), new (inside the loss).
                with clock("logp"):
                    old_T = policy.logprobs(batch, temperature=cfg.rollout.temperature)
                    ref_T = ref.logprobs(batch, temperature=cfg.rollout.temperature) if ref is not None else None
                    value_T = critic.values(batch) if critic is not None else None
                batch = batch.with_logp(old=old_T, ref=ref_T, value=value_T)
                mismatch = run.measure_mismatch(batch, step)

                # 5. Credit: whole responses, no parallelism visible; one statistic over the global batch.
                credit = run.credit.assign(batch, drawn.kept, run.algo)

                # 6. Improve: the policy's surrogate and KL loss, algo.minibatches optimiser steps; before it the critic's.
                with clock("update"):
                    update = run.improve(step, credit)

            # 7. Publish: every engine holds exactly these weights, stamped `step`, or the run stops.
            with clock("publish"):
                place.publish(version=step)

            # 8. Remember: the record first, then the checkpoint that counts it.
            run.record(step, drawn, credit, mismatch=mismatch, update=update)
            run.adapt_kl(drawn, credit, update)
            run.evaluate_if_due(step)
            run.save_if_due(step)

        run.finish(step)
