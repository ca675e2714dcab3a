"""Schedule, clipping and the step, against closed forms and torch itself."""

import math

import pytest
import torch
from torch import nn

from lora_rlhf.errors import TrainingError
from lora_rlhf.recipe import Sft
from lora_rlhf.training.optim import (
    Group,
    clip_and_step,
    ema_update,
    make_optimizer,
    require_finite,
    schedule_factor,
)


def factors(schedule, warmup, total):
    settings = Sft(schedule=schedule, warmup_fraction=warmup)
    return [schedule_factor(settings, step, total) for step in range(total)]


def test_warm_up_rises_linearly_and_reaches_one_right_after_it():
    found = factors("constant", 0.4, 10)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 6, abs=1e-12)


def test_cosine_falls_from_one_to_a_tenth():
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert factors("cosine", 0.0, 8) == pytest.approx(expected, abs=1e-12)
    assert expected[4] == pytest.approx(0.55, abs=1e-12)
    settings = Sft(schedule="cosine", warmup_fraction=0.0)
    assert schedule_factor(settings, 8, 8) == pytest.approx(0.1, abs=1e-12)


def test_linear_falls_from_one_towards_zero():
    assert factors("linear", 0.0, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-12)


def test_the_fall_begins_after_the_warm_up():
    found = factors("linear", 0.5, 4)
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5], abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_no_step_has_a_rate_of_zero_or_above_the_peak(schedule, total):
    for warmup in (0.0, 0.03, 1.0):
        assert all(0.0 < f <= 1.0 for f in factors(schedule, warmup, total))


# -- the step -----------------------------------------------------------------------------------


def two_groups(rates=(0.5, 0.25)):
    made = []
    for name, values, rate in zip(
        ("policy", "value"), ([3.0, 4.0], [0.3, 0.4]), rates, strict=True
    ):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor(values)
        made.append(Group(name, [parameter], rate))
    return made


def test_each_group_is_clipped_by_its_own_norm():
    """A large policy gradient must not shrink the value's: norms 5 and 0.5, limit 1."""
    groups, seen = two_groups(), []
    optimizer = make_optimizer(groups, weight_decay=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([g.parameters[0].grad.clone() for g in groups])
    )
    norms = clip_and_step(optimizer, groups, 1.0, 1.0, "here")
    assert norms == pytest.approx({"policy": 5.0, "value": 0.5}, abs=1e-6)
    torch.testing.assert_close(seen[0][0], torch.tensor([0.6, 0.8]), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0][1], torch.tensor([0.3, 0.4]), rtol=0, atol=0)


def test_the_first_step_of_each_group_is_its_rate_times_the_factor():
    """Adam's first update is the sign of the gradient times the rate (eps apart)."""
    groups = two_groups()
    optimizer = make_optimizer(groups, weight_decay=0.0)
    clip_and_step(optimizer, groups, 0.1, 1.0, "here")
    for group in groups:
        moved = torch.full((2,), -0.1 * group.learning_rate)
        torch.testing.assert_close(group.parameters[0].data, moved, rtol=1e-5, atol=0)
        assert group.parameters[0].grad is None


def test_the_optimizer_is_adam_as_the_paper_has_it():
    """Three steps by hand: betas (0.9, 0.95), bias correction, eps outside of the root."""
    gradients, rate, eps = [0.5, -0.2, 0.9], 0.01, 1e-5
    parameter = nn.Parameter(torch.zeros(1))
    groups = [Group("policy", [parameter], rate)]
    optimizer = make_optimizer(groups, weight_decay=0.0, eps=eps)
    weight = first = second = 0.0
    for step, gradient in enumerate(gradients, 1):
        parameter.grad = torch.tensor([gradient])
        clip_and_step(optimizer, groups, 1.0, 1e9, "here")
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        mean, spread = first / (1 - 0.9**step), math.sqrt(second / (1 - 0.95**step))
        weight -= rate * mean / (spread + eps)
    assert parameter.item() == pytest.approx(weight, rel=1e-5)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_named():
    groups = two_groups()
    groups[1].parameters[0].grad[0] = math.inf
    optimizer = make_optimizer(groups, weight_decay=0.1)
    with pytest.raises(TrainingError, match=r"ppo step 7: gradient norm of value is inf"):
        clip_and_step(optimizer, groups, 1.0, 1.0, "ppo step 7")
    assert not any(g.parameters[0].any() for g in groups)
    assert not optimizer.state


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_stop_the_run(value):
    with pytest.raises(TrainingError, match=r"sft step 3: loss is .*--resume"):
        require_finite(value, "loss", "sft step 3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_parameters_are_refused(dtype):
    parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
    with pytest.raises(AssertionError, match="policy must train in fp32"):
        make_optimizer([Group("policy", [parameter], 1e-3)], 0.0)


def test_the_exponential_mean_has_its_closed_form():
    """After n updates: d^n x_0 + (1 - d) sum_k d^(n-k) x_k."""
    decay, values = 0.9, [4.0, 1.0, -2.0, 3.0]
    parameter = nn.Parameter(torch.tensor([values[0]]))
    mean = {"a": parameter.detach().clone()}
    for value in values[1:]:
        parameter.data.fill_(value)
        ema_update(mean, {"a": parameter}, decay)
    n = len(values) - 1
    expected = decay**n * values[0]
    expected += (1 - decay) * sum(decay ** (n - k) * values[k] for k in range(1, n + 1))
    assert float(mean["a"]) == pytest.approx(expected, abs=1e-6)
    assert parameter.item() == values[-1]
