"""Rules for the whole suite: a test's folder is its tier and its marker, and `--tally FILE` counts for tests/run.sh."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

# How long an example takes says more about the host than about the code.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

TESTS = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tally", type=Path, help="write 'passed failed skipped' into this file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS in item.path.parents:
            item.add_marker(item.path.relative_to(TESTS).parts[0])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.tally is None:
        return
    count = {kind: len(reports) for kind, reports in terminalreporter.stats.items()}
    passed = count.get("passed", 0) + count.get("xfailed", 0)  # an xfail here is strict: the failure is what it asserts
    failed = count.get("failed", 0) + count.get("error", 0)
    config.option.tally.write_text(f"{passed} {failed} {count.get('skipped', 0)}\n")
