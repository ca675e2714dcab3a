"""Rank: which task comes next: made ahead, open, ranked before by others or oneself, chosen."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lora_rlhf.data.records import prompt_key, user
from lora_rlhf.errors import UserError
from lora_rlhf.preferences.choice import Candidate, propensities, uncertainty
from lora_rlhf.preferences.events import Judgement, Task
from lora_rlhf.preferences.ratings import counts_for_win_rate
from tests.ui.conftest import NEVER_AGAIN
from tests.ui.dealing import POLICY, SFT, deal, decided, plan, task_of, votes
from tests.ui.scripted import ScriptedEngine, eventually
from ui.ahead import Plan, Prepared
from ui.asking import Ask, PoolPrompt, Row
from ui.people import Person
from ui.ranking import Sheet, next_sheet, ready_sheet, submit
from ui.studio import Settings, Studio
from ui.tasks import Refused, as_shown, make_task

# -- the next task ------------------------------------------------------------------------------


def test_the_first_task_is_waited_for_and_the_next_lie_ready(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    engine.gate.clear()
    steps = next_sheet(studio, ana, plan(studio, ana), Sheet())
    waiting = [next(steps), next(steps)]
    assert [s.task_id for s in waiting] == [None, None]
    assert waiting[0].status == "The next answers are being made."
    engine.gate.set()
    *_, first = steps
    assert len(first.answers) == 4
    eventually(lambda: studio.ahead.ready(plan(studio, ana)) == studio.ahead.depth)
    engine.gate.clear()  # from here on nothing is made any more
    sheet = submit(studio, ana, first, decided(first))
    for _ in range(3):  # three lie ready: no waiting between one ranking and the next
        following = ready_sheet(studio, ana, plan(studio, ana), sheet)
        assert following is not None
        sheet = submit(studio, ana, following, decided(following))
    assert ready_sheet(studio, ana, plan(studio, ana), sheet) is None


def test_a_task_records_how_it_was_made(studio: Studio, ana: Person) -> None:
    sheet = deal(studio, ana)
    task = task_of(studio, sheet)
    assert (task.mode, task.annotator, task.blind) == ("rank", "ana", True)
    assert task.prompt_source.startswith("pool:train#")
    assert (task.sampler.strategy, task.sampler.propensity) == ("uniform", 1.0)
    assert Counter(r.adapter for r in task.responses) == {POLICY: 2, SFT: 2}
    shown = as_shown(task)
    assert [a["letter"] for a in sheet.answers] == list("ABCD")
    assert [a["text"] for a in sheet.answers] == [r.text for r in shown]
    assert sheet.prompt == task.prompt[0]["content"]


def test_cut_answers_say_so(studio: Studio, ana: Person, engine: ScriptedEngine) -> None:
    engine.finish = "length"
    assert {a["note"] for a in deal(studio, ana).answers} == {"cut at the length limit"}


def test_two_people_have_tasks_of_their_own(studio: Studio, ana: Person, ben: Person) -> None:
    hers, his = deal(studio, ana), deal(studio, ben)
    assert hers.task_id != his.task_id
    assert deal(studio, ana).task_id == hers.task_id
    assert deal(studio, ben).task_id == his.task_id
    for forged in (hers, replace(his, task_id=hers.task_id)):
        with pytest.raises(Refused, match="nothing to vote on"):
            submit(studio, ben, forged, decided(forged))
        with pytest.raises(Refused, match="nothing to vote on"):
            submit(studio, ben, his, decided(his, task=hers.task_id))
    assert votes(studio) == []


def test_no_prompt_comes_twice_and_the_end_is_told(
    open_studio: Callable[..., Studio], ana: Person
) -> None:
    studio = open_studio(engine=ScriptedEngine(prompts=7, words=6))
    sheet, prompts = Sheet(), []
    for _ in range(7):
        sheet = deal(studio, ana, sheet)
        prompts.append(sheet.prompt)
        outcome = {"outcome": "skip"} if len(prompts) % 2 else decided(sheet)
        sheet = submit(studio, ana, sheet, outcome)
    sheet = deal(studio, ana, sheet)
    assert sheet.task_id is None
    assert len(prompts) == len(set(prompts)) == 7
    assert "all 7 prompts" in sheet.status
    assert (sheet.tone, sheet.for_browser()["failed"]) == ("bad", True)
    # After a restart they are known still.
    later = open_studio(engine=ScriptedEngine(prompts=7, words=6))
    assert "all 7 prompts" in deal(later, ana).status


def test_the_open_prompt_is_not_made_again_after_a_restart(
    open_studio: Callable[..., Studio], ana: Person
) -> None:
    engines = [ScriptedEngine(prompts=3, words=6) for _ in range(2)]
    first = deal(open_studio(engine=engines[0]), ana)
    later = open_studio(engine=engines[1])
    sheet = deal(later, ana)
    assert sheet.task_id == first.task_id
    eventually(lambda: later.ahead.ready(plan(later, ana)) == 2)  # of the two that are left
    made = {p.prompt.messages[0]["content"] for p in later.ahead.candidates(plan(later, ana))}
    assert first.prompt not in made


def test_a_failure_is_told_and_the_next_look_tries_again(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    engine.errors.append(UserError("No memory is left."))
    sheet = deal(studio, ana)
    assert (sheet.task_id, sheet.status, sheet.failed) == (None, "No memory is left.", True)
    after = deal(studio, ana, sheet)
    assert (after.task_id is not None, after.failed, after.tone) == (True, False, "")
    assert after.status == "Which is best? Press its letter, or tap."


def test_while_training_has_the_device_the_sheet_says_so(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    engine.release()
    steps = next_sheet(studio, ana, plan(studio, ana), Sheet())
    assert [next(steps).status for _ in range(2)] == ["Training has the device."] * 2
    engine.restore()
    *_, last = steps
    assert last.task_id is not None


def test_whoever_waits_gets_a_task_of_adapters_adopted_meanwhile(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    engine.gate.clear()
    steps = next_sheet(studio, ana, plan(studio, ana), Sheet())
    next(steps)
    engine._version += 1  # the plan that is waited for is of old ones now
    next(steps)
    engine.gate.set()
    found = next(s for s, _ in zip(steps, range(200), strict=False) if s.task_id)
    assert found.answers


def test_a_page_that_is_left_ends_the_waiting(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    engine.gate.clear()
    steps = next_sheet(studio, ana, plan(studio, ana), Sheet())
    next(steps)
    assert isinstance(steps, Iterator)
    steps.close()  # type: ignore[attr-defined]
    engine.gate.set()
    eventually(lambda: studio.ahead.ready(plan(studio, ana)))
    assert studio.store.counts()["tasks"] == 0  # what is made waits for the next page


# -- again: overlap and repeats -----------------------------------------------------------------


def ranked(studio: Studio, who: Person, count: int) -> list[Task]:
    tasks, sheet = [], Sheet()
    for _ in range(count):
        sheet = deal(studio, who, sheet)
        tasks.append(task_of(studio, sheet))
        sheet = submit(studio, who, sheet, decided(sheet))
    return tasks


def test_overlap_gives_what_others_ranked_once_in_another_order(
    open_studio: Callable[..., Studio], ana: Person, ben: Person
) -> None:
    hers = ranked(open_studio(NEVER_AGAIN), ana, 3)
    studio = open_studio(Settings(overlap=1.0, repeats=0.0))
    his = ranked(studio, ben, 4)
    assert {t.repeat_of for t in his[:3]} == {t.task_id for t in hers}  # each once
    assert his[3].repeat_of is None  # then there is nothing left but new ones
    for copy in his[:3]:
        original = next(t for t in hers if t.task_id == copy.repeat_of)
        assert copy.annotator == "ben"
        assert [r.rid for r in as_shown(copy)] != [r.rid for r in as_shown(original)]
        assert {r.rid: r.text for r in copy.responses} == {
            r.rid: r.text for r in original.responses
        }
    # And nobody gets their own back by way of others'.
    own = {t.task_id for t in hers}
    assert not own & {t.repeat_of for t in ranked(studio, ana, 2)}


def test_overlap_brings_no_prompt_a_second_time(
    open_studio: Callable[..., Studio], ana: Person, ben: Person
) -> None:
    few = [ScriptedEngine(prompts=4, words=6) for _ in range(2)]
    first = open_studio(NEVER_AGAIN, engine=few[0])
    ranked(first, ana, 3)
    ranked(first, ben, 3)  # of four prompts: at least two are the same
    later = open_studio(Settings(overlap=1.0, repeats=0.0), engine=few[1])
    for who in (ana, ben):
        sheet = Sheet()
        for _ in range(8):
            if (sheet := deal(later, who, sheet)).task_id is None:
                break
            sheet = submit(later, who, sheet, decided(sheet))
        prompts = [j.task.prompt_sha256 for j in later.judged_by(who.name, "rank")]
        assert len(prompts) == len(set(prompts)) == 4


def test_a_repeat_comes_ten_judgements_later_once(
    open_studio: Callable[..., Studio], ana: Person
) -> None:
    settings = Settings(overlap=0.0, repeats=1.0)
    studio = open_studio(settings, engine=ScriptedEngine(words=4))
    tasks = ranked(studio, ana, 14)
    firsts = [t.repeat_of for t in tasks]
    assert firsts[:11] == [None] * 11
    # From the twelfth on the oldest that has no repeat yet, one after the other.
    assert firsts[11:] == [t.task_id for t in tasks[:1]] + firsts[12:]
    known = [f for f in firsts if f is not None]
    assert len(known) == len(set(known))
    for place, task in enumerate(tasks):
        if task.repeat_of is not None:
            ids = [t.task_id for t in tasks]
            assert place - ids.index(task.repeat_of) > 10
            assert task.sampler.strategy == "repeat"
            original = tasks[ids.index(task.repeat_of)]
            assert [r.rid for r in as_shown(task)] != [r.rid for r in as_shown(original)]


def test_skipped_and_imported_tasks_and_pairs_do_not_come_again(
    open_studio: Callable[..., Studio], ana: Person, ben: Person
) -> None:
    first = open_studio(NEVER_AGAIN)
    skipped = deal(first, ana)
    submit(first, ana, skipped, {"outcome": "skip"})
    asks = [Ask(name, user("Pair?"), seed=1) for name in (POLICY, SFT)]
    rows = [Row(a.adapter, a.adapter[-3:], 2, "eos") for a in asks]
    pair = make_task(first, ana, "pair", asks, rows, blind=True)
    at = tuple((r.rid,) for r in pair.responses)
    first.store.add(
        Judgement(
            task_id=pair.task_id,
            annotator="ana",
            blind=True,
            type="pair",
            ranking=at,
            outcome="decided",
            shown_ts=1.0,
            done_ts=2.0,
        )
    )
    later = open_studio(Settings(overlap=1.0, repeats=0.0))
    assert task_of(later, deal(later, ben)).repeat_of is None


def test_the_shares_are_those_of_the_settings(
    open_studio: Callable[..., Studio], ana: Person, ben: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coin at both sides of its edges: 0.1 overlap, then 0.05 repeats, then new tasks."""
    studio = open_studio(Settings(overlap=0.1, repeats=0.05), engine=ScriptedEngine(words=4))
    coin = SimpleNamespace(random=lambda: 1.0, choice=lambda found: found[0])
    monkeypatch.setattr("ui.ranking.random", SimpleNamespace(SystemRandom=lambda: coin))
    hers = [t.task_id for t in ranked(studio, ana, 11)]
    his = [t.task_id for t in ranked(studio, ben, 20)]  # 9 of 40 prompts at least are new to ana
    for side, whose in (
        (0.0999, his),
        (0.1, hers),
        (0.1499, hers),
        (0.1501, [None]),
        (0.99, [None]),
    ):
        coin.random = lambda side=side: side
        (task,) = ranked(studio, ana, 1)
        assert task.repeat_of in whose


def test_waiting_for_a_task_does_not_make_it_one_that_was_judged_before(
    open_studio: Callable[..., Studio], ana: Person, ben: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn once a task: drawn at every look, a slow engine would make nearly all of them so."""
    engine = ScriptedEngine(words=4)
    studio = open_studio(Settings(overlap=0.5, repeats=0.0), engine=engine)
    draws = iter([1.0] * 11 + [0.9] + [0.1] * 100)
    coin = SimpleNamespace(random=lambda: next(draws), choice=lambda found: found[0])
    monkeypatch.setattr("ui.ranking.random", SimpleNamespace(SystemRandom=lambda: coin))
    ranked(studio, ana, 11)
    engine.gate.clear()
    wanted = plan(studio, ben)
    assert [ready_sheet(studio, ben, wanted, Sheet()) for _ in range(20)] == [None] * 20
    engine.gate.set()
    assert task_of(studio, deal(studio, ben)).repeat_of is None


# -- active choice ------------------------------------------------------------------------------


UNIT = 2.0  # log-odds that one unit of a score stands for


def prepared(number: int, *gaps: float | None) -> Prepared:
    """Answers whose raw scores are these, normalised as the engine gives them."""
    scores = [None if gap is None else gap / UNIT for gap in gaps]
    asks = [Ask(POLICY, user(f"prompt {number}"), seed=i) for i in range(len(scores))]
    rows = [
        Row(POLICY, f"text {i}", 5, "eos", score, 0.1, -4.0, "quick/reward", UNIT)
        for i, score in enumerate(scores)
    ]
    return Prepared(PoolPrompt(user(f"prompt {number}"), f"pool:train#{number}"), asks, rows)


def stocked(studio: Studio, who: Person, engine: ScriptedEngine, *shelf: Prepared) -> Plan:
    """A plan whose shelf holds just these, and is not filled up."""
    engine.gate.clear()
    wanted = plan(studio, who)
    studio.ahead.want(wanted, lambda: studio.seen(who.name, "rank"))
    studio.ahead._shelves[wanted].ready[:] = shelf
    return wanted


def test_active_choice_logs_its_propensity_and_stays_out_of_the_win_rate(
    studio: Studio, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(1)
    monkeypatch.setattr("ui.ranking.random", SimpleNamespace(SystemRandom=lambda: chance))
    shelf = [prepared(0, 0.0, 4.0), prepared(1, 0.0, 0.1), prepared(2, 0.0, 1.0)]
    scores = [uncertainty(Candidate((0.0, gap), (5, 5))) for gap in (4.0, 0.1, 1.0)]
    expected = propensities(scores)
    seen: Counter[str] = Counter()
    for number in range(12):
        who = Person(f"person {number}", False, "session")
        wanted = stocked(studio, who, engine, *shelf)
        sheet = ready_sheet(studio, who, wanted, Sheet(), active=True)
        assert sheet is not None
        sampler, place = task_of(studio, sheet).sampler, int(sheet.prompt[-1])
        assert sampler.propensity == pytest.approx(expected[place])
        assert sampler.score == pytest.approx(scores[place])
        seen[sampler.strategy] += 1
        # What an active choice passed over is no fair sample any more, and is thrown away.
        left = studio.ahead.candidates(wanted)
        assert len(left) == (0 if sampler.strategy == "active" else 2)
        submit(studio, who, sheet, decided(sheet))
        assert counts_for_win_rate(studio.judged()[-1]) == (sampler.strategy == "uniform")
    assert set(seen) == {"uniform", "active"}


def test_without_scores_an_active_choice_is_a_uniform_one(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    wanted = stocked(studio, ana, engine, prepared(0, None, None), prepared(1, None, None))
    sheet = ready_sheet(studio, ana, wanted, Sheet(), active=True)
    assert sheet is not None
    sampler = task_of(studio, sheet).sampler
    assert (sampler.strategy, sampler.propensity) == ("uniform", 0.5)


def test_nothing_ready_is_nothing_to_choose_from(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    wanted = stocked(studio, ana, engine)
    assert ready_sheet(studio, ana, wanted, Sheet(), active=True) is None


def test_the_default_is_the_oldest_uniform_task(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    wanted = stocked(studio, ana, engine, prepared(0, 0.0, 4.0), prepared(1, 0.0, 0.1))
    sheet = ready_sheet(studio, ana, wanted, Sheet())
    assert sheet is not None
    assert sheet.prompt == "prompt 0"
    assert prompt_key(task_of(studio, sheet).prompt) == prompt_key(user("prompt 0"))
