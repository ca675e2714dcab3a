"""A reload or a restart of the server in the middle of a task loses nothing."""

import logging
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor, letters, shown
from tests.ui.browser.serving import InLine, Served, free_port, start, stop

pytestmark = pytest.mark.ui

LONGEST_STOP = 5.0  # seconds, with a page open
BROKEN = [  # what a console says of a server that is away
    "ERR_CONNECTION",
    "ERR_INCOMPLETE",
    "ERR_INTERNET_DISCONNECTED",
    "Failed to fetch",
    "Failed to load resource",
    "signal timed out",
    "network error",
    "Server stopped unexpectedly",
]


def begin_both(me: Visitor) -> tuple[str, str]:
    """A pair and a ranking that wait for a judgement; their ids."""
    me.tab("Compare")
    pair = me.ask_both("Tell of the harbour.")
    me.tab("Rank")
    ranking = me.wait_for_ranking()
    me.press("c")
    return pair.task_id, ranking.task_id


def finish_both(me: Visitor, pair_id: str, ranking_id: str) -> None:
    """They are there again as they were, on the same tab, and can be judged."""
    expect(me.page.get_by_role("tab", name="Rank")).to_have_attribute("aria-selected", "true")
    me.tab("Compare")
    expect(me.at("#cmp-prompt")).to_have_text("Tell of the harbour.")
    expect(me.at("#cmp-a")).to_be_enabled()
    pair = me.open_task("pair")
    assert pair.task_id == pair_id
    for side, answer in zip("ab", shown(pair), strict=True):
        expect(me.answer(side)).to_have_text(answer.text)
    me.press("2")
    me.wait_for_votes(1)
    me.tab("Rank")
    ranking = me.wait_for_ranking()
    assert ranking.task_id == ranking_id
    expect(me.at("#rank-prompt")).to_have_text(ranking.prompt[0]["content"])
    for letter, answer in zip("ABCD", shown(ranking), strict=True):
        expect(me.at(f'.rk-card[data-letter="{letter}"] .rk-text')).to_have_text(answer.text)
    me.press("d", "c", "b", "Enter")
    votes = me.wait_for_votes(2)
    assert [vote.task.task_id for vote in votes] == [pair_id, ranking_id]
    assert [letters(vote) for vote in votes] == [["B", "A"], ["D", "C", "B", "A"]]


def test_a_reload_in_the_middle_loses_nothing(visit: Visit, fake: Served) -> None:
    me = visit(fake)
    name = me.name
    ids = begin_both(me)
    me.open()
    assert me.name == name
    finish_both(me, *ids)


def dot(me: Visitor) -> str:
    """Colour of the sign that says how the server is."""
    colour = "dot => getComputedStyle(dot).backgroundColor"
    return str(me.at("#studio-bar .dot").evaluate(colour))


def test_a_page_without_its_server_says_so_until_it_is_back(visit: Visit, tmp_path: Path) -> None:
    port, store = free_port(), tmp_path / "rankings.db"
    served = start(InLine(), store, tmp_path, port=port)
    try:
        me = visit(served)
        me.heard.expected += BROKEN
        bar, green = me.at("#studio-bar"), dot(me)
        expect(bar.get_by_text("ready", exact=True)).to_be_visible()
        expect(bar.get_by_text("connection lost")).to_be_hidden()
        stop(served)
        expect(bar.get_by_text("connection lost")).to_be_visible()
        expect(bar.get_by_text("ready", exact=True)).to_be_hidden()
        assert dot(me) != green
        served = start(InLine(), store, tmp_path, port=port)
        me.served = served
        expect(bar.get_by_text("ready", exact=True)).to_be_visible()
        expect(bar.get_by_text("connection lost")).to_be_hidden()
        assert dot(me) == green
    finally:
        stop(served)


def test_a_page_that_was_cut_off_for_a_while_goes_on(visit: Visit, fake: Served) -> None:
    me = visit(fake)
    me.heard.expected += BROKEN
    bar = me.at("#studio-bar")
    me.context.set_offline(True)
    expect(bar.get_by_text("connection lost")).to_be_visible()
    expect(me.at("#studio-live")).to_contain_text("Connection lost.")
    me.page.evaluate("window.isOld = true")
    me.context.set_offline(False)
    me.page.wait_for_function("!window.isOld")  # by itself
    expect(bar.get_by_text("ready", exact=True)).to_be_visible()
    expect(bar.get_by_text("connection lost")).to_be_hidden()
    assert me.name
    me.tab("Compare")
    me.ask_both("Tell of the island.")


def test_a_restart_in_the_middle_loses_nothing(
    visit: Visit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, store = free_port(), tmp_path / "rankings.db"
    served = start(InLine(), store, tmp_path, port=port)
    try:
        me = visit(served)
        name = me.name
        ids = begin_both(me)
        me.heard.expected += BROKEN
        old = me.page.evaluate("window.gradio_config.app_id")
        began = time.monotonic()
        stop(served)
        assert time.monotonic() - began < LONGEST_STOP
        served = start(InLine(), store, tmp_path, port=port)
        me.served = served
        # The page finds its server again, and loads itself again, by itself.
        me.page.wait_for_function(
            "old => window.gradio_config && window.gradio_config.app_id !== old", arg=old
        )
        assert me.name == name
        finish_both(me, *ids)
    finally:
        stop(served)
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []
