"""What must hold for any batch: padding, row order and the split into micro-batches are nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lora_rlhf.losses.logprobs import token_logprobs
from lora_rlhf.losses.masked import masked_mean, masked_var, whiten
from lora_rlhf.losses.outputs import LossOutput, merge
from lora_rlhf.losses.ppo import explained_variance, gae, kl_rewards, policy_loss, value_loss
from lora_rlhf.losses.reward import ranking_loss
from lora_rlhf.losses.sft import sft_loss
from tests.losses.checks import close, ragged_mask


@dataclass
class Batch:
    """Three tensors of a ragged batch; the first is the one that trains."""

    new: Tensor
    old: Tensor
    target: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> "Batch":
        return Batch(self.new[index], self.old[index], self.target[index], self.mask[index])

    def with_padding(self, content: float) -> "Batch":
        filled = (x.masked_fill(~self.mask, content) for x in (self.new, self.old, self.target))
        return Batch(*filled, self.mask)

    def wider(self, columns: int) -> "Batch":
        pad = torch.nn.functional.pad
        wide = (pad(x, (0, columns), value=5.0) for x in (self.new, self.old, self.target))
        return Batch(*wide, pad(self.mask, (0, columns)))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    new, old, target = (torch.randn(len(lengths), 6, generator=generator) for _ in range(3))
    return Batch(new, old, target, ragged_mask(lengths, 6))


paddings = st.sampled_from([0.0, -3.0, 1e30, float("inf"), float("nan")])

LOSSES: dict[str, Callable[[Batch], LossOutput]] = {
    "policy": lambda b: policy_loss(b.new, b.old, b.target, b.mask, 0.2),
    "policy_unclipped": lambda b: policy_loss(b.new, b.old, b.target, b.mask, None),
    "value": lambda b: value_loss(b.new, b.old, b.target, b.mask, 0.2),
    "value_unclipped": lambda b: value_loss(b.new, b.old, b.target, b.mask, None),
    "sft": lambda b: sft_loss(b.new, b.mask),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def _with_gradient(loss: Callable[[Batch], LossOutput], batch: Batch) -> tuple[LossOutput, Tensor]:
    batch = Batch(batch.new.detach().requires_grad_(), batch.old, batch.target, batch.mask)
    out = loss(batch)
    return out, torch.autograd.grad(out.total, batch.new)[0]


def _same(one: LossOutput, other: LossOutput) -> None:
    # Sums of up to 36 fp32 terms of size 10, in another order.
    close(one.total, other.total.detach(), atol=1e-4)
    assert int(one.count) == int(other.count)
    assert one.metrics.keys() == other.metrics.keys()
    for name, metric in one.metrics.items():
        close(metric, other.metrics[name], atol=1e-4)


@each_loss
@given(batch=batches(), content=paddings)
def test_padding_content_changes_no_loss_and_gets_no_gradient(loss, batch, content):
    plain, gradient = _with_gradient(loss, batch)
    padded, other = _with_gradient(loss, batch.with_padding(content))
    assert torch.equal(plain.total, padded.total)
    assert torch.equal(gradient, other)
    assert not gradient[~batch.mask].any()
    _same(plain, padded)


@each_loss
@given(batch=batches(), columns=st.integers(1, 4))
def test_more_padding_changes_no_loss(loss, batch, columns):
    _same(loss(batch), loss(batch.wider(columns)))


@each_loss
@given(batch=batches(), seed=st.integers(0, 99))
def test_the_order_of_rows_changes_no_loss(loss, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batch.mask), generator=generator)
    _same(loss(batch), loss(batch.rows(order)))


@each_loss
@given(batch=batches(), size=st.integers(1, 5))
def test_micro_batches_add_up_to_the_whole_batch(loss, batch, size):
    whole, gradient = _with_gradient(loss, batch)
    index = torch.arange(len(batch.mask))
    parts = [_with_gradient(loss, batch.rows(i)) for i in index.split(size)]
    _same(whole, merge(out for out, _ in parts))
    close(torch.cat([g for _, g in parts]), gradient)


def _advantages(batch: Batch) -> tuple[Tensor, Tensor]:
    rewards = kl_rewards(batch.target[:, 0], batch.new, batch.old, batch.mask, 0.1)
    return gae(rewards, batch.target, batch.mask, 1.0, 0.95)


@given(batch=batches(), content=paddings, columns=st.integers(0, 3))
def test_padding_changes_no_reward_and_no_advantage(batch, content, columns):
    scores = batch.target[:, 0].clone()
    padded = batch.with_padding(content).wider(columns)
    results = []
    for b in (batch, padded):
        rewards = kl_rewards(scores, b.new, b.old, b.mask, 0.1)
        results.append((rewards, *gae(rewards, b.target, b.mask, 1.0, 0.95)))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other[:, :6])
        assert not other[:, 6:].any()
        assert not plain[~batch.mask].any()


@given(batch=batches(), row=st.integers(0, 5))
def test_advantages_of_a_row_do_not_depend_on_its_batch(batch, row):
    assume(row < len(batch.mask))
    alone = batch.rows(torch.tensor([row]))
    for whole, single in zip(_advantages(batch), _advantages(alone), strict=True):
        assert torch.equal(whole[row], single[0])


@given(batch=batches(), factor=st.sampled_from([0.5, 2.0, -4.0]))
def test_advantages_are_linear_in_rewards_and_values(batch, factor):
    one, _ = gae(batch.new, batch.old, batch.mask, 0.9, 0.8)
    other, _ = gae(factor * batch.new, factor * batch.old, batch.mask, 0.9, 0.8)
    assert torch.equal(factor * one, other)  # powers of two round nothing


@given(batch=batches(), content=paddings)
def test_whitened_numbers_have_mean_0_and_variance_1_whatever_the_padding(batch, content):
    live = batch.new[batch.mask]
    assume(len(live) >= 2 and live.var(unbiased=False) > 1e-2)
    y = whiten(batch.new, batch.mask)
    assert torch.equal(y, whiten(batch.with_padding(content).new, batch.mask))
    close(masked_mean(y, batch.mask), 0.0, atol=1e-5)  # the mean's rounding over a spread of 0.1
    close(masked_var(y, batch.mask), 1.0, rtol=1e-4)  # the same


@given(batch=batches(), shift=st.floats(-5, 5), scale=st.floats(0.5, 4))
def test_whitening_forgets_shift_and_scale(batch, shift, scale):
    live = batch.new[batch.mask]
    assume(len(live) >= 2 and live.var(unbiased=False) > 1e-1)
    other = whiten(scale * batch.new + shift, batch.mask)
    close(other, whiten(batch.new, batch.mask), atol=2e-5)  # rounding of x + 5 over a spread of .3


@given(batch=batches(), shift=st.floats(-3, 3), content=paddings)
def test_explained_variance_forgets_padding_and_a_shift_of_the_values(batch, shift, content):
    live = batch.target[batch.mask]
    assume(len(live) >= 2 and live.var(unbiased=False) > 1e-1)
    plain = explained_variance(batch.new, batch.target, batch.mask)
    padded = batch.with_padding(content)
    assert torch.equal(plain, explained_variance(padded.new, padded.target, batch.mask))
    shifted = explained_variance(batch.new + shift, batch.target, batch.mask)
    close(shifted, plain, rtol=1e-4, atol=1e-4)  # 1 - a/b with b as small as 0.1


@st.composite
def rankings(draw: st.DrawFn) -> tuple[Tensor, list[list[int]]]:
    places = draw(st.lists(st.integers(0, 3), min_size=2, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = [[i for i, p in enumerate(places) if p == place] for place in sorted(set(places))]
    return torch.randn(len(places), generator=generator), groups


@given(ranking=rankings(), seed=st.integers(0, 99))
def test_the_names_of_the_answers_change_no_ranking_loss(ranking, seed):
    scores, groups = ranking
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    place = order.argsort().tolist()
    renamed = [sorted((place[i] for i in group), reverse=bool(seed % 2)) for group in groups]
    _same(ranking_loss(scores, groups), ranking_loss(scores[order], renamed))


@given(ranking=rankings(), shift=st.floats(-8, 8))
def test_a_shift_of_all_scores_changes_no_ranking_loss(ranking, shift):
    scores, groups = ranking
    shifted = ranking_loss(scores + shift, groups).total
    close(shifted, ranking_loss(scores, groups).total, atol=1e-5)  # rounding of scores + 8


@given(n=st.integers(0, 12), split=st.integers(0, 12), seed=st.integers(0, 99))
def test_logprobs_of_a_row_do_not_depend_on_the_other_rows(n, split, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 4, generator=g), torch.randn(9, 4, generator=g)
    targets = torch.randint(0, 9, (n,), generator=g)
    whole = token_logprobs(hidden, weight, targets, chunk=5)
    cut = min(split, n)
    parts = [
        token_logprobs(hidden[rows], weight, targets[rows], chunk=5)
        for rows in (slice(0, cut), slice(cut, n))
    ]
    for a, b in zip(whole, (torch.cat(x) for x in zip(*parts, strict=True)), strict=True):
        close(a, b)
