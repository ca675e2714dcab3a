"""The loss of supervised fine-tuning and of the ptx mix."""

from jaxtyping import Bool, Float
from torch import Tensor

from lora_rlhf.losses.masked import masked_sum
from lora_rlhf.losses.outputs import LossOutput


def sft_loss(logprobs: Float[Tensor, "*s"], loss_mask: Bool[Tensor, "*s"]) -> LossOutput:
    """Cross-entropy of the response tokens, in nats.

    total = -sum logprobs[live];   count = number of live tokens

    Args:
        logprobs: of the tokens to be learned, at temperature 1.
        loss_mask: True on response tokens, the end token among them; False on prompt and padding.

    Returns:
        No metrics: the mean of the total is the loss that is reported.
    """
    return LossOutput(total=-masked_sum(logprobs, loss_mask), count=loss_mask.sum(), metrics={})
