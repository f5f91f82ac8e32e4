"""Time limits and numbers of processes: refused by name when they are read, in settings, flags and calls alike."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from megatron_rpp.config.load import load
from megatron_rpp.config.load_decode import setting_names
from megatron_rpp.config.ranges import MAX_SECONDS, MAX_WORKERS, check_range, flag_type, range_of
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError
from megatron_rpp.reward.pool import RewardPool
from tests.guards.source import python_files

TIME_LIMITS = [name for name in setting_names() if name.endswith("_s")]
SECONDS = "must be from 0.001 to 1209600 seconds (14 days), got "
WORKERS = "must be from 1 to 1024, got "
BAD_SECONDS = ["0", "-1", "-0.0", "1e-9", "-.inf", ".inf", ".nan", "1e400", "1e10", "1209600.5", "9" * 18]
NO_NUMBERS = {"ten": '"ten"', "true": "true", "[1]": "[1]", "null": "null", "'10'": '"10"'}


def refusal(project: Path, override: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(load(project, [override]))
    return [line.strip().removeprefix("command line").strip() for line in str(caught.value).splitlines()[1:]]


def test_these_are_the_time_limits() -> None:
    assert TIME_LIMITS == ["run.deadline_s", "reward.timeout_s", "rollout.start_deadline_s", "rollout.deadline_s"]


@pytest.mark.parametrize("name", TIME_LIMITS)
@pytest.mark.parametrize("text", BAD_SECONDS)
def test_a_time_limit_that_no_wait_can_have_is_refused_by_name(project: Path, name: str, text: str) -> None:
    (line,) = refusal(project, f"{name}={text}")
    assert line.startswith(f"{name}: {SECONDS}")


@pytest.mark.parametrize("name", TIME_LIMITS)
def test_a_time_limit_must_be_a_number(project: Path, name: str) -> None:
    for text, shown in NO_NUMBERS.items():
        assert refusal(project, f"{name}={text}") == [f"{name}: expected a number, got {shown}"]


@pytest.mark.parametrize("name", TIME_LIMITS)
def test_the_edges_of_a_time_limit_are_accepted(project: Path, name: str) -> None:
    for text in ("0.001", "1", str(MAX_SECONDS)):
        validate(load(project, [f"{name}={text}"]))


@pytest.mark.parametrize("text", ["0", "-1", "1025", "100000", "9" * 18])
def test_a_number_of_workers_that_no_host_runs_is_refused_by_name(project: Path, text: str) -> None:
    (line,) = refusal(project, f"reward.num_workers={text}")
    assert line.startswith(f"reward.num_workers: {WORKERS}")
    validate(load(project, [f"reward.num_workers={MAX_WORKERS}"]))


def test_every_number_of_any_size_gets_one_line(project: Path) -> None:
    """Huge integers in every setting that has a range: no exception but the one refusal."""
    config = load(project, [])
    for section in (spec.name for spec in fields(Config) if is_dataclass(getattr(config, spec.name))):
        for spec in fields(getattr(config, section)):
            if (allowed := range_of(f"{section}.{spec.name}")) is None:
                continue
            for value in (10**400, -(10**400), float("nan"), float("inf"), float("-inf"), True, "1", None):
                problem = allowed.problem(value)
                assert problem is None or (problem.startswith("must be ") and len(problem) < 120)
            assert allowed.problem(-(10**400)).startswith("must be ")
            assert allowed.problem(float("nan")).startswith("must be ")


FLAGS = {
    "--timeout-s": [(text, SECONDS) for text in ("0", "-1", "1e-9", "inf", "-inf", "nan", "1e10", "1e300", "1e400", "9" * 400)]
    + [(text, "must be a number, got ") for text in ("ten", "True", "", "1,5", "[1]")],
    "--num-workers": [(text, WORKERS) for text in ("0", "-1", "1025", "100000")]
    + [(text, "must be a whole number, got ") for text in ("1e9", "inf", "nan", "2.0", "two", "True", "", "9" * 5000)],
}


@pytest.mark.parametrize(("flag", "text", "message"), [(flag, *case) for flag, cases in FLAGS.items() for case in cases])
def test_a_flag_refuses_what_its_setting_refuses(flag: str, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_rpp.reward import score_file

    parser = argparse.ArgumentParser(prog="rpp score")
    score_file.add_arguments(parser)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--reward", "exact", "--input", "rows.jsonl", f"{flag}={text}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"rpp score: error: argument {flag}: {message}")
    assert len(error) < 200


@pytest.mark.parametrize("command", [["-m", "megatron_rpp", "score", "--reward=exact", "--input=x"], ["tools/check_rewards.py", "x"]])
@pytest.mark.parametrize("flag", ["--timeout-s=inf", "--num-workers=100000"])
def test_commands_and_tools_refuse_them_at_once(command: list[str], flag: str) -> None:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, *command, flag], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("Traceback")) == (2, "", 0)
    assert f"error: argument {flag.partition('=')[0]}: must be " in done.stderr.splitlines()[-1]
    assert time.monotonic() - begin < 30


def test_no_flag_for_a_time_limit_or_a_number_of_workers_is_left_without_a_range() -> None:
    """Whatever command or tool gets such a flag next: it must use flag_type."""
    plain = re.compile(r"add_argument\(\s*\"--[\w-]*(timeout-s|deadline-s|limit-s|workers)\"[^)]*type=(int|float)\b")
    files = python_files("megatron_rpp", "tools", "examples", "patches")
    assert [path.name for path in files if plain.search(path.read_text())] == []
    assert plain.search('parser.add_argument("--limit-s", type=float)')


POOLS = [((0.0, 1), "timeout_s"), ((float("inf"), 1), "timeout_s"), (("1", 1), "timeout_s"), ((1.0, 0), "num_workers")]


@pytest.mark.parametrize(("arguments", "name"), [*POOLS, ((1.0, 10**5), "num_workers")])
def test_a_pool_refuses_them_too(arguments: tuple[float, int], name: str) -> None:
    with pytest.raises(ConfigError, match=f"reward.{name}: must be "):
        RewardPool("exact", *arguments)
    with pytest.raises(ConfigError, match="start_timeout_s: must be "):
        RewardPool("exact", start_timeout_s=float("inf"))


def test_check_range_lets_the_edges_through() -> None:
    check_range("reward.timeout_s", MAX_SECONDS)
    check_range("reward.num_workers", MAX_WORKERS)
    assert flag_type("reward.timeout_s", float)("0.5") == 0.5
