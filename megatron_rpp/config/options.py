"""The two blocks whose settings belong to a library: `model.megatron` (TransformerConfig) and `rollout.sglang` (ServerArgs).

Which settings there are, and of which type, stands in the library's source. It is read there as text: importing the libraries
takes ten seconds, and cannot be done on every machine on which `rpp check` should answer.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rpp.config.problems import Problem
from megatron_rpp.config.schema import Config, Scalar

Fields = dict[str, ast.expr]  # the name of each field, and its annotation

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "layernorm_epsilon")
_VARIANT = ("normalization", "gated_linear_unit", "activation_func", "add_bias_linear", "add_qkv_bias", "qk_layernorm")
_EXPERTS = (
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_enable_expert_bias", "multi_latent_attention"),
)
# Fields that have one home already: where to set them, or why not.
OWNED_MEGATRON = {
    "tensor_model_parallel_size": "set parallel.tp",
    "pipeline_model_parallel_size": "set parallel.pp",
    "virtual_pipeline_model_parallel_size": "set parallel.vpp",
    "context_parallel_size": "set parallel.cp",
    "expert_model_parallel_size": "set parallel.ep",
    "expert_tensor_parallel_size": "set parallel.etp",
    "sequence_parallel": "set parallel.sp",
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16"), "set model.dtype"),
    **dict.fromkeys((*_SIZES, *_VARIANT, *_EXPERTS), "it is what config.json in model.hf says"),
    "calculate_per_token_loss": "the loss is always a token sum over the tokens of the optimiser step",
    **dict.fromkeys(("hybrid_context_parallel", "hierarchical_context_parallel_sizes"), "parallel.cp cuts every sequence alike"),
    **dict.fromkeys(("mtp_num_layers", "mtp_loss_scaling_factor"), "layers for several tokens ahead are neither loaded nor trained"),
    "variable_seq_lengths": "packed micro-batches always differ in length",
}
OWNED_SGLANG = {
    "model_path": "set model.hf",
    "tp_size": "set rollout.tp",
    "device": "set run.device",
    "random_seed": "set run.seed",
    "max_running_requests": "set rollout.max_concurrent",
    "custom_weight_loader": "weights reach the engine through the loader of this project",
    "skip_tokenizer_init": "prompts and responses travel as token ids",
    **dict.fromkeys(("base_gpu_id", "gpu_id_step"), "an engine gets the GPUs of its ranks"),
    **dict.fromkeys(("nnodes", "node_rank", "dist_init_addr"), "an engine lives on one host"),
}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word", "None": "null"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a library declares its settings. parts: the name of the list of further classes that make up `cls`, if there is one."""

    library: str
    module: str
    cls: str
    parts: str = ""


MEGATRON = Source("megatron", "core.transformer.transformer_config", "TransformerConfig")
SGLANG = Source("sglang", "srt.server_args", "ServerArgs", "_INPUT_NAMESPACES")


def option_problems(cfg: Config) -> Iterator[Problem]:
    """Unknown names, names that other settings own, and values of the wrong type, in both blocks.

    Types other than int, float, bool, str and null are left to the library. Where it is not installed, or declares its settings
    in a way that is not understood here, so are all names and types: the run itself still reports them, only later.
    """
    yield from _block_problems("model.megatron", cfg.model.megatron, MEGATRON, OWNED_MEGATRON)
    yield from _block_problems("rollout.sglang", cfg.rollout.sglang, SGLANG, OWNED_SGLANG)


def _block_problems(block: str, given: Mapping[str, Scalar], source: Source, owned: Mapping[str, str]) -> Iterator[Problem]:
    known = declared_fields(source) if given else {}
    for name, value in given.items():
        expected = _plain_types(known[name]) if name in known else ()
        if name in owned:
            yield Problem(f"{block}.{name}", f"cannot be set here: {owned[name]}")
        elif known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {block}.{close[0]}?" if close else f"see {source.cls} in {source.library}.{source.module}"
            yield Problem(f"{block}.{name}", f"unknown setting; {hint}")
        elif expected and not _is_one_of(value, expected):
            words = " or ".join(_WORDS[kind] for kind in expected)
            yield Problem(f"{block}.{name}", f"expected {words}, got {json.dumps(value)}")


def declared_fields(source: Source) -> Fields:
    """All fields, those of base classes too; none when the source is not there or not understood."""
    try:
        spec = importlib.util.find_spec(source.library)  # of a top-level name: this runs nothing
        reader = _Reader(source, [Path(root) for root in (spec and spec.submodule_search_locations) or ()])
        return reader.fields_of(source.cls, _file_of(reader.roots, source.module))
    except (LookupError, OSError, SyntaxError, ValueError):
        return {}


@dataclass(frozen=True, slots=True)
class _Reader:
    source: Source
    roots: list[Path]  # folders of the library
    trees: dict[Path, ast.Module] = field(default_factory=dict)

    def fields_of(self, name: str, file: Path) -> Fields:
        """Fields of class `name` as `file` defines or imports it. Raises: LookupError when the name leads to no class of the library."""
        if file not in self.trees:
            self.trees[file] = ast.parse(file.read_text(encoding="utf-8"))
        tree = self.trees[file]
        cls = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
        if cls is None:
            return self.fields_of(*self._imported(name, tree, file))
        found: Fields = {}
        bases = [base.id for base in cls.bases if isinstance(base, ast.Name)]  # what is written module.Base is another library's
        for part in [*bases, *(_names_in_list(tree, self.source.parts) if name == self.source.cls else ())]:
            found |= self.fields_of(part, file)
        own = [node for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
        return found | {node.target.id: node.annotation for node in own if "ClassVar" not in ast.unparse(node.annotation)}

    def _imported(self, name: str, tree: ast.Module, file: Path) -> tuple[str, Path]:
        """What `name` is called where `file` imports it from, and that file."""
        for node in tree.body:
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                if name == (alias.asname or alias.name):
                    library, _, module = (node.module or "").partition(".")
                    if node.level:
                        return alias.name, _file_of([file.parents[node.level - 1]], node.module or "__init__")
                    return alias.name, _file_of(self.roots if library == self.source.library else [], module)
        raise LookupError(f"no class {name} in {file}")


def _file_of(roots: list[Path], module: str) -> Path:
    for root in roots:
        stem = root.joinpath(*module.split("."))
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file
    raise LookupError(f"no source of {module}")


def _names_in_list(tree: ast.Module, name: str) -> list[str]:
    """The names in the list that the module assigns to `name`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.List):
            return [element.id for element in node.value.elts if isinstance(element, ast.Name)]
    return []


def _plain_types(annotation: ast.expr) -> tuple[str, ...]:
    """The names of the plain types that an annotation allows, "None" among them; empty when it allows anything else."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="A" | "Annotated"), slice=ast.Tuple(elts=[inner, *_])):
            annotation = inner
    names = re.findall(r"\w+", ast.unparse(annotation).replace("Optional", "Union, None"))
    return tuple(kind for kind in _WORDS if kind in names) if {*names} <= {"Union", *_WORDS} else ()


def _is_one_of(value: Scalar, kinds: tuple[str, ...]) -> bool:
    name = "None" if value is None else type(value).__name__
    return name in kinds or (name == "int" and "float" in kinds)
