"""What the Compare tab does: two answers in one batch, a vote on them. Knows no browser."""

import html
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_rlhf.data.records import Messages, prompt_key, user
from lora_rlhf.errors import ConfigError, UserError
from lora_rlhf.preferences.events import Response, Task
from ui.asking import Ask, PoolPrompt, Row, Waiting, finished
from ui.chatting import Controls, Talk
from ui.people import Person
from ui.studio import Studio
from ui.tasks import Client, as_shown, judge, make_task, own_task, take_back
from ui.words import facts_text, plain, saved_text, waiting_text

_WHICH = "Which is better?"
_WHICH_NAMED = f"{_WHICH} Not blind: this vote will not count in the win rates."
TYPED, POOL = "my own prompt", "held-out prompts"
Vote = Literal["a", "b", "a_much", "b_much", "tie", "both_bad", "skip"]
_SIDES: dict[str, tuple[int, int | None]] = {
    "a": (0, None),
    "b": (1, None),
    "a_much": (0, 2),
    "b_much": (1, 2),
}
_SAID = {
    "a": "A is better",
    "b": "B is better",
    "a_much": "A is much better",
    "b_much": "B is much better",
    "tie": "Tie",
    "both_bad": "Both bad",
    "skip": "Skipped",
}


@dataclass(frozen=True)
class Pane:
    """What the tab shows; kept on the server.

    Attributes:
        prompt: as text.
        texts: of A and B.
        facts: under A and B: who it is and how it scores; "" while that is hidden.
        task_id: what a vote would be about.
        can_vote: both answers are whole, and nothing was said of them yet.
        can_undo: there is a vote to take back.
        drawn: prompts are drawn from the pool, and not typed.
        can_go_on: nothing waits for a vote, so that another prompt may be drawn.
        is_blind: the pair that waits for a vote hides who answers; None: there is none.
        box: what the Blind box is to say; None: what it says already.
        wish: what it said before the pair on the screen made it say something else.
        status: a sentence.
        tone: of the status: "", good or bad.
    """

    prompt: str = ""
    texts: tuple[str, str] = ("", "")
    facts: tuple[str, str] = ("", "")
    task_id: str | None = None
    can_vote: bool = False
    can_undo: bool = False
    drawn: bool = False
    can_go_on: bool = False
    is_blind: bool | None = None
    box: bool | None = None
    wish: bool | None = None
    status: str = "Ask both: type a prompt, or take one of the pool."
    tone: str = ""


# -- handlers -----------------------------------------------------------------------------------


def ask_both(
    studio: Studio,
    person: Person,
    page: str,
    text: Any,
    source: Any,
    blind: bool,
    controls: tuple[Controls, Controls],
) -> Iterator[Pane]:
    """Stream two answers to one prompt in one batch, then store what was shown.

    Args:
        studio: the app.
        person: who asks.
        page: of theirs.
        text: the prompt, where they type their own.
        source: TYPED or POOL.
        blind: hide who answers, on random sides, until the vote.
        controls: of the two answers; only the adapter may differ.

    Raises:
        UserError: no prompt, the same adapter twice, or what the engine refuses.
    """
    first, second = controls
    if first.adapter == second.adapter:
        raise ConfigError("Choose two different adapters to compare.")
    prompt = _prompt(studio, person, text, source)
    seed = first.seed if first.seed is not None else random.SystemRandom().randrange(2**31)
    asks = [_ask(c, prompt.messages, seed + i) for i, c in enumerate(controls)]
    if blind:
        random.SystemRandom().shuffle(asks)
    yield from _stream(studio, person, page, asks, prompt, blind)


def _stream(
    studio: Studio, person: Person, page: str, asks: list[Ask], prompt: PoolPrompt, blind: bool
) -> Iterator[Pane]:
    pane = _asked(studio, person, prompt.messages)
    yield pane
    rows: list[Row] = []
    try:
        for item in studio.answers(person.name, f"compare/{page}", asks):
            if isinstance(item, Waiting):
                yield replace(pane, status=waiting_text(item))
                continue
            rows = item
            pane = replace(pane, texts=_texts(rows), status="Both answer, in one batch.")
            yield pane
    except UserError:
        yield replace(pane, status="Not answered.", tone="bad", can_go_on=True)
        raise
    if any(row.finish is None for row in rows) or not rows:
        raise ConfigError("The answers did not end. Ask again.")
    task = make_task(studio, person, "pair", asks, rows, source=prompt.source, blind=blind)
    yield show(studio, person, task)


def _asked(studio: Studio, person: Person, messages: Messages) -> Pane:
    can_undo = studio.store.last(person.name, "pair") is not None
    return Pane(prompt=_shown(messages), can_undo=can_undo, status="Asked both.")


def _ask(controls: Controls, messages: Messages, seed: int) -> Ask:
    return Ask(
        adapter=controls.adapter,
        messages=messages,
        temperature=controls.temperature,
        top_p=controls.top_p,
        max_new_tokens=controls.max_new_tokens,
        seed=seed % 2**31,
    )


def _prompt(studio: Studio, person: Person, text: Any, source: Any) -> PoolPrompt:
    """The typed prompt, or one of the held-out pool that this person has not judged yet."""
    if source != POOL:
        typed = plain(text).strip()
        if not typed:
            raise ConfigError("Type a prompt first, or take one of the pool.")
        return PoolPrompt(user(typed), "typed")
    pool = studio.engine.pool("heldout")
    if not pool:
        raise ConfigError(
            "There is no held-out prompt that no open run was trained on. Type a prompt instead."
        )
    seen = studio.seen(person.name, "pair")
    left = [p for p in pool if prompt_key(p.messages) not in seen]
    if not left:
        raise ConfigError(f"You have judged all {len(pool)} held-out prompts. Thank you.")
    return random.SystemRandom().choice(left)


def show(studio: Studio, person: Person, task: Task) -> Pane:
    """A stored pair as it lies on the screen, before the vote."""
    a, b = as_shown(task)
    can_vote = not task.unfinished
    facts = ("", "") if task.blind else (_facts(a), _facts(b))
    status = _WHICH if task.blind else _WHICH_NAMED
    return Pane(
        prompt=_shown(task.prompt),
        texts=(_text_of(a), _text_of(b)),
        facts=facts,
        task_id=task.task_id,
        can_vote=can_vote,
        can_undo=studio.store.last(person.name, "pair") is not None,
        can_go_on=not can_vote,
        is_blind=task.blind,
        status=status if can_vote else "Stopped: stopped answers are not voted on.",
    )


def vote(studio: Studio, person: Person, pane: Pane, said: Vote, client: Any) -> Pane:
    """Store a vote and reveal who answered.

    Raises:
        UserError: nothing to vote on, another's task, or a second vote.
    """
    task = own_task(studio, person, pane.task_id, "pair")
    a, b = as_shown(task)
    outcome: Literal["decided", "tie", "both_bad", "skip"] = "decided"
    ranking: tuple[tuple[str, ...], ...] = ((a.rid, b.rid),)
    strength: Literal[2] | None = None
    if said in _SIDES:
        winner, much = _SIDES[said]
        order = (a, b) if winner == 0 else (b, a)
        ranking = tuple((r.rid,) for r in order)
        strength = 2 if much else None
    elif said == "skip":
        outcome, ranking = "skip", ()
    elif said in ("tie", "both_bad"):
        outcome = "tie" if said == "tie" else "both_bad"
    else:
        raise ConfigError("That is no vote.")
    stored = judge(
        studio,
        person,
        task,
        ranking=ranking,
        outcome=outcome,
        strength=strength,
        client=Client.parse(client),
        scores_visible=not task.blind,
    )
    status, tone = saved_text(_SAID[said], task, stored)
    return replace(
        pane,
        facts=(_facts(a), _facts(b)),
        can_vote=False,
        can_undo=True,
        can_go_on=True,
        is_blind=None,
        status=f"{status}{_agreed(task, stored.ranking)}",
        tone=tone,
    )


def undo(studio: Studio, person: Person) -> Pane:
    """Take the last vote on a pair back, and show that pair again.

    Raises:
        UserError: there is none.
    """
    last = studio.store.last(person.name, "pair")
    if last is None:
        raise ConfigError("There is no vote of yours to take back.")
    take_back(studio, person, last.judgement.id)
    status = "Taken back. Vote again."
    if last.task.blind:
        status += " You have seen who answered, so it will not count in the win rates."
    return replace(show(studio, person, last.task), status=status)


def restore(studio: Studio, person: Person) -> Pane:
    """What a page shows when it is opened: the pair that waits for this person's vote, if any."""
    task = studio.store.open_task(person.name, "pair")
    if task is not None and not task.unfinished and not _is_met(studio, person, task):
        pane = replace(show(studio, person, task), drawn=_is_drawn(task))
        return replace(pane, status=f"This pair waits for your vote. {pane.status}")
    return Pane(can_undo=studio.store.last(person.name, "pair") is not None)


def _is_met(studio: Studio, person: Person, task: Task) -> bool:
    """Whether its prompt came out of the pool again, and was judged so, after it was left open."""
    return _is_drawn(task) and task.prompt_sha256 in studio.store.judged_prompts(person.name)


def _is_drawn(task: Task) -> bool:
    return task.prompt_source.startswith("pool:")


def compare_turn(
    studio: Studio, person: Person, page: str, talk: Talk, other: Any, stop_at: str = "compare"
) -> Iterator[Pane]:
    """Answer the last turn of a chat with another adapter, beside the answer there is.

    Raises:
        UserError: no whole answer to compare with, or the same adapter.
    """
    turn = next((t for t in reversed(talk.turns) if t.row is not None), None)
    if turn is None or turn.row is None or turn.ask is None:
        raise ConfigError("Chat first: there is no answer to compare yet.")
    if not finished([turn.row]):
        raise ConfigError("The answer was stopped. Draw a whole one first, then compare it.")
    if other == turn.ask.adapter:
        raise ConfigError(f"{other} gave that answer. Choose another one to compare with.")
    asks = [turn.ask, replace(turn.ask, adapter=str(other))]
    pane = replace(_asked(studio, person, turn.ask.messages), texts=(turn.row.text, ""))
    yield pane
    row: Row | None = None
    try:
        for item in studio.answers(person.name, f"{stop_at}/{page}", [asks[1]]):
            if isinstance(item, Waiting):
                yield replace(pane, status=waiting_text(item))
                continue
            row = item[0]
            yield replace(pane, texts=(turn.row.text, row.text), status=f"{row.adapter} answers.")
    except UserError:
        yield replace(pane, status="Not answered.", tone="bad", can_go_on=True)
        raise
    if row is None or row.finish is None:
        raise ConfigError("The answer did not end. Ask again.")
    task = make_task(studio, person, "pair", asks, [turn.row, row], source="chat", blind=False)
    pane = show(studio, person, task)
    yield replace(
        pane, status=f"You know A from Chat. {pane.status}" if pane.can_vote else pane.status
    )


def carry(pane: Pane, before: Pane, box: bool) -> Pane:
    """A pane to be shown, and what outlasts the pair on it.

    The Blind box says of a pair that waits for a vote what is stored of it; then what it said.

    Args:
        pane: to be shown.
        before: shown until now.
        box: what the Blind box says now.
    """
    wish = box if before.wish is None else before.wish
    pane = replace(pane, drawn=before.drawn)
    if pane.is_blind is None or pane.is_blind == wish:
        return replace(pane, box=None if before.wish is None else wish, wish=None)
    return replace(pane, box=pane.is_blind, wish=wish)


# -- words --------------------------------------------------------------------------------------


def _shown(messages: Messages) -> str:
    """The dialogue before the answer; one turn stands alone."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _texts(rows: list[Row]) -> tuple[str, str]:
    a, b = rows
    return a.text, b.text


def _text_of(response: Response) -> str:
    return response.text + (" *(stopped)*" if response.finish_reason == "stopped" else "")


def _facts(response: Response) -> str:
    name = response.adapter or "base"
    numbers = facts_text(
        response.n_tokens, response.rm_score, response.kl_to_ref, response.finish_reason
    )
    return f"<b>{html.escape(name)}</b> <span>{html.escape(numbers)}</span>"


def _agreed(task: Task, ranking: tuple[tuple[str, ...], ...]) -> str:
    """Whether the reward model ordered the pair as the person did."""
    if len(ranking) != 2:
        return ""
    better, worse = (task.response(group[0]) for group in ranking)
    if better.rm_adapter != worse.rm_adapter:  # one was scored before another model was adopted
        return ""
    if better.rm_score is None or worse.rm_score is None or better.rm_score == worse.rm_score:
        return ""
    return f" The reward model {'agrees' if better.rm_score > worse.rm_score else 'disagrees'}."
