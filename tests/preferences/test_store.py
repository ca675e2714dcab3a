"""The store on both databases: what it takes, what it refuses, what it gives back."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from lora_rlhf.errors import EventRefused, PreferenceError, UserError
from lora_rlhf.preferences.events import Erase, Retract, Task
from lora_rlhf.preferences.store import Store
from tests.preferences.making import like, skip, task, vote

HARD = "NUL \x00, quote ', \" and \\, é, 你好, \U0001f984, \u2028, ${x} <script>%s :name"


def outside(location: str):
    """A connection that knows nothing of the store's code."""
    url = location.replace("postgresql://", "postgresql+psycopg://")
    return create_engine(url if "://" in url else f"sqlite:///{url}")


def test_what_was_stored_comes_back_as_it_was(location):
    shown = task([{"text": HARD}, {"text": HARD[::-1]}], prompt=HARD, annotator="ana é")
    judgement = vote(shown, note=HARD, flags=("unsafe", "fast"))
    with Store.open(location) as store:
        assert store.add(shown)
        assert store.add(judgement)
    with Store.open(location) as again:
        assert again.task(shown.id) == shown
        assert again.judgement(judgement.id) == judgement
        (found,) = again.judged()
    assert (found.task, found.judgement, found.retracted) == (shown, judgement, False)


def test_ids_make_adding_idempotent(store):
    shown = task()
    judgement = vote(shown)
    assert [store.add(shown), store.add(shown)] == [True, False]
    assert [store.add(judgement), store.add(judgement)] == [True, False]
    other = judgement.model_copy(update={"ranking": (("r0",), ("r1",)), "ts": 5.0})
    assert not store.add(other), "the first of one id stands"
    assert store.judgement(judgement.id) == judgement
    back = Retract(ref=judgement.id, annotator="ana")
    assert [store.add(back), store.add(back)] == [True, False]
    assert not store.add(judgement), "sending a vote again does not undo the undo"
    assert store.judged() == []
    assert store.version() == 3
    assert store.counts() == {
        "tasks": 1,
        "judgements": 1,
        "retracted": 1,
        "live": 0,
        "annotators": 0,
    }


def test_an_id_of_another_event_is_refused(store):
    first, second = task(), task()
    mine = vote(first)
    for event in (first, second, mine):
        store.add(event)
    forged = [
        vote(second, id=mine.id),
        vote(second, id=first.id),
        Retract(id=mine.id, ref=mine.id, annotator="ana"),
        task(task_id=mine.id),
    ]
    for event in forged:
        with pytest.raises(EventRefused, match="another event"):
            store.add(event)
    assert store.version() == 3


REFUSED = {
    "no answer named": lambda t: vote(t, ranking=(), outcome="decided"),
    "one answer left out": lambda t: vote(t, ("r0",), ("r1",), ("r2",)),
    "an answer twice": lambda t: vote(t, ("r0", "r0"), ("r1",), ("r2",), ("r3",)),
    "a stranger": lambda t: vote(t, ("r0",), ("r1",), ("r2",), ("r9",)),
    "an empty group": lambda t: vote(t, ("r0",), (), ("r1",), ("r2",), ("r3",)),
    "decided, but all tie": lambda t: vote(t, ("r0", "r1", "r2", "r3"), outcome="decided"),
    "a tie with an order": lambda t: vote(t, ("r0", "r1"), ("r2", "r3"), outcome="tie"),
    "all bad with an order": lambda t: vote(t, ("r0",), ("r1", "r2", "r3"), outcome="both_bad"),
    "a skip with a ranking": lambda t: vote(t, ("r0", "r1", "r2", "r3"), outcome="skip"),
    "a pair of four": lambda t: vote(t, ("r0",), ("r1", "r2", "r3"), type="pair"),
    "a like of four": lambda t: vote(t, ("r0", "r1", "r2", "r3"), type="like", strength=1),
    "much better than three": lambda t: vote(t, ("r0",), ("r1", "r2", "r3"), strength=2),
    "by somebody else": lambda t: vote(t, ("r0",), ("r1", "r2", "r3"), annotator="bob"),
    "of no task": lambda t: vote(t, ("r0",), ("r1", "r2", "r3"), task_id="none"),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_a_judgement_that_does_not_fit_is_refused_in_a_sentence(store, make):
    shown = task(4)
    store.add(shown)
    with pytest.raises(EventRefused) as refused:
        store.add(make(shown))
    assert str(refused.value).endswith(".")
    assert isinstance(refused.value, UserError)
    assert store.version() == 1
    assert store.add(vote(shown, ("r0", "r3"), ("r1",), ("r2",))), "and one that fits is taken"


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"strength": 1}, True),
        ({"strength": 2}, True),
        ({"strength": -1}, False),
        ({"blind": False}, True),
        ({"ranking": (("r0", "r1"),), "outcome": "tie"}, True),
        ({"ranking": (("r0", "r1"),), "outcome": "both_bad"}, True),
        ({"ranking": (("r0", "r1"),), "outcome": "tie", "strength": 2}, False),
        ({"ranking": (), "outcome": "skip"}, True),
        ({"ranking": (), "outcome": "skip", "strength": 1}, False),
    ],
)
def test_pairs(store, changes, fits):
    shown = task()
    store.add(shown)
    if fits:
        assert store.add(vote(shown, **changes))
    else:
        with pytest.raises(EventRefused):
            store.add(vote(shown, **changes))


def test_a_vote_on_shown_adapters_is_not_blind(store):
    shown = task(blind=False)
    store.add(shown)
    with pytest.raises(EventRefused, match="blind"):
        store.add(vote(shown, blind=True))
    assert store.add(vote(shown, blind=False))


def test_likes_are_judgements_of_one_answer(store):
    liked, disliked, neither = task(1), task(1), task(1)
    for shown in (liked, disliked, neither):
        store.add(shown)
    assert store.add(like(liked))
    assert store.add(like(disliked, up=False))
    with pytest.raises(EventRefused, match="strength"):
        store.add(vote(neither, ("r0",), strength=None))
    with pytest.raises(EventRefused, match="like"):
        store.add(vote(neither, ("r0",), strength=1, outcome="tie"))


@pytest.mark.parametrize("reason", ["stopped", "error"])
def test_an_unfinished_answer_can_be_skipped_and_nothing_else(store, reason):
    shown = task([{}, {"finish_reason": reason}])
    store.add(shown)
    with pytest.raises(EventRefused, match=reason):
        store.add(vote(shown))
    assert store.add(skip(shown))


def test_one_standing_judgement_a_person_and_task(store):
    shown = task(annotator=None)
    store.add(shown)
    first = vote(shown, annotator="ana")
    store.add(first)
    with pytest.raises(EventRefused, match="judged already"):
        store.add(vote(shown, annotator="ana"))
    assert store.add(vote(shown, annotator="bob")), "another person may, of a task for anyone"
    assert store.retracted(shown.id, "ana") == 0
    store.add(Retract(ref=first.id, annotator="ana"))
    assert store.retracted(shown.id, "ana") == 1
    second = vote(shown, annotator="ana")
    assert store.add(second)
    assert [j.judgement.annotator for j in store.judged()] == ["bob", "ana"]
    assert [j.retracted for j in store.judged(retracted=True)] == [True, False, False]


def test_only_ones_own_standing_judgement_can_be_taken_back(store):
    shown = task(annotator=None)
    mine = vote(shown, annotator="ana")
    store.add_many([shown, mine])
    for wrong in (
        Retract(ref=mine.id, annotator="bob"),
        Retract(ref="none", annotator="ana"),
        Retract(ref=shown.id, annotator="ana"),
    ):
        with pytest.raises(EventRefused, match="no judgement"):
            store.add(wrong)
    store.add(Retract(ref=mine.id, annotator="ana"))
    with pytest.raises(EventRefused, match="already"):
        store.add(Retract(ref=mine.id, annotator="ana"))


def test_add_many_is_all_or_none(store):
    shown = task()
    with pytest.raises(EventRefused):
        store.add_many([shown, vote(shown), vote(shown)])
    assert store.version() == 0
    assert store.task(shown.id) is None
    assert store.add_many([shown, vote(shown)]) == 2
    with pytest.raises(EventRefused):
        store.add(Erase(annotator="ana", count=1))


def test_a_repeat_has_the_answers_of_the_task_it_repeats(store):
    shown = task([{"text": "one"}, {"text": "two"}])
    store.add(shown)
    swapped = tuple(r.model_copy(update={"pos": 1 - r.pos}) for r in shown.responses)
    assert store.add(task(prompt="p", responses=swapped, repeat_of=shown.id))
    with pytest.raises(EventRefused, match="other answers"):
        store.add(task([{"text": "one"}, {"text": "three"}], repeat_of=shown.id))
    with pytest.raises(EventRefused, match="no known task"):
        store.add(task(repeat_of="none"))


def test_the_open_task_is_the_newest_without_a_standing_judgement(store):
    old, new, ranked, others = task(), task(), task(3), task(annotator="bob")
    store.add_many([old, new, ranked, others])
    assert store.open_task("ana", "pair") == new
    assert store.open_task("ana", "rank") == ranked
    assert store.open_task("ana", "chat") is None
    first = vote(new)
    store.add(first)
    assert store.open_task("ana", "pair") == old
    store.add(skip(old))
    assert store.open_task("ana", "pair") is None
    store.add(Retract(ref=first.id, annotator="ana"))
    assert store.open_task("ana", "pair") == new


def test_the_last_judgement_is_what_undo_takes(store):
    pair, ranked = task(), task(3)
    store.add_many([pair, ranked])
    assert store.last("ana") is None
    first, second = vote(pair), vote(ranked, ("r0",), ("r1", "r2"))
    store.add_many([first, second])
    assert store.last("ana").judgement == second
    assert store.last("ana", "pair").judgement == first
    assert store.last("bob") is None
    store.add(Retract(ref=second.id, annotator="ana"))
    assert store.last("ana").judgement == first


def test_judged_in_order_by_person_and_from_a_point_on(store):
    shown = [task(annotator=None) for _ in range(3)]
    store.add_many(shown)
    votes = [vote(t, annotator=who) for t, who in zip(shown, ("ana", "bob", "ana"), strict=True)]
    for each in votes:
        store.add(each)
    found = store.judged()
    assert [j.judgement for j in found] == votes
    assert [j.judgement for j in store.judged("ana")] == [votes[0], votes[2]]
    assert [j.judgement for j in store.judged(since_seq=found[0].seq)] == votes[1:]
    assert store.version() == found[-1].seq == 6
    assert store.judged_prompts("ana") == {shown[0].prompt_sha256, shown[2].prompt_sha256}
    assert store.judged_prompts("eve") == set()


# -- append-only, erasing -----------------------------------------------------------------------


def test_nothing_in_the_store_can_be_changed_or_deleted(store, location):
    shown = task()
    store.add_many([shown, vote(shown)])
    before = store.digest()
    changes = [
        "UPDATE preference_events SET annotator = 'eve'",
        "UPDATE preference_events SET body = '{}' WHERE kind = 'judgement'",
        "DELETE FROM preference_events WHERE kind = 'judgement'",
        "DELETE FROM preference_events",
    ]
    if "://" in location:
        changes.append("TRUNCATE preference_events CASCADE")
    else:
        changes.append(
            "INSERT OR REPLACE INTO preference_events (seq, id, kind, ts, body) "
            "VALUES (1, 'x', 'task', 1.0, '{}')"
        )
        changes.append(
            f"INSERT OR REPLACE INTO preference_events (id, kind, ts, body) "
            f"VALUES ('{shown.id}', 'task', 1.0, '{{}}')"
        )
    engine = outside(location)
    for change in changes:
        with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(text(change))
    engine.dispose()
    assert store.digest() == before
    assert len(store.judged()) == 1


def test_a_persons_judgements_can_be_erased_for_good(store, location, tmp_path):
    secret = "a note that nobody may find again"
    shown = task(annotator=None)
    taken_back, kept = vote(shown, annotator="bob", note=secret), vote(shown, annotator="ana")
    store.add_many([shown, taken_back, kept])
    store.add(Retract(ref=taken_back.id, annotator="bob"))
    store.add(vote(shown, annotator="bob", note=secret))
    before = store.version()
    assert store.erase("bob") == 2
    assert [j.judgement for j in store.judged(retracted=True)] == [kept]
    assert store.judgement(taken_back.id) is None
    assert store.version() == before + 1, "the trace is an event, and numbers are not used again"
    assert store.erase("bob") == 0
    assert store.version() == before + 1
    with outside(location).connect() as connection:
        rows = connection.execute(text("SELECT body FROM preference_events ORDER BY seq")).all()
    trace = Erase.model_validate_json(rows[-1].body)
    assert (trace.annotator, trace.count) == ("bob", 2)
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()
    with outside(location).connect() as connection, pytest.raises(DBAPIError, match="append-only"):
        connection.execute(text("DELETE FROM preference_events WHERE annotator = 'ana'"))


# -- copies -------------------------------------------------------------------------------------


def test_a_copy_is_one_private_file_with_the_same_events(store, tmp_path):
    shown = task([{"text": HARD}, {}])
    mine = vote(shown)
    store.add_many([shown, mine])
    store.add(Retract(ref=mine.id, annotator="ana"))
    store.erase("ana")  # leaves a gap in the numbers
    target = tmp_path / "copies" / "copy é%20?#.db"
    sha256 = store.snapshot(target)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert target.stat().st_mode & 0o777 == 0o600
    assert hashlib.sha256(target.read_bytes()).hexdigest() == sha256
    with Store.open(target, read_only=True) as copy:
        assert copy.digest() == store.digest()
        assert copy.version() == store.version() == 4
        assert copy.task(shown.id) == shown
        with pytest.raises(PreferenceError, match="for reading"):
            copy.add(task())
    assert hashlib.sha256(target.read_bytes()).hexdigest() == sha256, "reading changes no byte"
    with pytest.raises(PreferenceError, match="exists"):
        store.backup(target)
    with Store.open(target) as restored:
        assert restored.add(task()), "a copy can be the store from now on"
        assert restored.version() == 5


def test_a_copy_holds_one_state_while_votes_arrive(store, tmp_path):
    def write() -> None:
        for _ in range(15):
            shown = task()
            store.add_many([shown, vote(shown)])

    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(write), pool.submit(write)]
        number = 0
        while not all(w.done() for w in writing) and number < 8:
            store.backup(tmp_path / f"{number}.db")
            number += 1
        for each in writing:
            each.result()
    assert number > 0
    for i in range(number):
        with Store.open(tmp_path / f"{i}.db", read_only=True) as copy:
            counts = copy.counts()
            assert counts["tasks"] == counts["judgements"], "never half of a transaction"


# -- at the same time ---------------------------------------------------------------------------


def test_of_simultaneous_judgements_by_one_person_one_is_stored(location):
    """Two stores, eight threads: the check and the write are one transaction."""
    with Store.open(location) as one, Store.open(location) as two:
        rounds = 6
        for number in range(rounds):
            shown = task()
            one.add(shown)

            def judge(i: int, shown: Task = shown) -> bool:
                try:
                    return (one, two)[i % 2].add(vote(shown))
                except EventRefused:
                    return False

            with ThreadPoolExecutor(8) as pool:
                assert sum(pool.map(judge, range(8))) == 1
            assert len(one.judged()) == number + 1


def test_two_openings_of_nothing_at_once_make_one_store(location):
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: Store.open(location), range(6)))
    for each in stores:
        each.add(task())
    assert {each.version() for each in stores} == {6}
    for each in stores:
        each.close()


def test_seq_is_the_order_in_which_events_become_visible(location):
    """Whoever has read up to a number never misses an event with a lower one."""
    with Store.open(location) as store:
        until = time.monotonic() + 0.6

        def write() -> None:
            while time.monotonic() < until:
                shown = task()
                store.add_many([shown, vote(shown)])

        with ThreadPoolExecutor(4) as pool:
            writing = [pool.submit(write) for _ in range(4)]
            seen, read = 0, []
            while not all(w.done() for w in writing):
                new = store.judged(since_seq=seen)
                read += [j.seq for j in new]
                seen = read[-1] if read else 0
            for each in writing:
                each.result()
        read += [j.seq for j in store.judged(since_seq=seen)]
        assert read == [j.seq for j in store.judged()]
        assert len(read) > 8
