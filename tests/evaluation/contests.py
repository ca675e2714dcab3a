"""A run on builtin:tiny with random adapters and held-out prompts, to be evaluated in seconds."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_rlhf.evaluating import open_session
from lora_rlhf.recipe import Evaluate
from lora_rlhf.recipe_io import dump_recipe, load_recipe, recipe_from
from lora_rlhf.runs import Run, write_atomically
from lora_rlhf.training.session import Session
from tests.small_run import small_recipe, small_run

PROMPTS = 24
TOKENS = 12


def run_to_evaluate(path: Path, prompts: int = PROMPTS, seed: int = 3, **made: Any) -> Run:
    """Adapters of random weights, and a recipe that evaluates them by counted words."""
    run = small_run(path, **{"scale": 0.3} | made)
    raw = small_recipe().model_dump(mode="json", exclude_none=True) | {
        "seed": seed,
        "data": {
            "demonstrations": {"builtin": "demonstrations", "limit": 40},
            "heldout_prompts": {"builtin": "prompts", "limit": max(prompts, 64)},
            "max_prompt_tokens": 64,
            "max_response_tokens": TOKENS,
        },
        "rank": {"judge": "builtin:gold"},
        "reward": {},
        "ppo": {},
        "evaluate": {"prompts": prompts, "judge": f"{__name__}:count_words", "best_of": 2},
    }
    write_atomically(path / "recipe.yaml", dump_recipe(recipe_from(raw)))
    return run


def session_of(run: Run) -> Session:
    """Its session, speaking into a string."""
    recipe = load_recipe(str(run.path / "recipe.yaml"))
    return open_session(recipe, run, Console(file=io.StringIO(), width=200))


def settings_of(session: Session, **changes: object) -> Evaluate:
    """The recipe's evaluation, changed."""
    assert session.recipe.evaluate is not None
    return session.recipe.evaluate.model_copy(update=changes)


def count_words(prompt: str, response: str) -> float:
    """A judge that likes more words."""
    assert prompt
    return float(len(response.split()))
