"""Compare: what the page says of a vote, of the Blind box and of the next prompt, and when."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from tests.ui.test_comparing import NO_CLIENT, PAGE, POLICY, SFT, controls, task_of, whole_turn
from ui.chatting import Talk
from ui.comparing import POOL, TYPED, Pane, ask_both, carry, compare_turn, restore, undo, vote
from ui.people import Person
from ui.retraining import Wishes, choose
from ui.studio import Studio
from ui.tabs.compare import layout, updates

RUN = Path("runs/quick")
WISHES = Wishes("quick")


@pytest.fixture
def ask(studio: Studio, ana: Person) -> Callable[..., Pane]:
    def ask_whole(source: str = TYPED, blind: bool = True) -> Pane:
        *_, last = ask_both(studio, ana, PAGE, "Why?", source, blind, controls(POLICY, SFT))
        return last

    return ask_whole


@pytest.mark.parametrize(("said", "is_left_out"), [("a", True), ("b_much", True), ("skip", False)])
def test_a_vote_that_is_too_fast_to_train_on_says_so(
    studio: Studio, ana: Person, ask: Callable[..., Pane], said: Any, is_left_out: bool
) -> None:
    after = vote(studio, ana, ask(), said, '{"ms": 400}')  # of 25 words
    removed = choose(studio.judged(), WISHES, studio.engine.prompts_of(RUN)).removed
    assert ("faster than anybody reads" in removed) == is_left_out
    assert ("faster than it can be read: left out of training" in after.status) == is_left_out
    assert after.tone == ("bad" if is_left_out else "good")
    assert "Saved after 0 s" in after.status


def test_the_blind_box_says_what_is_stored_of_the_pair_and_then_what_it_said(
    studio: Studio, ana: Person, ask: Callable[..., Pane]
) -> None:
    *_, last = compare_turn(studio, ana, PAGE, Talk((whole_turn(),)), SFT)
    assert last.status.startswith("You know A from Chat.")
    named = carry(last, Pane(), box=True)
    assert named.box is task_of(studio, named).blind is False
    box = updates(named)[-1]
    assert (box.value, box.interactive) == (False, False)
    *_, last = compare_turn(studio, ana, PAGE, Talk((whole_turn("Hm"),)), SFT)
    named = carry(last, named, box=False)  # another one, before any vote on the first
    after = carry(vote(studio, ana, named, "a", NO_CLIENT), named, box=False)
    box = updates(after)[-1]
    assert (box.value, box.interactive) == (True, True)
    assert carry(after, after, box=True).box is None  # left alone from then on
    again = carry(undo(studio, ana), after, box=True)
    assert again.box is False
    asked = carry(ask(), again, box=False)
    assert (asked.box, asked.wish) == (True, None)
    blind = carry(asked, Pane(), box=False)  # as by Undo, for somebody who has unticked it since
    assert (blind.box, blind.facts) == (True, ("", ""))


def test_a_box_that_agrees_with_the_pair_is_left_alone(
    studio: Studio, ask: Callable[..., Pane]
) -> None:
    for blind in (True, False):
        pane = carry(ask(blind=blind), Pane(), box=blind)
        assert (pane.box, pane.wish) == (None, None)
        assert updates(pane)[-1] == gr.skip()
        assert ("Not blind" in pane.status) == (not blind)


def test_the_next_prompt_of_the_pool_comes_after_the_vote(
    studio: Studio, ana: Person, ask: Callable[..., Pane]
) -> None:
    def button(pane: Pane) -> tuple[bool, bool]:
        return layout(pane)[-1].visible, updates(pane)[-2].interactive

    before = Pane(drawn=True)
    pane = carry(ask(source=POOL), before, box=True)
    assert button(pane) == (True, False)
    back = restore(studio, ana)
    assert back.drawn
    assert layout(back)[0].value == POOL
    assert button(carry(vote(studio, ana, pane, "a", NO_CLIENT), pane, box=True)) == (True, True)
    typed = carry(ask(), Pane(), box=True)
    assert button(typed)[0] is False
    assert not restore(studio, ana).drawn
