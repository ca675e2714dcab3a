"""The card of a reward adapter on a backbone: read off real passes, kept, and made only once."""

import pytest

from lora_rlhf.evaluating import _require_health
from lora_rlhf.evaluation.probes import policy_scores
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.stages.reward import rankings
from lora_rlhf.training.reward_report import examine, score_groups
from tests.sessions import session, small_recipe, write_data
from tests.small import randomise


@pytest.fixture
def made(tmp_path):
    """A session whose adapters are random, so that the reward model knows nothing."""
    write_data(tmp_path)
    recipe = small_recipe(tmp_path)
    backbone = Backbone.load(recipe.base)
    for number, role in enumerate(("sft", "reward", "policy")):
        backbone.adapters.add(role, recipe.lora)
        randomise(backbone, role, number, 0.05)
    backbone.adapters.add_head("reward", seed=1).normalise(mean=0.3, spread=0.02)
    return session(recipe, tmp_path / "run", backbone)


def test_the_card_agrees_with_the_report_of_the_reward_stage(made):
    _require_health(made)
    card = made.run.summary()["health"]
    _, heldout = rankings(made)
    scores = [s.tolist() for s in score_groups(made, heldout)]
    report = examine(made, heldout, scores)
    assert card["accuracy"]["value"] == pytest.approx(report["accuracy"], abs=1e-12)
    assert card["accuracy"]["n"] == report["pairs"]
    assert [card["accuracy"][k] for k in ("low", "high")] == report["accuracy_ci"]
    assert card["length_correlation"] == pytest.approx(report["length_correlation"], abs=1e-12)
    # Its chances are those of the unnormalised scores: the spread of .02 must not enter them.
    bins = card["calibration"]
    mean = sum(b["predicted"] * b["n"] for b in bins) / sum(b["n"] for b in bins)
    assert mean == pytest.approx(report["calibration"]["predicted"], abs=1e-9)
    questions = {group.question for group in heldout}
    assert {d["prompt"] for d in card["disagreements"]} <= questions


def test_it_holds_scores_of_all_and_is_made_once(made):
    _require_health(made)
    card = made.run.summary()["health"]
    counts = {k: sum(v) for k, v in card["scores"].items() if k != "bins"}
    assert set(counts) == {"demonstrations", "sft", "policy"}
    assert counts["sft"] == counts["policy"] > 0
    assert len(card["degenerate"]) == 4
    assert made.run.lines("reward/scores.jsonl")[0]["of"] == "demonstrations"
    assert policy_scores(made) == card["scores"], "the same seeds give the same answers"
    made.run.write_json("summary.json", {"health": {"kept": True}})
    _require_health(made)
    assert made.run.summary()["health"] == {"kept": True}


def test_rankings_that_have_gone_stop_no_evaluation(made, tmp_path):
    (tmp_path / "rankings.jsonl").unlink()
    _require_health(made)
    assert "health" not in made.run.summary()
    assert "no health card" in made.console.file.getvalue()
