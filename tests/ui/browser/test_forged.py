"""What somebody who is logged in can send by hand: nothing that counts, and nothing of others."""

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor, letters, wait_until
from tests.ui.browser.serving import Served

pytestmark = pytest.mark.ui

ADMINS_ALONE = (
    "train-dry",
    "train-start",
    "train-yes",
    "train-cancel",
    "train-resume",
    "train-adopt",
    "train-discard",
    "votes-export-pairs",
    "votes-export-rankings",
    "votes-export-battles",
    "votes-export-kto",
)


class Hand:
    """Calls handlers of the page as a program would, with its person's cookies."""

    def __init__(self, me: Visitor) -> None:
        self.me = me
        self.config = me.page.evaluate("window.gradio_config")
        self.count = 0

    @property
    def session(self) -> str:
        """Of the open page."""
        beats = [url for url in self.me.heard.requests if "/heartbeat/" in url]
        return beats[-1].rsplit("/", 1)[1]

    def handlers(self, elem_id: str) -> list[dict[str, Any]]:
        """What listens to a component."""
        (part,) = (c for c in self.config["components"] if c["props"].get("elem_id") == elem_id)
        return [
            d
            for d in self.config["dependencies"]
            if any(of == part["id"] for of, _ in d["targets"])
        ]

    def call(
        self, handler: dict[str, Any], data: list[Any], session: str = "", **more: Any
    ) -> tuple[int, str]:
        """Status and whole answer; in a session of its own unless it is told one."""
        self.count += 1
        session = session or f"hand{self.count}of{self.me.name}"
        values = {c["id"]: c["props"].get("value") for c in self.config["components"]}
        data = data + [values[of] for of in handler["inputs"][len(data) :]]
        body = {"data": data, "fn_index": handler["id"], "session_hash": session, **more}
        ask = self.me.context.request
        if not handler["queue"]:
            answer = ask.post("gradio_api/run/predict", data=body)
            return answer.status, answer.text()
        answer = ask.post("gradio_api/queue/join", data=body)
        if answer.status == 200:
            answer = ask.get(f"gradio_api/queue/data?session_hash={session}")
        return answer.status, answer.text()


def test_a_vote_that_is_sent_again_is_one_row(visit: Visit, logins: Served) -> None:
    ben = visit(logins, tab="Compare", who="ben")
    ben.since = logins.studio.store.version()
    ben.ask_both("Tell of the gate.")
    with ben.page.expect_request(
        lambda r: "cmp" not in r.url and '\\"keys\\"' in str(r.post_data)
    ) as vote:
        ben.press("1")
    ben.wait_for_votes(1)
    sent = json.loads(vote.value.post_data or "")
    for _ in range(3):
        ben.context.request.post("gradio_api/run/predict", data=sent)
    ben.page.evaluate(
        "async (body) => { for (let i = 0; i < 3; i++) await fetch('gradio_api/run/predict',"
        " {method: 'POST', headers: {'content-type': 'application/json'}, body}); }",
        vote.value.post_data,
    )
    assert len(ben.votes) == 1
    ben.tab("Rank")
    ben.wait_for_ranking()
    with ben.page.expect_request(lambda r: '"outcome"' in str(r.post_data)) as ranking:
        ben.press("a", "b", "c", "Enter")
    ben.wait_for_votes(2)
    sent = json.loads(ranking.value.post_data or "")
    for _ in range(3):
        ben.context.request.post("gradio_api/run/predict", data=sent)
    ben.page.wait_for_timeout(300)
    assert len(ben.votes) == 2
    ben.heard.expected += ["500"]


def test_a_forged_state_is_not_read(visit: Visit, logins: Served) -> None:
    ana, ben = visit(logins, tab="Compare", who="ana"), visit(logins, tab="Compare", who="ben")
    ana.since = ben.since = logins.studio.store.version()
    hers = ana.ask_both("Tell of the well.")
    his = ben.ask_both("Tell of the mill.")
    hand = Hand(ben)
    (vote,) = hand.handlers("cmp-a")
    forged = {"task_id": hers.task_id, "can_vote": True, "texts": ["FORGED", "FORGED"]}
    status, said = hand.call(vote, [forged, "{}"])  # in a session without a pair
    assert status == 500
    assert "nothing to vote on" in said
    assert not ben.votes
    status, _ = hand.call(vote, [forged, "{}"], session=hand.session)
    assert status == 200
    assert [v.task.task_id for v in ben.wait_for_votes(1)] == [his.task_id]
    assert not ana.votes
    assert logins.studio.store.open_task("ana", "pair") == hers


def test_a_forged_dialogue_is_not_stored(visit: Visit, logins: Served) -> None:
    ben = visit(logins, who="ben")
    ben.since = logins.studio.store.version()
    hand = Hand(ben)
    row = {"adapter": "quick/policy", "text": "FORGED", "finish": "eos"}
    talk = {"turns": [{"text": "Who?", "row": row}]}
    for handler in hand.handlers("chat-log"):
        hand.call(handler, [talk], event_data={"index": 1, "value": "FORGED", "liked": True})
    assert not ben.votes
    ben.chat("Who is there?")
    asked = logins.engine.asked[-1]
    assert [m["content"] for m in asked.messages] == ["Who is there?"]
    assert not any("FORGED" in str(ask.messages[:-1]) for ask in logins.engine.asked)
    (like,) = (h for h in hand.handlers("chat-log") if [n for _, n in h["targets"]] == ["like"])
    hand.call(
        like,
        [talk],
        session=hand.session,
        event_data={"index": 1, "value": "FORGED", "liked": True},
    )
    (liked,) = ben.wait_for_votes(1)
    assert "FORGED" not in liked.task.model_dump_json()
    assert liked.task.responses[0].text == ben.page.get_by_test_id("bot").inner_text().strip()


def test_forged_rankings_are_refused(visit: Visit, logins: Served) -> None:
    ana, ben = visit(logins, tab="Rank", who="ana"), visit(logins, tab="Rank", who="ben")
    ana.since = ben.since = logins.studio.store.version()
    hers, his = ana.wait_for_ranking(), ben.wait_for_ranking()
    hand = Hand(ben)
    (submit,) = (h for h in hand.handlers("rank-sheet") if h["targets"][0][1] == "submit")
    whole = {"order": [["A"], ["B"], ["C", "D"]], "outcome": "decided", "task": his.task_id}
    before = logins.studio.store.counts()["judgements"]
    forgeries: list[Any] = [
        whole | {"task": hers.task_id},
        whole | {"task": {"$ne": ""}},
        whole | {"order": [["A"], ["B"], ["C"]]},
        whole | {"order": [["A"], ["B"], ["C"], ["D"], ["D"]]},
        whole | {"order": [["A"], ["B"], ["C"], ["E"]]},
        whole | {"order": [["r0"], ["r1"], ["r2"], ["r3"]]},
        whole | {"order": [["A", ["B"]], ["C"], ["D"]]},
        whole | {"order": "ABCD"},
        whole | {"outcome": "won"},
        whole | {"flags": ["<script>"]},
        ["not", "an", "object"],
        None,
    ]
    for forged in forgeries:
        status, said = hand.call(submit, [], session=hand.session, event_data=forged)
        assert status == 500, forged
        assert logins.studio.store.counts()["judgements"] == before, forged
        assert json.loads(said)["error"], f"refused without a reason: {forged}"
    assert logins.studio.store.open_task("ana", "rank") == hers
    hand.call(submit, [], session=hand.session, event_data=whole)
    (vote,) = ben.wait_for_votes(1)
    assert letters(vote) == ["A", "B", "CD"]


def test_nobody_uses_the_session_of_another(visit: Visit, logins: Served) -> None:
    ana, ben = visit(logins, tab="Compare", who="ana"), visit(logins, who="ben")
    ana.since = logins.studio.store.version()
    ana.ask_both("Tell of the fence.")
    (vote,) = Hand(ana).handlers("cmp-a")
    status, said = Hand(ben).call(vote, [None, "{}"], session=Hand(ana).session)
    assert (status, "somebody else" in said) == (403, True)
    stolen = ben.context.request.get(f"gradio_api/queue/data?session_hash={Hand(ana).session}")
    assert stolen.status == 403
    assert not ana.votes


def test_no_answer_logs_anybody_out(
    visit: Visit, logins: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture in an answer is asked for with the cookies of whoever reads it."""
    ben = visit(logins, who="ben")
    monkeypatch.setattr(logins.engine, "answer", lambda ask: "a ![x](/logout) <img src=logout> b")
    # Whatever the page waits for when it is loaded again is aborted.
    ben.heard.expected += ["403", "AbortError"]
    ben.chat("Who is there?")
    expect(ben.page.get_by_test_id("bot").locator("img")).to_have_count(2)
    wait_until(lambda: any(a.path == "/logout" for a in logins.wire.answers), "the picture")
    assert {a.status for a in logins.wire.answers if a.path == "/logout"} == {403}
    ben.open()
    assert ben.name == "ben"


def test_what_is_hidden_from_a_labeler_is_refused_as_well(visit: Visit, logins: Served) -> None:
    ben = visit(logins, who="ben")
    hand = Hand(ben)
    for elem_id in ADMINS_ALONE:
        for handler in hand.handlers(elem_id):
            if handler["backend_fn"]:
                _, said = hand.call(handler, [])
                assert "for the admin alone" in said, elem_id


def test_calling_every_handler_by_hand_changes_nothing_of_others(
    visit: Visit, logins: Served
) -> None:
    """A sweep over whatever handlers there are, those of tabs to come included."""
    ana, ben = visit(logins, tab="Compare", who="ana"), visit(logins, who="ben")
    ana.ask_both("Tell of the barn.")
    ana.press("1")
    wait_until(lambda: bool(ana.votes), "a vote")
    hers = [vote.judgement for vote in ana.votes]
    files, runs = Path(logins.running._files), logins.studio.runs_dir

    def outside() -> list[list[str]]:
        return [sorted(str(path) for path in folder.rglob("*")) for folder in (files, runs)]

    before, hand = outside(), Hand(ben)
    for handler in hand.config["dependencies"]:
        if handler["backend_fn"]:
            hand.call(handler, [], event_data={"task": None, "undo": hers[0].id, "run": "../.."})
    assert outside() == before
    assert [vote.judgement for vote in ana.votes] == hers
    assert logins.studio.jobs.job().state == "none"
    assert logins.engine.considered == set()
    assert logins.engine.state() == "ready"
    expect(ben.at("#studio-bar")).to_contain_text("ready")
