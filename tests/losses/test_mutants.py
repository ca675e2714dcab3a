"""Negative control: for every oracle, wrong versions that it must reject.

Each mutant is a mistake that a known project has made, or a plausible slip. The checks are the
very ones that the truth tests call with our functions. Where a mistake can be made by calling the
right function with wrong arguments, the mutant does that; else it is a re-implementation.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_rlhf.losses import logprobs as ours_logprobs
from lora_rlhf.losses import masked as ours_masked
from lora_rlhf.losses import ppo as ours
from lora_rlhf.losses.outputs import LossOutput
from lora_rlhf.losses.reward import ranking_loss, strict_pairs
from lora_rlhf.losses.sft import sft_loss
from tests.losses import checks

Mutant = tuple[str, Callable[..., None], Callable[..., Any]]


# -- masks and whitening ------------------------------------------------------------------------


def mean_over_the_shape(x: Tensor, mask: Tensor) -> Tensor:
    return ours_masked.masked_sum(x, mask) / mask.numel()


def mean_by_product(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def mean_without_a_guard(x: Tensor, mask: Tensor) -> Tensor:
    return ours_masked.masked_sum(x, mask) / mask.sum()


def variance_with_bessel(x: Tensor, mask: Tensor) -> Tensor:
    n = mask.sum()
    return ours_masked.masked_var(x, mask) * n / (n - 1).clamp(min=1)


def variance_about_zero(x: Tensor, mask: Tensor) -> Tensor:
    return ours_masked.masked_mean(x.square(), mask)


def whiten_with_the_flag_inverted(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """torchtune's."""
    return ours_masked.whiten(x, mask, not shift_mean)


def whiten_with_the_mean_kept(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return ours_masked.whiten(x, mask, shift_mean=False)


def whiten_with_padding(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return ours_masked.whiten(x, torch.ones_like(mask), shift_mean).masked_fill(~mask, 0.0)


def whiten_without_masking_the_result(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    live = ours_masked.whiten(x, mask, shift_mean)
    return live.masked_fill(~mask, live[mask].mean().item() + 1.0)


def whiten_by_the_variance(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return ours_masked.whiten(x, mask, shift_mean) / ours_masked.masked_var(x, mask).sqrt()


def whiten_each_row(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    rows = zip(x.split(1), mask.split(1), strict=True)
    return torch.cat([ours_masked.whiten(r, m, shift_mean) for r, m in rows])


MASKED: list[Mutant] = [
    ("mean over the shape", checks.check_masked_mean, mean_over_the_shape),
    ("mean by product lets NaN in", checks.check_masked_mean, mean_by_product),
    ("mean of nothing is NaN", checks.check_masked_mean, mean_without_a_guard),
    ("variance with Bessel", checks.check_masked_var, variance_with_bessel),
    ("variance about zero", checks.check_masked_var, variance_about_zero),
    ("flag inverted", checks.check_whiten, whiten_with_the_flag_inverted),
    ("mean kept", checks.check_whiten, whiten_with_the_mean_kept),
    ("padding whitened along", checks.check_whiten, whiten_with_padding),
    ("padding not zeroed", checks.check_whiten, whiten_without_masking_the_result),
    ("divided by the variance", checks.check_whiten, whiten_by_the_variance),
    ("each row for itself", checks.check_whiten, whiten_each_row),
]


# -- log-probabilities --------------------------------------------------------------------------


def logprobs_with(**wrong: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """token_logprobs with arguments replaced; a callable is given the right one."""

    def mutant(hidden: Tensor, weight: Tensor, targets: Tensor, **given: Any) -> Any:
        given |= {"targets": targets}
        given |= {k: f(given[k]) if callable(f) else f for k, f in wrong.items()}
        return ours_logprobs.token_logprobs(hidden, weight, **given)

    return mutant


def logprobs_with_a_wrong_gradient(factor: Callable[[float], float]) -> Callable[..., Any]:
    """The right values, and a gradient off by a factor of the temperature."""

    def mutant(*tensors: Tensor, temperature: float, **given: Any) -> tuple[Tensor, Tensor]:
        values, entropy = ours_logprobs.token_logprobs(*tensors, temperature=temperature, **given)
        scaled = values * factor(temperature)
        return scaled + (values - scaled).detach(), entropy

    return mutant


def logprobs_with_entropy_of_temperature_1(*tensors: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    values, _ = ours_logprobs.token_logprobs(*tensors, **given)
    return values, ours_logprobs.token_logprobs(*tensors, **(given | {"temperature": 1.0}))[1]


def logprobs_without_the_last_partial_chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, **given: Any
) -> tuple[Tensor, Tensor]:
    whole = len(targets) // chunk * chunk
    pair = ours_logprobs.token_logprobs(hidden[:whole], weight, targets[:whole], **given)
    values, entropy = (F.pad(x, (0, len(targets) - whole)) for x in pair)
    return values + 0.0 * hidden.sum(), entropy


def logits_not_normalised(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) / temperature


def temperature_after_the_softmax(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    return ours_logprobs.logprobs_from_logits(logits, targets) / temperature


LOGPROBS: list[Mutant] = [
    (name, checks.check_token_logprobs, mutant)
    for name, mutant in (
        ("temperature ignored", logprobs_with(temperature=1.0)),
        ("temperature multiplied", logprobs_with(temperature=lambda t: 1.0 / t)),
        ("bias ignored", logprobs_with(head_bias=None)),
        ("targets shifted by one", logprobs_with(targets=lambda t: t.roll(1))),
        ("gradient without 1 / temperature", logprobs_with_a_wrong_gradient(lambda t: t)),
        ("gradient of the other sign", logprobs_with_a_wrong_gradient(lambda t: -1.0)),
        ("entropy at temperature 1", logprobs_with_entropy_of_temperature_1),
        ("last partial chunk lost", logprobs_without_the_last_partial_chunk),
    )
] + [
    ("not normalised", checks.check_logprobs_from_logits, logits_not_normalised),
    ("temperature too late", checks.check_logprobs_from_logits, temperature_after_the_softmax),
]


# -- SFT and ranking ----------------------------------------------------------------------------


def sft_as_a_mean(logprobs: Tensor, mask: Tensor) -> LossOutput:
    out = sft_loss(logprobs, mask)
    return out._replace(total=out.total / out.count)


def sft_on_the_prompt_too(logprobs: Tensor, mask: Tensor) -> LossOutput:
    return sft_loss(logprobs, mask | (torch.arange(mask.shape[1]) == 0))


def sft_without_the_end_token(logprobs: Tensor, mask: Tensor) -> LossOutput:
    return sft_loss(logprobs, mask & ~ours._last_live(mask))


def sft_counting_the_shape(logprobs: Tensor, mask: Tensor) -> LossOutput:
    return sft_loss(logprobs, mask)._replace(count=torch.tensor(mask.numel()))


def sft_of_the_other_sign(logprobs: Tensor, mask: Tensor) -> LossOutput:
    return sft_loss(-logprobs, mask)


def ranking_worst_first(scores: Tensor, groups: Any) -> LossOutput:
    return ranking_loss(scores, groups[::-1])


def ranking_as_a_sum(scores: Tensor, groups: Any) -> LossOutput:
    out = ranking_loss(scores, groups)
    return out._replace(total=out.total * out.metrics["pairs"])


def ranking_with_ties_as_wins(scores: Tensor, groups: Any) -> LossOutput:
    return ranking_loss(scores, [[i] for group in groups for i in group])


def ranking_over_all_pairs(scores: Tensor, groups: Any) -> LossOutput:
    """The mean over C(K, 2), ties and unranked answers in the denominator."""
    out, k = ranking_loss(scores, groups), len(scores)
    return out._replace(total=out.total * len(strict_pairs(groups)) / (k * (k - 1) / 2))


def ranking_of_neighbours(scores: Tensor, groups: Any) -> LossOutput:
    parts = [ranking_loss(scores, pair).total for pair in pairwise(groups)]
    total = torch.stack([*parts, 0.0 * scores.sum()]).sum() / max(len(parts), 1)
    return ranking_loss(scores, groups)._replace(total=total)


def ranking_counting_pairs(scores: Tensor, groups: Any) -> LossOutput:
    out = ranking_loss(scores, groups)
    return out._replace(count=out.metrics["pairs"])


def ranking_with_score_ties_wrong(scores: Tensor, groups: Any) -> LossOutput:
    out = ranking_loss(scores, groups)
    wins = sum(float(scores[i] > scores[j]) for i, j in strict_pairs(groups))
    return out._replace(metrics=out.metrics | {"correct": torch.tensor(wins)})


OFFLINE: list[Mutant] = [
    ("SFT: a mean", checks.check_sft_loss, sft_as_a_mean),
    ("SFT: loss on the prompt", checks.check_sft_loss, sft_on_the_prompt_too),
    ("SFT: end token not learned", checks.check_sft_loss, sft_without_the_end_token),
    ("SFT: counts the shape", checks.check_sft_loss, sft_counting_the_shape),
    ("SFT: sign", checks.check_sft_loss, sft_of_the_other_sign),
    ("ranking: worst first", checks.check_ranking_loss, ranking_worst_first),
    ("ranking: a sum", checks.check_ranking_loss, ranking_as_a_sum),
    ("ranking: ties are wins", checks.check_ranking_loss, ranking_with_ties_as_wins),
    ("ranking: mean over C(K, 2)", checks.check_ranking_loss, ranking_over_all_pairs),
    ("ranking: neighbours alone", checks.check_ranking_loss, ranking_of_neighbours),
    ("ranking: counts pairs", checks.check_ranking_loss, ranking_counting_pairs),
    ("ranking: tied scores are wrong", checks.check_ranking_loss, ranking_with_score_ties_wrong),
]

SIMPLE = MASKED + LOGPROBS + OFFLINE


@pytest.mark.parametrize(("check", "mutant"), [m[1:] for m in SIMPLE], ids=[m[0] for m in SIMPLE])
def test_the_oracle_rejects(check, mutant):
    with pytest.raises(AssertionError):
        check(mutant)
