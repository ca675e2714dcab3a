"""Rank: by keyboard, by tapping, by dragging; ties, flags, skips, undo; nothing shown too early."""

import time

import pytest
from playwright.sync_api import Locator, expect

from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor, letters, quiet_for, shown
from tests.ui.browser.serving import Served

pytestmark = pytest.mark.ui


def card(me: Visitor, letter: str) -> Locator:
    return me.at(f'.rk-card[data-letter="{letter}"]')


def order(me: Visitor) -> str:
    """The order as the sheet shows it."""
    return me.at(".rk-strip").inner_text()


def test_four_answers_with_a_tie_in_five_keys(me: Visitor) -> None:
    me.tab("Rank")
    task = me.wait_for_ranking()
    assert len(task.responses) == 4
    for letter, answer in zip("ABCD", shown(task), strict=True):
        expect(card(me, letter).locator(".rk-text")).to_have_text(answer.text)
    expect(me.at("#rank-prompt")).to_have_text(task.prompt[0]["content"])
    assert all(letter not in order(me) for letter in "ABCD"), "starts empty"
    expect(me.at(".rk-status")).to_contain_text("Which is best?")
    me.press("b", "d", "=", "c")
    expect(me.at(".rk-status")).to_have_text("All are placed. Enter saves.")
    me.press("Enter")
    (vote,) = me.wait_for_votes(1)
    assert vote.task.task_id == task.task_id
    assert letters(vote) == ["B", "CD", "A"]
    assert vote.judgement.outcome == "decided"
    assert vote.judgement.blind
    assert not vote.judgement.scores_visible
    assert vote.judgement.keys == 5
    expect(me.at("#rank-prompt")).not_to_have_text(task.prompt[0]["content"])
    expect(me.at("#rank-before")).to_have_text("Your last ranking, best first, = where tied:")
    expect(me.at(".rk-place")).to_have_text(["1", "2 =", "2 =", "4"])
    for line, place in zip(me.at(".rk-reveal li").all(), (1, 3, 2, 0), strict=True):
        expect(line).to_contain_text(f"{'ABCD'[place]}: {shown(task)[place].adapter}")
    assert me.open_task("rank").task_id != task.task_id


def test_backspace_and_keys_that_do_not_fit(me: Visitor) -> None:
    me.tab("Rank")
    me.wait_for_ranking()
    with quiet_for(me):
        me.press("Enter")  # nothing is ranked yet
        me.press("a", "a", "z", "c", "Enter")  # A once; Z is nobody; two are left
    expect(me.at(".rk-status")).to_contain_text("B, D left")
    me.press("Backspace", "=", "Backspace", "d", "=", "b", "Enter")
    (vote,) = me.wait_for_votes(1)
    assert letters(vote) == ["A", "BD", "C"]


def test_all_tied_all_bad_and_skip(me: Visitor) -> None:
    me.tab("Rank")
    said = []
    for count, keys in enumerate((["a", "=", "b", "=", "c", "=", "d", "Enter"], ["x"], ["s"])):
        task = me.wait_for_ranking()
        me.press(*keys)
        vote = me.wait_for_votes(count + 1)[-1]
        assert vote.task.task_id == task.task_id
        said.append((vote.judgement.outcome, letters(vote)))
        expect(me.at("#rank-prompt")).not_to_have_text(task.prompt[0]["content"])
    assert said == [("tie", ["ABCD"]), ("both_bad", ["ABCD"]), ("skip", [])]


def test_undo_brings_the_saved_ranking_back(me: Visitor) -> None:
    me.tab("Rank")
    task = me.wait_for_ranking()
    me.press("a", "b", "c", "Enter")
    first = me.wait_for_votes(1)[0]
    expect(me.at('.rk-action[data-key="U"]')).to_be_enabled()
    me.press("u")
    expect(me.at("#rank-prompt")).to_have_text(task.prompt[0]["content"])
    assert not me.votes
    assert all(letter not in order(me) for letter in "ABCD")
    me.press("d", "c", "b", "Enter")
    (second,) = me.wait_for_votes(1)
    assert second.task.task_id == task.task_id
    assert second.judgement.id != first.judgement.id
    assert letters(second) == ["D", "C", "B", "A"]


def test_flags_and_a_note(me: Visitor) -> None:
    me.tab("Rank")
    me.wait_for_ranking()
    me.press("f")
    flags = me.page.get_by_role("group", name="Flags for this task")
    flags.get_by_label("off topic").check()
    flags.get_by_label("too long").check()
    flags.get_by_label("A note").fill("about a bad card")
    with quiet_for(me):
        flags.get_by_label("A note").press("x")  # typed, and no verdict
    assert all(letter not in order(me) for letter in "ABCD")
    me.press("Escape", "c", "a", "d", "Enter")
    (vote,) = me.wait_for_votes(1)
    assert set(vote.judgement.flags) == {"off_topic", "too_long"}
    assert vote.judgement.note == "about a bad cardx"
    assert letters(vote) == ["C", "A", "D", "B"]


def test_held_and_modified_keys_do_nothing(me: Visitor) -> None:
    me.tab("Rank")
    me.wait_for_ranking()
    with quiet_for(me):
        me.press("Control+x", "Alt+s", "Meta+s", "Control+Enter")
    me.page.keyboard.down("a")
    me.page.keyboard.down("a")
    me.page.keyboard.up("a")
    me.press("b", "c")
    me.page.keyboard.down("Enter")
    me.wait_for_votes(1)
    me.wait_for_ranking()
    with quiet_for(me):
        me.press("a", "b", "c")
        me.page.keyboard.down("Enter")  # held since the last task
    me.page.keyboard.up("Enter")
    me.press("Enter")
    assert letters(me.wait_for_votes(2)[-1]) == ["A", "B", "C", "D"]


def test_enter_presses_what_has_the_focus_and_saves_from_anywhere_else(me: Visitor) -> None:
    me.tab("Rank")
    me.wait_for_ranking()
    me.press("a", "b", "c")
    with quiet_for(me):
        me.page.get_by_role("tab", name="Votes").focus()
        me.press("Enter")
        expect(me.page.get_by_role("tab", name="Votes")).to_have_attribute("aria-selected", "true")
    me.tab("Rank")
    me.at('.rk-action[data-key="="]').focus()
    me.press("Enter")  # a tie, and no ranking
    expect(me.at(".rk-eq.pending")).to_be_visible()
    me.press("d")
    me.at('.rk-action[data-key="S"]').focus()
    me.press("Enter")
    (vote,) = me.wait_for_votes(1)
    assert (vote.judgement.outcome, vote.judgement.ranking) == ("skip", ())
    me.wait_for_ranking()
    me.press("c", "b", "a")
    card(me, "B").focus()
    me.press("Enter")
    assert letters(me.wait_for_votes(2)[-1]) == ["C", "B", "A", "D"]


def test_whoever_uses_tab_and_space_keeps_their_place(me: Visitor) -> None:
    me.tab("Rank")
    me.wait_for_ranking()
    for letter in "BDA":
        card(me, letter).focus()
        me.press("Tab", "Shift+Tab", "Space")
        expect(card(me, letter)).to_be_focused()
        expect(card(me, letter)).to_have_attribute("aria-pressed", "true")
    me.at('.rk-action[data-key="Enter"]').focus()
    me.press("Tab", "Shift+Tab", "Space")
    assert letters(me.wait_for_votes(1)[0]) == ["B", "D", "A", "C"]


def test_with_six_answers_n_flags_and_f_is_an_answer(visit: Visit, fake: Served) -> None:
    me = visit(fake, tab="Rank")
    me.wait_for_ranking()
    me.page.get_by_role("button", name="What is ranked").click()
    answers = me.at("#rank-settings").get_by_label("number input for Answers")
    answers.fill("6")
    answers.press("Enter")
    answers.blur()
    me.press("s")  # the task that lay there was of four
    expect(me.at(".rk-card")).to_have_count(6)
    me.press("f", "n")
    expect(card(me, "F").locator(".rk-rank")).to_have_text("1")
    expect(me.at(".rk-flags")).to_be_visible()
    expect(me.at('.rk-action[data-key="N"]')).to_have_text("NFlag")


def test_by_tapping_on_a_phone(visit: Visit, fake: Served) -> None:
    phone = {"width": 390, "height": 844}
    me = visit(fake, tab="Rank", viewport=phone, has_touch=True, is_mobile=True)
    me.wait_for_ranking()
    card(me, "C").tap()
    card(me, "A").tap()
    me.at('.rk-action[data-key="="]').tap()
    card(me, "D").tap()
    card(me, "A").tap()  # once more takes it out
    card(me, "A").tap()
    expect(card(me, "C").locator(".rk-rank")).to_have_text("1")
    expect(card(me, "A").locator(".rk-rank")).to_have_text("3")
    expect(card(me, "B").locator(".rk-rank")).to_have_text("4")
    me.at('.rk-action[data-key="Enter"]').tap()
    (vote,) = me.wait_for_votes(1)
    assert letters(vote) == ["C", "D", "A", "B"]
    assert vote.judgement.device == "mobile"


def test_by_dragging_with_the_mouse(me: Visitor) -> None:
    me.tab("Rank")
    me.wait_for_ranking()
    card(me, "B").drag_to(me.at('.rk-gap[data-gap="0"]'))
    expect(card(me, "B").locator(".rk-rank")).to_have_text("1")
    card(me, "D").drag_to(me.at('.rk-gap[data-gap="0"]'))  # before it
    expect(card(me, "B").locator(".rk-rank")).to_have_text("2")
    card(me, "A").drag_to(me.page.get_by_role("button", name="Take B out of the order"))
    expect(card(me, "A").locator(".rk-rank")).to_have_text("2 =")
    me.at('.rk-action[data-key="Enter"]').click()
    (vote,) = me.wait_for_votes(1)
    assert letters(vote) == ["D", "AB", "C"]


def test_nothing_tells_who_wrote_the_answers_of_a_ranking(visit: Visit, fake: Served) -> None:
    me = visit(fake)
    start = time.monotonic()
    me.tab("Rank")
    task = me.wait_for_ranking()
    me.page.wait_for_timeout(300)
    told = fake.wire.text_between(start, time.monotonic())
    assert all(answer.text in told for answer in task.responses), "the ear hears nothing"
    secrets = {"quick/", "reward", "KL"}
    for answer in task.responses:
        secrets |= {str(answer.adapter_sha256), str(answer.seed), f"{answer.rm_score:+.2f}"}
        secrets.add(f'"{answer.rid}"')
    assert [word for word in secrets if word in told] == []
    in_sheet = me.at("#rank-sheet").evaluate(
        "node => node.outerHTML + JSON.stringify(node.dataset)"
    )
    assert "quick/" not in in_sheet
    me.press("a", "b", "c", "Enter")
    expect(me.at(".rk-reveal li")).to_have_count(4)
    expect(me.at("#rank-before")).to_have_text("Your last ranking, best first:")
    told = fake.wire.text_between(start, time.monotonic())
    assert all(str(answer.adapter) in told for answer in task.responses)
