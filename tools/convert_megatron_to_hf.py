"""Convert the weights of a Megatron checkpoint (torch_dist, any layout) to an HF directory of sharded safetensors.

    python tools/convert_megatron_to_hf.py CHECKPOINT OUT [--hf HF] [--dtype D] [--fp8 [SCALES]] [--overwrite] [--shard-gb GB]

CHECKPOINT is what convert_hf_to_megatron.py wrote, or checkpoints/step-N/policy of a run; optimizer state is left aside. Config,
generation config and tokenizer come from --hf, or from the checkpoint where it carries them. --fp8 writes the matrices of
attention, MLPs and experts in E4M3 with a scale for every block of 128 x 128, in the format of DeepSeek-V3's checkpoints. Memory
does not grow with the model. A run that was cut off is gone on with by the same command. At the end every tensor is read again from
OUT and compared with CHECKPOINT, or what it quantises to, to the bit; OUT exists only when all are equal.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from checkpoint_cli import add_options, bar, open_saved, options_of, report, run

from megatron_rpp.weights.convert import to_hf, written_bytes
from megatron_rpp.weights.tied_head import head_note


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory with .metadata and *.distcp")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; must not exist")
    parser.add_argument("--hf", type=Path, help="directory with the model's config.json and tokenizer")
    scales = {"nargs": "?", "const": "float32", "choices": ("float32", "power_of_two")}
    parser.add_argument("--fp8", **scales, help="write block FP8; its scales are float32 numbers of any value (default) or powers of two")
    add_options(parser)
    arguments = parser.parse_args()
    started = time.monotonic()
    source, carried = open_saved(arguments.checkpoint, arguments.hf)
    with source:
        options = replace(options_of(arguments), fp8=arguments.fp8)
        with bar(written_bytes(source, source.model, options), "write", "compare") as tick:
            result = to_hf(source, arguments.out, carried=carried, options=replace(options, tick=tick))
    return report(result, arguments.out, time.monotonic() - started, head=head_note(source.entries, source.model))


if __name__ == "__main__":
    sys.exit(run(main))
