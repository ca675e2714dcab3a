"""Answers become tasks, and what a browser sends becomes one judgement, whatever it sends."""

import json
import threading
from collections import Counter
from typing import Any

import pytest

from lora_rlhf.data.records import prompt_key, user
from lora_rlhf.errors import EventRefused, UserError
from lora_rlhf.preferences.events import FLAGS, Judgement, Sampler, Task
from lora_rlhf.preferences.ratings import counts_for_win_rate
from ui.asking import Ask, Row
from ui.people import Person
from ui.studio import Studio
from ui.tasks import (
    Client,
    JudgedAlready,
    Refused,
    again,
    as_shown,
    judge,
    make_task,
    own_task,
    rids_of,
    standing,
    take_back,
)

PROMPT = user("Why is the sky blue?")
NESTED = "[" * 100_000


def answers(count: int, finish: Any = "eos") -> tuple[list[Ask], list[Row]]:
    names = ["quick/policy", "quick/sft"]
    asks = [Ask(names[i % 2], PROMPT, 0.7, 0.9, 16, seed=i) for i in range(count)]
    rows = [
        Row(a.adapter, f"answer {i}", 3 + i, finish, float(i), 0.5, -9.0, "quick/reward")
        for i, a in enumerate(asks)
    ]
    return asks, rows


def a_task(studio: Studio, person: Person, count: int = 2, finish: Any = "eos") -> Task:
    mode = {1: "chat", 2: "pair"}.get(count, "rank")
    asks, rows = answers(count, finish)
    return make_task(studio, person, mode, asks, rows, blind=count > 1)  # type: ignore[arg-type]


def best_first(task: Task) -> tuple[tuple[str, ...], ...]:
    return tuple((r.rid,) for r in as_shown(task))


def decided(studio: Studio, person: Person, task: Task, **more: Any) -> Judgement:
    ranking = more.pop("ranking", best_first(task))
    return judge(studio, person, task, ranking=ranking, outcome="decided", **more)


# -- tasks --------------------------------------------------------------------------------------


def test_a_task_records_what_was_asked_and_answered(studio: Studio, ana: Person) -> None:
    asks, rows = answers(2)
    made = make_task(studio, ana, "pair", asks, rows, source="pool:heldout#7", blind=True)
    task = studio.store.task(made.task_id)
    assert task == made
    assert (task.annotator, task.prompt, task.prompt_source) == ("ana", PROMPT, "pool:heldout#7")
    assert task.prompt_sha256 == prompt_key(PROMPT)
    assert task.backbone == {"name": "fake", "revision": None, "quant": "nf4"}
    assert task.sampler == Sampler()
    for ask, row, response in zip(asks, rows, task.responses, strict=True):
        assert (response.adapter, response.adapter_sha256) == (
            ask.adapter,
            ask.adapter.rpartition("/")[2] * 8,  # as the fake has it
        )
        assert (response.text, response.n_tokens, response.seed) == (
            row.text,
            row.n_tokens,
            ask.seed,
        )
        assert response.sampling is not None
        assert response.sampling.model_dump() == {
            "temperature": 0.7,
            "top_p": 0.9,
            "max_new_tokens": 16,
        }
        assert (response.rm_adapter, response.rm_score) == ("quick/reward", row.score)
        assert (response.kl_to_ref, response.logprob) == (0.5, -9.0)


def test_a_pair_keeps_the_sides_it_streamed_on(studio: Studio, ana: Person) -> None:
    for _ in range(20):  # a shuffle would leave 20 pairs as they are in 1 of a million runs
        assert [r.rid for r in as_shown(a_task(studio, ana, 2))] == ["r0", "r1"]


def test_a_ranking_is_laid_out_in_every_order_alike(studio: Studio, ana: Person) -> None:
    """Places of the first answer over 120 tasks: each of three about a third, by chi-square."""

    def chi_square(places: Counter[int], size: int) -> float:
        expected = places.total() / size
        return sum((places[p] - expected) ** 2 / expected for p in range(size))

    places = Counter(a_task(studio, ana, 3).response("r0").pos for _ in range(120))
    assert chi_square(places, 3) < 23.0  # of 2 degrees of freedom, exceeded in 1 of 100,000 runs
    assert chi_square(Counter({0: 120}), 3) > 23.0  # tasks laid out as they were made


def test_the_same_id_is_the_same_task(studio: Studio, ana: Person) -> None:
    asks, rows = answers(1)
    for _ in range(2):
        make_task(studio, ana, "chat", asks, rows, blind=False, task_id="one")
    assert studio.store.counts()["tasks"] == 1


@pytest.mark.parametrize("finish", ["stopped", "error"])
def test_unfinished_answers_take_no_vote_but_a_skip(
    studio: Studio, ana: Person, finish: str
) -> None:
    task = a_task(studio, ana, 2, finish)
    assert task.unfinished == {finish}
    for outcome in ("tie", "both_bad", "decided"):
        ranking = best_first(task) if outcome == "decided" else (tuple(sorted(task.rids)),)
        with pytest.raises(EventRefused, match="not finished"):
            judge(studio, ana, task, ranking=ranking, outcome=outcome)  # type: ignore[arg-type]
    assert studio.store.counts()["judgements"] == 0
    judge(studio, ana, task, outcome="skip")
    assert studio.store.counts()["judgements"] == 1


@pytest.mark.parametrize("finish", ["eos", "length"])
def test_whole_answers_do(studio: Studio, ana: Person, finish: str) -> None:
    task = a_task(studio, ana, 2, finish)
    assert not task.unfinished
    decided(studio, ana, task)


# -- whose task ---------------------------------------------------------------------------------


MADE_UP: list[Any] = [None, "", "unknown", 7, 7.0, True, [], ["x"], {}, {"task_id": "x"}, b"x"]
MADE_UP += ["\x00", "x" * 10**6, "' OR 1=1 --", "../../etc/passwd"]


def test_a_made_up_task_is_no_task(studio: Studio, ana: Person) -> None:
    a_task(studio, ana)
    for forged in MADE_UP:
        with pytest.raises(Refused, match="nothing to vote on"):
            own_task(studio, ana, forged, "pair")


def test_a_task_is_its_owners_alone_and_of_its_mode(
    studio: Studio, ana: Person, ben: Person
) -> None:
    pair, rank, chat = (a_task(studio, ana, count) for count in (2, 4, 1))
    assert own_task(studio, ana, pair.task_id, "pair") == pair
    assert own_task(studio, ana, rank.task_id, "rank") == rank
    for task in (pair, rank, chat):
        with pytest.raises(Refused, match="nothing to vote on"):
            own_task(studio, ben, task.task_id, task.mode)
    for task, mode in ((pair, "rank"), (rank, "pair"), (chat, "pair")):
        with pytest.raises(Refused, match="nothing to vote on"):
            own_task(studio, ana, task.task_id, mode)  # type: ignore[arg-type]
    # The id of a judgement is no task's.
    vote = decided(studio, ana, pair)
    with pytest.raises(Refused, match="nothing to vote on"):
        own_task(studio, ana, vote.id, "pair")


def test_nobody_judges_anothers_task_even_past_the_handlers(
    studio: Studio, ana: Person, ben: Person
) -> None:
    task = a_task(studio, ana)
    with pytest.raises(EventRefused, match="somebody else"):
        decided(studio, ben, task)
    decided(studio, ana, task)
    with pytest.raises(EventRefused, match="no judgement"):
        take_back(studio, ben, studio.judged()[0].judgement.id)
    assert studio.store.counts()["live"] == 1


# -- one vote a task ----------------------------------------------------------------------------


def test_a_vote_sent_twice_is_one_and_says_the_same(studio: Studio, ana: Person) -> None:
    task = a_task(studio, ana)
    first, second = decided(studio, ana, task), decided(studio, ana, task)
    assert second == first  # what is stored, not what was sent again
    assert studio.store.counts()["judgements"] == 1


@pytest.mark.parametrize("other", ["order", "strength", "tie", "skip", "flags"])
def test_another_vote_on_it_is_refused_and_the_first_stands(
    studio: Studio, ana: Person, other: str
) -> None:
    task = a_task(studio, ana)
    first = decided(studio, ana, task)
    ranking = best_first(task)
    said: dict[str, dict[str, Any]] = {
        "order": {"ranking": ranking[::-1], "outcome": "decided"},
        "strength": {"ranking": ranking, "outcome": "decided", "strength": 2},
        "tie": {"ranking": (tuple(sorted(task.rids)),), "outcome": "tie"},
        "skip": {"outcome": "skip"},
        "flags": {"ranking": ranking, "outcome": "decided", "flags": ["harmful"]},
    }
    with pytest.raises(JudgedAlready, match="stands"):
        judge(studio, ana, task, **said[other])
    assert [j.judgement for j in studio.judged()] == [first]


@pytest.mark.parametrize("alike", [True, False])
def test_two_threads_at_once_leave_one_row(studio: Studio, ana: Person, alike: bool) -> None:
    for _ in range(10):
        task = a_task(studio, ana)
        ranking, start = best_first(task), threading.Barrier(2)
        stored: list[Judgement] = []
        refused: list[UserError] = []

        def vote(
            order: Any,
            task: Task = task,
            start: Any = start,
            stored: Any = stored,
            refused: Any = refused,
        ) -> None:
            start.wait(20)
            try:
                stored.append(decided(studio, ana, task, ranking=order))
            except JudgedAlready as error:
                refused.append(error)

        orders = [ranking, ranking if alike else ranking[::-1]]
        threads = [threading.Thread(target=vote, args=(order,)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        rows = [j.judgement for j in studio.judged() if j.task.task_id == task.task_id]
        assert len(rows) == 1
        assert [s.ranking for s in stored] == [rows[0].ranking] * (2 if alike else 1)
        assert len(refused) == (0 if alike else 1)


def test_after_undo_one_new_vote_with_a_new_id(studio: Studio, ana: Person) -> None:
    task = a_task(studio, ana)
    ids = []
    for _ in range(3):
        assert standing(studio, ana, task.task_id) is None
        vote = decided(studio, ana, task)
        assert standing(studio, ana, task.task_id) == vote
        assert decided(studio, ana, task).id == vote.id
        with pytest.raises(JudgedAlready):
            judge(studio, ana, task, outcome="skip")
        ids.append(vote.id)
        take_back(studio, ana, vote.id)
        with pytest.raises(EventRefused, match="taken back already"):
            take_back(studio, ana, vote.id)
    assert len(set(ids)) == 3
    assert studio.store.counts() | {"tasks": 0, "annotators": 0} == {
        "tasks": 0,
        "judgements": 3,
        "retracted": 3,
        "live": 0,
        "annotators": 0,
    }


def test_a_vote_after_undo_is_no_blind_one(studio: Studio, ana: Person, ben: Person) -> None:
    """The first one revealed names and scores; an old one must not pass for it either."""
    task, others = a_task(studio, ana), a_task(studio, ben)
    first = decided(studio, ana, task)
    assert (first.blind, first.scores_visible) == (True, False)
    assert counts_for_win_rate(studio.judged()[-1])
    take_back(studio, ana, first.id)
    second = decided(studio, ana, task)
    assert (second.blind, second.scores_visible) == (False, True)
    assert not counts_for_win_rate(studio.judged()[-1])
    assert decided(studio, ben, others).blind  # of other tasks nothing was revealed


def test_votes_of_two_people_have_different_ids(studio: Studio, ana: Person, ben: Person) -> None:
    task = a_task(studio, ana)
    shared = task.model_copy(update={"task_id": "shared", "annotator": None})
    studio.store.add(shared)
    assert decided(studio, ana, shared).id != decided(studio, ben, shared).id


# -- letters ------------------------------------------------------------------------------------


def test_letters_are_answers_by_their_place(studio: Studio, ana: Person) -> None:
    task = a_task(studio, ana, 4)
    by_place = {r.pos: r.rid for r in task.responses}
    found = rids_of(task, [["C"], ["A", "D"], ["B"]])
    assert found == ((by_place[2],), (by_place[0], by_place[3]), (by_place[1],))


FORGED: list[Any] = [
    None,
    "ABCD",
    {},
    [],
    [[]],
    ["A", "B", "C", "D"],
    [["A"], ["B"], ["C"]],
    [["A"], ["B"], ["C"], ["D"], ["E"]],
    [["A"], ["B"], ["C"], ["C"]],
    [["A", "A"], ["B"], ["C"], ["D"]],
    [["a"], ["b"], ["c"], ["d"]],
    [["A"], ["B"], ["C"], ["D"], []],
    [[0], [1], [2], [3]],
    [["A"], ["B"], ["C"], [None]],
    [["A"], ["B"], ["C"], [["D"]]],
    [["A"], ["B"], ["C"], [{"D": 1}]],
    [["A"], ["B"], ["C"], ["r3"]],
    [["A"], ["B"], ["C"], ["D "]],
    [["A", "B"], "CD"],
    (("A",), ("B",), ("C",), ("D",)),
    [["A"] * 10_000],
]


def test_forged_letters_are_refused(studio: Studio, ana: Person) -> None:
    task = a_task(studio, ana, 4)
    for letters in FORGED:
        with pytest.raises(Refused, match="Rank again"):
            rids_of(task, letters)


# -- flags, notes, facts of the client ----------------------------------------------------------


def test_forged_flags_are_refused_and_nothing_is_stored(studio: Studio, ana: Person) -> None:
    task = a_task(studio, ana)
    forged: list[Any] = ["nice", "", "Harmful", None, 7, ["harmful"], {}, "x" * 10**6]
    for flag in forged:
        with pytest.raises(Refused, match="is no flag") as refused:
            decided(studio, ana, task, flags=["harmful", flag])
        assert len(str(refused.value)) < 500
    assert studio.store.counts()["judgements"] == 0


def test_flags_are_stored_once_each(studio: Studio, ana: Person) -> None:
    many = [*FLAGS, *FLAGS] * 1000
    assert decided(studio, ana, a_task(studio, ana), flags=many).flags == FLAGS


def test_notes_are_text_of_bounded_length(studio: Studio, ana: Person) -> None:
    notes: list[tuple[Any, str]] = [
        (None, ""),
        ("", ""),
        ("fine", "fine"),
        ("x" * 10**6, "x" * 2000),
        ("half a letter \ud800", "half a letter ?"),
        (["a"], "['a']"),
        ({"a": 1}, "{'a': 1}"),
        (7, "7"),
    ]
    for sent, kept in notes:
        vote = decided(studio, ana, a_task(studio, ana), note=sent)
        stored = studio.store.judgement(vote.id)
        assert stored is not None
        assert stored.note == kept


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"ms": 1200, "keys": 3, "device": "mobile"}, Client(1200, 3, "mobile")),
        ('{"ms": 1200.9, "keys": 3, "device": "desktop"}', Client(1200, 3, "desktop")),
        ({"ms": 0, "keys": 0}, Client(0, 0)),
        ({"ms": -1, "keys": -1, "device": "toaster"}, Client()),
        ({"ms": 86_400_000, "keys": 10_000}, Client(86_400_000, 10_000)),
        ({"ms": 86_400_001, "keys": 10_001}, Client()),
        ({"ms": True, "keys": False, "device": True}, Client()),
        ({"ms": float("nan"), "keys": float("inf"), "device": []}, Client()),
        ({"ms": 10**400, "keys": -(10**400), "device": {}}, Client()),
        ({"ms": "1200", "keys": [3], "device": None}, Client()),
        ('{"ms": NaN, "keys": Infinity}', Client()),
        ("{", Client()),
        (NESTED, Client()),
        ("[1]", Client()),
        ("null", Client()),
        (None, Client()),
        (7, Client()),
        ([], Client()),
        (b"{}", Client()),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_a_client_says_is_kept_where_it_fits(sent: Any, kept: Client) -> None:
    assert Client.parse(sent) == kept


def test_what_is_kept_of_the_client_is_stored_and_times_are_the_servers(
    studio: Studio, ana: Person
) -> None:
    task = a_task(studio, ana)
    vote = decided(studio, ana, task, client=Client(1200, 3, "mobile"))
    assert (vote.client_ms, vote.keys, vote.device) == (1200, 3, "mobile")
    assert vote.shown_ts == task.ts <= vote.done_ts
    assert vote.server_ms is not None
    assert abs(vote.server_ms - 1000 * (vote.done_ts - task.ts)) <= 1
    assert (vote.annotator, vote.session) == ("ana", ana.session)


# -- again --------------------------------------------------------------------------------------


def test_a_repeat_is_the_same_answers_in_another_order(
    studio: Studio, ana: Person, ben: Person
) -> None:
    pair = a_task(studio, ana, 2)
    first = a_task(studio, ana, 4)
    for _ in range(20):
        swapped = again(studio, ben, pair)
        assert [r.rid for r in as_shown(swapped)] == [r.rid for r in as_shown(pair)][::-1]
        copy = again(studio, ben, first)
        assert [r.rid for r in as_shown(copy)] != [r.rid for r in as_shown(first)]
        assert {r.rid: r.text for r in copy.responses} == {r.rid: r.text for r in first.responses}
        assert (copy.annotator, copy.repeat_of) == ("ben", first.task_id)
        assert copy.sampler.strategy == "repeat"
        assert studio.store.task(copy.task_id) == copy
    # A repeat of a repeat is one of the first, so that all can be found together.
    assert again(studio, ana, copy).repeat_of == first.task_id


def test_a_repeat_never_enters_the_win_rate(studio: Studio, ana: Person, ben: Person) -> None:
    first = a_task(studio, ana, 2)
    decided(studio, ana, first)
    decided(studio, ben, again(studio, ben, first))
    assert [counts_for_win_rate(j) for j in studio.judged()] == [True, False]


# -- the studio's cache of judgements -----------------------------------------------------------


def test_the_cache_of_judgements_is_the_store_after_every_event(
    studio: Studio, ana: Person, ben: Person
) -> None:
    def same() -> bool:
        return studio.judged() == studio.store.judged()

    assert same()
    tasks = [a_task(studio, person) for person in (ana, ben, ana, ben)]
    votes = []
    for task in tasks:
        person = ana if task.annotator == "ana" else ben
        votes.append(decided(studio, person, task))
        assert same()
    take_back(studio, ana, votes[0].id)  # an old one goes
    assert same()
    assert len(studio.judged()) == 3
    decided(studio, ana, tasks[0])
    take_back(studio, ben, votes[1].id)  # one came and one went, unread in between
    decided(studio, ben, tasks[1])
    assert same()
    studio.store.erase("ana")
    assert same()
    assert [j.judgement.annotator for j in studio.judged()] == ["ben", "ben"]
    assert [len(studio.judged_by(who, "pair")) for who in ("ana", "ben", "cyd")] == [0, 2, 0]
    assert studio.judged_by("ben", "rank") == []


def test_what_is_known_is_not_read_again(studio: Studio, ana: Person) -> None:
    for _ in range(3):
        decided(studio, ana, a_task(studio, ana))
    before = studio.judged()
    decided(studio, ana, a_task(studio, ana))
    after = studio.judged()
    assert [id(j) for j in after[:3]] == [id(j) for j in before]
    assert len(after) == 4


def test_a_prompt_is_seen_while_it_is_open_and_once_it_is_judged(
    studio: Studio, ana: Person, ben: Person
) -> None:
    key = prompt_key(PROMPT)
    assert studio.seen("ana", "pair") == set()
    task = a_task(studio, ana)
    assert studio.seen("ana", "pair") == {key}
    assert studio.seen("ben", "pair") == set()
    judge(studio, ana, task, outcome="skip")
    assert studio.seen("ana", "pair") == {key}
    assert studio.seen("ana", "rank") == {key}  # judged once, in whatever tab


def test_client_facts_come_as_json_of_the_page() -> None:
    sent = json.dumps({"ms": 18400, "keys": 6, "device": "desktop"})
    assert Client.parse(sent) == Client(18400, 6, "desktop")
