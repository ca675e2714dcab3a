"""What the Rank tab does: the next task, a ranking of it, undo. Knows no browser."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lora_rlhf.errors import ConfigError
from lora_rlhf.preferences.choice import Candidate, choose
from lora_rlhf.preferences.events import Sampler, Task
from lora_rlhf.preferences.store import Judged
from ui.ahead import Plan, Prepared
from ui.people import Person
from ui.ranked import Reveal, reveal, tally
from ui.studio import Studio
from ui.tasks import (
    LETTERS,
    Client,
    JudgedAlready,
    Refused,
    again,
    as_shown,
    judge,
    make_task,
    own_task,
    rids_of,
    take_back,
)
from ui.words import plain, saved_text

FEWEST, MOST = 2, 9
_LOOK_SECONDS = 0.25
_REPEAT_AFTER = 10  # judgements between a task and its repeat
Outcome = Literal["decided", "tie", "both_bad", "skip"]
_SAID = {"tie": "All tie", "both_bad": "All bad", "skip": "Skipped", "decided": "Ranked"}


@dataclass(frozen=True)
class Sheet:
    """What the tab shows; kept on the server.

    Attributes:
        task_id: what a ranking would be of; None while the next task is made.
        prompt: as text.
        answers: by their letters.
        status: a sentence.
        tone: of the status: "", good or bad.
        reveal: who wrote the answers of the task before.
        ready: tasks that lie ready behind this one.
        can_undo: there is a ranking to take back.
        failed: there is no next task, and the status says why.
        tally: what this person has done, in a line.
    """

    task_id: str | None = None
    prompt: str = ""
    answers: tuple[dict[str, str], ...] = ()
    status: str = "The first answers are being made."
    tone: str = ""
    reveal: Reveal | None = None
    ready: int = 0
    can_undo: bool = False
    failed: bool = False
    tally: str = field(default="", compare=False)

    def for_browser(self) -> dict[str, Any]:
        """What the page is sent: no adapter of an answer that is not judged yet is in it."""
        return {
            "task": self.task_id or "",
            "prompt": self.prompt,
            "answers": list(self.answers),
            "status": self.status,
            "tone": self.tone,
            "reveal": asdict(self.reveal) if self.reveal else None,
            "ready": self.ready,
            "undo": self.can_undo,
            "failed": self.failed,
            "tally": self.tally,
        }


def plan_of(
    studio: Studio,
    person: Person,
    adapters: Any,
    answers: Any,
    temperature: Any,
    top_p: Any,
    length: Any,
) -> Plan:
    """What the panel asks for.

    Raises:
        ConfigError: an unknown adapter, none, or a number out of range.
    """
    names = studio.engine.answerers()
    chosen = [plain(a) for a in adapters] if isinstance(adapters, list | tuple) else []
    unknown = [a for a in chosen if a not in names]
    if unknown or not chosen:
        found = unknown[0][:80] if unknown else "none chosen"
        raise ConfigError(f"Who answers: {found}. Allowed: one or more of {', '.join(names)}.")
    try:
        if any(isinstance(value, bool) for value in (answers, temperature, top_p, length)):
            raise ValueError("found yes or no")
        plan = Plan(
            who=person.name,
            adapters=tuple(sorted(set(chosen))),
            answers=int(answers),
            temperature=float(temperature),
            top_p=float(top_p),
            max_new_tokens=int(length),
            version=studio.engine.version(),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError("Answers, temperature, top-p and length must be numbers.") from error
    if not FEWEST <= plan.answers <= MOST:
        raise ConfigError(f"{plan.answers} answers. Allowed: {FEWEST} to {MOST}.")
    if not 0.0 < plan.temperature < math.inf:
        raise ConfigError("Temperature 0 gives the same answer each time. Allowed: above 0.")
    if not 0.0 < plan.top_p <= 1.0:
        raise ConfigError("Top-p keeps the likeliest tokens of that share. Allowed: above 0 to 1.")
    return plan


# -- the next task ------------------------------------------------------------------------------


def next_sheet(
    studio: Studio, person: Person, plan: Plan, before: Sheet, active: bool = False
) -> Iterator[Sheet]:
    """The task that waits for this person, else a new one, waiting until one is made.

    Where none can be made, the last sheet says why.
    """
    while True:
        # Anew each time: adapters may be adopted meanwhile, or another page want something else.
        plan = replace(plan, version=studio.engine.version())
        studio.ahead.want(plan, lambda: studio.seen(person.name, "rank"))
        sheet = ready_sheet(studio, person, plan, before, active)
        if sheet is not None:
            yield sheet
            return
        state = studio.engine.state()
        text = "The next answers are being made." if state == "ready" else state
        yield _without_task(before, text)
        failed = studio.ahead.wait(plan, _LOOK_SECONDS)
        if failed:
            yield failed_sheet(before, failed)
            return


def failed_sheet(before: Sheet, why: str) -> Sheet:
    """What is shown where there is no next task."""
    return replace(_without_task(before, why), tone="bad", failed=True)


def _without_task(before: Sheet, status: str) -> Sheet:
    return replace(
        before, task_id=None, answers=(), prompt="", status=status, tone="", failed=False
    )


def ready_sheet(
    studio: Studio, person: Person, plan: Plan, before: Sheet, active: bool = False
) -> Sheet | None:
    """A task that can be shown at once; None where one must be made first."""
    task = studio.store.open_task(person.name, "rank")
    if task is None or task.unfinished:
        chance = studio.luck.get(person.name)
        if chance is None:
            chance = studio.luck[person.name] = random.SystemRandom().random()
        task = _seen_before(studio, person, chance) or _from_shelf(studio, person, plan, active)
        if task is not None:
            studio.luck.pop(person.name, None)  # another page of theirs may have been quicker
    return None if task is None else show(studio, person, plan, task, before)


def show(studio: Studio, person: Person, plan: Plan | None, task: Task, before: Sheet) -> Sheet:
    """A stored task as it lies on the screen."""
    answers = tuple(
        {
            "letter": LETTERS[r.pos],
            "text": r.text,
            "note": "cut at the length limit" if r.finish_reason == "length" else "",
        }
        for r in as_shown(task)
    )
    turns = task.prompt
    prompt = turns[0]["content"] if len(turns) == 1 else ""
    own = studio.judged_by(person.name, "rank")
    said = bool(before.tone) and not before.failed  # of the ranking before
    status = before.status if said else "Which is best? Press its letter, or tap."
    return replace(
        before,
        task_id=task.task_id,
        status=status,
        tone=before.tone if said else "",
        failed=False,
        prompt=prompt or "\n\n".join(f"{m['role']}: {m['content']}" for m in turns),
        answers=answers,
        ready=studio.ahead.ready(plan) if plan is not None else 0,
        can_undo=bool(own),
        tally=tally(own),
    )


def _from_shelf(studio: Studio, person: Person, plan: Plan, active: bool) -> Task | None:
    prepared, sampler = None, Sampler()
    if active:
        chosen = _choose(studio.ahead.candidates(plan))
        if chosen is None:
            return None
        wanted, sampler = chosen
        prepared = studio.ahead.take(plan, wanted, clear=sampler.strategy == "active")
    else:
        prepared = studio.ahead.take(plan)
    if prepared is None:
        return None
    return make_task(
        studio,
        person,
        "rank",
        prepared.asks,
        prepared.rows,
        source=prepared.prompt.source,
        blind=True,
        sampler=sampler,
    )


def _choose(candidates: list[Prepared]) -> tuple[Prepared, Sampler] | None:
    """One of the tasks that lie ready, by the reward model's uncertainty, or at random."""
    if not candidates:
        return None
    made = [
        Candidate(
            scores=tuple(r.score * r.score_unit for r in c.rows if r.score is not None),
            lengths=tuple(row.n_tokens for row in c.rows if row.score is not None),
        )
        for c in candidates
    ]
    choice = choose(made, random.SystemRandom())
    return candidates[choice.index], choice.sampler


def _seen_before(studio: Studio, person: Person, chance: float) -> Task | None:
    """Now and then a task that was judged already: by others, or by oneself some time ago.

    Args:
        studio: the app.
        person: who gets it.
        chance: drawn from [0, 1) for this task.
    """
    settings = studio.settings
    if chance >= settings.overlap + settings.repeats:
        return None
    everything = [j for j in studio.judged() if _can_come_again(j)]
    own = [j for j in everything if j.judgement.annotator == person.name]
    if chance < settings.overlap:
        seen = studio.seen(person.name, "rank")
        others = [j.task for j in everything if j.judgement.annotator != person.name]
        found = [t for t in others if t.prompt_sha256 not in seen]
    else:
        times = Counter(_root(j.task) for j in own)
        found = [j.task for j in own[:-_REPEAT_AFTER] if times[_root(j.task)] == 1]
    return again(studio, person, random.SystemRandom().choice(found)) if found else None


def _can_come_again(judged: Judged) -> bool:
    sampled = judged.task.sampler.strategy != "import"
    return judged.task.mode == "rank" and sampled and judged.judgement.outcome != "skip"


def _root(task: Task) -> str:
    return task.repeat_of or task.task_id


# -- a ranking ----------------------------------------------------------------------------------


def submit(studio: Studio, person: Person, sheet: Sheet, sent: Any) -> Sheet:
    """Store a ranking; what is shown next has no task until `ready_sheet` or `next_sheet` gives it.

    Args:
        studio: the app.
        person: who ranked.
        sheet: what was shown.
        sent: of the browser: task (the id of what was ranked, where it says so), order (tie groups
            of letters, best first), outcome, flags, note, ms, keys, device.

    Raises:
        UserError: nothing to rank, or letters that do not fit.
    """
    if not isinstance(sent, dict):
        raise Refused("The ranking did not arrive whole. Rank again.")
    # A ranking that arrives late must not fall on the next task, whose letters are the same.
    task = own_task(studio, person, sent.get("task") or sheet.task_id, "rank")
    outcome, ranking = _said(task, sent)
    flags = sent.get("flags")
    try:
        stored = judge(
            studio,
            person,
            task,
            ranking=ranking,
            outcome=outcome,
            flags=flags if isinstance(flags, list) else (),
            note=sent.get("note"),
            client=Client.parse(sent),
        )
    except JudgedAlready:
        return replace(
            _without_task(sheet, "You have ranked that already, on another page."), tone="bad"
        )
    status, tone = saved_text(_SAID[outcome], task, stored)
    shown = _without_task(sheet, status)
    return replace(shown, tone=tone, reveal=reveal(task, stored), can_undo=True)


def _said(task: Task, sent: dict[str, Any]) -> tuple[Outcome, tuple[tuple[str, ...], ...]]:
    everything = (tuple(r.rid for r in as_shown(task)),)
    outcome = sent.get("outcome")
    if outcome == "skip":
        return "skip", ()
    if outcome == "both_bad":
        return "both_bad", everything
    if outcome != "decided":
        raise Refused("That is no ranking. Rank again.")
    ranking = rids_of(task, sent.get("order"))
    return ("tie", everything) if len(ranking) == 1 else ("decided", ranking)


def undo(studio: Studio, person: Person, plan: Plan | None, sheet: Sheet) -> Sheet:
    """Take the last ranking back and show its task again; the one on the screen comes after it.

    Raises:
        UserError: there is none.
    """
    last = studio.store.last(person.name, "rank")
    if last is None:
        raise ConfigError("There is no ranking of yours to take back.")
    take_back(studio, person, last.judgement.id)
    shown = show(studio, person, plan, last.task, replace(sheet, reveal=None))
    status = "Taken back. Rank it again; who wrote what was shown, so it will not count as blind."
    return replace(shown, status=status, tone="")
