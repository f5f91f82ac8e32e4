from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster as slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    missing = slurm.install()
    if missing:
        pytest.skip(missing)
    # A short path: munge's socket name must fit the kernel's 108 characters.
    with tempfile.TemporaryDirectory(prefix="rpp-slurm-") as folder:
        Path(folder).chmod(0o755)
        with slurm.start(Path(folder)) as running:
            yield running
