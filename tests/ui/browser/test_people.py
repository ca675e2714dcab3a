"""Two people at once: separate tasks, the queue between them, votes under their names."""

import pytest
from playwright.sync_api import expect

from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import letters, shown
from tests.ui.browser.serving import PASSWORDS, Served

pytestmark = pytest.mark.ui


def test_two_people_compare_at_once(visit: Visit, logins: Served) -> None:
    ana, ben = visit(logins, tab="Compare", who="ana"), visit(logins, tab="Compare", who="ben")
    assert (ana.name, ben.name) == ("ana", "ben")
    logins.engine.seconds_a_word = 0.15
    for someone, text in ((ana, "Tell of the owl."), (ben, "Tell of the fox.")):
        someone.at("#cmp-box textarea").fill(text)
        someone.at("#cmp-box textarea").press("Enter")
        if someone is ana:
            expect(ana.at("#cmp-status")).to_contain_text("Both answer")
    expect(ben.at("#cmp-status")).to_contain_text("Waiting for the device: 1 job is ahead of you.")
    for someone in (ana, ben):
        expect(someone.at("#cmp-a")).to_be_enabled()
    tasks = {p.name: p.open_task("pair") for p in (ana, ben)}
    for someone, text, key in ((ana, "Tell of the owl.", "1"), (ben, "Tell of the fox.", "2")):
        a, b = shown(tasks[someone.name])
        expect(someone.at("#cmp-prompt")).to_have_text(text)
        expect(someone.answer("a")).to_have_text(a.text)
        expect(someone.answer("b")).to_have_text(b.text)
        someone.press(key)
    for someone, winner in ((ana, 0), (ben, 1)):
        (vote,) = someone.wait_for_votes(1)
        assert vote.judgement.annotator == someone.name
        assert vote.task.task_id == tasks[someone.name].task_id
        assert vote.judgement.ranking[0] == (shown(vote.task)[winner].rid,)


def test_two_people_rank_at_once(visit: Visit, logins: Served) -> None:
    ana, ben = visit(logins, tab="Rank", who="ana"), visit(logins, tab="Rank", who="ben")
    tasks = {p.name: p.wait_for_ranking() for p in (ana, ben)}
    assert tasks["ana"].task_id != tasks["ben"].task_id
    ana.press("a", "b")
    ben.press("d")
    ana.press("c", "Enter")
    ben.press("c", "b", "Enter")
    for someone, ranking in ((ana, "ABCD"), (ben, "DCBA")):
        (vote,) = someone.wait_for_votes(1)
        assert vote.task.task_id == tasks[someone.name].task_id
        assert vote.judgement.annotator == someone.name
        assert letters(vote) == list(ranking)


def test_one_logs_in_by_the_page(visit: Visit, logins: Served) -> None:
    me = visit(logins, who="ben")
    me.context.clear_cookies()
    me.page.goto("/")
    expect(me.at("#studio-bar")).to_have_count(0)
    me.heard.expected += ["401", "400"]
    me.page.get_by_label("username").fill("ben")
    me.page.get_by_label("password").fill("wrong password")
    me.page.get_by_role("button", name="Login").click()
    expect(me.page.get_by_text("Incorrect Credentials")).to_be_visible()
    assert me.at("#studio-bar").count() == 0
    me.page.get_by_label("username").fill("ben")
    me.page.get_by_label("password").fill(PASSWORDS["ben"])
    me.page.get_by_role("button", name="Login").click()
    assert me.name == "ben"
