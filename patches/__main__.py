"""`python -m megatron_rpp_patches status | lock | table`."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable

from megatron_rpp_patches import set_names
from megatron_rpp_patches._core import all_patches
from megatron_rpp_patches._record import Patch, installed_version, lock_file, read_lock, version_matches
from megatron_rpp_patches._source import fingerprint

HEADING = """# Patches

Written by `python -m megatron_rpp_patches table > patches/README.md`; the fields are explained in `_record.py`.

A patch is the last resort, after a public setting, a subclass, or code at our own call site. It is applied only to a
source that somebody has read (`locks/`), it is inactive where it is not needed, and it has a test that fails without it.

- Another version of a library: widen `versions`, run `python -m megatron_rpp_patches lock`, read every source it names,
  mend what changed, commit the new lock.
- `python -m megatron_rpp_patches status` compares this machine with the locks.
- A necessity test that has turned red means that upstream has mended the fault: delete the patch.
"""
LOCK_HEADING = "# Written by `python -m megatron_rpp_patches lock`: sha256, first 12 digits, of each source as reviewed.\n"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _state(patch: Patch) -> str:
    version = installed_version(patch.library)
    if version is None:
        return "library not installed"
    if not version_matches(patch.versions, version):
        return f"{version} is outside {patch.versions}"
    if patch.locked is None:
        return "no source to lock"
    expected = (read_lock(patch.library, version) or {}).get(patch.locked)
    if expected is None:
        return f"no lock for {version}"
    got = fingerprint(patch.locked)
    return "source as reviewed" if got == expected else f"source changed: {expected} -> {got}"


def status() -> int:
    """Print the state of every patch; 1 when one is stale or past its date."""
    is_bad = False
    for patch in all_patches(set_names()):
        state, reason = _state(patch), patch.inactive()
        is_late = patch.expires < datetime.date.today()
        is_bad |= is_late or state not in ("source as reviewed", "no source to lock", "library not installed")
        need = "needed here" if reason is None else f"inactive: {reason}"
        _say(f"{patch.id:28} {state:24} {need}{'  EXPIRED' if is_late else ''}")
    return int(is_bad)


def lock() -> int:
    """Write the fingerprints of the installed sources, and print each one that is new or changed, to be read before it is committed."""
    patches = [patch for patch in all_patches(set_names()) if patch.locked]
    for library in sorted({patch.library for patch in patches}):
        version = installed_version(library)
        if version is None:
            _say(f"{library}: not installed, left alone")
            continue
        old = read_lock(library, version) or {}
        new = {name: fingerprint(name) for name in sorted({patch.locked for patch in patches if patch.library == library})}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                _say(f"{library} {version}: {name}: {old.get(name, 'new')} -> {new.get(name, 'gone')}")
        text = LOCK_HEADING + "".join(f'"{name}" = "{digest}"\n' for name, digest in new.items())
        lock_file(library, version).write_text(text, encoding="utf-8")
    return 0


def table() -> int:
    """Print patches/README.md."""
    _say(HEADING)
    _say("| id | target | kind | why | upstream | versions | remove when | expires |")
    _say("|---" * 8 + "|")
    for patch in all_patches(set_names()):
        library = f"{patch.library} {patch.versions}"
        cells = (patch.id, f"`{patch.target}`", patch.kind, patch.why, patch.upstream, library, patch.remove_when, str(patch.expires))
        _say("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return 0


COMMANDS: dict[str, Callable[[], int]] = {"status": status, "lock": lock, "table": table}


def main(args: list[str]) -> int:
    """Run one command."""
    if len(args) != 1 or args[0] not in COMMANDS:
        sys.stderr.write(f"usage: python -m megatron_rpp_patches {' | '.join(COMMANDS)}\n")
        return 2
    return COMMANDS[args[0]]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
