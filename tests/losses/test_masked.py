"""Masked sums, means, variances and whitening."""

import pytest
import torch
from jaxtyping import TypeCheckError

from lora_rlhf.losses.masked import masked_mean, masked_sum, masked_var, whiten
from tests.losses.checks import (
    check_masked_mean,
    check_masked_var,
    check_whiten,
    close,
    ragged_mask,
)


def test_masked_mean_counts_live_entries_alone():
    check_masked_mean(masked_mean)


def test_masked_var_is_biased_and_of_live_entries_alone():
    check_masked_var(masked_var)


def test_whiten_equals_numpy_with_and_without_shifting_the_mean():
    check_whiten(whiten)


def test_sums_of_bfloat16_are_taken_in_float32():
    x = torch.ones(1000, dtype=torch.bfloat16)
    x[0] = 0.0
    total = masked_sum(x, torch.ones(1000, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.item() == 999.0  # bfloat16 has no 999


def test_equal_entries_whiten_to_zero_or_stay():
    x, mask = torch.full((2, 3), 0.1), ragged_mask([2, 1], 3)
    close(whiten(x, mask), torch.zeros(2, 3), atol=1e-4)  # rounding of the mean times 1 / eps
    close(whiten(x, mask, shift_mean=False), 0.1 * mask.float(), atol=1e-4)  # the same


def test_an_empty_mask_whitens_to_zeros():
    x, nothing = torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)
    for shift_mean in (True, False):
        close(whiten(x, nothing, shift_mean), torch.zeros(2, 3))


def test_a_mask_that_would_broadcast_is_refused():
    """(b, 1) against (b, r) would make the mean of ones 3.0."""
    with pytest.raises(TypeCheckError):
        masked_mean(torch.ones(2, 3), torch.ones(2, 1, dtype=torch.bool))


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(TypeCheckError):
        masked_sum(torch.ones(2, 3), torch.ones(2, 3))
