"""Convert an HF directory to a Megatron checkpoint (torch_dist) of weights alone, for any layout.

    python tools/convert_hf_to_megatron.py HF OUT [--dtype D] [--overwrite] [--shard-gb GB]

The architecture is read from HF/config.json. Of a directory in block FP8 (quantization_config, weight_scale_inv) the checkpoint gets
weight * scale_inv, rounded once to the dtype of config.json, as DeepSeek's fp8_cast_bf16 makes it. Memory does not grow with the
model. A run that was cut off is gone on with by the same command. At the end every tensor is read again from OUT and compared with
HF to the bit; OUT exists only when all are equal.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from checkpoint_cli import add_options, bar, hf_model, options_of, report, run

from megatron_rpp.mcore.weights_header import weights_header
from megatron_rpp.weights.convert import to_megatron, total_bytes
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8_checkpoint import open_wide
from megatron_rpp.weights.tied_head import head_note


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("hf", type=Path, metavar="HF", help="directory with config.json and *.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; must not exist")
    add_options(parser)
    arguments = parser.parse_args()
    started = time.monotonic()
    with open_wide(arguments.hf) as source:
        header = weights_header(hf_model(arguments.hf))
        model = describe(source.config)
        options = options_of(arguments)
        with bar(total_bytes(source, model, options.dtype), "write", "compare") as tick:
            result = to_megatron(source, model, arguments.out, header=header, options=replace(options, tick=tick))
        head = head_note(source.entries, model)
    return report(result, arguments.out, time.monotonic() - started, head=head)


if __name__ == "__main__":
    sys.exit(run(main))
