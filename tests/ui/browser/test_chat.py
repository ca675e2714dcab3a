"""Chat: streaming and stop on the real model; retry, undo, edit, like on the fake one."""

from threading import Event
from unittest.mock import patch

import pytest
from playwright.sync_api import expect

from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor, quiet_for, timely, wait_until
from tests.ui.browser.serving import Served
from tests.ui.fakes import score_of

pytestmark = pytest.mark.ui

STOPS_WITHIN = 0.5  # seconds


def latest(me: Visitor) -> str:
    """The last answer as far as it has come."""
    return me.page.get_by_test_id("bot").last.inner_text().strip()


_EVERY_CHANGE = """
window.__seen = [];
new MutationObserver(() => {
  const bots = document.querySelectorAll('[data-testid="bot"]');
  if (bots.length) window.__seen.push(bots[bots.length - 1].innerText.trim());
}).observe(document.body, { childList: true, subtree: true, characterData: true });
"""


def growing(me: Visitor) -> list[str]:
    """What the last answer was, change by change of the page, until it was whole."""
    expect(me.at("#chat-status")).to_contain_text("KL")
    seen = [*me.page.evaluate("window.__seen"), latest(me)]
    return [text for text in dict.fromkeys(seen) if text and text != "\u2026"]


def test_an_answer_of_the_real_model_streams_and_is_liked(
    visit: Visit, real_server: Served
) -> None:
    me = visit(real_server)
    me.page.evaluate(_EVERY_CHANGE)
    for _ in range(3):  # a page that others keep from painting sees an answer come at once
        me.new_dialogue()
        me.page.evaluate("window.__seen = []")
        me.chat("Please describe a telescope.", until_done=False)
        seen = growing(me)
        assert all(seen[-1].startswith(text) for text in seen)
        if len(seen) >= 3:
            break
    assert len(seen) >= 3, "it came in pieces"
    expect(me.at("#chat-status")).to_contain_text("small/policy")
    expect(me.at("#chat-status")).to_contain_text("KL")
    me.page.get_by_role("button", name="Like", exact=True).click()
    (liked,) = me.wait_for_votes(1)
    assert liked.task.responses[0].text.split() == seen[-1].split()
    assert liked.task.responses[0].adapter == "small/policy"
    assert (liked.judgement.type, liked.judgement.strength) == ("like", 1)
    expect(me.at("#chat-status")).to_contain_text("stored")
    me.page.get_by_role("button", name="Dislike", exact=True).click()
    wait_until(lambda: [v.judgement.strength for v in me.votes] == [-1], "the other opinion")


def begin(me: Visitor) -> None:
    """Ask the real model something long, until it has begun to answer.

    The page is not asked meanwhile: it may show nothing before a tiny model is done.
    """
    turns = me.served.engine.turns
    me.at("#chat-box textarea").fill("Please describe a telescope.")
    me.at("#chat-box textarea").press("Enter")
    wait_until(lambda: len(turns) == 1, "the engine to begin")


def test_stop_ends_the_real_model_within_half_a_second(visit: Visit, real_server: Served) -> None:
    me = visit(real_server)

    def stop() -> float:
        me.new_dialogue()
        begin(me)
        me.at("#chat-stop").evaluate("button => button.click()")
        return wait_until(lambda: len(real_server.engine.turns) == 0, "a free engine")

    timely(STOPS_WITHIN, stop)
    expect(me.page.get_by_test_id("bot")).to_contain_text("(stopped)")
    expect(me.at("#chat-status")).to_contain_text("stopped")
    with quiet_for(me):
        me.page.get_by_role("button", name="Like", exact=True).click()
        expect(me.at("#chat-status")).to_contain_text("Only a whole answer")
    expect(me.page.get_by_role("button", name="Like", exact=True)).to_be_visible()
    expect(me.page.get_by_role("button", name="Liked")).to_have_count(0)


def test_a_closed_tab_frees_the_real_model_within_half_a_second(
    visit: Visit, real_server: Served
) -> None:
    me = visit(real_server)
    me.page.close()

    def close() -> float:
        me.page = me.context.new_page()
        me.open()
        begin(me)
        me.page.close()
        return wait_until(lambda: len(real_server.engine.turns) == 0, "a free engine")

    timely(STOPS_WITHIN, close)


def test_retry_undo_and_edit(me: Visitor, fake: Served) -> None:
    me.new_dialogue()
    bots = me.page.get_by_test_id("bot")
    me.chat("First question")
    first = latest(me)
    me.page.get_by_role("button", name="Retry").click()
    expect(bots.last).not_to_have_text(first)
    asked = [ask for ask in fake.engine.asked if ask.messages[-1]["content"] == "First question"]
    assert [len(ask.messages) for ask in asked] == [1, 1], "the same question, without its answer"
    assert asked[0].seed != asked[1].seed
    expect(me.at("#chat-status")).not_to_contain_text("answers")
    again = latest(me)
    me.chat("Second question")
    assert [m["content"] for m in fake.engine.asked[-1].messages] == [
        "First question",
        again,
        "Second question",
    ]
    me.page.get_by_role("button", name="Undo").last.click()
    expect(bots).to_have_count(1)
    expect(me.at("#chat-box textarea")).to_have_value("Second question")
    me.page.get_by_role("button", name="Edit").first.click()
    me.page.get_by_role("log").get_by_role("textbox").fill("Another question")
    me.page.get_by_role("button", name="Submit").click()
    expect(me.page.get_by_test_id("user")).to_have_text("Another question")
    expect(bots).to_have_count(1)
    expect(me.at("#chat-status")).to_contain_text("token")
    assert [m["content"] for m in fake.engine.asked[-1].messages] == ["Another question"]
    me.at("#chat-new").click()
    expect(bots).to_have_count(0)


def test_a_new_dialogue_ends_the_answer_of_the_old_one_and_keeps_what_is_typed(
    me: Visitor,
) -> None:
    me.new_dialogue()
    engine = me.served.engine
    engine.seconds_a_word, engine.words = 0.05, 400
    ended = len(engine.ended)
    me.chat("Tell of the storm.", until_done=False)
    expect(me.page.get_by_test_id("bot").last).to_contain_text("the")
    me.at("#chat-box textarea").fill("What I ask next")
    me.new_dialogue()
    expect(me.page.get_by_test_id("bot")).to_have_count(0)
    wait_until(lambda: len(engine.ended) > ended, "the end of the old answer")
    me.page.wait_for_timeout(500)
    expect(me.page.get_by_test_id("bot")).to_have_count(0)
    expect(me.at("#chat-box textarea")).to_have_value("What I ask next")
    engine.seconds_a_word, engine.words = 0.0, 12
    me.at("#chat-box textarea").press("Enter")
    expect(me.page.get_by_test_id("user")).to_have_text("What I ask next")
    expect(me.at("#chat-status")).to_contain_text("12 tokens")


def test_an_answer_is_compared_with_another_ones(me: Visitor) -> None:
    blind = me.page.get_by_role("checkbox", name="Blind")
    me.tab("Compare")
    blind.check()
    me.new_dialogue()
    me.chat("Tell of the sailor.")
    answer = latest(me)
    me.at("#chat-compare").click()
    expect(me.page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    expect(me.answer("a")).to_have_text(answer)
    expect(me.at("#cmp-a")).to_be_enabled()
    expect(me.at("#cmp-facts-a")).to_contain_text("quick/policy")
    expect(me.at("#cmp-facts-b")).to_contain_text("quick/sft")
    expect(me.at("#cmp-status")).to_contain_text("You know A from Chat.")
    expect(blind).not_to_be_checked()
    me.press("2")
    (vote,) = me.wait_for_votes(1)
    assert [vote.task.response(group[0]).adapter for group in vote.judgement.ranking] == [
        "quick/sft",
        "quick/policy",
    ]
    assert not vote.judgement.blind
    expect(blind).to_be_checked()
    assert me.ask_both("Tell of the sail.").blind
    expect(me.at("#cmp-facts-a, #cmp-facts-b")).to_have_text(["", ""])
    me.press("s")


@pytest.mark.parametrize("answers", [4, 1])
def test_the_best_of_several_answers_is_shown(me: Visitor, fake: Served, answers: int) -> None:
    me.new_dialogue()
    if not me.at("#chat-sampling-best-of input").is_visible():
        me.page.get_by_role("button", name="Sampling").first.click()
    me.at("#chat-sampling-best-of input").fill(str(answers))
    me.at("#chat-sampling-best-of input").blur()
    before = len(fake.engine.asked)
    me.chat("Tell of the storm lamp.")
    drawn = [ask for ask in fake.engine.asked[before:] if len(ask.messages) == 1]
    drawn = [ask for ask in drawn if ask.messages[0]["content"] == "Tell of the storm lamp."]
    assert len(drawn) == answers
    scores = {fake.engine.answer(ask): score_of(fake.engine.answer(ask)) for ask in drawn}
    assert len(scores) == answers, "different ones"
    best = max(scores, key=lambda text: scores[text])
    assert latest(me) == best
    expect(me.at("#chat-status")).to_contain_text(f"reward {scores[best]:+.2f}")
    if answers > 1:
        expect(me.at("#chat-status")).to_contain_text(f"the best of {answers} by reward")
    me.page.get_by_role("button", name="Like", exact=True).click()
    (liked,) = me.wait_for_votes(1)
    (stored,) = liked.task.responses
    assert (stored.text, stored.rm_score) == (best, scores[best])


def test_the_best_of_several_answers_of_the_real_model_is_shown(
    visit: Visit, real_server: Served
) -> None:
    me = visit(real_server)
    me.page.get_by_role("button", name="Sampling").first.click()
    me.at("#chat-sampling-best-of input").fill("5")
    me.at("#chat-sampling").get_by_label("Seed").fill("7")
    engine = real_server.engine
    with patch.object(engine, "stream", wraps=engine.stream) as drawn:
        me.chat("Please describe a telescope.")
    (asks,) = [call.args[0] for call in drawn.call_args_list if len(call.args[0]) == 5]
    rows = list(engine.stream(asks, who="test", cancel=Event()))[-1]
    best = max(rows, key=lambda row: row.score)
    me.page.get_by_role("button", name="Like", exact=True).click()
    (liked,) = me.wait_for_votes(1)
    (stored,) = liked.task.responses
    assert len({row.text for row in rows}) > 1
    assert (stored.text, stored.rm_score) == (best.text, best.score)
    assert latest(me).split() == best.text.split()


def test_copy_gives_the_answer_as_it_was_written(visit: Visit, fake: Served) -> None:
    me = visit(fake, permissions=["clipboard-read", "clipboard-write"])
    me.chat("Tell of the lamp.")
    me.page.get_by_role("button", name="Copy message").last.click()
    wait_until(lambda: me.page.evaluate("navigator.clipboard.readText()") == latest(me), "the copy")
