"""Sums, means and whitening over the live entries of a tensor."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Keeps rsqrt finite where all live entries are equal; the value OAI19 and TRL use.
WHITEN_EPS = 1e-8


def at_least_float32(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """`x` in fp32, or in fp64 where it is fp64: losses are never computed in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fill_masked(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """`x` where the mask is True, exactly 0 elsewhere, even where `x` is inf or NaN there."""
    # A product would let NaN padding through (NaN * 0 = NaN).
    return x.masked_fill(~mask, 0.0)


def masked_sum(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Sum of the live entries; 0 for an empty mask. What lies under the mask has no effect.

    Args:
        x: any shape; 16-bit input is summed in fp32.
        mask: True on live entries; the very shape of `x`, for a mask that broadcasts would count
            its entries more than once.
    """
    return fill_masked(at_least_float32(x), mask).sum()


def masked_mean(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Mean over the live entries; 0 for an empty mask. The mask is the denominator (P9)."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Biased variance over the live entries (divided by n, not n - 1); 0 for an empty mask."""
    x = at_least_float32(x)
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(
    x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], shift_mean: bool = True
) -> Float[Tensor, "*s"]:
    """Scale the live entries to variance 1, and shift them to mean 0 if asked.

    y = (x - mean) / sqrt(var + 1e-8)  [+ mean, if not shift_mean]

    Args:
        x: advantages, or rewards with `shift_mean=False`.
        mask: True on live entries; padding takes no part in mean or variance.
        shift_mean: False keeps the mean as it is (unscaled), as OAI19 does for rewards.

    Returns:
        fp32, 0 where the mask is False. Equal entries (a single one, say) become 0, or stay as
        they are with `shift_mean=False`.

    Source: Ziegler et al. 2019 (openai/lm-human-preferences, `utils/core.py: whiten`), whose
    variance is biased. Deviation: masked. TRL's masked_whiten applies Bessel's correction.
    """
    x = at_least_float32(x)
    mean = masked_mean(x, mask)
    y = (x - mean) * torch.rsqrt(masked_var(x, mask) + WHITEN_EPS)
    return fill_masked(y if shift_mean else y + mean, mask)
