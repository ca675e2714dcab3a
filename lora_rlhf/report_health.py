"""The report's health card of the reward model."""

from collections.abc import Mapping
from html import escape
from typing import Any

from lora_rlhf.plots import calibration_plot, histogram_plot
from lora_rlhf.report_parts import (
    answer,
    answers,
    folded,
    note,
    result_table,
    row,
    share_row,
    table,
    verdict,
)
from lora_rlhf.results import Row, health_rows, percent

Json = dict[str, Any]
_SETS = {"demonstrations": "demonstrations", "sft": "SFT", "policy": "PPO"}


def health_section(health: Json, with_policy: bool = True) -> str:
    """All of `health` in summary.json; "" where there is none.

    Args:
        health: of `lora_rlhf.evaluation.health`.
        with_policy: False where PPO will run again, so that its scores are those of an old policy.
    """
    if not health:
        return ""
    said = health["verdict"]
    parts = [
        verdict(said["sentence"], "good" if said["ok"] else "bad"),
        # The degenerate answers have a table of their own.
        result_table(health_rows({**health, "degenerate": []})),
        _charts(health, with_policy),
        _by_tag(health.get("by_tag", {})),
        _by_margin(health.get("by_margin", [])),
        _degenerate(health.get("degenerate", [])),
        _disagreements(health.get("disagreements", [])),
    ]
    return "".join(parts)


def _charts(health: Json, with_policy: bool) -> str:
    scores = dict(health.get("scores", {}))
    edges = scores.pop("bins", [])
    if not with_policy:
        scores.pop("policy", None)
    sets = {label: scores[name] for name, label in _SETS.items() if name in scores}
    drawn = calibration_plot("Calibration", health.get("calibration", []))
    drawn += histogram_plot("Scores", edges, sets)
    return f"<div class=charts>{drawn}</div>" if drawn else ""


def _by_tag(tags: Json) -> str:
    if not tags:
        return ""
    rows = [share_row(tag, share, f"{share['n']} pairs") for tag, share in tags.items()]
    return f"<h3>Accuracy by use case</h3>{result_table(rows)}"


def _by_margin(quarters: list[Json]) -> str:
    rows: list[Row] = [
        share_row(f"{q['low']:.2f} to {q['high']:.2f}", q["share"], f"{q['share']['n']} pairs")
        for q in quarters
    ]
    if not rows:
        return ""
    return f"<h3>Accuracy by difference of the scores</h3>{result_table(rows)}"


def _degenerate(probes: list[Json]) -> str:
    rows = [
        row(
            (
                f"<b>{escape(p['name'])}</b>",
                f"{p['score']:+.2f}",
                percent(p["percentile"]),
                _example(p),
            )
        )
        for p in probes
    ]
    if not rows:
        return ""
    head = ("", "mean score", "beats of SFT's", "the one it likes best")
    return f"<h3>Degenerate answers</h3>{table(head, rows, 'probes')}"


def _example(probe: Mapping[str, Any]) -> str:
    text = escape(probe["text"].strip()) or "<i>nothing</i>"
    return f"<small>{probe['best_score']:+.2f}</small> {text}"


def _disagreements(pairs: list[Json]) -> str:
    if not pairs:
        return ""
    drawn = "".join(
        answers(
            pair["prompt"],
            [
                answer("after", "ranked higher", pair["chosen"], None),
                answer(
                    "before",
                    "the model prefers",
                    pair["rejected"],
                    None,
                    f"by {-pair['margin']:.2f}",
                ),
            ],
        )
        for pair in pairs
    )
    words = f"The {len(pairs)} pairs where it disagrees with the rankings most"
    advice = note("Read them: either the model is wrong, or the label is.")
    return folded(words, advice + drawn)
