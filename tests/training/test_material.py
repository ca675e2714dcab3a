"""What evaluates a run is what it was not trained on, wherever its held-out prompts come from."""

import json
from pathlib import Path

import pytest

from lora_rlhf.data.records import key_of, prompt_key, user
from lora_rlhf.errors import DataError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import Recipe
from lora_rlhf.recipe_io import dump_recipe
from lora_rlhf.runs import TRAINED_ON, Run, write_atomically
from lora_rlhf.stages import reward
from lora_rlhf.training.material import (
    all_heldout_prompts,
    heldout_prompts,
    sort_prompts,
    training_prompts,
)
from lora_rlhf.training.session import Session
from tests.preferences.making import task, vote
from tests.sessions import session, small_recipe, write_data

ANSWERS = [{"text": "A cup."}, {"text": "A hat."}]
# Held-out prompts: a part of data.prompts, a part of the demonstrations, a source of their own.
BRANCHES = {
    "prompts": (),
    "demonstrations": ("data.prompts=null",),
    "own source": ("data.heldout_prompts={builtin: prompts, limit: 12}",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("data")
    write_data(directory)
    return directory


@pytest.fixture(scope="module")
def backbone(folder) -> Backbone:
    return Backbone.load(small_recipe(folder).base)


def keys(prompts) -> list[str]:
    return [key_of(prompt) for _, prompt in prompts]


def store_of(path: Path, texts: list[str], source: str = "typed") -> str:
    with Store.open(path) as store:
        for text in texts:
            shown = task(ANSWERS, prompt=text, prompt_source=source)
            store.add_many([shown, vote(shown)])
    return str(path)


def finished(path: Path, recipe: Recipe) -> Run:
    """A run as far as others look at it."""
    run = Run(path)
    write_atomically(path / "recipe.yaml", dump_recipe(recipe))
    return run


@pytest.fixture(params=BRANCHES)
def opened(request, folder, backbone, tmp_path):
    """Makes a session with that branch's held-out prompts and more overrides."""

    def make(*overrides: str) -> Session:
        recipe = small_recipe(folder, *BRANCHES[request.param], *overrides)
        return session(recipe, tmp_path / "run", backbone)

    return make


def test_a_ranking_of_a_held_out_prompt_takes_it_out_of_the_evaluation(opened, tmp_path) -> None:
    clean = all_heldout_prompts(opened())
    assert len(clean) >= 5
    ranked = [clean[i][1].messages[0]["content"] for i in (0, 2)]
    others = [f"Describe hat {i}." for i in range(6)]
    mixed = opened(f"data.rankings={store_of(tmp_path / 'r.db', ranked + others)}")
    expected = keys(clean)[1:2] + keys(clean)[3:]
    assert keys(all_heldout_prompts(mixed)) == expected
    assert keys(heldout_prompts(mixed, 2)) == expected[:2]
    unseen, known, trained = sort_prompts(mixed)
    assert unseen == set(expected)
    assert known == {prompt_key(user(text)) for text in ranked}
    assert trained >= known | {prompt_key(user(text)) for text in others}
    assert trained >= set(keys(training_prompts(mixed)))
    assert not trained & unseen
    assert f"2 of {len(clean)} are trained on and left out" in mixed.console.file.getvalue()
    with pytest.raises(DataError, match=f"but there are {len(expected)}"):
        heldout_prompts(mixed, len(clean))


def test_what_the_run_before_was_trained_on_stays_out(opened) -> None:
    made = opened()
    clean = keys(all_heldout_prompts(made))
    made.run.write_json("summary.json", {"retraining": {TRAINED_ON: clean[1:3]}})
    assert keys(all_heldout_prompts(made)) == clean[:1] + clean[3:]
    unseen, known, _ = sort_prompts(made)
    assert (unseen, known) == (set(clean[:1] + clean[3:]), set(clean[1:3]))


def test_what_it_goes_on_from_by_start_from_stays_out(opened, folder, tmp_path) -> None:
    """A run that goes on from a second, which goes on from a third: all that they knew."""
    clean = keys(all_heldout_prompts(opened()))
    prompts = {key_of(p): p.messages[0]["content"] for _, p in all_heldout_prompts(opened())}
    two = tmp_path / "two.jsonl"  # it trains on one of them, and holds the nearer hash out
    two.write_text("".join(json.dumps({"prompt": prompts[k]}) + "\n" for k in clean[4:6]))
    third = small_recipe(
        folder,
        f"data.prompts={{path: {two}}}",
        f"data.rankings={store_of(tmp_path / 'r.db', [prompts[clean[0]]])}",
    )
    finished(tmp_path / "third", third)
    asked = tmp_path / "p.jsonl"
    asked.write_text("".join(json.dumps({"prompt": prompts[k]}) + "\n" for k in clean[1:3]))
    own = tmp_path / "d.jsonl"
    own.write_text(json.dumps({"prompt": "Describe a hat.", "response": "It is red."}) + "\n")
    second = small_recipe(
        folder,
        f"data.prompts={{path: {asked}}}",
        f"data.demonstrations={{path: {own}}}",
        f"data.rankings={store_of(tmp_path / 's.db', ['Describe a hat.'])}",
        "data.heldout_prompts={builtin: prompts, limit: 2}",
        f"reward.start_from={tmp_path / 'third/reward/adapter'}",
    )
    finished(tmp_path / "second", second).write_json(
        "summary.json", {"retraining": {TRAINED_ON: [clean[3]]}}
    )
    first = opened(f"ppo.start_from={tmp_path / 'second/ppo/policies/step-000002'}")
    gone = {*clean[:4], max(clean[4:6])}
    assert keys(all_heldout_prompts(first)) == [key for key in clean if key not in gone]
    assert sort_prompts(first)[1] >= gone


def test_data_of_a_run_gone_on_from_that_are_gone_are_said(opened, folder, tmp_path) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text(json.dumps({"prompt": "Describe a hat."}) + "\n")
    before = small_recipe(folder, f"data.prompts={{path: {source}}}",
                          "data.heldout_prompts={builtin: prompts, limit: 2}")  # fmt: skip
    finished(tmp_path / "before", before)
    source.unlink()
    made = opened(f"reward.start_from={tmp_path / 'before/reward/adapter'}")
    assert keys(all_heldout_prompts(made)) == keys(all_heldout_prompts(opened()))
    said = made.console.file.getvalue()
    assert f"{tmp_path / 'before'}, which this goes on from" in said.replace("\n", "")
    assert "mine.jsonl" in said.replace("\n", "")


def test_evaluating_on_the_prompts_of_the_rankings_file_goes_on(folder, backbone, tmp_path) -> None:
    """Demonstrations and rankings of the very same prompts: each holds out the same of them."""
    made = session(small_recipe(folder, "data.prompts=null"), tmp_path, backbone)
    expected = all_heldout_prompts(
        session(small_recipe(folder, "data.prompts=null", "data.rankings=null", "reward=null",
                             "ppo=null"), tmp_path / "alone", backbone)
    )  # fmt: skip
    assert keys(all_heldout_prompts(made)) == keys(expected) != []
    assert sort_prompts(made)[1] == set()


def test_the_reward_stage_says_what_it_leaves_out_for_the_app(folder, backbone, tmp_path) -> None:
    path = store_of(tmp_path / "r.db", [f"Describe cup {i}." for i in range(8)])
    store_of(tmp_path / "r.db", ["Describe hat 1.", "Describe hat 2."], "pool:heldout#1")
    made = session(small_recipe(folder, f"data.rankings={path}"), tmp_path / "run", backbone)
    train, held = reward.rankings(made)
    assert len(train) + len(held) == 8
    log = (tmp_path / "run" / "train.log").read_text()
    assert "2 rankings left out (on a prompt that the app holds out)" in log
    assert "data.rankings.heldout=true" in log
    wanted = small_recipe(folder, f"data.rankings={{path: {path}, heldout: true}}")
    train, held = reward.rankings(session(wanted, tmp_path / "other", backbone))
    assert len(train) + len(held) == 10
