"""What every loss returns, and how the outputs of micro-batches add up."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_SUFFIX = "_max"


class LossOutput(NamedTuple):
    """A loss as a sum and a count, so that any split into micro-batches gives one gradient.

    The loop divides `total` by the count of the whole optimizer step, never by its own.

    total: scalar, the sum of the loss over `count` terms; the only part with a gradient.
    count: scalar int64, the number of terms: live tokens, or prompts for a ranking.
    metrics: detached sums over the same terms; a name ending in `_max` is a maximum instead.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    metrics: dict[str, Tensor]

    def means(self) -> dict[str, Tensor]:
        """`{"loss": total / count, name: metric / count}`, detached; 0 where the count is 0.

        A metric whose name ends in `_max` is given as it is.
        """
        terms = self.count.clamp(min=1)
        named = {
            name: m if name.endswith(MAX_SUFFIX) else m / terms for name, m in self.metrics.items()
        }
        return {"loss": self.total.detach() / terms} | named


def merge(outputs: Iterable[LossOutput]) -> LossOutput:
    """One output for several: totals, counts and metrics added, `_max` metrics by maximum.

    Args:
        outputs: at least one, all of the same loss.
    """
    parts = list(outputs)
    assert parts, "nothing to merge"
    assert all(p.metrics.keys() == parts[0].metrics.keys() for p in parts), "outputs of two losses"
    metrics = {}
    for name in parts[0].metrics:
        column = torch.stack([p.metrics[name] for p in parts])
        metrics[name] = column.amax() if name.endswith(MAX_SUFFIX) else column.sum()
    return LossOutput(
        total=torch.stack([p.total for p in parts]).sum(),
        count=torch.stack([p.count for p in parts]).sum(),
        metrics=metrics,
    )
