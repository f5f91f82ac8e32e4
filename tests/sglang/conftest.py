"""One engine for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.settings import EngineSettings
from tests.sglang import tiny

START_S = 600.0  # an idle machine needs 25


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def model(hf: Path) -> nn.Module:
    return tiny.load_model(hf)


@pytest.fixture(scope="session")
def start_engine(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Start an engine; it is closed with the session at the latest."""
    started: list[Engine] = []

    def start(**changes: Any) -> Engine:
        settings = EngineSettings(**{"hf": str(hf), "max_concurrent": 32, "max_sequence_tokens": 600, **changes})
        log = tmp_path_factory.mktemp("logs") / f"{settings.name}.log"
        started.append(Engine.start(settings, log=log, deadline_s=START_S, version=0))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@pytest.fixture(scope="session")
def shared_engine(start_engine: Callable[..., Engine]) -> Engine:
    return start_engine()


@pytest.fixture
def engine(shared_engine: Engine, model: nn.Module) -> Iterator[Engine]:
    """The shared engine, holding the weights of `hf` as version 0 before and after the test."""
    yield shared_engine
    if shared_engine.version != 0:
        tiny.publish(shared_engine, tiny.state(model), 0)
