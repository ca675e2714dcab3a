"""The clipped losses and the explained variance."""

import torch

from lora_rlhf.losses.masked import whiten
from lora_rlhf.losses.ppo import explained_variance, policy_loss, value_loss
from tests.losses.checks import close, ragged_mask
from tests.losses.checks_ppo import (
    check_explained_variance,
    check_policy_loss,
    check_value_loss,
)

MASK = ragged_mask([5, 2, 3], 5)


def _random(seed):
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))


def test_each_branch_of_the_policy_clip_is_as_by_hand():
    check_policy_loss(policy_loss)


def test_each_branch_of_the_value_clip_is_as_by_hand():
    check_value_loss(value_loss)


def test_explained_variance_is_as_by_hand():
    check_explained_variance(explained_variance)


def test_ratio_1_gives_minus_the_mean_advantage():
    logprobs, advantages = _random(0), _random(1)
    for clip_range in (None, 0.2):
        out = policy_loss(logprobs, logprobs.clone(), advantages, MASK, clip_range)
        close(out.means()["loss"], -advantages[MASK].double().mean())
        assert out.means()["ratio_mean"] == out.means()["ratio_max"] == 1.0
        assert out.means()["clip_fraction"] == out.means()["approx_kl"] == 0.0


def test_whitened_advantages_at_ratio_1_give_loss_zero():
    logprobs = _random(0)
    out = policy_loss(logprobs, logprobs, whiten(_random(1) + 3.0, MASK), MASK, 0.2)
    close(out.means()["loss"], 0.0)


def test_no_clip_range_means_no_clipping():
    logprobs, old, advantages = 3 * _random(0), 3 * _random(1), _random(2)
    out = policy_loss(logprobs, old, advantages, MASK, None)
    ratio = (logprobs - old).double().exp()
    close(out.total, -(advantages.double() * ratio)[MASK].sum())
    assert out.metrics["clip_fraction"] == 0.0
    out = value_loss(logprobs, old, advantages, MASK, None)
    close(out.total, 0.5 * ((logprobs - advantages).double() ** 2)[MASK].sum())
    assert out.metrics["clip_fraction"] == 0.0


def test_the_losses_have_gradients_for_the_trained_tensor_alone():
    new, old, target = (_random(i).requires_grad_() for i in range(3))
    for loss in (policy_loss, value_loss):
        out = loss(new, old.detach(), target, MASK, 0.2)
        gradients = torch.autograd.grad(out.total, (new, target), allow_unused=True)
        assert gradients[0] is not None
        assert gradients[1] is None
        assert not any(m.requires_grad for m in out.metrics.values())


def test_bfloat16_inputs_give_float32_losses():
    new, old, target = (_random(i).bfloat16() for i in range(3))
    for loss in (policy_loss, value_loss):
        narrow, wide = (
            loss(*x, MASK, 0.2)
            for x in ((new, old, target), (new.float(), old.float(), target.float()))
        )
        assert narrow.total.dtype == torch.float32
        close(narrow.total, wide.total)


def test_an_empty_mask_gives_zero_and_a_zero_gradient():
    new = _random(0).requires_grad_()
    nothing = torch.zeros_like(MASK)
    for loss in (policy_loss, value_loss):
        out = loss(new, _random(1), _random(2), nothing, 0.2)
        assert int(out.count) == 0
        assert all(m == 0.0 for m in out.means().values())
        (gradient,) = torch.autograd.grad(out.total, new)
        close(gradient, torch.zeros(3, 5))


def test_perfect_constant_and_useless_values_explain_1_0_and_less():
    returns = _random(0)
    close(explained_variance(returns + 7.0, returns, MASK), 1.0)
    close(explained_variance(torch.full((3, 5), 2.0), returns, MASK), 0.0)
    close(explained_variance(-returns, returns, MASK), -3.0)
