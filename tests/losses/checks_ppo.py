"""Oracles for PPO's rewards, advantages and losses, each written as a check of a function."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.losses.checks import NAN, close, ragged_mask


def check_kl_rewards(kl_rewards: Callable[..., Tensor]) -> None:
    """By hand at kl_coef 0.5; k1 = logprobs - ref_logprobs.

    row 0: k1 = 1, -1/2, 1 and score 4 on the third of four: -1/2, 1/4, -1/2 + 4, 0
    row 1: k1 = 1, 0, 2, -1 and score -2 on the fourth: -1/2, 0, -1, 1/2 - 2
    row 2: k1 = 2 and score 3/2 on the only token: -1 + 3/2
    row 3: no live token, no reward.
    """
    mask = ragged_mask([3, 4, 1, 0], 4)
    logprobs = torch.tensor(
        [[-1.0, -2.0, -0.5, NAN], [-0.1, -1.0, -1.0, -2.0], [-1.0, 5.0, 5.0, 5.0], [NAN] * 4]
    )
    ref_logprobs = torch.tensor(
        [[-2.0, -1.5, -1.5, 9.0], [-1.1, -1.0, -3.0, -1.0], [-3.0, 7.0, 8.0, NAN], [1.0] * 4]
    )
    rewards = kl_rewards(torch.tensor([4.0, -2.0, 1.5, 9.0]), logprobs, ref_logprobs, mask, 0.5)
    close(
        rewards,
        [
            [-0.5, 0.25, 3.5, 0.0],
            [-0.5, 0.0, -1.0, -1.5],
            [0.5, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0],
        ],
    )


def gae_oracle(
    rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float
) -> np.ndarray:
    """A_t = sum_l (gamma lambda)^l delta_{t+l} of one response, by the double sum of the paper."""
    n = len(rewards)
    after = np.append(values[1:], 0.0)
    delta = rewards + gamma * after - values
    return np.array(
        [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    )


def check_gae(gae: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Against the double sum on each row's live tokens alone; padding holds large numbers."""
    rng = np.random.default_rng(1)
    ragged = ragged_mask([6, 3, 1, 0, 5], 6)
    hollow = torch.tensor([[True, False, True, True, False, True]] * 5)
    for mask in (ragged, hollow):
        for gamma, gae_lambda in ((1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.9, 0.8)):
            rewards, values = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
            advantages, returns = np.zeros((5, 6)), np.zeros((5, 6))
            for row, live in enumerate(mask.numpy()):
                found = gae_oracle(rewards[row, live], values[row, live], gamma, gae_lambda)
                advantages[row, live] = found
                returns[row, live] = found + values[row, live]
            rewards[~mask.numpy()] = 50.0
            values[~mask.numpy()] = -70.0
            actual = gae(
                torch.tensor(rewards, dtype=torch.float32),
                torch.tensor(values, dtype=torch.float32),
                mask,
                gamma,
                gae_lambda,
            )
            close(actual[0], advantages)
            close(actual[1], returns)


# (advantage, ratio) -> (loss, d loss / d logprob) at clip_range 0.2: one token for each branch.
POLICY_BRANCHES = [
    ((2.0, 1.0), (-2.0, -2.0)),  # inside
    ((2.0, 1.5), (-2.4, 0.0)),  # good and already likelier: cut off at 1.2
    ((2.0, 0.5), (-1.0, -1.0)),  # good and less likely: not cut off
    ((-1.0, 1.5), (1.5, 1.5)),  # bad and likelier: not cut off
    ((-1.0, 0.5), (0.8, 0.0)),  # bad and already less likely: cut off at 0.8
]


def check_policy_loss(policy_loss: Callable[..., Any]) -> None:
    """Each branch of the clip by hand, in rows of 4 and 1 tokens, with NaN padding."""
    mask = ragged_mask([4, 1], 4)
    advantages, old = torch.full((2, 4), 99.0), torch.full((2, 4), NAN)
    logprobs = torch.full((2, 4), 50.0)
    expected = torch.zeros(2, 4)
    for place, ((advantage, ratio), (_, slope)) in zip(
        mask.nonzero().tolist(), POLICY_BRANCHES, strict=True
    ):
        row, column = place
        advantages[row, column], expected[row, column] = advantage, slope
        old[row, column] = -1.25
        logprobs[row, column] = -1.25 + math.log(ratio)
    logprobs.requires_grad_()
    out = policy_loss(logprobs, old, advantages, mask, 0.2)
    close(out.total, sum(loss for _, (loss, _) in POLICY_BRANCHES))
    assert int(out.count) == 5
    (gradient,) = torch.autograd.grad(out.total, logprobs)
    close(gradient, expected)
    close(out.metrics["clip_fraction"], 2.0)
    close(out.metrics["approx_kl"], math.log(1.5) ** 2 + math.log(0.5) ** 2)
    close(out.metrics["ratio_mean"], 5.0)
    close(out.metrics["ratio_max"], 1.5)


# (value, old value, return) -> (loss, d loss / d value) at clip_range 0.5.
VALUE_BRANCHES = [
    ((1.0, 0.8, 2.0), (0.5, -1.0)),  # inside
    ((2.0, 1.0, 3.0), (1.125, 0.0)),  # moved far towards the return: clipped to 1.5
    ((2.0, 1.0, 0.0), (2.0, 2.0)),  # moved far away from the return: not clipped
    ((0.0, 1.0, -1.0), (1.125, 0.0)),  # the first, downwards: clipped to 0.5
    ((0.0, 1.0, 3.0), (4.5, -3.0)),  # the second, downwards
]


def check_value_loss(value_loss: Callable[..., Any]) -> None:
    """Each branch of the clip by hand, in rows of 4 and 1 tokens, with NaN padding."""
    mask = ragged_mask([4, 1], 4)
    values, old, returns = (torch.full((2, 4), NAN) for _ in range(3))
    expected = torch.zeros(2, 4)
    for (row, column), (numbers, (_, slope)) in zip(
        mask.nonzero().tolist(), VALUE_BRANCHES, strict=True
    ):
        values[row, column], old[row, column], returns[row, column] = numbers
        expected[row, column] = slope
    values.requires_grad_()
    out = value_loss(values, old, returns, mask, 0.5)
    close(out.total, sum(loss for _, (loss, _) in VALUE_BRANCHES))
    assert int(out.count) == 5
    (gradient,) = torch.autograd.grad(out.total, values)
    close(gradient, expected)
    close(out.metrics["clip_fraction"], 2.0)


def check_explained_variance(explained_variance: Callable[..., Tensor]) -> None:
    """R - V = 1, 1, 2 has variance 2/9, R = 2, 3, 5 has 14/9: 1 - 1/7."""
    values = torch.tensor([[1.0, 2.0], [3.0, 400.0]])
    returns = torch.tensor([[2.0, 3.0], [5.0, -300.0]])
    mask = ragged_mask([2, 1], 2)
    close(explained_variance(values, returns, mask), 6 / 7)
    close(explained_variance(values, torch.ones(2, 2), mask), 0.0)


def check_kl_estimators(kl_estimators: Callable[..., Any]) -> None:
    """By enumeration of 5 tokens: what each estimator expects, and what gradient it gives (T6).

    E[k1] = E[k3] = KL(p || q); E[k2] = E[(ln p/q)^2] / 2, which is not KL.
    The expected gradient with the sample held fixed is 0 for k1, that of KL(p || q) for k2, and
    that of KL(q || p) for k3 (P3).
    """
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    log_q = torch.log_softmax(torch.randn(5, generator=g, dtype=torch.float64), -1)
    log_p = torch.log_softmax(logits, -1)
    p, q = log_p.exp(), log_q.exp()
    reverse, forward = (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()
    k1, k2, k3 = ((p.detach() * k).sum() for k in kl_estimators(log_p, log_q))
    exact = reverse.item()
    tight = {"rtol": 1e-9, "atol": 1e-12}
    close(k1, exact, **tight)
    close(k3, exact, **tight)
    close(
        k2,
        sum(0.5 * a.item() * (b - c).item() ** 2 for a, b, c in zip(p, log_p, log_q, strict=True)),
        **tight,
    )
    assert abs(k2.item() / exact - 1.0) > 0.05, "the case must show that k2 is biased"
    (to_reverse,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    (to_forward,) = torch.autograd.grad(forward, logits, retain_graph=True)
    for estimate, truth in ((k1, torch.zeros(5)), (k2, to_reverse), (k3, to_forward)):
        (gradient,) = torch.autograd.grad(estimate, logits, retain_graph=True)
        close(gradient, truth, **tight)


def check_adaptive_kl(controller: Callable[..., Any]) -> None:
    """OAI19's formula by hand: 0.15 towards 6 nats, over 10,000 episodes."""
    kl = controller(0.15, 6.0, 10_000)
    assert kl.value == 0.15
    expected = 0.15
    for found, episodes, error in (
        (12.0, 64, 0.2),
        (6.6, 100, 0.1),
        (3.0, 64, -0.2),
        (6.0, 64, 0.0),
    ):
        kl.update(found, episodes)
        expected *= 1.0 + error * episodes / 10_000
        assert math.isclose(kl.value, expected, rel_tol=1e-12), (found, kl.value, expected)
    again = controller(0.3, 6.0, 10_000)
    again.load_state_dict(kl.state_dict())
    assert again.value == kl.value
