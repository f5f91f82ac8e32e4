"""Fixtures of the Megatron tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mcore import sparse, tiny


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
