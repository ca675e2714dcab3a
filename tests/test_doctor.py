"""The doctor on this machine, and on machines that are broken in one way each."""

import importlib
import io
import shutil
import socket
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_rlhf import doctor

Usage = namedtuple("Usage", "total used free")


def examined() -> tuple[bool, str]:
    out = io.StringIO()
    healthy = doctor.run_doctor(Console(file=out, width=80))
    return healthy, out.getvalue()


def only(check: Any) -> doctor.Finding:
    (finding,) = check()
    return finding


def test_this_machine_is_healthy_and_the_network_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    healthy, text = examined()
    assert healthy
    for name in (
        "Python",
        "packages",
        "GPU",
        "4-bit on cpu",
        "threads",
        "disk",
        "hub",
        "telemetry",
    ):
        assert name in text
    assert "FAIL" not in text


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    findings = [finding for check in doctor.CHECKS for finding in check()]
    assert all(f.advice for f in findings if f.state != "OK")


def test_the_cpu_gradient_check_sees_the_repacking_trap() -> None:
    """Unguarded, CPUs with AVX512-BF16 lose the whole gradient: a relative error of one."""
    guarded, is_guarded = doctor.gradient_error(torch.device("cpu"))
    assert is_guarded
    assert guarded < 1e-5
    from bitsandbytes.nn import Linear4bit

    if not getattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so that the trap is not there")
    unguarded, is_guarded = doctor.gradient_error(torch.device("cpu"), guard=False)
    assert not is_guarded
    assert unguarded > 0.5


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gradient_error", lambda device: (1.0, False))
    states = {f.name: f.state for f in doctor.check_quantisation()}
    assert states["4-bit gradient on cpu"] == "FAIL"


def test_storage_that_is_not_nf4_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = importlib.import_module("bitsandbytes.functional")
    real = functional.quantize_4bit

    def as_fp4(weight: torch.Tensor, **settings: Any) -> Any:
        return real(weight, **(settings | {"quant_type": "fp4"}))

    monkeypatch.setattr(functional, "quantize_4bit", as_fp4)
    states = {f.name: f.state for f in doctor.check_quantisation()}
    assert states["4-bit on cpu"] == "FAIL"


def test_a_broken_bitsandbytes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(importlib.import_module("bitsandbytes.functional"), "quantize_4bit", broken)
    healthy, text = examined()
    assert not healthy
    assert "no kernel for this device" in text


@pytest.mark.parametrize(
    ("requirement", "state"),
    [
        ("torch>=2.8", "OK"),
        ("torch<2", "FAIL"),
        ("no-such-package>=1", "FAIL"),
        ("no-such-package>=1; extra == 'dev'", None),
    ],
)
def test_versions_are_held_against_the_packages_own_ranges(
    monkeypatch: pytest.MonkeyPatch, requirement: str, state: str | None
) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: [requirement])
    assert [f.state for f in doctor.check_packages()] == ([state] if state else [])


@pytest.mark.parametrize(
    ("driver", "cuda", "advice"),
    [
        ("570.1", None, "CUDA build of torch"),
        ("570.1", "12.8", "Update the driver"),
        ("", None, "run on the CPU"),
    ],
)
def test_without_a_usable_gpu_the_reason_is_named(
    monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str | None, advice: str
) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    finding = only(doctor.check_gpu)
    assert finding.state == "WARN"
    assert advice in finding.advice


@pytest.mark.parametrize(("free", "states"), [(23.0, "OK OK WARN"), (12.0, "OK WARN WARN")])
def test_a_gpu_is_shown_with_its_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: float, states: str
) -> None:
    facts = SimpleNamespace(name="Test 4090", major=8, minor=9)
    gib = 2**30
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(free * gib), 24 * gib))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: False)
    findings = list(doctor.check_gpu())
    assert " ".join(f.state for f in findings) == states
    assert "Test 4090, compute capability 8.9, driver 570.1" in findings[0].found


@pytest.mark.parametrize(
    ("free", "states"), [(100.0, ["OK", "OK"]), (5.0, ["OK", "WARN"]), (0.5, ["FAIL", "FAIL"])]
)
def test_disk_space_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, free: float, states: list[str]
) -> None:
    usage = Usage(200 * 2**30, 0, int(free * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert [f.state for f in doctor.check_disk()] == states


def test_too_many_threads_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert next(doctor.check_machine()).state == "WARN"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert next(doctor.check_machine()).state == "OK"


@pytest.mark.parametrize(
    ("offline", "token", "words"),
    [(True, None, "offline"), (False, None, "no token"), (False, "hf_x", "a token is stored")],
)
def test_the_hub_is_described_without_asking_it(
    monkeypatch: pytest.MonkeyPatch, offline: bool, token: str | None, words: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    finding = only(doctor.check_hub)
    assert words in finding.found
    assert "hf_x" not in finding.found + finding.advice
