"""Our decode attention against SGLang's own, in a process of its own: importing sglang here would change this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROGRAM = """
import json, types
import megatron_rpp_patches
megatron_rpp_patches.apply("sglang")
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from megatron_rpp.rollout import cpu_attention
cpu_attention.register()
runner = types.SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
ours, theirs = ATTENTION_BACKENDS["torch_native"](runner), TorchNativeAttnBackend(runner)
generator = torch.Generator().manual_seed(0)
result = {"type": type(ours).__name__, "gaps": [], "rows": []}
result["latent"] = AttentionBackendRegistry.get_handler("torch_native")(None, None).name  # whatever the batch
for heads, kv_heads, dim, value_dim in ((4, 2, 16, 16), (4, 4, 8, 8), (6, 1, 32, 32), (4, 1, 40, 32)):
    batch, slots, positions = 40, 9000, 200
    keys, values = (torch.randn(slots, kv_heads, dim, generator=generator) for _ in range(2))
    cache = [keys, values if value_dim == dim else keys[..., :value_dim]]  # latent attention: values are a part of the keys
    table = torch.randperm(slots, generator=generator)[: 44 * positions].view(44, positions).to(torch.int32)
    who = torch.randperm(44, generator=generator)[:batch]
    lengths = torch.cat([torch.tensor([1, 63, 64, 65, 128, 129, 200]), torch.randint(1, 201, (batch - 7,), generator=generator)])
    query = torch.randn(batch, heads, dim, generator=generator)
    def attend(backend, rows):
        out = torch.full((len(rows), heads, value_dim), float("nan"))
        named = dict(scaling=dim**-0.5, enable_gqa=heads != kv_heads, causal=False)
        return backend._run_sdpa_forward_decode(query[rows], out, *cache, table, who[rows], lengths[rows], **named)
    everyone = torch.arange(batch)
    whole = attend(ours, everyone)
    result["gaps"].append((whole - attend(theirs, everyone)).abs().max().item())
    for rows in ([0], [6, 5], list(range(39, 20, -1)), list(range(0, 40, 3))):
        result["rows"].append(torch.equal(attend(ours, torch.tensor(rows)), whole[rows]))
print(json.dumps(result))
"""


def test_decode_attention_is_sglangs_and_a_row_does_not_depend_on_the_others() -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as the engine's workers have it
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["type"] == "BatchedDecodeBackend"
    assert result["latent"] == "MLA", "torch_native takes the latents in its cache for keys"
    assert len(result["gaps"]) == 4
    assert max(result["gaps"]) < 2e-6
    assert all(result["rows"])
