"""Fixtures of the Megatron tests."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.dist import ranks
from tests.mcore import sparse, tiny

# Two thirds of a rank's start are parts of torch that megatron-core loads and no patch concerns. The server that ranks are forked
# from loads them once. What megatron itself is made of stays out: each rank imports it under its own patches.
get_context("forkserver").set_forkserver_preload(
    [*ranks.PRELOADED, "sympy", "torch._dynamo", "torch.utils.tensorboard", "torch.distributed.checkpoint", "torch.utils.cpp_extension"]
)


@pytest.fixture(scope="session")
def hf_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny Hugging Face model of each kind, under its kind's name."""
    root = tmp_path_factory.mktemp("hf")
    for kind in tiny.KINDS:
        tiny.make_hf(root / kind, kind)
    return root


@pytest.fixture(scope="session")
def sparse_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for models with experts or latent attention."""
    root = tmp_path_factory.mktemp("sparse")
    for kind in sparse.MODELS:
        sparse.make_hf(root / kind, kind)
    return root
