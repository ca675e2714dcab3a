"""Oracles for masks, log-probabilities, SFT and ranking, each written as a check of a function.

A check takes the function to be judged, so that the truth tests call it with ours and the mutant
tests with wrong ones. Expected numbers come from numpy, from `math`, or from a closed form.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAN = float("nan")
# fp32 against an fp64 oracle on numbers of size 1.
RTOL, ATOL = 1e-5, 1e-6


def close(actual: Tensor, expected: Any, rtol: float = RTOL, atol: float = ATOL) -> None:
    """Fail unless equal to the oracle's number within fp32 rounding."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=atol)


def ragged_mask(lengths: list[int], width: int) -> Tensor:
    """(b, r), True on the first `lengths[i]` entries of row i."""
    return torch.arange(width).expand(len(lengths), width) < torch.tensor(lengths).unsqueeze(1)


def check_masked_mean(masked_mean: Callable[..., Tensor]) -> None:
    """Mean of 1, 2, 6 is 3, with NaN and a large number under the mask; of nothing it is 0."""
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, 1e6, NAN]])
    close(masked_mean(x, ragged_mask([2, 1], 3)), 3.0)
    close(masked_mean(x, ragged_mask([0, 0], 3)), 0.0)


def check_masked_var(masked_var: Callable[..., Tensor]) -> None:
    """1, 2, 6 have mean 3 and biased variance (4 + 1 + 9) / 3; one number has none."""
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, 1e6, NAN]])
    close(masked_var(x, ragged_mask([2, 1], 3)), 14 / 3)
    close(masked_var(x, ragged_mask([1, 0], 3)), 0.0)


def check_whiten(whiten: Callable[..., Tensor]) -> None:
    """Against numpy on the live numbers alone, with positive mean and huge padding."""
    rng = np.random.default_rng(0)
    mask = ragged_mask([5, 2, 4, 1], 5)
    x = rng.normal(loc=4.0, scale=3.0, size=(4, 5))
    live = x[mask.numpy()]
    x[~mask.numpy()] = 1e4
    centred = (x - live.mean()) / np.sqrt(live.var() + 1e-8)
    for shift_mean, expected in ((True, centred), (False, centred + live.mean())):
        y = whiten(torch.tensor(x, dtype=torch.float32), mask, shift_mean=shift_mean)
        close(y, np.where(mask.numpy(), expected, 0.0), atol=1e-5)  # values of size 5
    y = whiten(torch.tensor(x, dtype=torch.float32), mask)[mask].numpy()
    assert abs(y.mean()) < 1e-6
    assert abs(y.var() - 1.0) < 1e-5


def check_sft_loss(sft_loss: Callable[..., Any]) -> None:
    """-(-1 - 2 - 4) over 3 response tokens; prompt and padding count for nothing."""
    logprobs = torch.tensor([[-9.0, -1.0, -2.0], [-9.0, -4.0, NAN]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [False, True, False]])
    out = sft_loss(logprobs, mask)
    close(out.total, 7.0)
    assert int(out.count) == 3
    (gradient,) = torch.autograd.grad(out.total, logprobs)
    close(gradient, -mask.double())


def ranking_oracle(scores: list[float], groups: Any) -> tuple[float, int, float, float]:
    """Loss, pairs, correct and margin of one prompt, by loops and `math` alone."""
    place = {i: g for g, group in enumerate(groups) for i in group}
    losses, correct, margin = [], 0.0, 0.0
    for i, j in itertools.permutations(place, 2):
        if place[i] < place[j]:
            difference = scores[i] - scores[j]
            losses.append(-math.log(1.0 / (1.0 + math.exp(-difference))))
            correct += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
            margin += difference
    return sum(losses) / max(len(losses), 1), len(losses), correct, margin


RANKINGS: list[tuple[list[float], Any]] = [
    ([1.5, -0.5], ((0,), (1,))),
    ([0.25, 2.0, -1.0, 0.25], ((2,), (0, 1), (3,))),  # ties in rank, a tie in score
    ([0.1, -0.7, 0.3, 1.1, -2.0, 0.0, 0.6], ((4,), (0,), (1,), (6,), (3,), (5,), (2,))),
    ([3.0, 1.0, 2.0], ((1,), (2,))),  # answer 0 is not ranked
    ([3.0, 1.0, 2.0], ((0, 1, 2),)),  # all tie: no pair
]


def check_ranking_loss(ranking_loss: Callable[..., Any]) -> None:
    """The mean over strict pairs; its gradient is the mean of sigmoid(r_w - r_l) - 1 for r_w."""
    for numbers, groups in RANKINGS:
        loss, pairs, correct, margin = ranking_oracle(numbers, groups)
        scores = torch.tensor(numbers, requires_grad=True)
        out = ranking_loss(scores, groups)
        close(out.total, loss)
        assert int(out.count) == min(pairs, 1)
        close(out.metrics["pairs"], pairs)
        close(out.metrics["correct"], correct)
        close(out.metrics["margin"], margin)
        place = {i: g for g, group in enumerate(groups) for i in group}
        expected = [0.0] * len(numbers)
        for i, j in itertools.permutations(place, 2):
            if place[i] < place[j]:
                pull = (1.0 / (1.0 + math.exp(numbers[j] - numbers[i])) - 1.0) / pairs
                expected[i] += pull
                expected[j] -= pull
        (gradient,) = torch.autograd.grad(out.total, scores)
        close(gradient, expected)


def full_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The plain way in fp64: all logits, log_softmax, gather; and the entropy."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)


def check_token_logprobs(token_logprobs: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Values, entropy and the gradient for unequal weights, against the plain way in fp64."""
    g = torch.Generator().manual_seed(0)
    n, d, v = 7, 5, 11
    weight, bias = torch.randn(v, d, generator=g), torch.randn(v, generator=g)
    targets = torch.randint(0, v, (n,), generator=g)
    upstream = torch.randn(n, generator=g)
    start = torch.randn(n, d, generator=g)
    for temperature, chunk, head_bias in itertools.product(
        (1.0, 0.7), (1, 3, 7, 100), (None, bias)
    ):
        hidden, plain = start.clone().requires_grad_(), start.double().requires_grad_()
        logprobs, entropy = token_logprobs(
            hidden, weight, targets, temperature=temperature, chunk=chunk, head_bias=head_bias
        )
        expected, spread = full_logprobs(plain, weight, head_bias, targets, temperature)
        close(logprobs, expected.detach())
        close(entropy, spread.detach())
        assert not entropy.requires_grad
        (gradient,) = torch.autograd.grad((logprobs * upstream).sum(), hidden)
        (truth,) = torch.autograd.grad((expected * upstream.double()).sum(), plain)
        close(gradient, truth)


def check_logprobs_from_logits(logprobs_from_logits: Callable[..., Tensor]) -> None:
    """Logits ln 1, ln 2, ln 5: probabilities 1, 2, 5 of 8; at temperature 1/2 1, 4, 25 of 30."""
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(2, 3)
    targets = torch.tensor([2, 1])
    close(logprobs_from_logits(logits, targets), [math.log(5 / 8), math.log(2 / 8)])
    close(logprobs_from_logits(logits, targets, 0.5), [math.log(25 / 30), math.log(4 / 30)])
