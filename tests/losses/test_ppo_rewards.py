"""Rewards, advantages and the KL: each by hand, and together on a world that can be enumerated."""

import pytest
import torch

from lora_rlhf.losses.ppo import AdaptiveKL, gae, kl_estimators, kl_rewards, policy_loss
from tests.losses.checks import close, ragged_mask
from tests.losses.checks_ppo import (
    check_adaptive_kl,
    check_gae,
    check_kl_estimators,
    check_kl_rewards,
)
from tests.losses.tree import KL_COEF, Tree, check_objective_gradient, policy_gradient


def test_the_reward_is_signed_k1_with_the_score_on_the_last_live_token():
    check_kl_rewards(kl_rewards)


def test_advantages_are_the_double_sum_of_the_paper():
    check_gae(gae)


def test_kl_estimators_have_their_known_means_and_gradients():
    check_kl_estimators(kl_estimators)


def test_k3_of_nearly_equal_policies_keeps_its_digits():
    """exp(-d) - 1 + d is d^2 / 2 for a small d; exp(x) - 1 would leave rounding of size 1e-8."""
    d = torch.tensor([1e-3, -1e-3])
    close(kl_estimators(d, torch.zeros(2)).k3, 0.5 * d.double() ** 2, rtol=1e-3, atol=1e-10)


def test_adaptive_kl_follows_the_formula_of_oai19():
    check_adaptive_kl(AdaptiveKL)


def test_a_step_that_would_turn_the_kl_coefficient_negative_is_refused():
    with pytest.raises(AssertionError, match="horizon 10"):
        AdaptiveKL(0.1, 6.0, 10).update(0.0, 50)


def _random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_lambda_1_gives_the_reward_to_go_minus_the_value():
    rewards, values, mask = _random(0, 3, 7), _random(1, 3, 7), ragged_mask([7, 4, 2], 7)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(-1).cumsum(-1).flip(-1) * mask
    close(advantages, ((to_go - values) * mask).double())
    close(returns, to_go.double())


def test_lambda_0_gives_the_one_step_error():
    rewards, values, mask = _random(0, 3, 7), _random(1, 3, 7), ragged_mask([7, 4, 2], 7)
    advantages, _ = gae(rewards, values, mask, 1.0, 0.0)
    after = torch.nn.functional.pad((values * mask)[:, 1:], (0, 1))
    close(advantages, ((rewards + after - values) * mask).double())


def test_a_reward_on_the_end_token_alone_decays_by_lambda_a_token():
    """Values 0: A_t = lambda^(last - t) * score."""
    mask = ragged_mask([4, 2], 4)
    nothing = torch.zeros(2, 4)
    rewards = kl_rewards(torch.tensor([2.0, -3.0]), nothing, nothing, mask, 0.1)
    advantages, _ = gae(rewards, nothing, mask, 1.0, 0.5)
    close(advantages, [[0.25, 0.5, 1.0, 2.0], [-1.5, -3.0, 0.0, 0.0]])


def test_perfect_values_leave_no_advantage():
    rewards, mask = _random(0, 3, 7), ragged_mask([7, 4, 2], 7)
    to_go = (rewards * mask).flip(-1).cumsum(-1).flip(-1)
    advantages, returns = gae(rewards, to_go, mask, 1.0, 0.95)
    close(advantages, torch.zeros(3, 7), atol=2e-6)  # sums of up to 7 numbers
    close(returns, (to_go * mask).double())


def test_an_unmoved_policy_pays_no_kl_at_all():
    """T9: where the policy is the reference, every reward but the score is exactly 0."""
    logprobs, mask = _random(0, 3, 5), ragged_mask([5, 3, 1], 5)
    rewards = kl_rewards(torch.tensor([1.5, -2.0, 0.25]), logprobs, logprobs.clone(), mask, 0.3)
    expected = torch.zeros(3, 5)
    expected[0, 4], expected[1, 2], expected[2, 0] = 1.5, -2.0, 0.25
    assert torch.equal(rewards, expected)


def test_rewards_and_advantages_carry_no_gradient():
    logprobs = _random(0, 2, 3).requires_grad_()
    mask = ragged_mask([3, 2], 3)
    rewards = kl_rewards(torch.ones(2), logprobs, torch.zeros(2, 3), mask, 0.1)
    advantages, returns = gae(rewards, logprobs, mask, 1.0, 0.95)
    assert not any(x.requires_grad for x in (rewards, advantages, returns))


def test_the_whole_loss_climbs_the_kl_penalised_objective():
    """Expected gradient over all 15 responses = gradient of -J, to 1e-9."""
    check_objective_gradient(kl_rewards, gae, policy_loss)


def test_the_optimum_gets_the_same_total_reward_for_every_response():
    """At pi* = ref * exp(score / kl_coef) / Z every response earns J* = kl_coef * ln Z."""
    tree = Tree()
    best, j_star = tree.optimum()
    rewards = kl_rewards(
        tree.scores, tree.logprobs(best), tree.logprobs(tree.ref_logits), tree.mask, KL_COEF
    )
    close(rewards.sum(-1), j_star.expand(len(tree.responses)), rtol=1e-9, atol=1e-12)
    close(tree.objective(best), j_star, rtol=1e-9, atol=1e-12)


def test_the_loss_has_no_gradient_at_the_optimum():
    tree = Tree()
    best, _ = tree.optimum()
    best = torch.log_softmax(best, -1).requires_grad_()
    values = tree.true_values(best)
    gradient = policy_gradient(tree, kl_rewards, gae, policy_loss, values, 0.95, logits=best)
    close(gradient, torch.zeros_like(best), atol=1e-10)
