"""What the app shows of run directories: read with suspicion, cached by the files' times.

A run may have been copied from elsewhere. Its names and texts are nobody's markup, its numbers may
be anything, and a link in it leads nowhere.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lora_rlhf.results import percent, verdict
from lora_rlhf.runs import Json

STAGES = ("sft", "rank", "reward", "ppo", "evaluate")
MOST_RUNS = 200
_MOST_BYTES = 8 << 20  # of a file that is read whole
_MOST_KEPT_BYTES = 1 << 20  # of a file that is kept in memory: status, summary, recipe
_SILENT_SECONDS = 120.0  # a running run writes its status at least this often
_MARKS = ("status.json", "recipe.yaml", "summary.json")
# What a file of another shape than ours makes of code that reads it.
OTHER_SHAPE = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class RunFacts:
    """One line of the list.

    Attributes:
        path: of the run.
        state: running, finished, stopped, failed, interrupted (it said running, and its process is
            gone), new (nothing ran yet) or damaged.
        stage: that runs, or ran last.
        step: of the stage.
        total: steps of the stage; 0 where that is not known.
        error: why it failed, or what is damaged.
        time: seconds since 1970 of its last sign of life; 0 where there is none.
        model: of the backbone.
        quantization: of the backbone.
        headline: its strongest number; "" before there is one.
        summary: `summary.json`.
    """

    path: Path
    state: str
    stage: str = ""
    step: int = 0
    total: int = 0
    error: str = ""
    time: float = 0.0
    model: str = ""
    quantization: str = ""
    headline: str = ""
    summary: Json = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name


def list_runs(runs_dir: Path) -> list[RunFacts]:
    """The runs of a folder, the newest first; at most `MOST_RUNS`."""
    found = [facts_of(path) for path in _run_paths(runs_dir)]
    # Not by the last sign of life: two runs at once would change places at every look.
    found.sort(key=lambda run: (-_started(run.path), run.name))
    return found[:MOST_RUNS]


def find_run(runs_dir: Path, name: Any) -> RunFacts | None:
    """The run of a name that the folder's listing has; no name is ever joined to a path."""
    return next((facts_of(path) for path in _run_paths(runs_dir) if path.name == name), None)


def _run_paths(runs_dir: Path) -> Iterator[Path]:
    if not runs_dir.is_dir():
        return
    for entry in sorted(runs_dir.iterdir()):
        if _is_name(entry.name) and any((entry / mark).is_file() for mark in _MARKS):
            yield entry


def _is_name(name: str) -> bool:
    """Neither hidden nor, as a name in no encoding is, impossible to send to a browser."""
    return not name.startswith(".") and name.encode(errors="ignore").decode() == name


def _started(path: Path) -> float:
    """The recipe is written at the start; the directory's own time moves with every file in it."""
    for mark in ("recipe.yaml", "status.json", "summary.json"):
        if (path / mark).is_file():
            return (path / mark).stat().st_mtime
    return 0.0


def file_of(run: Path, name: str) -> Path | None:
    """A file of a run; None where it is missing or a link leads out of the run."""
    path = run / name
    inside = path.resolve().is_relative_to(run.resolve())
    return path if inside and path.is_file() else None


def text_of(run: Path, name: str) -> str | None:
    """The text of a file; None where it is missing or larger than is ever honest."""
    path = file_of(run, name)
    if path is None:
        return None
    size = path.stat().st_size
    return path.read_text(encoding="utf-8", errors="replace") if size <= _MOST_BYTES else None


def _small_text(run: Path, name: str) -> str:
    """As `text_of`, kept until the file changes; "" for none."""
    path = file_of(run, name)
    if path is None:
        return ""
    stat = path.stat()
    if stat.st_size > _MOST_KEPT_BYTES:
        raise ValueError(f"{name} is too large")
    return _kept(path, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=3 * MOST_RUNS)
def _kept(path: Path, changed: int, inode: int) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def facts_of(path: Path) -> RunFacts:
    """What a run's small files say, whatever they hold."""
    try:
        status, summary = _json(path, "status.json"), _json(path, "summary.json")
        model, quantization = _base(_small_text(path, "recipe.yaml"))
        state, error = _state(status)
        return RunFacts(
            path=path,
            state=state,
            stage=str(status.get("stage") or ""),
            step=_whole(status.get("step")),
            total=_whole(status.get("total")),
            error=error,
            time=_seconds(status.get("time")) or _started(path),
            model=model,
            quantization=quantization,
            headline=headline(summary),
            summary=summary,
        )
    except OTHER_SHAPE as damage:
        error = f"its files cannot be read ({damage})"
        return RunFacts(path=path, state="damaged", error=error, time=_started(path))


def _json(run: Path, name: str) -> Json:
    text = _small_text(run, name)
    content = json.loads(text) if text else {}
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds no object")
    return content


@lru_cache(maxsize=512)
def _base(recipe: str) -> tuple[str, str]:
    """Model and quantization."""
    try:
        base = yaml.safe_load(recipe)["base"]
        found = [base.get("model"), base.get("quantization")]
    except (yaml.YAMLError, *OTHER_SHAPE):
        return "", ""
    model, quantization = (word if isinstance(word, str) else "" for word in found)
    return model, quantization


def _state(status: Json) -> tuple[str, str]:
    state, error = str(status.get("state") or ""), str(status.get("error") or "")
    if not state:
        return "new", ""
    if state != "running":
        return state if state in ("finished", "stopped", "failed") else "stopped", error
    # A run of another machine, on a shared disk, has no process here: its status speaks for it.
    fresh = time.time() - _seconds(status.get("time")) < _SILENT_SECONDS
    if fresh or _is_alive(status.get("pid")):
        return "running", error
    return "interrupted", "Its process is gone. Go on with it by --resume."


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def headline(summary: Json) -> str:
    """The strongest number of a summary."""
    for win in summary.get("win_rates", []):
        if (win["a"], win["b"]) == ("policy", "sft"):
            low, high = win["ci"]
            span = f"{percent(low)} to {percent(high)}"
            return f"PPO wins {percent(win['win_rate'])} against SFT ({span})"
    ppo, reward, sft = (summary.get(stage, {}) for stage in ("ppo", "reward", "sft"))
    if "score" in ppo:
        return f"PPO score {ppo['score']:+.2f} at KL {ppo.get('kl', 0.0):.1f} nats"
    if "accuracy" in reward:
        return f"reward model right on {percent(reward['accuracy'])}"
    if "heldout_loss" in sft:
        return f"SFT held-out loss {sft['heldout_loss']:.3f}"
    return ""


def verdict_of(summary: Json) -> tuple[str, str]:
    """Tone and sentences on a run; of a summary that is not ours, that it cannot be read."""
    try:
        spoken = verdict(summary)
    except OTHER_SHAPE:
        return "even", "The summary of this run cannot be read."
    return spoken.tone, spoken.text


def _whole(value: Any) -> int:
    return int(value) if is_number(value) else 0


def _seconds(value: Any) -> float:
    return float(value) if is_number(value) else 0.0


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and math.isfinite(value)


# -- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One answer that a stage kept.

    Attributes:
        step: of the stage.
        arm: of the evaluation; "" in training.
        prompt: as text.
        response: as text.
        score: by the reward model.
        kl: nats from SFT.
        utility: by the judge.
    """

    step: int
    arm: str
    prompt: str
    response: str
    score: float | None = None
    kl: float | None = None
    utility: float | None = None


def samples_of(run: Path, stage: str) -> tuple[Sample, ...]:
    """What a stage kept in samples.jsonl; lines that are none are left out.

    Of a file that grew beyond reason only the end is read.
    """
    path = file_of(run, f"{stage}/samples.jsonl")
    if path is None:
        return ()
    stat = path.stat()
    return _samples(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=32)
def _samples(path: Path, changed: int, size: int) -> tuple[Sample, ...]:
    with path.open("rb") as file:
        cut = max(0, size - _MOST_BYTES)
        file.seek(cut)
        lines = file.read(_MOST_BYTES).split(b"\n")
    found = (_sample(line) for line in lines[:-1])
    return tuple(sample for sample in found if sample is not None)


def _sample(line: bytes) -> Sample | None:
    try:
        record = json.loads(line)
        prompt, response = record["prompt"], record["response"]
    except OTHER_SHAPE:
        return None
    if not isinstance(prompt, str) or not isinstance(response, str):
        return None
    numbers = {k: record.get(k) for k in ("score", "kl", "utility")}
    return Sample(
        step=_whole(record.get("step")),
        arm=str(record.get("arm") or ""),
        prompt=prompt,
        response=response,
        **{k: float(v) if is_number(v) else None for k, v in numbers.items()},
    )
