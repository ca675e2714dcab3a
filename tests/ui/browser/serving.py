"""The app on a free port for browser tests, with what goes over the wire kept."""

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from starlette.types import Message, Receive, Scope, Send

from lora_rlhf.preferences.store import Store
from tests.ui.fakes import FakeEngine
from ui import server as serving
from ui.asking import Ask, Engine, Row, Waiting
from ui.security import Guard
from ui.server import Running, Settings
from ui.studio import Settings as Asking
from ui.studio import Studio
from ui.turns import Turns

SECRET = b"s" * 32  # the same at every start, so that a cookie is the same person after it
PASSWORDS = {"ana": "ana's long password", "ben": "ben's long password"}


class InLine(FakeEngine):
    """A fake with the real queue in front of it, that notes when each stream began and ended."""

    def __init__(self, **of_the_fake: Any) -> None:
        super().__init__(**of_the_fake)
        self.turns = Turns()
        self.began: list[float] = []
        self.ended: list[float] = []

    def stream(
        self,
        asks: Sequence[Ask],
        *,
        who: str,
        cancel: threading.Event,
        background: bool = False,
    ) -> Generator[Waiting | list[Row], None, None]:
        """As the fake, one job at a time."""
        with self.turns.ticket(who, background) as ticket:
            for ahead in ticket.wait(cancel):
                yield Waiting(ahead)
            if not background:
                self.began.append(time.monotonic())
            try:
                yield from super().stream(asks, who=who, cancel=cancel, background=background)
            finally:
                if not background:
                    self.ended.append(time.monotonic())


@dataclass
class Sent:
    """One answer of the server."""

    method: str
    path: str
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    chunks: list[tuple[float, int]] = field(default_factory=list)  # when, length of the body then


@dataclass
class Wire:
    """Every answer of a server, in the order of the requests; streams grow while they are read."""

    answers: list[Sent] = field(default_factory=list)

    def text_between(self, start: float, end: float) -> str:
        """All that was sent in a stretch of `time.monotonic`, the page's own files left out."""
        found = []
        for answer in list(self.answers):
            if answer.path.startswith(("/assets/", "/static/")):
                continue
            before = 0
            for when, length in list(answer.chunks):
                if start <= when <= end:
                    found.append(bytes(answer.body[before:length]))
                before = length
        return b"\n".join(found).decode("utf-8", errors="replace")


def _tapped(wire: Wire) -> type[Guard]:
    """The real middleware, with an ear at its outer side."""

    class Tapped(Guard):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await super().__call__(scope, receive, send)
                return
            sent = Sent(scope["method"], scope["path"])
            wire.answers.append(sent)
            # Uncompressed, so that it can be read.
            plain = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]

            async def keep(message: Message) -> None:
                if message["type"] == "http.response.start":
                    sent.status = message["status"]
                elif message["type"] == "http.response.body":
                    sent.body += message.get("body", b"")
                    sent.chunks.append((time.monotonic(), len(sent.body)))
                await send(message)

            await super().__call__({**scope, "headers": plain}, receive, keep)

    return Tapped


@dataclass
class Served:
    """A running app."""

    studio: Studio
    running: Running
    wire: Wire
    store_path: Path

    @property
    def url(self) -> str:
        """Of the page."""
        return self.running.url

    @property
    def engine(self) -> Any:
        """The studio's, whichever it is."""
        return self.studio.engine


def start(
    engine: Engine,
    store_path: Path,
    runs_dir: Path,
    *,
    users: Path | None = None,
    port: int | None = None,
    asking: Asking | None = None,
    **limits: Any,
) -> Served:
    """Serve an engine; `stop` ends it."""
    from ui.app import build_app, look
    from ui.jobs import Jobs

    store = Store.open(store_path)
    jobs = Jobs(engine, store, runs_dir)
    studio = Studio(engine, store, runs_dir, jobs, asking or Asking())
    wire = Wire()
    settings = Settings(port=port or free_port(), users=users)
    with patch.object(serving, "Guard", _tapped(wire)):
        running = serving.start(
            lambda: build_app(studio), settings, look=look(), secret=SECRET, **limits
        )
    return Served(studio, running, wire, store_path)


def stop(served: Served) -> None:
    """As the command line does when it is told to."""
    served.running.stop()
    served.studio.close()
    served.running.close()


@contextmanager
def serve(engine: Engine, folder: Path, **settings: Any) -> Iterator[Served]:
    """An app with an empty store in a folder of its own."""
    runs_dir = folder / "runs"
    runs_dir.mkdir(parents=True, exist_ok=True)
    served = start(engine, folder / "rankings.db", runs_dir, **settings)
    try:
        yield served
    finally:
        stop(served)


def free_port() -> int:
    """Of the loopback."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
