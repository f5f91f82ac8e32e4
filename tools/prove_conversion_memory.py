"""Convert a model of some gigabytes there, back and to FP8 with little memory allowed, and print what each tool took.

    python tools/prove_conversion_memory.py FOLDER [--layers 7]

Makes in FOLDER a Llama of random weights (7 layers: 3.4 GB, the largest tensor 262 MB), then runs the checkpoint tools on it, each in a
process whose address space (ulimit -v) may not exceed 3 x the largest tensor + 1 GB, of which the interpreter and its modules take
0.65 GB. One JSON line a tool; exit status 1 when one fails. Needs 4 times the size of the model on disk and leaves nothing there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).parent
CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", rms_norm_eps=1e-5)
CONFIG |= dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000)
MAKE = """
import sys, torch
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.hf_io import read_json, save_hf
shapes = describe(read_json(__import__("pathlib").Path(sys.argv[2]) / "config.json")).hf_shapes
noise = torch.randn(32_000_003)
def tensor(number, shape):
    rows = -(-torch.Size(shape).numel() // noise.numel())
    return noise.roll(number * 1009).bfloat16().repeat(rows)[: torch.Size(shape).numel()].view(shape)
stream = ((name, tensor(number, shape)) for number, (name, shape) in enumerate(shapes.items()))
save_hf(sys.argv[1], stream, shapes=shapes, dtype=torch.bfloat16, source=sys.argv[2], shard_bytes=10**9)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a directory on a disk with room; must not exist")
    parser.add_argument("--layers", type=int, default=7)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    try:
        return prove(folder, arguments.layers)
    finally:
        shutil.rmtree(folder)


def prove(folder: Path, layers: int) -> int:
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    hf, there, back, fp8 = (folder / name for name in ("hf", "there", "back", "fp8"))
    subprocess.run([sys.executable, "-c", MAKE, str(hf), str(folder / "config")], env=environment(), check=True)
    largest = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    total = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
    limit = 3 * largest + 10**9
    print(json.dumps({"model_bytes": total, "largest_tensor_bytes": largest, "address_space_bytes": limit}), flush=True)
    commands = (
        ("convert_hf_to_megatron", hf, there, "--shard-gb", "1"),
        ("convert_megatron_to_hf", there, back, "--shard-gb", "1"),
        ("verify_checkpoint", hf, back),
        ("convert_megatron_to_hf", there, fp8, "--shard-gb", "1", "--fp8"),
        ("verify_checkpoint", there, fp8, "--fp8"),
    )
    return max(run(name, *map(str, rest), limit=limit) for name, *rest in commands)


def run(name: str, *arguments: str, limit: int) -> int:
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, str(TOOLS / f"{name}.py"), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    said = child.stdout.read()
    # The whole life of one child. Its peak begins with that of its parent, and this process is small.
    _, status, usage = os.wait4(child.pid, 0)
    row = {"tool": " ".join([name, *(word for word in arguments if word == "--fp8")]), "exit": os.waitstatus_to_exitcode(status)}
    row |= {"peak_rss_bytes": usage.ru_maxrss * 1024, "seconds": round(time.monotonic() - start, 1), "says": said.split("\n")[-2]}
    print(json.dumps(row), flush=True)
    return int(row["exit"] != 0)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main())
