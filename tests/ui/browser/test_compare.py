"""Compare: blind votes by keyboard alone, keys that must not vote, and what stays hidden."""

import json
import re
import time

import pytest
from playwright.sync_api import expect

from lora_rlhf.preferences.counting import is_too_fast
from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor, quiet_for, shown, wait_until
from tests.ui.browser.serving import Served

pytestmark = pytest.mark.ui

NAMES = ("quick/sft", "quick/policy")


def test_a_blind_pair_by_keyboard_alone(visit: Visit, fake: Served) -> None:
    me = visit(fake)
    me.page.get_by_role("tab", name="Chat").focus()
    me.press("Tab", "Enter")
    expect(me.at("#cmp-box")).to_be_visible()
    task = me.ask_both("Why does an owl sing?")
    a, b = shown(task)
    assert {a.adapter, b.adapter} == set(NAMES)
    assert task.blind
    expect(me.answer("a")).to_have_text(a.text)
    expect(me.answer("b")).to_have_text(b.text)
    expect(me.at("#cmp-facts-a")).to_be_empty()
    me.press("1")
    expect(me.at("#cmp-facts-a")).to_contain_text(f"{a.adapter} reward {a.rm_score:+.2f}")
    expect(me.at("#cmp-facts-b")).to_contain_text(f"{b.adapter} reward {b.rm_score:+.2f}")
    expect(me.at("#cmp-a")).to_be_disabled()
    (vote,) = me.votes
    assert vote.task.task_id == task.task_id
    assert vote.judgement.ranking == ((a.rid,), (b.rid,))
    assert vote.judgement.outcome == "decided"
    assert vote.judgement.blind
    assert not vote.judgement.scores_visible
    assert vote.judgement.keys == 1
    assert vote.judgement.device == "desktop"


def test_every_key_says_what_its_button_says(me: Visitor) -> None:
    me.tab("Compare")
    me.ask_both("Tell of the moon.")
    winner = {"1": 0, "2": 1, "Shift+Digit1": 0, "Shift+Digit2": 1}
    keys = ["Shift+Digit2", "0", "9", "2", "Shift+Digit1", "s", "Numpad1"]
    for count, key in enumerate(keys, start=1):
        task = me.open_task("pair")
        a, b = shown(task)
        me.press(key)
        vote = me.wait_for_votes(count)[-1].judgement
        assert vote.task_id == task.task_id
        said = (vote.outcome, vote.strength, vote.ranking)
        both = ((a.rid, b.rid),)
        expected = {
            "0": ("tie", None, both),
            "9": ("both_bad", None, both),
            "s": ("skip", None, ()),
        }.get(key)
        if expected is None:
            first = winner.get(key, 0)
            order = ((a.rid,), (b.rid,)) if first == 0 else ((b.rid,), (a.rid,))
            expected = ("decided", 2 if key.startswith("Shift") else None, order)
        assert said == expected, key
        expect(me.at("#cmp-a")).to_be_disabled()
        me.press("n")
        expect(me.at("#cmp-a")).to_be_enabled()


def choose_pool(me: Visitor, option: str) -> None:
    """By mouse, where prompts come from."""
    me.at("#cmp-source input").click()
    me.page.get_by_role("option", name=option).click()


def test_the_pool_draws_a_prompt_when_it_is_chosen_and_one_after_each_vote(
    visit: Visit, fake: Served
) -> None:
    me = visit(fake, tab="Compare")
    following = me.at("#cmp-another")
    expect(following).to_be_hidden()
    choose_pool(me, "held-out prompts")
    seen = []
    for go_on in (lambda: me.press("n"), following.click, lambda: None):
        expect(me.at("#cmp-a")).to_be_enabled()
        task = me.open_task("pair")
        assert task.prompt_source.startswith("pool:heldout#")
        expect(me.at("#cmp-prompt")).to_have_text(task.prompt[0]["content"])
        seen.append(task.prompt_sha256)
        expect(following).to_have_text("N \u00b7 Next")
        expect(following).to_be_disabled()  # a pair that was not judged is not thrown away
        with quiet_for(me):
            me.press("n")
        me.press("1")  # chosen by mouse, the list does not keep the keys
        me.wait_for_votes(len(seen))
        expect(following).to_be_enabled()
        expect(following).to_be_in_viewport()
        go_on()
    assert len(set(seen)) == 3
    choose_pool(me, "my own prompt")
    expect(following).to_be_hidden()
    me.ask_both("Tell of the bridge.")
    me.press("n")  # asks both again
    expect(me.at("#cmp-prompt")).to_have_text("Tell of the bridge.")


def test_a_drawn_pair_is_there_after_a_reload_with_its_way_on(visit: Visit, fake: Served) -> None:
    me = visit(fake, tab="Compare")
    choose_pool(me, "held-out prompts")
    expect(me.at("#cmp-a")).to_be_enabled()
    task = me.open_task("pair")
    me.open()
    expect(me.at("#cmp-a")).to_be_enabled()
    expect(me.at("#cmp-source input")).to_have_value("held-out prompts")
    expect(me.at("#cmp-box")).to_be_hidden()
    me.press("2")
    assert me.wait_for_votes(1)[0].task.task_id == task.task_id
    expect(me.at("#cmp-another")).to_be_enabled()  # the store knows of it before the page
    me.press("n")
    expect(me.at("#cmp-a")).to_be_enabled()
    assert me.open_task("pair").task_id != task.task_id


def test_a_vote_faster_than_reading_is_told_where_it_was_given(me: Visitor) -> None:
    me.tab("Compare")
    me.ask_both("Tell of the stair.")
    me.press("1")
    (vote,) = me.wait_for_votes(1)
    assert is_too_fast(vote.task, vote.judgement)
    expect(me.at("#cmp-status")).to_contain_text("left out of training")
    me.press("n")
    expect(me.at("#cmp-a")).to_be_enabled()
    me.page.wait_for_timeout(5000)  # of 28 words: 1.4 s, by a clock that may start late
    me.press("2")
    slow = me.wait_for_votes(2)[-1]
    assert not is_too_fast(slow.task, slow.judgement)
    expect(me.at("#cmp-status")).to_contain_text("B is better. Saved after")
    expect(me.at("#cmp-status")).not_to_contain_text("left out")


def test_who_reads_along_while_answers_are_written_is_not_too_fast(
    me: Visitor, fake: Served
) -> None:
    fake.engine.seconds_a_word = 0.3  # 12 words, of which a quarter of reading time is 1.4 s
    me.tab("Compare")
    me.ask_both("Tell of the slow river.")
    expect(me.at("#cmp-a")).to_be_enabled()
    me.press("1")
    (vote,) = me.wait_for_votes(1)
    assert not is_too_fast(vote.task, vote.judgement)
    # What is asked next has a clock of its own.
    fake.engine.seconds_a_word = 0.0
    me.press("n")
    expect(me.at("#cmp-a")).to_be_enabled()
    me.press("2")
    quick = me.wait_for_votes(2)[-1]
    assert is_too_fast(quick.task, quick.judgement)


def test_undo_takes_the_vote_back_and_shows_its_pair_again(me: Visitor) -> None:
    me.tab("Compare")
    task = me.ask_both("Tell of the sea.")
    me.press("1")
    first = me.wait_for_votes(1)[0]
    expect(me.at("#cmp-undo")).to_be_enabled()
    me.press("u")
    expect(me.at("#cmp-a")).to_be_enabled()
    assert not me.votes
    expect(me.at("#cmp-facts-a")).to_be_empty()
    me.press("2")
    (second,) = me.wait_for_votes(1)
    assert second.task.task_id == task.task_id
    assert second.judgement.id != first.judgement.id
    assert second.judgement.ranking == first.judgement.ranking[::-1]


def test_an_answer_stays_on_the_side_where_it_streamed(me: Visitor, fake: Served) -> None:
    fake.engine.seconds_a_word = 0.03
    me.tab("Compare")
    me.press("/")
    me.page.keyboard.type("Tell of the boat.")
    apart = 0
    for key in ("Enter", "n", "n", "n", "n"):  # sides that were drawn anew would agree by chance
        me.press(key)
        expect(me.at("#cmp-status")).to_contain_text("Both answer")
        expect(me.answer("a")).to_have_text(re.compile(r"\w+ \w+ \w+"))
        begun = [me.answer(side).inner_text().strip() for side in "ab"]
        apart += begun[0] != begun[1]  # three words may be alike by chance
        expect(me.at("#cmp-a")).to_be_enabled()
        for start, answer in zip(begun, shown(me.open_task("pair")), strict=True):
            assert answer.text.startswith(start.rstrip("."))
        me.press("s")
        expect(me.at("#cmp-a")).to_be_disabled()
    assert apart >= 3


def test_typing_never_votes(me: Visitor) -> None:
    me.tab("Compare")
    me.ask_both("Tell of the river.")
    expect(me.at("#cmp-box textarea")).not_to_be_focused()
    with quiet_for(me):
        me.press("/")
        me.page.keyboard.type("1029sun")
    expect(me.at("#cmp-box textarea")).to_have_value("Tell of the river.1029sun")
    with quiet_for(me):
        me.press("Escape")
    expect(me.at("#cmp-box textarea")).not_to_be_focused()
    me.press("2")
    me.wait_for_votes(1)


def test_held_and_modified_keys_never_vote(me: Visitor, fake: Served) -> None:
    fake.engine.seconds_a_word = 0.03
    me.tab("Compare")
    me.press("/")
    me.page.keyboard.type("Tell of the bell.")
    me.press("Enter")
    me.page.keyboard.down("1")
    expect(me.at("#cmp-a")).to_be_enabled()
    with quiet_for(me):
        me.page.keyboard.down("1")  # the second time without an up between: a repeat
        me.page.keyboard.down("1")
    me.page.keyboard.up("1")
    for modifier in ("Control", "Alt", "Meta"):
        with quiet_for(me, 0.2):
            me.press(f"{modifier}+1", f"{modifier}+0", f"{modifier}+s")
    me.press("1")
    me.wait_for_votes(1)


def test_digits_vote_by_their_place_on_the_keyboard(me: Visitor) -> None:
    me.tab("Compare")
    task = me.ask_both("Parle du hibou.")
    french = {"key": "\u00e9", "code": "Digit2", "bubbles": True}
    me.page.evaluate(
        "key => document.body.dispatchEvent(new KeyboardEvent('keydown', key))", french
    )
    (vote,) = me.wait_for_votes(1)
    assert vote.judgement.ranking[0] == (shown(task)[1].rid,)


def _names_in_page(me: Visitor) -> list[int]:
    """How often each name stands in the page, its configuration and what it keeps."""
    held = me.page.evaluate(
        "() => document.documentElement.outerHTML + JSON.stringify(window.gradio_config)"
        " + JSON.stringify({...localStorage}) + JSON.stringify({...sessionStorage})"
    )
    return [held.count(name) for name in NAMES]


def test_nothing_tells_who_wrote_a_blind_pair(visit: Visit, fake: Served) -> None:
    me = visit(fake, tab="Compare")
    expect(me.at("#cmp-first input")).to_be_visible()
    before, start = _names_in_page(me), time.monotonic()
    assert all(before), "the pickers offer them"
    task = me.ask_both("Tell of the lamp.")
    me.page.wait_for_timeout(300)
    told = fake.wire.text_between(start, time.monotonic())
    assert task.responses[0].text in told, "the ear hears nothing"
    secrets = [*NAMES, "reward", "KL"]
    for answer in task.responses:
        secrets += [str(answer.adapter_sha256), str(answer.seed), f"{answer.rm_score:+.2f}"]
        secrets += [json.dumps(answer.rid)]
    assert [word for word in secrets if word in told] == []
    assert _names_in_page(me) == before
    expect(me.at("#cmp-facts-a, #cmp-facts-b")).to_have_text(["", ""])
    me.press("1")
    expect(me.at("#cmp-facts-a")).to_contain_text("quick/")
    told = fake.wire.text_between(start, time.monotonic())
    assert all(name in told for name in NAMES), "and hears it once it may be said"


def test_a_named_pair_shows_who_answers_before_the_vote(me: Visitor) -> None:
    me.tab("Compare")
    me.at("#cmp-blind").get_by_role("checkbox").uncheck()
    task = me.ask_both("Tell of the tower.")
    assert not task.blind
    for side, answer in zip("ab", shown(task), strict=True):
        expect(me.at(f"#cmp-facts-{side}")).to_contain_text(str(answer.adapter))
    me.at("#cmp-b-much").click()
    (vote,) = me.wait_for_votes(1)
    assert vote.judgement.strength == 2
    assert vote.judgement.scores_visible
    assert not vote.judgement.blind


def test_stopped_pairs_cannot_be_voted_on(me: Visitor, fake: Served) -> None:
    fake.engine.seconds_a_word, fake.engine.words = 0.05, 100
    me.tab("Compare")
    me.press("/")
    me.page.keyboard.type("Tell of the sun.")
    me.press("Enter")
    expect(me.answer("a")).to_have_text(re.compile(r"\w+ \w+"))
    me.at("#cmp-stop").click()
    wait_until(lambda: len(fake.engine.turns) == 0, "a free engine", 0.5)
    expect(me.at("#cmp-status")).to_contain_text("Stopped")
    expect(me.at("#cmp-answer-a")).to_contain_text("(stopped)")
    for button in ("a", "b", "tie", "bad", "a-much", "b-much"):
        expect(me.at(f"#cmp-{button}")).to_be_disabled()
    with quiet_for(me):
        me.press("1", "2", "0", "9")
