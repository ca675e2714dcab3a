"""Every differentiable function against finite differences in fp64."""

import torch
from torch.autograd import gradcheck

from lora_rlhf.losses.logprobs import logprobs_from_logits, token_logprobs
from lora_rlhf.losses.masked import masked_mean, masked_sum, masked_var, whiten
from lora_rlhf.losses.ppo import kl_estimators, policy_loss, value_loss
from lora_rlhf.losses.reward import ranking_loss
from lora_rlhf.losses.sft import sft_loss
from tests.losses.checks import ragged_mask

MASK = ragged_mask([4, 2, 1], 4)


def _random(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _agrees(function, *shape):
    assert gradcheck(function, (_random(0, *shape).requires_grad_(),), eps=1e-6, atol=1e-7)


def test_masked_functions():
    for function in (masked_sum, masked_mean, masked_var, whiten):
        _agrees(lambda x, f=function: f(x, MASK), 3, 4)
    _agrees(lambda x: whiten(x, MASK, shift_mean=False), 3, 4)


def test_token_logprobs():
    weight, bias, targets = _random(1, 7, 3), _random(2, 7), torch.tensor([0, 6, 3, 3, 2])
    _agrees(lambda h: token_logprobs(h, weight, targets, 0.7, chunk=2, head_bias=bias)[0], 5, 3)


def test_logprobs_from_logits():
    _agrees(lambda x: logprobs_from_logits(x, torch.tensor([0, 6, 3]), 0.7), 3, 7)


def test_sft_loss():
    _agrees(lambda x: sft_loss(x, MASK).total, 3, 4)


def test_ranking_loss():
    _agrees(lambda x: ranking_loss(x, ((2,), (0, 4), (1,))).total, 5)


def test_policy_loss_on_both_sides_of_the_clip():
    old, advantages = _random(3, 3, 4), _random(4, 3, 4)
    for clip_range in (None, 0.2):
        _agrees(lambda x, c=clip_range: policy_loss(x, old, advantages, MASK, c).total, 3, 4)


def test_value_loss_on_both_sides_of_the_clip():
    old, returns = _random(3, 3, 4), _random(4, 3, 4)
    for clip_range in (None, 0.2):
        _agrees(lambda x, c=clip_range: value_loss(x, old, returns, MASK, c).total, 3, 4)


def test_kl_estimators():
    _agrees(lambda x: tuple(kl_estimators(x, _random(5, 3, 4))), 3, 4)
