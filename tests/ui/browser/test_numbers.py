"""The times that the app promises: a vote is saved at once, and the next task waits for nobody."""

import json
import statistics
import sys
import time

import pytest
from playwright.sync_api import Browser, expect

from tests.ui.browser.conftest import enter
from tests.ui.browser.people import Visitor, timely, wait_until
from tests.ui.browser.serving import Served

pytestmark = pytest.mark.ui

SAVED_SECONDS = 0.25  # from the key to the row in the file
OVERHEAD_SECONDS = 1.5  # from the key to the next answers, readable and votable
FIRST_PAGE_SECONDS = 2.0
REPEATS = 5
SHARED = 2  # a machine that is shared may take so many times the goal; the figures are printed


def median_of(measure: list[float], what: str) -> float:
    """The middle one; all are printed, for whoever wants the figures (`pytest -s`)."""
    middle = statistics.median(measure)
    figures = {what: [round(m, 3) for m in measure], "median": round(middle, 3)}
    sys.stderr.write(json.dumps(figures) + "\n")
    return middle


def test_a_vote_is_in_the_file_a_quarter_second_after_its_key(me: Visitor) -> None:
    """Read by a connection of its own, as another program would."""

    def measure() -> float:
        took = []
        for number in range(REPEATS):
            me.tab("Compare")
            me.ask_both(f"Which is quicker, {time.monotonic_ns()}-{number}?")
            before = me.served.studio.store.counts()["live"]
            began = time.monotonic()
            me.press("1")
            wait_until(lambda b=before: me.served.studio.store.counts()["live"] > b, "the vote")
            took.append(time.monotonic() - began)
            expect(me.at("#cmp-status")).to_contain_text("Saved")
        return median_of(took, "key press to saved vote, seconds")

    timely(SHARED * SAVED_SECONDS, measure)


def all_ready(me: Visitor) -> bool:
    """As many tasks lie ready as ever do; the page tells only how many did when it was drawn."""
    ahead = me.served.studio.ahead
    return any(p.who == me.name and ahead.ready(p) == ahead.depth for p in list(ahead._shelves))


def test_the_next_ranking_is_there_at_once(me: Visitor) -> None:
    """Interface overhead of a judgement: key press to the next task on the screen."""

    def measure() -> float:
        took = []
        me.tab("Rank")
        for _ in range(REPEATS):
            task = me.wait_for_ranking()
            wait_until(lambda: all_ready(me), "tasks made ahead")
            me.press("a", "b", "c")
            began = time.monotonic()
            me.press("Enter")
            prompt = task.prompt[0]["content"]
            expect(me.at("#rank-prompt")).not_to_have_text(prompt)
            expect(me.at(".rk-card").first).to_be_visible()
            took.append(time.monotonic() - began)
        return median_of(took, "ranking saved to the next one shown, seconds")

    timely(SHARED * OVERHEAD_SECONDS, measure)


def test_the_first_page_is_there_two_seconds_after_it_is_asked_for(
    browser: Browser, fake: Served
) -> None:
    """With an empty cache, until something can be typed."""

    def measure() -> float:
        took = []
        for _ in range(REPEATS):
            visitor: Visitor = enter(browser, fake)
            began = time.monotonic()
            visitor.page.goto("/", wait_until="commit")
            expect(visitor.at("#chat-box textarea")).to_be_editable()
            took.append(time.monotonic() - began)
            visitor.context.close()
        return median_of(took, "first page, seconds")

    timely(SHARED * FIRST_PAGE_SECONDS, measure)


def test_the_measures_can_fail() -> None:
    """A goal that nobody meets is not met: `timely` is no decoration."""
    with pytest.raises(AssertionError, match="goal 0 s"):
        timely(0.0, lambda: 0.001)
