"""What the judgements say, counted once for all who look. Imports no torch."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lora_rlhf.preferences.counting import is_too_fast
from lora_rlhf.preferences.ratings import (
    HeatMap,
    Leaderboard,
    Rate,
    annotator_agreement,
    heat_map,
    leaderboard,
    median_seconds,
    position_bias,
    reward_agreement_by_view,
    self_consistency,
)
from lora_rlhf.preferences.store import Judged, Store

if TYPE_CHECKING:
    from ui.studio import Studio

OUTCOMES = ("decided", "tie", "both_bad", "skip")


@dataclass(frozen=True)
class Annotator:
    """What one person did.

    Attributes:
        name: that it is stored under.
        judgements: that stand.
        seconds: median of one; None where unknown.
        fast: judgements that came faster than anybody reads.
    """

    name: str
    judgements: int
    seconds: float | None
    fast: int


@dataclass(frozen=True)
class Numbers:
    """Everything the tab draws.

    Attributes:
        judgements: that stand, likes and skips counted.
        today: of them, done since midnight here.
        retracted: taken back.
        fast: of those that stand, faster than anybody reads.
        seconds: type -> median seconds of one; None where unknown.
        board: win rates.
        heat: who met whom.
        bias: how often the first of two wins.
        people: how often two people agree.
        oneself: how often a person agrees with themself.
        reward: view -> how often the reward model agrees.
        outcomes: outcome -> judgements of pairs and rankings.
        likes: of chat: liked, not liked.
        flags: mark -> judgements that have it; without the app's own.
        markable: judgements that could have marks: all but skips, likes and imported ones.
        annotators: most judgements first.
    """

    judgements: int
    today: int
    retracted: int
    fast: int
    seconds: dict[str, float | None]
    board: Leaderboard
    heat: HeatMap
    bias: Rate
    people: Rate
    oneself: Rate
    reward: dict[str, Rate]
    outcomes: dict[str, int]
    likes: tuple[int, int]
    flags: dict[str, int]
    markable: int
    annotators: tuple[Annotator, ...]


def count(judged: Sequence[Judged], retracted: int = 0, now: float | None = None) -> Numbers:
    """Count judgements that stand.

    Args:
        judged: all of them.
        retracted: how many do not stand any more.
        now: seconds since 1970; unset: now.
    """
    midnight = _midnight(time.time() if now is None else now)
    choices = [j.judgement for j in judged if j.judgement.type != "like"]
    likes = [j.judgement.strength for j in judged if j.judgement.type == "like"]
    outcomes: Counter[str] = Counter(choice.outcome for choice in choices)
    marked = [j.judgement for j in judged if _is_markable(j)]
    return Numbers(
        judgements=len(judged),
        today=sum(j.judgement.done_ts >= midnight for j in judged),
        retracted=retracted,
        fast=sum(map(_is_fast, judged)),
        seconds={kind: median_seconds(judged, kind) for kind in ("pair", "rank")},
        board=leaderboard(judged),
        heat=heat_map(judged),
        bias=position_bias(judged),
        people=annotator_agreement(judged),
        oneself=self_consistency(judged),
        reward=reward_agreement_by_view(judged),
        outcomes={outcome: outcomes[outcome] for outcome in OUTCOMES},
        likes=(likes.count(1), likes.count(-1)),
        flags=dict(Counter(f for m in marked for f in m.flags if f != "fast").most_common()),
        markable=len(marked),
        annotators=_annotators(judged),
    )


def _midnight(now: float) -> float:
    day = time.localtime(now)
    return time.mktime((day.tm_year, day.tm_mon, day.tm_mday, 0, 0, 0, 0, 0, -1))


def _is_fast(judged: Judged) -> bool:
    return is_too_fast(judged.task, judged.judgement)


def _is_markable(judged: Judged) -> bool:
    judgement = judged.judgement
    is_ours = judgement.type != "like" and judged.task.sampler.strategy != "import"
    return is_ours and judgement.outcome != "skip"


def _annotators(judged: Sequence[Judged]) -> tuple[Annotator, ...]:
    theirs: defaultdict[str, list[Judged]] = defaultdict(list)
    for each in judged:
        theirs[each.judgement.annotator].append(each)
    found = [
        Annotator(name, len(own), median_seconds(own), sum(map(_is_fast, own)))
        for name, own in theirs.items()
    ]
    return tuple(sorted(found, key=lambda a: (-a.judgements, a.name)))


# -- counted once ---------------------------------------------------------------------------------

_counted: WeakKeyDictionary[Store, tuple[tuple[int, float], Numbers]] = WeakKeyDictionary()
_counting = threading.Lock()


def numbers(studio: "Studio") -> Numbers:
    """The numbers of the studio's store, counted again when it changes or the day ends."""
    store = studio.store
    key = (store.version(), _midnight(time.time()))
    with _counting:  # whoever comes meanwhile waits for the same count
        known = _counted.get(store)
        if known is None or known[0] != key:
            known = (key, count(studio.judged(), store.counts()["retracted"]))
            _counted[store] = known
        return known[1]
