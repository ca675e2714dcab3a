"""The process of a retraining, found again by an app that has not started it, and what it says."""

import time
from pathlib import Path

from lora_rlhf.runs import Json, Run
from ui.job import Job
from ui.process import Training, began_at

_SLACK = 5.0  # seconds that clocks may differ by
_PREPARING_SECONDS = 600.0  # more than it ever takes


def is_stale(job: Job) -> bool:
    """Whether it has been prepared for longer than that ever takes."""
    return time.time() - job.started_at > _PREPARING_SECONDS


def process_of(run: Path, job: Job) -> Training | None:
    """The process that trains a run; None where it has ended."""
    pid = job.pid
    if not pid:
        # An app killed as it started the process had no time to write down which.
        status = Run(run).status()
        pid = status.get("pid", 0) if status.get("state") == "running" else 0
    training = Training(pid, job.process_began)
    if not training.runs or (not job.process_began and began_at(pid) < job.started_at - _SLACK):
        return None  # of the same number, but older than the job: after a restart of the machine
    return training


def status_of(run: Run, job: Job) -> Json:
    """What the job's own process says; {} where an earlier one spoke last."""
    status = run.status()
    return status if status.get("pid") == job.pid else {}


def why_it_ended(run: Run, job: Job) -> str:
    """Why a process ended before its work was done."""
    status = status_of(run, job)
    if status.get("state") == "failed" and status.get("error"):
        return str(status["error"])
    if job.exit_code is None:
        return "The training process is gone, and nobody saw how it ended. Look at the log."
    return f"The training process ended with exit code {job.exit_code}. Look at the log."
