"""The scalar head of the reward and value roles."""

import math

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """hidden -> gain * (hidden . weight + bias) + shift, in fp32.

    The head is owned here, outside PEFT: `modules_to_save` under 4-bit has sent gradients to the
    wrong copy (peft #602) and kept the trained one when adapters were off (peft #493).

    `gain` and `shift` normalise scores after training (checklist RM3); they are buffers, never
    folded into the weight, so that the raw head stays interchangeable with other libraries.

    Args:
        hidden_size: width of the trunk.
        seed: of the initial weight, N(0, 1 / (hidden_size + 1)) (checklist RM2).
    """

    weight: nn.Parameter
    bias: nn.Parameter
    gain: Tensor
    shift: Tensor

    def __init__(self, hidden_size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(hidden_size, generator=generator) / math.sqrt(hidden_size + 1)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised scores of `hidden` (..., d), in fp32: (...)."""
        return self.raw(hidden) * self.gain + self.shift

    def raw(self, hidden: Tensor) -> Tensor:
        """Scores before normalisation; what AutoModelForSequenceClassification gives."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight + self.bias

    def normalise(self, mean: float, spread: float) -> None:
        """Make raw scores of this mean read 0, and a raw difference of `spread` read 1."""
        assert spread > 0.0
        self.gain.fill_(1.0 / spread)
        self.shift.fill_(-mean / spread)

    def copy_from(self, other: "ScalarHead") -> None:
        """Take weight, bias and normalisation of another head."""
        self.load_state_dict(other.state_dict())
