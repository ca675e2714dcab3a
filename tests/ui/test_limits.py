"""How often somebody may do something, against a clock that is turned by hand."""

import threading

import pytest

from ui import limits
from ui.limits import Bucket, Owned, Window


class Hands:
    """A clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_window_counts_and_says_how_long_to_wait() -> None:
    clock = Hands()
    window = Window(3, 60, clock)
    for _ in range(3):
        assert window.take("ana") == 0
        clock.now += 10
    assert window.take("ana") == 30  # the first was 30 s ago and goes after 60
    assert window.take("bob") == 0
    clock.now += 29.5
    assert window.take("ana") == 0.5
    clock.now += 0.5
    assert window.take("ana") == 0
    assert window.take("ana") == 10


def test_what_was_refused_does_not_lengthen_the_wait() -> None:
    clock = Hands()
    window = Window(1, 60, clock)
    window.take("ana")
    for _ in range(5):
        clock.now += 10
        window.take("ana")
    clock.now += 10
    assert window.take("ana") == 0


def test_all_keys_count_or_none() -> None:
    clock = Hands()
    window = Window(2, 60, clock)
    assert window.take("name ana", "peer 1") == 0
    assert window.take("name bob", "peer 1") == 0
    assert window.take("name ana", "peer 1") == 60
    assert window.take("name ana", "peer 2") == 0, "the refused one had not counted for ana"
    assert window.take("name ana", "peer 3") == 60


def test_what_is_given_back_can_be_taken_again() -> None:
    window = Window(1, 60, Hands())
    window.take("ana")
    window.give_back("ana")
    assert window.take("ana") == 0
    window.give_back("nobody")


def test_a_bucket_gives_some_at_once_and_then_a_steady_rate() -> None:
    clock = Hands()
    bucket = Bucket(burst=3, rate=2, clock=clock)
    assert [bucket.take("ana") for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now += 0.25
    assert bucket.take("ana") == 0.25
    clock.now += 0.25
    assert bucket.take("ana") == 0
    assert bucket.take("bob") == 0
    clock.now += 100
    assert [bucket.take("ana") == 0 for _ in range(4)] == [True, True, True, False]


def test_a_name_is_of_whoever_came_first() -> None:
    owned = Owned(most=2)
    assert owned.belongs("session", "ana")
    assert not owned.belongs("session", "bob")
    assert owned.belongs("session", "ana")


def test_memory_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_KEYS", 10)
    window, bucket, owned = Window(1, 60, Hands()), Bucket(1, 1, Hands()), Owned(most=10)
    for number in range(50):
        window.take(str(number))
        bucket.take(str(number))
        owned.belongs(str(number), "ana")
    assert len(window._times) == len(bucket._left) == len(owned._owners) == 10
    assert window.take("49") > 0, "the newest are the ones that are kept"


def test_many_at_once_do_not_get_past() -> None:
    window, bucket = Window(100, 60, Hands()), Bucket(100, 1, Hands())
    taken: list[tuple[bool, bool]] = []

    def take() -> None:
        for _ in range(50):
            taken.append((window.take("ana") == 0, bucket.take("ana") == 0))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(each) for each in zip(*taken, strict=True)] == [100, 100]
