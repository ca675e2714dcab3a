"""The report's frontier: reward against the distance from SFT, and the over-optimisation watch."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from lora_rlhf.plots import Cloud, Mark, cloud_plot
from lora_rlhf.report_parts import folded, note, row, table, verdict
from lora_rlhf.results import arm_name, judge_name

Json = dict[str, Any]
_KINDS = {"best_of_n": "best of n", "ppo": "PPO"}
_HEIGHTS = {"proxy": "by the reward model", "gold": "by the judge"}
_TITLES = {"proxy": "Reward model's score", "gold": "Gold utility"}
_LAWS = {"best_of_n": "d (alpha - beta d)", "ppo": "d (alpha - beta ln d)"}
_CURVE_POINTS = 60


def watch_section(summary: Json) -> str:
    """The sentence of the over-optimisation watch, where there is one."""
    watch = summary.get("watch") or summary.get("frontier", {}).get("watch")
    return verdict(watch["sentence"], "bad" if watch["warned"] else "good") if watch else ""


def frontier_section(frontier: Json) -> str:
    """Best-of-n and PPO in one plot by each yardstick, with their fits; "" without points."""
    points, fits = frontier.get("points", []), frontier.get("fits", {})
    if not points:
        return ""
    judge = frontier.get("judge")
    drawn = ""
    for height, title in _TITLES.items():
        known = [p for p in points if p.get(height) is not None]
        unit = judge_name(judge) if height == "gold" and judge else "mean over prompts"
        drawn += cloud_plot(title, unit, _clouds(known, fits, height), "√KL from SFT, √nats")
    charts = f"<div class=charts>{drawn}</div>"
    return charts + _fits(fits, points) + _points(points)


def _clouds(points: Sequence[Json], fits: Json, height: str) -> list[Cloud]:
    clouds = []
    for kind, label in _KINDS.items():
        own = [p for p in points if p["kind"] == kind]
        marks = [
            Mark(_distance(p), p[height], *_interval(p, height), name=_name(p, height)) for p in own
        ]
        fit = (fits.get(kind) or {}).get(height)
        curve = _curve(kind, fit, own, height) if fit and own else []
        clouds.append(Cloud(label, marks, curve))
    return clouds


def _distance(point: Json) -> float:
    return math.sqrt(max(float(point["kl"]), 0.0))


def _interval(point: Json, height: str) -> tuple[float, float]:
    low, high = point.get(f"{height}_ci") or (point[height], point[height])
    return float(low), float(high)


def _which(point: Json) -> str:
    arm = point.get("arm", "")
    if point["kind"] == "ppo":
        own = arm if arm not in ("", "policy") else _KINDS["ppo"]
        return f"{own}, step {point['step']}" if "step" in point else arm_name(own)
    return f"best of {point['n']}" + (f" of {arm_name(arm)}" if arm not in ("", "sft") else "")


def _name(point: Json, height: str) -> str:
    return f"{_which(point)}: {point[height]:+.2f} at a KL of {point['kl']:.2f} nats"


def _curve(kind: str, fit: Json, points: Sequence[Json], height: str) -> list[tuple[float, float]]:
    """The fitted law from the start, the first point of its kind, to the farthest one."""
    start, far = points[0][height], max(map(_distance, points))
    alpha, beta = fit["alpha"], fit["beta"]
    curve = []
    for number in range(_CURVE_POINTS + 1):
        d = far * number / _CURVE_POINTS
        bend = d if kind == "best_of_n" else math.log(d) if d > 0 else 0.0
        curve.append((d, start + d * (alpha - beta * bend)))
    return curve


def _fits(fits: Json, points: Sequence[Json]) -> str:
    rows = []
    for kind, label in _KINDS.items():
        furthest = max((p["kl"] for p in points if p["kind"] == kind), default=0.0)
        for height, words in _HEIGHTS.items():
            fit = (fits.get(kind) or {}).get(height)
            if not fit:
                continue
            figures = [f"{fit[key]:.3f}" for key in ("alpha", "beta", "r2")]
            figures.append(str(fit.get("points", "")))
            peak = fit.get("peak")
            seen = peak is not None and peak**2 <= furthest
            figures.append(f"{peak**2:.1f}" if seen else "beyond the points")
            name = f"<b>{label}</b> {escape(words)} <small>{_LAWS[kind]}</small>"
            rows.append(row((name, *figures)))
    head = ("gain, d = √KL", "alpha", "beta", "R²", "points", "turns over at KL")
    words = "The points of best-of-n are made of the same answers, so that they lie on a curve."
    return table(head, rows, "numbers") + (note(words) if fits.get("best_of_n") else "")


def _points(points: Sequence[Json]) -> str:
    with_gold = any(p.get("gold") is not None for p in points)
    rows = []
    for p in points:
        cells = [f"<b>{escape(_which(p))}</b>", f"{p['kl']:.2f}", _figure(p, "proxy")]
        rows.append(row([*cells, _figure(p, "gold")] if with_gold else cells))
    head = ["", "KL, nats", "score", *(["gold"] if with_gold else [])]
    words = "The KL of best-of-n is exact, ln n - (n - 1) / n; of PPO it is measured."
    return folded(f"All {len(points)} points", table(head, rows, "numbers") + note(words))


def _figure(point: Json, height: str) -> str:
    if point.get(height) is None:
        return ""
    low, high = _interval(point, height)
    return f"{point[height]:+.2f} <small>{low:+.2f} to {high:+.2f}</small>"
