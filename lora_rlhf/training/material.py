"""What the stages read, tokenised: demonstrations, training prompts, held-out prompts."""

from collections.abc import Sequence
from typing import Protocol

from lora_rlhf.data.batches import (
    Sequences,
    make_sequences,
    tokenise_demonstrations,
    tokenise_prompts,
)
from lora_rlhf.data.records import Demonstration, Prompt, key_of
from lora_rlhf.data.sources import load_demonstrations, load_prompts, load_rankings, require
from lora_rlhf.data.splits import deduplicate, leak_check, split_by_prompt
from lora_rlhf.errors import DataError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe import Recipe

RANKINGS = "rank/rankings.jsonl"  # of a run, where a simulated labeler made them
Tokens = tuple[list[int], list[int]]
TokenisedPrompt = tuple[list[int], Prompt]


class Reader(Protocol):
    """Who reads: a training session, or the app."""

    @property
    def recipe(self) -> Recipe:
        """Of the run whose data is read."""

    @property
    def backbone(self) -> Backbone:
        """Its tokenizer and format count tokens."""

    def tell(self, sentence: str) -> None:
        """Say what was dropped."""


def demonstrations(session: Reader) -> tuple[list[Tokens], list[Tokens]]:
    """Tokenised demonstrations, (train, held out), split by prompt."""
    records, heldout_records = split_demonstrations(session)
    return _tokenise(session, records), _tokenise(session, heldout_records)


def split_demonstrations(
    session: Reader,
) -> tuple[list[Demonstration], list[Demonstration]]:
    """The recipe's demonstrations without duplicates, (train, held out).

    Raises:
        DataError: none are usable, or a prompt stands in both parts.
    """
    data = session.recipe.data
    assert data.demonstrations is not None
    loaded = load_demonstrations(data.demonstrations, session.backbone.tokenizer)
    unique, _ = deduplicate(require(loaded))
    train, heldout = split_by_prompt(unique, data.heldout_fraction)
    leak_check(train, heldout)
    return train, heldout


def _tokenise(session: Reader, records: Sequence[Demonstration]) -> list[Tokens]:
    data = session.recipe.data
    tokens, dropped = tokenise_demonstrations(
        records, session.backbone.format, data.max_prompt_tokens, data.max_response_tokens
    )
    for reason, count in dropped.items():
        session.tell(f"sft: {count} of {len(records)} demonstrations dropped ({reason})")
    if not tokens:
        raise DataError(
            f"data.demonstrations: none of {len(records)} fits data.max_prompt_tokens="
            f"{data.max_prompt_tokens} and data.max_response_tokens={data.max_response_tokens}. "
            f"Raise them."
        )
    return tokens


def training_prompts(session: Reader) -> list[TokenisedPrompt]:
    """Prompts that training may see, tokenised: `data.prompts`, else the demonstrations' own."""
    data = session.recipe.data
    if data.prompts is not None:
        loaded = load_prompts(data.prompts, session.backbone.tokenizer)
        records, _ = deduplicate(require(loaded))
        if data.heldout_prompts is None:
            records, _ = split_by_prompt(records, data.heldout_fraction)
    else:
        train, _ = split_demonstrations(session)
        records = list(dict.fromkeys(Prompt(d.prompt) for d in train))
    tokens, dropped = tokenise_prompts(records, session.backbone.format, data.max_prompt_tokens)
    for reason, count in dropped.items():
        session.tell(f"prompts: {count} of {len(records)} dropped ({reason})")
    return tokens


def heldout_prompts(session: Reader, count: int) -> list[TokenisedPrompt]:
    """The first `count` prompts that no training stage has seen.

    Raises:
        DataError: fewer than `count`.
    """
    tokens = all_heldout_prompts(session)
    if len(tokens) < count:
        raise DataError(
            f"evaluate.prompts asks for {count} held-out prompts, but there are {len(tokens)}. "
            f"Lower it, raise data.heldout_fraction, or give data.heldout_prompts."
        )
    return tokens[:count]


def all_heldout_prompts(session: Reader) -> list[TokenisedPrompt]:
    """Prompts that no training stage has seen."""
    data, backbone = session.recipe.data, session.backbone
    if data.heldout_prompts is not None:
        loaded = load_prompts(data.heldout_prompts, backbone.tokenizer, heldout=True)
        records = _never_trained_on(session, deduplicate(require(loaded))[0])
    elif data.prompts is not None:
        all_records, _ = deduplicate(require(load_prompts(data.prompts, backbone.tokenizer)))
        _, records = split_by_prompt(all_records, data.heldout_fraction)
    else:
        _, demos = split_demonstrations(session)
        records = list(dict.fromkeys(Prompt(d.prompt) for d in demos))
    tokens, dropped = tokenise_prompts(records, backbone.format, data.max_prompt_tokens)
    for reason, number in dropped.items():
        session.tell(f"held-out prompts: {number} of {len(records)} dropped ({reason})")
    return tokens


def _never_trained_on(session: Reader, records: list[Prompt]) -> list[Prompt]:
    """Held-out prompts of a source of their own, without those that a training source holds."""
    data, tokenizer = session.recipe.data, session.backbone.tokenizer
    keys: set[str] = set()
    if data.demonstrations is not None:
        keys |= {key_of(r) for r in require(load_demonstrations(data.demonstrations, tokenizer))}
    if data.rankings is not None:
        keys |= {key_of(r) for r in require(load_rankings(data.rankings))}
    if data.prompts is not None:
        keys |= {key_of(r) for r in require(load_prompts(data.prompts, tokenizer))}
    kept = [record for record in records if key_of(record) not in keys]
    if len(kept) < len(records):
        number = len(records) - len(kept)
        session.tell(f"held-out prompts: {number} of {len(records)} are trained on and left out")
    return kept


def as_sequences(backbone: Backbone, tokens: Sequence[Tokens]) -> Sequences:
    """Padded rows of prompts and responses on the backbone's device."""
    prompts, responses = [p for p, _ in tokens], [r for _, r in tokens]
    return make_sequences(prompts, responses, backbone.format.pad_id, backbone.device)
