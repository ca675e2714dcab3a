"""What the Chat tab does: answer, retry, edit, undo, like. Knows no browser."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lora_rlhf.data.records import Message
from lora_rlhf.errors import ConfigError, UserError
from lora_rlhf.preferences.events import new_id
from ui.asking import Ask, Row, Waiting, finished
from ui.people import Person
from ui.studio import Studio
from ui.tasks import judge, make_task, standing, take_back
from ui.words import facts_text, plain, waiting_text

MOST_BEST_OF = 9  # answers that the engine decodes in one batch
_LIKE: dict[str, Literal[-1, 1]] = {"Like": 1, "Dislike": -1}


@dataclass(frozen=True)
class Controls:
    """What the panel says; everything is checked again by the engine."""

    adapter: str
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int | None
    best_of: int = 1


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        text: the question.
        ask: what the answer was asked with; None while there is none.
        row: the answer.
        retries: answers drawn before this one, so that a retry with a fixed seed is another one.
        task_id: under which it is stored once it is liked; made here, so that a like sent twice,
            or from a page that has not heard of the first, is one.
        liked: 1, -1 or None.
    """

    text: str
    ask: Ask | None = None
    row: Row | None = None
    retries: int = 0
    task_id: str = field(default_factory=new_id)
    liked: int | None = None


@dataclass(frozen=True)
class Talk:
    """A dialogue, kept on the server: a browser cannot change what was said.

    Attributes:
        turns: oldest first.
        status: a sentence.
        unsent: a question that was not answered, to be typed again.
    """

    turns: tuple[Turn, ...] = ()
    status: str = field(default="", compare=False)
    unsent: str = field(default="", compare=False)

    def messages_before(self, number: int) -> list[Message]:
        """All turns before turn `number` that were answered."""
        found: list[Message] = []
        for turn in self.turns[:number]:
            if turn.row is not None and turn.row.text.strip():
                found.append({"role": "user", "content": turn.text})
                found.append({"role": "assistant", "content": turn.row.text})
        return found

    def display(self) -> list[Any]:
        """As gr.Chatbot shows it; what is not part of an answer stands in its title."""
        shown: list[Any] = []
        for turn in self.turns:
            shown.append({"role": "user", "content": turn.text})
            if turn.row is not None:
                text = turn.row.text or ("\u2026" if turn.row.finish is None else "*(empty)*")
                if turn.row.finish == "stopped":
                    text += " *(stopped)*"
                shown.append({"role": "assistant", "content": text})
        return shown

    def feedback(self) -> list[str | None]:
        """What was said of each shown message, as gr.Chatbot wants it."""
        shown: list[str | None] = []
        for turn in self.turns:
            shown.append(None)
            if turn.row is not None:
                name = {1: "Like", -1: "Dislike"}.get(turn.liked or 0)
                shown.append(name)
        return shown


# -- handlers -----------------------------------------------------------------------------------


def send(
    studio: Studio, person: Person, page: str, talk: Talk, text: Any, controls: Controls
) -> Iterator[Talk]:
    """Answer a message, streaming.

    Raises:
        UserError: an empty message, or what the engine refuses.
    """
    yield from _answer(studio, person, page, talk, talk, Turn(_question(text)), controls)


def retry(
    studio: Studio, person: Person, page: str, talk: Talk, index: Any, controls: Controls
) -> Iterator[Talk]:
    """Draw another answer to the turn that message `index` belongs to; later turns are dropped."""
    number = turn_of(talk, index)
    old = talk.turns[number]
    before = Talk(talk.turns[:number])
    again = Turn(old.text, retries=old.retries + 1)
    yield from _answer(studio, person, page, talk, before, again, controls)


def edit(
    studio: Studio, person: Person, page: str, talk: Talk, index: Any, text: Any, controls: Controls
) -> Iterator[Talk]:
    """Ask a changed question in place of an old one; later turns are dropped."""
    number = turn_of(talk, index)
    before = Talk(talk.turns[:number])
    yield from _answer(studio, person, page, talk, before, Turn(_question(text)), controls)


def _question(text: Any) -> str:
    text = plain(text).strip()
    if not text:
        raise ConfigError("Type a message first.")
    return text


def undo(talk: Talk, index: Any) -> tuple[Talk, str]:
    """Take a turn and all later ones back; the dialogue and the question, to be typed again."""
    number = turn_of(talk, index)
    return Talk(talk.turns[:number]), talk.turns[number].text


def like(studio: Studio, person: Person, talk: Talk, index: Any, value: Any) -> Talk:
    """Store that an answer was liked or disliked; the opposite, or neither, takes it back first.

    Args:
        studio: the app.
        person: whose like it is.
        talk: the dialogue.
        index: of the message, as the browser says.
        value: Like, Dislike, or anything else for neither.

    Raises:
        UserError: an answer that was stopped, or none.
    """
    number = turn_of(talk, index)
    turn = talk.turns[number]
    if turn.row is None or turn.ask is None or not finished([turn.row]):
        raise ConfigError("Only a whole answer can be liked; this one was stopped.")
    wanted = _LIKE.get(value) if isinstance(value, str) else None
    # The store knows better than the page, which may be older than its last like.
    before = standing(studio, person, turn.task_id)
    if before is not None and before.strength != wanted:
        take_back(studio, person, before.id)
    if wanted is not None and (before is None or before.strength != wanted):
        _store_like(studio, person, turn.task_id, turn.ask, turn.row, wanted)
    turns = list(talk.turns)
    turns[number] = replace(turn, liked=wanted)
    said = {1: "Liked, and stored.", -1: "Disliked, and stored."}.get(wanted or 0, "Taken back.")
    return Talk(tuple(turns), said)


def _store_like(
    studio: Studio, person: Person, task_id: str, ask: Ask, row: Row, wanted: Literal[-1, 1]
) -> None:
    task = make_task(studio, person, "chat", [ask], [row], blind=False, task_id=task_id)
    judge(
        studio,
        person,
        task,
        ranking=((task.responses[0].rid,),),
        outcome="decided",
        strength=wanted,
        scores_visible=row.score is not None or row.kl is not None,
    )


def turn_of(talk: Talk, index: Any) -> int:
    """The turn that a shown message belongs to; the last one for anything that is no index."""
    if isinstance(index, list | tuple) and index:
        index = index[0]
    owners = [n for n, turn in enumerate(talk.turns) for _ in range(1 + (turn.row is not None))]
    if not owners:
        raise ConfigError("There is nothing said yet.")
    is_index = isinstance(index, int) and not isinstance(index, bool)
    return owners[index] if is_index and 0 <= index < len(owners) else owners[-1]


def _answer(
    studio: Studio,
    person: Person,
    page: str,
    old: Talk,
    before: Talk,
    turn: Turn,
    controls: Controls,
) -> Iterator[Talk]:
    """Answer a turn after those before it; what cannot be answered leaves the old dialogue."""
    _require_a_chooser(studio, controls)
    number = len(before.turns)
    history = before.messages_before(number)
    asked: Message = {"role": "user", "content": turn.text}
    first = _seed(controls.seed, number, turn.retries)
    asks = [
        Ask(
            adapter=controls.adapter,
            messages=(*history, asked),
            temperature=controls.temperature,
            top_p=controls.top_p,
            max_new_tokens=controls.max_new_tokens,
            seed=(first + 15_485_863 * i) % 2**31,
        )
        for i in range(controls.best_of)
    ]
    turn = replace(turn, ask=asks[0], row=Row(controls.adapter))
    talk = Talk((*before.turns, turn), "Asked.")
    yield talk
    try:
        for item in studio.answers(person.name, f"chat/{page}", asks):
            if isinstance(item, Waiting):
                talk = replace(talk, status=waiting_text(item))
            else:
                best, row, status = _best(item)
                turn = replace(turn, ask=asks[best], row=row)
                talk = Talk((*before.turns, turn), status)
            yield talk
    except UserError:
        yield replace(old, status="Not answered.", unsent=turn.text)
        raise


def _require_a_chooser(studio: Studio, controls: Controls) -> None:
    """Refuse best-of-n where nothing could choose, or nothing would differ.

    Raises:
        ConfigError: no reward adapter, or temperature 0.
    """
    if controls.best_of == 1:
        return
    if studio.engine.reward_adapter() is None:
        raise ConfigError(
            f"Best of {controls.best_of} is chosen by a reward adapter, and no run that is open "
            f"has one. Train one, or set Best of to 1."
        )
    if controls.temperature == 0:
        raise ConfigError("At temperature 0 all answers are the same. Raise it, or ask for one.")


def _best(rows: Sequence[Row]) -> tuple[int, Row, str]:
    """Which row is shown, the row, and its status; of several none before all are judged."""
    if len(rows) == 1:
        return 0, rows[0], _status(rows[0])
    adapter, count = rows[0].adapter, len(rows)
    if any(row.finish is None for row in rows):
        written = sum(row.n_tokens for row in rows)
        return 0, Row(adapter), f"{adapter} writes {count} answers \u00b7 {written} tokens"
    scores = {i: row.score for i, row in enumerate(rows) if row.score is not None}
    if not scores:
        return 0, rows[0], f"{_status(rows[0])} \u00b7 the first of {count}, none has a score"
    best = max(scores, key=lambda i: scores[i])
    return best, rows[best], f"{_status(rows[best])} \u00b7 the best of {len(scores)} by reward"


def _status(row: Row) -> str:
    if row.finish is None:
        return f"{row.adapter} answers \u00b7 {row.n_tokens} tokens"
    old = "oldest turn was" if row.dropped == 1 else f"oldest {row.dropped} turns were"
    left_out = f" \u00b7 the {old} left out" if row.dropped else ""
    facts = facts_text(row.n_tokens, row.score, row.kl, row.finish)
    return f"{row.adapter} \u00b7 {facts}{left_out}"


def _seed(seed: int | None, number: int, retries: int) -> int:
    """The seed of an answer: drawn, or made of the fixed one, the turn and the retry."""
    if seed is None:
        return random.SystemRandom().randrange(2**31)
    return (seed + 1_000_003 * number + 7_919 * retries) % 2**31


def controls_of(
    adapter: Any, temperature: Any, top_p: Any, length: Any, seed: Any, best_of: Any = 1
) -> Controls:
    """What the panel holds, as numbers.

    Raises:
        ConfigError: a field that is no number, or too many answers at once.
    """
    sent = (temperature, top_p, length, seed, best_of)
    try:
        if any(isinstance(value, bool) for value in sent):
            raise ValueError("found yes or no")
        fixed = None if seed in (None, "") else int(seed)
        many = 1.0 if best_of in (None, "") else float(best_of)
        given = plain(adapter), float(temperature), float(top_p), int(length), fixed
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"Temperature, top-p, length, seed and best of must be numbers ({str(error)[:80]})."
        ) from error
    if not (many.is_integer() and 1 <= many <= MOST_BEST_OF):
        raise ConfigError(f"Best of is {many:g}. Allowed: whole numbers, 1 to {MOST_BEST_OF}.")
    return Controls(*given, best_of=int(many))
