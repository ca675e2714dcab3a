"""What the stages read, tokenised: demonstrations, training prompts, held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_rlhf.data.batches import (
    Sequences,
    make_sequences,
    tokenise_demonstrations,
    tokenise_prompts,
)
from lora_rlhf.data.records import Demonstration, Prompt, key_of
from lora_rlhf.data.sources import load_demonstrations, load_prompts, load_rankings, require
from lora_rlhf.data.splits import deduplicate, leak_check, split_by_prompt, split_rankings
from lora_rlhf.errors import DataError, UserError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe import STAGES, Recipe, is_store
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run

RANKINGS = "rank/rankings.jsonl"  # of a run, where a simulated labeler made them
Tokens = tuple[list[int], list[int]]
TokenisedPrompt = tuple[list[int], Prompt]


class Reader(Protocol):
    """Who reads: a training session, or the app."""

    @property
    def recipe(self) -> Recipe:
        """Of the run whose data is read."""

    @property
    def run(self) -> Run:
        """Its summary names held-out prompts that were trained on all the same."""

    @property
    def backbone(self) -> Backbone:
        """Its tokenizer and format count tokens."""

    def tell(self, sentence: str) -> None:
        """Say what was dropped."""


@dataclass(frozen=True)
class RunData:
    """The `Reader` of a finished run, over a backbone that is there already."""

    recipe: Recipe
    run: Run
    backbone: Backbone

    @classmethod
    def of(cls, run: Run, backbone: Backbone) -> "RunData":
        """By the run's own recipe.

        Raises:
            ConfigError: it has none that can be read.
        """
        return cls(load_recipe(str(run.path / "recipe.yaml"), finished=STAGES), run, backbone)

    def tell(self, sentence: str) -> None:
        """What training has said of its data is not said again."""


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
    records, limit = _training_records(session), session.recipe.data.max_prompt_tokens
    tokens, dropped = tokenise_prompts(records, session.backbone.format, limit)
    for reason, count in dropped.items():
        session.tell(f"prompts: {count} of {len(records)} dropped ({reason})")
    return tokens


def _training_records(session: Reader) -> list[Prompt]:
    data = session.recipe.data
    if data.prompts is None:
        train, _ = split_demonstrations(session)
        return list(dict.fromkeys(Prompt(d.prompt) for d in train))
    records, _ = deduplicate(require(load_prompts(data.prompts, session.backbone.tokenizer)))
    if data.heldout_prompts is not None:
        return records
    return split_by_prompt(records, data.heldout_fraction)[0]


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
    """Prompts that no training stage has seen, nor one of a run that this one goes on from."""
    return _unseen(session, _heldout_records(session), _trained_on(session))


def sort_prompts(session: Reader) -> tuple[set[str], set[str], set[str]]:
    """Hashes of a run's prompts.

    Returns:
        (unseen, known, trained): of `all_heldout_prompts`; of those that are held out and were
        trained on all the same; of all that was trained on.
    """
    records, trained = _heldout_records(session), _trained_on(session)
    unseen = {key_of(prompt) for _, prompt in _unseen(session, records, trained)}
    known = session.run.trained_on_heldout() | (trained & {key_of(r) for r in records})
    trained = trained | _trained_on_prompts(session)
    return unseen, known, trained


def _unseen(session: Reader, records: list[Prompt], trained: set[str]) -> list[TokenisedPrompt]:
    kept = [record for record in records if key_of(record) not in trained]
    if len(kept) < len(records):
        number = len(records) - len(kept)
        session.tell(f"held-out prompts: {number} of {len(records)} are trained on and left out")
    limit = session.recipe.data.max_prompt_tokens
    tokens, dropped = tokenise_prompts(kept, session.backbone.format, limit)
    for reason, number in dropped.items():
        session.tell(f"held-out prompts: {number} of {len(kept)} dropped ({reason})")
    return tokens


def _heldout_records(session: Reader) -> list[Prompt]:
    """What the recipe holds out, whatever has become of it."""
    data, tokenizer = session.recipe.data, session.backbone.tokenizer
    if data.heldout_prompts is not None:
        return deduplicate(require(load_prompts(data.heldout_prompts, tokenizer, heldout=True)))[0]
    if data.prompts is not None:
        records, _ = deduplicate(require(load_prompts(data.prompts, tokenizer)))
        return split_by_prompt(records, data.heldout_fraction)[1]
    _, demos = split_demonstrations(session)
    return list(dict.fromkeys(Prompt(d.prompt) for d in demos))


def _trained_on(session: Reader) -> set[str]:
    """Hashes of the prompts that the run's stages train on, and those it goes on from."""
    keys = _own_trained_on(session)
    seen, todo = {session.run.path.resolve()}, _gone_on_from(session.recipe)
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        keys |= Run(path).trained_on_heldout()
        try:
            earlier = RunData.of(Run(path), session.backbone)
            todo += _gone_on_from(earlier.recipe)
            keys |= _own_trained_on(earlier) | _trained_on_prompts(earlier)
        except UserError as error:
            session.tell(
                f"held-out prompts: {path}, which this goes on from, was trained on data that "
                f"cannot be read, and some of it may be held out here ({error})"
            )
    return keys


def _trained_on_prompts(session: Reader) -> set[str]:
    data = session.recipe.data
    if data.prompts is None and data.demonstrations is None:
        return set()
    return {key_of(record) for record in _training_records(session)}


def _own_trained_on(session: Reader) -> set[str]:
    """Hashes of the prompts that the run's own stages train on.

    Held-out prompts of a source of their own stand in no training source at all. Those split off
    another source are in it, on its held-out side; the other sources have such a side, too, and
    what they train on is the rest. A store's is split otherwise, so that all of it counts.
    """
    data, tokenizer = session.recipe.data, session.backbone.tokenizer
    keys, whole = session.run.trained_on_heldout(), data.heldout_prompts is not None
    if data.demonstrations is not None and whole:
        keys |= {key_of(r) for r in require(load_demonstrations(data.demonstrations, tokenizer))}
    elif data.demonstrations is not None:
        keys |= {key_of(r) for r in split_demonstrations(session)[0]}
    if data.rankings is not None:
        rankings, _ = deduplicate(require(load_rankings(data.rankings)))
        if not (whole or is_store(data.rankings.path or "")):
            rankings, _ = split_rankings(rankings, data.heldout_fraction, False)
        keys |= {key_of(r) for r in rankings}
    if data.prompts is not None and whole:
        keys |= {key_of(r) for r in require(load_prompts(data.prompts, tokenizer))}
    return keys


def _gone_on_from(recipe: Recipe) -> list[Path]:
    """The runs whose adapters `<stage>.start_from` names."""
    starts = [s.start_from for s in (recipe.reward, recipe.ppo) if s is not None and s.start_from]
    # RUN/reward/adapter, or RUN/ppo/policies/step-000012.
    above = [path for s in starts for path in list(Path(s).expanduser().resolve().parents)[:3]]
    return [path for path in above if (path / "recipe.yaml").is_file()]


def as_sequences(backbone: Backbone, tokens: Sequence[Tokens]) -> Sequences:
    """Padded rows of prompts and responses on the backbone's device."""
    prompts, responses = [p for p, _ in tokens], [r for _, r in tokens]
    return make_sequences(prompts, responses, backbone.format.pad_id, backbone.device)
