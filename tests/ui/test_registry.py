"""Which adapters the app knows, read off run directories that hold no real weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.errors import CheckpointError
from lora_rlhf.runs import Run
from ui.registry import Registry

FINGERPRINT = {"model": "tiny", "weights": "w0", "quantization": "nf4", "template": "t0"}
ROLES = ("sft", "reward", "policy", "value")


def made(path: Path, roles: tuple[str, ...] = ROLES, content: str = "", **print_: Any) -> Run:
    """A run whose adapters are the names of their roles; `content` makes them others."""
    run = Run(path)
    for role in roles:
        place = run.adapter(role)
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text("{}")
        (place / "adapter_model.safetensors").write_text(content + role)
        facts = {"fingerprint": FINGERPRINT | print_}
        (place / "lora_rlhf.json").write_text(json.dumps(facts))
    return run


def test_names_are_run_and_role_and_the_value_function_is_none(tmp_path: Path) -> None:
    registry = Registry([made(tmp_path / "my.run-1.2")])
    assert [e.name for e in registry.entries] == [
        "my.run-1.2/sft",
        "my.run-1.2/reward",
        "my.run-1.2/policy",
    ]
    policy = registry.entries[-1]
    assert (policy.role, policy.run) == ("policy", tmp_path / "my.run-1.2")
    assert policy.path == tmp_path / "my.run-1.2/ppo/adapter"
    assert policy.sha256 == hashlib.sha256(b"policy").hexdigest()
    assert registry.answerers == ["base", "my.run-1.2/sft", "my.run-1.2/policy"]
    assert registry.reward == "my.run-1.2/reward"


def test_several_runs_stand_oldest_first_and_the_last_reward_scores(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, content=name) for name in ("one", "two")]
    registry = Registry(runs)
    assert registry.answerers == ["base", "one/sft", "one/policy", "two/sft", "two/policy"]
    assert registry.reward == "two/reward"
    assert registry.scorers == ["one/reward", "two/reward"]
    before = registry.version
    registry.add(made(tmp_path / "three", content="3"))
    assert registry.version > before
    assert registry.reward == "three/reward"


def test_a_copied_sft_is_offered_once_and_is_the_reference_of_its_run(tmp_path: Path) -> None:
    registry = Registry([made(tmp_path / "one"), made(tmp_path / "two", ("sft", "reward"))])
    assert registry.answerers == ["base", "one/sft", "one/policy"]
    assert registry.reference_of("two/policy") == "two/sft"


def test_kl_is_measured_from_the_sft_beside_or_else_the_first(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / "rl", ("policy",)),
        made(tmp_path / "one", content="1"),
        made(tmp_path / "two", content="2"),
    ]
    registry = Registry(runs)
    assert [registry.reference_of(n) for n in ("two/policy", "two/sft", "rl/policy", "base")] == [
        "two/sft",
        "two/sft",
        "one/sft",
        "one/sft",
    ]
    assert Registry([runs[0]]).reference_of("rl/policy") is None
    assert Registry([runs[0]]).reward is None


def test_a_run_without_adapters_adds_nothing(tmp_path: Path) -> None:
    registry = Registry([made(tmp_path / "empty", ())])
    assert (registry.answerers, registry.version) == (["base"], 0)


# -- other backbones ----------------------------------------------------------------------------


@pytest.mark.parametrize("differs", ["weights", "quantization", "template"])
def test_another_backbone_is_refused_in_one_sentence(tmp_path: Path, differs: str) -> None:
    one = made(tmp_path / "one")
    other = made(tmp_path / "other", **{differs: "x1", "model": "big"})
    for open_both in (lambda: Registry([one, other]), lambda: Registry([one]).add(other)):
        with pytest.raises(CheckpointError) as refused:
            open_both()
        said = str(refused.value)
        for part in (str(one.path), str(other.path), "tiny", "big", f"{differs} differ"):
            assert part in said


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    registry = Registry([made(tmp_path / "one")])
    before = (registry.answerers, registry.version, registry.loaded)
    mixed = made(tmp_path / "mixed", content="m")
    facts = mixed.adapter("policy") / "lora_rlhf.json"  # the last of its adapters alone is odd
    facts.write_text(json.dumps({"fingerprint": FINGERPRINT | {"weights": "w1"}}))
    with pytest.raises(CheckpointError):
        registry.add(mixed)
    assert (registry.answerers, registry.version, registry.loaded) == before


def test_the_name_of_the_model_alone_is_no_difference(tmp_path: Path) -> None:
    moved = made(tmp_path / "two", content="2", model="/elsewhere/tiny")
    assert "two/policy" in Registry([made(tmp_path / "one"), moved]).answerers


def test_adapters_of_other_tools_have_no_fingerprint_and_are_let_through(tmp_path: Path) -> None:
    run = made(tmp_path / "trl", ("policy",), content="t")
    (run.adapter("policy") / "lora_rlhf.json").unlink()
    assert "trl/policy" in Registry([made(tmp_path / "one"), run]).answerers


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fingerprint": {}}', '{"fingerprint": 7}'])
def test_a_damaged_fingerprint_is_the_users_mistake(tmp_path: Path, text: str) -> None:
    run = made(tmp_path / "one")
    (run.adapter("sft") / "lora_rlhf.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        Registry([run])


def test_weights_are_read_as_safetensors_alone(tmp_path: Path) -> None:
    run = made(tmp_path / "one")
    weights = run.adapter("policy") / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="safetensors"):
        Registry([run])


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    """Votes are stored under names: these would be taken for one policy's."""
    one = made(tmp_path / "a" / "quick")
    other = made(tmp_path / "b" / "quick", content="other")
    with pytest.raises(CheckpointError, match="one name"):
        Registry([one, other])
    registry = Registry([one])
    assert registry.add(Run(tmp_path / "b" / ".." / "a" / "quick"))  # the same, said otherwise


def test_adding_again_is_harmless_and_takes_what_is_new(tmp_path: Path) -> None:
    run = made(tmp_path / "one", ("sft", "reward"))
    registry = Registry([run, made(tmp_path / "two", content="2")])
    names = registry.answerers
    assert registry.add(run) == ["one/sft", "one/reward"]
    assert registry.answerers == names
    made_policy = made(tmp_path / "x", ("policy",), content="p")
    made_policy.adapter("policy").rename(run.stage("ppo") / "adapter")
    registry.add(run)
    assert registry.answerers == [*names, "one/policy"]


# -- candidates ---------------------------------------------------------------------------------


def test_candidates_score_and_are_offered_to_nobody(tmp_path: Path) -> None:
    registry = Registry([made(tmp_path / "one")])
    new = made(tmp_path / "new", content="n")
    before = (registry.answerers, registry.entries, registry.version, registry.reward)
    registry.put(registry.read(new), offered=False)
    assert (registry.answerers, registry.entries, registry.version, registry.reward) == before
    assert registry.scorers == ["one/reward", "new/reward"]
    assert [e.name for e in registry.loaded][3:] == ["new/sft", "new/reward", "new/policy"]
    assert registry.drop(new.path) == ["new/sft", "new/reward", "new/policy"]
    assert registry.drop(new.path) == []
    assert registry.scorers == ["one/reward"]


def test_an_adopted_candidate_is_one_adapter(tmp_path: Path) -> None:
    registry = Registry([made(tmp_path / "one")])
    new = made(tmp_path / "new", content="n")
    registry.put(registry.read(new), offered=False)
    registry.put(registry.read(new))
    assert len(registry.loaded) == 6
    assert registry.answerers[-1] == "new/policy"
    assert registry.drop(new.path) == []


def test_considering_what_is_offered_cannot_lose_it(tmp_path: Path) -> None:
    run = made(tmp_path / "one")
    registry = Registry([run])
    registry.put(registry.read(run), offered=False)
    assert len(registry.loaded) == 3
    assert registry.drop(run.path) == []
    assert registry.answerers == ["base", "one/sft", "one/policy"]
