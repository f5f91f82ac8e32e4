"""What transformers needs to import its text models beside a CPU build of torch: torchvision's schemas.

The trainer applies this set before it loads a tokenizer. SGLang's processes have the same patch in their own set.
"""

from __future__ import annotations

from megatron_rpp_patches.sglang import p100_torchvision_schemas

PATCHES = (p100_torchvision_schemas.PATCH,)
