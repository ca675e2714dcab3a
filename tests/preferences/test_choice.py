"""Active choice: the uncertain comes sooner, a quarter stays fair, chances are exact."""

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from lora_rlhf.errors import ConfigError
from lora_rlhf.preferences.choice import (
    Candidate,
    Choice,
    choose,
    preference,
    propensities,
    uncertainty,
)

EVEN, SURE = Candidate((0.3, 0.3)), Candidate((9.0, -9.0))
FOUR = [EVEN, Candidate((1.0, 0.0)), Candidate((2.0, -1.0)), SURE]
COUNT = 40_000


# -- what is to be learned ----------------------------------------------------------------------


def test_uncertainty_is_highest_where_the_model_is_even_and_falls_with_the_gap():
    found = [uncertainty(Candidate((gap, 0.0))) for gap in (0.0, 0.5, 1.0, 3.0, 30.0, 1000.0)]
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert uncertainty(Candidate((0.0, 1.0))) == pytest.approx(found[2]), "either way round"
    p = 1 / (1 + np.exp(-1.0))
    assert found[2] == pytest.approx(4 * p * (1 - p))
    assert preference(1000.0, -1000.0) == 1.0
    assert preference(-1000.0, 1000.0) == 0.0


def test_of_more_answers_it_is_the_mean_over_their_pairs():
    scores = (0.0, 0.0, 1.0)
    pairs = [uncertainty(Candidate(p)) for p in ((0.0, 0.0), (0.0, 1.0), (0.0, 1.0))]
    assert uncertainty(Candidate(scores)) == pytest.approx(sum(pairs) / 3)
    assert uncertainty(Candidate((1.0,))) == uncertainty(Candidate(())) == 0.0


def test_disagreement_and_equal_lengths_raise_it():
    agreeing = ((0.0, 0.0), (0.0, 0.0))
    split = ((2.0, 0.0), (-2.0, 0.0))
    spread = (preference(2.0, 0.0) - preference(-2.0, 0.0)) / 2
    assert uncertainty(Candidate((0.0, 0.0), estimates=agreeing)) == 0.0
    assert uncertainty(Candidate((0.0, 0.0), estimates=split)) == pytest.approx(2 * spread)
    assert uncertainty(Candidate((0.0, 0.0), lengths=(40, 10))) == pytest.approx(0.25)
    assert uncertainty(Candidate((0.0, 0.0), lengths=(0, 0))) == 1.0


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate((0.0, float("nan"))),
        Candidate((0.0, float("inf"))),
        Candidate((0.0, 1.0), lengths=(3,)),
        Candidate((0.0, 1.0), estimates=((1.0,),)),
    ],
)
def test_what_is_not_whole_is_refused(candidate):
    with pytest.raises(ConfigError, match="finite score"):
        uncertainty(candidate)


# -- chances ------------------------------------------------------------------------------------


def test_at_least_a_quarter_is_uniform_always():
    for uniform in (0.2499, 0.0, -1.0, 1.01):
        with pytest.raises(ConfigError, match=r"0\.25 to 1"):
            choose(FOUR, random.Random(0), uniform)
    for scores in ([1.0, 0.0, 0.0], [1e-9, 1e9, 1.0]):
        assert min(propensities(scores)) >= 0.25 / len(scores) * (1 - 1e-12)
    with pytest.raises(ConfigError, match="no candidate"):
        choose([])


def test_chances_are_the_mixture_to_the_last_bit():
    scores, uniform = [0.5, 0.25, 0.0, 0.25], 0.25
    exact = [
        Fraction(1, 4) / 4 + Fraction(3, 4) * Fraction(s) / sum(map(Fraction, scores))
        for s in scores
    ]
    assert propensities(scores, uniform) == [float(e) for e in exact]
    assert sum(exact) == 1
    assert propensities([0.0, 0.0]) == [0.5, 0.5]


@pytest.fixture(scope="module")
def draws() -> list[Choice]:
    chance = random.Random(1)
    return [choose(FOUR, chance) for _ in range(COUNT)]


def test_the_logged_chance_is_how_often_a_candidate_is_chosen(draws):
    """Of 40000 draws a frequency's standard error is at most 0.0025."""
    found, count = draws, COUNT
    seen = Counter(c.index for c in found)
    logged = {c.index: c.propensity for c in found}
    assert set(logged) == {0, 1, 2, 3}, "also what the model is sure of is asked now and then"
    assert sum(logged.values()) == pytest.approx(1.0)
    for index, propensity in logged.items():
        error = (propensity * (1 - propensity) / count) ** 0.5
        assert abs(seen[index] / count - propensity) < 4 * error
    # A mutant that logs the active branch's chance alone would be caught:
    total = sum(uncertainty(c) for c in FOUR)
    assert abs(seen[0] / count - uncertainty(EVEN) / total) > 0.02


def test_the_uniform_choices_are_a_fair_sample_by_themselves(draws):
    found = [c for c in draws if c.strategy == "uniform"]
    assert len(found) / COUNT == pytest.approx(0.25, abs=0.01)
    seen = Counter(c.index for c in found)
    assert all(abs(n / len(found) - 0.25) < 0.02 for n in seen.values())
    active = Counter(c.index for c in draws if c.strategy == "active")
    assert active[0] > active[1] > active[2] > active[3] == 0


def test_inverse_propensities_recover_the_mean_over_all_candidates(draws):
    """What each would show if asked; the plain mean of what was asked is off by far."""
    shows = [0.9, 0.5, 0.2, 0.1]
    found = draws
    weighted = np.mean([shows[c.index] / (len(FOUR) * c.propensity) for c in found])
    plain = np.mean([shows[c.index] for c in found])
    assert weighted == pytest.approx(np.mean(shows), abs=0.01)
    assert abs(plain - np.mean(shows)) > 0.1


def test_without_anything_to_learn_all_is_uniform():
    found = choose([SURE] * 3 + [Candidate(())] * 2, random.Random(2))
    assert (found.strategy, found.score) == ("active", pytest.approx(0.0, abs=1e-6))
    found = choose([Candidate(())] * 4, random.Random(2))
    assert (found.strategy, found.propensity) == ("uniform", 0.25)


def test_a_task_records_the_choice():
    found = choose(FOUR, random.Random(3))
    assert found.sampler.strategy == found.strategy
    assert found.sampler.propensity == found.propensity
    assert found.sampler.score == found.score == uncertainty(FOUR[found.index])
