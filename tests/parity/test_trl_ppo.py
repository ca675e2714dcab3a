"""Our PPO functions against the formulas of TRL 1.12's PPOTrainer, where they ought to agree.

TRL's whitening and masked means are imported; the other lines stand inside `PPOTrainer.train` and
are copied with the comment that names them. TRL's masks are True on padding.
"""

import pytest
import torch
from torch import Tensor

from lora_rlhf.losses.logprobs import logprobs_from_logits
from lora_rlhf.losses.masked import masked_mean, whiten
from lora_rlhf.losses.ppo import gae, kl_estimators, kl_rewards, policy_loss, value_loss
from tests.losses.checks import close, ragged_mask

trl = pytest.importorskip(
    "trl.experimental.ppo.ppo_trainer", reason="needs trl 1.12, the last with a PPOTrainer"
)
INVALID_LOGPROB = trl.INVALID_LOGPROB

LENGTHS, WIDTH = [6, 4, 1, 6, 2], 6
MASK = ragged_mask(LENGTHS, WIDTH)
FULL = torch.ones_like(MASK)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _trl_masks() -> tuple[Tensor, Tensor, Tensor]:
    """`padding_mask`, `padding_mask_p1` and `actual_end` of PPOTrainer.train, lines 764 to 778."""
    sequence_lengths = torch.tensor(LENGTHS) - 1  # TRL's is the index of the last token
    response_idxs = torch.arange(WIDTH).repeat(len(LENGTHS), 1)
    padding_mask = response_idxs > sequence_lengths.unsqueeze(1)
    sequence_lengths_p1 = sequence_lengths + 1
    padding_mask_p1 = response_idxs > (sequence_lengths_p1.unsqueeze(1))
    actual_end = torch.where(sequence_lengths_p1 < WIDTH, sequence_lengths_p1, sequence_lengths)
    return padding_mask, padding_mask_p1, actual_end


def _trl_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float, kl_estimator: str = "k1"
) -> Tensor:
    """Lines 765 to 779 of PPOTrainer.train."""
    padding_mask, _, actual_end = _trl_masks()
    logprobs = torch.masked_fill(logprobs, padding_mask, INVALID_LOGPROB)
    ref_logprobs = torch.masked_fill(ref_logprobs, padding_mask, INVALID_LOGPROB)
    logr = ref_logprobs - logprobs
    kl = -logr if kl_estimator == "k1" else (logr.exp() - 1) - logr
    rewards = -kl_coef * kl
    rewards[torch.arange(rewards.size(0)), actual_end] += scores
    return rewards


def _trl_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Lines 787 to 795 of PPOTrainer.train."""
    lastgaelam = 0
    advantages_reversed = []
    gen_length = rewards.shape[1]
    for t in reversed(range(gen_length)):
        nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        lastgaelam = delta + gamma * lam * lastgaelam
        advantages_reversed.append(lastgaelam)
    return torch.stack(advantages_reversed[::-1], axis=1)


def test_our_mask_is_the_inverse_of_trls():
    assert torch.equal(MASK, ~_trl_masks()[0])


def test_whitening_is_trls_up_to_bessels_correction():
    x, n = 3.0 + 2.0 * _random(0, 5, 6), int(MASK.sum())
    scale = ((n - 1) / n) ** 0.5
    ours = whiten(x, MASK)
    close(ours * scale, (trl.masked_whiten(x, MASK) * MASK).double())
    mean = trl.masked_mean(x, MASK)
    kept = whiten(x, MASK, shift_mean=False)
    theirs = trl.masked_whiten(x, MASK, shift_mean=False)
    close((kept - mean)[MASK] * scale, (theirs - mean)[MASK].double())
    close(masked_mean(x, MASK), mean.double())


def test_rewards_equal_trls_on_responses_that_fill_the_batch():
    scores, new, ref = _random(0, 5), _random(1, 5, 6), _random(2, 5, 6)
    full_rows = MASK.all(-1)
    ours = kl_rewards(scores, new, ref, MASK, 0.05)
    close(ours[full_rows], _trl_rewards(scores, new, ref, 0.05)[full_rows].double())


def test_rewards_equal_trls_but_for_the_place_of_the_score():
    """TRL adds it to the first pad, we to the last live token: same sum, same KL a token."""
    scores, new, ref = _random(0, 5), _random(1, 5, 6), _random(2, 5, 6)
    ours = kl_rewards(scores, new, ref, MASK, 0.05)
    theirs = _trl_rewards(scores, new, ref, 0.05)
    close(ours.sum(-1), theirs.sum(-1).double())
    nothing = torch.zeros(5)
    kl_alone = _trl_rewards(nothing, new, ref, 0.05)
    close(kl_rewards(nothing, new, ref, MASK, 0.05), kl_alone.double())


def test_k1_and_k3_equal_trls():
    new, ref = _random(1, 5, 6), _random(2, 5, 6)
    for name, k in (("k1", 0), ("k3", 2)):
        theirs = -_trl_rewards(torch.zeros(5), new, ref, 1.0, name)
        close(kl_estimators(new, ref)[k] * MASK, theirs.double())


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (1.0, 0.0)])
def test_advantages_equal_trls_for_the_same_rewards(gamma, lam):
    """TRL walks through padding whose rewards and values are 0; we step over it."""
    rewards, values = _random(0, 5, 6) * MASK, _random(1, 5, 6) * MASK
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    theirs = _trl_gae(rewards, values, gamma, lam)
    close(advantages, theirs.double())
    close(returns, (theirs + values).double())


def test_the_whole_chain_equals_trls_at_lambda_1():
    """Rewards, then advantages: the place of the score shows where lambda is below 1 alone."""
    scores, new, ref = _random(0, 5), _random(1, 5, 6), _random(2, 5, 6)
    values = _random(3, 5, 6) * MASK
    rewards = kl_rewards(scores, new, ref, MASK, 0.05)
    theirs = _trl_rewards(scores, new, ref, 0.05)
    for lam in (1.0, 0.8):
        ours, _ = gae(rewards, values, MASK, 1.0, lam)
        rows = FULL.all(-1) if lam == 1.0 else MASK.all(-1)
        close(ours[rows], (_trl_gae(theirs, values, 1.0, lam) * MASK)[rows].double())


def test_a_score_one_slot_late_reaches_trls_last_token_times_lambda():
    """The stated deviation: at lambda 0.8 TRL's last token misses a fifth of the score."""
    scores, nothing = torch.ones(5), torch.zeros(5, 6)
    ours, _ = gae(kl_rewards(scores, nothing, nothing, MASK, 0.05), nothing, MASK, 1.0, 0.8)
    theirs = _trl_gae(_trl_rewards(scores, nothing, nothing, 0.05), nothing, 1.0, 0.8)
    padded = ~MASK.all(-1)
    close(0.8 * ours[padded], (theirs * MASK)[padded].double())


def _trl_policy_loss(
    new: Tensor, old: Tensor, advantage: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 824 to 826, 841 to 846 and 852 to 857 of PPOTrainer.train."""
    padding_mask, _, _ = _trl_masks()
    new = torch.masked_fill(new, padding_mask, INVALID_LOGPROB)
    old = torch.masked_fill(old, padding_mask, INVALID_LOGPROB)
    logprobs_diff = new - old
    ratio = torch.exp(logprobs_diff)
    pg_losses = -advantage * ratio
    pg_losses2 = -advantage * torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
    pg_loss_max = torch.max(pg_losses, pg_losses2)
    pg_loss = trl.masked_mean(pg_loss_max, ~padding_mask)
    pg_clipfrac = trl.masked_mean((pg_losses2 > pg_losses).float(), ~padding_mask)
    return pg_loss, pg_clipfrac, 0.5 * (logprobs_diff**2).mean()


def test_the_policy_loss_and_its_gradient_equal_trls():
    ours, theirs = (_random(0, 5, 6).requires_grad_() for _ in range(2))
    old, advantages = _random(0, 5, 6) + 0.6 * _random(1, 5, 6), _random(2, 5, 6)
    out = policy_loss(ours, old, advantages, MASK, 0.2)
    loss, clip_fraction, approx_kl = _trl_policy_loss(theirs, old, advantages, 0.2)
    close(out.means()["loss"], loss.detach().double())
    close(out.means()["clip_fraction"], clip_fraction.double())
    assert 0.1 < clip_fraction < 0.9, "the case must have tokens on both sides of the clip"
    # TRL divides this one by all positions, padding counted.
    close(out.metrics["approx_kl"] / MASK.numel(), approx_kl.detach().double())
    (gradient,) = torch.autograd.grad(out.total / out.count, ours)
    close(gradient, torch.autograd.grad(loss, theirs)[0].double())


def test_the_value_loss_and_its_gradient_equal_trls():
    """Lines 829 to 840 of PPOTrainer.train, with the mask of live tokens in place of TRL's p1."""
    ours, theirs = (_random(0, 5, 6).requires_grad_() for _ in range(2))
    old, returns = _random(0, 5, 6) + 0.6 * _random(1, 5, 6), _random(2, 5, 6)
    out = value_loss(ours, old, returns, MASK, 0.2)
    clipped = torch.clamp(theirs, old - 0.2, old + 0.2)
    losses1, losses2 = torch.square(theirs - returns), torch.square(clipped - returns)
    loss = 0.5 * trl.masked_mean(torch.max(losses1, losses2), MASK)
    close(out.means()["loss"], loss.detach().double())
    clip_fraction = trl.masked_mean((losses2 > losses1).float(), MASK)
    close(out.means()["clip_fraction"], clip_fraction.double())
    (gradient,) = torch.autograd.grad(out.total / out.count, ours)
    close(gradient, torch.autograd.grad(loss, theirs)[0].double())


def test_logprobs_equal_trls_selective_log_softmax():
    logits, targets = _random(0, 4, 6, 11), torch.arange(24).reshape(4, 6) % 11
    theirs = trl.selective_log_softmax(logits / 0.7, targets)
    close(logprobs_from_logits(logits, targets, 0.7), theirs.double())
