"""Metadata rates of InstructGPT's table 3, from the marks that people set in the app."""

from collections.abc import Iterable
from pathlib import Path

from lora_rlhf.errors import DataError
from lora_rlhf.preferences.events import FLAGS
from lora_rlhf.preferences.intervals import Rate, clustered_rate
from lora_rlhf.preferences.ratings import ArmKey, arm_key, arm_names
from lora_rlhf.preferences.store import Judged, Store
from lora_rlhf.recipe import is_store
from lora_rlhf.runs import Json
from lora_rlhf.training.session import Session

_NOT_OF_PEOPLE = "fast"  # the app sets it


def store_of(session: Session) -> str | None:
    """The store that the recipe's rankings come from; None where they come from files."""
    source = session.recipe.data.rankings
    return source.path if source is not None and source.path and is_store(source.path) else None


def flag_shares(location: str | Path) -> Json:
    """{flag: {arm: share}} of a store that people have marked answers in.

    Raises:
        DataError: nobody has judged anything in it that can be marked.
        PreferenceError: it cannot be opened.
    """
    with Store.open(location, create=False, read_only=True) as store:
        rates = flag_rates(store.each_judged())
    if not rates:
        raise DataError(
            f"{location} holds no finished ranking of one adapter's answers, so there are no "
            f"rates of its marks. Rank answers of a single adapter in the app's Rank tab."
        )
    return {flag: {arm: _share(rate) for arm, rate in arms.items()} for flag, arms in rates.items()}


def flag_rates(judged: Iterable[Judged]) -> dict[str, dict[str, Rate]]:
    """Flag -> arm -> share of the judgements that have it, with an interval over prompts.

    A mark is set on a whole task. So it is counted for an adapter only where all answers of the
    task are that adapter's; where several adapters answered nobody knows which one was meant.
    Skips, likes and imported votes, in which nothing can be marked, do not count. Two adapters of
    one name, such as the policy before and after a retraining, are two arms.
    """
    marks: dict[ArmKey, dict[str, list[frozenset[str]]]] = {}
    for each in judged:
        task, judgement = each.task, each.judgement
        arms = {arm_key(response) for response in task.responses}
        if not _is_markable(each) or len(arms) > 1:
            continue
        prompts = marks.setdefault(arms.pop(), {})
        prompts.setdefault(task.prompt_sha256, []).append(frozenset(judgement.flags))
    names = arm_names(marks.keys())
    flags = [flag for flag in FLAGS if flag != _NOT_OF_PEOPLE] if marks else []
    return {
        flag: {
            names[arm]: clustered_rate(
                [[float(flag in m) for m in found] for found in prompts.values()]
            )
            for arm, prompts in sorted(marks.items(), key=lambda item: names[item[0]])
        }
        for flag in flags
    }


def _is_markable(judged: Judged) -> bool:
    judgement = judged.judgement
    is_ours = judgement.type != "like" and judged.task.sampler.strategy != "import"
    return is_ours and judgement.outcome != "skip" and not judged.retracted


def _share(rate: Rate) -> Json:
    assert rate.share is not None
    return {"value": rate.share, "low": rate.low, "high": rate.high, "n": rate.count}
