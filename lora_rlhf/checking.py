"""What `lora-rlhf check` looks at: the recipe, its data, its memory; nothing is trained."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lora_rlhf.errors import UserError
from lora_rlhf.recipe import Recipe, Source
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.recipe_rules import is_hub_id

SHOWN = 20


def check_recipe(name: str, overrides: Sequence[str], hub: bool, console: Console) -> str:
    """Check all that can be checked without training.

    Args:
        name: of a shipped recipe, or a path.
        overrides: `key=value`.
        hub: read the hub's data sets too; without it nothing is asked of a network.
        console: where the plan, and what was found well, is printed.

    Returns:
        The problems as one text, the first 20 with counts; "" when there is none.

    Raises:
        ConfigError: the recipe itself is wrong; it lists all that is.
    """
    recipe = load_recipe(name, overrides)
    if not hub:  # before any Hugging Face library is imported: they read it once
        os.environ["HF_HUB_OFFLINE"] = "1"
    console.print(f"recipe: {recipe.name} runs {', '.join(recipe.stages)}", markup=False)
    problems = _tracker_problems(recipe)
    tokenizer, wrong = _tokenizer(recipe)
    problems += wrong
    problems += _data_problems(recipe, tokenizer, hub, console)
    problems += _memory_problems(recipe, console)
    if not problems:
        console.print(f"No problem found. Run it: lora-rlhf run {name}", markup=False)
        return ""
    return summarise(problems)


def summarise(problems: Sequence[str]) -> str:
    """The first 20 different problems, with how often each occurs and how many there are."""
    counts: dict[str, int] = {}
    for problem in problems:
        counts[problem] = counts.get(problem, 0) + 1
    lines = [p if n == 1 else f"{p} ({n} times)" for p, n in counts.items()]
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more"]
    noun = "problem" if len(problems) == 1 else "problems"
    return "\n".join([f"{len(problems)} {noun}:", *lines])


def _tracker_problems(recipe: Recipe) -> list[str]:
    if recipe.tracker is None or importlib.util.find_spec(recipe.tracker) is not None:
        return []
    return [
        f"tracker: {recipe.tracker} is not installed. Run: pip install {recipe.tracker}, or set "
        f"tracker=null."
    ]


def _tokenizer(recipe: Recipe) -> tuple[Any, list[str]]:
    """The base's tokenizer where it lies on this machine, without the weights."""
    if is_hub_id(recipe.base.model):
        return None, []
    from transformers import AutoTokenizer

    from lora_rlhf.model.backbone import resolve_source

    try:
        directory, _ = resolve_source(recipe.base)
        return AutoTokenizer.from_pretrained(directory), []
    except UserError as error:
        return None, [str(error)]
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        return None, [f"base.model: {recipe.base.model} has no tokenizer that loads ({first})."]


def _data_problems(recipe: Recipe, tokenizer: Any, hub: bool, console: Console) -> list[str]:
    """Problems of the data; of the hub's data sets too, where they are cached or `hub` is set."""
    from lora_rlhf.data.sources import check_data

    problems, notes = check_data(recipe, tokenizer)
    for note in notes:
        console.print(_shorter(note, recipe, hub), markup=False, soft_wrap=True)
    return [str(problem) for problem in problems]


def _shorter(note: str, recipe: Recipe, hub: bool) -> str:
    """A hub data set that is not here yet is no news without --hub."""
    name, _, text = note.partition(": ")
    source = getattr(recipe.data, name.removeprefix("data."), None)
    if hub or not isinstance(source, Source) or source.hub is None or "not checked" not in text:
        return note
    return f"{name}: {source.hub} is not on this machine; --hub downloads and checks it"


def _memory_problems(recipe: Recipe, console: Console) -> list[str]:
    """The memory plan; a problem only where this machine has the GPU it is about."""
    import torch

    from lora_rlhf import display
    from lora_rlhf.model import memory
    from lora_rlhf.model.shapes import known_config

    model = recipe.base.model
    if is_hub_id(model) and known_config(model) is None:
        console.print(f"memory: lora-rlhf plan asks the hub for the shape of {model}", markup=False)
        return []
    try:
        planned = memory.plan(recipe)
    except UserError as error:
        return [str(error)]
    display.render_plan(planned, console)
    if planned.fits or not torch.cuda.is_available():
        return []
    return [
        f"memory: needs {planned.needs_gib:.1f} GiB, and {planned.card_name} has "
        f"{planned.card_gib:.1f} GiB. {' '.join(planned.advice)}".strip()
    ]
