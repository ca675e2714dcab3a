"""What is looked at in loaded records: repeats, the split, leaks and lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_rlhf.data.batches import (
    Dropped,
    tokenise_demonstrations,
    tokenise_prompts,
    tokenise_rankings,
)
from lora_rlhf.data.problems import Problem
from lora_rlhf.data.records import Demonstration, Prompt
from lora_rlhf.data.splits import deduplicate, leak_check, shared_prompts, split_by_prompt
from lora_rlhf.data.template import ChatFormat
from lora_rlhf.errors import DataError
from lora_rlhf.recipe import Data


def check_records(
    data: Data, name: str, records: Sequence[Any], chat_format: ChatFormat | None
) -> tuple[list[Problem], list[str]]:
    """Problems and notes on the records of one field of a recipe's `data`.

    Args:
        data: with the limits.
        name: of the field.
        records: all of one type, at least one.
        chat_format: None leaves lengths out.
    """
    problems: list[Problem] = []
    unique, repeats = deduplicate(records)
    notes = [f"data.{name}: {repeats} repeated rows are dropped"] if repeats else []
    if name in ("demonstrations", "rankings", "prompts"):
        try:
            leak_check(*split_by_prompt(unique, data.heldout_fraction))
        except DataError as error:
            problems.append(_problem(name, str(error), "two different prompts", "too few prompts"))
    if chat_format is None or name == "text":
        return problems, notes
    try:
        kept, dropped = _tokenise(data, unique, chat_format)
    except DataError as error:
        problems.append(_problem(name, str(error), "a prompt it renders", "chat template"))
        return problems, notes
    notes += [f"data.{name}: {n} of {len(unique)} dropped ({why})" for why, n in dropped.items()]
    if not kept:
        reasons = ", ".join(f"{n} x {why}" for why, n in dropped.items())
        allowed = "rows within data.max_prompt_tokens and data.max_response_tokens, or higher ones"
        found = f"none of {len(unique)} rows fits ({reasons})"
        problems.append(_problem(name, found, allowed, "too long"))
    return problems, notes


def _tokenise(
    data: Data, records: Sequence[Any], chat_format: ChatFormat
) -> tuple[Sequence[Any], Dropped]:
    limits = data.max_prompt_tokens, data.max_response_tokens
    if isinstance(records[0], Prompt):
        return tokenise_prompts(records, chat_format, data.max_prompt_tokens)
    if isinstance(records[0], Demonstration):
        return tokenise_demonstrations(records, chat_format, *limits)
    return tokenise_rankings(records, chat_format, *limits)


def leaks(usable: Mapping[str, Sequence[Any]]) -> list[Problem]:
    """Prompts of `heldout_prompts` that a training source holds too."""
    problems = []
    for name in ("demonstrations", "rankings", "prompts"):
        shared = shared_prompts(usable.get(name, ()), usable.get("heldout_prompts", ()))
        if shared:
            found = f"{len(shared)} prompts are in data.{name} too, such as {shared[0][:60]!r}"
            allowed = "prompts that nothing trains on"
            problems.append(_problem("heldout_prompts", found, allowed, "leak"))
    return problems


def _problem(name: str, found: str, allowed: str, kind: str) -> Problem:
    return Problem(f"data.{name}", 0, found, allowed, kind)
