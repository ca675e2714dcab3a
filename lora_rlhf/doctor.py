"""`lora-rlhf doctor`: does this machine have what training needs, and what to do where it does not.

It asks nothing of the network. Heavy libraries are imported inside the checks, so that a broken
one is a finding rather than a traceback.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    import torch

_SHOWN_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
# NF4 stores normally distributed weights in blocks of 64 with a relative error near 0.092.
_NF4_ERROR = (0.08, 0.105)
_LITTLE_DISK_GIB, _NO_DISK_GIB = 20.0, 1.0
_LITTLE_MEMORY_GIB = 2.0
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        state: OK, WARN (training works, something is worse than it could be) or FAIL.
        name: what was looked at.
        found: what was found.
        advice: what to do; empty where there is nothing to do.
    """

    state: Literal["OK", "WARN", "FAIL"]
    name: str
    found: str
    advice: str = ""


def run_doctor(console: Console) -> bool:
    """Print one line a check with what to do; True unless one has failed."""
    healthy = True
    for check in CHECKS:
        for finding in check():
            healthy &= finding.state != "FAIL"
            style = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}[finding.state]
            line = Text.assemble((f"{finding.state:<5}", style), (f"{finding.name}: ", "bold"))
            console.print(line.append(finding.found), soft_wrap=True)
            if finding.advice:
                console.print(Text(f"     {finding.advice}", style=style), soft_wrap=True)
    return healthy


# -- software ------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """Which Python this is; one that is too old cannot install the package at all."""
    found = f"{platform.python_version()} at {sys.prefix}, {platform.system()}"
    yield Finding("OK", "Python", found)


def check_packages() -> Iterator[Finding]:
    """Installed versions against the ranges this package asks for."""
    try:
        wanted = [Requirement(text) for text in requires("lora-rlhf") or ()]
    except PackageNotFoundError:
        yield Finding("WARN", "lora-rlhf", "is not installed here", "Run `pip install -e .`.")
        return
    shown = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            advice = f"Run `pip install '{requirement}'`."
            yield Finding("FAIL", requirement.name, "is not installed", advice)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            advice = f"Run `pip install '{requirement}'`."
            yield Finding("FAIL", requirement.name, f"{found} is outside {requirement}", advice)
        elif requirement.name in _SHOWN_PACKAGES:
            shown.append(f"{requirement.name} {found}")
    if shown:
        yield Finding("OK", "packages", ", ".join(shown))


# -- the device ----------------------------------------------------------------------------------


def check_gpu() -> Iterator[Finding]:
    """The GPU torch sees, its memory, driver and bf16; or why there is none."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("FAIL", "torch", f"cannot be imported: {error}", "Install torch again.")
        return
    driver = _driver()
    if not torch.cuda.is_available():
        yield _no_gpu(driver, torch.version.cuda)
        return
    facts = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    found = (
        f"{facts.name}, compute capability {facts.major}.{facts.minor}, driver {driver or '?'}, "
        f"CUDA {torch.version.cuda}"
    )
    others = torch.cuda.device_count() - 1
    yield Finding("OK", "GPU", found + (f", and {others} more" if others else ""))
    memory = f"{free / _GIB:.1f} of {total / _GIB:.1f} GB free"
    if free < 0.85 * total:
        advice = "Close other programs that use the GPU; `nvidia-smi` lists them."
        yield Finding("WARN", "GPU memory", memory, advice)
    else:
        yield Finding("OK", "GPU memory", memory)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("OK", "bf16", "the GPU computes in bfloat16")
    else:
        advice = "Training falls back to fp32: slower, and activations take twice the memory."
        yield Finding("WARN", "bf16", "the GPU does not compute in bfloat16", advice)


def _no_gpu(driver: str, cuda: str | None) -> Finding:
    small = "The quickstart and bases up to about 100M parameters run on the CPU."
    if driver and cuda is None:
        advice = "Install a CUDA build of torch; the selector at pytorch.org gives the command."
        found = f"there is one (driver {driver}), but this torch was built without CUDA"
        return Finding("WARN", "GPU", found, advice)
    if driver:
        advice = f"Update the driver for CUDA {cuda}, or check CUDA_VISIBLE_DEVICES."
        return Finding("WARN", "GPU", f"torch cannot use it (driver {driver})", advice)
    return Finding("WARN", "GPU", "none; the CPU is used", small)


def _driver() -> str:
    """Version of the NVIDIA driver; "" without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def check_quantisation() -> Iterator[Finding]:
    """4-bit storage works, and its layer's gradient is right on every device."""
    try:
        import torch

        devices = [torch.device("cpu")]
        if torch.cuda.is_available():
            devices.insert(0, torch.device("cuda", 0))
        for device in devices:
            yield _nf4_error(device)
            yield _nf4_gradient(device)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        advice = "Install it again: `pip install --force-reinstall 'bitsandbytes>=0.50'`."
        yield Finding("FAIL", "4-bit", f"bitsandbytes does not work: {error}", advice)


def _nf4_error(device: "torch.device") -> Finding:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = float((dequantize_4bit(packed, state) - weight).norm() / weight.norm())
    name = f"4-bit on {device.type}"
    found = f"NF4 stores a random matrix with a relative error of {error:.3f}"
    if _NF4_ERROR[0] < error < _NF4_ERROR[1]:
        return Finding("OK", name, found)
    allowed = f"It must be between {_NF4_ERROR[0]} and {_NF4_ERROR[1]}. Reinstall bitsandbytes."
    return Finding("FAIL", name, found, allowed)


def _nf4_gradient(device: "torch.device") -> Finding:
    """The gradient through a 4-bit layer after a pass without gradients, against plain floats."""
    error, guarded = gradient_error(device)
    name = f"4-bit gradient on {device.type}"
    found = f"after a rollout it differs from plain floats by {error:.1e} (relative)"
    if device.type == "cpu" and guarded:
        found += "; the guard against AVX512-BF16 repacking is set"
    # bf16 products on a GPU round at 2^-8; on a CPU the layer computes in fp32.
    if error < (0.02 if device.type == "cuda" else 1e-5):
        return Finding("OK", name, found)
    advice = "Training would go wrong without a word. Update bitsandbytes; do not train with this."
    return Finding("FAIL", name, found, advice)


def gradient_error(device: "torch.device", guard: bool = True) -> tuple[float, bool]:
    """Relative error of the gradient through a 4-bit layer that has run without gradients before.

    Args:
        device: where.
        guard: set the project's guard first; without it, CPUs with AVX512-BF16 get it wrong.

    Returns:
        (error, whether the layer is guarded).
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from lora_rlhf.model.backbone import guard_cpu_kernels

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = Linear4bit(256, 128, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    if guard:
        guard_cpu_kernels(layer)
    state = layer.weight.quant_state  # type: ignore[attr-defined]
    plain = dequantize_4bit(layer.weight.data, state).float()
    inputs = torch.randn(64, 256, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(64, 128, device=device, dtype=dtype)
    layer.eval()
    with torch.no_grad():
        layer(inputs.detach())
    layer.train()
    output = layer(inputs)
    if output.requires_grad:
        output.backward(upstream)
    expected = upstream.float() @ plain
    gradient = torch.zeros_like(expected) if inputs.grad is None else inputs.grad.float()
    error = float((gradient - expected).norm() / expected.norm())
    return error, not getattr(layer, "support_avx512bf16_for_cpu", False)


# -- the machine ---------------------------------------------------------------------------------


def check_machine() -> Iterator[Finding]:
    """Threads, memory, and disk where runs and downloaded models go."""
    from lora_rlhf.model.memory import machine_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    found = f"{cores} CPU cores, OMP_NUM_THREADS {threads or 'not set'}"
    if threads.isdigit() and int(threads) > (cores or 1):
        yield Finding("WARN", "threads", found, f"Set OMP_NUM_THREADS={cores} or unset it.")
    else:
        yield Finding("OK", "threads", found)
    memory = machine_memory() / _GIB
    if memory < _LITTLE_MEMORY_GIB:
        advice = "The quickstart needs about 2 GB; close other programs."
        yield Finding("WARN", "memory", f"{memory:.1f} GB", advice)
    else:
        yield Finding("OK", "memory", f"{memory:.1f} GB")
    yield from check_disk()


def check_disk() -> Iterator[Finding]:
    """Free space where runs and downloaded models go."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = (("disk for runs", Path.cwd()), ("disk for models", Path(HF_HUB_CACHE)))
    for name, place in places:
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free / _GIB
        found = f"{free:.0f} GB free at {place}"
        if free < _NO_DISK_GIB:
            yield Finding("FAIL", name, found, "Make room: checkpoints cannot be written.")
        elif free < _LITTLE_DISK_GIB and name == "disk for models":
            advice = "An 8B model's download takes 16 GB. Make room, or point HF_HOME elsewhere."
            yield Finding("WARN", name, found, advice)
        else:
            yield Finding("OK", name, found)


def check_hub() -> Iterator[Finding]:
    """Whether the Hugging Face hub may be asked and a token is stored; asks nothing."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        advice = "Only models and data that are on this disk load. Unset HF_HUB_OFFLINE to change."
        yield Finding("WARN", "hub", "offline by HF_HUB_OFFLINE", advice)
    elif get_token():
        yield Finding("OK", "hub", "may be asked when a recipe names a hub id; a token is stored")
    else:
        found = "may be asked when a recipe names a hub id; no token (needed for gated models only)"
        yield Finding("OK", "hub", found, "For a gated model such as Llama: `hf auth login`.")


def check_telemetry() -> Iterator[Finding]:
    """Nothing is sent."""
    found = "none; trackers are off unless a recipe sets `tracker`"
    yield Finding("OK", "telemetry", found)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_gpu,
    check_quantisation,
    check_machine,
    check_hub,
    check_telemetry,
)
