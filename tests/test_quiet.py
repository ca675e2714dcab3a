"""Known noise of other libraries is silenced, and nothing beside it."""

import logging
import subprocess
import sys
import warnings

import pytest

from lora_rlhf.quiet import hush, hush_imports

LOADS = """
from lora_rlhf.quiet import hush_imports, hush
hush_imports()
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe import Base, Lora
hush()
backbone = Backbone.load(Base(model="builtin:tiny", device="cpu"))
backbone.adapters.add("sft", Lora())
"""


def test_a_backbone_and_an_adapter_come_up_without_a_word() -> None:
    """In a fresh interpreter, since most of it is said at the first import."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_other_warnings_of_the_same_libraries_still_come(caplog: pytest.LogCaptureFixture) -> None:
    hush()
    hush()
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "none")
    log.warning("something that matters")
    assert [r.message for r in caplog.records] == ["something that matters"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hush_imports()
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["`something_else` is deprecated"]


def test_short_loads_draw_no_bar_and_other_bars_are_left_alone() -> None:
    from lora_rlhf.quiet import _late_bar

    def made(*args: object, **options: object) -> dict[str, object]:
        return options

    assert _late_bar(made, (), {"desc": "Loading weights"})["delay"] > 0
    assert _late_bar(made, (), {"desc": "Downloading"}) == {"desc": "Downloading"}
