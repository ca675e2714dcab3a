"""What is wrong with a data file: collected, so that the user sees all of it at once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lora_rlhf.errors import DataError

Record = TypeVar("Record")
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: where, what was found, what is allowed.

    Attributes:
        file: path, hub id or field of the recipe.
        line: counted from 1; for Parquet and hub rows the row; 0 where none can be named.
        found: what stands there.
        allowed: what may stand there, or what to do.
        kind: the sort of fault, in two or three words; counts go by it.
    """

    file: str
    line: int
    found: str
    allowed: str
    kind: str = "not usable"

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.found.rstrip('.')}. Allowed: {self.allowed.rstrip('.')}."


class BadRow(Exception):
    """What a row holds and what it may hold; becomes a Problem with its file and line."""

    def __init__(self, kind: str, found: str, allowed: str) -> None:
        super().__init__(found)
        self.kind, self.found, self.allowed = kind, found, allowed


class UselessRow(Exception):
    """A row that is well formed but teaches nothing; counted by its text, not a problem."""


@dataclass
class Loaded(Generic[Record]):
    """Records of a source, with what was left out and why.

    Attributes:
        records: usable ones, in the file's order.
        dropped: reason -> count, for rows that are well formed but of no use.
        problems: what is wrong with the source.
        skipped: why the source could not be looked at (a hub id without a network), or "".
    """

    records: list[Record] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    skipped: str = ""

    def drop(self, reason: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def describe(problems: Sequence[Problem]) -> str:
    """How many problems of which kind there are, and the first 20 of them, a line each."""
    kinds = Counter(p.kind for p in problems)
    counts = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common())
    noun = "problem" if len(problems) == 1 else "problems"
    lines = [f"{len(problems)} {noun} with the data ({counts}):"]
    lines += [str(p) for p in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more.")
    return "\n".join(lines)


def require(loaded: Loaded[Record]) -> list[Record]:
    """The records, if all is well with their source.

    Raises:
        DataError: problems (the first 20, with counts), a source that cannot be reached, or one
            of which no row is of use.
    """
    if loaded.skipped:
        raise DataError(loaded.skipped)
    if loaded.problems:
        raise DataError(describe(loaded.problems))
    if not loaded.records:
        reasons = ", ".join(f"{n} x {why}" for why, n in loaded.dropped.items()) or "no rows"
        raise DataError(f"The data hold no usable row: {reasons}. Give other rows.")
    return loaded.records
