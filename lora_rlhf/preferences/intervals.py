"""Shares with 95 % intervals that know which observations belong together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Rate:
    """A share and how well it is known.

    Attributes:
        share: in [0, 1]; None where nothing was observed.
        low: of the 95 % interval; 0 where nothing was observed.
        high: of the 95 % interval; 1 where nothing was observed.
        count: observations.
        clusters: groups of observations that may resemble each other, such as prompts.
    """

    share: float | None
    low: float = 0.0
    high: float = 1.0
    count: int = 0
    clusters: int = 0

    def turned(self) -> "Rate":
        """The same of the other side."""
        if self.share is None:
            return self
        return Rate(1 - self.share, 1 - self.high, 1 - self.low, self.count, self.clusters)


NOTHING = Rate(None)


def wilson(share: float, votes: float, clusters: int | None = None) -> tuple[float, float]:
    """Wilson's score interval of a share that is worth so many independent votes.

    Args:
        share: in [0, 1].
        votes: > 0, need not be whole.
        clusters: the variance was estimated from so many; few widen the interval (Student's t).

    Source: Wilson 1927. Deviation: the quantile is Student's where the variance is estimated.
    """
    z = quantile(clusters)
    centre = (share + z * z / (2 * votes)) / (1 + z * z / votes)
    spread = math.sqrt(max(share * (1 - share), 0.0) / votes + z * z / (4 * votes * votes))
    half = z * spread / (1 + z * z / votes)
    return max(0.0, centre - half), min(1.0, centre + half)


def quantile(clusters: int | None = None) -> float:
    """Of the normal distribution, or of Student's for a variance over so many clusters."""
    from scipy.stats import norm, t

    at = 0.5 + LEVEL / 2
    return float(norm.ppf(at) if clusters is None else t.ppf(at, max(clusters - 1, 2)))


def clustered_rate(clusters: Mapping[str, Sequence[float]] | Iterable[Sequence[float]]) -> Rate:
    """The share of all observations, each in [0, 1], with an interval over clusters of them.

    The variance is the linearised one of a ratio: observations of one cluster may be as alike as
    they want. It is turned into a number of independent votes, of which Wilson's interval is taken,
    so that shares of 0 and 1 get a sensible one too.

    Args:
        clusters: the observations of each.
    """
    rows = list(clusters.values() if isinstance(clusters, Mapping) else clusters)
    rows = [row for row in rows if row]
    count, number = sum(map(len, rows)), len(rows)
    if not count:
        return NOTHING
    share = sum(map(sum, rows)) / count
    residuals = [sum(row) - share * len(row) for row in rows]
    variance = number / max(number - 1, 1) * sum(r * r for r in residuals) / count**2
    # Clusters that all say the same, or a single one, say nothing of how they would differ.
    known = variance > 0 and number > 1
    votes = min(share * (1 - share) / variance, count) if known else number
    low, high = wilson(share, votes, number)
    return Rate(share, low, high, count, number)
