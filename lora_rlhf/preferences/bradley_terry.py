"""Bradley-Terry strengths from comparisons, with a covariance that knows what belongs together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
_STEPS = 100
_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm was preferred to another.

    Attributes:
        winner: index of an arm.
        loser: index of another.
        weight: > 0; those of one judgement sum to 1.
        cluster: what comparisons that may resemble each other share.
    """

    winner: int
    loser: int
    weight: float
    cluster: str


@dataclass(frozen=True)
class Fit:
    """Strengths of arms that are connected by comparisons.

    Attributes:
        arms: their indices.
        strengths: (n,), summing to 0; P(i beats j) = sigmoid(strengths[i] - strengths[j]).
        covariance: (n, n), of the strengths.
        clusters: in the comparisons.
        separated: maximum likelihood would be infinite, since one side never wins; half a vote
            each way was added for every two arms that were compared.
    """

    arms: tuple[int, ...]
    strengths: Array
    covariance: Array
    clusters: int
    separated: bool


def fit(comparisons: Sequence[Comparison], arms: int) -> list[Fit]:
    """Maximum likelihood for each set of arms that comparisons connect; lone arms are left out.

    log L = sum of weight * log sigmoid(s_winner - s_loser); the covariance is the cluster-robust
    sandwich G/(G-1) A^-1 B A^-1.

    Source: Bradley and Terry 1952; Ford 1957 for when the maximum exists; Liang and Zeger 1986 for
    the covariance. Deviation: under separation, see `Fit`; its covariance is A^-1 then, since a
    side that never wins leaves no residual to learn the spread from.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    if not comparisons:
        return []
    won = np.zeros((arms, arms))
    for c in comparisons:
        won[c.winner, c.loser] += c.weight
    graph = csr_array(won)
    _, labels = connected_components(graph, directed=False)
    _, strong = connected_components(graph, directed=True, connection="strong")
    fits = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            separated = len(np.unique(strong[members])) > 1
            fits.append(_fit_connected(comparisons, members.tolist(), separated))
    return fits


def _fit_connected(comparisons: Sequence[Comparison], arms: list[int], separated: bool) -> Fit:
    place = {arm: i for i, arm in enumerate(arms)}
    own = [c for c in comparisons if c.winner in place]
    names = {name: i for i, name in enumerate(dict.fromkeys(c.cluster for c in own))}
    clusters = np.array([names[c.cluster] for c in own])
    rows, weights = _design([(place[c.winner], place[c.loser], c.weight) for c in own], len(arms))
    if separated:
        compared = {frozenset((place[c.winner], place[c.loser])) for c in own}
        both = [(i, j, 0.5) for pair in compared for i, j in (tuple(pair), tuple(pair)[::-1])]
        extra, halves = _design(both, len(arms))
        rows, weights = np.vstack([rows, extra]), np.concatenate([weights, halves])
    strengths = _maximise(rows, weights)
    chances = _sigmoid(rows @ strengths)
    bread: Array = np.linalg.pinv(rows.T @ (rows * (weights * chances * (1 - chances))[:, None]))
    if separated:
        return Fit(tuple(arms), strengths, bread, len(names), True)
    scores = np.zeros((len(names), len(arms)))
    np.add.at(scores, clusters, rows * (weights * (1 - chances))[:, None])
    small = len(names) / max(len(names) - 1, 1)
    sandwich: Array = small * bread @ scores.T @ scores @ bread
    return Fit(tuple(arms), strengths, sandwich, len(names), False)


def _design(triples: Sequence[tuple[int, int, float]], arms: int) -> tuple[Array, Array]:
    """Rows with +1 for the winner and -1 for the loser, and their weights."""
    rows = np.zeros((len(triples), arms))
    index = np.arange(len(triples))
    rows[index, [w for w, _, _ in triples]] = 1.0
    rows[index, [loser for _, loser, _ in triples]] = -1.0
    return rows, np.array([weight for _, _, weight in triples])


def _maximise(rows: Array, weights: Array) -> Array:
    """Newton's method, each step halved until the likelihood does not fall."""
    strengths = np.zeros(rows.shape[1])
    value = _log_likelihood(rows, weights, strengths)
    for _ in range(_STEPS):
        chances = _sigmoid(rows @ strengths)
        gradient = rows.T @ (weights * (1 - chances))
        curvature = rows.T @ (rows * (weights * chances * (1 - chances))[:, None])
        # The pseudo-inverse keeps the sum at 0, the one direction the data say nothing of.
        step = np.linalg.pinv(curvature) @ gradient
        while (new := _log_likelihood(rows, weights, strengths + step)) < value - _TOLERANCE:
            step = step / 2
        strengths, value = strengths + step, new
        if np.abs(step).max() < _TOLERANCE:
            break
    return strengths - strengths.mean()


def _log_likelihood(rows: Array, weights: Array, strengths: Array) -> float:
    return float(-(weights * np.logaddexp(0.0, -(rows @ strengths))).sum())


def _sigmoid(x: Array) -> Array:
    result: Array = 1.0 / (1.0 + np.exp(-x))
    return result
