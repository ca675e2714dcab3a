"""Answers become tasks of the store, and what a browser sends becomes a judgement of one.

Nothing here takes an answer, an adapter or a person from the browser: a browser names a task, and
letters of answers as they lie on the screen; everything else is looked up.
"""

import json
import random
import re
import string
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_rlhf.data.records import prompt_key
from lora_rlhf.errors import UserError
from lora_rlhf.preferences.events import (
    FLAGS,
    Flag,
    Judgement,
    Response,
    Retract,
    Sampler,
    SamplingFacts,
    Task,
    new_id,
)
from ui.asking import Ask, Engine, Row
from ui.people import Person
from ui.studio import Studio
from ui.words import plain

LETTERS = string.ascii_uppercase
Mode = Literal["pair", "rank", "chat"]
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
_VOTES = uuid.UUID("5f0c4d4e-6f1e-4b9c-9a54-2f6d2c6b7a10")
_LONGEST_NOTE = 2000
_A_DAY_MS = 86_400_000


class Refused(UserError):
    """A vote that cannot be taken as it was sent."""


class JudgedAlready(Refused):
    """Another vote of this person on the task stands."""


@dataclass(frozen=True)
class Client:
    """What the browser says of how a judgement came about; only its shape is checked.

    Attributes:
        ms: from shown to done.
        keys: pressed or tapped.
        device: desktop or mobile.
    """

    ms: int | None = None
    keys: int | None = None
    device: Literal["desktop", "mobile"] | None = None

    @classmethod
    def parse(cls, sent: Any) -> "Client":
        """From a dict or JSON of one; whatever does not fit counts as not said."""
        if isinstance(sent, str):
            try:
                sent = json.loads(sent)
            except (ValueError, RecursionError):
                sent = {}
        if not isinstance(sent, dict):
            return cls()
        device = sent.get("device")
        return cls(
            ms=_count(sent.get("ms"), _A_DAY_MS),
            keys=_count(sent.get("keys"), 10_000),
            device=device if device in ("desktop", "mobile") else None,
        )


def _count(value: Any, most: int) -> int | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and 0 <= value <= most else None


# -- tasks --------------------------------------------------------------------------------------


def make_task(
    studio: Studio,
    person: Person,
    mode: Mode,
    asks: Sequence[Ask],
    rows: Sequence[Row],
    *,
    source: str = "typed",
    blind: bool,
    sampler: Sampler | None = None,
    task_id: str | None = None,
) -> Task:
    """The record of what is shown, and stores it; rankings are laid out in random order.

    The sides of a pair are drawn before it streams: they must not change places at its end.
    """
    assert len(asks) == len(rows)
    places = list(range(len(rows)))
    if mode == "rank":
        random.SystemRandom().shuffle(places)
    shas = {entry.name: entry.sha256 for entry in studio.engine.registered()}
    messages = asks[0].messages
    task = Task(
        task_id=task_id or new_id(),
        mode=mode,
        annotator=person.name,
        blind=blind,
        prompt=messages,
        prompt_source=source,
        prompt_sha256=prompt_key(messages),
        sampler=sampler or Sampler(),
        responses=tuple(
            _response(i, place, ask, row, shas.get(ask.adapter))
            for i, (place, ask, row) in enumerate(zip(places, asks, rows, strict=True))
        ),
        app=studio.app_facts,
        **_backbone(studio.engine),
    )
    studio.store.add(task)
    return task


def _response(number: int, place: int, ask: Ask, row: Row, sha256: str | None) -> Response:
    assert row.finish is not None
    return Response(
        rid=f"r{number}",
        pos=place,
        adapter=ask.adapter,
        adapter_sha256=sha256,
        text=row.text,
        sampling=SamplingFacts(
            temperature=ask.temperature, top_p=ask.top_p, max_new_tokens=ask.max_new_tokens
        ),
        seed=ask.seed,
        n_tokens=row.n_tokens,
        finish_reason=row.finish,
        rm_adapter=row.rm_adapter,
        rm_score=row.score,
        kl_to_ref=row.kl,
        logprob=row.logprob,
    )


def _backbone(engine: Engine) -> dict[str, Any]:
    facts = engine.facts()
    return {
        "backbone": {
            "name": facts.model,
            "revision": facts.revision,
            "quant": facts.quantization,
        },
        "template_sha256": facts.template_sha256 or None,
    }


def again(studio: Studio, person: Person, task: Task) -> Task:
    """The same answers in another order, for agreement between people and with oneself."""
    places = [r.pos for r in task.responses]
    order = list(places)
    random.SystemRandom().shuffle(order)
    if order == places:
        order.reverse()
    copy = task.model_copy(
        update={
            "task_id": new_id(),
            "ts": time.time(),
            "annotator": person.name,
            "sampler": Sampler(strategy="repeat"),
            "repeat_of": task.repeat_of or task.task_id,
            "responses": tuple(
                r.model_copy(update={"pos": place})
                for r, place in zip(task.responses, order, strict=True)
            ),
        }
    )
    studio.store.add(copy)
    return copy


def as_shown(task: Task) -> list[Response]:
    """The answers by their place: the first is A."""
    return sorted(task.responses, key=lambda r: r.pos)


def own_task(studio: Studio, person: Person, task_id: Any, mode: Mode) -> Task:
    """A task that was made for this person.

    Raises:
        Refused: there is none of that id in this mode, or it is somebody else's.
    """
    is_id = isinstance(task_id, str) and _ID.fullmatch(task_id) is not None
    task = studio.store.task(task_id) if is_id else None
    if task is None or task.annotator != person.name or task.mode != mode:
        raise Refused("There is nothing to vote on here. Ask first, or reload the page.")
    return task


# -- judgements ---------------------------------------------------------------------------------


def rids_of(task: Task, letters: Any) -> tuple[tuple[str, ...], ...]:
    """Tie groups of rids from tie groups of letters, best first.

    Raises:
        Refused: not a list of lists that names each answer once.
    """
    shown = {LETTERS[r.pos]: r.rid for r in task.responses}
    if not isinstance(letters, list) or not all(isinstance(g, list) and g for g in letters):
        raise Refused("The ranking did not arrive whole. Rank again.")
    named = [letter for group in letters for letter in group]
    if not all(isinstance(n, str) for n in named) or sorted(named) != sorted(shown):
        raise Refused(f"The ranking must name each of {', '.join(sorted(shown))} once. Rank again.")
    return tuple(tuple(shown[letter] for letter in group) for group in letters)


def judge(
    studio: Studio,
    person: Person,
    task: Task,
    *,
    ranking: tuple[tuple[str, ...], ...] = (),
    outcome: Literal["decided", "tie", "both_bad", "skip"],
    strength: Literal[-1, 1, 2] | None = None,
    flags: Sequence[Any] = (),
    note: Any = "",
    client: Client | None = None,
    scores_visible: bool = False,
) -> Judgement:
    """Store what a person said of their task; it is on the disk when this returns.

    Sent twice it is one judgement. Who has taken one back has seen who wrote what, so that their
    next one of the task is not blind.

    Raises:
        JudgedAlready: they said something else before, which stands.
        UserError: the store refuses it.
    """
    client = client or Client()
    now = time.time()
    taken_back = studio.store.retracted(task.task_id, person.name)
    has_scores = any(r.rm_score is not None or r.kl_to_ref is not None for r in task.responses)
    judgement = Judgement(
        id=_vote_id(person, task, taken_back),
        task_id=task.task_id,
        annotator=person.name,
        session=person.session,
        blind=task.blind and not taken_back,
        type="like" if task.mode == "chat" else task.mode,
        ranking=ranking,
        outcome=outcome,
        strength=strength,
        flags=_flags(flags),
        note=plain(note)[:_LONGEST_NOTE],
        shown_ts=task.ts,
        done_ts=now,
        client_ms=client.ms,
        server_ms=max(0, int(1000 * (now - task.ts))),
        keys=client.keys,
        device=client.device,
        scores_visible=scores_visible or (taken_back > 0 and has_scores),
    )
    if studio.store.add(judgement):
        return judgement
    first = studio.store.judgement(judgement.id)
    if first is None or _content(first) != _content(judgement):
        raise JudgedAlready("You have voted on this already, and that vote stands. Undo it first.")
    return first


def standing(studio: Studio, person: Person, task_id: str) -> Judgement | None:
    """What this person says of a task, unless they took it back."""
    task = studio.store.task(task_id)
    if task is None:
        return None
    taken_back = studio.store.retracted(task_id, person.name)
    return studio.store.judgement(_vote_id(person, task, taken_back))


def _vote_id(person: Person, task: Task, taken_back: int) -> str:
    """Of this person's vote on a task: the same for a double click, new after each undo."""
    return uuid.uuid5(_VOTES, f"{task.task_id}/{person.name}/{taken_back}").hex


def _content(judgement: Judgement) -> tuple[Any, ...]:
    return judgement.ranking, judgement.outcome, judgement.strength, judgement.flags


def take_back(studio: Studio, person: Person, judgement_id: str) -> None:
    """Retract a judgement of this person.

    Raises:
        UserError: there is none, it is another's, or it was taken back already.
    """
    studio.store.add(Retract(ref=judgement_id, annotator=person.name))


def _flags(sent: Sequence[Any]) -> tuple[Flag, ...]:
    wrong = [flag for flag in sent if flag not in get_args(Flag)]
    if wrong:
        raise Refused(f"{str(wrong[0])[:40]!r} is no flag. Allowed: {', '.join(FLAGS)}.")
    return tuple(dict.fromkeys(sent))
