"""What every stage is handed: the recipe, the run, the backbone, and a way to speak."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from rich.console import Console

from lora_rlhf import display
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.memory import MemoryPlan
from lora_rlhf.recipe import Recipe
from lora_rlhf.runs import Run
from lora_rlhf.training.metrics import MetricLog
from lora_rlhf.training.optim import TokenBudget


@dataclass
class Session:
    """One pipeline in progress.

    Attributes:
        recipe: the whole recipe; a stage reads its own section, `data` and `lora`.
        run: the run directory.
        backbone: with the adapters made so far.
        console: where progress is drawn.
        budget: most tokens in a training forward.
        rollout_rows: most rows decoded at once.
        force: go on where a stage would ask for `--force`.
        tracker: of `start_tracker`.
    """

    recipe: Recipe
    run: Run
    backbone: Backbone
    console: Console
    budget: TokenBudget
    rollout_rows: int = 128
    force: bool = False
    tracker: Any = None
    _status_time: float = field(default=0.0, repr=False)

    @classmethod
    def planned(
        cls,
        recipe: Recipe,
        run: Run,
        backbone: Backbone,
        console: Console,
        memory: MemoryPlan,
        *,
        force: bool = False,
        tracker: Any = None,
    ) -> "Session":
        """A session with the micro-batches, rollout rows and checkpointing of a memory plan."""
        backbone.gradient_checkpointing = memory.gradient_checkpointing
        budget = TokenBudget(memory.micro_batch_tokens, lambda text: session.tell(text))
        rows = memory.rollout_rows
        session = cls(recipe, run, backbone, console, budget, rows, force, tracker)
        return session

    def tell(self, sentence: str) -> None:
        """Say something to the user, and keep it in train.log."""
        self.console.print(sentence)
        with (self.run.path / "train.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")

    def metrics(self, stage: str) -> MetricLog:
        """The metric log of a stage."""
        return MetricLog(self.run, stage, self.tracker)

    @contextmanager
    def steps(self, stage: str, start: int, total: int) -> Iterator["Steps"]:
        """A stage's loop: a live bar, status.json, and Ctrl-C held back to the end of a step."""
        self.run.set_status("running", stage, start, total)
        with display.progress(self.console, stage, total) as bar, _held_interrupt() as pressed:
            yield Steps(self, stage, total, bar, pressed)


@dataclass
class Steps:
    """Handed out by `Session.steps`."""

    session: Session
    stage: str
    total: int
    bar: Any
    pressed: list[int]

    @property
    def interrupted(self) -> bool:
        """Whether the user has pressed Ctrl-C; the loop saves a checkpoint, then calls `leave`."""
        return bool(self.pressed)

    def done(self, step: int, **shown: float) -> None:
        """Report that `step` steps are complete."""
        self.bar.update(step, **shown)
        now = time.monotonic()
        if now - self.session._status_time > 1.0 or step == self.total:
            self.session._status_time = now
            self.session.run.set_status("running", self.stage, step, self.total)

    def leave(self) -> None:
        """Raise the Ctrl-C that was held back."""
        raise KeyboardInterrupt


@contextmanager
def _held_interrupt() -> Iterator[list[int]]:
    """The first Ctrl-C is noted; a second one interrupts at once."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, which alone gets signals
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
