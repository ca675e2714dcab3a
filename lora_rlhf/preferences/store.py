"""The store of preferences: append-only events, on SQLite or PostgreSQL.

`Store.add` returns when the event is durable. Ids make it idempotent: whoever is not sure whether
a vote arrived sends it again.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Select, and_, delete, func, insert, select

from lora_rlhf.preferences.copies import copy_to
from lora_rlhf.preferences.database import Database
from lora_rlhf.preferences.events import AnyEvent, Erase, Judgement, Retract, Task
from lora_rlhf.preferences.files import sha256_of
from lora_rlhf.preferences.intake import (
    IS_JUDGEMENT,
    IS_RETRACTED,
    IS_TASK,
    JUDGEMENTS,
    OF_TASK,
    TASKS,
    append,
    find,
    take,
)
from lora_rlhf.preferences.schema import ERASURES, EVENTS

_ROWS_AT_ONCE = 500
_PATIENCE = 1.0  # seconds that erasing waits for readers


@dataclass(frozen=True, slots=True)
class Judged:
    """A judgement and what it is about.

    Attributes:
        task: what was shown.
        judgement: what was said of it.
        seq: of the judgement; grows with every event of the store.
        retracted: it was taken back.
    """

    task: Task
    judgement: Judgement
    seq: int
    retracted: bool = False


class Store:
    """Events on one SQLite file or PostgreSQL server. Safe to share between threads.

    Every call is a transaction of its own on a connection of its own.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, location: str | Path, create: bool = True, read_only: bool = False) -> "Store":
        """Open a store, check it, and bring an older format to this version's.

        Args:
            location: path of an SQLite file, or a postgresql:// URL.
            create: make the file, readable by its owner alone, where there is none.
            read_only: change nothing at all, not the file's journal either.

        Raises:
            PreferenceError: no such file or server, not ours, newer, damaged, or not writable.
        """
        return cls(Database(location, create, read_only))

    @property
    def location(self) -> str:
        """Path or URL, without the password."""
        return self._database.shown

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing --------------------------------------------------------------------------------

    def add(self, event: Task | Judgement | Retract) -> bool:
        """Store an event; it is durable when this returns.

        Returns:
            False where an event of this id was there already: the first one stands.

        Raises:
            EventRefused: a judgement of no known task, not of this task, of an answer that is not
                finished, a second one by the same person while the first stands, or of a task made
                for somebody else; a retract of no judgement, of another's, or a second one.
            PreferenceError: the database failed, and nothing was stored.
        """
        return self.add_many([event]) == 1

    def add_many(self, events: Iterable[Task | Judgement | Retract]) -> int:
        """Store events in one transaction, all or none; returns how many were new.

        Raises:
            EventRefused, PreferenceError: as `add`.
        """
        with self._database.writing() as connection:
            return sum(take(connection, event) for event in events)

    def erase(self, annotator: str) -> int:
        """Remove a person's judgements and their retracts for good; returns how many judgements.

        The one exception to append-only. An `Erase` event keeps the count; tasks stay. While
        somebody reads an older state, the text stays in the files: see `owes_erasure`.
        """
        with self._database.writing() as connection:
            theirs = and_(EVENTS.c.annotator == annotator, EVENTS.c.kind == "judgement")
            count = connection.scalar(select(func.count()).where(theirs)) or 0
            if not count:
                return 0
            connection.execute(insert(ERASURES).values(annotator=annotator))
            for kind in ("retract", "judgement"):  # a retract refers to its judgement
                rows = and_(EVENTS.c.annotator == annotator, EVENTS.c.kind == kind)
                connection.execute(delete(EVENTS).where(rows))
            connection.execute(delete(ERASURES))
            append(connection, Erase(annotator=annotator, count=count))
            self._database.owe()
        self._database.settle(_PATIENCE)
        self._database.vacuum_server()
        return count

    @property
    def owes_erasure(self) -> bool:
        """Whether the files still hold what was erased, because somebody was reading.

        It is overwritten after the next write, or when a store is closed or opened, by whichever
        process does so first when nobody reads.
        """
        return self._database.owes

    # -- single events --------------------------------------------------------------------------

    def task(self, task_id: str) -> Task | None:
        """The task of an id."""
        found = self._event(task_id)
        return found if isinstance(found, Task) else None

    def judgement(self, judgement_id: str) -> Judgement | None:
        """The judgement of an id, retracted or not."""
        found = self._event(judgement_id)
        return found if isinstance(found, Judgement) else None

    def _event(self, event_id: str) -> AnyEvent | None:
        with self._database.reading() as connection:
            return find(connection, event_id)

    # -- what a person has done and has to do ---------------------------------------------------

    def judged(
        self, annotator: str | None = None, since_seq: int = 0, retracted: bool = False
    ) -> list[Judged]:
        """Judgements that stand, with their tasks, in the order in which they were stored.

        Args:
            annotator: of this person alone.
            since_seq: after this `Judged.seq`; what was retracted later is not told.
            retracted: those that were taken back as well.
        """
        return list(self.each_judged(annotator, since_seq, retracted))

    def each_judged(
        self, annotator: str | None = None, since_seq: int = 0, retracted: bool = False
    ) -> Iterator[Judged]:
        """As `judged`, one after the other, out of one state of the store."""
        query = _judged().where(JUDGEMENTS.c.seq > since_seq).order_by(JUDGEMENTS.c.seq)
        if annotator is not None:
            query = query.where(JUDGEMENTS.c.annotator == annotator)
        if not retracted:
            query = query.where(~IS_RETRACTED)
        with self._database.reading() as connection:
            connection = connection.execution_options(yield_per=_ROWS_AT_ONCE)
            for row in connection.execute(query):
                yield _to_judged(row)

    def open_task(self, annotator: str, mode: str) -> Task | None:
        """The newest task made for this person in this mode without a judgement that stands."""
        # Not a correlated EXISTS, of which PostgreSQL without statistics makes all with all.
        answered = select(JUDGEMENTS.c.task_id).where(
            IS_JUDGEMENT, JUDGEMENTS.c.annotator == annotator, ~IS_RETRACTED
        )
        query = (
            select(TASKS.c.body)
            .where(IS_TASK, TASKS.c.annotator == annotator)
            .where(TASKS.c.mode == mode, TASKS.c.id.not_in(answered))
            .order_by(TASKS.c.seq.desc())
            .limit(1)
        )
        with self._database.reading() as connection:
            body = connection.scalar(query)
        return None if body is None else Task.model_validate_json(body)

    def last(self, annotator: str, mode: str | None = None) -> Judged | None:
        """This person's newest judgement that stands, in any mode or in one: what undo takes."""
        query = _judged().where(JUDGEMENTS.c.annotator == annotator, ~IS_RETRACTED)
        if mode is not None:
            query = query.where(TASKS.c.mode == mode)
        with self._database.reading() as connection:
            row = connection.execute(query.order_by(JUDGEMENTS.c.seq.desc()).limit(1)).first()
        return None if row is None else _to_judged(row)

    def retracted(self, task_id: str, annotator: str) -> int:
        """How often this person has judged a task and taken it back."""
        query = select(func.count()).where(
            IS_JUDGEMENT,
            JUDGEMENTS.c.task_id == task_id,
            JUDGEMENTS.c.annotator == annotator,
            IS_RETRACTED,
        )
        with self._database.reading() as connection:
            return connection.scalar(query) or 0

    def judged_prompts(self, annotator: str) -> set[str]:
        """Hashes of the prompts of which this person has judgements that stand, skips counted."""
        query = (
            select(TASKS.c.prompt_sha256)
            .join(JUDGEMENTS, OF_TASK)
            .where(IS_JUDGEMENT, JUDGEMENTS.c.annotator == annotator, ~IS_RETRACTED)
            .distinct()
        )
        with self._database.reading() as connection:
            return set(connection.scalars(query))

    # -- the store as a whole -------------------------------------------------------------------

    def version(self) -> int:
        """`seq` of the newest event, 0 for none: a cheap key for what is computed of them all."""
        with self._database.reading() as connection:
            return connection.scalar(select(func.max(EVENTS.c.seq))) or 0

    def counts(self) -> dict[str, int]:
        """How many tasks, judgements, retracted, live, and annotators (with a live judgement)."""
        kinds = select(EVENTS.c.kind, func.count().label("n")).group_by(EVENTS.c.kind)
        people = select(func.count(JUDGEMENTS.c.annotator.distinct())).where(
            IS_JUDGEMENT, ~IS_RETRACTED
        )
        with self._database.reading() as connection:
            found: dict[str, int] = {row.kind: row.n for row in connection.execute(kinds)}
            annotators = connection.scalar(people) or 0
        judgements, retracted = found.get("judgement", 0), found.get("retract", 0)
        return {
            "tasks": found.get("task", 0),
            "judgements": judgements,
            "retracted": retracted,
            "live": judgements - retracted,
            "annotators": annotators,
        }

    def digest(self) -> str:
        """SHA-256 of all events in their order; the same for a store and its copies."""
        found = hashlib.sha256()
        with self._database.reading() as connection:
            connection = connection.execution_options(yield_per=_ROWS_AT_ONCE)
            for body in connection.scalars(select(EVENTS.c.body).order_by(EVENTS.c.seq)):
                found.update(body.encode() + b"\n")
        return found.hexdigest()

    def check(self) -> None:
        """Read all and check that it holds together.

        Raises:
            PreferenceError: it is damaged.
        """
        self._database.check()

    def backup(self, path: str | Path) -> None:
        """Write a consistent SQLite copy while the store may go on being written.

        Raises:
            PreferenceError: the file exists, or cannot be written.
        """
        copy_to(self._database, Path(path))

    def snapshot(self, path: str | Path) -> str:
        """As `backup`; returns the SHA-256 of the file."""
        self.backup(path)
        return sha256_of(Path(path).expanduser())


# -- rows to events -----------------------------------------------------------------------------


def _judged() -> Select[Any]:
    return (
        select(
            JUDGEMENTS.c.seq,
            TASKS.c.body.label("task"),
            JUDGEMENTS.c.body.label("judgement"),
            IS_RETRACTED.label("retracted"),
        )
        .join(TASKS, OF_TASK)
        .where(IS_JUDGEMENT)
    )


def _to_judged(row: Any) -> Judged:
    return Judged(
        Task.model_validate_json(row.task),
        Judgement.model_validate_json(row.judgement),
        row.seq,
        bool(row.retracted),
    )
