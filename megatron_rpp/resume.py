"""The checkpoint protocol: everything a run needs to continue, written under a temporary name, then renamed once.

    checkpoints/step-000003/policy/      Megatron dist-checkpoint: weights, optimiser, scheduler, RNGs
    checkpoints/step-000003/critic/      the same of the critic, where there is one
    checkpoints/step-000003/state.json   step, prompt cursor, number of metric records
    checkpoints/.partial-step-000006/    a save that a crash interrupted: ignored, and removed by the next save

A directory under its final name is complete: the rename comes after every rank has finished writing.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.manifest import read_json_file

PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class RunState:
    """What is not in the models' checkpoints. step: finished steps; prompts: the stream's cursor; kl_coef: of the next step."""

    step: int
    prompts: dict[str, Any]
    digest: str  # of the settings that the numbers depend on: a resume under others is refused
    kl_coef: float | None = None  # None where algo.kl_target does not move it


def step_dir(root: Path, step: int) -> Path:
    return root / f"{PREFIX}{step:06d}"


def partial_dir(root: Path, step: int) -> Path:
    return root / f".partial-{PREFIX}{step:06d}"


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(path.name.removeprefix(PREFIX)) for path in root.iterdir() if _is_checkpoint(path))


def stray_entries(root: Path) -> list[str]:
    """Names in the directory of checkpoints that are no checkpoint: a copy made by hand, a file. They are left alone."""
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if not _is_checkpoint(path) and not _is_partial(path))


def _is_checkpoint(path: Path) -> bool:
    """Whether it is a directory with a name that `step_dir` makes."""
    number = path.name.removeprefix(PREFIX)
    is_number = number.isascii() and number.isdigit()
    return is_number and path.name == step_dir(path.parent, int(number)).name and path.is_dir()


def _is_partial(path: Path) -> bool:
    return path.name.startswith(f".partial-{PREFIX}") and path.is_dir()


def begin_save(root: Path, step: int) -> Path:
    """An empty directory to write into; what an interrupted save left is removed. Rank 0 only. Raises: OSError.

    root: must exist, so that a run directory that was removed under the run does not come back.
    """
    for stale in root.glob(f".partial-{PREFIX}*"):
        if _is_partial(stale):
            shutil.rmtree(stale)
    target = partial_dir(root, step)
    target.mkdir()
    return target


def commit_save(root: Path, state: RunState, *, keep: int) -> Path:
    """Write the state, rename, and drop all but the newest `keep` checkpoints. Rank 0 only, after all ranks have written.

    Checkpoints of this step and later ones are those of a run that was given up with run.resume: never: they would pass for this
    one's newest, and `keep` would count them.
    """
    partial = partial_dir(root, state.step)
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    final = step_dir(root, state.step)
    for step in complete_steps(root):
        if step >= state.step:
            shutil.rmtree(step_dir(root, step))
    partial.rename(final)
    for step in complete_steps(root)[: -max(keep, 1)]:
        shutil.rmtree(step_dir(root, step))
    return final


def read_state(path: Path) -> RunState:
    """Raises: CheckpointError naming the file when it is missing, not JSON, has other keys, a value of another type, or another step."""
    file, fix = path / "state.json", f"remove {path} to continue from the one before"
    try:
        found = read_json_file(file)
    except CheckpointError as error:
        raise CheckpointError("the checkpoint's state cannot be read", where=str(file), got=error.got or error.what, fix=fix) from error
    wrong = "the file" if not isinstance(found, dict) else next((name for name in _KINDS if not _is_of_kind(name, found)), None)
    if wrong is not None or found.keys() - _KINDS.keys():
        expected = ", ".join(f"{name} ({what})" for name, (what, _) in _KINDS.items())
        got = f"{wrong}: {found.get(wrong)!a}"[:200] if isinstance(found, dict) and wrong else ascii(found)[:200]
        raise CheckpointError("the checkpoint's state is malformed", where=str(file), expected=expected, got=got, fix=fix)
    if path.name.startswith(PREFIX) and path != step_dir(path.parent, found["step"]):
        raise CheckpointError("the checkpoint is of another step than its directory", where=str(file), got=found["step"], fix=fix)
    return RunState(**found)


_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "step": ("a whole number", (int,)),
    "prompts": ("an object", (dict,)),
    "digest": ("text", (str,)),
    "kl_coef": ("a finite number or null", (int, float, NoneType)),
}


def _is_of_kind(name: str, found: dict[str, Any]) -> bool:
    value = found.get(name)
    is_number = isinstance(value, int | float)
    return type(value) in _KINDS[name][1] and not (is_number and not (math.isfinite(value) and value >= 0))


# Settings that a resumed run may change: they move no number of the steps to come.
FREE_SETTINGS = ("run.dir", "run.steps", "run.deadline_s", "run.resume", "run.device", "run.max_empty_steps")
FREE_SETTINGS += ("rollout.deadline_s", "rollout.start_deadline_s")
FREE_SETTINGS += ("parallel", "weights", "checkpoint", "eval", "observe", "sft")


def settings_digest(settings: dict[str, Any]) -> str:
    """A short digest of all settings but FREE_SETTINGS; equal digests mean that a resume continues the same experiment.

    settings: the configuration as nested plain values.
    """
    text = json.dumps(_binding(settings), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs of the settings that `settings_digest` looks at: "optim.lr: 1e-06, now 2e-06"."""
    old, new = _binding(before), _binding(after)
    pairs = [(f"{section}.{key}", old[section][key], value) for section, values in new.items() for key, value in values.items()]
    return [f"{name}: {was}, now {now}" for name, was, now in pairs if str(was) != str(now)]


def _binding(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in FREE_SETTINGS}
        for section, values in settings.items()
        if section not in FREE_SETTINGS and isinstance(values, dict)  # a preset's name moves nothing: its settings do
    }


def drop_later(ledger: Path, newest: int) -> None:
    """Forget responses that the weights of steps after `newest` wrote: those will not be there again, to the bit.

    Step n is sampled with the weights of step n - 1, and evaluated with its own.
    """
    for kind, last in (("step", newest + 1), ("eval", newest)):
        for path in ledger.glob(f"*/{kind}-*"):
            number = path.name.removeprefix(f"{kind}-").split(".")[0]
            if number.isdigit() and int(number) > last:
                path.unlink()
