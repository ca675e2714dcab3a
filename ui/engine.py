"""The app's engine: one backbone, every adapter on it, one job at a time, answers streamed."""

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_rlhf.data.records import Messages
from lora_rlhf.errors import CheckpointError, ConfigError, UserError
from lora_rlhf.recipe import STAGES, Recipe
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run
from ui.asking import Ask, Facts, Paused, PoolPrompt, Registered, Row, Waiting
from ui.registry import Registry
from ui.turns import Ticket, Turns

if TYPE_CHECKING:
    from ui.decoding import Decoder

_YIELD_SECONDS = 0.05  # at most 20 updates a second
_LOADING = "The backbone is still being loaded. A moment, please."


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
        self.recipe: Recipe = load_recipe(str(runs[0].path / "recipe.yaml"), finished=STAGES)
        self._state = _LOADING
        self._failed: UserError | None = None
        self._decoder: Decoder | None = None
        self._changing = threading.Lock()
        self._closed = threading.Event()
        self._pools: dict[str, list[PoolPrompt]] = {}
        self._loader: threading.Thread | None = None

    # -- loading --------------------------------------------------------------------------------

    def start(self) -> "StudioEngine":
        """Load the backbone and the adapters in the background; returns at once."""
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
        from ui.decoding import Decoder

        try:
            with self._changing:
                decoder = Decoder(self.recipe)
                for entry in self.registry.loaded:
                    decoder.load(entry)
                self._decoder, self._state = decoder, "ready"
        except UserError as error:
            self._failed, self._state = error, str(error)
        except BaseException as error:
            self._state = f"The backbone could not be loaded: {error}"
            raise

    def release(self) -> None:
        """Give the device's memory back, for training; waits for the job that runs."""
        with self.turns.ticket("the app") as ticket:
            _until_first(ticket)
            self._state = "Training has the device now. Chat goes on when it is done."
            with self._changing:
                decoder, self._decoder = self._decoder, None
                if decoder is not None:
                    decoder.free()

    def restore(self) -> None:
        """Load again what `release` gave back; returns at once."""
        if self._decoder is None and not self._closed.is_set():
            self._state = _LOADING
            self.start()

    def close(self) -> None:
        """End what runs; nothing is answered afterwards."""
        self._closed.set()
        self._state = "The app is closing."

    # -- what there is --------------------------------------------------------------------------

    def facts(self) -> Facts:
        """What does not change; from the recipe until the backbone is there."""
        data, base = self.recipe.data, self.recipe.base
        decoder = self._decoder
        most = 2 * data.max_response_tokens
        if decoder is not None and decoder.most_new_tokens is not None:
            most = max(1, min(most, decoder.most_new_tokens))
        return Facts(
            model=base.model,
            revision=base.revision,
            quantization=base.quantization,
            template_sha256=decoder.template_sha256 if decoder is not None else "",
            max_prompt_tokens=data.max_prompt_tokens,
            most_new_tokens=most,
            default_new_tokens=min(data.max_response_tokens, most),
            temperature=self.recipe.ppo.temperature if self.recipe.ppo is not None else 1.0,
            continues=decoder.continues if decoder is not None else False,
            device=decoder.device if decoder is not None else base.device,
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
        names = self.registry.drop(run)
        if self._decoder is not None:
            with self.turns.ticket("the app") as ticket:
                _until_first(ticket)
                for name in names:
                    self._decoder.unload(name)

    def _take_in(self, run: Path, offered: bool) -> list[str]:
        if not run.is_dir():
            raise CheckpointError(f"{run} is not a run directory. Give one under runs/.")
        names = self.registry.add(Run(run), offered)
        if not names:
            raise CheckpointError(f"{run} has no adapter yet. Let its training finish first.")
        if self._decoder is not None:
            with self.turns.ticket("the app") as ticket:
                _until_first(ticket)
                for entry in self.registry.loaded:
                    if entry.name in names:
                        self._decoder.load(entry)
        return names

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
        worker = threading.Thread(target=batch.run, name="decode", daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(_YIELD_SECONDS)
                yield batch.rows()
            batch.raise_error()
            yield decoder.judged(batch, self.registry)
        finally:
            closed.set()
            worker.join()

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
        with self.turns.ticket("the app") as ticket:
            _until_first(ticket)
            return self._ready_decoder().score(name, items)

    def pool(self, kind: Literal["train", "heldout"]) -> list[PoolPrompt]:
        """Prompts of the first run; read once."""
        if kind not in self._pools:
            decoder = self._ready_decoder()
            with self._changing:
                self._pools[kind] = decoder.pool(kind)
        return self._pools[kind]

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
                raise ConfigError(f"No adapter {ask.adapter!r}. There are: {', '.join(names)}.")
            if not ask.messages or ask.messages[-1]["role"] != "user":
                raise ConfigError("There is no question to answer. Type one first.")
            length = sum(len(m["content"]) for m in ask.messages)
            if length > self.limits.prompt_characters:
                raise ConfigError(
                    f"The dialogue has {length} characters; at most "
                    f"{self.limits.prompt_characters} are taken. Start a new one."
                )
            _require_within("temperature", ask.temperature, 0.0, 5.0)
            _require_within("top-p", ask.top_p, 0.01, 1.0)
            _require_within("length", ask.max_new_tokens, 1, facts.most_new_tokens)
            _require_within("seed", ask.seed, 0, 2**63 - 1)


def _require_within(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}. Allowed: {low:g} to {high:g}.")


def _until_first(ticket: Ticket) -> None:
    for _ in ticket.wait(threading.Event()):
        pass
