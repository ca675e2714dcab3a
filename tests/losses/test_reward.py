"""The ranking loss: pairs, ties, gradients, and what it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

from lora_rlhf.losses.outputs import merge
from lora_rlhf.losses.reward import ranking_loss, strict_pairs
from tests.losses.checks import check_ranking_loss, close


def test_ranking_loss_is_the_mean_over_strict_pairs():
    check_ranking_loss(ranking_loss)


def test_strict_pairs_leave_out_ties():
    assert sorted(strict_pairs(((2,), (0, 1), (3,)))) == [(0, 3), (1, 3), (2, 0), (2, 1), (2, 3)]
    assert strict_pairs(((0, 1, 2),)) == []


def test_a_pair_of_equal_scores_costs_ln_2():
    out = ranking_loss(torch.tensor([0.3, 0.3]), ((1,), (0,)))
    close(out.total, math.log(2.0))
    close(out.metrics["correct"], 0.5)


def test_swapping_winner_and_loser_is_changing_the_sign_of_the_margin():
    scores = torch.tensor([1.7, -0.4])
    close(ranking_loss(scores, ((1,), (0,))).total, ranking_loss(-scores, ((0,), (1,))).total)


def test_a_far_margin_neither_overflows_nor_loses_its_gradient():
    scores = torch.tensor([-500.0, 500.0], requires_grad=True)
    out = ranking_loss(scores, ((0,), (1,)))
    close(out.total, 1000.0)
    (gradient,) = torch.autograd.grad(out.total, scores)
    close(gradient, [-1.0, 1.0])


def test_one_group_has_the_gradient_of_its_pairs_in_a_batch():
    """T8: K = 5 answers at once against all 10 pairs as separate batch elements."""
    scores = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    order = (3, 0, 4, 1, 2)
    whole = ranking_loss(scores, [[i] for i in order])
    pairs = [(order[a], order[b]) for a in range(5) for b in range(a + 1, 5)]
    batch = merge(ranking_loss(scores[[i, j]], ((0,), (1,))) for i, j in pairs)
    assert int(batch.count) == 10
    close(whole.total, (batch.total / batch.count).detach())
    (one,) = torch.autograd.grad(whole.total, scores)
    (other,) = torch.autograd.grad(batch.total / batch.count, scores)
    close(one, other)


def test_an_answer_ranked_twice_is_refused():
    with pytest.raises(AssertionError, match="twice"):
        ranking_loss(torch.zeros(3), ((0, 1), (1,)))


def test_an_answer_that_does_not_exist_is_refused():
    with pytest.raises(AssertionError, match="none of 2"):
        ranking_loss(torch.zeros(2), ((0,), (2,)))


def test_a_linear_utility_is_recovered_from_noisy_rankings():
    """T5: 500 prompts, K = 4, Plackett-Luce rankings of u . x by Gumbel noise, so slope 1.

    The utility has a spread of about 2, at which the labeler agrees with it in 77 % of pairs.
    """
    g = torch.Generator().manual_seed(1)
    utility = torch.randn(16, generator=g, dtype=torch.float64) / 2
    answers = torch.randn(500, 4, 16, generator=g, dtype=torch.float64)
    true = answers @ utility
    gumbel = -torch.log(-torch.log(torch.rand(500, 4, generator=g, dtype=torch.float64)))
    orders = (true + gumbel).argsort(dim=1, descending=True).tolist()
    weight = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scores = answers @ weight
        out = merge(ranking_loss(s, [[i] for i in o]) for s, o in zip(scores, orders, strict=True))
        loss = out.total / out.count
        loss.backward()
        return loss

    optimizer.step(closure)
    fresh = torch.randn(20_000, 2, 16, generator=g, dtype=torch.float64)
    truth, learned = fresh @ utility, (fresh @ weight).detach()
    stacked = torch.stack([truth.flatten(), learned.flatten()])
    assert torch.corrcoef(stacked)[0, 1] > 0.99
    slope = torch.cov(stacked)[0, 1] / truth.var()
    assert 0.9 <= slope <= 1.15
    # Chance that a noisy labeler agrees with each one's order.
    first = torch.sigmoid(truth[:, 0] - truth[:, 1])
    bayes = torch.maximum(first, 1 - first).mean()
    says_first = learned[:, 0] > learned[:, 1]
    accuracy = torch.where(says_first, first, 1 - first).mean()
    assert accuracy >= bayes - 0.01


def test_the_loss_of_a_pair_is_binary_cross_entropy():
    scores = torch.tensor([0.8, -1.1])
    expected = F.binary_cross_entropy_with_logits(scores[1] - scores[0], torch.tensor(1.0))
    close(ranking_loss(scores, ((1,), (0,))).total, expected)
