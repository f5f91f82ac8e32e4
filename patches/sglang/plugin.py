"""The entry point of SGLang's plugin group `sglang.srt.plugins`: every SGLang process of this environment calls `register`.

SGLang logs a plugin that fails and goes on without it, so this is a way of delivery and no proof. The proof is
`megatron_rpp_patches.verify("sglang")`, which the roll-out server runs in each of its processes.
"""

from __future__ import annotations

from megatron_rpp_patches._core import apply


def register() -> None:
    """Apply the set here. A process that inherited it from the roll-out server has it already, and nothing happens."""
    apply("sglang")
