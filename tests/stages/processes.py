"""Runs of the command line in processes of their own, that can be killed at a chosen moment.

A fork server imports torch once; every run is then a fresh process a moment later.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["lora_rlhf.pipeline", "lora_rlhf.cli", "datasets", "transformers.models.llama.modeling_llama"]
)


def _child(arguments: list[str], log: str) -> None:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    from lora_rlhf.cli import app
    from lora_rlhf.stages import rank

    torch.set_num_threads(1)
    rank._BLOCK = 8  # several blocks in a short run
    sys.argv = ["lora-rlhf", *arguments]
    app(arguments)


class Cli:
    """One `lora-rlhf ...` at work in a process group of its own."""

    def __init__(self, arguments: list[str], run: Path, log: Path) -> None:
        self.run = run
        self.process = _CONTEXT.Process(target=_child, args=(arguments, str(log)))
        self.process.start()

    def status(self) -> dict:
        """status.json, once it is this process that wrote it."""
        try:
            found = json.loads((self.run / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return found if found["pid"] == self.process.pid else {}

    def wait_until(self, reached: Callable[[], bool], seconds: float = 90.0) -> bool:
        """Whether the moment came before the process ended."""
        end = time.monotonic() + seconds
        while self.process.is_alive():
            if reached():
                return True
            assert time.monotonic() < end, f"never came to the moment: {self.status()}"
            time.sleep(0.002)
        return False

    def kill(self) -> None:
        """SIGKILL to the whole group; returns when it is gone."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def end(self) -> int:
        """Wait for the end; the exit status."""
        self.process.join(180)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode
