"""Win rates against closed forms, another library and simulated truths."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from lora_rlhf.evaluation.facts import Arm, describe, distinct_2
from lora_rlhf.evaluation.winrates import (
    Outcome,
    bootstrap_mean,
    bootstrap_share,
    length_controlled,
    outcomes_of,
    prompts_needed,
    win_rate,
)
from lora_rlhf.model.generation import Answer
from lora_rlhf.preferences.intervals import wilson
from lora_rlhf.preferences.ratings import votes_needed


def outcomes(values, gaps=None):
    longer = gaps if gaps is not None else [0.0] * len(values)
    return [
        Outcome(str(i), float(v), float(g))
        for i, (v, g) in enumerate(zip(values, longer, strict=True))
    ]


# -- the raw figure -----------------------------------------------------------------------------


def test_an_arm_against_itself_wins_half_of_the_time():
    same = [1.0, 2.0, 3.0]
    found = win_rate(outcomes_of(["a", "b", "c"], same, same))
    assert found["win_rate"] == 0.5
    # Wilson's of 3: 1.96 sqrt(0.25 / 3 + 1.96^2 / 36) / (1 + 1.96^2 / 3) to either side.
    assert found["ci"] == pytest.approx([0.5 - 0.3747, 0.5 + 0.3747], abs=1e-4)
    assert found["ties"] == found["prompts"] == 3


def test_wins_are_counted_by_prompt_with_ties_as_halves():
    found = win_rate(outcomes_of("abcd", [2.0, 1.0, 5.0, 0.0], [1.0, 1.0, 9.0, -1.0]))
    assert found["win_rate"] == 2.5 / 4
    assert found["ties"] == 1
    assert found["ci"][0] <= found["win_rate"] <= found["ci"][1]


def test_the_bootstrap_interval_is_the_binomial_one():
    """100 of 400: the normal approximation .25 +- 1.96 sqrt(.25 .75 / 400)."""
    low, high = bootstrap_mean([1.0] * 100 + [0.0] * 300)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=4e-3)
    assert high == pytest.approx(0.25 + half, abs=4e-3)


def test_the_bootstrap_draws_prompts_and_not_votes():
    """Ten votes of one mind on each of 40 prompts are 40 observations, not 400."""
    clusters = [[1.0] * 10] * 20 + [[0.0] * 10] * 20
    low, high = bootstrap_share(clusters)
    half = 1.96 * math.sqrt(0.25 / 40)
    # 4 000 draws of a share in steps of 1/40: a step and a half.
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.04)  # reason: steps of 1/40
    votes = [[value] for cluster in clusters for value in cluster]
    narrow = bootstrap_share(votes)
    assert narrow[1] - narrow[0] < 0.4 * (high - low), "as if each vote were a prompt"


def test_who_always_wins_gets_the_interval_of_as_many_prompts_and_not_a_point():
    for wins in (3, 30):
        low, high = bootstrap_mean([1.0] * wins)
        textbook = stats.binomtest(wins, wins).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((textbook.low, textbook.high), abs=1e-9)
        low, high = bootstrap_mean([0.0] * wins)
        assert (low, high) == pytest.approx((1 - textbook.high, 1 - textbook.low), abs=1e-9)


@pytest.mark.parametrize("clusters", [[[1.0] * 6 + [0.0] * 3], [[0.5]] * 5, [[1.0, 0.0]] * 7])
def test_alike_prompts_give_the_interval_of_as_many_and_not_a_point(clusters):
    values = [value for cluster in clusters for value in cluster]
    low, high = bootstrap_share(clusters)
    assert (low, high) == wilson(sum(values) / len(values), len(clusters))
    assert high - low > 0.3


def test_where_all_tie_no_number_of_prompts_is_named():
    assert win_rate(outcomes([0.5] * 5))["prompts_needed_55"] is None
    assert win_rate(outcomes([0.5] * 4 + [1.0]))["prompts_needed_55"] == math.ceil(785 / 5)


def test_intervals_cover_the_truth_where_prompts_differ():
    """Outcomes 1, 1/2, 0 with chances that vary by prompt; truth is their mean, 300 runs."""
    chance, runs, prompts = np.random.default_rng(5), 300, 100
    covered = 0
    for _ in range(runs):
        better = chance.beta(1.2, 0.8, prompts)  # mean 0.6
        drawn = (chance.random(prompts) < better).astype(float)
        drawn[chance.random(prompts) < 0.2] = 0.5
        low, high = bootstrap_mean(drawn.tolist(), draws=500)
        covered += low <= 0.8 * 0.6 + 0.2 * 0.5 <= high
    # 95 % nominal; the standard error of 300 runs is 1.3 points.
    assert 0.91 <= covered / runs <= 0.985


# -- power --------------------------------------------------------------------------------------


def test_prompts_needed_without_ties_are_the_votes_of_the_study():
    for rate in (0.55, 0.6, 0.65, 0.7):
        # Rounded up here and to the nearest there.
        assert 0 <= prompts_needed(rate) - votes_needed(rate) <= 1
    assert prompts_needed(0.55) == 785
    assert prompts_needed(0.45) == 785
    assert prompts_needed(0.55, ties=0.2) == math.ceil(0.8 * 784.89)
    assert win_rate(outcomes([1, 0.5, 0.5, 0]))["prompts_needed_55"] == math.ceil(784.89 / 2)


@pytest.mark.parametrize(("rate", "ties"), [(0.55, 0.0), (0.55, 0.3), (0.65, 0.0)])
def test_a_planted_better_arm_is_found_with_the_computed_power(rate, ties):
    """At the computed number of prompts the interval leaves 1/2 four times out of five."""
    chance, runs = np.random.default_rng(11), 300
    prompts = prompts_needed(rate, ties)
    won = (rate - ties / 2) / (1 - ties)  # of the decided ones
    found = halved = 0
    for _ in range(runs):
        drawn = (chance.random(prompts) < won).astype(float)
        drawn[chance.random(prompts) < ties] = 0.5
        found += bootstrap_mean(drawn.tolist(), draws=200)[0] > 0.5
        halved += bootstrap_mean(drawn[: prompts // 2].tolist(), draws=200)[0] > 0.5
    # 2.6 standard errors of 300 runs are 6 points.
    assert found / runs == pytest.approx(0.8, abs=0.06)  # reason: 2.6 standard errors
    assert halved / runs < 0.62, "with half as many prompts the power is 51 %"


def test_a_false_alarm_is_as_rare_as_the_level_says():
    chance, runs = np.random.default_rng(12), 300
    alarms = 0
    for _ in range(runs):
        low, high = bootstrap_mean((chance.random(200) < 0.5).astype(float).tolist(), draws=300)
        alarms += not low <= 0.5 <= high
    assert alarms / runs < 0.09


# -- at equal lengths ---------------------------------------------------------------------------


def test_the_figure_at_equal_lengths_is_that_of_another_optimiser():
    chance = np.random.default_rng(1)
    gaps = chance.normal(30, 60, 300)
    truth = 1 / (1 + np.exp(-0.3 - 1.1 * np.tanh(gaps / gaps.std())))
    values = (chance.random(300) < truth).astype(float)
    values[:40] = 0.5

    def loss(beta):
        logit = beta[0] + beta[1] * np.tanh(gaps / gaps.std())
        likelihood = values * np.logaddexp(0, -logit) + (1 - values) * np.logaddexp(0, logit)
        return likelihood.sum() + 0.001 / 2 * beta[0] ** 2 + 0.1 / 2 * beta[1] ** 2

    theta = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-8}).x[0]
    found = length_controlled(outcomes(values, gaps))
    assert found["win_rate"] == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-5)
    assert found["ci"][0] < found["win_rate"] < found["ci"][1]


def test_an_arm_that_wins_by_length_alone_is_even_at_equal_lengths():
    """And the interval covers the planted 50 % in most of 40 runs, which the raw one never does."""
    chance, runs = np.random.default_rng(2), 40
    raw_covers = covers = 0
    for _ in range(runs):
        gaps = chance.normal(60, 50, 200)  # mostly longer
        wins = chance.random(200) < 1 / (1 + np.exp(-1.5 * np.tanh(gaps / gaps.std())))
        found = win_rate(outcomes(wins.astype(float), gaps))
        raw_covers += found["ci"][0] <= 0.5
        low, high = found["length_controlled"]["ci"]
        covers += low <= 0.5 <= high
    assert raw_covers == 0
    # 95 % nominal, 40 runs: below 34 has a chance of 0.3 %.
    assert covers >= 34


def test_without_an_effect_of_length_both_figures_agree():
    chance = np.random.default_rng(3)
    values = (chance.random(2000) < 0.7).astype(float)
    found = win_rate(outcomes(values, chance.normal(0, 50, 2000)))
    assert found["length_controlled"]["win_rate"] == pytest.approx(found["win_rate"], abs=0.01)


def test_there_is_no_figure_at_equal_lengths_where_nothing_tells_it():
    assert length_controlled(outcomes([1, 0, 1], [5, 5, 5])) is None
    assert length_controlled(outcomes([1, 1, 1], [5, 2, 9])) is None


@pytest.mark.parametrize(("shift", "told"), [(0, True), (1, True), (100, False), (-100, False)])
def test_nothing_is_said_of_equal_lengths_that_were_never_near(shift, told):
    chance = np.random.default_rng(4)
    gaps = shift + chance.normal(size=200)
    values = chance.integers(2, size=200).astype(float)
    assert (length_controlled(outcomes(values, gaps)) is not None) is told


def test_separated_data_give_a_finite_figure():
    """The longer answer always wins: the effect of length is without bound, the figure even."""
    gaps = [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0]
    found = length_controlled(outcomes([float(g > 0) for g in gaps], gaps))
    assert found["win_rate"] == pytest.approx(0.5, abs=1e-6)
    assert 0 <= found["ci"][0] <= found["ci"][1] <= 1


# -- means of an arm ----------------------------------------------------------------------------


def test_distinct_pairs_are_counted_over_all_answers_together():
    """ab ba ab, ab bc and none: 3 different pairs of 5; the same answer twice halves its share."""
    # ab, ba, ab; ab, bc: three different ones of five.
    assert distinct_2(["a b a b", "A b c", "a"]) == pytest.approx(3 / 5, abs=1e-12)
    assert distinct_2(["a b c", "a b c"]) == 0.5
    assert distinct_2(["one", ""]) == 1.0


def test_an_arm_is_described_by_means():
    answers = [Answer([5, 6, 2], True, []), Answer([5], False, [])]
    found = describe(Arm("x", answers, ["a b", "a b"], [1.0, 3.0], [2.0, 4.0], kl=0.5))
    assert found["eos_rate"] == 0.5
    assert found["mean_length"] == 2.0
    assert (found["score"], found["utility"], found["kl"]) == (2.0, 3.0, 0.5)
    assert found["utility_std"] == pytest.approx(math.sqrt(2))
    assert "utility" not in describe(Arm("x", answers, ["", ""]))
