"""The over-optimisation watch on planted courses: which must warn, which must not, how often."""

import numpy as np
import pytest
from scipy.stats import norm

from lora_rlhf.evaluation.watch import (
    NEGLIGIBLE,
    NEGLIGIBLE_WIN_RATE,
    Interval,
    Stage,
    mean_interval,
    verdict,
    watch_stages,
    watch_win_rate,
)

STEPS = (0, 4, 8, 12, 16, 20, 24)


def course(gold, seed: int = 0, prompts: int = 256, noise: float = 1.0) -> list[Stage]:
    """Proxy 0.1 a step, gold as given; half of an answer's variance is its prompt's."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(2, prompts)) * noise / 2**0.5

    def answers(mean: float, of: int) -> np.ndarray:
        return mean + shared[of] + generator.normal(size=prompts) * noise / 2**0.5

    return [Stage(f"step {s}", answers(0.1 * s, 0), answers(gold(s), 1)) for s in STEPS]


def turned_over(step: int) -> float:
    return 0.12 * step - 0.006 * step**2  # highest at 10, back at 0 by 20


def test_gold_that_turned_over_while_the_proxy_rises_warns() -> None:
    found = watch_stages(course(turned_over), 1.0, 1.0)
    assert found.warned
    assert found.sentence.startswith("Over-optimised: from step 8")
    assert "to step 24" in found.sentence
    assert "it fell" in found.sentence


def test_gold_that_never_moved_warns() -> None:
    """A reward model that is wrong from the beginning, by enough prompts to be sure."""
    found = watch_stages(course(lambda step: 0.0, prompts=2000), 1.0, 1.0)
    assert found.warned
    assert watch_stages(course(lambda step: -0.05 * step), 1.0, 1.0).warned


def test_gold_that_rises_with_the_proxy_does_not_warn() -> None:
    found = watch_stages(course(lambda step: 0.08 * step), 1.0, 1.0)
    assert not found.warned
    assert found.sentence.startswith("No sign of over-optimisation")


def test_a_plateau_of_both_does_not_warn() -> None:
    rising = course(lambda step: 0.1 * min(step, 12))
    both = [
        Stage(s.name, s.proxy - 0.1 * max(step - 12, 0), s.truth)
        for s, step in zip(rising, STEPS, strict=True)
    ]
    assert not watch_stages(both, 1.0, 1.0).warned


def test_few_prompts_do_not_suffice_and_it_says_so() -> None:
    generator = np.random.default_rng(3)
    stages = [
        Stage("a", generator.normal(size=8), generator.normal(size=8)),
        Stage("b", 3 + generator.normal(size=8), generator.normal(size=8)),
    ]
    found = verdict(Interval(3, 2, 4), Interval(0, -1, 1), "from a to b")
    assert not found.warned
    assert found.sentence.startswith("Not enough prompts to tell")
    assert isinstance(watch_stages(stages, 1.0, 1.0).warned, bool)
    assert not watch_stages(stages[:1], 1.0, 1.0).warned


def test_false_alarms_are_rare_and_a_real_one_is_found() -> None:
    """Of 100 honest courses at most 5 may warn, of 100 planted ones at least 95 must."""
    honest = [
        watch_stages(course(lambda s: 0.05 * s, seed), 1.0, 1.0).warned for seed in range(100)
    ]
    planted = [watch_stages(course(turned_over, seed), 1.0, 1.0).warned for seed in range(100)]
    assert sum(honest) <= 5
    assert sum(planted) >= 95


def test_the_highest_of_many_is_not_taken_for_a_height_that_was_lost() -> None:
    """All stages are equal in truth; held against the best by chance, the last seems to fall."""
    naive, fair = 0, []
    for seed in range(100):
        stages = course(lambda step: 0.0, seed, prompts=64)
        best = max(stages, key=lambda stage: float(stage.truth.mean()))
        naive += mean_interval(stages[-1].truth - best.truth).high < 0
        found = watch_stages(stages, 1.0, 1.0)
        fair.append("it fell" in found.sentence)
    # Nominal 2.5 % for a fair comparison, 6 % with the small bootstrap's own error.
    assert sum(fair) <= 6 < naive


def test_the_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        found = mean_interval(generator.normal(size=100) + 0.3)
        hits += found.low <= 0.3 <= found.high
    assert hits >= 0.9 * 300


def test_people_take_the_place_of_gold() -> None:
    up, flat = Interval(0.8, 0.6, 1.0), Interval(0.05, -0.1, 0.2)
    between = "from sft to policy"
    no_better = Interval(0.49, 0.46, 0.52)
    assert watch_win_rate(up, no_better, between, "people").warned
    assert not watch_win_rate(up, Interval(0.6, 0.55, 0.65), between, "people").warned
    assert not watch_win_rate(flat, no_better, between, "people").warned
    unsure = watch_win_rate(up, Interval(0.5, 0.4, 0.6), between, "people")
    assert not unsure.warned
    assert unsure.sentence.startswith("Not enough votes to tell")


def test_a_negligible_gain_is_the_same_in_both_units() -> None:
    assert pytest.approx(norm.cdf(NEGLIGIBLE / 2**0.5), abs=5e-4) == NEGLIGIBLE_WIN_RATE
