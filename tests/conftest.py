"""Shared set-up: threads, no network, run-time shape checks, markers, the shared folder."""

import os

# Before torch is imported: the matrices of these tests are too small to gain from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Shapes and dtypes at these boundaries are checked in every test, at no cost outside of tests: a
# (b, 1) mask would otherwise broadcast and give a mean of ones that is 3. The hook must stand
# before anything imports the modules.
install_import_hook(["lora_rlhf.losses", "lora_rlhf.data.batches"], "beartype.beartype")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Derandomised: a red run is red again. No deadline: the machine may be shared.
settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")

SHARED = Path(__file__).resolve().parents[2] / "shared"
NO_SHARED = "needs the folder `shared` beside the checkout (real models and data)"
MARKERS = {
    "gpu": "needs a CUDA GPU; skipped without one",
    "slow": "takes more than ten seconds; runs with --slow",
    "shared": "needs the folder `shared` beside the checkout; skipped without it",
    "ui": "drives the app with Chromium; skipped without one",
}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
# Where this is set, the continuous integration installs them: nothing is skipped in silence.
REQUIRED = os.environ.get("LORA_RLHF_REQUIRE_SERVICES") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow."""
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, so that --strict-markers accepts them."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this call cannot run, saying why."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA GPU",
        "slow": None if config.getoption("--slow") else "slow; run with --slow",
        "shared": None if SHARED.is_dir() else NO_SHARED,
        "ui": None if CHROMIUM or REQUIRED else "needs Chromium on the PATH",
    }
    for item in items:
        for name, reason in missing.items():
            if reason is not None and item.get_closest_marker(name) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def shared() -> Path:
    """The folder `shared` beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(NO_SHARED)
    return SHARED
