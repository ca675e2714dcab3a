"""Which events the store takes: the checks of one event against those that are there."""

import json
from typing import Any

from sqlalchemy import Connection, and_, bindparam, exists, insert, literal, select

from lora_rlhf.errors import EventRefused
from lora_rlhf.preferences.events import (
    KINDS,
    AnyEvent,
    Judgement,
    Retract,
    Task,
    why_refused,
)
from lora_rlhf.preferences.schema import EVENTS

TASKS = EVENTS.alias("tasks")
JUDGEMENTS = EVENTS.alias("judgements")
RETRACTS = EVENTS.alias("retracts")
# Kinds stand in the text of a statement: a parameter could hide that a partial index fits.
_KIND = {kind: literal(kind, literal_execute=True) for kind in KINDS}
IS_JUDGEMENT = JUDGEMENTS.c.kind == _KIND["judgement"]
IS_RETRACTED = exists().where(
    RETRACTS.c.kind == _KIND["retract"], RETRACTS.c.ref == JUDGEMENTS.c.id
)
IS_TASK = TASKS.c.kind == _KIND["task"]
OF_TASK = and_(IS_TASK, TASKS.c.id == JUDGEMENTS.c.task_id)
# Built once: building them is most of the time that an event takes.
_FIND = select(EVENTS.c.kind, EVENTS.c.body).where(EVENTS.c.id == bindparam("id"))
_STANDING = select(JUDGEMENTS.c.id).where(
    IS_JUDGEMENT,
    JUDGEMENTS.c.task_id == bindparam("task_id"),
    JUDGEMENTS.c.annotator == bindparam("annotator"),
    ~IS_RETRACTED,
)
_INSERT = insert(EVENTS)


def find(connection: Connection, event_id: str) -> AnyEvent | None:
    """The event of an id."""
    row = connection.execute(_FIND, {"id": event_id}).first()
    return None if row is None else KINDS[row.kind].model_validate_json(row.body)


def take(connection: Connection, event: Task | Judgement | Retract) -> bool:
    """Check an event and store it; False where it was there already.

    Raises:
        EventRefused: it contradicts what the store holds.
    """
    known = find(connection, event.id)
    if known is not None:
        if _about(known) != _about(event):
            raise EventRefused(f"The id {event.id} belongs to another event. Make a new one.")
        return False
    if isinstance(event, Judgement):
        _check_judgement(connection, event)
    elif isinstance(event, Retract):
        _check_retract(connection, event)
    elif isinstance(event, Task):
        _check_task(connection, event)
    else:
        raise EventRefused(f"An event of kind {event.kind} is made by the store alone.")
    append(connection, event)
    return True


def _about(event: AnyEvent) -> tuple[Any, ...]:
    """What two sendings of one event have in common."""
    of = getattr(event, "ref", getattr(event, "task_id", None))
    return event.kind, event.annotator, of


def append(connection: Connection, event: AnyEvent) -> None:
    """Store an event as it is."""
    task = event if isinstance(event, Task) else None
    row = {
        "id": event.id,
        "kind": event.kind,
        "task_id": event.task_id if isinstance(event, Judgement) else None,
        "ref": event.ref if isinstance(event, Retract) else None,
        "annotator": event.annotator,
        "mode": task.mode if task else None,
        "prompt_sha256": task.prompt_sha256 if task else None,
        "ts": event.ts,
        # ASCII, so that any character of an answer, NUL too, passes through any database.
        "body": json.dumps(event.model_dump(mode="json")),
    }
    connection.execute(_INSERT, row)


def _check_task(connection: Connection, task: Task) -> None:
    if task.repeat_of is None:
        return
    first = find(connection, task.repeat_of)
    if not isinstance(first, Task):
        raise EventRefused(f"The task {task.id} repeats {task.repeat_of}, which is no known task.")
    if {r.rid: r.text for r in first.responses} != {r.rid: r.text for r in task.responses}:
        raise EventRefused(f"The task {task.id} repeats {first.id}, but has other answers.")


def _check_judgement(connection: Connection, judgement: Judgement) -> None:
    task = find(connection, judgement.task_id)
    if not isinstance(task, Task):
        raise EventRefused(f"There is no task {judgement.task_id} to judge. Ask for a new one.")
    reason = why_refused(task, judgement)
    if reason is not None:
        raise EventRefused(f"The judgement of task {task.id} is refused: {reason}.")
    whose = {"task_id": task.id, "annotator": judgement.annotator}
    if connection.scalar(_STANDING, whose) is not None:
        raise EventRefused(
            f"The task {task.id} is judged already by {judgement.annotator}. Retract that "
            f"judgement first."
        )


def _check_retract(connection: Connection, retract: Retract) -> None:
    judgement = find(connection, retract.ref)
    # Another's judgement is not told apart from none: ids are nobody else's business.
    if not isinstance(judgement, Judgement) or judgement.annotator != retract.annotator:
        raise EventRefused(f"There is no judgement {retract.ref} of yours to take back.")
    done = select(EVENTS.c.id).where(EVENTS.c.kind == "retract", EVENTS.c.ref == judgement.id)
    if connection.scalar(done) is not None:
        raise EventRefused(f"The judgement {judgement.id} was taken back already.")
