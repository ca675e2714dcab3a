"""Criteria (a) to (h) on made-up seeds that meet them all, and with each demand broken alone."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lora_rlhf.evaluation.best_of_n import best_of_n_kl
from lora_rlhf.evaluation.gold_protocol import ArmFacts, SeedFacts, judge
from lora_rlhf.evaluation.protocol_arms import ARMS, Job, jobs_of, overrides_of, recipe_of
from lora_rlhf.recipe_io import dump_recipe, load_recipe

PROMPTS = 400


def arm(gain: float, seed: int, **facts) -> ArmFacts:
    """Gold of mean 3 + gain exactly, and spread 0.3 over prompts."""
    noise = np.random.default_rng(seed).normal(size=PROMPTS) * 0.3
    gold = 3.0 + gain + noise - noise.mean()
    given = {"win_rate": 0.5, "kl": 4.0, "eos_rate": 1.0, "tokens": 60.0, "nats": math.log(2.0)}
    given |= facts
    won = np.full(PROMPTS, given.pop("win_rate"))
    return ArmFacts(gold=gold, proxy=gold, win_rate=won, **given)


def good(seed: int = 0) -> SeedFacts:
    arms = {
        "sft": arm(0.0, 1, kl=0.0),
        "best-of-4": arm(0.7, 2, kl=best_of_n_kl(4), nats=None),
        "best-of-16": arm(1.1, 3, kl=best_of_n_kl(16), nats=None),
        "best-of-64": arm(1.3, 4, kl=best_of_n_kl(64), nats=None),
        "ppo": arm(1.0, 5, win_rate=0.8, nats=math.log(3.0)),
        "ppo-ptx": arm(0.95, 6, nats=math.log(2.4)),
        "ppo-gold": arm(1.6, 7),
        "ppo-random": arm(0.05, 8),
    }
    reward = {"accuracy": 0.70, "bayes_accuracy": 0.73, "longer_baseline": 0.55}
    free = {
        "gold since peak": -0.4,
        "at most": -0.2,
        "proxy since peak": 0.6,
        "at least": 0.5,
        "R2": 0.95,
    }
    return SeedFacts(seed, 1.0, arms, reward, free)


def changed(name: str, gain: float | None = None, **facts) -> SeedFacts:
    """The good seed with one arm changed."""
    base = good()
    new = replace(base.arms[name], **facts)
    if gain is not None:
        new = replace(new, gold=new.gold - new.gold.mean() + 3.0 + gain)
    return replace(base, arms={**base.arms, name: new})


def verdicts(seeds) -> dict[str, bool | None]:
    return {row.letter: row.passed for row in judge(seeds)}


def test_a_world_in_which_all_works_passes_all() -> None:
    assert verdicts([good(seed) for seed in (0, 1, 2)]) == dict.fromkeys("abcdefgh", True)


BREACHES = [
    ("a", replace(good(), reward=good().reward | {"accuracy": 0.67})),
    ("a", replace(good(), reward=good().reward | {"longer_baseline": 0.66})),
    ("bh", changed("ppo", win_rate=np.full(PROMPTS, 0.64))),
    ("c", changed("best-of-4", gain=1.01)),
    ("c", changed("best-of-16", gain=1.31)),
    ("cd", changed("ppo", kl=4.01 * 3.9)),
    ("c", changed("ppo", kl=4.01 * best_of_n_kl(16))),
    ("d", changed("ppo", kl=1.9)),
    ("d", changed("ppo", eos_rate=0.94)),
    ("d", changed("ppo", tokens=44.0)),
    ("d", changed("ppo", tokens=76.0)),
    ("e", replace(good(), free=good().free | {"at most": 0.01})),
    ("e", replace(good(), free=good().free | {"at least": -0.01})),
    ("e", replace(good(), free=good().free | {"R2": 0.89})),
    ("e", replace(good(), free=good().free | {"R2": math.nan})),
    ("f", changed("ppo-ptx", nats=math.log(2.51))),
    ("f", changed("ppo-ptx", gain=0.89)),
    ("g", changed("ppo-gold", gain=0.99)),
    ("g", changed("ppo-random", gain=0.11)),
    ("g", changed("ppo-random", gain=-0.11)),
]


@pytest.mark.parametrize(
    ("broken", "facts"), BREACHES, ids=[f"{n}-{b}" for n, (b, _) in enumerate(BREACHES)]
)
def test_each_demand_broken_alone_fails_its_criterion_alone(broken: str, facts: SeedFacts) -> None:
    found = verdicts([facts])
    assert {letter for letter, passed in found.items() if passed is not True} == set(broken)
    assert all(found[letter] is False for letter in broken)


def test_too_little_gold_or_an_interval_over_nothing_fails_the_gain() -> None:
    small = changed("ppo", gain=0.49)
    assert verdicts([small])["b"] is False
    few = good()
    cut = {name: replace(a, gold=a.gold[:2]) for name, a in few.arms.items()}
    cut["ppo"] = replace(cut["ppo"], gold=cut["sft"].gold + np.array([-2.0, 4.0]))
    (row,) = [r for r in judge([replace(few, arms=cut)]) if r.letter == "b"]
    assert row.figures["gain sd"] == pytest.approx(1.0)
    assert row.figures["at least"] < 0
    assert row.passed is False


def test_a_tax_that_was_never_paid_is_not_judged() -> None:
    assert verdicts([changed("ppo", nats=math.log(1.9))])["f"] is None


def test_the_bound_of_gold_as_reward_is_told_at_the_price_of_its_kl() -> None:
    """1.6 - 1.0 of gold, less .1 for each of 4 - 2 nats more, in units of 2."""
    facts = replace(changed("ppo", kl=2.0), spread=2.0, kl_coef=0.1)
    (row,) = [r for r in judge([facts]) if r.letter == "g"]
    assert row.figures["gold reward over ppo sd"] == pytest.approx(0.3)
    assert row.figures["over ppo less KL's cost sd"] == pytest.approx((0.6 - 0.2) / 2.0)


def test_the_spread_of_single_answers_is_the_unit() -> None:
    wide = replace(good(), spread=2.5)  # the gain of 1 is 0.4 of it
    assert verdicts([wide])["b"] is False


def test_all_seeds_count_and_three_of_four_suffice() -> None:
    bad = changed("ppo", gain=-1.0, win_rate=np.full(PROMPTS, 0.2))
    rows = {row.letter: row for row in judge([good(), good(1), good(2), bad])}
    assert rows["h"].passed is True
    assert [held for held, _ in rows["b"].seeds] == [True, True, True, False]
    # The means over all seeds, the bad one with the others: (3 * 1 - 1) / 4.
    assert rows["b"].figures["gain sd"] == pytest.approx(0.5, abs=1e-9)
    assert rows["b"].figures["win rate"] == pytest.approx(0.65)
    assert {row.letter: row.passed for row in judge([good(), bad, bad])}["h"] is False
    assert verdicts([good(), good(1), bad])["h"] is False, "two of three are fewer"


def test_while_a_seed_or_an_arm_is_missing_nothing_has_passed() -> None:
    assert set(verdicts([good(), good(1), None]).values()) == {None}
    without = good()
    half = replace(without, arms={n: a for n, a in without.arms.items() if n != "ppo-random"})
    found = verdicts([half])
    assert found["g"] is None
    assert found["b"] is True


# -- arms ---------------------------------------------------------------------------------------


def test_an_arm_waits_for_its_base_and_every_base_comes_first() -> None:
    jobs = jobs_of([0, 1, 2])
    assert len(jobs) == len(set(jobs)) == 3 * len(ARMS)
    assert [job.arm for job in jobs[:3]] == ["base"] * 3
    for job in jobs:
        assert Job.parse(job.name) == job
        assert job.needs == (None if job.arm == "base" else Job(job.seed, "base"))


def test_every_arm_has_the_recipe_of_its_seed_and_one_thing_else(tmp_path) -> None:
    whole = load_recipe("gold-protocol")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(whole))
    found = {job.arm: recipe_of(tmp_path, job) for job in jobs_of([5])}
    assert {recipe.seed for recipe in found.values()} == {5}
    assert found["base"].stages == ("sft", "rank", "reward")
    assert found["ppo"].ppo == whole.ppo
    for name, arm_recipe in found.items():
        assert arm_recipe.evaluate is None
        assert arm_recipe.sft == whole.sft
        assert arm_recipe.reward == whole.reward
        if name not in ("base", "ppo"):
            assert arm_recipe.ppo != whole.ppo
    assert found["ppo-gold"].ppo.judge == "builtin:gold"
    assert found["ppo-random"].ppo.random_reward
    assert found["ppo-ptx"].ppo.ptx_coef > 0
    free = found["ppo-free"].ppo
    assert free.kl_coef == 0
    assert free.steps > whole.ppo.steps
    assert free.steps / free.keep_policies_every >= 10
    assert overrides_of("ppo", whole) == []
