"""Compare: blind until the vote, one vote a pair, nothing lost; whatever a browser sends."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest

from lora_rlhf.data.records import prompt_key, user
from lora_rlhf.errors import ConfigError, EventRefused, UserError
from lora_rlhf.preferences.events import Task
from lora_rlhf.preferences.ratings import counts_for_win_rate
from tests.ui.fakes import answer_of
from tests.ui.scripted import ScriptedEngine
from ui.asking import Ask, Busy, Row
from ui.chatting import Controls, Talk, Turn, like
from ui.comparing import (
    POOL,
    TYPED,
    Pane,
    Vote,
    ask_both,
    compare_turn,
    restore,
    show,
    undo,
    vote,
)
from ui.people import Person
from ui.studio import Studio
from ui.tabs.compare import updates
from ui.tasks import JudgedAlready, Refused, again, as_shown, make_task

POLICY, SFT, BASE = "quick/policy", "quick/sft", "base"
PAGE = "page"
NO_CLIENT = ""
# What would tell who answers, or how well; no prompt or answer of the fake holds these.
TELLING = (POLICY, SFT, "policy", "sft", "quick", "reward", "KL", "token", "nats")


def controls(*names: str, seed: int | None = None) -> tuple[Controls, Controls]:
    a, b = (Controls(name, 0.7, 0.9, 16, seed) for name in names)
    return a, b


@pytest.fixture
def ask(studio: Studio, ana: Person) -> Callable[..., Pane]:
    def ask_whole(
        names: tuple[str, str] = (POLICY, SFT),
        text: Any = "Why?",
        source: Any = TYPED,
        blind: bool = True,
        who: Person = ana,
    ) -> Pane:
        *_, last = ask_both(studio, who, PAGE, text, source, blind, controls(*names))
        return last

    return ask_whole


def sent_to_browser(pane: Pane) -> str:
    """Every value that the tab's components get, as text; the first one stays on the server."""
    shown = []
    for value in updates(pane)[1:]:
        sent = value if isinstance(value, str | dict) else value.get_config()
        shown.append(json.dumps(sent, default=repr))
    return "\n".join(shown)


def telling(text: str) -> list[str]:
    return [word for word in TELLING if word in text]


def task_of(studio: Studio, pane: Pane) -> Task:
    task = studio.store.task(pane.task_id or "")
    assert task is not None
    return task


# -- asking -------------------------------------------------------------------------------------


def test_both_are_asked_the_same_in_one_batch(
    studio: Studio, ask: Callable[..., Pane], engine: ScriptedEngine
) -> None:
    pane = ask(text="  Why? ")
    assert len(engine.calls) == 1  # one stream, hence one batch
    assert {a.adapter for a in engine.asked} == {POLICY, SFT}
    assert all(a.messages == user("Why?") for a in engine.asked)
    assert {(a.temperature, a.top_p, a.max_new_tokens) for a in engine.asked} == {(0.7, 0.9, 16)}
    assert len({a.seed for a in engine.asked}) == 2  # or two adapters alike would answer alike
    task = task_of(studio, pane)
    assert (task.mode, task.blind, task.prompt_source) == ("pair", True, "typed")
    assert pane.can_vote


def test_it_streams_and_the_sides_stay(studio: Studio, ana: Person, engine: ScriptedEngine) -> None:
    engine.waits = (1,)
    for _ in range(8):  # sides that are drawn again at the end would all stay in 1 of 256 runs
        panes = list(ask_both(studio, ana, PAGE, "Why?", TYPED, True, controls(POLICY, SFT)))
        assert not any(p.can_vote or p.task_id for p in panes[:-1])
        assert panes[1].status == "Waiting for the device: 1 job is ahead of you."
        for side in (0, 1):
            texts = [p.texts[side] for p in panes]
            assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
            assert len(set(texts)) > 10


def test_a_fixed_seed_gives_the_same_answers_on_whatever_side(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    found = set()
    for _ in range(6):
        both = controls(POLICY, SFT, seed=2**31 - 1)
        *_, pane = ask_both(studio, ana, PAGE, "Why?", TYPED, True, both)
        task = task_of(studio, pane)
        found.add(frozenset((r.adapter, r.text, r.seed) for r in task.responses))
    assert len(found) == 1
    assert all(0 <= ask.seed < 2**31 for ask in engine.asked)


def test_what_cannot_be_asked_is_said(studio: Studio, ana: Person) -> None:
    both = controls(POLICY, SFT)
    for text in (None, "", " \n"):
        with pytest.raises(ConfigError, match="Type a prompt"):
            next(ask_both(studio, ana, PAGE, text, TYPED, True, both))
    for source in (None, "", [], {}, 7, "pool"):  # whatever is not the pool is typed
        with pytest.raises(ConfigError, match="Type a prompt"):
            next(ask_both(studio, ana, PAGE, "", source, True, both))
    with pytest.raises(ConfigError, match="two different"):
        next(ask_both(studio, ana, PAGE, "Why?", TYPED, True, controls(SFT, SFT)))
    for forged in ("quick/reward", "/etc/passwd", "['quick/sft']"):
        with pytest.raises(ConfigError, match="No adapter"):
            list(ask_both(studio, ana, PAGE, "Why?", TYPED, True, controls(SFT, forged)))
    assert studio.store.counts()["tasks"] == 0


@pytest.mark.parametrize("text", [7, ["a"], {"a": 1}, "half \ud800", "\x00"])
def test_whatever_is_typed_is_asked_and_stored_as_text(
    studio: Studio, ana: Person, ask: Callable[..., Pane], text: Any
) -> None:
    pane = ask(text=text)
    assert task_of(studio, pane).prompt == user(str(text).replace("\ud800", "?"))
    assert vote(studio, ana, pane, "a", NO_CLIENT).tone == "good"


def test_an_error_is_shown_in_the_pane_and_nothing_is_stored(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    engine.errors.append(Busy("Too many."))
    seen: list[Pane] = []
    with pytest.raises(Busy, match="Too many"):
        seen.extend(ask_both(studio, ana, PAGE, "Why?", TYPED, True, controls(POLICY, SFT)))
    assert (seen[-1].status, seen[-1].tone) == ("Not answered.", "bad")
    assert seen[-1].prompt == "Why?"
    assert studio.store.counts()["tasks"] == 0


def test_an_engine_that_ends_before_its_answers_is_an_error(studio: Studio, ana: Person) -> None:
    class Ends(ScriptedEngine):
        def stream(self, asks: Any, **rest: Any) -> Any:
            yield next(super().stream(asks, **rest))

    studio.engine = Ends()
    with pytest.raises(ConfigError, match="did not end"):
        list(ask_both(studio, ana, PAGE, "Why?", TYPED, True, controls(POLICY, SFT)))


# -- the pool -----------------------------------------------------------------------------------


def test_held_out_prompts_come_once_each_until_they_are_used_up(
    open_studio: Callable[..., Studio], ana: Person, ben: Person
) -> None:
    studio = open_studio(engine=ScriptedEngine(prompts=6, words=2))
    both, found = controls(POLICY, SFT), set()
    for _ in range(6):
        *_, pane = ask_both(studio, ana, PAGE, "", POOL, True, both)
        found.add(pane.prompt)
        assert task_of(studio, pane).prompt_source.startswith("pool:heldout#")
        vote(studio, ana, pane, "skip", NO_CLIENT)  # a skip counts as seen
    assert len(found) == 6
    with pytest.raises(ConfigError, match="all 6 held-out prompts"):
        list(ask_both(studio, ana, PAGE, "", POOL, True, both))
    assert [*ask_both(studio, ben, PAGE, "", POOL, True, both)][-1].can_vote
    studio = open_studio(engine=ScriptedEngine(prompts=0))
    with pytest.raises(ConfigError, match="no held-out prompt that no open run was trained on"):
        list(ask_both(studio, ana, PAGE, "", POOL, True, both))


def test_the_open_prompt_is_not_drawn_again(
    open_studio: Callable[..., Studio], ana: Person
) -> None:
    studio, prompts = open_studio(engine=ScriptedEngine(prompts=2, words=2)), []
    for _ in range(12):  # drawn freely two would never meet in 1 of 2000 runs
        asked = ask_both(studio, ana, PAGE, "", POOL, True, controls(POLICY, SFT))
        prompts.append([*asked][-1].prompt)
    assert all(one != two for one, two in pairwise(prompts))


def test_an_older_pair_of_a_prompt_judged_since_does_not_come_back(
    studio: Studio, ana: Person
) -> None:
    def pair(number: int) -> Task:
        asks = [
            Ask(name, user(f"held out {number}"), seed=i) for i, name in enumerate((POLICY, SFT))
        ]
        rows = [Row(a.adapter, f"text {i}", 2, "eos") for i, a in enumerate(asks)]
        source = f"pool:heldout#{number}"
        return make_task(studio, ana, "pair", asks, rows, source=source, blind=True)

    older, newer = pair(1), pair(1)
    assert restore(studio, ana).task_id == newer.task_id
    vote(studio, ana, show(studio, ana, newer), "a", NO_CLIENT)
    assert restore(studio, ana).task_id is None
    assert older.prompt_sha256 in studio.seen("ana", "pair")
    other = pair(2)
    assert restore(studio, ana).task_id == other.task_id


# -- blind --------------------------------------------------------------------------------------


def test_nothing_tells_who_answers_before_the_vote(
    studio: Studio, ana: Person, ask: Callable[..., Pane], engine: ScriptedEngine
) -> None:
    engine.waits = (1,)
    panes = list(ask_both(studio, ana, PAGE, "Why?", TYPED, True, controls(POLICY, SFT)))
    panes += [restore(studio, ana), show(studio, ana, task_of(studio, panes[-1]))]
    scores = [f"{r.rm_score:+.2f}" for r in task_of(studio, panes[-1]).responses]
    for pane in panes:
        sent = sent_to_browser(pane)
        assert telling(sent) == []
        assert not any(score in sent for score in scores)
        assert repr(pane).count("facts=('', '')") == 1
    voted = sent_to_browser(vote(studio, ana, panes[-1], "a", NO_CLIENT))
    assert telling(voted) == list(TELLING)  # the search finds what is there
    assert all(score in voted for score in scores)
    taken_back = sent_to_browser(undo(studio, ana))
    assert telling(taken_back) == []


def test_a_stopped_blind_pair_does_not_tell_either(
    studio: Studio, ask: Callable[..., Pane], engine: ScriptedEngine
) -> None:
    engine.finish = "stopped"
    pane = ask()
    assert "stopped" in pane.status.lower()
    assert telling(sent_to_browser(pane)) == []


def test_the_side_is_a_coin(open_studio: Callable[..., Studio], ana: Person) -> None:
    """Over 200 tasks: exceeded in 1 of 50 million runs. And what is shown is what is recorded."""
    studio = open_studio(engine=ScriptedEngine(words=2))

    def share(number: int, blind: bool) -> float:
        firsts = 0
        for n in range(number):
            both = controls(POLICY, SFT)
            *_, pane = ask_both(studio, ana, PAGE, f"Why {n}?", TYPED, blind, both)
            a, b = as_shown(task_of(studio, pane))
            assert pane.texts == (a.text, b.text)
            firsts += a.adapter == POLICY
        return firsts / number

    assert abs(share(200, blind=True) - 0.5) <= 0.2  # 5.6 standard deviations
    assert share(20, blind=False) == 1.0  # named sides are as they were chosen: no coin


def test_the_sides_are_what_was_answered_by_whom(
    studio: Studio, ask: Callable[..., Pane], engine: ScriptedEngine
) -> None:
    for _ in range(5):
        pane = ask()
        for response in as_shown(task_of(studio, pane)):
            asked = next(a for a in engine.asked if a.seed == response.seed)
            assert response.adapter == asked.adapter
            assert response.text == answer_of(asked)


def test_named_answers_are_shown_and_marked(
    studio: Studio, ana: Person, ask: Callable[..., Pane]
) -> None:
    pane = ask(names=(SFT, POLICY), blind=False)
    assert [r.adapter for r in as_shown(task_of(studio, pane))] == [SFT, POLICY]
    assert SFT in pane.facts[0]
    assert POLICY in pane.facts[1]
    assert "reward" in pane.facts[0]
    vote(studio, ana, pane, "b", NO_CLIENT)
    (found,) = studio.judged()
    assert (found.task.blind, found.judgement.blind) == (False, False)
    assert found.judgement.scores_visible
    assert not counts_for_win_rate(found)


# -- voting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", get_args(Vote))
def test_each_vote_is_stored_as_what_it_says(
    studio: Studio, ana: Person, ask: Callable[..., Pane], said: Any
) -> None:
    pane = ask()
    a, b = (r.rid for r in as_shown(task_of(studio, pane)))
    expected = {
        "a": (((a,), (b,)), "decided", None),
        "b": (((b,), (a,)), "decided", None),
        "a_much": (((a,), (b,)), "decided", 2),
        "b_much": (((b,), (a,)), "decided", 2),
        "tie": (((a, b),), "tie", None),
        "both_bad": (((a, b),), "both_bad", None),
        "skip": ((), "skip", None),
    }
    after = vote(studio, ana, pane, said, '{"ms": 18400, "keys": 1, "device": "mobile"}')
    (found,) = studio.judged()
    stored = found.judgement
    assert (stored.ranking, stored.outcome, stored.strength) == expected[said]
    assert (stored.type, stored.blind, stored.scores_visible) == ("pair", True, False)
    assert (stored.client_ms, stored.keys, stored.device) == (18400, 1, "mobile")
    assert "Saved after 18 s" in after.status
    assert (after.can_vote, after.can_undo, after.tone) == (False, True, "good")
    assert counts_for_win_rate(found) == (said != "skip")


@pytest.mark.parametrize("said", ["", "c", "A", "decided", "a_muchmuch"])
def test_what_is_no_vote_is_refused(
    studio: Studio, ana: Person, ask: Callable[..., Pane], said: Any
) -> None:
    pane = ask()
    with pytest.raises(ConfigError, match="no vote"):
        vote(studio, ana, pane, said, NO_CLIENT)
    assert studio.store.counts()["judgements"] == 0


def test_made_up_tasks_and_other_peoples_take_no_vote(
    studio: Studio, ana: Person, ben: Person, ask: Callable[..., Pane]
) -> None:
    pane = ask()
    for forged in (None, "", "unknown", 7, ["x"], {"a": 1}, True):
        for person in (ana, ben):
            with pytest.raises(Refused, match="nothing to vote on"):
                vote(studio, person, replace(pane, task_id=forged), "a", NO_CLIENT)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="nothing to vote on"):
        vote(studio, ben, pane, "a", NO_CLIENT)
    asks = [Ask(POLICY, user("Why?"), seed=i) for i in range(3)]
    rows = [Row(POLICY, f"text {i}", 2, "eos") for i in range(3)]
    ranking = make_task(studio, ana, "rank", asks, rows, blind=True)
    with pytest.raises(Refused, match="nothing to vote on"):
        vote(studio, ana, replace(pane, task_id=ranking.task_id), "a", NO_CLIENT)
    with pytest.raises(Refused, match="nothing to vote on"):
        vote(studio, ana, Pane(can_vote=True), "a", NO_CLIENT)  # though a pair of theirs is open
    assert studio.store.counts()["judgements"] == 0


@pytest.mark.parametrize("finish", ["stopped", "error"])
def test_an_unfinished_pair_takes_no_vote(
    studio: Studio, ana: Person, ask: Callable[..., Pane], engine: ScriptedEngine, finish: Any
) -> None:
    engine.finish = finish
    pane = ask()
    assert not pane.can_vote
    forged = replace(pane, can_vote=True)
    for said in ("a", "b", "a_much", "b_much", "tie", "both_bad"):
        with pytest.raises(EventRefused, match="not finished"):
            vote(studio, ana, forged, said, NO_CLIENT)  # type: ignore[arg-type]
    assert studio.store.counts()["judgements"] == 0
    assert restore(studio, ana).task_id is None


def test_stop_stops_both_and_marks_them(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    steps = ask_both(studio, ana, PAGE, "Why?", TYPED, True, controls(POLICY, SFT))
    for _ in range(4):
        next(steps)
    assert studio.stop("ben", f"compare/{PAGE}") is False
    assert studio.stop("ana", f"compare/{PAGE}") is True
    *_, pane = steps
    assert [r.finish_reason for r in task_of(studio, pane).responses] == ["stopped"] * 2
    assert all(text.endswith("*(stopped)*") for text in pane.texts)
    assert not pane.can_vote


def test_a_replayed_vote_is_one_row_and_another_is_refused(
    studio: Studio, ana: Person, ask: Callable[..., Pane]
) -> None:
    pane = ask()
    first = vote(studio, ana, pane, "a", NO_CLIENT)
    for again_from in (pane, first):
        assert vote(studio, ana, again_from, "a", NO_CLIENT).facts == first.facts
        for said in ("b", "a_much", "tie", "skip"):
            with pytest.raises(JudgedAlready, match="stands"):
                vote(studio, ana, again_from, said, NO_CLIENT)  # type: ignore[arg-type]
    assert studio.store.counts()["judgements"] == 1


def test_two_threads_at_once_leave_one_row(
    studio: Studio, ana: Person, ask: Callable[..., Pane]
) -> None:
    for said in (("a", "a"), ("a", "b")):
        pane, start = ask(), threading.Barrier(2)
        results: list[Any] = []

        def one(what: Any, pane: Pane = pane, start: Any = start, results: Any = results) -> None:
            start.wait(20)
            try:
                results.append(vote(studio, ana, pane, what, NO_CLIENT))
            except UserError as error:
                results.append(error)

        threads = [threading.Thread(target=one, args=(what,)) for what in said]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        rows = [j for j in studio.judged() if j.task.task_id == pane.task_id]
        assert len(rows) == 1
        assert sum(isinstance(r, UserError) for r in results) == (said[0] != said[1])


# -- after the vote -----------------------------------------------------------------------------


def pair_with(studio: Studio, person: Person, *rows: Row) -> Pane:
    asks = [Ask(row.adapter, user("Why?"), seed=i) for i, row in enumerate(rows)]
    return show(studio, person, make_task(studio, person, "pair", asks, list(rows), blind=True))


@pytest.mark.parametrize(
    ("scores", "models", "said", "sentence"),
    [
        ((1.0, 0.5), "xx", "a", "The reward model agrees."),
        ((1.0, 0.5), "xx", "b", "The reward model disagrees."),
        ((0.5, 1.0), "xx", "b_much", "The reward model agrees."),
        ((-1.0, -0.5), "xx", "a", "The reward model disagrees."),
        ((0.0, -0.5), "xx", "a", "The reward model agrees."),  # zero is a score
        ((1.0, 1.0), "xx", "a", ""),
        ((None, 0.5), "xx", "a", ""),
        ((0.5, None), "xx", "a", ""),
        ((1.0, 0.5), "xy", "a", ""),  # scores of two models cannot be compared
        ((1.0, 0.5), "xx", "tie", ""),
        ((1.0, 0.5), "xx", "both_bad", ""),
        ((1.0, 0.5), "xx", "skip", ""),
    ],
)
def test_whether_the_reward_model_agrees(
    studio: Studio, ana: Person, scores: Any, models: str, said: Any, sentence: str
) -> None:
    rows = [
        Row(name, name, 2, "eos", score, 0.5, -9.0, f"run {model}/reward")
        for name, score, model in zip((POLICY, SFT), scores, models, strict=True)
    ]
    status = vote(studio, ana, pair_with(studio, ana, *rows), said, NO_CLIENT).status
    assert status.partition(" s. ")[2] == sentence


def test_undo_shows_the_pair_again_and_takes_one_new_vote(
    studio: Studio, ana: Person, ben: Person, ask: Callable[..., Pane]
) -> None:
    pane = ask()
    vote(studio, ana, pane, "a", NO_CLIENT)
    first = studio.judged()[0].judgement
    with pytest.raises(ConfigError, match="no vote of yours"):
        undo(studio, ben)
    shown = undo(studio, ana)
    assert (shown.task_id, shown.texts, shown.can_vote) == (pane.task_id, pane.texts, True)
    assert shown.facts == ("", "")
    assert studio.judged() == []
    vote(studio, ana, shown, "b", NO_CLIENT)
    (second,) = studio.judged()
    assert second.judgement.id != first.id
    assert second.judgement.ranking == first.ranking[::-1]
    assert not counts_for_win_rate(second)  # who answered was revealed by the first vote
    with pytest.raises(JudgedAlready):
        vote(studio, ana, shown, "a", NO_CLIENT)
    undo(studio, ana)
    with pytest.raises(ConfigError, match="no vote of yours"):
        undo(studio, ana)


def test_undo_takes_the_last_vote_of_this_tab(
    studio: Studio, ana: Person, ask: Callable[..., Pane]
) -> None:
    first, second = ask(text="One?"), ask(text="Two?")
    vote(studio, ana, first, "a", NO_CLIENT)
    vote(studio, ana, second, "a", NO_CLIENT)
    talk = Talk((Turn("Hi", Ask(POLICY, user("Hi")), Row(POLICY, "Hello.", 2, "eos")),))
    like(studio, ana, talk, 1, "Like")  # newer, but a like
    assert undo(studio, ana).task_id == second.task_id
    assert undo(studio, ana).task_id == first.task_id
    assert [j.task.mode for j in studio.judged()] == ["chat"]


def test_a_restart_brings_the_open_pair_back(
    open_studio: Callable[..., Studio], ana: Person, ben: Person, ask: Callable[..., Pane]
) -> None:
    pane = ask()
    later = open_studio()
    back = restore(later, ana)
    assert (back.task_id, back.texts, back.prompt) == (pane.task_id, pane.texts, pane.prompt)
    assert back.can_vote
    assert restore(later, ben).task_id is None  # nobody sees another's
    vote(later, ana, back, "a", NO_CLIENT)
    assert restore(later, ana).task_id is None
    assert restore(later, ana).can_undo
    assert undo(open_studio(), ana).task_id == pane.task_id


def test_a_repeat_of_a_pair_has_its_sides_swapped(
    studio: Studio, ana: Person, ask: Callable[..., Pane]
) -> None:
    pane = ask()
    swapped = show(studio, ana, again(studio, ana, task_of(studio, pane)))
    assert swapped.texts == pane.texts[::-1]
    assert telling(sent_to_browser(swapped)) == []


# -- from a chat --------------------------------------------------------------------------------


def whole_turn(text: str = "Hi", finish: Any = "eos", adapter: str = POLICY) -> Turn:
    ask = Ask(adapter, user(text), 0.7, 0.9, 16, 5)
    return Turn(text, ask, Row(adapter, "Hello there.", 3, finish, 1.0, 0.1, -4.0, "old/reward"))


def test_a_turn_is_compared_with_another_adapters_answer(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    panes = list(compare_turn(studio, ana, PAGE, Talk((whole_turn(),)), SFT))
    (asked,) = engine.asked  # the answer there is, is not drawn again
    assert (asked.adapter, asked.messages, asked.temperature, asked.seed) == (
        SFT,
        user("Hi"),
        0.7,
        5,
    )
    assert all(p.texts[0] == "Hello there." for p in panes)
    task = task_of(studio, panes[-1])
    assert [r.adapter for r in as_shown(task)] == [POLICY, SFT]
    assert (task.blind, task.prompt_source) == (False, "chat")
    after = vote(studio, ana, panes[-1], "b", NO_CLIENT)
    assert "reward model" not in after.status  # two reward models scored the two
    assert studio.judged()[0].judgement.scores_visible


def test_what_cannot_be_compared_is_said(studio: Studio, ana: Person) -> None:
    def go(talk: Talk, other: Any) -> Iterator[Pane]:
        return compare_turn(studio, ana, PAGE, talk, other)

    for talk in (Talk(), Talk((Turn("Hi"),))):
        with pytest.raises(ConfigError, match="Chat first"):
            next(go(talk, SFT))
    with pytest.raises(ConfigError, match="stopped"):
        next(go(Talk((whole_turn(finish="stopped"),)), SFT))
    with pytest.raises(ConfigError, match="gave that answer"):
        next(go(Talk((whole_turn(),)), POLICY))
    for forged in (None, "", "quick/reward", ["quick/sft"], {"a": 1}, 7):
        seen: list[Pane] = []
        with pytest.raises(ConfigError, match="No adapter"):
            seen.extend(go(Talk((whole_turn(),)), forged))
        assert seen[-1].status == "Not answered."
    assert studio.store.counts()["tasks"] == 0


def test_a_comparison_from_a_chat_can_be_stopped(studio: Studio, ana: Person) -> None:
    steps = compare_turn(studio, ana, PAGE, Talk((whole_turn(),)), SFT)
    for _ in range(4):
        next(steps)
    assert studio.stop("ana", f"compare/{PAGE}") is True
    *_, pane = steps
    assert [r.finish_reason for r in as_shown(task_of(studio, pane))] == ["eos", "stopped"]
    assert not pane.can_vote


def test_markup_of_models_and_people_is_escaped_where_html_is_made(
    studio: Studio, ana: Person, ask: Callable[..., Pane]
) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    pane = ask(text=hostile)
    values = updates(pane)
    assert hostile not in values[1]
    assert "&lt;img" in values[1]
    named = replace(pane, status=hostile)
    assert hostile not in sent_to_browser(replace(named, texts=("", "")))
    rows = [Row(hostile, "text", 2, "eos"), Row(SFT, "other", 2, "eos")]
    facts = vote(studio, ana, pair_with(studio, ana, *rows), "a", NO_CLIENT).facts
    assert hostile not in "".join(facts)


def test_a_prompt_of_several_turns_is_shown_with_its_speakers(studio: Studio, ana: Person) -> None:
    first, second = whole_turn("One?"), whole_turn("Two?")
    assert second.ask is not None
    messages = (*user("One?"), {"role": "assistant", "content": "Hello there."}, *user("Two?"))
    second = replace(second, ask=replace(second.ask, messages=messages))
    *_, pane = compare_turn(studio, ana, PAGE, Talk((first, second)), SFT)
    assert pane.prompt == "user: One?\n\nassistant: Hello there.\n\nuser: Two?"
    assert prompt_key(task_of(studio, pane).prompt) == task_of(studio, pane).prompt_sha256
