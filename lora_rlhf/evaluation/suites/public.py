"""Run a suite of public sets on every arm, side by side: what training cost elsewhere.

Results lie under suites/ of the run: `NAME.json` after every task, and each request as soon as its
batch is computed, so that an interrupted suite goes on where it was.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich import box
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table

from lora_rlhf.charts import plain_number
from lora_rlhf.errors import ConfigError, DataError, PreferenceError
from lora_rlhf.evaluation.suites import flags
from lora_rlhf.evaluation.suites.engine import Engine
from lora_rlhf.evaluation.suites.files import data_folder
from lora_rlhf.evaluation.suites.tasks import Setting, tasks_of
from lora_rlhf.results import arm_name
from lora_rlhf.runs import Json
from lora_rlhf.training.session import Session

FOLDER = "suites"
_FEWEST = 2  # documents that an interval can be had from
_NAMES, _CELL = 21, 17  # columns of a terminal: the metrics' names; figures with their padding


class Arm(Protocol):
    """A named way to answer, such as `evaluation.arms.ReadyArm`."""

    @property
    def name(self) -> str:
        """Under which it is reported."""

    @property
    def adapter(self) -> str | None:
        """Its adapter on the backbone; None: the bare base."""


def run_suite(
    session: Session,
    name: str,
    arms: Sequence[Arm],
    *,
    data: Path | None = None,
    limit: int | None = None,
) -> Json:
    """Every task of a suite, every arm, with 95 % intervals by bootstrap over documents.

    What cannot run here (no lm-eval, a set's file missing) is told in one sentence and left out.
    Arms that are more than an adapter (best-of-n, few-shot) are left out too: a suite reads their
    probabilities.

    Args:
        session: with the arms' adapters on its backbone.
        name: `public`, `hub`, a task of either, or any task of lm-eval.
        arms: in the order in which they are shown.
        data: folder of the public sets' files; unset: $LORA_RLHF_DATA.
        limit: most documents of a task, spread evenly over it; unset: all.

    Returns:
        {"tasks": {task: {metric: {arm: {"value", "low", "high", "n"}}}}, "seconds": {task: s},
        "skipped": {task: why}}; `flags` among the tasks where the recipe's rankings come from a
        store that people have marked answers in.

    Raises:
        ConfigError: an unknown name, a limit below 2, or no arm that a suite can measure.
        DataError: nothing of the suite can run here, or a file cannot be read.
    """
    if limit is not None and limit < _FEWEST:
        raise ConfigError(f"limit is {limit}. Allowed: {_FEWEST} or more documents of a task.")
    tasks = tasks_of(name)
    chosen = _plain_arms(session, arms)
    folder = data_folder(data)
    engine = Engine(session, chosen, session.run.path / FOLDER / "requests")
    setting = Setting(session, engine, folder, limit)
    results = _Results(session, name, engine, limit)
    for task_name, task in tasks.items():
        reason = task.why_not(setting)
        if reason is not None:
            results.skip(task_name, reason)
            continue
        try:
            with _same_random_numbers(), results.timed(task_name) as found:
                for metric, by_arm in task.measure(setting).items():
                    found[metric] = {arm: observed.share() for arm, observed in by_arm.items()}
        except DataError as error:
            results.skip(task_name, str(error))
    if name == "public":
        _add_flags(session, results)
    if not results.tasks:
        raise DataError(_nothing(name, results.skipped))
    return results.as_dict()


def _plain_arms(session: Session, arms: Sequence[Arm]) -> dict[str, str | None]:
    """Name -> adapter of the arms that are nothing but an adapter.

    Raises:
        ConfigError: there is none.
    """
    plain = [a for a in arms if not _is_more(a)]
    left = [a.name for a in arms if _is_more(a)]
    if left:
        session.tell(f"suites measure adapters alone; left out: {', '.join(left)}")
    if not plain:
        raise ConfigError(
            "no arm that a suite can measure. Give base, sft, policy, a checkpoint or the "
            "directory of an adapter."
        )
    return {arm.name: arm.adapter for arm in plain}


def _is_more(arm: Arm) -> bool:
    spec: Any = getattr(arm, "spec", None)
    return getattr(spec, "best_of", 1) > 1 or getattr(spec, "shots", 0) > 0


def _nothing(name: str, skipped: dict[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for task, reason in skipped.items():
        reasons.setdefault(reason, []).append(task)
    parts = [f"{', '.join(tasks)}: {reason}" for reason, tasks in reasons.items()]
    return f"suite {name}: nothing of it can run here. " + " ".join(parts)


def _add_flags(session: Session, results: "_Results") -> None:
    """Rates of the app's marks, where there is a store of them."""
    location = flags.store_of(session)
    if location is None:
        return
    try:
        with results.timed("flags") as found:
            found |= flags.flag_shares(location)
    except (DataError, PreferenceError) as error:  # it may have moved since the run
        results.skip("flags", str(error))


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """A library's use of torch's numbers must not change what the run draws next."""
    with torch.random.fork_rng(devices=[]):
        yield


class _Results:
    """What there is so far, on disk after every task."""

    def __init__(self, session: Session, name: str, engine: Engine, limit: int | None) -> None:
        self._session = session
        file_name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        self._file = f"{FOLDER}/{file_name}.json"
        self._key: Json = {"arms": engine.identities, "limit": limit}
        self._before = self._seconds_before()
        self.tasks: Json = {}
        self.seconds: dict[str, float] = {}
        self.skipped: dict[str, str] = {}

    def _seconds_before(self) -> dict[str, float]:
        path = self._session.run.path / self._file
        if not path.exists():
            return {}
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return earlier["seconds"] if earlier.get("key") == self._key else {}

    @contextmanager
    def timed(self, task: str) -> Iterator[Json]:
        """Measure a task into the dict; kept when the block ends without an exception."""
        found: Json = {}
        started = time.monotonic()
        yield found
        taken = time.monotonic() - started
        # Read from disk, a task takes no time; its seconds are those of computing it.
        self.seconds[task] = round(max(taken, self._before.get(task, 0.0)), 1)
        self.tasks[task] = found
        self._session.run.write_json(self._file, {"key": self._key, **self.as_dict()})
        self._session.tell(f"{task}: {_in_words(found)} ({self.seconds[task]:g} s)")

    def skip(self, task: str, reason: str) -> None:
        """Leave a task out, saying why."""
        self.skipped[task] = reason
        self._session.tell(f"{task} is left out: {reason}")

    def as_dict(self) -> Json:
        """As `run_suite` returns it."""
        return {"tasks": self.tasks, "seconds": self.seconds, "skipped": self.skipped}


def _in_words(found: Json) -> str:
    """The first metric of every arm."""
    if not found:
        return "nothing"
    metric, arms = next(iter(found.items()))
    return f"{metric} " + ", ".join(
        f"{arm} {figure(share['value'])}" for arm, share in arms.items()
    )


@dataclass(frozen=True)
class SuiteTable:
    """A line a metric with its interval below, a column an arm; more tables where they are many.

    Attributes:
        results: as `run_suite` returns them.
    """

    results: Json

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Table]:
        """As many arms in a table as the terminal is wide."""
        tasks = self.results["tasks"]
        arms = list(dict.fromkeys(a for m in tasks.values() for s in m.values() for a in s))
        fit = max(1, (options.max_width - _NAMES) // _CELL)
        for start in range(0, len(arms), fit):
            yield _table(tasks, arms[start : start + fit])


def suite_table(results: Json) -> SuiteTable:
    """The figures for a terminal of any width."""
    return SuiteTable(results)


def _table(tasks: Json, arms: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for arm in arms:
        table.add_column(escape(arm_name(arm)), justify="right", overflow="fold")
    for task, metrics in tasks.items():
        table.add_row(f"[b]{escape(task)}[/b]")
        for metric, shares in metrics.items():
            cells = [_cell(shares[arm]) if arm in shares else "" for arm in arms]
            table.add_row(f"  {escape(metric)}", *cells)
    return table


def _cell(share: Json) -> str:
    value, low, high = (figure(share[key]) for key in ("value", "low", "high"))
    return f"{value}\n[dim]{low} to {high}[/dim]"


def figure(value: float) -> str:
    """Shares in three decimals, however small; other numbers in three digits."""
    if value == 0.0 or 5e-4 <= abs(value) <= 1.0:
        return f"{value:.3f}"
    return plain_number(value)
