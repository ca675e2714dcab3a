"""Files into the store: every layout the recipes read, twice without adding anything."""

import gzip
import json

import pytest

from lora_rlhf.data.records import Ranking, user
from lora_rlhf.data.sources import load_rankings, require
from lora_rlhf.errors import DataError
from lora_rlhf.preferences import imports
from lora_rlhf.preferences.exports import export
from lora_rlhf.preferences.imports import import_file, to_events
from lora_rlhf.preferences.ratings import leaderboard
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import Source

HH = "\n\nHuman: Why?\n\nAssistant: "
ROWS = [
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "tag": "short"},
    {"chosen": f"{HH}Because.", "rejected": f"{HH}No idea."},
    {"prompt": "Which?", "responses": ["a", "b", "c", "d"], "ranking": [[2], [0, 3], [1]]},
    {"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob.", "annotator": "eve\n\x00"},
]


@pytest.fixture
def store(location):
    with Store.open(location) as opened:
        yield opened


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_every_layout_comes_in_once(store, tmp_path):
    file = write(tmp_path / "votes.jsonl.gz", [*ROWS, ROWS[0]])
    told = []
    found = import_file(store, file, "anthropic", lambda *step: told.append(step))
    assert (found.rankings, found.new, found.dropped) == (5, 4, {})
    assert told == [(5, 5)]
    version = store.version()
    again = import_file(store, write(tmp_path / "copy.jsonl", ROWS), "anthropic")
    assert (again.rankings, again.new) == (4, 0)
    assert store.version() == version == 8
    read = [j.task for j in store.judged()]
    assert {t.sampler.strategy for t in read} == {"import"}
    assert {r.finish_reason for t in read for r in t.responses} == {"import"}
    assert [t.mode for t in read] == ["pair", "pair", "rank", "pair"]
    assert {t.prompt_source for t in read} == {"import:votes.jsonl.gz"}
    assert {j.judgement.annotator for j in store.judged()} == {"anthropic", "eve"}


def test_imported_votes_never_count_in_win_rates(store, tmp_path):
    import_file(store, write(tmp_path / "votes.jsonl", ROWS))
    board = leaderboard(store.judged())
    assert (board.counted, board.left_out, board.arms) == (0, {"imported": 4}, ())


def test_an_import_cut_short_goes_on_where_it_was(store, tmp_path, monkeypatch):
    monkeypatch.setattr(imports, "_AT_ONCE", 8)
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(30)]
    file = write(tmp_path / "votes.jsonl", rows)

    def cut(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_file(store, file, progress=cut)
    part = store.counts()["live"]
    assert part == 8
    assert import_file(store, file).new == 22
    assert store.counts()["live"] == 30


def test_the_same_order_by_two_people_is_two_votes_and_the_opposite_order_too(store, tmp_path):
    rows = [{**ROWS[0], "annotator": who} for who in ("ana", "bob", "ana")]
    rows.append(ROWS[0] | {"chosen": "No.", "rejected": "Because.", "annotator": "ana"})
    found = import_file(store, write(tmp_path / "votes.jsonl", rows))
    assert (found.rankings, found.new) == (4, 3)


def test_what_was_imported_is_what_a_recipe_reads_from_the_file(store, location, tmp_path):
    file = str(write(tmp_path / "votes.jsonl", ROWS[:3]))
    import_file(store, file, "ana")
    before = require(load_rankings(Source(path=file)))
    after = require(load_rankings(Source(path=location)))
    assert [(r.prompt, r.responses, r.groups, r.tag) for r in after] == [
        (r.prompt, r.responses, r.groups, r.tag) for r in before
    ]
    assert {r.annotator for r in after} == {"ana"}


def test_an_export_can_be_imported_elsewhere_without_doubles(store, tmp_path):
    import_file(store, write(tmp_path / "votes.jsonl", ROWS), "ana")
    export(store, "rankings", tmp_path)
    with Store.open(tmp_path / "other.db") as other:
        found = import_file(other, tmp_path / "rankings.jsonl")
        assert (found.rankings, found.new) == (4, 4)
    assert import_file(store, tmp_path / "other.db").new == 0
    assert import_file(store, tmp_path / "rankings.jsonl").new == 0


def test_bad_rows_are_told_with_their_lines_and_nothing_is_stored(store, tmp_path):
    file = write(tmp_path / "votes.jsonl", [*ROWS, {"prompt": "p", "chosen": "", "rejected": "x"}])
    with pytest.raises(DataError, match=r"votes\.jsonl:5: an empty response"):
        import_file(store, file)
    assert store.version() == 0
    with pytest.raises(DataError, match="no such file"):
        import_file(store, tmp_path / "none.jsonl")


def test_halves_of_characters_are_replaced(store, tmp_path):
    """JSON can spell a lone surrogate, and no encoding can write one."""
    file = tmp_path / "votes.jsonl"
    file.write_text(
        r'{"prompt": "Why \ud83e?", "chosen": "a \udd84", "rejected": "b", "tag": "\ud83e"}'
    )
    assert import_file(store, file).new == 1
    assert import_file(store, file).new == 0
    (found,) = store.judged()
    assert found.task.prompt[0]["content"] == "Why ??"


def test_an_id_depends_on_everything_that_makes_a_ranking():
    base = {"prompt": user("p"), "responses": ("a", "b"), "groups": ((0,), (1,))}
    base |= {"tag": "t", "annotator": "x"}
    others = [
        base | {"prompt": user("q")},
        base | {"responses": ("a", "c")},
        base | {"groups": ((1,), (0,))},
        base | {"tag": None},
        base | {"annotator": "y"},
    ]
    events = [to_events(Ranking(**facts), "import:f", "import") for facts in (base, *others)]
    assert len({task.id for task, _ in events}) == len({j.id for _, j in events}) == 6
    again = to_events(Ranking(**base), "import:elsewhere", "somebody")
    assert again[0].id == events[0][0].id


@pytest.mark.shared
def test_hh_as_anthropic_publishes_it(shared, tmp_path):
    whole = gzip.decompress((shared / "data/hh-rlhf-harmless/test.jsonl.gz").read_bytes())
    rows = whole.splitlines(keepends=True)[:400]
    file = tmp_path / "test.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(rows)))
    with Store.open(tmp_path / "hh.db") as store:
        found = import_file(store, file, "anthropic")
        assert found.new == found.rankings > 390
        assert found.rankings + sum(found.dropped.values()) == 400
        first = store.judged()[0]
        row = json.loads(rows[0])
        better = first.task.response(first.judgement.ranking[0][0]).text
        assert row["chosen"].endswith(better)
        assert store.digest() == Store.open(store.location).digest()
