"""`rpp` where rank 1 reads prompt files that lack their last row, as a host with an older copy does."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from megatron_rpp import __main__, inputs
from megatron_rpp.config.schema import Data
from megatron_rpp.data.codec import Codec
from megatron_rpp.data.prompts import PromptSet, load_prompts


def load_older(cfg: Data, codec: Codec, *, path: Path) -> PromptSet:
    found = load_prompts(cfg, codec, path=path)
    return replace(found, prompts=found.prompts[:-1]) if os.environ["RANK"] == "1" else found


if __name__ == "__main__":
    inputs.load_prompts = load_older
    sys.exit(__main__.main())
