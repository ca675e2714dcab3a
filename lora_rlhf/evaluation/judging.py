"""Who judges: the reward adapter, a function, people's votes, or a model behind an endpoint.

reward                          the reward adapter of the run
builtin:gold, vader             as in a recipe's `judge`
package.module:function         a function (prompt, response) -> float
human[:STORE]                   votes of the store (unset: rankings.db)
openai:MODEL[@URL]              any server that speaks OpenAI's chat completions
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from lora_rlhf.data.records import prompt_text
from lora_rlhf.errors import ConfigError
from lora_rlhf.evaluation.arms import ReadyArm
from lora_rlhf.evaluation.facts import Arm
from lora_rlhf.evaluation.winrates import Outcome
from lora_rlhf.preferences.counting import counts_for_win_rate, pairs_of
from lora_rlhf.preferences.events import Response
from lora_rlhf.preferences.judges import find_judge
from lora_rlhf.preferences.store import Judged, Store
from lora_rlhf.training.material import TokenisedPrompt

STORE = "rankings.db"
_ENDPOINT = re.compile(r"openai:(?P<model>[^@\s]+)(?:@(?P<url>https?://\S+))?")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_BASE = (None, "base")  # what the store calls the bare base


@dataclass(frozen=True)
class JudgeSpec:
    """A judge as it was written.

    Attributes:
        name: as written; under which it is reported.
        kind: reward or function (a utility for each answer), human or endpoint (pairs).
        model: of an endpoint.
        url: of an endpoint; None: OPENAI_BASE_URL, else OpenAI's own.
        store: of people's votes.
    """

    name: str
    kind: Literal["reward", "function", "human", "endpoint"]
    model: str = ""
    url: str | None = None
    store: str = ""

    @property
    def gives_utilities(self) -> bool:
        """Whether it judges answers one by one."""
        return self.kind in ("reward", "function")


def parse_judge(text: str) -> JudgeSpec:
    """A judge from its text; functions are imported once, so that a wrong name is known now.

    Raises:
        ConfigError: it means nothing, or cannot be imported.
    """
    if text == "reward":
        return JudgeSpec(text, "reward")
    if text == "human" or text.startswith("human:"):
        return JudgeSpec(text, "human", store=text.partition(":")[2] or STORE)
    if found := _ENDPOINT.fullmatch(text):
        _require_url(found["url"])
        return JudgeSpec(text, "endpoint", model=found["model"], url=found["url"])
    if text in ("builtin:gold", "vader") or _FUNCTION.fullmatch(text):
        find_judge(text)
        return JudgeSpec(text, "function")
    raise ConfigError(
        f"judge: {text} is none. Allowed: reward, builtin:gold, vader, package.module:function, "
        f"human, human:STORE, openai:MODEL@URL (such as openai:gpt-4o-mini@http://localhost:8000/v1)."
    )


def _require_url(url: str | None) -> None:
    try:
        parts = urlsplit(url or "https://example.org")
        known = bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a bracket that is not closed, or a port that is no number
        known = False
    if not known:
        raise ConfigError(f"judge: {url} is no URL. Allowed: such as http://localhost:8000/v1.")


# -- answers one by one -------------------------------------------------------------------------


def give_utilities(
    judge: JudgeSpec, prompts: Sequence[TokenisedPrompt], arms: Sequence[Arm]
) -> None:
    """Put a judge's utilities into the arms, under its name.

    Raises:
        ConfigError: the judge is the reward adapter, and there is none; or a function that gives
            what is no number.
    """
    texts = [prompt_text(p.messages) for _, p in prompts]
    if judge.kind == "reward":
        if any(not arm.scores for arm in arms):
            raise no_scores()
        for arm in arms:
            arm.by_judge[judge.name] = arm.scores
        return
    utility = find_judge(judge.name)
    for arm in arms:
        pairs = zip(texts, arm.texts, strict=True)
        found = [_number(utility(t, a), judge.name, t) for t, a in pairs]
        arm.by_judge[judge.name] = found
        if judge.name == "builtin:gold":
            arm.parts = _gold_parts(texts, arm.texts)


def no_scores() -> ConfigError:
    """That the reward adapter cannot judge."""
    return ConfigError(
        "judge: there is no reward adapter to judge with. Name another one, such as --judge "
        "builtin:gold, or train a reward model."
    )


def _number(value: object, judge: str, prompt: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"judge: {judge} gives {value!r} for an answer to {prompt[:80]!r}. Allowed: a finite "
            f"number for every prompt and answer, the empty answer as well."
        )
    return number


def _gold_parts(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    from lora_rlhf.tiny import gold_parts

    totals: Counter[str] = Counter()
    for prompt, answer in zip(prompts, answers, strict=True):
        totals.update(gold_parts(prompt, answer))
    return {part: value / len(prompts) for part, value in totals.items()}


# -- people -------------------------------------------------------------------------------------


def human_outcomes(judged: Sequence[Judged], ours: ReadyArm, theirs: ReadyArm) -> list[Outcome]:
    """What people said of two arms: one outcome a judgement that compares them, ties half.

    A ranking that compares them several times gives the mean of its pairs. Judgements count that
    count for win rates: uniform, blind, of finished answers. Two answers called bad tie. Of two
    arms with the same weights nobody could say which is which: there are no outcomes.
    """
    found: list[Outcome] = []
    if ours.identity == theirs.identity:
        return found
    for each in judged:
        if not counts_for_win_rate(each):
            continue
        strict, tied = pairs_of(each)
        values, gaps = [], []
        for one, other, value in [(w, x, 1.0) for w, x in strict] + [(*t, 0.5) for t in tied]:
            first, second = each.task.response(one), each.task.response(other)
            if is_of(first, theirs) and is_of(second, ours):
                first, second, value = second, first, 1.0 - value
            if is_of(first, ours) and is_of(second, theirs):
                values.append(value)
                gaps.append(float(len(first.text) - len(second.text)))
        if values:
            mean, gap = sum(values) / len(values), sum(gaps) / len(gaps)
            found.append(Outcome(each.task.prompt_sha256, mean, gap))
    return found


def is_of(response: Response, arm: ReadyArm) -> bool:
    """Whether people saw this arm's answer: one sample of the same weights, without shots."""
    if arm.spec.best_of > 1 or arm.spec.shots:
        return False
    if arm.adapter is None:
        return response.adapter in _BASE
    sha256 = response.adapter_sha256
    return sha256 is not None and sha256.startswith(arm.identity.partition("+")[0])


def read_votes(location: str) -> list[Judged]:
    """All judgements of a store that stand.

    Raises:
        PreferenceError: there is no such store, or it cannot be read.
    """
    with Store.open(location, create=False, read_only=True) as store:
        return store.judged()
