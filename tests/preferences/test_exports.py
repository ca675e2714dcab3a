"""Exports: what TRL and our own readers make of them, what is left out, and the manifest."""

import csv
import hashlib
import json
from datetime import datetime
from pathlib import Path

import pytest

from lora_rlhf.data.records import prompt_key
from lora_rlhf.data.sources import load_rankings, require
from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences.events import Retract, Sampler
from lora_rlhf.preferences.exports import EXPORTS, FILTERS, csv_cell, export, export_all
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import Source
from tests.preferences.making import like, skip, task, vote

SHOWN = [{"text": "one", "adapter": "a"}, {"text": "two", "adapter": "b"}]


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "rankings.db") as opened:
        yield opened


def add(store: Store, shown, *groups, **changes):
    judgement = vote(shown, *groups, **changes)
    store.add_many([shown, judgement])
    return judgement


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- pairs --------------------------------------------------------------------------------------


def test_trl_and_datasets_read_the_pairs(store, tmp_path):
    from datasets import load_dataset
    from trl.data_utils import is_conversational, maybe_apply_chat_template

    from tests.data.fakes import qwen

    for _ in range(12):
        add(store, task(SHOWN))
    add(store, task(SHOWN, prompt="the same, much better"), strength=2)
    train, held, _ = export(store, "pairs", tmp_path / "out", margin=True).files
    loaded = load_dataset(
        "json",
        data_files={"train": str(train), "eval": str(held)},
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(loaded["train"]) + len(loaded["eval"]) == 13
    assert len(loaded["eval"]) > 0
    example = loaded["train"][0]
    assert is_conversational({k: example[k] for k in ("prompt", "chosen", "rejected")})
    rendered = maybe_apply_chat_template(
        {k: example[k] for k in ("prompt", "chosen", "rejected")}, qwen()
    )
    assert "two" in rendered["chosen"]
    assert "one" in rendered["rejected"]
    margins = {r["prompt"][0]["content"]: r["margin"] for part in loaded.values() for r in part}
    assert margins.pop("the same, much better") == 1.0
    assert set(margins.values()) == {0.0}


def test_a_ranking_gives_its_strict_pairs_with_weights_that_sum_to_one(store, tmp_path):
    """K = 4 with one tie: five pairs."""
    shown = task([{"text": f"t{i}", "rm_score": float(i)} for i in range(4)])
    judgement = add(store, shown, ("r1",), ("r3", "r2"), ("r0",))
    export(store, "pairs", tmp_path, heldout_fraction=0.0)
    rows = lines(tmp_path / "pairs.jsonl")
    found = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows]
    assert sorted(found) == [
        ("t1", "t0"),
        ("t1", "t2"),
        ("t1", "t3"),
        ("t2", "t0"),
        ("t3", "t0"),
    ]
    assert [r["weight"] for r in rows] == [0.2] * 5
    assert {r["group_id"] for r in rows} == {judgement.id}
    assert {(r["task_id"], r["annotator"], r["strategy"]) for r in rows} == {
        (shown.id, "ana", "uniform")
    }
    assert [r["chosen_score"] for r in rows if r["chosen"][0]["content"] == "t3"] == [3.0]
    assert all(r["prompt"] == list(shown.prompt) for r in rows)


def test_pairs_of_identical_texts_are_left_out_and_the_others_weigh_the_whole(store, tmp_path):
    add(
        store,
        task([{"text": "same"}, {"text": " same "}, {"text": "x"}]),
        ("r0",),
        ("r1",),
        ("r2",),
    )
    add(store, task([{"text": "same"}, {"text": "same\n"}]))
    done = export(store, "pairs", tmp_path, heldout_fraction=0.0)
    rows = lines(tmp_path / "pairs.jsonl")
    assert [r["weight"] for r in rows] == [0.5, 0.5]
    assert done.manifest["filters"]["identical"] == {"on": True, "removed": 1}


def test_a_prompt_falls_on_one_side_whatever_else_is_there(store, tmp_path):
    prompts = [f"question {i}" for i in range(60)]
    for prompt in prompts:
        for _ in range(2):
            add(store, task(SHOWN, prompt=prompt))
    export(store, "pairs", tmp_path / "a", heldout_fraction=0.3)

    def prompts_in(name: str) -> set[str]:
        return {r["prompt"][0]["content"] for r in lines(tmp_path / name)}

    train, held = prompts_in("a/pairs.jsonl"), prompts_in("a/pairs-eval.jsonl")
    assert train | held == set(prompts)
    assert train & held == set()
    assert 8 <= len(held) <= 29
    for i in range(40):
        add(store, task(SHOWN, prompt=f"later {i}"))
    export(store, "pairs", tmp_path / "b", heldout_fraction=0.3)
    assert prompts_in("b/pairs-eval.jsonl") & set(prompts) == held
    export(store, "pairs", tmp_path / "c", heldout_fraction=0.0)
    assert lines(tmp_path / "c" / "pairs-eval.jsonl") == []
    assert len(lines(tmp_path / "c" / "pairs.jsonl")) == 160


def test_what_the_app_holds_out_is_held_out(store, tmp_path):
    for i in range(40):
        source = f"pool:heldout#{i}" if i < 30 else f"pool:train#{i}"
        add(store, task(SHOWN, prompt=f"question {i}", prompt_source=source))
    export(store, "pairs", tmp_path)
    held = {r["prompt"][0]["content"] for r in lines(tmp_path / "pairs-eval.jsonl")}
    assert {f"question {i}" for i in range(30)} <= held


@pytest.mark.parametrize("kind", ["pairs", "rankings", "kto"])
def test_nothing_to_train_on_is_on_a_prompt_that_the_app_holds_out(store, tmp_path, kind):
    """Nor is such a prompt where somebody has typed it, or where no share is held out besides."""
    for source in ("pool:heldout#3", "typed", "pool:train#4"):
        prompt = "of the app" if source != "pool:train#4" else "of training"
        add(store, task(SHOWN, prompt=prompt, prompt_source=source))
        liked = task(1, prompt=prompt, prompt_source=source, blind=False)
        store.add_many([liked, like(liked)])
    done = export(store, kind, tmp_path, heldout_fraction=0.0)
    train = [r["prompt"][0]["content"] for r in lines(tmp_path / f"{kind}.jsonl")]
    held = [r["prompt"][0]["content"] for r in lines(tmp_path / f"{kind}-eval.jsonl")]
    assert (train, held) == (["of training"], ["of the app"] * 2)
    assert [f["rows"] for f in done.manifest["files"]] == [1, 2]


def test_what_measures_holds_every_prompt(store, tmp_path):
    add(store, task(SHOWN, prompt_source="pool:heldout#3"))
    export(store, "battles", tmp_path)
    assert len(lines(tmp_path / "battles.jsonl")) == 1


# -- the other kinds ----------------------------------------------------------------------------


def test_our_own_readers_read_the_rankings(store, tmp_path):
    shown = task(4, prompt="Why?", app={"tag": "ducks"})
    add(store, shown, ("r2",), ("r0", "r3"), ("r1",))
    add(store, task(SHOWN), ("r0", "r1"))
    done = export(store, "rankings", tmp_path)
    (found,) = require(load_rankings(Source(path=str(tmp_path / "rankings.jsonl"))))
    assert found.prompt == shown.prompt
    assert found.responses == tuple(r.text for r in shown.responses)
    assert found.groups == ((2,), (0, 3), (1,))
    assert (found.tag, found.annotator) == ("ducks", "ana")
    assert done.manifest["left_out"] == {"all answers tie": 1}


def test_battles_have_the_layout_of_the_arena(store, tmp_path):
    swapped = [{"pos": 1, **SHOWN[0]}, {"pos": 0, **SHOWN[1]}]

    def shown():
        made = task(SHOWN, prompt="Why?")
        rows = tuple(
            r.model_copy(update={"pos": s["pos"]})
            for r, s in zip(made.responses, swapped, strict=True)
        )
        return made.model_copy(update={"responses": rows})

    first = add(store, shown())  # r1, of b, wins; it stands first
    add(store, shown(), ("r0",), ("r1",))
    add(store, shown(), ("r0", "r1"))
    add(store, shown(), ("r0", "r1"), outcome="both_bad")
    add(store, task(3), ("r0",), ("r1",), ("r2",))
    add(store, task(SHOWN, sampler=Sampler(strategy="import")))
    done = export(store, "battles", tmp_path)
    rows = lines(tmp_path / "battles.jsonl")
    assert [r["winner"] for r in rows] == ["model_a", "model_b", "tie", "tie (bothbad)"]
    assert {(r["model_a"], r["model_b"]) for r in rows} == {("b", "a")}
    assert rows[0]["judge"] == "ana"
    assert rows[0]["tstamp"] == first.ts
    assert (rows[0]["turn"], rows[0]["anony"]) == (1, True)
    assert [m["content"] for m in rows[0]["conversation_a"]] == ["Why?", "two"]
    assert done.manifest["left_out"] == {
        "more than two answers": 1,
        "imported: no known models": 1,
    }


def test_likes_become_labels(store, tmp_path):
    from trl.data_utils import is_conversational

    for up in (True, False):
        shown = task([{"text": f"liked {up}"}], blind=False)
        store.add_many([shown, like(shown, up)])
    add(store, task(SHOWN))
    export(store, "kto", tmp_path)
    rows = lines(tmp_path / "kto.jsonl")
    assert [(r["completion"][0]["content"], r["label"]) for r in rows] == [
        ("liked True", True),
        ("liked False", False),
    ]
    assert is_conversational({k: rows[0][k] for k in ("prompt", "completion", "label")})


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_cell_is_a_formula(store, tmp_path, start):
    name = f"{start}cmd|' /C calc'!A0"
    assert csv_cell(name) == f"'{name}"
    for _ in range(3):
        add(store, task([{"adapter": name}, {"adapter": "b"}]))
    export(store, "leaderboard", tmp_path)
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    cells = [cell for row in rows for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    assert {row[0] for row in rows[1:]} == {f"'{name}", "b"}
    by_name = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert float(by_name["b"]["win_rate"]) == pytest.approx(3.5 / 4)
    assert by_name["b"]["decisive"] == "3"


# -- filters and manifest -----------------------------------------------------------------------


def one_of_each(store: Store) -> None:
    """A good judgement, and one for each filter; the texts take 20 s to read."""
    long = [{"text": "word " * 49 + "a"}, {"text": "word " * 49 + "b"}]
    add(store, task(long))
    taken_back = add(store, task(long))
    store.add(Retract(ref=taken_back.id, annotator="ana"))
    cut = task([long[0], {"text": "c", "finish_reason": "stopped"}])
    store.add_many([cut, skip(cut)])
    add(store, task(long, blind=False))
    add(store, task(long), client_ms=100)
    add(store, task([{"text": "same"}, {"text": "same"}]))


def test_each_filter_removes_its_own_and_can_be_switched_off(store, tmp_path):
    one_of_each(store)
    done = export(store, "pairs", tmp_path, heldout_fraction=0.0)
    assert done.manifest["filters"] == {f: {"on": True, "removed": 1} for f in FILTERS}
    assert (done.rows, done.manifest["judgements"]) == (1, 1)
    more = {"retracted": 1, "non-blind": 1, "too-fast": 1, "unfinished": 0, "identical": 0}
    for name, extra in more.items():
        others = [f for f in FILTERS if f != name]
        found = export(store, "pairs", tmp_path, filters=others, heldout_fraction=0.0)
        assert found.rows == 1 + extra, name
        assert found.manifest["filters"][name] == {"on": False, "removed": 0}
        assert found.manifest["judgements"] == 2
    # What is left of the other two gives no pair, and that is said.
    assert found.manifest["left_out"] == {"identical texts": 1}
    found = export(store, "rankings", tmp_path, filters=())
    assert found.manifest["left_out"] == {"skipped": 1}
    assert found.rows == 5


def test_the_manifest_says_what_is_in_the_files(store, tmp_path):
    one_of_each(store)
    done = export(store, "pairs", tmp_path / "out", heldout_fraction=0.0)
    told = json.loads((tmp_path / "out" / "pairs.manifest.json").read_text())
    assert told == done.manifest
    for each in told["files"]:
        content = (tmp_path / "out" / each["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == each["sha256"]
        assert content.count(b"\n") == each["rows"]
    assert told["store"] == {
        "location": store.location,
        "version": store.version(),
        "sha256": store.digest(),
    }
    age = datetime.now().astimezone() - datetime.fromisoformat(told["time"].replace("Z", "+00:00"))
    assert 0 <= age.total_seconds() + 1 < 120


def test_files_are_private_and_older_ones_are_replaced(store, tmp_path):
    one_of_each(store)
    folder = tmp_path / "new" / "out"
    for _ in range(2):
        done = export_all(store, folder)
    assert [e.kind for e in done] == list(EXPORTS)
    names = {p.name for p in folder.iterdir()}
    assert names == {p.name for e in done for p in e.files}, "nothing temporary is left"
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_cannot_be_exported_is_a_sentence(store, tmp_path):
    for wrong in ({"kind": "elo"}, {"filters": ["nice"]}, {"heldout_fraction": 1.0}):
        with pytest.raises(PreferenceError, match="Allowed: one of pairs"):
            export(store, **{"kind": "pairs", "folder": tmp_path / "out"} | wrong)
    (tmp_path / "file").touch()
    with pytest.raises(PreferenceError, match="cannot be written"):
        export(store, "pairs", tmp_path / "file")


def test_the_hash_of_a_prompt_is_the_one_that_splits_go_by(store):
    shown = task(SHOWN, prompt=" spaces around ")
    assert shown.prompt_sha256 == prompt_key(shown.prompt)
