"""What is known of one retraining: kept in its run directory, so that a new app finds it again."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_rlhf.runs import Json, write_atomically
from ui.measuring import BeforeAfter

FILE = "retraining.json"
LOG = "train-console.log"

State = Literal[
    "none",
    "preparing",
    "running",
    "measuring",
    "done",
    "failed",
    "cancelled",
    "adopted",
    "discarded",
]
AT_WORK: tuple[State, ...] = ("preparing", "running", "measuring")
OVER: tuple[State, ...] = ("none", "adopted", "discarded")
"""States after which another retraining may begin without a decision on this one."""


class Job(BaseModel):
    """One retraining.

    Attributes:
        state: where it stands; none: there has been none.
        name: of the new run.
        base: name of the run that it started from.
        person: who started it.
        stages: of the pipeline, that it runs.
        force: with --force.
        started_at: seconds since 1970.
        ended_at: seconds since 1970; 0 before.
        pid: of the training process; 0 before there is one.
        process_began: as `ui.process.Training.started`.
        released: chat gave the device's memory back meanwhile.
        cancelling: somebody has asked it to stop.
        exit_code: of the process; None while it runs, and where nobody could see it.
        error: what went wrong, in a sentence.
        snapshot_sha256: of what it trains on.
        judgements: of the store that are trained on.
        earlier: rankings of the base run that are trained on.
        before: name of the reward adapter to compare with.
        measurable: held-out prompts with votes of people, which nothing was trained on.
        result: accuracy on those, once measured; None where they are too few.
        choosing: accuracy on people's rankings that also chose the step, which proves nothing.
    """

    model_config = ConfigDict(frozen=True)

    state: State = "none"
    name: str = ""
    base: str = ""
    person: str = ""
    stages: tuple[str, ...] = ()
    force: bool = False
    started_at: float = 0.0
    ended_at: float = 0.0
    pid: int = 0
    process_began: str = ""
    released: bool = False
    cancelling: bool = False
    exit_code: int | None = None
    error: str = ""
    snapshot_sha256: str = ""
    judgements: int = 0
    earlier: int = 0
    before: str | None = None
    measurable: int = 0
    result: BeforeAfter | None = None
    choosing: BeforeAfter | None = None

    @property
    def is_at_work(self) -> bool:
        """Whether something goes on."""
        return self.state in AT_WORK

    def save(self, run: Path) -> None:
        """Keep it in its run directory."""
        write_atomically(run / FILE, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


def read_job(run: Path) -> Job | None:
    """The retraining that made a run; None where it was made otherwise, or the file is no good."""
    try:
        return Job.model_validate_json((run / FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def find_jobs(runs_dir: Path) -> list[tuple[Path, Job]]:
    """All retrainings of a folder of runs, oldest first."""
    found = [
        (path.parent, job)
        for path in runs_dir.glob(f"[!.]*/{FILE}")
        if (job := read_job(path.parent)) is not None and job.name == path.parent.name
    ]
    return sorted(found, key=lambda item: item[1].started_at)


def is_offered(run: Path) -> bool:
    """Whether a run's adapters are for everybody: of a retraining, once it is adopted."""
    job = read_job(run)
    return job is None or job.name != run.name or job.state == "adopted"


def adopted_runs(runs_dir: Path, bases: list[str]) -> list[Path]:
    """Runs that were retrained from these, or from those in turn, and adopted: oldest first."""
    names, found = set(bases), []
    for path, job in find_jobs(runs_dir):
        if job.state == "adopted" and job.base in names:
            names.add(job.name)
            found.append(path)
    return [path for path in found if path.name not in bases]


# -- how far it is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: its name; "" while the backbone is being loaded.
        step: done.
        total: 0 where it is not known.
        seconds_left: of the stage; None where it is not known.
    """

    stage: str = ""
    step: int = 0
    total: int = 0
    seconds_left: float | None = None


class Pace:
    """Reads progress off status.json, and how long the rest of a stage takes off its changes."""

    def __init__(self) -> None:
        self._first: tuple[str, int, float] | None = None

    def look(self, status: Json, now: float | None = None) -> Progress:
        """Progress as a status says.

        Args:
            status: of `Run.status`.
            now: seconds of any steady clock; unset: the system's.
        """
        now = time.monotonic() if now is None else now
        if status.get("state") != "running":
            return Progress()
        stage, step = str(status.get("stage", "")), int(status.get("step", 0))
        total = int(status.get("total", 0))
        if self._first is None or self._first[0] != stage or step < self._first[1]:
            self._first = (stage, step, now)
        _, first, since = self._first
        left = None
        if step > first and total:
            left = (now - since) / (step - first) * max(0, total - step)
        return Progress(stage, step, total, left)
