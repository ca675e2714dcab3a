"""What every handler of the app needs, in one object. Imports no torch."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lora_rlhf import __version__
from lora_rlhf.continuing import ways_on
from lora_rlhf.errors import ConfigError
from lora_rlhf.preferences.store import Judged, Store
from lora_rlhf.runs import Run
from ui.ahead import Ahead
from ui.asking import Ask, Engine, Row, Waiting
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
        ahead: ranking tasks made before they are asked for.
        luck: the draw, by person, of whether their next ranking task is one that was judged before.
            Drawn once a task: drawn at every look for one, slow answers would make all of them so.
    """

    engine: Engine
    store: Store
    runs_dir: Path
    jobs: Jobs
    settings: Settings = Settings()
    ahead: Ahead = field(init=False)
    luck: dict[str, float] = field(default_factory=dict)
    _stops: dict[tuple[str, str], threading.Event] = field(default_factory=dict, repr=False)
    _stopping: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _judged: list[Judged] = field(default_factory=list, repr=False)
    _judged_at: int = field(default=0, repr=False)
    _reading: threading.Lock = field(default_factory=threading.Lock, repr=False)

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
                f"No run here has an adapter yet (looked at: {names}). "
                + (ways_on(runs[-1]) if runs else "Make one: lora-rlhf run quickstart")
            )
        engine = StudioEngine(runs)
        opened = Store.open(store)
        jobs = Jobs(engine, opened, runs_dir)
        if not jobs.has_device:  # else it is loaded when the training that goes on has ended
            engine.start()
        return cls(engine, opened, runs_dir, jobs, settings or Settings())

    def judged(self) -> list[Judged]:
        """All judgements that stand, in order; of those known already none is read again."""
        with self._reading:
            version = self.store.version()
            if version != self._judged_at:
                last = self._judged[-1].seq if self._judged else 0
                found = self._judged + self.store.judged(since_seq=last)
                if self.store.counts()["live"] != len(found):  # some were taken back
                    found = self.store.judged()
                self._judged, self._judged_at = found, version
            return self._judged

    def judged_by(self, who: str, mode: str) -> list[Judged]:
        """Those of one person in one mode."""
        found = self.judged()
        return [j for j in found if j.judgement.annotator == who and j.task.mode == mode]

    def seen(self, who: str, mode: str) -> set[str]:
        """Hashes of the prompts that this person has judged, skips counted, or has open now."""
        waits = self.store.open_task(who, mode)
        return self.store.judged_prompts(who) | ({waits.prompt_sha256} if waits else set())

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
        key = (who, where)
        with self._stopping:
            before = self._stops.get(key)
            self._stops[key] = event
        if before is not None:
            before.set()
        try:
            yield event
        finally:
            event.set()
            with self._stopping:
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
        with self._stopping:
            event = self._stops.get((who, where))
        if event is not None:
            event.set()
        return event is not None

    def close(self) -> None:
        """Stop every job and close what is open; training that runs goes on by itself."""
        with self._stopping:
            events = list(self._stops.values())
        for event in events:
            event.set()
        self.ahead.close()
        self.jobs.close()
        self.engine.close()
        self.store.close()
