"""The doctor's judgements on hosts that this one is not."""

from __future__ import annotations

import json

import pytest

from megatron_rpp import doctor

GIB = doctor.GIB


def status_of(*findings: doctor.Finding) -> list[str]:
    return [finding.status for finding in findings]


def test_a_package_must_be_there_in_the_tested_version() -> None:
    installed = {"torch": "2.13.0", "sglang": "0.5.20", "psutil": "7.2.2", "rich": "13.9"}
    pins = {"torch": "==2.13.0", "sglang": "==0.5.21", "psutil": ">=7", "rich": ">=14", "transformers": "==5.12.1"}
    findings = list(doctor.check_packages(pins, installed.get))
    assert status_of(*findings) == ["ok", "FAIL", "ok", "FAIL", "FAIL"]
    assert findings[1].text == "0.5.20, tested with ==0.5.21"
    assert "pip install 'sglang==0.5.21'" in findings[1].remedy
    assert findings[4].text == "not installed, ==5.12.1 is needed"


def test_the_pins_are_those_of_the_package() -> None:
    pins = doctor._pins()
    assert pins["torch"] == "==2.13.0"
    assert pins["megatron-core"] == "==0.16.1"
    assert "pytest" not in pins
    assert "transformer-engine" not in pins


def test_ten_is_above_nine_in_a_version() -> None:
    assert status_of(*doctor.check_packages({"x": ">=9.2"}, lambda name: "10.0.1rc1")) == ["ok"]


@pytest.mark.parametrize(
    ("version", "has_gpu", "status"), [(None, False, "ok"), ("2.10", False, "FAIL"), (None, True, "FAIL"), ("2.10", True, "ok")]
)
def test_transformer_engine_belongs_on_hosts_with_a_gpu_and_only_there(version: str | None, has_gpu: bool, status: str) -> None:
    assert doctor.check_transformer_engine(version, has_gpu=has_gpu).status == status


@pytest.mark.parametrize(
    ("version", "has_kernels", "has_gpu", "status"),
    [
        (None, False, False, "ok"),
        (None, False, True, "warn"),
        ("0.1", True, True, "ok"),
        ("0.9.10", False, True, "warn"),
        ("0.9.10", False, False, "warn"),
    ],
)
def test_apex_may_be_absent_but_must_not_be_the_wrong_one(version: str | None, has_kernels: bool, has_gpu: bool, status: str) -> None:
    assert doctor.check_apex(version, has_kernels=has_kernels, has_gpu=has_gpu).status == status


def test_an_unregistered_plugin_is_a_failure() -> None:
    assert status_of(doctor.check_plugin({"megatron_rpp", "other"}), doctor.check_plugin({"other"})) == ["ok", "FAIL"]


def test_small_hosts_are_warned_about() -> None:
    assert status_of(doctor.check_shared_memory(64 * 2**20), doctor.check_shared_memory(2 * GIB)) == ["warn", "ok"]
    assert status_of(doctor.check_memory(4 * GIB, num_cores=2), doctor.check_memory(24 * GIB, num_cores=2)) == ["warn", "ok"]
    assert status_of(doctor.check_open_files(1024), doctor.check_open_files(65536), doctor.check_open_files(-1)) == ["warn", "ok", "ok"]


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "FAIL"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "ok"), ((3, 14), "FAIL"), ((4, 0), "FAIL")]
)
def test_python_must_be_an_accepted_one(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    nothing = list(doctor.check_packages({"torch": "==1"}, lambda name: None))
    poor = [doctor.check_shared_memory(0), doctor.check_memory(0, num_cores=1), doctor.check_open_files(10), doctor.check_plugin(set())]
    for finding in [*nothing, *poor, doctor.check_python((3, 8)), doctor.check_transformer_engine("2", has_gpu=False)]:
        assert finding.remedy, finding
        assert f"-> {finding.remedy}" in str(finding)


@pytest.mark.slow
def test_this_host_is_fit_and_the_report_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert {finding["name"] for finding in report} >= {"python", "torch", "transformer-engine", "apex", "/dev/shm", "cuda", "patches"}
    failed = [finding for finding in report if finding["status"] == "FAIL"]
    assert (code, failed) == (0, [])
