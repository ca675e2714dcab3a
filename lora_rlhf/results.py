"""What a run's summary says, in words and rows; read by the terminal and by the report.

Imports no torch: a finished run is read in a moment.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_rlhf.runs import Json, Run

_ARM_NAMES = {"base": "base", "sft": "SFT", "policy": "PPO"}
_MANY = re.compile(r"best_of_(?P<n>\d+)(?::(?P<rest>.+))?")
_SHOTS = re.compile(r"few_shot_(?P<n>\d+)(?::(?P<rest>.+))?")
_JUDGES = {
    "builtin:gold": "the toy world's hidden gold utility",
    "vader": "VADER sentiment",
    "reward": "the reward model itself, which is no independent judge",
}
# Beyond these a win is not taken at its word: far from the reference, not stopping, or of another
# length than before.
_FAR_KL = 15.0
_MUTE = 0.1  # share of replies without a verdict
_LOW_EOS = 0.9
_LENGTH_DRIFT = 0.2


@dataclass(frozen=True)
class Row:
    """One line of the result table.

    Attributes:
        name: what was measured.
        value: as text, with its unit.
        interval: 95% interval of a share between 0 and 1, where there is one.
        share: the value itself, where it has an interval.
        note: what to hold it against.
    """

    name: str
    value: str
    interval: tuple[float, float] | None = None
    share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """The run in a sentence or two.

    Attributes:
        tone: good, even (no difference can be told) or bad.
        text: whole sentences.
    """

    tone: Literal["good", "even", "bad"]
    text: str


@dataclass(frozen=True)
class SamplePair:
    """Two answers to one prompt, before and after."""

    prompt: str
    before: str
    after: str
    before_name: str
    after_name: str
    before_score: float | None = None
    after_score: float | None = None


# -- words ---------------------------------------------------------------------------------------


def arm_name(arm: str) -> str:
    """A person's name for an arm: best_of_4:policy is `best of 4 of PPO`."""
    if found := _MANY.fullmatch(arm):
        of = f" of {arm_name(found['rest'])}" if found["rest"] else ""
        return f"best of {found['n']}{of}"
    if found := _SHOTS.fullmatch(arm):
        examples = "example" if found["n"] == "1" else "examples"
        return f"{arm_name(found['rest'] or 'base')} after {found['n']} {examples}"
    run, _, own = arm.rpartition("/")
    if run and arm_name(own) != own:
        return f"{run}: {arm_name(own)}"  # an arm of another run
    return _ARM_NAMES.get(arm, arm)


def judge_name(judge: str) -> str:
    """A person's name for a judge."""
    return _JUDGES.get(judge, judge)


def reliability(wins: Sequence[Json], judge: str) -> list[str]:
    """How far a judge of pairs can be believed: both orders, and replies that hold no verdict."""
    own = [win for win in wins if win.get("judge", "") == judge and "orders_agree" in win]
    count = sum(win["prompts"] for win in own)
    if not count:
        return []
    agree = sum(win["orders_agree"] * win["prompts"] for win in own) / count
    mute = sum(win["unreadable"] for win in own)
    found = [f"It said the same in both orders of {percent(agree)} of pairs; else they tie."]
    if mute:
        share = mute / (2 * count)
        weight = " Do not believe these win rates." if share > _MUTE else ""
        found.append(
            f"{mute} of {2 * count} of its replies ({percent(share)}) held no verdict and count as "
            f"ties.{weight}"
        )
    return found


def percent(share: float) -> str:
    """A share as a percentage without decimals: 0.714 is `71%`."""
    return f"{100 * share:.0f}%"


def verdict(summary: Json) -> Verdict:
    """What the run reached, by the strongest evidence it holds."""
    found = _verdict_on_stages(summary)
    if summary.get("ppo", {}).get("best_step") != 0:
        return found
    text = (
        "PPO found nothing that the reward model scores higher: the policy it kept is the one it "
        "started from, before its first step."
    )
    return Verdict("even", f"{text} {found.text}")


def _verdict_on_stages(summary: Json) -> Verdict:
    wins = [w for w in summary.get("win_rates", []) if (w["a"], w["b"]) == ("policy", "sft")]
    if wins:
        return _verdict_on_win(summary, wins[0])
    reward, sft = summary.get("reward", {}), summary.get("sft", {})
    if "ppo" in summary:
        ppo = summary["ppo"]
        text = (
            f"PPO reached a reward-model score of {ppo.get('score', 0.0):+.2f} at a KL of "
            f"{ppo.get('kl', 0.0):.1f} nats from SFT. Nothing has judged its answers yet: "
            f"evaluate them before you trust the score."
        )
        return Verdict("even", text)
    if "accuracy" in reward:
        low, high = reward.get("accuracy_ci", (0.0, 1.0))
        text = (
            f"The reward model orders {percent(reward['accuracy'])} of held-out pairs as the "
            f"labels do (95% interval {percent(low)} to {percent(high)})."
        )
        return Verdict("good" if low > 0.5 else "even", text)
    if "heldout_loss" in sft:
        text = f"SFT reached a held-out loss of {sft['heldout_loss']:.3f} nats a token."
        return Verdict("good", text)
    return Verdict("even", "No stage has ended yet.")


def _verdict_on_win(summary: Json, win: Json) -> Verdict:
    low, high = win["ci"]
    span = f"(95% interval {percent(low)} to {percent(high)}, {win['prompts']} held-out prompts)"
    by = f"by {judge_name(win.get('judge', ''))}"
    if low > 0.5:
        tone: Literal["good", "even", "bad"] = "good"
        text = f"PPO beats SFT on {percent(win['win_rate'])} of answers {span}, {by}."
    elif high < 0.5:
        tone = "bad"
        text = f"PPO made the answers worse: it wins {percent(win['win_rate'])} {span}, {by}."
    else:
        tone = "even"
        text = (
            f"PPO and SFT cannot be told apart: PPO wins {percent(win['win_rate'])} {span}, {by}."
        )
    doubts = list(_doubts(summary))
    if doubts and tone == "good":
        tone = "even"
    return Verdict(tone, " ".join([text, *doubts, *_fallen_parts(summary)]))


def _doubts(summary: Json) -> Iterator[str]:
    """Reasons not to take a win at its word."""
    arms = summary.get("arms", {})
    policy, sft = arms.get("policy", {}), arms.get("sft", {})
    if policy.get("kl", 0.0) > _FAR_KL:
        yield f"But its KL of {policy['kl']:.0f} nats is far from SFT: the reward may be gamed."
    if policy.get("eos_rate", 1.0) < _LOW_EOS:
        yield f"But only {percent(policy['eos_rate'])} of its answers end by themselves."
    if sft.get("mean_length") and policy.get("mean_length"):
        drift = policy["mean_length"] / sft["mean_length"] - 1.0
        if abs(drift) > _LENGTH_DRIFT:
            yield f"But its answers are {abs(drift):.0%} {'longer' if drift > 0 else 'shorter'}."


def _fallen_parts(summary: Json) -> Iterator[str]:
    """Parts of the judge's utility whose mean fell; their noise is unknown, so it is only said."""
    arms = summary.get("arms", {})
    ours, theirs = (arms.get(arm, {}).get("parts", {}) for arm in ("policy", "sft"))
    worse = [p for p, v in ours.items() if p in theirs and v < theirs[p] - 1e-9]
    if worse:
        yield f"Of the utility's parts these fell: {', '.join(sorted(worse))}."


# -- rows ----------------------------------------------------------------------------------------


def result_rows(summary: Json) -> list[Row]:
    """The result table; a stage that is missing adds no row."""
    rows = [_win_row(win) for win in summary.get("win_rates", [])]
    rows += _reward_rows(summary.get("reward", {}))
    rows += _ppo_rows(summary)
    rows += _sft_rows(summary.get("sft", {}))
    return rows


def _win_row(win: Json) -> Row:
    low, high = win["ci"]
    return Row(
        name=f"{arm_name(win['a'])} vs {arm_name(win['b'])}",
        value=f"{percent(win['win_rate'])} wins",
        interval=(low, high),
        share=win["win_rate"],
        note=f"{win['prompts']} prompts",
    )


def _reward_rows(reward: Json) -> Iterator[Row]:
    if "accuracy" not in reward:
        return
    low, high = reward.get("accuracy_ci", (reward["accuracy"], reward["accuracy"]))
    limits = []
    if "bayes_accuracy" in reward:
        limits.append(f"Bayes limit {percent(reward['bayes_accuracy'])}")
    if "longer_baseline" in reward:
        limits.append(f"always-longer {percent(reward['longer_baseline'])}")
    yield Row(
        name="reward accuracy",
        value=percent(reward["accuracy"]),
        interval=(low, high),
        share=reward["accuracy"],
        note=", ".join(limits),
    )


def _ppo_rows(summary: Json) -> Iterator[Row]:
    ppo, arms = summary.get("ppo", {}), summary.get("arms", {})
    sft, policy = arms.get("sft", {}), arms.get("policy", {})
    if "kl" in ppo:
        yield Row("PPO KL from SFT", f"{ppo['kl']:.1f} nats", note="a sequence")
    kinds: list[tuple[str, str, Callable[[float], str]]] = [
        ("PPO EOS rate", "eos_rate", percent),
        ("PPO mean length", "mean_length", "{:.0f} tokens".format),
        ("PPO distinct-2", "distinct_2", percent),
    ]
    for name, key, words in kinds:
        value = policy.get(key, ppo.get(key))
        if value is not None:
            yield Row(name, words(value), note=f"SFT {words(sft[key])}" if key in sft else "")
    if ppo.get("stopped"):
        yield Row("PPO stopped itself", "yes", note=str(ppo["stopped"]))


def _sft_rows(sft: Json) -> Iterator[Row]:
    if "heldout_loss" in sft:
        base = sft.get("heldout_loss_of_base")
        note = "nats a token" + (f"; base {base:.3f}" if base is not None else "")
        yield Row("SFT held-out loss", f"{sft['heldout_loss']:.3f}", note=note)


def health_rows(health: Json) -> list[Row]:
    """The health card of a reward model in a few rows; [] where there is none."""
    if not health:
        return []
    accuracy, longer = health["accuracy"], health["always_longer"]
    rows = [
        _share_row("accuracy", accuracy, f"{accuracy['n']} pairs; coin 50%"),
        _share_row("always longer", longer, "the rule to beat"),
    ]
    quarters = health["by_margin"]
    if len(quarters) > 1:
        least = percent(quarters[0]["share"]["value"])
        rows.append(_share_row("where it is surest", quarters[-1]["share"], f"least sure {least}"))
    correlation = health["length_correlation"]
    rows.append(Row("length", f"{correlation:+.2f}", note="rank correlation"))
    slope = health["calibration_slope"]
    note = "slope; under 1 too sure"
    rows.append(Row("calibration", f"{slope:.2f}", note=note))
    for probe in health.get("degenerate", []):
        beaten = percent(probe["percentile"])
        note = f"beats {beaten} of SFT"
        rows.append(Row(probe["name"], f"{probe['score']:+.2f}", note=note))
    return rows


def _share_row(name: str, share: Json, note: str) -> Row:
    value, interval = share["value"], (share["low"], share["high"])
    return Row(name, percent(value), interval, value, note)


# -- samples -------------------------------------------------------------------------------------


def sample_pairs(run: Run, most: int = 8) -> list[SamplePair]:
    """Answers before and after PPO: of the evaluation's arms, else of PPO's first and last look."""
    pairs = _pairs_of_arms(run.lines("evaluate/samples.jsonl"))
    return (pairs or _pairs_of_steps(run.lines("ppo/samples.jsonl")))[:most]


def _pairs_of_arms(records: list[Json]) -> list[SamplePair]:
    by_prompt: dict[str, dict[str, Json]] = {}
    for record in records:
        by_prompt.setdefault(record["prompt"], {})[record.get("arm", "")] = record
    found = []
    for prompt, arms in by_prompt.items():
        before, after = ("sft", "policy") if "policy" in arms else ("base", "sft")
        if before in arms and after in arms:
            found.append(_pair(prompt, arms[before], arms[after], before, after))
    return found


def _pairs_of_steps(records: list[Json]) -> list[SamplePair]:
    if not records:
        return []
    first, last = (pick(r["step"] for r in records) for pick in (min, max))
    before = {r["prompt"]: r for r in records if r["step"] == first}
    after = {r["prompt"]: r for r in records if r["step"] == last}
    return [
        _pair(p, before[p], after[p], f"step {first}", f"step {last}")
        for p in before
        if p in after and first != last
    ]


def _pair(prompt: str, before: Json, after: Json, old: str, new: str) -> SamplePair:
    return SamplePair(
        prompt=prompt,
        before=before["response"],
        after=after["response"],
        before_name=arm_name(old),
        after_name=arm_name(new),
        before_score=before.get("score"),
        after_score=after.get("score"),
    )
