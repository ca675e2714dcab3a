"""The reward model goes on from an earlier one, and learns from a store of rankings."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from lora_rlhf.data.records import Ranking, user
from lora_rlhf.errors import CheckpointError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.pipeline import check_before_training
from lora_rlhf.preferences.imports import to_events
from lora_rlhf.preferences.store import Store
from lora_rlhf.stages import reward, sft
from lora_rlhf.training.rollout import score_answers
from tests.sessions import session, small_recipe, write_data

# No step is large enough to move a score.
STILL = ("reward.learning_rate=1e-12", "reward.normalize_on=none")
PROMPTS = ["What does the brush look like?", "Tell me of a cup."]
ANSWERS = ["It is a small brush.", "The cup is blue and old."]


class Trained:
    """`sft` and a first `reward` of a run, on one backbone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        write_data(directory)
        recipe = small_recipe(directory)
        self.backbone = Backbone.load(recipe.base)
        made = session(recipe, directory / "first", self.backbone)
        sft.run(made)
        reward.run(made)
        self.adapter = made.run.adapter("reward")
        self.scores = self.score()

    def score(self) -> torch.Tensor:
        form = self.backbone.format
        prompts = [form.prompt_ids(user(text)) for text in PROMPTS]
        responses = [form.response_ids(text) for text in ANSWERS]
        return score_answers(self.backbone, prompts, responses, 10_000)

    def again(self, path: Path, *overrides: str):
        made = session(small_recipe(self.directory, *overrides), path, self.backbone)
        reward.run(made)
        return made.run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def facts_of(run) -> dict:
    return json.loads((run.adapter("reward") / "lora_rlhf.json").read_text())


def test_it_starts_as_the_earlier_one_head_and_normalisation_included(trained, tmp_path) -> None:
    run = trained.again(tmp_path / "on", f"reward.start_from={trained.adapter}", *STILL)
    # fp32, and a step of 1e-12 of each weight
    torch.testing.assert_close(trained.score(), trained.scores, rtol=1e-5, atol=1e-6)
    assert facts_of(run)["parent"] == "reward"


def test_without_it_a_fresh_one_starts_as_sft(trained, tmp_path) -> None:
    """The mutant of the test above: the same recipe, started from `sft`."""
    run = trained.again(tmp_path / "fresh", *STILL)
    assert (trained.score() - trained.scores).abs().max() > 0.1
    assert facts_of(run)["parent"] == "sft"


def test_only_a_reward_adapter_can_be_gone_on_from(trained, tmp_path) -> None:
    made = session(
        small_recipe(trained.directory, f"reward.start_from={trained.directory}/first/sft/adapter"),
        tmp_path / "sft",
        trained.backbone,
    )
    with pytest.raises(CheckpointError, match="has no scalar head, so it is no reward adapter"):
        reward.run(made)
    made = session(
        small_recipe(trained.directory, f"reward.start_from={tmp_path}/none"),
        tmp_path / "none-run",
        trained.backbone,
    )
    with pytest.raises(CheckpointError, match=r"reward\.start_from: there is no adapter in"):
        check_before_training(made, ["reward"])
    check_before_training(made, ["ppo"])  # it is not read there


def test_a_store_is_split_by_prompt_and_named_by_its_digest(trained, tmp_path) -> None:
    path = tmp_path / "rankings.db"
    with Store.open(path) as store:
        for i in range(12):
            ranking = Ranking(user(f"Tell me of cup {i}."), (*ANSWERS, "no"), ((1,), (0, 2)))
            store.add_many(to_events(ranking, "import:test", "ana"))
        digest = store.digest()
    run = trained.again(tmp_path / "store", f"data.rankings={{path: {path}}}", "reward.epochs=1")
    data = facts_of(run)["data"]
    assert data["rankings_digest"] == digest
    assert data["rankings_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data["train"] + data["heldout"] == 12
    # Prompts of the store are those of training, of which the plain split holds out none.
    assert data["heldout"] >= 2
    assert run.summary()["reward"]["data"] == data
