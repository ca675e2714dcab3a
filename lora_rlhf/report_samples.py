"""The report's samples: every arm's answers side by side, and one prompt through training."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from lora_rlhf.report_parts import answer, answers, folded, row, score, table
from lora_rlhf.results import arm_name, sample_pairs
from lora_rlhf.runs import Run

Json = dict[str, Any]
_PROMPTS = 8
_SHOWN = 4  # of them; the rest on demand
_LOOKS = 12  # answers to one fixed prompt that are shown through training
_FIRST = ("sft", "policy")  # stand first: they are what a run is about


def samples_section(run: Run) -> str:
    """Answers of all arms to the same prompts; of PPO's first and last look without arms."""
    drawn = _of_arms(run.lines("evaluate/samples.jsonl")) or _of_looks(run)
    return drawn + _through_training(run.lines("ppo/samples.jsonl"))


def _of_arms(records: Sequence[Json]) -> str:
    by_prompt: dict[str, dict[str, Json]] = {}
    for record in records:
        by_prompt.setdefault(record["prompt"], {})[record.get("arm", "")] = record
    parts = []
    for prompt, arms in list(by_prompt.items())[:_PROMPTS]:
        if len(arms) < 2:
            continue
        order = [a for a in _FIRST if a in arms] + [a for a in arms if a not in _FIRST]
        sides = [
            answer(
                "after" if arm == "policy" else "before",
                arm_name(arm),
                arms[arm]["response"],
                arms[arm].get("score"),
                _judged(arms[arm]),
            )
            for arm in order
        ]
        parts.append(answers(prompt, sides))
    more = parts[_SHOWN:]
    return "".join(parts[:_SHOWN]) + folded(f"{len(more)} more prompts", "".join(more))


def _judged(record: Json) -> str:
    utility = record.get("utility")
    # Where the reward model is the judge, its score has been said.
    if utility is None or utility == record.get("score"):
        return ""
    return f"judge {utility:+.2f}"


def _of_looks(run: Run) -> str:
    return "".join(
        answers(
            pair.prompt,
            [
                answer("before", pair.before_name, pair.before, pair.before_score),
                answer("after", pair.after_name, pair.after, pair.after_score),
            ],
        )
        for pair in sample_pairs(run)
    )


def _through_training(records: Sequence[Json]) -> str:
    """One fixed prompt's answer at every look."""
    if not records:
        return ""
    prompt = records[0]["prompt"]
    looks = [r for r in records if r["prompt"] == prompt]
    every = math.ceil(len(looks) / _LOOKS)
    shown = looks[::every] + ([looks[-1]] if (len(looks) - 1) % every else [])
    if len(shown) < 2:
        return ""
    rows = [
        row((f"step {r['step']}{score(r.get('score'))}", escape(r["response"].strip())))
        for r in shown
    ]
    body = f"<p class=prompt>{escape(prompt.strip())}</p>{table((), rows, 'looks')}"
    return folded("One prompt through training", body)
