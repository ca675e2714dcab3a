"""A run directory on builtin:tiny whose adapters are random instead of trained, in a second."""

from pathlib import Path

import torch

from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe import Recipe
from lora_rlhf.recipe_io import dump_recipe, recipe_from
from lora_rlhf.runs import Run, write_atomically
from tests.small import randomise

ROLES = ("sft", "reward", "policy", "value")
BASE = {"model": "builtin:tiny", "device": "cpu"}
LORA = {"rank": 4, "alpha": 8.0}


def small_recipe(base: dict | None = None, lora: dict | None = None) -> Recipe:
    """A recipe that holds no stage but SFT."""
    return recipe_from(
        {
            "name": "small",
            "seed": 3,
            "base": BASE | (base or {}),
            "lora": LORA | (lora or {}),
            "data": {
                "demonstrations": {"builtin": "demonstrations", "limit": 10},
                "max_prompt_tokens": 64,
                "max_response_tokens": 12,
            },
            "sft": {},
        }
    )


def small_run(
    path: Path,
    roles: tuple[str, ...] = ROLES,
    base: dict | None = None,
    lora: dict | None = None,
    scale: float = 0.05,
    first_seed: int = 0,
) -> Run:
    """Adapters of the given roles with random weights, saved as the stages save them."""
    recipe = small_recipe(base, lora)
    backbone = Backbone.load(recipe.base)
    run = Run(path)
    write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
    for number, role in enumerate(roles, first_seed):
        backbone.adapters.add(role, recipe.lora)
        _randomise(backbone, role, number, scale)
        if role in ("reward", "value"):
            head = backbone.adapters.add_head(role, seed=number)
            head.normalise(mean=0.7, spread=2.0)
        stage = {"policy": "ppo", "value": "ppo"}.get(role, role)
        backbone.adapters.save(role, run.adapter(role), role, stage)
        run.finish_stage(stage, 1.0)
    return run


def _randomise(backbone: Backbone, role: str, seed: int, scale: float) -> None:
    """As `randomise`, but DoRA's magnitudes are moved about their start: they are lengths."""
    magnitudes = {
        key: parameter.detach().clone()
        for key, parameter in backbone.adapters.parameters(role).items()
        if "magnitude" in key
    }
    randomise(backbone, role, seed, scale)
    with torch.no_grad():
        for key, start in magnitudes.items():
            parameter = backbone.adapters.parameters(role)[key]
            parameter.mul_(start).add_(start)
