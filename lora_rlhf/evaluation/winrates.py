"""Win rates: ties half, intervals over prompts, at equal lengths, and how many prompts it takes."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_rlhf.preferences.intervals import LEVEL, wilson
from lora_rlhf.runs import Json

Array = np.ndarray[Any, np.dtype[Any]]
TOLD_APART = 0.55
_DRAWS = 4000
_REFITS = 1000
_RIDGES = (1e-3, 0.1)  # on theta and phi
_STEPS = 30
_ENDS = (0.05, 0.95)  # lengths as equal as 0 must be within these quantiles


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a judge says of two arms' answers to one prompt.

    Attributes:
        prompt: its key; outcomes of one prompt may be as alike as they want.
        value: 1 where the first arm wins, 0 where the other does, 1/2 for a tie.
        longer: characters by which the first arm's answer is longer.
    """

    prompt: str
    value: float
    longer: float = 0.0


def outcomes_of(
    prompts: Sequence[str],
    ours: Sequence[float],
    theirs: Sequence[float],
    longer: Sequence[float] | None = None,
) -> list[Outcome]:
    """Outcomes where a judge gives each answer a utility; equal ones tie."""
    gaps = longer or [0.0] * len(prompts)
    return [
        Outcome(prompt, 0.5 if a == b else float(a > b), gap)
        for prompt, a, b, gap in zip(prompts, ours, theirs, gaps, strict=True)
    ]


def win_rate(outcomes: Sequence[Outcome]) -> Json:
    """The figures of two arms, for summary.json.

    Returns:
        win_rate, ci (95 %, bootstrap over prompts), prompts, ties (outcomes), length_controlled
        (win_rate and ci; None where `length_controlled` can say nothing) and prompts_needed_55
        (None where all tie).
    """
    values = [o.value for o in outcomes]
    ties = sum(value == 0.5 for value in values)
    low, high = bootstrap_share(_by_prompt(outcomes))
    return {
        "win_rate": sum(values) / len(values),
        "ci": [low, high],
        "prompts": len({o.prompt for o in outcomes}),
        "ties": ties,
        "length_controlled": length_controlled(outcomes),
        "prompts_needed_55": (
            prompts_needed(TOLD_APART, ties / len(values)) if ties < len(values) else None
        ),
    }


def _by_prompt(outcomes: Sequence[Outcome]) -> list[list[float]]:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.prompt].append(outcome.value)
    return list(groups.values())


# -- intervals ----------------------------------------------------------------------------------


def bootstrap_mean(values: Sequence[float], draws: int = _DRAWS) -> tuple[float, float]:
    """95 % percentile interval of a mean."""
    return bootstrap_share([[value] for value in values], draws)


def bootstrap_share(
    clusters: Sequence[Sequence[float]], draws: int = _DRAWS
) -> tuple[float, float]:
    """95 % percentile interval of the mean of all observations, clusters drawn with replacement.

    Where all clusters have the same mean, such as 1, a bootstrap is a point however few there are;
    Wilson's interval of that many clusters is given then.
    """
    sums = torch.tensor([math.fsum(c) for c in clusters], dtype=torch.float64)
    counts = torch.tensor([float(len(c)) for c in clusters], dtype=torch.float64)
    share = float(sums.sum() / counts.sum())
    means = sums / counts
    # Means of equal shares differ in their last bits alone.
    if float(means.max() - means.min()) < 1e-12:
        return wilson(share, len(clusters))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(clusters), (draws, len(clusters)), generator=generator)
    drawn = sums[rows].sum(-1) / counts[rows].sum(-1)
    tail = (1 - LEVEL) / 2
    quantiles = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(drawn, quantiles).tolist()
    return low, high


# -- power --------------------------------------------------------------------------------------


def prompts_needed(
    rate: float = TOLD_APART, ties: float = 0.0, power: float = 0.8, level: float = 0.05
) -> int:
    """Prompts at which a win rate is told from 50 % with this power, two-sided.

    n = (z_(1 - level/2) + z_power)^2 v / (rate - 1/2)^2,  v = (1 - ties) / 4

    where v is the largest variance of an outcome in {0, 1/2, 1} of which so many are ties.

    Args:
        rate: in [0, 1], not 1/2.
        ties: share of outcomes that tie.
        power: chance to find it.
        level: chance to find it where there is none.

    Source: the sample size of a one-sample z-test of a mean (Chow, Shao and Wang 2008, Sample Size
    Calculations in Clinical Research, section 3.1). Deviation: the variance is that at 50 %.
    """
    from scipy.stats import norm

    assert rate != 0.5, "no number of prompts tells 50 % from 50 %"
    z = float(norm.ppf(1 - level / 2) + norm.ppf(power))
    return max(1, math.ceil(z * z * (1 - ties) / 4 / (rate - 0.5) ** 2))


# -- at equal lengths ---------------------------------------------------------------------------


def length_controlled(outcomes: Sequence[Outcome]) -> Json | None:
    """The win rate at equal lengths, with its bootstrap interval over prompts.

    P(a beats b) = sigmoid(theta + phi tanh(d / s)) is fitted to the outcomes by maximum
    likelihood, where d is by how many characters a's answer is longer and s the standard deviation
    of d; the figure is sigmoid(theta).

    Source: Dubois et al. 2024, arXiv:2404.04475, equation 1. Deviations: no term for the
    difficulty of a prompt, which is estimated over many models there; ties are outcomes of 1/2; a
    ridge (0.1 on phi, 0.001 on theta, as Gaussian priors) keeps separated data finite.

    Returns:
        win_rate and ci; None where d does not vary, where one arm always wins, or where one arm's
        answers are nearly always the longer ones: what would be if they were as long is then a
        guess beyond the data.
    """
    gaps = np.array([o.longer for o in outcomes])
    values = np.array([o.value for o in outcomes])
    spread = float(gaps.std())
    shortest, longest = np.quantile(gaps, _ENDS)
    if spread == 0.0 or len(set(values.tolist())) < 2 or not shortest <= 0 <= longest:
        return None
    column = np.tanh(gaps / spread)
    names: dict[str, int] = {}
    cluster = np.array([names.setdefault(o.prompt, len(names)) for o in outcomes])
    chance = np.random.default_rng(0)
    counts = chance.multinomial(len(names), [1 / len(names)] * len(names), size=_REFITS)
    theta = _logistic(column, values, np.ones((1, len(values))))
    refits = _logistic(column, values, counts[:, cluster].astype(float))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(_sigmoid(refits), [tail, 100 - tail])
    return {"win_rate": float(_sigmoid(theta)[0]), "ci": [float(low), float(high)]}


def _logistic(column: Array, values: Array, weights: Array) -> Array:
    """The theta of many weighted fits at once, (b,), by Newton's method.

    Args:
        column: (n,), what phi multiplies.
        values: (n,) in [0, 1].
        weights: (b, n).
    """
    beta = np.zeros((len(weights), 2))
    design = np.stack([np.ones_like(column), column], 1)
    squares = np.stack([np.ones_like(column), column, column**2], 1)
    for _ in range(_STEPS):
        chances = _sigmoid(beta @ design.T)
        gradient = (weights * (values - chances)) @ design - np.array(_RIDGES) * beta
        a, b, c = ((weights * chances * (1 - chances)) @ squares).T
        curvature = np.stack([a + _RIDGES[0], b, b, c + _RIDGES[1]], -1).reshape(-1, 2, 2)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        # A whole step may overshoot where the data are all but separated.
        step = np.clip(step, -2.0, 2.0)
        beta += step
        if np.abs(step).max() < 1e-9:
            break
    theta: Array = beta[:, 0]
    return theta


def _sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-np.clip(x, -500, 500)))
    return result
