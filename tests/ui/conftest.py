"""A studio without a model: a fake engine, a real store, two people."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_rlhf.preferences.store import Store
from tests.ui.scripted import ScriptedEngine
from ui.people import Person
from ui.studio import Settings, Studio

NEVER_AGAIN = Settings(overlap=0.0, repeats=0.0)


class NoJobs:
    """In the place of `ui.jobs.Jobs`: nothing is trained here."""

    def close(self) -> None:
        pass


@pytest.fixture
def ana() -> Person:
    return Person("ana", True, "session of ana")


@pytest.fixture
def ben() -> Person:
    return Person("ben", False, "session of ben")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def open_studio(engine: ScriptedEngine, tmp_path: Path) -> Iterator[Callable[..., Studio]]:
    """Opens a studio, again on the same store, as a restart of the server does."""
    opened: list[Studio] = []

    def open_one(settings: Settings = NEVER_AGAIN, engine: ScriptedEngine = engine) -> Studio:
        store = Store.open(tmp_path / "rankings.db")
        studio = Studio(engine, store, tmp_path / "runs", NoJobs(), settings)  # type: ignore[arg-type]
        opened.append(studio)
        return studio

    yield open_one
    engine.gate.set()
    for studio in opened:
        studio.close()


@pytest.fixture
def studio(open_studio: Callable[..., Studio]) -> Studio:
    return open_studio()


@pytest.fixture
def store(studio: Studio) -> Store:
    return studio.store
