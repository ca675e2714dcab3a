"""Recipes that read a store: what is trained on, what is counted as dropped, and mistakes."""

import json
import sqlite3
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.data.sources import check_data, load_prompts, load_rankings, require
from lora_rlhf.data.splits import deduplicate, split_by_prompt
from lora_rlhf.errors import ConfigError, DataError
from lora_rlhf.preferences.events import Retract
from lora_rlhf.preferences.exports import export
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import Recipe, Source
from lora_rlhf.recipe_io import dump_recipe, parse_recipe
from lora_rlhf.stages import reward
from lora_rlhf.training.reward_report import Group
from tests.preferences.making import like, skip, task, vote

RECIPE = """
name: votes
base: {{model: builtin:tiny}}
data: {{demonstrations: {{builtin: demonstrations, limit: 50}}, rankings: {rankings}}}
sft: {{}}
reward: {{}}
"""


def recipe(rankings: str) -> Recipe:
    return parse_recipe(RECIPE.format(rankings=rankings), "votes.yaml")


def fill(store: Store) -> None:
    """Two rankings to train on, and one of everything that is dropped."""
    good, tagged = task(4), task(app={"tag": "ducks"})
    store.add_many([good, vote(good, ("r2",), ("r0", "r1"), ("r3",)), tagged, vote(tagged)])
    taken_back = task()
    judgement = vote(taken_back)
    store.add_many([taken_back, judgement, Retract(ref=judgement.id, annotator="ana")])
    skipped, stopped, tie = task(), task([{}, {"finish_reason": "stopped"}]), task()
    bad, liked, never = task(), task(1), task()
    store.add_many([skipped, skip(skipped), stopped, skip(stopped), liked, like(liked), never])
    store.add_many([tie, vote(tie, ("r0", "r1")), bad])
    store.add(vote(bad, ("r0", "r1"), outcome="both_bad"))
    same = task([{"text": "same"}, {"text": "same"}])
    store.add_many([same, vote(same)])


DROPPED = {
    "retracted": 1,
    "skipped": 2,
    "a like of one answer": 1,
    "all answers tie": 1,
    "all answers are bad": 1,
    "all answers are the same": 1,
}


def test_a_store_is_a_source_of_rankings(location, store):
    fill(store)
    version = store.version()
    loaded = load_rankings(Source(path=location))
    assert loaded.problems == []
    assert loaded.dropped == DROPPED
    ranked, pair = loaded.records
    assert ranked.responses == ("answer r0", "answer r1", "answer r2", "answer r3")
    assert ranked.groups == ((2,), (0, 1), (3,))
    assert (pair.groups, pair.tag, pair.annotator) == (((1,), (0,)), "ducks", "ana")
    assert store.version() == version
    assert [p.messages for p in require(load_prompts(Source(path=location)))] == [
        ranked.prompt,
        pair.prompt,
        *[r.task.prompt for r in store.judged() if r.task.responses[0].text == "same"],
    ]


def hold_out(store: Store, count: int) -> None:
    """Judgements of prompts that the app held out; the last prompt was typed by somebody, too."""
    for i in range(count):
        shown = task(prompt=f"held out {i}", prompt_source=f"pool:heldout#{i}")
        store.add_many([shown, vote(shown)])
    typed = task(prompt=f"held out {count - 1}")
    store.add_many([typed, vote(typed)])


def test_what_the_app_holds_out_is_not_trained_on_unless_it_is_wanted(location, store):
    fill(store)
    hold_out(store, 3)
    usual, wanted = Source(path=location), Source(path=location, heldout=True)
    loaded = load_rankings(usual)
    assert len(loaded.records) == 2
    assert loaded.dropped == DROPPED | {"on a prompt that the app holds out": 4}
    assert len(load_rankings(wanted).records) == 2 + 4
    assert load_rankings(wanted).dropped == DROPPED

    def held(source: Source, **options: bool) -> int:
        prompts = require(load_prompts(source, **options))
        return sum("held out" in p.messages[0]["content"] for p in prompts)

    assert held(usual) == 0  # the prompts of PPO
    assert held(usual, heldout=True) == 4  # those of the evaluation


def test_the_check_tells_what_is_left_out_for_the_app_and_how_to_have_it(location, store):
    hold_out(store, 3)
    problems, _ = check_data(recipe(f"'{location}'"))
    assert "4 x on a prompt that the app holds out" in str(problems[0])
    assert "heldout: true beside path" in str(problems[0])
    fill(store)
    problems, notes = check_data(recipe(f"'{location}'"))
    assert [p.kind for p in problems] == []
    assert "data.rankings: 4 rows dropped (on a prompt that the app holds out)" in notes
    _, notes = check_data(recipe(f"{{path: '{location}', heldout: true}}"))
    assert f"data.rankings: 6 usable rows in {location}" in notes


def test_the_check_reports_a_store_as_any_other_file(location, store):
    fill(store)
    problems, notes = check_data(recipe(f"'{location}'"))
    assert [p.kind for p in problems] == []
    assert f"data.rankings: 2 usable rows in {location}" in notes
    for reason, count in DROPPED.items():
        assert f"data.rankings: {count} rows dropped ({reason})" in notes


def test_the_same_order_by_two_people_trains_twice(location, store):
    shown = task(annotator=None)
    store.add_many([shown, vote(shown, annotator="ana"), vote(shown, annotator="bob")])
    records = require(load_rankings(Source(path=location)))
    assert len(deduplicate(records)[0]) == 2


def test_text_is_short_for_a_path_and_is_written_out(tmp_path):
    found = recipe("rankings.db")
    assert found.data.rankings == Source(path="rankings.db")
    assert parse_recipe(dump_recipe(found), "again") == found
    changed = parse_recipe(
        RECIPE.format(rankings="rankings.db"), "votes.yaml", ["data.rankings=other.jsonl"]
    )
    assert changed.data.rankings == Source(path="other.jsonl")


@pytest.mark.parametrize(
    ("rankings", "sentence"),
    [
        ("'postgresql://ana:hunter2@host/votes'", "~/.pgpass"),
        ("{path: a.db, prompt_tokens: 3}", "prompt_tokens has no effect"),
        ("{path: a.jsonl, heldout: true}", "heldout has no effect"),
        ("[a.db]", "data.rankings is"),
        ("3", "data.rankings is 3"),
    ],
)
def test_mistakes_are_sentences_with_the_place(rankings, sentence):
    with pytest.raises(ConfigError) as error:
        recipe(rankings)
    assert sentence in str(error.value)
    assert str(error.value).startswith("votes.yaml:4: ")
    assert "hunter2" not in str(error.value)


def test_a_store_holds_no_demonstrations():
    with pytest.raises(ConfigError, match=r"holds no demonstrations.*data\.rankings"):
        parse_recipe(RECIPE.format(rankings="a.db"), "v", ["data.demonstrations=a.db"])


def test_what_is_no_store_is_a_problem_with_the_data(tmp_path):
    sqlite3.connect(tmp_path / "photos.db").execute("CREATE TABLE photos (id)").connection.close()
    (tmp_path / "text.db").write_text("text " * 1000)
    Store.open(tmp_path / "nothing.db").close()
    said = {
        "photos.db": "another program",
        "text.db": "no SQLite database",
        "none.db": "no such store",
        "nothing.db": "no rows",
    }
    for name, sentence in said.items():
        path = str(tmp_path / name)
        with pytest.raises(DataError, match=sentence):
            require(load_rankings(Source(path=path)))
        problems, _ = check_data(recipe(path))
        assert [str(p).startswith(f"{path}: ") for p in problems] == [True]
        assert str(problems[0]).count(path) == 1
    unreachable = recipe("postgresql://ana@127.0.0.1:1/votes")
    problems, _ = check_data(unreachable)
    assert "cannot be reached" in str(problems[0])


# -- weights ------------------------------------------------------------------------------------


def test_the_reward_stage_weighs_a_prompt_as_one_term_like_the_exported_weights(
    location, store, tmp_path, monkeypatch
):
    """A K = 4 ranking with a tie (five pairs) and a pair: two terms, not six."""
    shown, pair = task(4), task()
    store.add_many([shown, vote(shown, ("r1",), ("r2", "r3"), ("r0",)), pair, vote(pair)])
    records = require(load_rankings(Source(path=location)))
    scores = torch.tensor([0.3, -0.2, 1.1, 0.4, 0.7, -0.5])
    monkeypatch.setattr(reward, "_forward", lambda session, groups: scores)
    groups = [Group([1], [[1]] * len(r.responses), r.groups, None) for r in records]
    found = reward.group_loss(None, groups)
    assert int(found.count) == 2

    export(store, "pairs", tmp_path, heldout_fraction=0.0)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    of = {("ranked", f"answer r{i}"): scores[i] for i in range(4)}
    of |= {("pair", f"answer r{i}"): scores[4 + i] for i in range(2)}
    expected = torch.zeros(())
    for row in rows:
        which = "ranked" if row["task_id"] == shown.id else "pair"
        margin = of[which, row["chosen"][0]["content"]] - of[which, row["rejected"][0]["content"]]
        expected = expected + row["weight"] * F.softplus(-margin)
    assert float(found.total) == pytest.approx(float(expected), rel=1e-5)
    unweighted = sum(float(F.softplus(torch.tensor(0.0))) for _ in rows)
    assert float(found.total) != pytest.approx(unweighted, rel=0.1)  # reason: far apart


# -- runs ---------------------------------------------------------------------------------------


def test_a_run_reads_a_copy_so_that_later_votes_do_not_change_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    module = ModuleType("lora_rlhf.pipeline")
    module.run_pipeline = lambda recipe, run, **_: seen.append((recipe, run))
    monkeypatch.setitem(sys.modules, "lora_rlhf.pipeline", module)
    with Store.open("rankings.db") as store:
        for _ in range(6):
            shown = task()
            store.add_many([shown, vote(shown)])
        digest = store.digest()
        (tmp_path / "votes.yaml").write_text(RECIPE.format(rankings="rankings.db"))
        result = CliRunner().invoke(app, ["run", "votes.yaml"])
        assert result.exit_code == 0, result.output
        later = task()
        store.add_many([later, vote(later)])
    ((found, run),) = seen
    copy = found.data.rankings.path
    assert copy == str(run.path / "rankings.db")
    assert f"{copy} is a copy of rankings.db" in result.output.replace("\n", " ")
    with Store.open(copy, read_only=True) as pinned:
        assert pinned.digest() == digest
    train, held = split_by_prompt(require(load_rankings(found.data.rankings)), 0.2)
    assert len(train) + len(held) == 6
    missing = CliRunner().invoke(app, ["run", "votes.yaml", "data.rankings=none.db", "--name", "x"])
    assert missing.exit_code == 2
    assert "no such store" in missing.output
