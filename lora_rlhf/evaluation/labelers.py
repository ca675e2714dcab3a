"""Held-out labelers: does a reward model agree with people whom it has learned nothing from?

The design of Ouyang et al. 2022, section 3.5 and appendix: annotators are split into groups; for
each group a reward model is trained on the others' rankings and held against both. There 72.4 +-
0.4 % on those it learned from and 69.6 +- 0.9 % on those held out, of 5 groups.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from lora_rlhf.data.batches import tokenise_rankings
from lora_rlhf.data.records import Ranking, key_of
from lora_rlhf.data.sources import load_rankings, require
from lora_rlhf.data.splits import deduplicate, split_rankings
from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.choosing import digest
from lora_rlhf.evaluation.winrates import bootstrap_share
from lora_rlhf.losses.reward import strict_pairs
from lora_rlhf.recipe import Source
from lora_rlhf.runs import Json, Run
from lora_rlhf.training.reward_report import Group, score_groups
from lora_rlhf.training.session import Session

FOLDER = "labelers"
FitReward = Callable[[Session, list[Group], list[Group]], None]


@dataclass(frozen=True)
class _Ranked:
    """A tokenised ranking and who made it."""

    group: Group
    prompt: str
    annotator: str


def split_annotators(rankings: Sequence[Ranking], groups: int) -> list[list[str]]:
    """Annotators in groups of about as many rankings each, the same ones every time.

    The busiest annotator left goes to the group with the fewest rankings.

    Raises:
        DataError: fewer annotators than groups.
    """
    counts = Counter(r.annotator for r in rankings if r.annotator is not None)
    if len(counts) < max(groups, 2):
        raise DataError(
            f"labelers: {len(counts)} annotators cannot be split into {groups} groups. Let more "
            f"people rank, or lower --groups (at least 2)."
        )
    made: list[list[str]] = [[] for _ in range(groups)]
    sizes = [0] * groups
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        smallest = min(range(groups), key=lambda g: (sizes[g], g))
        made[smallest].append(name)
        sizes[smallest] += count
    return [sorted(names) for names in made]


# -- people among themselves --------------------------------------------------------------------


def agreement(
    rankings: Sequence[Ranking], ours: Collection[str], theirs: Collection[str] | None = None
) -> Json | None:
    """Of pairs of answers that two people both order, the share they order alike.

    Args:
        rankings: pairs in which either ties are left out; of one person's several the last counts.
        ours: annotators; two of them are compared.
        theirs: other annotators; where given, one of each is compared instead.

    Returns:
        A share over prompts; None where nobody ordered the same answers.
    """
    orders: dict[tuple[str, str, str], dict[str, bool]] = defaultdict(dict)
    for ranking in rankings:
        if ranking.annotator is None:
            continue
        for better, worse in strict_pairs(ranking.groups):
            one, other = ranking.responses[better], ranking.responses[worse]
            if one == other:
                continue
            key = (key_of(ranking), min(one, other), max(one, other))
            orders[key][ranking.annotator] = one <= other
    alike: defaultdict[str, list[float]] = defaultdict(list)
    for (prompt, _, _), said in orders.items():
        for a, b in combinations(sorted(said), 2):
            if _compared(a, b, ours, theirs):
                alike[prompt].append(float(said[a] == said[b]))
    return _share(alike)


def _compared(a: str, b: str, ours: Collection[str], theirs: Collection[str] | None) -> bool:
    if theirs is None:
        return a in ours and b in ours
    return (a in ours and b in theirs) or (b in ours and a in theirs)


def _share(by_prompt: Mapping[str, Sequence[float]]) -> Json | None:
    clusters = [values for values in by_prompt.values() if values]
    count = sum(map(len, clusters))
    if not count:
        return None
    low, high = bootstrap_share(clusters)
    return {"value": sum(map(sum, clusters)) / count, "low": low, "high": high, "n": count}


# -- the reward model and people ----------------------------------------------------------------


def cross_validate(session: Session, store: str, groups: int, fit_reward: FitReward) -> list[Json]:
    """For each group of annotators a reward model that has learned from the others alone.

    All are held against the same held-out prompts. A group that is done is on disk, and the
    training of the next goes on from its checkpoint. The run's own reward adapter is back in place
    afterwards.

    Args:
        session: with `sft` in place.
        store: of votes, or a file of rankings with annotators.
        groups: at least 2.
        fit_reward: trains `reward` anew on (train, held-out) rankings.

    Returns:
        A row a group: annotators, n (held-out pairs of theirs), agreement_within and
        agreement_across (with everybody else), own (accuracy of the model on those it learned
        from) and others (on this group, which it did not); shares or None.

    Raises:
        DataError: too few annotators, or a group without rankings on both sides of the split.
    """
    named, split = read_split(store, groups)
    fraction = session.recipe.data.heldout_fraction
    train, heldout = split_rankings(named, fraction, of_training_prompts=True)
    to_train, to_judge = _tokenise(session, train), _tokenise(session, heldout)
    everybody = {name for names in split for name in names}
    rows = []
    key = {"rankings": _digest(named), "groups": split, "seed": session.recipe.seed}
    key |= _of_training(session)
    try:
        for number, names in enumerate(split):
            run = Run(session.run.path / FOLDER / f"group-{number}")
            row = _kept(run, key)
            if row is None:
                learned = [r for r in to_train if r.annotator not in names]
                _require_both(names, learned, to_judge)
                others = [r for r in to_judge if r.annotator in names]
                own = [r for r in to_judge if r.annotator not in names]
                _fit(session, run, learned, own, fit_reward)
                rest = everybody - set(names)
                row = {
                    "annotators": names,
                    "n": sum(len(_pairs(r)) for r in others),
                    "agreement_within": agreement(named, names),
                    "agreement_across": agreement(named, names, rest),
                    "own": _accuracy(session, own),
                    "others": _accuracy(session, others),
                }
                run.write_json("labelers.json", {"key": key, "row": row})
            rows.append(row)
            session.tell(_in_words(row))
    finally:
        _restore(session)
    return rows


def read_split(store: str, groups: int) -> tuple[list[Ranking], list[list[str]]]:
    """Rankings whose annotator is known, and the annotators in groups.

    Raises:
        DataError: they cannot be read, or there are too few annotators.
    """
    records, _ = deduplicate(require(load_rankings(Source(path=store))))
    named = [r for r in records if r.annotator is not None]
    return named, split_annotators(named, groups)


def _tokenise(session: Session, records: Sequence[Ranking]) -> list[_Ranked]:
    data = session.recipe.data
    tokens, _ = tokenise_rankings(
        records, session.backbone.format, data.max_prompt_tokens, data.max_response_tokens
    )
    return [
        _Ranked(Group(prompt, responses, r.groups), key_of(r), r.annotator or "")
        for prompt, responses, r in tokens
    ]


def _pairs(ranked: _Ranked) -> list[tuple[int, int]]:
    return list(strict_pairs(ranked.group.groups))


def _require_both(
    names: Sequence[str], learned: Sequence[_Ranked], to_judge: Sequence[_Ranked]
) -> None:
    if not learned or not any(r.annotator in names for r in to_judge):
        raise DataError(
            f"labelers: the group {', '.join(names)} has no rankings of held-out prompts, or the "
            f"others none to learn from. Use fewer groups, or raise data.heldout_fraction."
        )


def _fit(
    session: Session,
    run: Run,
    learned: Sequence[_Ranked],
    heldout: Sequence[_Ranked],
    fit_reward: FitReward,
) -> None:
    """Train in a run directory of the group's own, from a copy of `sft`."""
    settings = session.recipe.reward
    recipe = session.recipe
    if settings is not None:
        # An earlier reward model may have learned from those who are held out now.
        fresh = settings.model_copy(update={"start_from": None})
        recipe = recipe.model_copy(update={"reward": fresh})
    own = replace(session, run=run, recipe=recipe)
    fit_reward(own, [r.group for r in learned], [r.group for r in heldout])


def _accuracy(session: Session, ranked: Sequence[_Ranked]) -> Json | None:
    """Share of strict pairs that the reward model orders as their annotators do, ties half."""
    if not ranked:
        return None
    by_prompt: defaultdict[str, list[float]] = defaultdict(list)
    scores = score_groups(session, [r.group for r in ranked])
    for each, own in zip(ranked, scores, strict=True):
        values = own.tolist()
        for better, worse in _pairs(each):
            gap = values[better] - values[worse]
            by_prompt[each.prompt].append(0.5 if gap == 0 else float(gap > 0))
    return _share(by_prompt)


def _kept(run: Run, key: Json) -> Json | None:
    """The row of a group that was done for the same question."""
    path = run.path / "labelers.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    row: Json | None = found["row"] if found.get("key") == key else None
    return row


def _of_training(session: Session) -> Json:
    """What else the reward models of the groups depend on."""
    recipe = session.recipe
    settings = recipe.reward.model_dump(mode="json") if recipe.reward is not None else None
    return {
        "sft": digest(session.backbone, "sft"),
        "reward": settings,
        "lora": recipe.lora.model_dump(mode="json"),
        "heldout_fraction": recipe.data.heldout_fraction,
    }


def _digest(rankings: Sequence[Ranking]) -> str:
    """Of all that was ranked, by whom: votes may have come since."""
    rows = sorted(repr((key_of(r), r.responses, r.groups, r.annotator)) for r in rankings)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _restore(session: Session) -> None:
    """Put the run's own reward adapter back."""
    adapters, path = session.backbone.adapters, session.run.adapter("reward")
    if (path / "adapter_config.json").is_file():
        adapters.heads.pop("reward", None)
        adapters.load("reward", Path(path))
        adapters.freeze("reward")


def _in_words(row: Json) -> str:
    parts = [
        f"{name} {row[key]['value']:.1%}"
        for name, key in (("those it learned from", "own"), ("held out", "others"))
        if row[key] is not None
    ]
    return f"labelers: without {', '.join(row['annotators'])}: {', '.join(parts)}"
