"""The SFT loss, and how loss outputs add up."""

import torch

from lora_rlhf.losses.outputs import LossOutput, merge
from lora_rlhf.losses.sft import sft_loss
from tests.losses.checks import check_sft_loss, close


def test_sft_loss_is_the_negative_logprob_of_response_tokens():
    check_sft_loss(sft_loss)


def test_no_response_token_gives_loss_zero_and_count_zero():
    out = sft_loss(torch.tensor([-1.0, -2.0]), torch.zeros(2, dtype=torch.bool))
    close(out.total, 0.0)
    assert int(out.count) == 0
    close(out.means()["loss"], 0.0)


def _output(total, count, mean, most):
    metrics = {"ratio_mean": torch.tensor(mean), "ratio_max": torch.tensor(most)}
    return LossOutput(torch.tensor(total), torch.tensor(count), metrics)


def test_merged_outputs_add_sums_and_keep_the_largest_maximum():
    merged = merge([_output(6.0, 1, 2.0, 5.0), _output(2.0, 3, 6.0, 3.0)])
    assert merged.means() == {"loss": 2.0, "ratio_mean": 2.0, "ratio_max": 5.0}
    assert int(merged.count) == 4


def test_merged_totals_keep_their_gradient():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    mask = torch.ones(1, dtype=torch.bool)
    merged = merge(sft_loss(part, mask) for part in x.split(1))
    (gradient,) = torch.autograd.grad(merged.total, x)
    close(gradient, [-1.0, -1.0])
