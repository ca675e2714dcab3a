"""One job at a time on the device: order, places, crowds, giving way."""

import threading
import time
from contextlib import ExitStack

import pytest

from ui.asking import Busy
from ui.turns import APP, Ticket, Turns

NEVER = threading.Event()


def place(turns: Turns, ticket: Ticket) -> int:
    return turns.ahead_of(ticket, 0.0)


def most_at_once(turns: Turns, jobs: int = 3) -> int:
    """How many of several threads hold the device together, where they try to."""
    inside, peak, together = [0], [0], threading.Event()
    lock = threading.Lock()

    def job(number: int) -> None:
        with turns.ticket(f"person {number}") as ticket:
            for _ in ticket.wait(NEVER):
                pass
            with lock:
                inside[0] += 1
                peak[0] = max(peak[0], inside[0])
                if inside[0] == jobs:
                    together.set()
            together.wait(0.05)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=job, args=(n,)) for n in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return peak[0]


def test_one_job_has_the_device_at_a_time() -> None:
    assert most_at_once(Turns()) == 1

    class EveryoneIsFirst(Turns):
        def ahead_of(self, ticket: Ticket, patience: float) -> int:
            return 0

    assert most_at_once(EveryoneIsFirst()) == 3  # the test would see it


def test_first_come_first_served_and_each_is_told_how_many_are_ahead() -> None:
    turns = Turns(most_per_person=9)
    tickets = [turns.ticket(who) for who in ("ana", "ben", "ana", "cyd")]
    for ticket in tickets:
        turns.join(ticket)
    assert [place(turns, t) for t in tickets] == [0, 1, 2, 3]
    turns.leave(tickets[1])  # somebody in the middle gives up
    assert [place(turns, t) for t in (tickets[0], *tickets[2:])] == [0, 1, 2]
    turns.leave(tickets[0])
    assert [place(turns, t) for t in tickets[2:]] == [0, 1]


def test_waiting_tells_the_places_and_ends_with_the_turn() -> None:
    turns = Turns()
    first, second, third = (turns.ticket(who) for who in "abc")
    for ticket in (first, second, third):
        turns.join(ticket)
    told = third.wait(NEVER)
    assert next(told) == 2
    turns.leave(first)
    assert next(told) == 1
    turns.leave(second)
    assert list(told) == []


def test_whoever_waits_is_woken_when_the_device_is_free() -> None:
    turns = Turns()
    first, second = turns.ticket("ana"), turns.ticket("ben")
    turns.join(first)
    turns.join(second)
    found: list[int] = []
    waiter = threading.Thread(target=lambda: found.append(turns.ahead_of(second, 30.0)))
    waiter.start()
    began = time.monotonic()
    turns.leave(first)
    waiter.join(20)
    assert found == [0]
    assert time.monotonic() - began < 10  # of the 30 it would take unwoken


def test_a_cancelled_wait_ends_without_the_turn_and_frees_its_place() -> None:
    turns, cancel = Turns(), threading.Event()
    first, second, third = (turns.ticket(who) for who in "abc")
    with first, second, third:
        told = second.wait(cancel)
        assert next(told) == 1
        cancel.set()
        assert list(told) == []
        turns.leave(second)
        assert place(turns, third) == 1
    assert len(turns) == 0


def test_leaving_twice_or_after_an_error_wedges_nothing() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.ticket("ana"):
        raise ZeroDivisionError
    ticket = turns.ticket("ana")
    with ticket:
        turns.leave(ticket)
    assert len(turns) == 0
    assert most_at_once(turns) == 1


# -- background ---------------------------------------------------------------------------------


def test_background_gives_way_to_everybody_but_is_not_pushed_off_the_device() -> None:
    turns = Turns()
    runs, waits, ana, ben = (
        turns.ticket("ahead", background=True),
        turns.ticket("ahead", background=True),
        turns.ticket("ana"),
        turns.ticket("ben"),
    )
    turns.join(runs)
    turns.join(waits)
    assert not runs.give_way.is_set()  # another background job is no reason to hurry
    turns.join(ana)
    turns.join(ben)
    assert [place(turns, t) for t in (runs, ana, ben, waits)] == [0, 1, 2, 3]
    assert runs.give_way.is_set()
    assert not waits.give_way.is_set()  # it does not run, so it need not end


def test_a_job_of_a_person_is_never_asked_to_hurry() -> None:
    turns = Turns()
    ana, ben, ahead = turns.ticket("ana"), turns.ticket("ben"), turns.ticket("ana", True)
    for ticket in (ana, ahead, ben):
        turns.join(ticket)
    assert [place(turns, t) for t in (ana, ben, ahead)] == [0, 1, 2]
    assert not any(t.give_way.is_set() for t in (ana, ben, ahead))


# -- crowds -------------------------------------------------------------------------------------


def test_a_person_has_at_most_so_many_jobs_and_is_told_so() -> None:
    turns = Turns(most_per_person=2)
    with ExitStack() as stack:
        stack.enter_context(turns.ticket("ana"))
        stack.enter_context(turns.ticket("ana"))
        with pytest.raises(Busy, match="2 of your answers are on their way"):
            turns.join(turns.ticket("ana"))
        stack.enter_context(turns.ticket("ben"))  # others are not held up
        assert len(turns) == 3  # who was refused is not in the line
    turns.join(turns.ticket("ana"))  # and may ask again when these are done


def test_the_queue_is_full_at_its_limit() -> None:
    turns = Turns(most_waiting=3)
    for who in "abc":
        turns.join(turns.ticket(who))
    with pytest.raises(Busy, match="3 answers are waited for already"):
        turns.join(turns.ticket("d"))
    assert len(turns) == 3


def test_background_and_the_app_itself_are_neither_refused_nor_counted() -> None:
    turns = Turns(most_waiting=1, most_per_person=1)
    for _ in range(5):
        turns.join(turns.ticket(APP))
        turns.join(turns.ticket("ana", background=True))
    turns.join(turns.ticket("ana"))
    with pytest.raises(Busy):
        turns.join(turns.ticket("ana"))
    app = turns.ticket(APP)
    turns.join(app)
    # Before the background's places, behind those of the app and of ana.
    assert place(turns, app) == 6
