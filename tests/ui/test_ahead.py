"""Tasks made ahead: zero wait, depth, eviction, no prompt twice, giving way, failures told."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lora_rlhf.data.records import prompt_key
from lora_rlhf.errors import ConfigError
from tests.ui.scripted import ScriptedEngine, eventually
from ui.ahead import DEPTH, MOST_ALIKE, Ahead, Plan, Prepared
from ui.asking import Ask, Row

PATIENCE = 20.0
ADAPTERS = ("quick/policy", "quick/sft")
PLAN = Plan("ana", ADAPTERS, 4, 1.0, 1.0, 16, version=1)


def nothing() -> set[str]:
    return set()


def key(prepared: Prepared) -> str:
    return prompt_key(prepared.prompt.messages)


@pytest.fixture
def ahead(engine: ScriptedEngine) -> Iterator[Ahead]:
    ahead = Ahead(engine)
    yield ahead
    engine.gate.set()
    ahead.close()


def filled(ahead: Ahead, plan: Plan = PLAN, count: int = DEPTH) -> None:
    eventually(lambda: ahead.ready(plan) >= count)


# -- zero wait ----------------------------------------------------------------------------------


def test_a_stocked_shelf_gives_without_asking_the_engine(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    ahead.want(PLAN, nothing)
    filled(ahead)
    engine.gate.clear()  # from here on no answer is finished
    taken = [ahead.take(PLAN) for _ in range(DEPTH + 1)]
    assert None not in taken[:DEPTH]  # the wait is zero, whatever the engine does
    assert taken[DEPTH] is None


def test_depth_is_kept_and_not_exceeded(ahead: Ahead, engine: ScriptedEngine) -> None:
    ahead.want(PLAN, nothing)
    filled(ahead)
    # Another person's shelf is filled afterwards; by then the first would have grown.
    other = replace(PLAN, who="ben")
    ahead.want(other, nothing)
    filled(ahead, other)
    assert ahead.ready(PLAN) == DEPTH
    assert len(engine.calls) == 2 * DEPTH
    ahead.take(PLAN)
    filled(ahead)
    assert len(engine.calls) == 2 * DEPTH + 1


def test_the_emptiest_shelf_is_filled_first(ahead: Ahead, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    plans = [replace(PLAN, who=who) for who in ("ana", "ben", "cyd")]
    for plan in plans:
        ahead.want(plan, nothing)
    engine.gate.set()
    for plan in plans:
        filled(ahead, plan)
    firsts = [who for who, _ in engine.calls[:3]]
    # One for each before anybody's second. Filling one after the other would give one name alone.
    assert set(firsts) == {"ana", "ben", "cyd"}


def test_an_oldest_task_is_given_first_or_the_chosen_one(ahead: Ahead) -> None:
    ahead.want(PLAN, nothing)
    filled(ahead)
    first, second, third = ahead.candidates(PLAN)
    assert ahead.take(PLAN, second) is second
    assert ahead.take(PLAN, second) is None  # gone
    assert ahead.take(PLAN) is first
    assert third in ahead.candidates(PLAN)


def test_what_a_choice_has_passed_over_is_not_chosen_from_again(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    """Else the sure ones would pile up, and uniform draws from the shelf be no fair sample."""
    ahead.want(PLAN, nothing)
    filled(ahead)
    before = ahead.candidates(PLAN)
    engine.gate.clear()
    assert ahead.take(PLAN, before[1], clear=True) is before[1]
    assert ahead.candidates(PLAN) == []
    engine.gate.set()
    filled(ahead)
    assert not any(c in before for c in ahead.candidates(PLAN))


# -- what is asked ------------------------------------------------------------------------------


def test_adapters_answer_equally_often_with_a_seed_each(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    plan = replace(PLAN, answers=4)
    ahead.want(plan, nothing)
    filled(ahead, plan)
    for prepared in ahead.candidates(plan):
        assert Counter(a.adapter for a in prepared.asks) == dict.fromkeys(ADAPTERS, 2)
        assert len({a.seed for a in prepared.asks}) == 4
        assert {a.messages for a in map(_comparable, prepared.asks)} == {
            _comparable(prepared.asks[0]).messages
        }
        assert [r.adapter for r in prepared.rows] == [a.adapter for a in prepared.asks]


def _comparable(ask: Ask) -> Ask:
    return replace(ask, messages=str(ask.messages))  # type: ignore[arg-type]


def test_a_third_of_three_falls_to_either_of_two_adapters(ahead: Ahead) -> None:
    """The adapter with one answer more is drawn: always the same one would write twice as much."""
    plan = replace(PLAN, answers=3)
    found = []
    for number in range(30):
        named = replace(plan, who=f"person {number}")
        ahead.want(named, nothing)
        filled(ahead, named, 1)
        found.append(Counter(a.adapter for a in ahead.candidates(named)[0].asks).most_common()[0])
    assert {adapter for adapter, _ in found} == set(ADAPTERS)  # by chance missed in 2 of 2^30 runs
    assert {count for _, count in found} == {2}


def test_empty_and_repeated_answers_are_left_out(ahead: Ahead, engine: ScriptedEngine) -> None:
    texts = iter(["same", " same ", "", "other"] * 100)
    engine.says = lambda ask: next(texts)
    ahead.want(PLAN, nothing)
    filled(ahead, count=1)
    prepared = ahead.candidates(PLAN)[0]
    assert [r.text for r in prepared.rows] == ["same", "other"]
    assert [a.adapter for a in prepared.asks] == [r.adapter for r in prepared.rows]


def test_stopped_answers_are_never_offered(ahead: Ahead, engine: ScriptedEngine) -> None:
    engine.finish = "stopped"  # as when it gives way to somebody
    ahead.want(PLAN, nothing)
    eventually(lambda: len(engine.calls) >= 3)
    assert ahead.ready(PLAN) == 0
    engine.finish = "length"
    filled(ahead)


def test_it_asks_in_the_background_in_the_persons_name(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    ahead.want(PLAN, nothing)
    filled(ahead)
    assert set(engine.calls) == {("ana", True)}


# -- a prompt never twice -----------------------------------------------------------------------


def test_no_prompt_comes_twice_to_one_person_and_each_comes_once() -> None:
    engine = ScriptedEngine(prompts=12)
    ahead = Ahead(engine)
    try:
        plan, found = PLAN, []
        ahead.want(plan, nothing)
        for _ in range(12):
            assert ahead.wait(plan, PATIENCE) == ""
            taken = ahead.take(plan)
            assert taken is not None
            found.append(key(taken))  # not judged: what is open on the screen must not come again
        assert "all 12 prompts" in ahead.wait(plan, PATIENCE)
        assert len(found) == len(set(found)) == 12
    finally:
        ahead.close()


def test_a_change_of_plan_does_not_bring_prompts_back() -> None:
    engine = ScriptedEngine(prompts=6)
    ahead = Ahead(engine)
    try:
        found = []
        for answers in (4, 3, 4, 3, 4, 3):
            plan = replace(PLAN, answers=answers)
            ahead.want(plan, nothing)
            filled(ahead, plan, 1)
            taken = ahead.take(plan)
            assert taken is not None
            found.append(key(taken))
        assert len(set(found)) == 6  # drawn anew each time it would be so in 1 of 65 runs
    finally:
        ahead.close()


def test_prompts_met_elsewhere_are_taken_off_the_shelf(ahead: Ahead) -> None:
    met: set[str] = set()
    ahead.want(PLAN, lambda: met)
    filled(ahead)
    first, second, third = ahead.candidates(PLAN)
    met |= {key(first), key(third)}  # such as by ranking another person's task
    assert ahead.candidates(PLAN)[:1] == [second]
    assert ahead.take(PLAN, first) is None
    assert ahead.take(PLAN) is second


def test_people_do_not_use_up_each_others_prompts() -> None:
    engine = ScriptedEngine(prompts=2)
    ahead = Ahead(engine)
    try:
        for who in ("ana", "ben"):
            plan = replace(PLAN, who=who)
            ahead.want(plan, nothing)
            taken = [ahead.wait(plan, PATIENCE) or ahead.take(plan) for _ in range(2)]
            assert len({key(t) for t in taken if isinstance(t, Prepared)}) == 2
    finally:
        ahead.close()


# -- eviction -----------------------------------------------------------------------------------


def test_a_new_plan_of_a_person_replaces_the_old_one(ahead: Ahead) -> None:
    ahead.want(PLAN, nothing)
    other = replace(PLAN, who="ben")
    ahead.want(other, nothing)
    filled(ahead)
    filled(ahead, other)
    hotter = replace(PLAN, temperature=1.5)
    ahead.want(hotter, nothing)
    assert ahead.ready(PLAN) == 0
    assert ahead.take(PLAN) is None
    assert ahead.ready(other) == DEPTH  # somebody else's stays
    filled(ahead, hotter)
    assert {a.temperature for p in ahead.candidates(hotter) for a in p.asks} == {1.5}


def test_tasks_of_older_adapters_are_dropped(ahead: Ahead, engine: ScriptedEngine) -> None:
    ahead.want(PLAN, nothing)
    filled(ahead)
    engine._version += 1
    eventually(lambda: ahead.ready(PLAN) == 0)
    calls = len(engine.calls)
    fresh = replace(PLAN, version=2)
    ahead.want(fresh, nothing)
    filled(ahead, fresh)
    assert len(engine.calls) == calls + DEPTH  # and the old plan is not gone on with


def test_two_pages_that_want_different_things_both_get_them(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    """Each replaces the other's plan; neither may wait for ever."""
    engine.seconds_a_word = 0.01  # a task takes longer than it takes to look again
    hotter = replace(PLAN, temperature=1.5)
    got: list[Plan] = []

    def page(plan: Plan) -> None:
        for _ in range(400):
            ahead.want(plan, nothing)
            if ahead.take(plan) is not None:
                got.append(plan)
                return
            ahead.wait(plan, 0.05)

    pages = [threading.Thread(target=page, args=(plan,)) for plan in (PLAN, hotter)]
    for thread in pages:
        thread.start()
    for thread in pages:
        thread.join(PATIENCE)
    assert sorted(p.temperature for p in got) == [1.0, 1.5]


def test_a_shelf_nobody_came_back_to_is_cleared(
    ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead.want(PLAN, nothing)
    filled(ahead)
    monkeypatch.setattr("ui.ahead._FORGET_SECONDS", 0.0)
    eventually(lambda: ahead.ready(PLAN) == 0)


# -- failures -----------------------------------------------------------------------------------


def test_a_failure_is_told_once_and_then_tried_again(ahead: Ahead, engine: ScriptedEngine) -> None:
    engine.errors.append(ConfigError("No such thing."))
    ahead.want(PLAN, nothing)
    assert ahead.wait(PLAN, PATIENCE) == "No such thing."
    assert ahead.wait(PLAN, PATIENCE) == ""
    assert ahead.take(PLAN) is not None


def test_a_failure_is_told_to_the_person_it_befell(ahead: Ahead, engine: ScriptedEngine) -> None:
    other = replace(PLAN, who="ben")
    ahead.want(other, nothing)
    filled(ahead, other)
    engine.errors.append(ConfigError("No such thing."))
    ahead.want(PLAN, nothing)
    assert ahead.wait(PLAN, PATIENCE) == "No such thing."
    assert ahead.wait(other, PATIENCE) == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_is_told_and_does_not_end_the_making_of_tasks(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    engine.errors.append(ZeroDivisionError("a bug"))
    ahead.want(PLAN, nothing)
    assert "log" in ahead.wait(PLAN, PATIENCE)
    eventually(lambda: not ahead._thread.is_alive())  # type: ignore[union-attr]
    ahead.want(PLAN, nothing)  # as the page does at its next look
    filled(ahead)


def test_while_the_engine_is_paused_it_waits_and_goes_on_afterwards(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    engine.release()
    ahead.want(PLAN, nothing)
    eventually(lambda: engine.calls)
    assert ahead.wait(PLAN, 0.01) == ""  # no failure: whoever waits looks at the engine's state
    assert ahead.ready(PLAN) == 0
    engine.restore()
    filled(ahead)


def test_answers_that_are_always_alike_are_told_instead_of_tried_for_ever(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    engine.says = lambda ask: "the same"
    ahead.want(PLAN, nothing)
    assert "all alike" in ahead.wait(PLAN, PATIENCE)
    assert len(engine.calls) == MOST_ALIKE
    engine.says = None
    filled(ahead)


def test_alike_now_and_then_is_no_failure(ahead: Ahead, engine: ScriptedEngine) -> None:
    counter = iter(range(10_000))
    # Every task but each fifth is alike: more of them than MOST_ALIKE, never so many in a row.
    engine.says = lambda ask: "same" if (n := next(counter)) // 4 % 5 else f"text {n}"
    ahead.want(PLAN, nothing)
    filled(ahead)
    assert len(engine.calls) > MOST_ALIKE
    assert ahead.wait(PLAN, 0.0) == ""


# -- waiting and closing ------------------------------------------------------------------------


def test_waiting_ends_when_a_task_is_ready_or_the_time_is_over(
    ahead: Ahead, engine: ScriptedEngine
) -> None:
    engine.gate.clear()
    ahead.want(PLAN, nothing)
    assert ahead.wait(PLAN, 0.02) == ""
    assert ahead.ready(PLAN) == 0
    engine.gate.set()
    assert ahead.wait(PLAN, PATIENCE) == ""
    assert ahead.ready(PLAN) > 0


def test_closing_ends_the_stream_the_thread_and_every_wait(engine: ScriptedEngine) -> None:
    ahead = Ahead(engine)
    engine.gate.clear()
    ahead.want(PLAN, nothing)
    told: list[str] = []
    waiter = threading.Thread(target=lambda: told.append(ahead.wait(PLAN, 60.0)))
    waiter.start()
    eventually(lambda: engine.calls)
    ahead.close()
    waiter.join(PATIENCE)
    assert told == ["The app is closing."]
    assert not ahead._thread.is_alive()  # type: ignore[union-attr]
    ahead.want(PLAN, nothing)  # a page that is late
    assert ahead.take(PLAN) is None
    assert not ahead._thread.is_alive()  # type: ignore[union-attr]


def test_rows_keep_their_scores_for_an_active_choice(ahead: Ahead) -> None:
    ahead.want(PLAN, nothing)
    filled(ahead)
    rows: list[Row] = ahead.candidates(PLAN)[0].rows
    assert all(row.score is not None for row in rows)
