"""Active choice of the next pair or prompt, with the chance it had.

Most is learned where the reward model is unsure. But what is chosen for that is no fair sample, so
at least a quarter of all tasks stay uniform, every task keeps the chance with which it was chosen,
and win rates read the uniform ones alone.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from lora_rlhf.errors import ConfigError
from lora_rlhf.preferences.events import Sampler

LEAST_UNIFORM = 0.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt with its answers that could be asked next.

    Attributes:
        scores: the reward model's raw score of each answer; empty: there is none.
        lengths: of each answer, in words or tokens; empty: not known.
        estimates: the scores by several heads or dropout passes, a row each; empty: not known.
    """

    scores: tuple[float, ...]
    lengths: tuple[int, ...] = ()
    estimates: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate to ask next.

    Attributes:
        index: of the candidate.
        strategy: uniform, when a coin said to choose by chance alone; else active.
        propensity: chance that this candidate is chosen, by either way.
        score: how much is to be learned from it.
    """

    index: int
    strategy: Literal["uniform", "active"]
    propensity: float
    score: float

    @property
    def sampler(self) -> Sampler:
        """As a task records it."""
        return Sampler(strategy=self.strategy, propensity=self.propensity, score=self.score)


def preference(first: float, second: float) -> float:
    """Chance that the first of two answers is preferred, by their raw reward scores."""
    gap = first - second
    return 1 / (1 + math.exp(-gap)) if gap > -700 else 0.0


def uncertainty(candidate: Candidate) -> float:
    """How much is to be learned from a candidate, from 0 to 1.

    The mean over its pairs of 4 p (1 - p), times twice the spread of p over the estimates where
    they are known, times the shorter length over the longer: a pair of unequal length teaches
    length.

    Raises:
        ConfigError: as many lengths or estimates as scores are needed, all finite.
    """
    count = len(candidate.scores)
    rows = (candidate.scores, *candidate.estimates)
    whole = all(len(row) == count for row in rows) and len(candidate.lengths) in (0, count)
    if not whole or not all(math.isfinite(score) for row in rows for score in row):
        raise ConfigError(
            f"choice: each of {count} answers needs one finite score in each estimate, and one "
            f"length where lengths are given (found: {candidate})."
        )
    pairs = list(combinations(range(count), 2))
    if not pairs:
        return 0.0
    return math.fsum(_uncertainty(candidate, i, j) for i, j in pairs) / len(pairs)


def _uncertainty(candidate: Candidate, i: int, j: int) -> float:
    p = preference(candidate.scores[i], candidate.scores[j])
    score = 4 * p * (1 - p)
    if len(candidate.estimates) > 1:
        score *= 2 * statistics.pstdev(preference(e[i], e[j]) for e in candidate.estimates)
    if candidate.lengths:
        lengths = candidate.lengths[i], candidate.lengths[j]
        score *= min(lengths) / max(lengths) if max(lengths) > 0 else 1.0
    return score


def propensities(scores: Sequence[float], uniform: float = LEAST_UNIFORM) -> list[float]:
    """Chance of each candidate: `uniform` of it spread evenly, the rest in proportion to scores.

    Args:
        scores: >= 0; where all are 0 the whole is even.
        uniform: share of tasks chosen by chance alone.

    Raises:
        ConfigError: a share under a quarter, or over 1; a score that is negative or not finite.
    """
    if not LEAST_UNIFORM <= uniform <= 1.0:
        raise ConfigError(
            f"choice: the uniform share is {uniform}. Allowed: {LEAST_UNIFORM} to 1, since win "
            f"rates are read from the uniform tasks alone."
        )
    if not all(math.isfinite(s) and s >= 0 for s in scores):
        raise ConfigError(f"choice: scores are finite and not negative (found: {list(scores)}).")
    total, count = math.fsum(scores), len(scores)
    if total == 0:
        return [1 / count] * count
    return [uniform / count + (1 - uniform) * s / total for s in scores]


def choose(
    candidates: Sequence[Candidate],
    chance: random.Random | None = None,
    uniform: float = LEAST_UNIFORM,
) -> Choice:
    """Choose what to ask next: by chance alone, or in proportion to `uncertainty`.

    The coin does not look at the candidates, so the uniform choices are a fair sample by
    themselves; over both ways, weights 1 / (n * propensity) give the mean over all candidates.

    Args:
        candidates: at least one.
        chance: what draws; the system's random source unless given.
        uniform: share of choices made by chance alone, at least a quarter.

    Raises:
        ConfigError: no candidate, or as `propensities` and `uncertainty`.
    """
    if not candidates:
        raise ConfigError("choice: there is no candidate. Give at least one.")
    chance = chance or random.SystemRandom()
    scores = [uncertainty(c) for c in candidates]
    chances = propensities(scores, uniform)
    is_uniform = chance.random() < uniform or not any(scores)
    weights = [1.0] * len(scores) if is_uniform else scores
    (index,) = chance.choices(range(len(scores)), weights)
    strategy: Literal["uniform", "active"] = "uniform" if is_uniform else "active"
    return Choice(index, strategy, min(1.0, chances[index]), scores[index])
