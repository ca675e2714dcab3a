"""Ranking tasks made before they are asked for, so that nobody waits between two of them."""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lora_rlhf.data.records import prompt_key
from lora_rlhf.errors import ConfigError, UserError
from ui.asking import Ask, Engine, Paused, PoolPrompt, Row, Waiting, finished

DEPTH = 3
MOST_ALIKE = 8  # prompts in a row whose answers were all the same, before that is told
_FORGET_SECONDS = 600.0
_IDLE_SECONDS = 0.2
_CLOSE_SECONDS = 2.0


@dataclass(frozen=True)
class Plan:
    """What tasks a person wants next; tasks of one plan are interchangeable.

    Attributes:
        who: the person.
        adapters: who answers, each about equally often.
        answers: K.
        temperature: of sampling.
        top_p: of sampling.
        max_new_tokens: of each answer.
        pool: where the prompts come from.
        version: of the engine's adapters; older tasks are dropped.
    """

    who: str
    adapters: tuple[str, ...]
    answers: int
    temperature: float
    top_p: float
    max_new_tokens: int
    pool: str = "train"
    version: int = 0


@dataclass(frozen=True)
class Prepared:
    """A prompt and its finished answers, not shown to anybody yet."""

    prompt: PoolPrompt
    asks: list[Ask]
    rows: list[Row]


@dataclass
class _Shelf:
    """What is ready for a plan, and which prompts it must not ask again."""

    seen: Callable[[], set[str]]
    ready: list[Prepared] = field(default_factory=list)
    wanted_at: float = field(default_factory=time.monotonic)
    waiting: int = 0
    alike: int = 0
    failed: str = ""


class Ahead:
    """Keeps a few tasks ready for every plan that is in use, giving way to everybody who waits.

    Args:
        engine: makes the answers.
        depth: tasks kept ready a plan.
    """

    def __init__(self, engine: Engine, depth: int = DEPTH) -> None:
        self._engine = engine
        self.depth = depth
        self._shelves: dict[Plan, _Shelf] = {}
        self._taken: defaultdict[str, set[str]] = defaultdict(set)  # prompts by person
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def ready(self, plan: Plan) -> int:
        """How many tasks lie ready."""
        with self._changed:
            shelf = self._shelves.get(plan)
            return len(shelf.ready) if shelf else 0

    def want(self, plan: Plan, seen: Callable[[], set[str]]) -> None:
        """Begin, or go on, making tasks of a plan.

        Args:
            plan: a new one of a person replaces the person's old ones.
            seen: hashes of prompts that must not come again.
        """
        with self._changed:
            for other in [p for p in self._shelves if p.who == plan.who and p != plan]:
                if not self._shelves[other].waiting:  # else another page of theirs looks at it
                    del self._shelves[other]
            shelf = self._shelves.setdefault(plan, _Shelf(seen))
            shelf.wanted_at = time.monotonic()
            # One that died of an error of the engine's begins anew.
            if not self._closed.is_set() and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._fill, name="ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def candidates(self, plan: Plan) -> list[Prepared]:
        """What lies ready, oldest first, for a choice among them."""
        shelf, met = self._look_up(plan)
        with self._changed:
            return _unmet(shelf.ready, met | self._taken[plan.who]) if shelf else []

    def take(
        self, plan: Plan, chosen: Prepared | None = None, clear: bool = False
    ) -> Prepared | None:
        """The oldest task, or the chosen one, off the shelf; None where there is none.

        Args:
            plan: whose.
            chosen: one of `candidates`.
            clear: throw all others away: it was chosen for what it is like, so that those it was
                preferred to are no fair sample to choose from again.
        """
        shelf, met = self._look_up(plan)
        if shelf is None:
            return None
        with self._changed:
            shelf.wanted_at = time.monotonic()
            shelf.ready = _unmet(shelf.ready, met | self._taken[plan.who])
            if not shelf.ready or (chosen is not None and chosen not in shelf.ready):
                return None
            taken = chosen or shelf.ready[0]
            shelf.ready.remove(taken)
            if clear:
                shelf.ready.clear()
            self._taken[plan.who].add(prompt_key(taken.prompt.messages))
            self._changed.notify_all()
            return taken

    def _look_up(self, plan: Plan) -> tuple[_Shelf | None, set[str]]:
        """The shelf, and the prompts its person has met: on another page too, so asked anew."""
        shelf = self._shelves.get(plan)
        return shelf, shelf.seen() if shelf is not None else set()

    def wait(self, plan: Plan, seconds: float) -> str:
        """Wait for a task to be ready, at most so long; what went wrong, or "".

        A failure is told once, so that the next look tries again.
        """
        ends_at = time.monotonic() + seconds
        with self._changed:
            shelf = self._shelves.get(plan)
            if shelf is not None:
                shelf.waiting += 1
            try:
                return self._wait(plan, ends_at)
            finally:
                if shelf is not None:
                    shelf.waiting -= 1

    def _wait(self, plan: Plan, ends_at: float) -> str:
        while not self._closed.is_set():
            shelf = self._shelves.get(plan)
            if shelf is not None and shelf.ready:
                return ""
            if shelf is not None and shelf.failed:
                failed, shelf.failed = shelf.failed, ""
                return failed
            left = ends_at - time.monotonic()
            if left <= 0:
                return ""
            self._changed.wait(left)
        return "The app is closing."

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        with self._changed:
            self._shelves.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_SECONDS)

    # -- the thread -----------------------------------------------------------------------------

    def _fill(self) -> None:
        while not self._closed.is_set():
            plan = self._next()
            if plan is None:
                with self._changed:
                    self._changed.wait(_IDLE_SECONDS)
                continue
            shelf = self._shelves.get(plan)
            if shelf is None:
                continue
            try:
                self._put(plan, shelf, self._make(plan, shelf))
            except Paused:
                self._closed.wait(_IDLE_SECONDS)  # it is loading, or training has the device
            except UserError as error:
                self._put(plan, shelf, None, str(error))
            except BaseException:
                self._put(plan, shelf, None, "The next answers could not be made: see the log.")
                raise

    def _put(self, plan: Plan, shelf: _Shelf, made: Prepared | None, failed: str = "") -> None:
        with self._changed:
            if self._shelves.get(plan) is shelf:
                shelf.failed = failed
                if made is not None:
                    shelf.ready.append(made)
                self._changed.notify_all()

    def _next(self) -> Plan | None:
        """The emptiest shelf below the depth; shelves nobody came back to are cleared."""
        now = time.monotonic()
        with self._changed:
            for plan, shelf in list(self._shelves.items()):
                is_old = plan.version != self._engine.version()
                if is_old or now - shelf.wanted_at > _FORGET_SECONDS:
                    del self._shelves[plan]
            short = [
                (len(s.ready), -s.wanted_at, p.who, p)
                for p, s in self._shelves.items()
                if len(s.ready) < self.depth and not s.failed
            ]
        return min(short, key=lambda item: item[:3])[3] if short else None

    def _make(self, plan: Plan, shelf: _Shelf) -> Prepared | None:
        """One task; None when it had to give way, or the answers were all alike.

        Raises:
            UserError: of the engine; the pool is used up, or answers are alike again and again.
        """
        prompt = self._prompt(plan, shelf)
        asks = asks_of(plan, prompt, random.SystemRandom())
        rows: list[Row] = []
        for item in self._stream(plan, asks):
            if not isinstance(item, Waiting):
                rows = item
        if not rows or not finished(rows):
            return None
        kept = _different(asks, rows)
        if kept is not None:
            shelf.alike = 0
            return Prepared(prompt, *kept)
        shelf.alike += 1
        if shelf.alike >= MOST_ALIKE:
            shelf.alike = 0
            raise ConfigError(
                f"The answers to {MOST_ALIKE} prompts were all alike, so that there is nothing to "
                f"rank. Raise the temperature, or let more adapters answer."
            )
        return None

    def _stream(self, plan: Plan, asks: list[Ask]) -> Iterator[Waiting | list[Row]]:
        return self._engine.stream(asks, who=plan.who, cancel=self._closed, background=True)

    def _prompt(self, plan: Plan, shelf: _Shelf) -> PoolPrompt:
        pool = self._engine.pool("heldout" if plan.pool == "heldout" else "train")
        met = shelf.seen()
        with self._changed:
            met = met | self._taken[plan.who] | {prompt_key(p.prompt.messages) for p in shelf.ready}
        left = [p for p in pool if prompt_key(p.messages) not in met]
        if not left:
            raise ConfigError(
                f"You have judged all {len(pool)} prompts of the pool. Thank you. Retrain now, or "
                f"give the recipe more data.prompts."
            )
        return random.SystemRandom().choice(left)


def _unmet(ready: list[Prepared], met: set[str]) -> list[Prepared]:
    return [p for p in ready if prompt_key(p.prompt.messages) not in met]


def asks_of(plan: Plan, prompt: PoolPrompt, chance: random.Random) -> list[Ask]:
    """K asks of one prompt: adapters in turn from a random start, a fresh seed each."""
    order = list(plan.adapters)
    chance.shuffle(order)
    return [
        Ask(
            adapter=order[i % len(order)],
            messages=prompt.messages,
            temperature=plan.temperature,
            top_p=plan.top_p,
            max_new_tokens=plan.max_new_tokens,
            seed=chance.randrange(2**31),
        )
        for i in range(plan.answers)
    ]


def _different(asks: list[Ask], rows: list[Row]) -> tuple[list[Ask], list[Row]] | None:
    """The answers without empty ones and repeats; None where fewer than two are left."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        if row.text.strip():
            first.setdefault(row.text.strip(), i)
    if len(first) < 2:
        return None
    return [asks[i] for i in first.values()], [rows[i] for i in first.values()]
