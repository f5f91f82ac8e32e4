"""Mutated config.json files of published models: bytes, and values of entries.

By hand, 600 cases: python -m tests.unit.hf.fuzz_config_json
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from megatron_rpp.hf.model import FAMILIES
from tests.unit.fuzz import QWEN, any_value, main, mutate_bytes

_EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "models").glob("*.json"))
_MODELS = [QWEN, *(json.loads(path.read_text()) for path in _EXAMPLES)]
_TOKENS = (
    *(b"\x00", b"\x1b[31m", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"\\ud800"', b'"\\u0000"', b'"\\u001b[2J"', b'"\\u202e"'),
    *(
        b"Infinity",
        b"-Infinity",
        b"NaN",
        b"1e999",
        b"-1e999",
        b"9" * 5000,
        b"9" * 400,
        b"0.0",
        b"-1",
        b"null",
        b"true",
        b"{}",
        b"[]",
        b'""',
    ),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"[" * 90 + b"]" * 90, b"[" * 900 + b"]" * 900, b",", b":", b"{", b"}", b'"', b"\\", b"/*x*/"),
    *(b'"hidden_size": 8, ', b'"model_type": "mixtral", ', b'"vocab_size": 1e3, ', b'"num_hidden_layers": 1000000000000000, '),
)
# Entries that a family reads, whether the file has them or not.
_ENTRIES = (
    *("model_type", "layer_types", "mlp_only_layers", "decoder_sparse_step", "num_experts", "num_local_experts", "n_routed_experts"),
    *(
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "partial_rotary_factor",
        "topk_method",
        "n_group",
        "topk_group",
        "quantization_config",
    ),
    *("eos_token_id", "head_dim", "sliding_window", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "q_lora_rank"),
    *("shared_expert_intermediate_size", "moe_intermediate_size", "num_experts_per_tok", "text_config", "attention_bias", "hidden_act"),
)


def mutate(chance: random.Random, folder: Path) -> list[str]:
    """Write config.json of one case; what follows `rpp check`."""
    config: dict[str, Any] = json.loads(json.dumps(chance.choice(_MODELS)))
    path = folder / "model" / "config.json"
    path.unlink(missing_ok=True)
    if chance.random() < 0.03:
        path.symlink_to(chance.choice(("/dev/zero", "../pipe", "config.json", "../model", "nowhere")))
        return ["run.yaml"]
    if chance.random() < 0.35:
        path.write_bytes(mutate_bytes(chance, json.dumps(config, indent=1).encode(), _TOKENS))
        return ["run.yaml"]
    for _ in range(chance.choice((1, 1, 2, 4))):
        _change(chance, config)
    path.write_text(json.dumps(config if chance.random() < 0.97 else any_value(chance)))
    return ["run.yaml"]


def _change(chance: random.Random, config: dict[str, Any]) -> None:
    place, name = config, chance.choice([*config, *_ENTRIES])
    if isinstance(config.get(name), dict) and config[name] and chance.random() < 0.7:  # an entry of rope_scaling
        place, name = config[name], chance.choice([*config[name], "rope_type", "factor", "original_max_position_embeddings"])
    match chance.randrange(6):
        case 0:
            place.pop(name, None)
        case 1:
            config["model_type"] = chance.choice([*FAMILIES])
        case 2 if isinstance(place.get(name), int | float):
            place[name] = place[name] * chance.choice((-1, 0, 2, 3, 0.5, 10**6, 10**12))
        case _:
            place[name] = any_value(chance)


if __name__ == "__main__":
    sys.exit(main(mutate, count=600))
