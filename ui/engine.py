"""The app's engine: one backbone, every adapter on it, one job at a time, answers streamed."""

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_rlhf.data.records import Messages, prompt_key
from lora_rlhf.errors import CheckpointError, ConfigError, UserError
from lora_rlhf.recipe import STAGES, Recipe
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run
from ui.asking import Ask, Facts, Paused, PoolPrompt, Prompts, Registered, Row, Waiting
from ui.registry import Registry
from ui.turns import APP, Ticket, Turns, until_first

if TYPE_CHECKING:
    from ui.decoding import Decoder

_YIELD_SECONDS = 0.05  # at most 20 updates a second
_CLOSE_SECONDS = 2.0
_SCORED_AT_ONCE = 32  # answers a turn: whoever chats meanwhile gets in between
_LEAST_TEMPERATURE = 0.01  # logits divided by much less overflow
_LONGEST_SHOWN = 40
_LOADING = "The backbone is still being loaded. A moment, please."
_TRAINING = "Training has the device now. Chat goes on when it is done."
_CLOSING = "The app is closing."


@dataclass(frozen=True)
class Limits:
    """What one job may ask for.

    Attributes:
        rows: answers decoded together.
        prompt_characters: of a whole dialogue, before any tokenizer sees it.
        seconds: of one job, from its first token on.
    """

    rows: int = 9
    prompt_characters: int = 20_000
    seconds: float = 120.0


class StudioEngine:
    """`ui.asking.Engine` over a real backbone, which is loaded by a thread of its own.

    Args:
        runs: their adapters are registered; the first one's recipe gives base, limits and prompts.
        limits: of one job.

    Raises:
        UserError: no run, no adapters, or runs on different backbones.
    """

    def __init__(self, runs: Sequence[Run], limits: Limits | None = None) -> None:
        assert runs, "the command line has made sure of one"
        self.limits = limits or Limits()
        self.turns = Turns()
        self.registry = Registry(runs)
        self._first = runs[0]
        self.recipe: Recipe = load_recipe(str(runs[0].path / "recipe.yaml"), finished=STAGES)
        self._facts = self._facts_of_recipe()
        self._state = _LOADING
        self._failed: UserError | None = None
        self._decoder: Decoder | None = None
        self._wanted = True  # the backbone, by anybody; False while training has the device
        self._changing = threading.Lock()
        self._closed = threading.Event()
        self._pools: dict[str, list[PoolPrompt]] = {}
        self._prompts: dict[Path, Prompts] = {}
        self._loader: threading.Thread | None = None

    # -- loading --------------------------------------------------------------------------------

    def start(self) -> "StudioEngine":
        """Load the backbone and the adapters in the background; returns at once."""
        self._failed = None
        self._loader = threading.Thread(target=self._load, name="load-backbone", daemon=True)
        self._loader.start()
        return self

    def ready(self, timeout: float | None = None) -> "StudioEngine":
        """Wait until the backbone is there.

        Raises:
            UserError: it cannot be loaded.
        """
        if self._loader is not None:
            self._loader.join(timeout)
        if self._failed is not None:
            raise self._failed
        return self

    def _load(self) -> None:
        with self._changing:
            if not self._wanted or self._closed.is_set():
                return
            if self._decoder is not None:
                self._state = "ready"
                return
            try:
                self._load_all()
            except UserError as error:
                self._failed, self._state = error, str(error)
            except BaseException as error:
                self._state = f"The backbone could not be loaded: {error}"
                self._failed = CheckpointError(self._state)
                raise

    def _load_all(self) -> None:
        from ui.decoding import Decoder

        decoder = Decoder(self.recipe)
        for entry in self.registry.loaded:
            if self._closed.is_set():
                return
            decoder.load(entry)
        most = self._facts.most_new_tokens
        if decoder.most_new_tokens is not None:
            most = max(1, min(most, decoder.most_new_tokens))
        self._facts = replace(
            self._facts,
            template_sha256=decoder.template_sha256,
            most_new_tokens=most,
            default_new_tokens=min(self._facts.default_new_tokens, most),
            continues=decoder.continues,
            device=decoder.device,
        )
        if not self._closed.is_set():
            self._decoder, self._state = decoder, "ready"

    def release(self) -> None:
        """Give the device's memory back, for training; waits for the job that runs."""
        with self.turns.ticket(APP) as ticket:
            until_first(ticket)
            with self._changing:
                self._wanted, self._state = False, _TRAINING
                self._free()

    def restore(self) -> None:
        """Load again what `release` gave back; returns at once."""
        if self._closed.is_set():
            return
        self._wanted = True
        if self._decoder is None:
            self._state = _LOADING
            self.start()

    def close(self) -> None:
        """End what runs and free everything; nothing is answered afterwards.

        Whoever holds a turn and never comes back for the rest of their answer is not waited for.
        """
        self._closed.set()
        self._state = _CLOSING
        ends_at = time.monotonic() + _CLOSE_SECONDS
        with self.turns.ticket(APP) as ticket:
            if until_first(ticket, ends_at) and self._changing.acquire(timeout=_CLOSE_SECONDS):
                self._state = _CLOSING
                self._free()
                self._changing.release()

    def _free(self) -> None:
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.free()

    # -- what there is --------------------------------------------------------------------------

    def facts(self) -> Facts:
        """What does not change; from the recipe until the backbone is there."""
        return self._facts

    def _facts_of_recipe(self) -> Facts:
        data, base = self.recipe.data, self.recipe.base
        return Facts(
            model=base.model,
            revision=base.revision,
            quantization=base.quantization,
            max_prompt_tokens=data.max_prompt_tokens,
            most_new_tokens=2 * data.max_response_tokens,
            default_new_tokens=data.max_response_tokens,
            temperature=self.recipe.ppo.temperature if self.recipe.ppo is not None else 1.0,
            device=base.device,
        )

    def state(self) -> str:
        """The word ready, or a sentence on why nothing can be answered now."""
        return self._state

    def answerers(self) -> list[str]:
        """Names that can answer: base, then RUN/sft and RUN/policy of each run."""
        return self.registry.answerers

    def registered(self) -> list[Registered]:
        """Every adapter, reward adapters included."""
        return self.registry.entries

    def version(self) -> int:
        """Grows whenever the adapters change."""
        return self.registry.version

    def reward_adapter(self) -> str | None:
        """The reward adapter that scores."""
        return self.registry.reward

    def adopt(self, run: Path) -> list[str]:
        """Register the adapters of a run and load them beside those there are.

        Raises:
            UserError: made on another backbone, or it has none.
        """
        return self._take_in(run, offered=True)

    def consider(self, run: Path) -> list[str]:
        """As `adopt`, but nobody is offered them: `score` alone takes their names.

        Raises:
            UserError: made on another backbone, or it has none.
        """
        return self._take_in(run, offered=False)

    def forget(self, run: Path) -> None:
        """Let go of what was considered and not adopted."""
        with self.turns.ticket(APP) as ticket:
            until_first(ticket)
            with self._changing:
                for name in self.registry.drop(run):
                    if self._decoder is not None:
                        self._decoder.unload(name)

    def _take_in(self, run: Path, offered: bool) -> list[str]:
        if not run.is_dir():
            raise CheckpointError(f"{run} is not a run directory. Give one under runs/.")
        fresh = self.registry.read(Run(run))
        if not fresh:
            raise CheckpointError(f"{run} has no adapter yet. Let its training finish first.")
        with self.turns.ticket(APP) as ticket:
            until_first(ticket)
            with self._changing:
                # On the backbone before anybody is told its name.
                if self._decoder is not None:
                    self._decoder.load_all(fresh)
                self.registry.put(fresh, offered)
        return [entry.name for entry in fresh]

    # -- answers --------------------------------------------------------------------------------

    def stream(
        self,
        asks: Sequence[Ask],
        *,
        who: str,
        cancel: threading.Event,
        background: bool = False,
    ) -> Generator[Waiting | list[Row], None, None]:
        """As `ui.asking.Engine.stream` says."""
        self._require_allowed(asks)
        with self.turns.ticket(who, background) as ticket:
            for ahead in ticket.wait(cancel):
                yield Waiting(ahead)
            decoder = self._ready_decoder()
            if cancel.is_set():
                yield [Row(ask.adapter, finish="stopped") for ask in asks]
                return
            yield from self._decode(decoder, asks, cancel, ticket)

    def _decode(
        self, decoder: "Decoder", asks: Sequence[Ask], cancel: threading.Event, ticket: Ticket
    ) -> Iterator[list[Row]]:
        """Run the batch in a thread and yield its rows; closing this iterator stops the thread."""
        ends_at = time.monotonic() + self.limits.seconds

        def must_stop() -> bool:
            gone = cancel.is_set() or closed.is_set() or self._closed.is_set()
            return gone or ticket.give_way.is_set() or time.monotonic() > ends_at

        closed = threading.Event()
        batch = decoder.batch(asks, must_stop)
        with ThreadPoolExecutor(1, "decode") as pool:
            work = pool.submit(batch.run)
            try:
                while not work.done():
                    wait([work], _YIELD_SECONDS)
                    rows = batch.rows()
                    # Whoever sees whole answers may judge them, and a judgement keeps their scores.
                    if any(row.finish is None for row in rows):
                        yield rows
                work.result()
                yield decoder.judged(batch, self.registry)
            finally:
                closed.set()

    def score(
        self, items: Sequence[tuple[Messages, str]], adapter: str | None = None
    ) -> list[float]:
        """Scores of finished answers by a reward adapter.

        Raises:
            UserError: there is none.
        """
        name = adapter or self.registry.reward
        if name is None:
            raise CheckpointError(
                "No run that is open has a reward adapter. Train one: lora-rlhf run quickstart"
            )
        if name not in self.registry.scorers:
            known = ", ".join(self.registry.scorers) or "none"
            raise CheckpointError(f"{name[:80]} is no reward adapter here. There are: {known}.")
        scores: list[float] = []
        for start in range(0, len(items), _SCORED_AT_ONCE):
            with self.turns.ticket(APP) as ticket:
                until_first(ticket)
                part = items[start : start + _SCORED_AT_ONCE]
                scores += self._ready_decoder().score(name, part)
        return scores

    def pool(self, kind: Literal["train", "heldout"]) -> list[PoolPrompt]:
        """Prompts of the first run, read once; no held-out one that an open run was trained on."""
        if kind not in self._pools:
            self._ready_decoder()  # what is missing is said at once, not after its loading
            with self._changing:
                if kind not in self._pools:
                    self._pools[kind] = self._ready_decoder().pool(self._first, kind)
        pool = self._pools[kind]
        if kind == "train":
            return pool
        runs = {entry.run for entry in self.registry.entries} - {self._first.path}
        trained = frozenset().union(*map(self._trained_on, runs))
        return [prompt for prompt in pool if prompt_key(prompt.messages) not in trained]

    def _trained_on(self, run: Path) -> frozenset[str]:
        try:
            return self.prompts_of(run).trained
        except UserError:  # its data are gone; what it was retrained on stands in the run itself
            return frozenset(Run(run).trained_on_heldout())

    def prompts_of(self, run: Path) -> Prompts:
        """Which prompts a run holds out and which it knows; read once."""
        if run not in self._prompts:
            self._ready_decoder()
            with self._changing:
                if run not in self._prompts:
                    self._prompts[run] = self._ready_decoder().prompts_of(Run(run))
        return self._prompts[run]

    def _ready_decoder(self) -> "Decoder":
        decoder = self._decoder
        if decoder is None or self._closed.is_set():
            raise Paused(self._state)
        return decoder

    def _require_allowed(self, asks: Sequence[Ask]) -> None:
        """Whatever a browser may have sent, before any of it costs time."""
        facts, names = self.facts(), self.registry.answerers
        if not 1 <= len(asks) <= self.limits.rows:
            raise ConfigError(f"{len(asks)} answers asked for. Allowed: 1 to {self.limits.rows}.")
        for ask in asks:
            if ask.adapter not in names:
                raise ConfigError(
                    f"No adapter {_shown(ask.adapter)}. There are: {', '.join(names)}."
                )
            if not ask.messages or ask.messages[-1]["role"] != "user":
                raise ConfigError("There is no question to answer. Type one first.")
            length = sum(len(m["content"]) for m in ask.messages)
            if length > self.limits.prompt_characters:
                raise ConfigError(
                    f"The dialogue has {length} characters; at most "
                    f"{self.limits.prompt_characters} are taken. Start a new one."
                )
            _require_number("temperature", ask.temperature, _LEAST_TEMPERATURE, 5.0, or_zero=True)
            _require_number("top-p", ask.top_p, 0.01, 1.0)
            _require_whole("length", ask.max_new_tokens, 1, facts.most_new_tokens)
            _require_whole("seed", ask.seed, 0, 2**63 - 1)


def _require_number(
    name: str, value: object, low: float, high: float, or_zero: bool = False
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low <= value <= high or (or_zero and value == 0)):  # type: ignore[operator]
        more = ", or 0" if or_zero else ""
        raise ConfigError(f"{name} is {_shown(value)}. Allowed: {low:g} to {high:g}{more}.")


def _require_whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {_shown(value)}. Allowed: whole numbers, {low} to {high}.")


def _shown(value: object) -> str:
    """At most some letters of a value that somebody made up."""
    if isinstance(value, int) and abs(value) > 10**_LONGEST_SHOWN:
        return "a number of very many digits"  # Python refuses to write it out
    return repr(value)[:_LONGEST_SHOWN]
