"""Another adapter in every row of one batch, over the one frozen backbone."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import get_total_norm

# PEFT's layers whose forward is base(x) + B A x scaling; its others mean something else.
_PLAIN_LAYERS = (Linear, Linear4bit)

# (adapter, its rank in a layer), for each adapter of the batch that the layer has.
_Blocks = tuple[tuple[str, int], ...]


class NotByRowError(Exception):
    """These adapters cannot share a batch on this model; decode them one after another."""


class Rows:
    """Which row of the batch has which adapter.

    A layer holds the matrices of its n adapters side by side, (n r, in) and (out, n r), whatever
    each one's rank, and a row's mask, (n r,), keeps the part of its own. Matrices gathered a row,
    (b, in, r), would cost as many products, b instead of n times the memory, and a new gather of
    every layer whenever a row leaves the batch.

    Args:
        names: the adapter of each row; None for the bare base.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self._names = list(names)
        self._masks: dict[_Blocks, Tensor] = {}

    def __len__(self) -> int:
        return len(self._names)

    def keep(self, kept: Tensor) -> None:
        """Drop all rows but these, (n,)."""
        self._names = [self._names[i] for i in kept.tolist()]
        self._masks = {blocks: mask[kept] for blocks, mask in self._masks.items()}

    def mask(self, blocks: _Blocks, like: Tensor) -> Tensor:
        """The mask of layers with these adapters, (b, 1, sum of ranks), made once."""
        if blocks not in self._masks:
            owners = [name for name, rank in blocks for _ in range(rank)]
            own = [[float(owner == name) for owner in owners] for name in self._names]
            self._masks[blocks] = torch.tensor(own, dtype=like.dtype, device=like.device)[:, None]
        return self._masks[blocks]


@contextmanager
def mix(
    layers: Sequence[BaseTunerLayer], names: Sequence[str | None], dtype: torch.dtype
) -> Iterator[Rows]:
    """Add each row's own LoRA to layers whose adapters are disabled, until the block ends.

    Meanwhile the adapters of the batch lie in memory once more.

    Args:
        layers: all layers of the model that can have an adapter.
        names: the adapter of each row; None for the bare base.
        dtype: of matrix products.

    Raises:
        NotByRowError: an adapter is more than plain LoRA (DoRA, a trained bias, not on a linear
            layer) or not finite, which would reach the others; in a forward, a layer whose input
            is not (rows, positions, features), as the experts of a mixture have it.
    """
    rows = Rows(names)
    wanted = sorted({name for name in names if name is not None})
    parts: list[tuple[Any, _Delta]] = []
    for layer in layers:
        present = [name for name in wanted if name in _adapters_on(layer)]
        if not present:
            continue
        if not all(_is_plain(layer, name) for name in present):
            raise NotByRowError(f"one of {', '.join(present)} is not plain LoRA")
        parts.append((layer, _Delta(rows, layer, present, dtype)))
    matrices = [matrix for _, delta in parts for matrix in (delta.down, delta.up)]
    if not bool(get_total_norm(matrices).isfinite()):
        raise NotByRowError(f"one of {', '.join(wanted)} is not finite")
    with ExitStack() as stack:
        for layer, delta in parts:
            stack.callback(layer.register_forward_hook(delta).remove)
        yield rows


class _Delta:
    """What the rows' adapters add to the output of one layer; a forward hook."""

    def __init__(self, rows: Rows, layer: Any, names: Sequence[str], dtype: torch.dtype) -> None:
        self._rows = rows
        self._blocks = tuple((name, layer.r[name]) for name in names)
        # In fp32 until the scaling is in: rounded by itself it would bias every product.
        down = [layer.lora_A[name].weight.detach() for name in names]
        up = [layer.lora_B[name].weight.detach().float() * layer.scaling[name] for name in names]
        self.down = torch.cat([matrix.to(dtype) for matrix in down])
        self.up = torch.cat(up, 1).to(dtype)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """base(x) -> base(x) + B A x scaling of each row's own adapter, (b, t, out)."""
        x: Tensor = inputs[0]
        if x.dim() != 3 or x.shape[0] != len(self._rows):
            raise NotByRowError(f"a layer has rows of shape {tuple(x.shape)}")
        narrow = functional.linear(x, self.down)
        narrow = narrow * self._rows.mask(self._blocks, narrow)
        return output + functional.linear(narrow, self.up)


def _adapters_on(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters that a layer has, of whatever kind."""
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})}


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter's part of a layer is B A x scaling and nothing else."""
    return (
        type(layer) in _PLAIN_LAYERS
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and not layer.merged
    )
