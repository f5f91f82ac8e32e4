"""Compare two checkpoints, each an HF directory or a Megatron checkpoint, tensor by tensor and bit by bit.

    python tools/verify_checkpoint.py A B [--hf HF] [--fp8]

Megatron checkpoints are compared as the HF tensors that they hold, so their layouts do not matter; optimizer state is left
aside. An HF directory in block FP8 is compared as the wide tensors that it stands for, two of them as they are; with --fp8 the side
that is not in FP8 is quantised, as convert_megatron_to_hf.py --fp8 does. Prints the first difference. Exit status 0 when all tensors
are equal, 1 when not, 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoint_cli import bar, open_saved, run

from megatron_rpp.display import printable
from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.listing import is_torch_dist
from megatron_rpp.weights.compare import Part, Source, compare
from megatron_rpp.weights.convert import CARRIED, model_part
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.families.registry import FAMILIES, describe
from megatron_rpp.weights.fp8_checkpoint import Quantised, fp8_part, open_wide, scales_of, wide_config
from megatron_rpp.weights.hf_io import open_hf, read_json
from megatron_rpp.weights.tied_head import HEAD, check_directory, head_note


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("a", type=Path, metavar="A", help="HF directory or Megatron checkpoint")
    parser.add_argument("b", type=Path, metavar="B", help="the other one")
    parser.add_argument("--hf", type=Path, help="directory with the config.json of Megatron checkpoints that carry none")
    parser.add_argument("--fp8", action="store_true", help="one side is in block FP8: quantise the other")
    arguments = parser.parse_args()
    folders = (arguments.a, arguments.b)
    started = time.monotonic()
    config = arguments.hf or next((found for folder in folders if (found := config_of(folder)) is not None), None)
    sides = open_in_fp8(folders, config) if arguments.fp8 else open_both(folders, config)
    total = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in sides[0].entries.values())
    with bar(total, "compare") as tick:
        difference = compare(*sides, tick=tick)
    if difference is not None:
        print(printable(f"{difference.tensor}: {difference.what} differs"))
        for folder, value in zip(folders, (difference.left, difference.right), strict=True):
            print(f"  {folder}: {value}")
        return 1
    for note in head_notes(folders, config, is_fp8=arguments.fp8):
        print(note)
    print(f"{total} bytes, {time.monotonic() - started:.1f} s")
    print(f"{len(sides[0].entries)} tensors compared, all equal")
    return 0


def config_of(folder: Path) -> Path | None:
    """Where the config.json of a checkpoint lies."""
    return next((place for place in (folder, folder / CARRIED) if (place / "config.json").is_file()), None)


def open_both(folders: Sequence[Path], config: Path | None) -> list[Source]:
    """Two HF directories with all that they hold, but for a head that only one of two tied models has; where one is Megatron's,
    both as the tensors of the model."""
    if any(is_torch_dist(folder) for folder in folders):
        return [open_model(folder, config) for folder in folders]
    are_in_fp8 = all(scales_of(read_json(folder / "config.json")) for folder in folders)
    sides = [open_hf(folder) if are_in_fp8 else open_wide(folder) for folder in folders]
    return without_head(sides, folders) if has_one_spare_head(folders) else sides


def has_one_spare_head(folders: Sequence[Path]) -> bool:
    """Whether the folders are two HF directories of tied models, and one of them alone holds a head."""
    if any(is_torch_dist(folder) for folder in folders):
        return False
    if sum(HEAD in open_hf(folder).entries for folder in folders) != 1:
        return False
    configs = [wide_config(read_json(folder / "config.json")) for folder in folders]
    return all(config.get("model_type") in FAMILIES and describe(config).dims.is_tied for config in configs)


def without_head(sides: Sequence[Source], folders: Sequence[Path]) -> list[Source]:
    """All tensors but the head. Raises: CheckpointError for a head that differs from the embedding."""
    for folder in folders:
        check_directory(folder)
    return [Part({name: entry for name, entry in side.entries.items() if name != HEAD}, side.read) for side in sides]


def open_model(folder: Path, config: Path | None) -> Source:
    """The tensors of the model, wide."""
    if is_torch_dist(folder):
        return open_saved(folder, config)[0]
    return model_part(open_wide(folder), describe_wide(config or folder))


def head_notes(folders: Sequence[Path], config: Path | None, *, is_fp8: bool) -> list[str]:
    """What became of the head of each HF directory; nothing where all tensors of two directories were compared, the head too."""
    is_left_out = is_fp8 or any(is_torch_dist(folder) for folder in folders) or has_one_spare_head(folders)
    if config is None or not is_left_out:
        return []
    model = describe_wide(config)
    directories = [folder for folder in folders if not is_torch_dist(folder)]
    return [f"{folder}: {head_note(open_hf(folder).entries, model)}" for folder in directories]


def describe_wide(folder: Path) -> Model:
    """The model of a directory's config.json, however its weights are stored."""
    return describe(wide_config(read_json(folder / "config.json")))


def open_in_fp8(folders: Sequence[Path], config: Path | None) -> list[Source]:
    """The tensors of the model in block FP8: as they are stored, or quantised with the other side's kind of scales."""
    kinds = [None if is_torch_dist(folder) else scales_of(read_json(folder / "config.json")) for folder in folders]
    scales = next((kind for kind in kinds if kind is not None), None)
    if scales is None or config is None:
        raise CheckpointError(
            "neither is in block FP8", where="--fp8", expected="a quantization_config in a config.json", fix="leave it out"
        )
    shapes = describe_wide(config).hf_shapes
    sides: list[Source] = []
    for folder, kind in zip(folders, kinds, strict=True):
        if kind is None:
            wide = open_model(folder, config)
            sides.append(Quantised(wide, shapes, {name: entry.dtype for name, entry in wide.entries.items()}, scales))
        else:
            check_directory(folder)
            sides.append(fp8_part(open_hf(folder), shapes))
    return sides


if __name__ == "__main__":
    sys.exit(run(main))
