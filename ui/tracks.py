"""The numbers of a stage as they grow: read where the last look ended, in bounded memory.

A track keeps stretches of neighbouring points, each with its mean, lowest and highest value, so
that a spike of one step among 10^5 still shows. When it has too many, neighbours are merged.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from lora_rlhf.runs import Json

MOST_STRETCHES = 512
_BYTES_AT_ONCE = 2 << 20
_NOT_METRICS = ("step", "time")
_MOST_STEPS = 1e12  # NaN is none either
_MOST_TRACKS = 200  # of a file that is no file of metrics
# Four times as fast as the standard library, and as willing to read NaN.
_read_json = TypeAdapter(Any).validate_json

Stretches = NDArray[np.float64]
"""(n, 6): first step, last step, points, sum, lowest and highest value."""
FIRST, LAST, COUNT, TOTAL, LOW, HIGH = range(6)


def merge(stretches: Stretches, width: int) -> Stretches:
    """Neighbours together, so that each of the result has `width` points, the last one at most.

    Args:
        stretches: whose counts add up to multiples of the width where a stretch of it ends.
        width: points.
    """
    if width <= 1 or not len(stretches):
        return stretches
    counts = stretches[:, COUNT]
    group = (np.cumsum(counts) - counts) // width
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    ends = np.append(starts[1:], len(stretches)) - 1
    return np.column_stack(
        [
            stretches[starts, FIRST],
            stretches[ends, LAST],
            np.add.reduceat(counts, starts),
            np.add.reduceat(stretches[:, TOTAL], starts),
            np.minimum.reduceat(stretches[:, LOW], starts),
            np.maximum.reduceat(stretches[:, HIGH], starts),
        ]
    )


class Track:
    """One metric.

    Attributes:
        stretches: at most `MOST_STRETCHES`.
        count: points.
        broken: values that were no finite number.
        newest: the last value.
    """

    def __init__(self) -> None:
        self.stretches: Stretches = np.empty((0, 6))
        self.count = 0
        self.broken = 0
        self.newest = float("nan")
        self._width = 1

    def add(self, steps: Sequence[float], values: Sequence[Any]) -> None:
        """Add points, in their order."""
        x, y = np.array(steps, dtype=float), _numbers(values)
        good = np.isfinite(y)
        self.broken += int(len(y) - good.sum())
        x, y = x[good], y[good]
        if not len(y):
            return
        self.count += len(y)
        self.newest = float(y[-1])
        points = np.column_stack([x, x, np.ones_like(y), y, y, y])
        grown = merge(np.concatenate([self.stretches, points]), self._width)
        while len(grown) > MOST_STRETCHES:
            self._width *= 2
            grown = merge(grown, self._width)
        self.stretches = grown

    @property
    def is_flat(self) -> bool:
        """A value that never moves is a setting, not a curve."""
        return not self.count or bool(self.stretches[:, LOW].min() == self.stretches[:, HIGH].max())

    def thinned(self, most: int) -> Stretches:
        """At most so many stretches."""
        factor = -(-len(self.stretches) // most)
        return merge(self.stretches, self._width * factor)


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """NaN for what is no number."""
    if any(type(value) is not float for value in values):
        values = [v if type(v) in (int, float) else np.nan for v in values]
    return np.array(values, dtype=float)


class MetricFile:
    """A metrics.jsonl that grows.

    Args:
        path: of the file; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.tracks: dict[str, Track] = {}
        self.step = 0.0
        self.lines = 0
        self._at = 0
        self._size = 0
        self._inode = -1

    def refresh(self, seconds: float = 1.0) -> "MetricFile":
        """Read what was added; a file that was replaced or cut is read again.

        Only whole lines count: the last one may still be in the writing.

        Args:
            seconds: to spend; what is left is read by the next look, and `read` says so.
        """
        give_up_at = time.monotonic() + seconds
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    stat = os.fstat(file.fileno())
                    if stat.st_ino != self._inode or stat.st_size < self._at:
                        self._forget()
                        self._inode = stat.st_ino
                    self._size = stat.st_size
                    self._read_on(file, give_up_at)
            except FileNotFoundError:
                self._forget()
            return self

    def _read_on(self, file: BinaryIO, give_up_at: float) -> None:
        while True:
            file.seek(self._at)
            block = file.read(_BYTES_AT_ONCE)
            end = block.rfind(b"\n") + 1
            if not end:
                self._size = self._at  # half a line, or no file of lines at all
                return
            self._take(block[:end])
            self._at += end
            if time.monotonic() > give_up_at:
                return

    @property
    def read(self) -> float:
        """Share of the file that was read; below 1 where the last look ran out of time."""
        return self._at / self._size if self._size else 1.0

    def _take(self, block: bytes) -> None:
        columns: dict[str, tuple[list[float], list[Any]]] = {}
        refused = set(_NOT_METRICS)
        for line in block.split(b"\n"):
            record = _record(line)
            if record is None:
                continue
            self.lines += 1
            step = self.step = record["step"]
            for key, value in record.items():
                if key in refused:
                    continue
                column = columns.get(key)
                if column is None:
                    if not self._has_room(key, columns):
                        refused.add(key)
                        continue
                    column = columns[key] = ([], [])
                column[0].append(step)
                column[1].append(value)
        for key, (steps, values) in columns.items():
            self.tracks.setdefault(key, Track()).add(steps, values)

    def _has_room(self, key: str, columns: Mapping[str, object]) -> bool:
        fresh = len(columns.keys() - self.tracks.keys())
        return key in self.tracks or len(self.tracks) + fresh < _MOST_TRACKS


def _record(line: bytes) -> Json | None:
    """A line of metrics; None for anything else."""
    try:
        record = _read_json(line) if line else None
    except ValidationError:
        return None
    if not isinstance(record, dict):
        return None
    step: Any = record.get("step")
    return record if type(step) in (int, float) and abs(step) < _MOST_STEPS else None


@lru_cache(maxsize=32)
def metric_file(path: Path) -> MetricFile:
    """The one reader of a file, so that everybody who looks shares what was read."""
    return MetricFile(path)
