"""Which judgements a retraining trains on, which it leaves out and why, and what it makes of them.

Nothing here trains, and nothing imports torch.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from lora_rlhf.data.records import Ranking, prompt_key
from lora_rlhf.data.splits import deduplicate, split_rankings
from lora_rlhf.errors import UserError
from lora_rlhf.preferences.counting import is_too_fast
from lora_rlhf.preferences.rows import HELDOUT_POOL, is_identical, ranking_row, why_no_order
from lora_rlhf.preferences.store import Judged
from ui.asking import Prompts

Scope = Literal["reward", "reward + PPO", "reward + PPO + evaluate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
LEAST_PROMPTS = 2  # with a strict preference, a side of the split


class TooLittle(UserError):
    """Too few judgements to train on; the message says how many are missing."""


@dataclass(frozen=True)
class Wishes:
    """What the admin chose.

    Attributes:
        base: name of the run to start from.
        scope: how far to go.
        go_on: start from the base run's reward model and policy, where it has them, and not from
            copies of `sft`.
        earlier: add the rankings that the base run's reward model was trained on; None: where it
            does not go on from that model, which knows them.
        heldout: train on votes on held-out prompts as well, which then measure nothing any more,
            in this run and in all that go on from it.
        fast: train on votes as well that came faster than anybody reads.
        overrides: `key=value` for the recipe.
        votes: train on the store's judgements. Without them, on the earlier rankings alone: a
            control, to tell what new votes do from what another seed does.
        force: go on to PPO though the reward model may be no better than a coin.
    """

    base: str
    scope: Scope = "reward + PPO"
    go_on: bool = True
    earlier: bool | None = None
    votes: bool = True
    heldout: bool = False
    fast: bool = False
    overrides: tuple[str, ...] = ()
    force: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the pipeline."""
        return ("reward", "ppo", "evaluate")[: SCOPES.index(self.scope) + 1]


# -- the choice ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """What is left of the store.

    Attributes:
        kept: what is trained on.
        removed: reason -> judgements.
        measured: people's votes on held-out prompts that no adapter of the base run knows: they
            measure a reward model, where they are not trained on.
    """

    kept: list[Judged]
    removed: dict[str, int]
    measured: list[Judged]


def choose(judged: Sequence[Judged], wishes: Wishes, prompts: Prompts) -> Chosen:
    """Sort the live judgements of a store.

    Args:
        judged: of the store.
        wishes: of the admin.
        prompts: of the base run, whoever typed them.
    """
    kept, measured = [], []
    removed: Counter[str] = Counter()
    heldout = heldout_among(judged, prompts)
    known = prompts.known | prompts.trained
    for each in judged:
        reason = _why_not(each, wishes)
        on_heldout = each.task.prompt_sha256 in heldout
        measures = on_heldout and each.task.prompt_sha256 not in known and not is_imported(each)
        if reason is None and measures:
            measured.append(each)
        if reason is None and on_heldout and not wishes.heldout:
            reason = "on a held-out prompt"
        if reason is None and not wishes.votes:
            reason = "not wanted: a control"
        if reason is None:
            kept.append(each)
        else:
            removed[reason] += 1
    return Chosen(kept, dict(removed), measured)


def heldout_among(judged: Sequence[Judged], prompts: Prompts) -> set[str]:
    """Hashes of the prompts that training must not see: the base run's, and those of the app."""
    tasks = (j.task for j in judged)
    of_app = {t.prompt_sha256 for t in tasks if t.prompt_source.startswith(HELDOUT_POOL)}
    return of_app | prompts.unseen | prompts.known


def is_imported(judged: Judged) -> bool:
    """Whether it came from a file, and not from somebody who used the app."""
    return judged.task.sampler.strategy == "import"


def _why_not(judged: Judged, wishes: Wishes) -> str | None:
    without_order = why_no_order(judged)
    if without_order is not None:
        return without_order
    for reason, applies in _REASONS:
        if applies(judged) and not (reason == _FAST and wishes.fast):
            return reason
    return None


_FAST = "faster than anybody reads"


def _is_empty(judged: Judged) -> bool:
    return not all(r.text.strip() for r in judged.task.responses)


# The first that applies is the one that is counted, after those of `why_no_order`.
_REASONS: tuple[tuple[str, Callable[[Judged], bool]], ...] = (
    ("of an unfinished answer", lambda j: bool(j.task.unfinished)),
    ("with an empty answer", _is_empty),
    ("between identical answers", is_identical),
    (_FAST, lambda j: "fast" in j.judgement.flags or is_too_fast(j.task, j.judgement)),
)


def ranking_of(judged: Judged) -> Ranking:
    """A judgement as the reward model reads it out of the snapshot."""
    row = ranking_row(judged)
    return Ranking(
        judged.task.prompt,
        tuple(row["responses"]),
        tuple(map(tuple, row["ranking"])),
        row["tag"],
        row["annotator"],
    )


# -- counting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Rankings on one side of the split."""

    rankings: int
    prompts: int
    pairs: int


@dataclass(frozen=True)
class Material:
    """What would be trained on, counted.

    Attributes:
        judgements: of people and imported ones, out of the store.
        prompts: they are about.
        pairs: strict ones in them.
        annotators: who gave them.
        adapters: answers in them, by adapter.
        removed: reason -> judgements left out.
        earlier: rankings of the base run that are added.
        train: rankings that the reward model learns from.
        heldout: rankings that choose its best step.
        measured: people's rankings that measure it before and after: of held-out prompts alone,
            which nothing here or before trains on, and which choose no step.
        choosing: people's rankings among those that choose its best step. They say that it has
            learned, and not that it is better: the step is the one that does best on them.
    """

    judgements: int
    prompts: int
    pairs: int
    annotators: int
    adapters: dict[str, int]
    removed: dict[str, int]
    earlier: int
    train: Side
    heldout: Side
    measured: list[Ranking] = field(repr=False)
    choosing: list[Ranking] = field(default_factory=list, repr=False)


def count(chosen: Chosen, earlier: Sequence[Ranking], fraction: float) -> Material:
    """Count what was chosen, and split it as training will.

    Args:
        chosen: of the store.
        earlier: rankings of the base run.
        fraction: of the prompts that the recipe holds out.
    """
    own = [ranking_of(each) for each in chosen.kept]
    records, _ = deduplicate([*own, *earlier])
    train, heldout = split_rankings(records, fraction, of_training_prompts=True)
    choose_step = {prompt_key(r.prompt) for r in heldout}
    people = [j for j in chosen.kept if not is_imported(j)]
    known = choose_step | {prompt_key(r.prompt) for r in train}
    return Material(
        judgements=len(own),
        prompts=len({prompt_key(r.prompt) for r in own}),
        pairs=sum(len(r.strict_pairs) for r in own),
        annotators=len({j.judgement.annotator for j in chosen.kept}),
        adapters=dict(Counter(r.adapter or "base" for j in chosen.kept for r in j.task.responses)),
        removed=chosen.removed,
        earlier=len(earlier),
        train=_side(train),
        heldout=_side(heldout),
        measured=[ranking_of(j) for j in chosen.measured if j.task.prompt_sha256 not in known],
        choosing=[ranking_of(j) for j in people if j.task.prompt_sha256 in choose_step],
    )


def _side(rankings: Sequence[Ranking]) -> Side:
    return Side(
        len(rankings),
        len({prompt_key(r.prompt) for r in rankings if r.strict_pairs}),
        sum(len(r.strict_pairs) for r in rankings),
    )


def why_too_little(material: Material, wishes: Wishes) -> str:
    """What no reward model can be trained and tested on, in a sentence; "" where it is enough."""
    sides = (material.train, material.heldout)
    missing = sum(max(0, LEAST_PROMPTS - side.prompts) for side in sides)
    if missing:
        return (
            f"There are usable rankings of {sum(side.prompts for side in sides)} prompts, and "
            f"{2 * LEAST_PROMPTS} are the least: two to train on and two to test with. Rank "
            f"answers to {missing} more."
        )
    if wishes.votes and not material.judgements:
        return (
            "There is no usable ranking here that the reward model has not seen. Rank answers to "
            "at least 1 prompt."
        )
    return ""


def require_enough(material: Material, wishes: Wishes) -> None:
    """Refuse what no reward model can be trained and tested on.

    Raises:
        TooLittle: nothing new, or fewer than two prompts with a strict preference on a side.
    """
    why = why_too_little(material, wishes)
    if why:
        raise TooLittle(why)


def removed_lines(removed: dict[str, int]) -> Iterator[str]:
    """What each filter left out, most first."""
    for reason, number in sorted(removed.items(), key=lambda item: -item[1]):
        yield f"{number} {reason}"
