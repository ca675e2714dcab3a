"""How often somebody may do something. Keys and times are kept in memory alone."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

MOST_KEYS = 10_000  # the least recently seen are forgotten, so that memory has a bound

Clock = Callable[[], float]


class Window:
    """At most so many in any stretch of time.

    Args:
        most: how many.
        seconds: in how long.
        clock: seconds that never go back.
    """

    def __init__(self, most: int, seconds: float, clock: Clock = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, *keys: str) -> float:
        """Count one for every key, or none at all; the seconds to wait, 0 where it was counted."""
        with self._lock:
            now = self._clock()
            counted = [self._recent(key, now) for key in keys]
            full = [times[0] for times in counted if len(times) >= self._most]
            if full:
                return max(full) + self._seconds - now
            for times in counted:
                times.append(now)
            return 0.0

    def give_back(self, *keys: str) -> None:
        """Forget the newest of every key: it turned out not to count."""
        with self._lock:
            for key in keys:
                if self._times.get(key):
                    self._times[key].pop()

    def _recent(self, key: str, now: float) -> deque[float]:
        times = self._times.setdefault(key, deque())
        self._times.move_to_end(key)
        while times and now - times[0] >= self._seconds:
            times.popleft()
        while len(self._times) > MOST_KEYS:
            self._times.popitem(last=False)
        return times


class Bucket:
    """A bucket of tokens for each key: some at once, then a steady rate.

    Args:
        burst: tokens of a full bucket.
        rate: tokens that come back in a second.
        clock: seconds that never go back.
    """

    def __init__(self, burst: float, rate: float, clock: Clock = time.monotonic) -> None:
        self._burst, self._rate, self._clock = burst, rate, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str) -> float:
        """Take a token; the seconds to wait for one, 0 where it was taken."""
        with self._lock:
            now = self._clock()
            left, seen = self._left.get(key, (self._burst, now))
            left = min(self._burst, left + (now - seen) * self._rate)
            taken = left >= 1
            self._left[key] = (left - 1 if taken else left, now)
            self._left.move_to_end(key)
            while len(self._left) > MOST_KEYS:
                self._left.popitem(last=False)
            return 0.0 if taken else (1 - left) / self._rate


class Owned:
    """Names that belong to whoever used them first, such as the session of a browser's page."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._most = most
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def belongs(self, name: str, to: str) -> bool:
        """Whether the name is free, and then theirs from now on, or theirs already."""
        with self._lock:
            owner = self._owners.setdefault(name, to)
            self._owners.move_to_end(name)
            while len(self._owners) > self._most:
                self._owners.popitem(last=False)
            return owner == to
