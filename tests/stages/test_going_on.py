"""PPO goes on from an earlier policy, still held to the same `sft`."""

import json
from pathlib import Path

import pytest
import torch

from lora_rlhf.errors import CheckpointError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.pipeline import check_before_training
from lora_rlhf.stages import ppo, reward, sft
from lora_rlhf.training.checkpoint import role_state
from tests.sessions import session, small_recipe, write_data

# No step is large enough to move a policy, so that what comes out is what it started as.
STILL = ("ppo.learning_rate=1e-12", "ppo.keep=last", "ppo.steps=1")


class Trained:
    """`sft`, `reward` and a first `policy` of a run, on one backbone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        write_data(directory)
        recipe = small_recipe(directory, "ppo.learning_rate=0.02", "ppo.keep=last")
        self.backbone = Backbone.load(recipe.base)
        made = session(recipe, directory / "first", self.backbone)
        sft.run(made)
        reward.run(made)
        ppo.run(made)
        self.run = made.run
        self.sft, self.policy = self.weights("sft"), self.weights("policy")

    def weights(self, role: str) -> dict[str, torch.Tensor]:
        """By name, without the role's."""
        state = role_state(self.backbone, role)
        return {name.replace(f".{role}.", "."): tensor.clone() for name, tensor in state.items()}

    def again(self, path: Path, *overrides: str):
        made = session(small_recipe(self.directory, *overrides), path, self.backbone)
        ppo.run(made)
        return made.run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_it_starts_as_the_earlier_policy_and_its_kl_is_to_sft(trained, tmp_path) -> None:
    assert distance(trained.policy, trained.sft) > 1e-3
    run = trained.again(tmp_path / "on", f"ppo.start_from={trained.run.adapter('policy')}", *STILL)
    # A step of 1e-12 is lost in the rounding of fp32.
    assert distance(trained.weights("policy"), trained.policy) < 1e-7
    assert json.loads((run.adapter("policy") / "lora_rlhf.json").read_text())["parent"] == "policy"
    # What the first round measures is the earlier policy's distance from `sft`, which is not 0.
    (first,) = run.lines("ppo/metrics.jsonl")
    assert abs(first["rollout/kl"]) > 0.01


def test_without_it_a_fresh_one_starts_as_sft(trained, tmp_path) -> None:
    """The mutant of the test above: the same recipe, started from `sft`."""
    run = trained.again(tmp_path / "fresh", *STILL)
    assert distance(trained.weights("policy"), trained.sft) < 1e-7
    assert json.loads((run.adapter("policy") / "lora_rlhf.json").read_text())["parent"] == "sft"
    (first,) = run.lines("ppo/metrics.jsonl")
    # Equal weights: equal log-probs, but for rounding.
    assert abs(first["rollout/kl"]) < 1e-4


def test_only_a_policy_can_be_gone_on_from(trained, tmp_path) -> None:
    reward_adapter = trained.run.adapter("reward")
    made = session(
        small_recipe(trained.directory, f"ppo.start_from={reward_adapter}"),
        tmp_path / "reward",
        trained.backbone,
    )
    with pytest.raises(CheckpointError, match="has a scalar head, so it is no policy adapter"):
        ppo.run(made)
    made = session(
        small_recipe(trained.directory, f"ppo.start_from={tmp_path}/none"),
        tmp_path / "none-run",
        trained.backbone,
    )
    with pytest.raises(CheckpointError, match=r"ppo\.start_from: there is no adapter in"):
        check_before_training(made, ["ppo"])
    check_before_training(made, ["reward"])  # it is not read there
