"""The ranking loss of the reward model."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_rlhf.losses.masked import at_least_float32
from lora_rlhf.losses.outputs import LossOutput


def strict_pairs(groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """All (better, worse) index pairs of a ranking; answers in one tie group make no pair.

    Args:
        groups: tie groups, best first, of indices; ((2,), (0, 1)) says 2 beats 0 and 1, which tie.
    """
    return [(i, j) for better, worse in combinations(groups, 2) for i in better for j in worse]


def ranking_loss(scores: Float[Tensor, " k"], groups: Sequence[Sequence[int]]) -> LossOutput:
    """Bradley-Terry loss of one prompt: the mean over its strict pairs.

    total = -1/P sum_(w,l) log sigmoid(scores[w] - scores[l]),   P = number of strict pairs

    Each prompt weighs the same, however many answers it ranks: one batch element (1a.8).

    Args:
        scores: raw scores of the k answers, before any normalisation.
        groups: tie groups best first; each index in [0, k) at most once, those left out unranked.

    Returns:
        count is 1; where all answers tie, total and count are 0 (and the gradient is 0).
        metrics, sums over the strict pairs, to be divided by the summed `pairs`: `correct` (a tie
        in score counts 0.5), `margin` (score of the better minus the worse), `pairs`.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; ties dropped as there. Deviation: none.
    """
    ranked = [i for group in groups for i in group]
    assert len(set(ranked)) == len(ranked), f"an answer is ranked twice: {groups}"
    assert all(0 <= i < len(scores) for i in ranked), (
        f"{groups} ranks none of {len(scores)} answers"
    )
    pairs = strict_pairs(groups)
    index = torch.tensor(pairs, dtype=torch.long, device=scores.device).reshape(-1, 2)
    scores = at_least_float32(scores)
    margins = scores[index[:, 0]] - scores[index[:, 1]]
    still = margins.detach()
    # The sum of no margins is a 0 that still has a (zero) gradient, so backward() always works.
    return LossOutput(
        total=F.softplus(-margins).sum() / max(len(pairs), 1),
        count=torch.tensor(min(len(pairs), 1), device=scores.device),
        metrics={
            "correct": (still > 0).to(still.dtype).sum() + 0.5 * (still == 0).to(still.dtype).sum(),
            "margin": still.sum(),
            "pairs": still.new_tensor(float(len(pairs))),
        },
    )
