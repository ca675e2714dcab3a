"""The order in which a stage goes through prompts and texts: a function of the seed alone."""

from typing import Any

import torch

from lora_rlhf.training.material import TokenisedPrompt
from lora_rlhf.training.ppo import row_seed


def batch_of_prompts(
    prompts: list[TokenisedPrompt], size: int, seed: int, step: int
) -> list[TokenisedPrompt]:
    """The prompts of a round, drawn without replacement until all have been used."""
    return take(prompts, size, seed, step)


def take(items: list[Any], size: int, seed: int, index: int) -> list[Any]:
    """Batch number `index` of an endless pass over items, reshuffled each time around."""
    chosen = []
    for position in range(index * size, (index + 1) * size):
        epoch, offset = divmod(position, len(items))
        chosen.append(items[_permutation(len(items), seed, epoch)[offset]])
    return chosen


_PERMUTATIONS: dict[tuple[int, int, int], list[int]] = {}


def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    key = (count, seed, epoch)
    if key not in _PERMUTATIONS:
        generator = torch.Generator().manual_seed(row_seed(seed, count, epoch))
        _PERMUTATIONS[key] = torch.randperm(count, generator=generator).tolist()
    return _PERMUTATIONS[key]
