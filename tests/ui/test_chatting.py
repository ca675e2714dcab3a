"""Chat: what is asked of the engine, what is kept, likes; whatever a browser sends."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from lora_rlhf.errors import ConfigError, UserError
from tests.ui.fakes import answer_of, score_of
from tests.ui.scripted import ScriptedEngine
from ui.asking import Ask, Busy, Row
from ui.chatting import Controls, Talk, Turn, controls_of, edit, like, retry, send, turn_of, undo
from ui.people import Person
from ui.studio import Studio
from ui.tabs.chat import _updates

POLICY, SFT = "quick/policy", "quick/sft"
FIXED = Controls(POLICY, 0.7, 0.9, 16, 11)
PAGE = "page"


def last_of(steps: Iterator[Talk]) -> Talk:
    *_, last = steps
    return last


@pytest.fixture
def say(studio: Studio, ana: Person) -> Callable[..., Talk]:
    def send_whole(talk: Talk, text: Any, controls: Controls = FIXED) -> Talk:
        return last_of(send(studio, ana, PAGE, talk, text, controls))

    return send_whole


def roles(talk: Talk) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in talk.display()]


# -- asking -------------------------------------------------------------------------------------


def test_what_is_asked_is_what_was_typed_and_set(
    say: Callable[..., Talk], engine: ScriptedEngine
) -> None:
    talk = say(Talk(), "  Hello?\n")
    (ask,) = engine.asked
    assert ask.messages == ({"role": "user", "content": "Hello?"},)
    assert (ask.adapter, ask.temperature, ask.top_p, ask.max_new_tokens) == (POLICY, 0.7, 0.9, 16)
    assert roles(talk) == [("user", "Hello?"), ("assistant", answer_of(ask))]


def test_the_dialogue_goes_along(say: Callable[..., Talk], engine: ScriptedEngine) -> None:
    talk = say(say(Talk(), "One?"), "Two?")
    first, second = engine.asked
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert [m["content"] for m in second.messages] == ["One?", answer_of(first), "Two?"]
    assert len(talk.turns) == 2


def test_it_streams_growing_prefixes_with_a_status(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    engine.waits = (2, 1)
    steps = list(send(studio, ana, PAGE, Talk(), "Hello?", FIXED))
    texts = [s.turns[0].row.text for s in steps if s.turns[0].row is not None]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(set(texts)) > 10
    assert steps[0].display()[-1]["content"] == "\u2026"
    assert [s.status for s in steps[1:3]] == [
        "Waiting for the device: 2 jobs are ahead of you.",
        "Waiting for the device: 1 job is ahead of you.",
    ]
    assert "reward" in steps[-1].status
    assert "KL +0.5 nats" in steps[-1].status
    assert POLICY in steps[-1].status


@pytest.mark.parametrize("text", [None, "", "  \n "])
def test_nothing_typed_is_refused(studio: Studio, ana: Person, text: Any) -> None:
    with pytest.raises(ConfigError, match="Type a message"):
        next(send(studio, ana, PAGE, Talk(), text, FIXED))


@pytest.mark.parametrize("text", [7, ["a"], {"text": "a"}, "half \ud800", "\x00", "<script>"])
def test_whatever_is_typed_is_asked_as_text(
    studio: Studio, ana: Person, engine: ScriptedEngine, text: Any
) -> None:
    talk = last_of(send(studio, ana, PAGE, Talk(), text, FIXED))
    content = engine.asked[0].messages[0]["content"]
    assert content == str(text).replace("\ud800", "?")
    assert like(studio, ana, talk, 1, "Like").turns[0].liked == 1  # it can be stored, too


def test_of_several_the_one_with_the_highest_score_is_shown_and_kept(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    steps = list(send(studio, ana, PAGE, Talk(), "Hello?", replace(FIXED, best_of=5)))
    asked = engine.asked
    assert len(asked) == len({ask.seed for ask in asked}) == 5
    scores = [score_of(answer_of(ask)) for ask in asked]
    best = scores.index(max(scores))
    turn = steps[-1].turns[0]
    assert turn.row is not None
    assert (turn.ask, turn.row.text, turn.row.score) == (
        asked[best],
        answer_of(asked[best]),
        max(scores),
    )
    assert min(scores) < max(scores)
    assert f"reward {max(scores):+.2f}" in steps[-1].status
    assert "the best of 5 by reward" in steps[-1].status
    # None of them is shown before all are judged.
    assert {s.turns[0].row.text for s in steps[:-1] if s.turns[0].row is not None} == {""}
    assert any("writes 5 answers" in s.status for s in steps)
    assert like(studio, ana, steps[-1], 1, "Like").turns[0].liked == 1


def test_the_best_is_refused_where_nothing_chooses_or_nothing_differs(
    studio: Studio, ana: Person, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = replace(FIXED, best_of=3, temperature=0.0)
    with pytest.raises(ConfigError, match="all answers are the same"):
        next(send(studio, ana, PAGE, Talk(), "Hello?", cold))
    monkeypatch.setattr(engine, "reward_adapter", lambda: None)
    with pytest.raises(ConfigError, match=r"Best of 3 is chosen by a reward adapter, and no run"):
        next(send(studio, ana, PAGE, Talk(), "Hello?", replace(FIXED, best_of=3)))
    assert engine.asked == []


@pytest.mark.parametrize("sent", [0, 10, -1, 2.5, "many", True, [3], math.nan, math.inf, 1e400])
def test_no_other_number_of_answers_is_taken(sent: Any) -> None:
    with pytest.raises(ConfigError, match=r"Best of is|must be numbers"):
        controls_of("p", 1, 1, 16, None, sent)


def test_best_of_is_a_whole_number_or_one() -> None:
    assert [controls_of("p", 1, 1, 16, None, n).best_of for n in (None, "", 1, "9", 4.0)] == [
        1,
        1,
        1,
        9,
        4,
    ]


# -- failing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["send", "retry", "edit"])
def test_an_error_leaves_the_dialogue_as_it_was_and_gives_the_question_back(
    studio: Studio, ana: Person, say: Callable[..., Talk], engine: ScriptedEngine, act: str
) -> None:
    talk = say(say(Talk(), "One?"), "Two?")
    engine.errors.append(Busy("Too many."))
    steps = {
        "send": lambda: send(studio, ana, PAGE, talk, "Three?", FIXED),
        "retry": lambda: retry(studio, ana, PAGE, talk, 1, FIXED),
        "edit": lambda: edit(studio, ana, PAGE, talk, 0, "Three?", FIXED),
    }[act]()
    seen: list[Talk] = []
    with pytest.raises(Busy, match="Too many"):
        seen.extend(steps)
    assert seen[-1].turns == talk.turns  # the later turns too, which a retry would drop
    assert seen[-1].unsent == ("One?" if act == "retry" else "Three?")
    # And nothing is left behind that would make the next one fail.
    assert len(say(seen[-1], "Four?").turns) == 3


def test_an_error_while_it_streams_does_the_same(studio: Studio, ana: Person) -> None:
    class Breaks(ScriptedEngine):
        def stream(self, asks: Any, **rest: Any) -> Any:
            items = super().stream(asks, **rest)
            yield next(items)
            raise UserError("No memory is left.")

    studio.engine = Breaks()
    seen: list[Talk] = []
    with pytest.raises(UserError, match="No memory"):
        seen.extend(send(studio, ana, PAGE, Talk(), "Hello?", FIXED))
    assert seen[-1].turns == ()
    assert seen[-1].unsent == "Hello?"
    assert studio.stop("ana", f"chat/{PAGE}") is False  # the job is over


def test_unknown_adapters_are_refused(studio: Studio, ana: Person) -> None:
    for forged in ("", "quick/reward", "../policy", "['quick/policy']"):
        controls = Controls(forged, 1.0, 1.0, 16, None)
        with pytest.raises(ConfigError, match="No adapter"):
            list(send(studio, ana, PAGE, Talk(), "Hello?", controls))


# -- stopping -----------------------------------------------------------------------------------


def test_stop_ends_the_answer_and_marks_it(
    studio: Studio, ana: Person, engine: ScriptedEngine
) -> None:
    steps = send(studio, ana, PAGE, Talk(), "Hello?", FIXED)
    for _ in range(4):
        next(steps)
    assert studio.stop("ana", f"chat/{PAGE}") is True
    talk = last_of(steps)
    row = talk.turns[0].row
    assert row is not None
    assert row.finish == "stopped"
    assert 0 < len(row.text) < len(answer_of(engine.asked[0]))
    assert roles(talk)[1][1] == f"{row.text} *(stopped)*"
    assert "stopped" in talk.status
    # What there is of it is part of the dialogue.
    last_of(send(studio, ana, PAGE, talk, "Go on.", FIXED))
    assert engine.asked[1].messages[1]["content"] == row.text


def test_nobody_stops_anothers_answer_nor_another_page_or_tab(studio: Studio, ana: Person) -> None:
    steps = send(studio, ana, PAGE, Talk(), "Hello?", FIXED)
    next(steps)
    next(steps)
    for who, where in (
        ("ben", f"chat/{PAGE}"),
        ("ana", "chat/other"),
        ("ana", f"compare/{PAGE}"),
        ("ana/chat", PAGE),
    ):
        assert studio.stop(who, where) is False
    row = last_of(steps).turns[0].row
    assert row is not None
    assert row.finish == "eos"


def test_asking_again_on_the_page_ends_the_first(studio: Studio, ana: Person) -> None:
    first = send(studio, ana, PAGE, Talk(), "One?", FIXED)
    elsewhere = send(studio, ana, "other page", Talk(), "One?", FIXED)
    for steps in (first, elsewhere):
        next(steps)
        next(steps)
    second = send(studio, ana, PAGE, Talk(), "Two?", FIXED)
    next(second)
    next(second)
    finishes = [last_of(s).turns[0].row.finish for s in (first, second, elsewhere)]  # type: ignore[union-attr]
    assert finishes == ["stopped", "eos", "eos"]


def test_a_closed_tab_closes_the_stream(studio: Studio, ana: Person) -> None:
    closed = []

    class Notes(ScriptedEngine):
        def stream(self, asks: Any, **rest: Any) -> Any:
            try:
                yield from super().stream(asks, **rest)
            except GeneratorExit:
                closed.append(rest["cancel"])
                raise

    studio.engine = Notes()
    steps = send(studio, ana, PAGE, Talk(), "Hello?", FIXED)
    next(steps)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert len(closed) == 1
    assert closed[0].is_set()
    assert studio.stop("ana", f"chat/{PAGE}") is False


# -- retry, edit, undo --------------------------------------------------------------------------


def test_retry_draws_another_answer_also_with_a_fixed_seed(
    studio: Studio, ana: Person, say: Callable[..., Talk], engine: ScriptedEngine
) -> None:
    talk = say(Talk(), "One?")
    texts = [talk.turns[0].row.text]  # type: ignore[union-attr]
    for _ in range(3):
        talk = last_of(retry(studio, ana, PAGE, talk, 1, FIXED))
        texts.append(talk.turns[0].row.text)  # type: ignore[union-attr]
    assert len(set(texts)) == 4
    assert len({ask.seed for ask in engine.asked}) == 4
    assert len(talk.turns) == 1
    # The same from the beginning gives the same.
    again = say(Talk(), "One?")
    assert again.turns[0].row.text == texts[0]  # type: ignore[union-attr]


def test_turns_of_one_dialogue_have_different_seeds(
    say: Callable[..., Talk], engine: ScriptedEngine
) -> None:
    say(say(Talk(), "One?"), "One?")
    assert engine.asked[0].seed != engine.asked[1].seed


def test_without_a_seed_each_answer_is_another(
    say: Callable[..., Talk], engine: ScriptedEngine
) -> None:
    free = Controls(POLICY, 1.0, 1.0, 16, None)
    for _ in range(5):
        say(Talk(), "One?", free)
    assert len({ask.seed for ask in engine.asked}) == 5
    assert all(0 <= ask.seed < 2**31 for ask in engine.asked)


@pytest.mark.parametrize("seed", [-1, -(2**70), 2**31, 2**70, 0])
def test_any_whole_seed_becomes_one_the_engine_takes(
    say: Callable[..., Talk], engine: ScriptedEngine, seed: int
) -> None:
    say(Talk(), "One?", Controls(POLICY, 1.0, 1.0, 16, seed))
    assert 0 <= engine.asked[0].seed < 2**31


def test_retry_and_edit_drop_the_later_turns(
    studio: Studio, ana: Person, say: Callable[..., Talk], engine: ScriptedEngine
) -> None:
    talk = say(say(say(Talk(), "One?"), "Two?"), "Three?")
    again = last_of(retry(studio, ana, PAGE, talk, 3, FIXED))
    assert [t.text for t in again.turns] == ["One?", "Two?"]
    changed = last_of(edit(studio, ana, PAGE, talk, 2, "Second?", FIXED))
    assert [t.text for t in changed.turns] == ["One?", "Second?"]
    assert engine.asked[-1].messages[-1]["content"] == "Second?"
    assert len(engine.asked[-1].messages) == 3
    with pytest.raises(ConfigError, match="Type a message"):
        list(edit(studio, ana, PAGE, talk, 2, " ", FIXED))


def test_undo_gives_the_question_back(say: Callable[..., Talk]) -> None:
    talk = say(say(Talk(), "One?"), "Two?")
    shorter, text = undo(talk, 3)
    assert (len(shorter.turns), text) == (1, "Two?")
    assert undo(talk, 0) == (Talk(), "One?")


FORGED_INDICES: list[Any] = [-1, 4, 10**30, None, True, False, "0", 1.0, math.nan, {}, [], [None]]


def answered(text: str) -> Turn:
    return Turn(text, Ask(POLICY, ()), Row(POLICY, f"{text} Yes.", 2, "eos"))


@pytest.mark.parametrize("index", FORGED_INDICES, ids=repr)
def test_a_made_up_index_is_the_last_turn(index: Any) -> None:
    assert turn_of(Talk((answered("One?"), answered("Two?"))), index) == 1


def test_an_index_is_of_a_shown_message() -> None:
    unanswered = Talk((Turn("Zero?"), answered("One?"), answered("Two?")))
    assert [turn_of(unanswered, i) for i in range(5)] == [0, 1, 1, 2, 2]
    assert [turn_of(unanswered, [i, 0]) for i in range(5)] == [0, 1, 1, 2, 2]
    assert len(unanswered.display()) == len(unanswered.feedback()) == 5


@pytest.mark.parametrize("index", [0, None, -1])
def test_an_empty_dialogue_has_no_turn(studio: Studio, ana: Person, index: Any) -> None:
    with pytest.raises(ConfigError, match="nothing said"):
        undo(Talk(), index)
    with pytest.raises(ConfigError, match="nothing said"):
        list(retry(studio, ana, PAGE, Talk(), index, FIXED))
    with pytest.raises(ConfigError, match="nothing said"):
        like(studio, ana, Talk(), index, "Like")


# -- likes --------------------------------------------------------------------------------------


def live(studio: Studio) -> list[int | None]:
    return [j.judgement.strength for j in studio.store.judged()]


def test_a_like_is_stored_with_what_was_shown(
    studio: Studio, ana: Person, say: Callable[..., Talk]
) -> None:
    talk = say(say(Talk(), "One?"), "Two?")
    liked = like(studio, ana, talk, 3, "Like")
    (found,) = studio.store.judged()
    assert found.task.mode == "chat"
    assert found.task.prompt == (*talk.messages_before(1), {"role": "user", "content": "Two?"})
    assert found.task.responses[0].text == talk.turns[1].row.text  # type: ignore[union-attr]
    assert (found.judgement.type, found.judgement.strength) == ("like", 1)
    assert (found.judgement.blind, found.judgement.scores_visible) == (False, True)
    assert liked.feedback() == [None, None, None, "Like"]


def test_dislike_and_taking_back(studio: Studio, ana: Person, say: Callable[..., Talk]) -> None:
    talk = say(Talk(), "One?")
    for value, strength, shown in (
        ("Like", [1], "Like"),
        ("Dislike", [-1], "Dislike"),
        ("Like", [1], "Like"),
        (None, [], None),
        ("", [], None),
        ("Dislike", [-1], "Dislike"),
    ):
        talk = like(studio, ana, talk, 1, value)
        assert live(studio) == strength
        assert talk.feedback()[1] == shown
    assert studio.store.counts()["tasks"] == 1  # one answer is one task


@pytest.mark.parametrize("value", [True, 1, ["Like"], {"Like": 1}, "like", "Best", b"Like"])
def test_a_made_up_value_is_no_like(
    studio: Studio, ana: Person, say: Callable[..., Talk], value: Any
) -> None:
    talk = like(studio, ana, say(Talk(), "One?"), 1, value)
    assert talk.feedback() == [None, None]
    assert studio.store.counts()["judgements"] == 0


def test_a_like_sent_twice_from_a_page_that_has_not_heard_of_it_is_one(
    studio: Studio, ana: Person, say: Callable[..., Talk]
) -> None:
    talk = say(Talk(), "One?")
    for _ in range(3):
        like(studio, ana, talk, 1, "Like")  # the page keeps its old dialogue
    assert live(studio) == [1]
    assert studio.store.counts()["judgements"] == studio.store.counts()["tasks"] == 1
    like(studio, ana, talk, 1, "Dislike")
    assert live(studio) == [-1]


def test_each_drawn_answer_is_liked_by_itself(
    studio: Studio, ana: Person, say: Callable[..., Talk]
) -> None:
    talk = like(studio, ana, say(Talk(), "One?"), 1, "Dislike")
    again = last_of(retry(studio, ana, PAGE, talk, 1, FIXED))
    assert again.feedback() == [None, None]
    like(studio, ana, again, 1, "Like")
    assert sorted(map(str, live(studio))) == ["-1", "1"]


@pytest.mark.parametrize("finish", ["stopped", "error"])
def test_an_unfinished_answer_cannot_be_liked(
    studio: Studio, ana: Person, say: Callable[..., Talk], engine: ScriptedEngine, finish: Any
) -> None:
    engine.finish = finish
    talk = say(Talk(), "One?")
    with pytest.raises(ConfigError, match="whole answer"):
        like(studio, ana, talk, 1, "Like")
    unanswered = Talk((Turn("One?"), Turn("Two?", Ask(POLICY, ()), Row(POLICY))))
    for index in (0, 1):
        with pytest.raises(ConfigError, match="whole answer"):
            like(studio, ana, unanswered, index, "Like")
    assert studio.store.counts()["tasks"] == 0


# -- the panel ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        ("p", "warm", 1, 16, None),
        ("p", None, 1, 16, None),
        ("p", [1], 1, 16, None),
        ("p", {}, 1, 16, None),
        ("p", 1, "x", 16, None),
        ("p", 1, 1, "many", None),
        ("p", 1, 1, None, None),
        ("p", 1, 1, math.inf, None),
        ("p", 1, 1, math.nan, None),
        ("p", 1, 1, 16, math.inf),
        ("p", 1, 1, 16, math.nan),
        ("p", 1, 1, 16, "x"),
        ("p", 1, 1, 16, []),
        ("p", True, 1, 16, None),
        ("p", 1, True, 16, None),
        ("p", 1, 1, True, None),
        ("p", 1, 1, 16, False),
        ("p", 10**400, 1, 16, None),
        ("p", 1, 1, "9" * 5000, None),
    ],
    ids=lambda sent: repr(sent)[:40],
)
def test_what_is_no_number_is_refused(sent: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="must be numbers") as refused:
        controls_of(*sent)
    assert len(str(refused.value)) < 200


def test_numbers_are_taken_as_they_come() -> None:
    assert controls_of("p", "0.5", 1, "16", "") == Controls("p", 0.5, 1.0, 16, None)
    assert controls_of("p", 0, 0.9, 16.0, 3) == Controls("p", 0.0, 0.9, 16, 3)
    assert controls_of(["p"], 1, 1, 1, None).adapter == "['p']"  # which no engine knows


def test_the_page_is_sent_the_dialogue_and_an_empty_or_unchanged_box(
    say: Callable[..., Talk],
) -> None:
    talk = say(Talk(), "<b>One?</b>")
    state, chatbot, status, box = _updates(talk, "")
    assert state is talk
    assert [m["role"] for m in talk.display()] == ["user", "assistant"]
    assert box == ""
    assert "reward" in status
    assert _updates(talk)[3] == {"__type__": "update"}  # what is being typed stays
    hostile = Talk(status="<img src=x onerror=alert(1)>")
    assert "<img" not in _updates(hostile)[2]
    assert chatbot is not None
