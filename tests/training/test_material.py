"""What evaluates a run is what it was not trained on, wherever its held-out prompts come from."""

from pathlib import Path

import pytest

from lora_rlhf.data.records import key_of, prompt_key, user
from lora_rlhf.errors import DataError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.preferences.store import Store
from lora_rlhf.runs import TRAINED_ON
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
