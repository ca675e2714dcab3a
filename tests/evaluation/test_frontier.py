"""The laws of over-optimisation on planted coefficients, and the frontier of a small run."""

import math

import numpy as np
import pytest

from lora_rlhf import tiny
from lora_rlhf.data.batches import tokenise_prompts
from lora_rlhf.data.records import Prompt, user
from lora_rlhf.evaluation.best_of_n import best_of_n_kl
from lora_rlhf.evaluation.choosing import Chooser
from lora_rlhf.evaluation.frontier import counts_up_to, fit, fits_of, run_frontier, watch_votes
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe_io import recipe_from
from lora_rlhf.stages import evaluate
from tests.sessions import session
from tests.small_run import ROLES, small_recipe, small_run

D = np.linspace(0.0, 4.0, 13)


def law(name: str, alpha: float, beta: float, d: np.ndarray = D) -> np.ndarray:
    if name == "best_of_n":
        return d * (alpha - beta * d)
    return np.array([x * (alpha - beta * math.log(x)) if x else 0.0 for x in d])


@pytest.mark.parametrize("name", ["best_of_n", "ppo"])
def test_planted_coefficients_are_found(name: str) -> None:
    found = fit(name, D, law(name, 1.7, 0.4))
    assert found is not None
    assert (found.alpha, found.beta, found.r2) == pytest.approx((1.7, 0.4, 1.0), abs=1e-9)
    assert found.peak is not None
    fine = np.linspace(0.01, 60, 200_000)
    assert found.peak == pytest.approx(fine[law(name, 1.7, 0.4, fine).argmax()], abs=1e-3)
    other = fit("ppo" if name == "best_of_n" else "best_of_n", D, law(name, 1.7, 0.4))
    assert other is not None
    assert other.r2 < 0.999, "the other law is another curve"


@pytest.mark.parametrize("name", ["best_of_n", "ppo"])
def test_planted_coefficients_are_found_in_noise(name: str) -> None:
    """Over 200 fits the mean is the truth within 4 standard errors, and R2 is numpy's own."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(200):
        y = law(name, 1.2, 0.5) + generator.normal(size=len(D)) * 0.1
        y[0] = 0.0
        one = fit(name, D, y)
        assert one is not None
        found.append((one.alpha, one.beta))
    for column, truth in zip(np.array(found).T, (1.2, 0.5), strict=True):
        assert abs(column.mean() - truth) < 4 * column.std() / math.sqrt(200)
    predicted = law(name, one.alpha, one.beta)[1:]
    expected = 1 - ((y[1:] - predicted) ** 2).sum() / (len(predicted) * y[1:].var())
    assert one.r2 == pytest.approx(expected, abs=1e-9)


def test_a_law_that_never_turns_has_no_peak_and_few_points_no_law() -> None:
    rising = fit("best_of_n", D, 0.5 * D + 0.1 * D**2)
    assert rising is not None
    assert rising.peak is None
    assert fit("ppo", [0.0, 1.0, 2.0], [0.0, 1.0, 1.5]) is None
    assert fit("ppo", [0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.1, 0.9]) is None


def test_fits_are_of_what_was_gained_over_the_start() -> None:
    points = [
        {"kind": "ppo", "kl": d * d, "proxy": 5.0 + y, "gold": None}
        for d, y in zip(D, law("ppo", 0.9, 0.3), strict=True)
    ]
    points[3]["kl"] = D[3] ** 2
    found = fits_of(points)
    assert found["ppo"]["proxy"]["alpha"] == pytest.approx(0.9, abs=1e-9)
    assert found["ppo"]["gold"] is None
    assert found["best_of_n"] == {"proxy": None, "gold": None}


def test_counts_go_in_powers_of_two_to_the_most() -> None:
    assert counts_up_to(64) == [1, 2, 4, 8, 16, 32, 64]
    assert counts_up_to(10) == [1, 2, 4, 8, 10]
    assert counts_up_to(1) == [1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("frontier") / "small"
    run = small_run(path)
    backbone = Backbone.load(small_recipe().base)
    for role in ROLES:
        backbone.adapters.load(role, run.adapter(role))
        backbone.adapters.freeze(role)
    return session(small_recipe(), path, backbone)


@pytest.fixture(scope="module")
def prompts(made):
    records = [Prompt(user(row["prompt"])) for row in tiny.prompts(6, 0, heldout=True)]
    return tokenise_prompts(records, made.backbone.format, 64)[0]


def test_the_frontier_of_a_run_with_kept_policies(made, prompts) -> None:
    """The kept ones are sft itself and the policy: their points must say so."""
    adapters = made.backbone.adapters
    adapters.save("sft", made.run.kept_policy(4), role="policy", stage="ppo")
    adapters.save("policy", made.run.kept_policy(8), role="policy", stage="ppo")
    before = sorted(adapters.names)
    found = run_frontier(made, prompts, 4, judge="builtin:gold")
    assert sorted(adapters.names) == before
    assert made.run.summary()["frontier"] == found
    best = [p for p in found["points"] if p["kind"] == "best_of_n"]
    assert [p["n"] for p in best] == [1, 2, 4]
    assert [p["kl"] for p in best] == [best_of_n_kl(n) for n in (1, 2, 4)]
    lines = made.run.lines("evaluate/best_of_n.jsonl")[1:]
    scores = np.array([line["scores"][0] for line in lines])
    gold = np.array([line["gold"] for line in lines])
    assert scores.shape == (6, 4)
    assert best[0]["proxy"] == pytest.approx(scores.mean())
    assert best[2]["proxy"] == pytest.approx(scores.max(1).mean())
    at_best = gold[np.arange(6), scores.argmax(1)]
    assert best[2]["gold"] == pytest.approx(at_best.mean(), abs=1e-9)
    start, four, eight = (p for p in found["points"] if p["kind"] == "ppo")
    assert (start["step"], four["step"], eight["step"]) == (0, 4, 8)
    assert start["kl"] == 0.0
    assert four["kl"] == pytest.approx(0.0, abs=1e-5)
    assert eight["kl"] != pytest.approx(0.0, abs=1e-2)
    assert four["proxy"] == pytest.approx(scores[:, 0].mean(), abs=1e-4)
    low, high = eight["gold_ci"]
    assert low <= eight["gold"] <= high
    assert found["fits"]["best_of_n"] == {"proxy": None, "gold": None}  # two points off the start
    assert set(found["watch"]) == {"warned", "sentence"}


def test_without_a_judge_or_kept_policies(made, prompts, tmp_path) -> None:
    alone = session(small_recipe(), tmp_path, made.backbone)
    found = run_frontier(alone, prompts[:3], 2, chooser=Chooser(("reward",), "worst"))
    assert [p["gold"] for p in found["points"]] == [None] * 4
    assert [p.get("step") for p in found["points"]] == [None, None, 0, 1]
    assert not found["watch"]["warned"]
    assert "Not watched" in found["watch"]["sentence"]
    assert found["rule"] == "worst"


def test_the_stage_draws_it_where_the_recipe_says_so(made, tmp_path) -> None:
    raw = small_recipe().model_dump(mode="json", exclude_unset=True)
    raw["data"]["heldout_prompts"] = {"builtin": "prompts", "limit": 4}
    raw |= {"rank": {"judge": "builtin:gold"}, "reward": {}}
    raw["evaluate"] = {"prompts": 4, "frontier": 2, "judge": "builtin:gold", "best_of": 0}
    own = session(recipe_from(raw), tmp_path, made.backbone)
    evaluate.run(own)
    summary = own.run.summary()
    assert summary["frontier"]["judge"] == "builtin:gold"
    assert [p.get("n", p.get("step")) for p in summary["frontier"]["points"]] == [1, 2, 0, 1]
    assert {row["a"] for row in summary["win_rates"]} == {"base", "policy"}
    own.run.forget_from(["evaluate"])
    assert "frontier" not in own.run.summary()


def test_votes_take_the_place_of_gold_in_the_watch(made, prompts, tmp_path) -> None:
    """The policy's scores are put two spreads higher; what people say of it decides."""
    own = session(small_recipe(), tmp_path, made.backbone)
    run_frontier(own, prompts, 2)
    for file in ("best_of_n", "policies"):
        lines = own.run.lines(f"evaluate/{file}.jsonl")
        (own.run.path / f"evaluate/{file}.jsonl").unlink()
        for number, line in enumerate(lines):
            if line["step"] >= 0:
                high = 2.0 if file == "policies" else 0.0
                line["scores"] = [[high + (-1) ** (number + k) for k in range(len(line["kl"]))]]
            own.run.append(f"evaluate/{file}.jsonl", line)
    for low, rate, high, warned in ((0.4, 0.45, 0.5, True), (0.55, 0.6, 0.65, False)):
        row = {"a": "policy", "b": "sft", "judge": "human:votes.db", "win_rate": rate}
        wins = [{"a": "base", "b": "sft", "judge": "human"}, row | {"ci": [low, high]}]
        own.run.write_json("summary.json", own.run.summary() | {"win_rates": wins})
        watch_votes(own.run)
        found = own.run.summary()["frontier"]["watch"]
        assert found["warned"] is warned
        assert f"people prefer the newer on {rate:.1%}" in found["sentence"]
