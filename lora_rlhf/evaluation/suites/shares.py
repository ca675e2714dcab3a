"""Figures of a task with their 95 % intervals: bootstrap over documents."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_rlhf.preferences.intervals import wilson
from lora_rlhf.runs import Json

_DRAWS = 2000
_SLOW_DRAWS = 200  # of a figure that another library computes from all documents
_BLOCK = 1 << 20  # indices drawn at once


@dataclass(frozen=True)
class Observed:
    """What a metric saw in each document; the figure is transform(sum values / sum weights).

    Attributes:
        values: one a document.
        weights: what each is a share of; None: 1 each, so that the figure is a mean.
        transform: of the ratio, such as exp of nats a token; monotone.
    """

    values: Sequence[float]
    weights: Sequence[float] | None = None
    transform: Callable[[Any], Any] = float

    def share(self) -> Json:
        """{"value", "low", "high", "n"}: the figure and its percentile interval."""
        values = np.asarray(self.values, dtype=float)
        weights = np.ones_like(values) if self.weights is None else np.asarray(self.weights, float)
        assert len(values) == len(weights) > 0
        value = float(self.transform(values.sum() / weights.sum()))
        if self.weights is None and set(values.tolist()) in ({0.0}, {1.0}):
            # Resamples of equal values are equal: they would claim to know the share exactly.
            low, high = wilson(value, len(values))
            # One end is the share itself; Wilson's differs from it by a rounding.
            low, high = (0.0, high) if value == 0.0 else (low, 1.0)
        else:
            low, high = (float(self.transform(q)) for q in _quantiles(values, weights))
        return {"value": value, "low": low, "high": high, "n": len(values)}


@dataclass(frozen=True)
class Pooled:
    """Documents of which a library computes one figure, such as BLEU.

    Attributes:
        items: one a document, whatever the figure is computed from.
        figure: of a list of items.
    """

    items: Sequence[Any]
    figure: Callable[[list[Any]], float]

    def share(self) -> Json:
        """{"value", "low", "high", "n"}, from 200 resamples."""
        rng, n = np.random.default_rng(0), len(self.items)
        draws = [
            self.figure([self.items[i] for i in rng.integers(n, size=n)])
            for _ in range(_SLOW_DRAWS)
        ]
        low, high = np.quantile([float(d) for d in draws], [0.025, 0.975])
        value = float(self.figure(list(self.items)))
        return {"value": value, "low": float(low), "high": float(high), "n": n}


Measures = dict[str, dict[str, Observed | Pooled]]
"""metric -> arm -> what it saw."""


def _quantiles(values: Any, weights: Any) -> tuple[float, float]:
    """2.5 % and 97.5 % of the ratio of sums, documents drawn with replacement."""
    rng, n = np.random.default_rng(0), len(values)
    block = max(1, _BLOCK // n)
    ratios: list[Any] = []
    for start in range(0, _DRAWS, block):
        rows = rng.integers(n, size=(min(block, _DRAWS - start), n))
        ratios.append(values[rows].sum(-1) / weights[rows].sum(-1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def perplexity_of(nats: Sequence[float], tokens: Sequence[int]) -> Observed:
    """exp(nats / tokens) over all documents."""
    return Observed(nats, [float(t) for t in tokens], math.exp)
