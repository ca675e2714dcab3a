"""What the terminal shows: the stage table, live bars, results, samples and the memory plan.

Everything fits 80 columns. Imports no torch.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from lora_rlhf.results import Row, SamplePair, health_rows, result_rows, sample_pairs, verdict
from lora_rlhf.runs import Json, Run

if TYPE_CHECKING:
    from lora_rlhf.model.memory import MemoryPlan

_PLAIN_SECONDS = 10.0  # between two lines where there is no terminal to draw on
_TONES = {"good": "green", "even": "yellow", "bad": "red"}
_INTERVAL_CELLS = 20
_PLAN_CELLS = 40
_SHOWN_SAMPLES = 3


# -- before the start ----------------------------------------------------------------------------


@dataclass(frozen=True)
class StageRow:
    """One line of the table before the start.

    Attributes:
        stage: sft, rank, reward, ppo or evaluate.
        adapter: what it trains or makes; empty for a stage that trains nothing.
        origin: what that starts as, or what the stage reads.
        parameters: trainable; 0 for a stage that trains nothing.
        memory_gib: predicted peak; None where it is unknown.
        done: the stage is complete and will not run.
    """

    stage: str
    adapter: str = ""
    origin: str = ""
    parameters: int = 0
    memory_gib: float | None = None
    done: bool = False


def stage_table(console: Console, rows: Sequence[StageRow]) -> None:
    """Print what will run: stage, adapter, from where, trainable parameters, memory."""
    table = _table()
    table.add_column("stage", style="bold")
    table.add_column("adapter")
    table.add_column("from", ratio=1)
    table.add_column("trainable", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for row in rows:
        memory = "" if row.memory_gib is None else f"{row.memory_gib:.1f} GB"
        table.add_row(
            f"{row.stage} (done)" if row.done else row.stage,
            escape(row.adapter),
            escape(row.origin),
            short_count(row.parameters) if row.parameters else "",
            memory,
            style="dim" if row.done else "",
        )
    console.print(table)


def short_count(number: float) -> str:
    """A count in three digits: 41943040 is `41.9M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def short_time(seconds: float) -> str:
    """A duration: `0:42`, `7:05`, `3:12:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# -- live ----------------------------------------------------------------------------------------

_FIELDS = {
    "score": ("score", "{:+.2f}"),
    "kl": ("KL", "{:.1f}"),
    "loss": ("loss", "{:.3f}"),
    "heldout_loss": ("held-out", "{:.3f}"),
    "heldout_accuracy": ("held out", "{:.0%}"),
    "accuracy": ("accuracy", "{:.0%}"),
}


class Bar:
    """A stage's progress; `update` after every step.

    Args:
        stage: its name.
        total: steps.
    """

    def __init__(self, stage: str, total: int) -> None:
        self.stage = stage
        self.total = total
        self._first: tuple[float, int] | None = None

    def update(self, step: int, **shown: float) -> None:
        """Say that `step` steps are complete.

        Args:
            step: of the total, steps of an earlier session included.
            shown: score, kl, loss, heldout_accuracy, tokens_per_second; any subset.
        """
        raise AssertionError("a subclass draws")

    def _words(self, step: int, shown: dict[str, float]) -> str:
        parts = []
        for name, value in shown.items():
            if name == "tokens_per_second":
                parts.append(f"{short_count(value)} tok/s")
            else:
                label, form = _FIELDS.get(name, (name, "{:.3g}"))
                parts.append(f"{label} {form.format(value)}")
        return "  ".join(parts)

    def _left(self, step: int) -> str:
        """Time left, from the steps of this session alone."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, step)
            return ""
        began, first = self._first
        if step <= first or step >= self.total:
            return ""
        return f"{short_time((now - began) / (step - first) * (self.total - step))} left"


class _LiveBar(Bar):
    def __init__(self, stage: str, total: int, drawn: Progress, task: TaskID) -> None:
        super().__init__(stage, total)
        self._drawn, self._task = drawn, task

    def update(self, step: int, **shown: float) -> None:
        """Redraw."""
        words = escape(self._words(step, shown))
        left = self._left(step)
        self._drawn.update(self._task, completed=step, words=words, left=left)


class _PlainBar(Bar):
    def __init__(self, stage: str, total: int, console: Console) -> None:
        super().__init__(stage, total)
        self._console = console
        self._printed = -_PLAIN_SECONDS

    def update(self, step: int, **shown: float) -> None:
        """Print a line, unless one was printed in the last ten seconds."""
        now = time.monotonic()
        left = self._left(step)
        if step < self.total and now - self._printed < _PLAIN_SECONDS:
            return
        self._printed = now
        parts = [f"{self.stage} {step}/{self.total}", self._words(step, shown), left]
        line = "  ".join(filter(None, parts))
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(console: Console, stage: str, total: int) -> Iterator[Bar]:
    """A bar for the steps of a stage; a line every ten seconds where there is no terminal."""
    if not console.is_terminal:
        yield _PlainBar(stage, total, console)
        return
    columns = (
        TextColumn(f"[bold]{escape(stage):<8}"),
        BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}"),
        TextColumn("[dim]{task.fields[left]}"),
    )
    with Progress(*columns, console=console, expand=True, refresh_per_second=4) as drawn:
        task = drawn.add_task(stage, total=total, words="", left="")
        yield _LiveBar(stage, total, drawn, task)


# -- after the end -------------------------------------------------------------------------------


def result_table(console: Console, summary: Json) -> None:
    """Print the verdict, the results with their intervals, and the time each stage took."""
    spoken = verdict(summary)
    console.print(Text(spoken.text, style=f"bold {_TONES[spoken.tone]}"))
    _rows(console, "result", result_rows(summary))
    seconds = summary.get("seconds", {})
    if seconds:
        parts = [f"{stage} {short_time(s)}" for stage, s in seconds.items()]
        total = short_time(sum(seconds.values()))
        line = f"time: {', '.join(parts)}; {total} in all"
        console.print(line, style="dim", markup=False, highlight=False)


def health_card(console: Console, health: Json) -> None:
    """Print what is known of a reward model before something is trained on it."""
    tone = _TONES["good" if health["verdict"]["ok"] else "bad"]
    console.print(Text(health["verdict"]["sentence"], style=f"bold {tone}"))
    _rows(console, "reward model", health_rows(health))


def _rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = _table()
    table.add_column(title, ratio=3)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95% interval", no_wrap=True)
    table.add_column("note", ratio=4, style="dim")
    for row in rows:
        drawn = interval_line(row, console)
        table.add_row(escape(row.name), row.value, drawn, escape(row.note))
    console.print(table)


def interval_line(row: Row, console: Console) -> Text:
    """An interval on a line from 0 to 100%, whose middle is the coin."""
    if row.interval is None or row.share is None:
        return Text("")
    empty, middle, line, point = _marks(console, "·│━●", ".|=o")
    cells = [empty] * (_INTERVAL_CELLS + 1)
    low, high, value = (
        min(_INTERVAL_CELLS, max(0, round(_INTERVAL_CELLS * x))) for x in (*row.interval, row.share)
    )
    cells[_INTERVAL_CELLS // 2] = middle
    cells[low : high + 1] = line * (high - low + 1)
    cells[value] = point
    above, below = row.interval[0] > 0.5, row.interval[1] < 0.5
    return Text("".join(cells), style="green" if above else "red" if below else "yellow")


def _marks(console: Console, fine: str, plain: str) -> tuple[str, ...]:
    """Characters to draw with: plain ones where the terminal's encoding lacks the fine ones."""
    return tuple(fine if "utf" in console.encoding.lower() else plain)


def samples_panel(console: Console, run: Run, most: int = _SHOWN_SAMPLES) -> None:
    """Print answers before and after PPO side by side; nothing where there are none."""
    for pair in sample_pairs(run, most):
        console.print(_sample(pair, console.width))


def _sample(pair: SamplePair, width: int) -> Panel:
    half = max(20, min(width, 120) // 2 - 4)
    answers = [
        Panel(
            Text(text.strip() or "(nothing)"),
            title=name if score is None else f"{name}, score {score:+.2f}",
            width=half,
            box=box.ROUNDED,
            border_style=style,
        )
        for name, text, score, style in (
            (pair.before_name, pair.before, pair.before_score, "dim"),
            (pair.after_name, pair.after, pair.after_score, "cyan"),
        )
    ]
    prompt = Text(pair.prompt.strip(), style="italic")
    body = Group(prompt, Columns(answers, padding=(0, 1)))
    return Panel(body, box=box.MINIMAL, width=min(width, 120), padding=(0, 0))


def next_steps(console: Console, run: Run) -> None:
    """Print where the adapters lie and the commands to type next."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    adapters = run.adapters()
    for role in adapters:
        say(f"{role + ':':<9} {run.adapter(role)}")
    report = run.path / "report.html"
    if report.exists():
        say(f"report:   {report}")
    if not adapters:
        return
    newest = "policy" if "policy" in adapters else adapters[-1]
    say("")
    away = shutil.which("lora-rlhf") is None
    activate = Path(sys.executable).with_name("activate")
    if activate.is_relative_to(Path.cwd()):
        activate = activate.relative_to(Path.cwd())
    say(f"Next (first: source {activate}):" if away else "Next:")
    if newest != "reward":
        say(f"  lora-rlhf ui {run.path}")
        say(f"  lora-rlhf chat {run.path}")
    say(f"  lora-rlhf export {run.path} --adapter {newest}")


# -- the memory plan -----------------------------------------------------------------------------


def render_plan(plan: "MemoryPlan", console: Console) -> None:
    """Print predicted memory by phase and by part, what was chosen, and whether it fits."""
    highest = max(plan.phases.values())
    console.print(
        Text.assemble(
            ("fits" if plan.fits else "does not fit", "bold green" if plan.fits else "bold red"),
            f": needs {plan.needs_gib:.1f} GB of {plan.card_gib:.1f} GB, {plan.card_name}",
        ),
        soft_wrap=True,
    )
    table = _table()
    table.add_column("phase", style="bold")
    table.add_column("predicted peak", justify="right", no_wrap=True)
    table.add_column("of the card", no_wrap=True, ratio=1)
    for name, size in plan.phases.items():
        style = "cyan" if size < highest else "bold cyan"
        share = min(1.0, size / plan.card_gib)
        filled, empty = _marks(console, "█░", "#.")
        drawn = Text((filled * round(_PLAN_CELLS * share)).ljust(_PLAN_CELLS, empty), style=style)
        table.add_row(name, f"{size:.2f} GB", drawn)
    console.print(table)
    parts = _table()
    parts.add_column("where it goes, not all of it at once")
    parts.add_column("GB", justify="right", no_wrap=True)
    for name, size in sorted(plan.terms.items(), key=lambda item: -item[1]):
        parts.add_row(name, f"{size:.2f}" if size >= 0.005 else "<0.01")
    console.print(parts)
    again = "recomputed in the backward pass" if plan.gradient_checkpointing else "kept"
    lines = [
        f"adapter: {short_count(plan.adapter_parameters)} trainable parameters",
        f"micro-batch: {plan.micro_batch_tokens} tokens; activations are {again}",
        f"rollout: {plan.rollout_rows} answers at once",
        *plan.advice,
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
