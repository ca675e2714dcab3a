"""The Votes tab: numbers counted by hand, one's own votes, exports for the admin alone."""

import re
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from lora_rlhf.errors import EventRefused
from lora_rlhf.preferences.events import FLAGS
from lora_rlhf.preferences.exports import EXPORTS
from lora_rlhf.preferences.ratings import Arm, HeatMap, Leaderboard, PairRate, Rate
from lora_rlhf.preferences.store import Judged, Store
from tests.preferences.making import judged, like, skip, task, vote
from tests.ui.markup import NASTY, read
from tests.ui.voted import POLICY, SFT, SFT_WINS, TWO, fill
from ui import vote_numbers
from ui.people import SCOPE_KEY, NotAllowed, Person
from ui.studio import Studio
from ui.tabs import votes
from ui.tabs.votes import PARTS, RECENT, Page, erase, look, recent, shown, take_back
from ui.vote_numbers import count, numbers
from ui.vote_rates import ALL_OTHERS, board_html, heat_html, needed_words, usual_reference
from ui.vote_views import _FLAGS, recent_html


@pytest.fixture
def filled(studio: Studio) -> Studio:
    return fill(studio)


def part(studio: Studio, person: Person, name: str, **page: Any) -> str:
    return read(shown(studio, person, Page(**page))[name]).text


def rows(html: str) -> dict[str, list[str]]:
    """Cells of a table by the head of their row."""
    found = {}
    for row in re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", html):
        head, *cells = re.split(r"</t[hd]><td[^>]*>", row)
        found[head] = [read(re.sub(r"</td>$", "", cell)).text for cell in cells]
    return found


# -- the numbers ----------------------------------------------------------------------------------


def test_everything_is_counted(filled: Studio) -> None:
    found = numbers(filled)
    assert (found.judgements, found.retracted, found.fast) == (13, 1, 1)
    assert found.outcomes == {"decided": 7, "tie": 1, "both_bad": 1, "skip": 1}
    assert found.likes == (2, 1)
    assert found.flags == {"too_long": 2, "harmful": 1}
    assert found.markable == 9
    assert found.board.counted == 5
    assert found.board.left_out == {
        "skipped": 1,
        "not blind": 1,
        "actively chosen": 1,
        "a repeat": 2,
        "a like": 3,
    }
    # The policy, at the second place, wins two of three decided pairs that count.
    assert (found.bias.share, found.bias.count) == (pytest.approx(1 / 3), 3)
    # Ben repeats ana's first as she had it; ana turns her own third round.
    assert (found.people.share, found.people.count) == (1.0, 1)
    assert (found.oneself.share, found.oneself.count) == (0.0, 1)
    assert (found.reward["blind"].share, found.reward["blind"].count) == (pytest.approx(2 / 3), 3)
    # 10, 20, 60, 30, 0.1, 20, 20, 20, 20 seconds; the skip is left out.
    assert found.seconds == {"pair": 20.0, "rank": None}
    assert [(a.name, a.judgements) for a in found.annotators] == [("ana", 9), ("ben", 4)]


def test_the_tiles_and_the_sentence_on_what_counts(filled: Studio, ana: Person) -> None:
    tiles = part(filled, ana, "tiles")
    for words in (
        "judgements 13",
        "win rates 5",
        "a pair 20 s",
        "a ranking \u2013",
        "people 2",
        "very fast 1",
        "taken back 1",
    ):
        assert words in tiles
    assert (
        "5 of 13 judgements count. Left out: 3 likes, 2 repeats, which measure agreement, 1 on "
        "prompts that were chosen actively, 1 not blind, 1 skipped."
    ) in part(filled, ana, "board")


def test_today_began_at_midnight_here() -> None:
    noon = time.mktime((2026, 3, 14, 12, 0, 0, 0, 0, -1))
    times = [noon - 12 * 3600 - 1, noon - 12 * 3600, noon - 1]
    one = task(TWO)
    found = count([judged(one, done_ts=ts) for ts in times], now=noon)
    assert (found.judgements, found.today) == (3, 2)


def test_a_vote_is_fast_under_a_quarter_of_reading_time() -> None:
    """Thirty words at 300 a minute take 6 s; the flag says so too, a skip may be as fast."""
    texts = [{"text": "word " * 14}, {"text": "word " * 14}]
    one = task(texts, prompt="two words")
    made = [
        judged(one, client_ms=1499),
        judged(one, client_ms=1501),
        judged(one, client_ms=60_000, flags=("fast",)),
        Judged(one, skip(one, client_ms=5), 9),
    ]
    assert count(made).fast == 2


# -- win rates ------------------------------------------------------------------------------------


def test_win_rates_against_a_reference_and_turned_round(filled: Studio, ana: Person) -> None:
    ours = rows(shown(filled, ana, Page(reference=SFT))["board"])
    theirs = rows(shown(filled, ana, Page(reference=POLICY))["board"])
    assert list(ours) == [POLICY]
    assert list(theirs) == [SFT]
    share, span, votes, words = ours[POLICY]
    other_share, other_span, *_ = theirs[SFT]
    assert (share, other_share) == ("67%", "33%")
    low, high = (int(n) for n in re.findall(r"(\d+)%", span))
    assert low < 50 < high
    assert other_span == f"{100 - high}% to {100 - low}%"
    assert votes == "3"
    # 196 decisive votes find 60% with 80% power (two-sided 5%); three are there.
    assert words == "cannot be told apart yet: about 193 more decisive votes tell 60% from 50%"


def test_against_all_others_ties_are_shown_apart(filled: Studio, ana: Person) -> None:
    found = rows(shown(filled, ana, Page(reference=ALL_OTHERS))["board"])
    assert {name: cells[0] for name, cells in found.items()} == {POLICY: "67%", SFT: "33%"}
    assert {cells[2] for cells in found.values()} == {"5"}
    assert found[POLICY][3].endswith("1 tie, 1 both bad")


@pytest.mark.parametrize("forged", [None, "no/such", 5, ["quick/sft"], "<b>", {"a": 1}])
def test_a_reference_nobody_has_is_the_usual_one(filled: Studio, ana: Person, forged: Any) -> None:
    assert shown(filled, ana, Page(reference=forged))["reference"][1] == SFT


def board_of(*names: str, pairs: tuple[PairRate, ...] = (), **more: Any) -> Leaderboard:
    arms = tuple(Arm(name, 0.0, Rate(0.5, 0.4, 0.6, 10, 10), 10, 10, 0, 0) for name in names)
    facts = {"counted": 10, "left_out": {}, "separated": False, "groups": (names,)}
    return Leaderboard(arms=arms, pairs=pairs, **facts | more)


def test_people_ask_first_how_it_does_against_sft() -> None:
    assert usual_reference(board_of("base", "a/policy", "a/sft")) == "a/sft"
    assert usual_reference(board_of("a/policy", "base")) == "base"
    assert usual_reference(board_of("a/policy", "b/policy")) == ALL_OTHERS


@pytest.mark.parametrize(
    ("rate", "needed", "words"),
    [
        (Rate(0.7, 0.6, 0.8, 90), 106, "better: no more votes needed to say so"),
        (Rate(0.3, 0.2, 0.4, 90), 106, "worse: no more votes needed to say so"),
        (Rate(0.9, 0.6, 1.0, 9), 187, "better, on few votes"),
        (
            Rate(0.6, 0.4, 0.8, 20),
            176,
            "cannot be told apart yet: about 176 more decisive votes tell 60% from 50%",
        ),
        # 785 find 55%.
        (
            Rate(0.5, 0.47, 0.53, 400),
            0,
            "no difference as large as 60%; about 385 more tell 55% from 50%",
        ),
        (Rate(0.5, 0.49, 0.51, 9000), 0, "no difference as large as 60%"),
        (Rate(None), 196, "no decided vote yet; about 196 votes tell 60% from 50%"),
    ],
)
def test_what_a_win_rate_still_needs_in_words(rate: Rate, needed: int, words: str) -> None:
    assert needed_words(rate, needed) == words


def test_who_never_met_is_said_to_have_never_met() -> None:
    pair = PairRate("b", "a", Rate(0.8, 0.7, 0.9, 50, 50), 40, 10, 0, 0, 146)
    together = board_of("a", "b", "c", pairs=(pair,))
    apart = board_of("a", "b", "c", pairs=(pair,), groups=(("a", "b"), ("c",)), separated=True)
    assert rows(board_html(together, "a"))["c"][3] == "never met it directly, only through others"
    assert (
        rows(board_html(apart, "a"))["c"][3] == "never met it directly, not through others either"
    )
    assert "Mind:" not in board_html(together, "a")
    assert "cautious guess" in board_html(apart, "a")
    assert "not all adapters are connected" in board_html(apart, "a").lower()


def test_no_blind_vote_says_how_to_make_one(studio: Studio, ana: Person) -> None:
    one = task(TWO, blind=False)
    studio.store.add(one)
    studio.store.add(vote(one))
    text = part(studio, ana, "board")
    assert "No vote counts for a win rate yet" in text
    assert "0 of 1 judgement count. Left out: 1 not blind." in text


def test_an_empty_store_says_what_to_do(studio: Studio, ana: Person) -> None:
    parts = shown(studio, ana, Page())
    assert "Open Rank" in read(parts["tiles"]).text
    assert (parts["some"], parts["admin"]) == (False, False)
    for name in set(PARTS) - {"reference", "everybody", "admin", "some"}:
        read(parts[name])


# -- the rest of the drawings ---------------------------------------------------------------------


def test_bars_are_as_long_as_their_share(filled: Studio, ana: Person) -> None:
    html = shown(filled, ana, Page())["outcomes"]
    assert {head: cells[1:] for head, cells in rows(html).items()} == {
        "decided": ["7", "70%"],
        "tie": ["1", "10%"],
        "all bad": ["1", "10%"],
        "skipped": ["1", "10%"],
    }
    assert re.findall(r'lr-bar-part" width="([\d.]+)"', html) == ["70.0", "10.0", "10.0", "10.0"]
    assert "2 likes, 1 not liked" in read(html).text


def test_marks_are_rates_of_what_could_be_marked(filled: Studio, ana: Person) -> None:
    html = shown(filled, ana, Page())["flags"]
    assert {head: cells[1:] for head, cells in rows(html).items()} == {
        "too long": ["2", "22%"],
        "harmful": ["1", "11%"],
    }
    assert "Of 9 judgements" in read(html).text
    assert set(_FLAGS) == set(FLAGS) - {"fast"}, "each has words"


def test_checks_say_what_they_stand_on(filled: Studio, ana: Person) -> None:
    found = rows(shown(filled, ana, Page())["checks"])
    assert [cells[0] for cells in found.values()][:4] == ["33%", "100%", "0%", "67%"]
    assert found["The first of two wins"][3] == "no lean seen, on few pairs"
    assert found["The reward model agrees (names shown)"][2] == "1"
    assert "The reward model agrees (scores shown)" not in found


def test_the_heat_map_has_a_cell_for_every_two() -> None:
    heat = HeatMap(
        ("a", "b", "c"), ((0, 4, 0), (4, 0, 2), (0, 2, 0)), ((0, 3, 0), (1, 0, 0), (0, 0, 0))
    )
    html = heat_html(heat)
    assert rows(html) == {
        "a": ["\u2013", "75% 4 votes", "never met"],
        "b": ["25% 4 votes", "\u2013", "ties 2 votes"],
        "c": ["never met", "ties 2 votes", "\u2013"],
    }
    weights = [float(w) for w in re.findall(r"--lr-weight:([\d.]+)%", html)]
    assert len(set(weights)) == 2
    assert max(weights) <= 45, "text on it stays readable"


# -- one by one -----------------------------------------------------------------------------------


def test_people_see_their_own_and_the_admin_everybodys(
    filled: Studio, ana: Person, ben: Person
) -> None:
    own = recent(filled, ben)
    assert len(own) == 4
    assert {j.judgement.annotator for j in own} == {"ben"}
    assert [j.seq for j in own] == sorted((j.seq for j in own), reverse=True)
    assert len(recent(filled, ana, everybody=True)) == 13
    with pytest.raises(NotAllowed):
        recent(filled, ben, everybody=True)
    assert "ana" not in part(filled, ben, "recent", everybody=True)
    assert "ben, chat" in part(filled, ana, "recent", everybody=True)
    assert "ben" not in part(filled, ana, "recent", everybody="yes")
    assert shown(filled, ben, Page())["people"] == ""
    assert rows(shown(filled, ana, Page())["people"])["ben"][0] == "4"


def test_only_the_newest_are_listed(studio: Studio, ana: Person) -> None:
    made = [task(TWO, prompt=f"prompt {i}") for i in range(RECENT + 3)]
    studio.store.add_many([event for one in made for event in (one, vote(one))])
    found = recent(studio, ana)
    assert [j.task.id for j in found] == [one.id for one in made[:2:-1]]


def test_a_choice_is_told_best_first() -> None:
    four = task([{"adapter": name} for name in ("a", "b", "c", None)])
    chat = task([{"adapter": "a"}])
    entries = [
        judged(four, ["r2"], ["r0", "r3"], ["r1"], flags=("off_topic",)),
        judged(four, ["r0", "r1", "r2", "r3"], outcome="both_bad"),
        Judged(four, skip(four), 2),
        judged(task(TWO), strength=2),
        Judged(chat, like(chat, up=False), 4),
    ]
    html = recent_html(entries, "ana", now=1020.0 + 120)
    said = [read(p).text for p in re.findall(r'lr-asked">.*?</p><p>(.*?)</p>', html)]
    assert said == [
        "C c > A a = D base > B b",
        "all bad: A a = B b = C c = D base",
        "skipped",
        f"B {POLICY} > A {SFT} , much better",
        "did not like a",
    ]
    assert "you, ranking, 2 min ago" in read(html).text
    assert "off topic" in read(html).text
    assert read(html).values("data-undo") == [e.judgement.id for e in entries]
    assert read(recent_html(entries, "ben")).values("data-undo") == []


def test_taking_back_takes_ones_own_and_nothing_else(
    filled: Studio, ana: Person, ben: Person
) -> None:
    newest = recent(filled, ben)[0].judgement.id
    others = recent(filled, ana)[0].judgement.id
    before = filled.store.version()
    for forged in (
        others,
        "no such",
        "",
        None,
        5,
        [newest],
        {"undo": newest},
        "'; drop",
        "x" * 999,
    ):
        with pytest.raises(EventRefused):
            take_back(filled, ben, forged)
    assert filled.store.version() == before
    assert "Taken back" in take_back(filled, ben, newest)
    assert numbers(filled).judgements == 12
    with pytest.raises(EventRefused):
        take_back(filled, ben, newest)


def test_deleting_my_votes_deletes_mine(filled: Studio, ana: Person, ben: Person) -> None:
    assert erase(filled, ben) == "4 judgements of yours removed for good."
    assert recent(filled, ben) == []
    assert numbers(filled).judgements == 9
    assert {j.judgement.annotator for j in filled.store.judged(retracted=True)} == {"ana"}
    assert erase(filled, ben) == "0 judgements of yours removed for good."


def test_deleted_votes_that_somebody_reads_are_said_to_be_there_until_they_are_gone(
    filled: Studio, ben: Person
) -> None:
    reader = sqlite3.connect(filled.store.location, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM preference_events").fetchall()
    left = "the text leaves the file with the next one"
    assert left in erase(filled, ben)
    assert "still in the file" in part(filled, ben, "consent")
    reader.close()
    assert left not in erase(filled, ben)
    assert "still in the file" not in part(filled, ben, "consent")


def test_the_consent_line_says_what_is_stored_and_what_is_not(studio: Studio, ben: Person) -> None:
    text = part(studio, ben, "consent")
    for words in ("under the name ben", "prompt", "answers", "choice", "how long", "no address"):
        assert words in text


# -- cheap, and nothing trusted -------------------------------------------------------------------


def test_numbers_are_counted_once_until_something_is_stored(
    filled: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = numbers(filled)
    assert numbers(filled) is first
    one = task(TWO)
    filled.store.add(one)
    filled.store.add(vote(one))
    second = numbers(filled)
    assert second.judgements == first.judgements + 1
    tomorrow = time.time() + 86_400
    monkeypatch.setattr(vote_numbers.time, "time", lambda: tomorrow)
    assert numbers(filled) is not second


def test_two_stores_have_numbers_of_their_own(filled: Studio, tmp_path: Path) -> None:
    with Store.open(tmp_path / "other.db") as store:
        other = SimpleNamespace(store=store, judged=store.judged)
        assert numbers(other).judgements == 0
    assert numbers(filled).judgements == 13


def kept(update: Any) -> bool:
    """Whether an output stays as it is."""
    return isinstance(update, dict) and set(update) == {"__type__"}


def test_a_second_look_sends_only_what_changed(filled: Studio, ana: Person, ben: Person) -> None:
    page, *first = look(filled, ana, Page())
    assert not any(map(kept, first))
    page, *second = look(filled, ana, page)
    assert all(map(kept, second))
    page, *third = look(filled, ana, Page(reference=POLICY, told=page.told))
    changed = {name for name, update in zip(PARTS, third, strict=True) if not kept(update)}
    assert changed == {"reference", "board"}
    _, *theirs = look(filled, ben, Page())
    updates = dict(zip(PARTS, theirs, strict=True))
    assert not updates["admin"].visible
    assert not updates["everybody"].visible
    assert updates["some"].visible


def test_whatever_was_judged_is_shown_as_text(studio: Studio, ana: Person) -> None:
    texts = [re.sub(r"[\x00-\x1f\x7f]", "", nasty) for nasty in NASTY]
    for nasty in texts:
        sides = [{"adapter": nasty, "text": nasty}, {"adapter": POLICY, "text": f"{nasty} 2"}]
        one = task(sides, prompt=nasty, annotator=nasty)
        studio.store.add(one)
        studio.store.add(vote(one, note=nasty))
    for reference in (ALL_OTHERS, POLICY, *texts):
        parts = shown(studio, ana, Page(reference=reference, everybody=True))
        assert parts["reference"][1] == reference
        for name in set(PARTS) - {"reference", "everybody", "admin", "some"}:
            seen = "".join(read(parts[name]).texts)
            if name in ("recent", "heat", "people"):
                assert all(text.strip() in seen for text in texts)
    person = Person(texts[0], True, "")
    assert texts[0] in "".join(read(shown(studio, person, Page())["consent"]).texts)


def test_five_thousand_judgements_are_quick(studio: Studio, ana: Person) -> None:
    names = [SFT, POLICY, "base", "votes/policy"]
    pairs = [task([{"adapter": a}, {"adapter": b}]) for a in names for b in names if a != b]
    either = [judged(one, *groups) for one in pairs for groups in (SFT_WINS, SFT_WINS[::-1])]
    made = []
    for i in range(5000):
        like_it, new = either[i * 7 % len(either)], f"{i}"
        one = like_it.task.model_copy(update={"task_id": new, "prompt_sha256": new})
        made.append(Judged(one, like_it.judgement.model_copy(update={"id": new}), i))
    big = SimpleNamespace(store=studio.store, judged=lambda: made)
    before = time.perf_counter()
    parts = shown(big, ana, Page())
    assert time.perf_counter() - before < 20  # a slow machine's worst
    assert "5,000" in parts["tiles"]
    assert sum(len(str(html)) for html in parts.values()) < 60_000
    before = time.perf_counter()
    shown(big, ana, Page())
    assert time.perf_counter() - before < 1.0, "it was counted again"


# -- the wiring -----------------------------------------------------------------------------------


def request_of(person: Person) -> Any:
    return SimpleNamespace(request=SimpleNamespace(scope={SCOPE_KEY: person}))


def test_hidden_handlers_ask_who_calls_them(
    filled: Studio, ana: Person, ben: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    with gr.Blocks() as app, gr.Tab("Votes"):
        votes.build(filled)
    assert all(fn.api_visibility == "private" for fn in app.fns.values())
    exporters = [fn.fn for fn in app.fns.values() if fn.name == "call"]
    assert len(exporters) == len(EXPORTS) + 1
    for exporter in exporters:
        with pytest.raises(gr.Error, match="admin"):
            exporter(["retracted"], request_of(ben))
    path, _ = exporters[0](["retracted"], request_of(ana))
    assert Path(path).is_relative_to(tmp_path / "gradio"), "Gradio would copy it, and keep the copy"

    (press,) = [fn.fn for fn in app.fns.values() if fn.name == "press"]
    event = SimpleNamespace(_data={"undo": recent(filled, ana)[0].judgement.id})
    with pytest.raises(gr.Error, match="no judgement of yours"):
        press(event, Page(), request_of(ben))
    press(event, Page(), request_of(ana))
    assert numbers(filled).judgements == 12
