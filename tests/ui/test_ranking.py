"""Rank: plans, rankings, undo, the tally; whatever a browser sends."""

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from lora_rlhf.data.records import user
from lora_rlhf.errors import ConfigError, UserError
from lora_rlhf.preferences.ratings import counts_for_win_rate
from tests.ui.dealing import POLICY, SFT, deal, decided, letters, plan, task_of, votes
from ui.ahead import Plan
from ui.asking import Ask, Row
from ui.people import Person
from ui.ranked import tally
from ui.ranking import Sheet, next_sheet, plan_of, submit, undo
from ui.retraining import Wishes, choose
from ui.studio import Studio
from ui.tabs.rank import updates
from ui.tasks import Refused, as_shown, make_task

TELLING = (POLICY, SFT, "policy", "sft", "quick", "reward", "KL", "token", "nats")


def telling(sheet: Sheet) -> list[str]:
    """Words for who wrote what, in all that the page gets."""
    sent = json.dumps(updates(sheet)[1])
    return [word for word in TELLING if word in sent]


# -- plans --------------------------------------------------------------------------------------


def test_a_plan_is_what_the_panel_says(studio: Studio, ana: Person) -> None:
    made = plan_of(studio, ana, [SFT, POLICY, SFT], "4", "0.7", 0.9, 16.0)
    assert made == Plan("ana", (POLICY, SFT), 4, 0.7, 0.9, 16, "train", 1)


@pytest.mark.parametrize("answers", [1, 0, -1, 10, 10**30, "1", 1.9])
def test_answers_out_of_range_are_refused(studio: Studio, ana: Person, answers: Any) -> None:
    with pytest.raises(ConfigError, match="2 to 9"):
        plan(studio, ana, answers)


def test_the_ends_of_the_range_are_in_it(studio: Studio, ana: Person) -> None:
    assert [plan(studio, ana, k).answers for k in (2, 9)] == [2, 9]


def test_unknown_adapters_are_refused(studio: Studio, ana: Person) -> None:
    forged: list[Any] = [None, [], POLICY, {POLICY: 1}, ["quick/reward"], [POLICY, "../x"], [None]]
    for adapters in [*forged, [[POLICY]], ["x" * 10**6]]:
        with pytest.raises(ConfigError, match="Who answers") as refused:
            plan(studio, ana, adapters=adapters)
        assert len(str(refused.value)) < 400


NO_NUMBERS: list[Any] = ["x", None, [], {}, True, False, math.nan, math.inf, -math.inf]


def test_what_is_no_number_is_refused(studio: Studio, ana: Person) -> None:
    for knob in ("temperature", "top_p", "length", "answers"):
        for value in NO_NUMBERS:
            with pytest.raises(ConfigError, match=r"numbers|Allowed"):
                plan(studio, ana, **{knob: value})
    for knob, value in (("temperature", 0), ("temperature", -1), ("top_p", 0), ("top_p", 1.1)):
        with pytest.raises(ConfigError, match="Allowed"):
            plan(studio, ana, **{knob: value})


# -- blind -----------------------------------------------------------------------------------------


def test_nothing_tells_who_wrote_what_before_the_ranking(studio: Studio, ana: Person) -> None:
    steps = list(next_sheet(studio, ana, plan(studio, ana), Sheet()))
    assert [telling(step) for step in steps] == [[] for _ in steps]
    sheet = steps[-1]
    scores = {f"{r.rm_score:+.2f}" for r in task_of(studio, sheet).responses}
    assert not any(score in json.dumps(sheet.for_browser()) for score in scores)
    after = submit(studio, ana, sheet, decided(sheet))
    assert telling(after) == list(TELLING)  # the search finds what is there
    sent = json.dumps(after.for_browser())
    assert all(score in sent for score in scores)
    assert telling(undo(studio, ana, None, after)) == []


def test_the_reveal_names_each_answer_in_the_order_of_the_ranking(
    studio: Studio, ana: Person
) -> None:
    sheet = deal(studio, ana)
    by_letter = dict(zip("ABCD", as_shown(task_of(studio, sheet)), strict=True))
    after = submit(studio, ana, sheet, decided(sheet, [["C"], ["D", "A"], ["B"]]))
    assert after.reveal is not None
    assert after.reveal.title == "Your last ranking, best first, = where tied:"
    places = [(place, text[0]) for place, text in after.reveal.lines]
    assert places == [("1", "C"), ("2 =", "D"), ("2 =", "A"), ("4", "B")]
    for _, text in after.reveal.lines:
        response = by_letter[text[0]]
        assert f": {response.adapter} " in text
        assert f"reward {response.rm_score:+.2f}" in text


@pytest.mark.parametrize(
    ("sent", "title"),
    [
        ({"outcome": "decided", "order": [["A", "B", "C", "D"]]}, "all tied"),
        ({"outcome": "both_bad"}, "All bad"),
        ({"outcome": "skip"}, "you skipped"),
    ],
)
def test_the_reveal_gives_no_places_where_nothing_was_better(
    studio: Studio, ana: Person, sent: dict[str, Any], title: str
) -> None:
    after = submit(studio, ana, deal(studio, ana), sent)
    assert after.reveal is not None
    assert title in after.reveal.title
    assert [(place, text[0]) for place, text in after.reveal.lines] == [("", x) for x in "ABCD"]


# -- a ranking ----------------------------------------------------------------------------------


def test_rankings_ties_and_outcomes_are_stored_as_sent(studio: Studio, ana: Person) -> None:
    cases: list[tuple[dict[str, Any], str, list[str]]] = [
        ({"outcome": "decided", "order": [["B"], ["D", "C"], ["A"]]}, "decided", ["B", "DC", "A"]),
        ({"outcome": "decided", "order": [["A", "B", "C", "D"]]}, "tie", ["ABCD"]),
        ({"outcome": "both_bad", "order": []}, "both_bad", ["ABCD"]),
        ({"outcome": "skip"}, "skip", []),
    ]
    sheet = Sheet()
    for sent, outcome, groups in cases:
        sheet = deal(studio, ana, sheet)
        task = task_of(studio, sheet)
        at = dict(zip("ABCD", (r.rid for r in as_shown(task)), strict=True))
        sheet = submit(studio, ana, sheet, sent | {"flags": ["harmful"], "note": "hm", "ms": 9000})
        stored = votes(studio)[-1]
        assert stored.outcome == outcome
        assert stored.ranking == tuple(tuple(at[x] for x in group) for group in groups)
        assert (stored.flags, stored.note, stored.client_ms) == (("harmful",), "hm", 9000)
        assert (stored.type, stored.blind, stored.scores_visible) == ("rank", True, False)
        assert "Saved after 9 s" in sheet.status
        assert (sheet.task_id, sheet.answers, sheet.tone) == (None, (), "good")
    assert [counts_for_win_rate(j) for j in studio.judged()] == [True, True, True, False]


def test_a_ranking_that_is_too_fast_to_train_on_says_so(studio: Studio, ana: Person) -> None:
    sheet = deal(studio, ana)
    after = submit(studio, ana, sheet, decided(sheet, ms=1500))  # of some 50 words
    (found,) = studio.judged()
    prompts = studio.engine.prompts_of(Path("runs/quick"))
    assert choose([found], Wishes("quick"), prompts).removed == {"faster than anybody reads": 1}
    assert "faster than it can be read: left out of training." in after.status
    assert after.tone == "bad"
    assert deal(studio, ana, after).status == after.status  # beside the next task


def test_what_is_no_ranking_is_refused(studio: Studio, ana: Person) -> None:
    sheet = deal(studio, ana)
    forged: list[Any] = [
        None,
        "skip",
        [],
        7,
        {},
        {"outcome": None},
        {"outcome": ["skip"]},
        {"outcome": "tie", "order": [["A", "B", "C", "D"]]},  # no such key on the page
        {"outcome": "decided"},
        {"outcome": "decided", "order": "ABCD"},
        {"outcome": "decided", "order": [["A"], ["B"]]},
        {"outcome": "decided", "order": [["A"], ["B"], ["C"], ["C"]]},
        {"outcome": "decided", "order": [["a"], ["b"], ["c"], ["d"]]},
        {"outcome": "decided", "order": [[0], [1], [2], [3]]},
        {"outcome": "decided", "order": [[["A"]], ["B"], ["C"], ["D"]]},
        decided(sheet, flags=["made up"]),
        decided(sheet, task="unknown"),
        decided(sheet, task=["x"]),
    ]
    for sent in forged:
        with pytest.raises(Refused):
            submit(studio, ana, sheet, sent)
    for task_id in (None, "", "unknown", 7, ["x"], {"a": 1}, True):
        with pytest.raises(Refused, match="nothing to vote on"):
            submit(studio, ana, replace(sheet, task_id=task_id), decided(sheet))  # type: ignore[arg-type]
    assert votes(studio) == []
    odd = decided(sheet, flags="harmful", note={"a": 1}, ms="fast", keys=None, device=["x"])
    submit(studio, ana, sheet, odd)  # what is only odd is left out
    (stored,) = votes(studio)
    assert (stored.flags, stored.note, stored.client_ms, stored.device) == (
        (),
        "{'a': 1}",
        None,
        None,
    )


@pytest.mark.parametrize("answers", [2, 9])
def test_few_and_many_answers(studio: Studio, ana: Person, answers: int) -> None:
    sheet = deal(studio, ana, answers=answers)
    assert len(sheet.answers) == answers
    submit(studio, ana, sheet, decided(sheet, letters(sheet)[::-1]))
    shown = [r.rid for r in as_shown(studio.judged()[0].task)]
    assert [group[0] for group in votes(studio)[0].ranking] == shown[::-1]


def test_a_ranking_sent_twice_is_one_also_when_the_next_task_is_shown(
    studio: Studio, ana: Person
) -> None:
    first = deal(studio, ana)
    sent = decided(first, task=first.task_id)
    after = submit(studio, ana, first, sent)
    second = deal(studio, ana, after)
    late = submit(studio, ana, second, sent)  # its letters fit the second task as well
    assert [v.task_id for v in votes(studio)] == [first.task_id]
    assert deal(studio, ana, late).task_id == second.task_id
    submit(studio, ana, first, sent)
    assert len(votes(studio)) == 1


def test_a_task_ranked_on_another_page_is_left_behind(studio: Studio, ana: Person) -> None:
    sheet = deal(studio, ana)
    submit(studio, ana, sheet, decided(sheet))
    stale = submit(studio, ana, sheet, decided(sheet, letters(sheet)[::-1]))
    assert (stale.task_id, stale.tone) == (None, "bad")
    assert "another page" in stale.status
    assert len(votes(studio)) == 1
    following = deal(studio, ana, stale)
    assert following.task_id not in (None, sheet.task_id)
    assert "another page" in following.status


def test_two_threads_at_once_leave_one_row(studio: Studio, ana: Person) -> None:
    sheet, start = deal(studio, ana), threading.Barrier(4)

    def one(order: Any) -> None:
        start.wait(20)
        submit(studio, ana, sheet, decided(sheet, order))

    orders = [letters(sheet), letters(sheet)[::-1]] * 2
    threads = [threading.Thread(target=one, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(votes(studio)) == studio.store.counts()["judgements"] == 1


def test_stopped_answers_are_passed_over(studio: Studio, ana: Person) -> None:
    asks = [Ask(POLICY, user("Stopped?"), seed=i) for i in range(3)]
    rows = [Row(POLICY, f"text {i}", 2, "stopped") for i in range(3)]
    stopped = make_task(studio, ana, "rank", asks, rows, blind=True)
    sheet = deal(studio, ana)
    assert sheet.task_id != stopped.task_id
    forged = Sheet(task_id=stopped.task_id)
    with pytest.raises(UserError, match="not finished"):
        submit(studio, ana, forged, {"outcome": "decided", "order": [["A"], ["B"], ["C"]]})


# -- undo, restart, tally -----------------------------------------------------------------------


def test_undo_shows_the_task_again_and_the_open_one_comes_after_it(
    studio: Studio, ana: Person, ben: Person
) -> None:
    first = deal(studio, ana)
    second = deal(studio, ana, submit(studio, ana, first, decided(first)))
    before = votes(studio)[0]
    with pytest.raises(ConfigError, match="no ranking of yours"):
        undo(studio, ben, plan(studio, ben), Sheet())
    shown = undo(studio, ana, plan(studio, ana), second)
    assert (shown.task_id, shown.answers, shown.prompt) == (
        first.task_id,
        first.answers,
        first.prompt,
    )
    assert votes(studio) == []
    after = submit(studio, ana, shown, decided(shown, letters(shown)[::-1]))
    (again,) = votes(studio)
    assert again.id != before.id
    assert again.ranking == before.ranking[::-1]
    assert not counts_for_win_rate(studio.judged()[0])  # the first one had revealed the names
    assert deal(studio, ana, after).task_id == second.task_id


def test_a_restart_brings_the_open_task_back(
    open_studio: Callable[..., Studio], ana: Person, ben: Person
) -> None:
    sheet = deal(open_studio(), ana)
    later = open_studio()
    back = deal(later, ana)
    assert (back.task_id, back.answers, back.prompt) == (sheet.task_id, sheet.answers, sheet.prompt)
    assert deal(later, ben).task_id != sheet.task_id
    submit(later, ana, Sheet(), decided(sheet, task=sheet.task_id))  # a page that stayed open
    assert [v.task_id for v in votes(later)] == [sheet.task_id]


def test_the_tally_counts_rankings_and_the_median_of_their_seconds(
    studio: Studio, ana: Person
) -> None:
    assert tally([]) == "No ranking yet."
    sheet, times = Sheet(), [3000, 60_000, 0, 8000]
    for ms in times:
        sheet = deal(studio, ana, sheet)
        sheet = submit(studio, ana, sheet, decided(sheet, ms=ms))
    sheet = deal(studio, ana, sheet)
    assert sheet.can_undo
    sheet = submit(studio, ana, sheet, {"outcome": "skip", "ms": 900_000})
    own = studio.judged_by("ana", "rank")
    seconds = median(times) / 1000
    assert seconds == 5.5  # a mean, a mean without 0, or one with the skip would be others
    assert tally(own) == f"4 ranked \u00b7 4 in 24 hours \u00b7 median {seconds:.0f} s"
    old = [
        replace(j, judgement=j.judgement.model_copy(update={"done_ts": time.time() - 86_401}))
        for j in own[:3]
    ]
    assert tally([*old, *own[3:]]).startswith("4 ranked \u00b7 1 in 24 hours")
    assert deal(studio, ana, sheet).tally == tally(own)
    assert deal(studio, ana, sheet).for_browser()["tally"] == tally(own)
