"""Whose turn it is on the device: one job at a time, first come first served, background last."""

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from ui.asking import Busy

APP = ""  # no person has this name; the app's own tickets are never refused, nor counted
MOST_WAITING = 32
MOST_PER_PERSON = 2
_LOOK_SECONDS = 0.1


@dataclass(eq=False)
class Ticket:
    """A place in the queue, to be used as a context manager.

    Attributes:
        who: the person, or APP.
        background: gives way to every other ticket.
        give_way: set when a background job that runs should end early for somebody.
    """

    turns: "Turns"
    who: str
    background: bool
    give_way: threading.Event = field(default_factory=threading.Event)

    def wait(self, cancel: threading.Event) -> Iterator[int]:
        """Yield how many are ahead whenever that changes or a moment passes, until it is our turn.

        Returns early, without the turn, when `cancel` is set.
        """
        while not cancel.is_set():
            ahead = self.turns.ahead_of(self, _LOOK_SECONDS)
            if ahead == 0:
                return
            yield ahead

    def __enter__(self) -> "Ticket":
        self.turns.join(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self.turns.leave(self)


class Turns:
    """The queue in front of one device.

    Args:
        most_waiting: tickets of all people, background ones apart.
        most_per_person: tickets of one person, background ones apart.
    """

    def __init__(
        self, most_waiting: int = MOST_WAITING, most_per_person: int = MOST_PER_PERSON
    ) -> None:
        self._most_waiting = most_waiting
        self._most_per_person = most_per_person
        self._changed = threading.Condition()
        self._queue: list[Ticket] = []  # the first one has the device

    def ticket(self, who: str, background: bool = False) -> Ticket:
        """A ticket that joins the queue when it is entered."""
        return Ticket(self, who, background)

    def join(self, ticket: Ticket) -> None:
        """Stand in line: background tickets behind all others.

        Raises:
            Busy: the queue is full, or holds too many of this person.
        """
        with self._changed:
            if not ticket.background and ticket.who != APP:
                self._refuse_crowds(ticket)
            place = len(self._queue)
            if not ticket.background:
                # The first has the device already and is not pushed off it, but asked to hurry.
                while place > 1 and self._queue[place - 1].background:
                    place -= 1
                if self._queue and self._queue[0].background:
                    self._queue[0].give_way.set()
            self._queue.insert(place, ticket)
            self._changed.notify_all()

    def _refuse_crowds(self, ticket: Ticket) -> None:
        waiting = [t for t in self._queue if not t.background and t.who != APP]
        if len(waiting) >= self._most_waiting:
            raise Busy(
                f"{len(waiting)} answers are waited for already, the most allowed. Try again in a "
                f"minute."
            )
        own = sum(t.who == ticket.who for t in waiting)
        if own >= self._most_per_person:
            raise Busy(
                f"{own} of your answers are on their way, the most a person may have at once. "
                f"Stop one, or wait for it."
            )

    def leave(self, ticket: Ticket) -> None:
        """Give the device, or the place in the line, to the next one."""
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._changed.notify_all()

    def ahead_of(self, ticket: Ticket, patience: float) -> int:
        """Tickets before this one; waits up to `patience` seconds while there are some."""
        with self._changed:
            if self._queue.index(ticket) > 0:
                self._changed.wait(patience)
            return self._queue.index(ticket)

    def __len__(self) -> int:
        return len(self._queue)


def until_first(ticket: Ticket, ends_at: float = math.inf) -> bool:
    """Wait for the turn; whether it came in time."""
    return all(time.monotonic() <= ends_at for _ in ticket.wait(threading.Event()))
