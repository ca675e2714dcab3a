"""What a person may write for an arm, and what is put on the backbone for it."""

import json
import shutil

import pytest
import torch

from lora_rlhf.data.records import prompt_text
from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.evaluation.arms import ArmSpec, parse_arm, parse_arms, ready, with_shots
from lora_rlhf.training.checkpoint import role_state, save_checkpoint
from lora_rlhf.training.material import heldout_prompts, split_demonstrations
from tests.evaluation.contests import run_to_evaluate, session_of


@pytest.fixture
def run(session):
    return session.run


# -- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("base", ArmSpec("base", "base")),
        ("policy", ArmSpec("policy", "policy")),
        ("few_shot_3", ArmSpec("few_shot_3", "base", shots=3)),
        ("few_shot_3:sft", ArmSpec("few_shot_3:sft", "sft", shots=3)),
        ("best_of_4", ArmSpec("best_of_4", "sft", best_of=4)),
        ("best_of_16:policy", ArmSpec("best_of_16:policy", "policy", best_of=16)),
        ("best_of_2:few_shot_5", ArmSpec("best_of_2:few_shot_5", "base", 5, 2)),
        ("ppo@20", ArmSpec("ppo@20", "ppo@20")),
        ("again=sft", ArmSpec("again", "sft")),
        ("mine=best_of_4:ppo@7", ArmSpec("mine", "ppo@7", best_of=4)),
    ],
)
def test_an_arm_is_read_as_it_is_meant(text, spec):
    assert parse_arm(text) == spec


@pytest.mark.parametrize(
    "text", ["", "polcy", "best_of_1", "best_of_65", "few_shot_0", "ppo@", "reward", "x=nowhere/"]
)
def test_what_means_nothing_is_refused_with_what_is_allowed(text):
    with pytest.raises(ConfigError, match="Allowed"):
        parse_arm(text)


def test_paths_are_read_and_named_after_run_and_role(run, monkeypatch):
    policy = run.adapter("policy")
    assert parse_arm(str(policy)) == ArmSpec("first/policy", str(policy))
    assert parse_arm(str(run.path)).name == "first/policy"
    assert parse_arm(f"best_of_4:{policy}").name == "best_of_4:first/policy"
    assert parse_arm(f"old={policy}") == ArmSpec("old", str(policy))
    assert parse_arm(str(run.adapter("sft"))).name == "first/sft"
    monkeypatch.chdir(run.path)
    assert parse_arm("ppo/adapter") == ArmSpec("first/policy", "ppo/adapter")


def test_a_recipe_names_no_paths(run):
    """A page may change a recipe, and must not make the server read files."""
    with pytest.raises(ConfigError, match="cannot stand in a recipe"):
        parse_arms(["policy", str(run.adapter("policy"))], paths=False)
    assert [a.name for a in parse_arms(["base", "few_shot_2"], paths=False)] == [
        "sft",
        "base",
        "few_shot_2",
    ]


def test_the_reference_is_an_arm_and_names_are_told_apart():
    assert [a.name for a in parse_arms(["policy"], "base")] == ["base", "policy"]
    assert [a.name for a in parse_arms(["policy", "sft"])] == ["policy", "sft"]
    with pytest.raises(ConfigError, match="again=policy"):
        parse_arms(["policy", "policy"])


# -- adapters -----------------------------------------------------------------------------------


def weights(session, name):
    return torch.cat([v.flatten() for v in role_state(session.backbone, name).values()])


def test_an_adapter_from_elsewhere_is_the_same_arm_as_the_one_it_is_a_copy_of(
    run, session, tmp_path
):
    elsewhere = tmp_path / "taken"
    shutil.copytree(run.adapter("policy"), elsewhere)
    arms = ready(session, parse_arms(["policy", str(elsewhere), f"best_of_2:{elsewhere}"]))
    sft, policy, copy, best = arms
    assert copy.adapter not in ("sft", "policy", None)
    assert torch.equal(weights(session, copy.adapter), weights(session, "policy"))
    assert copy.identity == policy.identity != sft.identity
    assert best.adapter == copy.adapter, "one source is loaded once"
    assert best.identity != copy.identity
    assert not torch.equal(weights(session, "policy"), weights(session, "sft"))


def test_an_adapter_of_another_backbone_is_refused(run, session, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(run.adapter("policy"), foreign)
    facts = json.loads((foreign / "lora_rlhf.json").read_text())
    facts["fingerprint"] |= {"model": "other/model", "weights": "0" * 16}
    (foreign / "lora_rlhf.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"other/model.*weights differ"):
        ready(session, parse_arms([str(foreign)]))


def test_checkpoints_of_ppo_and_of_an_unfinished_stage(run, session):
    kept = run.kept_policy(20)
    shutil.copytree(run.adapter("policy"), kept)
    moved = {k: v + 0.5 for k, v in role_state(session.backbone, "policy").items()}
    save_checkpoint(run, "ppo", 30, {"trainer": {"policy": moved}})
    sft = {k: v - 0.5 for k, v in role_state(session.backbone, "sft").items()}
    save_checkpoint(run, "sft", 5, {"role": sft})
    _, at_20, at_30, at_5 = ready(session, parse_arms(["ppo@20", "ppo@30", "sft@5"]))
    policy = weights(session, "policy")
    assert torch.equal(weights(session, at_20.adapter), policy)
    assert torch.allclose(weights(session, at_30.adapter), policy + 0.5, atol=1e-6)
    assert torch.allclose(weights(session, at_5.adapter), weights(session, "sft") - 0.5, atol=1e-6)
    assert len({a.identity for a in (at_20, at_30, at_5)}) == 3
    with pytest.raises(CheckpointError, match=r"It has: ppo@20, ppo@30"):
        ready(session, parse_arms(["ppo@40"]))


def test_best_of_n_needs_somebody_who_chooses(tmp_path):
    without = run_to_evaluate(tmp_path / "plain", roles=("sft", "policy"))
    session = session_of(without)
    with pytest.raises(ConfigError, match="chosen by the reward adapter"):
        ready(session, parse_arms(["best_of_4"]))
    less = session_of(run_to_evaluate(tmp_path / "less", roles=("sft",)))
    with pytest.raises(CheckpointError, match="Leave the arm out"):
        ready(less, parse_arms(["policy"]))


# -- few-shot -----------------------------------------------------------------------------------


def test_shots_are_whole_demonstrations_before_the_prompt_and_none_is_held_out(session):
    prompts = heldout_prompts(session, 4)
    form = session.backbone.format
    demos, _ = split_demonstrations(session)
    for shots in (1, 3):
        for ids, (_, prompt) in zip(with_shots(session, prompts, shots), prompts, strict=True):
            text = form.tokenizer.decode(ids)
            assert text.count(prompt_text(prompt.messages)) == 1
            before, _, _ = text.partition(prompt_text(prompt.messages))
            used = [d for d in demos if d.response in before and prompt_text(d.prompt) in before]
            assert len(used) >= shots
            assert ids[: ids.index(form.end_id)].count(form.tokenizer.bos_token_id) <= 1
            assert form.prompt_ids(prompt.messages)[-8:] == ids[-8:]
    assert with_shots(session, prompts, 0) == [ids for ids, _ in prompts]


def test_too_many_shots_are_refused_before_anything_is_decoded(session):
    with pytest.raises(ConfigError, match="few_shot_64"):
        with_shots(session, heldout_prompts(session, 2), 64)
