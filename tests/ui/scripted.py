"""A fake engine that can be told to wait, fail, stop, answer alike, and stand still."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from tests.ui.fakes import FakeEngine
from ui.asking import Ask, Finish, Paused, Row, Waiting


class ScriptedEngine(FakeEngine):
    """As the fake, but for what a test sets.

    Attributes:
        errors: raised one a stream, before its first item.
        waits: jobs ahead, told before the first token of each stream.
        says: the whole text of an answer; unset: the fake's.
        finish: of the answers.
        gate: while it is clear, streams stand still after their first word.
        calls: (who, background) of every stream.
    """

    def __init__(self, **of_the_fake: Any) -> None:
        super().__init__(**of_the_fake)
        self.errors: deque[BaseException] = deque()
        self.waits: tuple[int, ...] = ()
        self.says: Callable[[Ask], str] | None = None
        self.finish: Finish = "eos"
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[str, bool]] = []

    def stream(
        self,
        asks: Sequence[Ask],
        *,
        who: str,
        cancel: threading.Event,
        background: bool = False,
    ) -> Generator[Waiting | list[Row], None, None]:
        self.calls.append((who, background))
        if self.paused:
            raise Paused(self.paused)
        if self.errors:
            raise self.errors.popleft()
        yield from map(Waiting, self.waits)
        for item in super().stream(asks, who=who, cancel=cancel, background=background):
            yield [self._as_told(ask, row) for ask, row in zip(asks, item, strict=True)]
            while not self.gate.wait(0.002) and not cancel.is_set():
                pass

    def _as_told(self, ask: Ask, row: Row) -> Row:
        if row.finish is None:
            return row
        finish = self.finish if row.finish == "eos" else row.finish
        return replace(row, finish=finish, text=self.says(ask) if self.says else row.text)


def eventually(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for another thread to make something true."""
    ends_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends_at, "it did not come true"
        time.sleep(0.002)
