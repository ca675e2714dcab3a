"""What every handler of the app needs, in one object. Imports no torch."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lora_rlhf import __version__
from lora_rlhf.data.records import prompt_key
from lora_rlhf.errors import ConfigError
from lora_rlhf.preferences.store import Judged, Store
from lora_rlhf.runs import Run
from ui.ahead import Ahead
from ui.asking import Ask, Engine, PoolPrompt, Row, Waiting
from ui.engine import StudioEngine
from ui.jobs import Jobs


@dataclass(frozen=True)
class Settings:
    """How the app asks people; set by whoever starts it.

    Attributes:
        answers: K of the Rank tab, at the start.
        overlap: share of ranking tasks that somebody else has judged already, for agreement.
        repeats: share of tasks that the same person judged before, sides swapped.
    """

    answers: int = 4
    overlap: float = 0.1
    repeats: float = 0.05


@dataclass
class Studio:
    """The app's parts.

    Attributes:
        engine: answers and scores.
        store: of judgements.
        runs_dir: where runs lie, and where retraining makes new ones.
        jobs: retraining.
        settings: how people are asked.
        multi_user: people log in, so that not everybody is the owner of the machine.
        ahead: ranking tasks made before they are asked for.
    """

    engine: Engine
    store: Store
    runs_dir: Path
    jobs: Jobs
    settings: Settings = Settings()
    multi_user: bool = False
    ahead: Ahead = field(init=False)
    _stops: dict[str, threading.Event] = field(default_factory=dict, repr=False)
    _judged: tuple[int, list[Judged]] | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.ahead = Ahead(self.engine)

    @classmethod
    def open(
        cls,
        runs: list[Run],
        store: str | Path,
        runs_dir: Path,
        settings: Settings | None = None,
    ) -> "Studio":
        """Open the store and start loading the backbone; returns before it is loaded.

        Args:
            runs: with at least one adapter between them.
            store: path of an SQLite file, or a postgresql:// URL.
            runs_dir: where runs lie.
            settings: how people are asked.

        Raises:
            UserError: runs on different backbones, no adapters, or a store that cannot be used.
        """
        if not any(run.adapters() for run in runs):
            names = ", ".join(run.name for run in runs) or "none"
            raise ConfigError(
                f"No run here has an adapter yet (looked at: {names}). Make one first: "
                f"lora-rlhf run quickstart"
            )
        engine = StudioEngine(runs)
        opened = Store.open(store)
        jobs = Jobs(engine, opened, runs_dir)
        engine.start()
        return cls(engine, opened, runs_dir, jobs, settings or Settings())

    def judged(self) -> list[Judged]:
        """All judgements that stand; read again only when something was stored."""
        version = self.store.version()
        with self._lock:
            if self._judged is None or self._judged[0] != version:
                self._judged = (version, self.store.judged())
            return self._judged[1]

    def judged_by(self, who: str, mode: str) -> list[Judged]:
        """Those of one person in one mode."""
        found = self.judged()
        return [j for j in found if j.judgement.annotator == who and j.task.mode == mode]

    def unseen(self, who: str, pool: Sequence[PoolPrompt]) -> list[PoolPrompt]:
        """The prompts of a pool that this person has not judged, skips counted."""
        seen = self.store.judged_prompts(who)
        return [prompt for prompt in pool if prompt_key(prompt.messages) not in seen]

    @property
    def app_facts(self) -> dict[str, str]:
        """What a stored task says of the app that made it."""
        return {"version": __version__}

    # -- stopping -------------------------------------------------------------------------------

    @contextmanager
    def stoppable(self, who: str, where: str) -> Iterator[threading.Event]:
        """An event that `stop` sets, for the one job of a person in a tab; a new one ends the old.

        Args:
            who: the person's name.
            where: the tab.
        """
        event = threading.Event()
        key = f"{who}/{where}"
        with self._lock:
            before = self._stops.get(key)
            self._stops[key] = event
        if before is not None:
            before.set()
        try:
            yield event
        finally:
            event.set()
            with self._lock:
                if self._stops.get(key) is event:
                    del self._stops[key]

    def answers(self, who: str, where: str, asks: Sequence[Ask]) -> Iterator[Waiting | list[Row]]:
        """Stream answers that `stop`, and closing this iterator, end within a token.

        Args:
            who: the person's name.
            where: the tab and page, for `stop`.
            asks: what is wanted.

        Raises:
            UserError: of `Engine.stream`.
        """
        with (
            self.stoppable(who, where) as cancel,
            closing(self.engine.stream(asks, who=who, cancel=cancel)) as stream,
        ):
            yield from stream

    def stop(self, who: str, where: str) -> bool:
        """Stop the person's job in a tab; whether there was one."""
        with self._lock:
            event = self._stops.get(f"{who}/{where}")
        if event is not None:
            event.set()
        return event is not None

    def close(self) -> None:
        """Stop every job and close what is open; training that runs goes on by itself."""
        with self._lock:
            events = list(self._stops.values())
        for event in events:
            event.set()
        self.ahead.close()
        self.jobs.close()
        self.engine.close()
        self.store.close()
