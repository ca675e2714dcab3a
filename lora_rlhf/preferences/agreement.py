"""How much judgements agree: with each other, with themselves, with the reward model."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

from lora_rlhf.preferences.counting import counts_for_win_rate, pairs_of, seconds_of
from lora_rlhf.preferences.intervals import Rate, clustered_rate
from lora_rlhf.preferences.store import Judged

_VIEWS = ("blind", "names shown", "scores shown")


def position_bias(judged: Sequence[Judged]) -> Rate:
    """How often the first of two answers (A, on the left) wins; without bias half the time.

    Of decided pairs that count for win rates; ties are left out.
    """
    firsts: defaultdict[str, list[float]] = defaultdict(list)
    for each in judged:
        if not counts_for_win_rate(each) or each.judgement.type != "pair":
            continue
        for winner, _ in pairs_of(each)[0]:
            is_first = each.task.response(winner).pos == 0
            firsts[each.task.prompt_sha256].append(float(is_first))
    return clustered_rate(firsts)


def median_seconds(judged: Sequence[Judged], kind: str | None = None) -> float | None:
    """Median time of a judgement in seconds; None where none is known.

    Args:
        judged: imported ones and skips are left out.
        kind: pair, rank or like alone.
    """
    known = [
        seconds
        for j in judged
        if j.judgement.outcome != "skip"
        and j.task.sampler.strategy != "import"
        and kind in (None, j.judgement.type)
        and (seconds := seconds_of(j.judgement)) is not None
    ]
    return statistics.median(known) if known else None


# -- between people -----------------------------------------------------------------------------


def annotator_agreement(judged: Sequence[Judged]) -> Rate:
    """Of pairs that two people both order, the share they order alike; 1/2 is chance.

    Args:
        judged: every two different people's judgements of one task or its repeats are compared;
            the newest of each. Imported ones are left out, and so are pairs in which either ties.
    """

    def pairs(group: list[Judged]) -> Iterable[tuple[Judged, Judged]]:
        newest = {j.judgement.annotator: j for j in sorted(group, key=lambda j: j.seq)}
        return combinations(newest.values(), 2)

    return _agreement(judged, pairs)


def self_consistency(judged: Sequence[Judged]) -> Rate:
    """Of pairs that one person ordered twice, the share ordered alike; sides are swapped."""

    def pairs(group: list[Judged]) -> Iterable[tuple[Judged, Judged]]:
        by_person: defaultdict[str, list[Judged]] = defaultdict(list)
        for each in group:
            by_person[each.judgement.annotator].append(each)
        return [pair for own in by_person.values() for pair in combinations(own, 2)]

    return _agreement(judged, pairs)


def _agreement(
    judged: Sequence[Judged], pairs: Callable[[list[Judged]], Iterable[tuple[Judged, Judged]]]
) -> Rate:
    groups: defaultdict[str, list[Judged]] = defaultdict(list)
    parents = {j.task.id: j.task.repeat_of for j in judged}
    for each in judged:
        if not each.retracted and each.task.sampler.strategy != "import":
            groups[_origin(each.task.id, parents)].append(each)
    alike: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups.values():
        for one, other in pairs(group):
            theirs = set(pairs_of(other)[0])
            for better, worse in pairs_of(one)[0]:
                if (better, worse) in theirs or (worse, better) in theirs:
                    agrees = (better, worse) in theirs
                    alike[one.task.prompt_sha256].append(float(agrees))
    return clustered_rate(alike)


def _origin(task_id: str, parents: dict[str, str | None]) -> str:
    """The task at the start of a chain of repeats."""
    seen = {task_id}
    while (parent := parents.get(task_id)) is not None and parent not in seen:
        task_id = parent
        seen.add(parent)
    return task_id


# -- with the reward model ----------------------------------------------------------------------


def reward_agreement(judged: Sequence[Judged], rm_adapter: str | None = None) -> Rate:
    """Of pairs that a person orders, the share the reward model's scores order alike.

    Equal scores count half. Judgements that count for win rates alone; whoever saw the scores may
    have followed them, and actively chosen pairs are those the model is least sure of.

    Args:
        judged: answers without a score, or scored by two models, are left out.
        rm_adapter: scored by this one alone.
    """
    return _reward_agreement([j for j in judged if counts_for_win_rate(j)], rm_adapter)


def reward_agreement_by_view(
    judged: Sequence[Judged], rm_adapter: str | None = None
) -> dict[str, Rate]:
    """As `reward_agreement`, apart for what was shown: blind, names shown, scores shown.

    A higher one where scores were shown says that people follow them.
    """
    fair = [
        j
        for j in judged
        if j.task.sampler.strategy == "uniform" and not j.retracted and not j.task.unfinished
    ]
    return {
        view: _reward_agreement([j for j in fair if _view(j) == view], rm_adapter)
        for view in _VIEWS
    }


def _view(judged: Judged) -> str:
    if judged.judgement.scores_visible:
        return "scores shown"
    return "blind" if judged.task.blind and judged.judgement.blind else "names shown"


def _reward_agreement(judged: Sequence[Judged], rm_adapter: str | None) -> Rate:
    alike: defaultdict[str, list[float]] = defaultdict(list)
    for each in judged:
        for better, worse in pairs_of(each)[0]:
            one, other = each.task.response(better), each.task.response(worse)
            same = one.rm_adapter == other.rm_adapter and rm_adapter in (None, one.rm_adapter)
            if same and one.rm_score is not None and other.rm_score is not None:
                gap = one.rm_score - other.rm_score
                agrees = 0.5 if gap == 0 else float(gap > 0)
                alike[each.task.prompt_sha256].append(agrees)
    return clustered_rate(alike)
