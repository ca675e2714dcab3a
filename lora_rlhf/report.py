"""`report.html`: one file that holds a whole run; no network and no scripts."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lora_rlhf.charts import Reference, Series, line_chart, percentage, plain_number
from lora_rlhf.display import short_time
from lora_rlhf.report_frontier import frontier_section, watch_section
from lora_rlhf.report_health import health_section
from lora_rlhf.report_judging import labelers_section, rounds_section, win_section
from lora_rlhf.report_parts import note, result_table, row, table
from lora_rlhf.report_samples import samples_section
from lora_rlhf.report_style import PAGE, STYLE
from lora_rlhf.report_suites import suites_section
from lora_rlhf.results import arm_name, percent, result_rows, verdict
from lora_rlhf.runs import Json, Run, write_atomically


@dataclass(frozen=True)
class Chart:
    """Which metrics of a stage make a chart.

    Attributes:
        title: above it.
        unit: after the title.
        lines: metric -> its label.
        form: how a value is written.
    """

    title: str
    unit: str
    lines: dict[str, str]
    form: Callable[[float], str] = plain_number


CHARTS: dict[str, tuple[Chart, ...]] = {
    "sft": (
        Chart("SFT loss", "nats a token", {"loss/sft": "train", "heldout/loss": "held out"}),
        Chart("SFT gradient norm", "before clipping", {"train/grad_norm": "norm"}),
    ),
    "reward": (
        Chart("Reward loss", "nats", {"loss/reward": "train", "heldout/loss": "held out"}),
        Chart(
            "Reward accuracy",
            "of pairs",
            {"train/accuracy": "train", "heldout/accuracy": "held out"},
            percentage,
        ),
        Chart("Reward gradient norm", "before clipping", {"train/grad_norm": "norm"}),
    ),
    "ppo": (
        Chart("Score", "by the reward model", {"rollout/score": "score", "gold/score": "gold"}),
        Chart("KL from SFT", "nats a sequence", {"rollout/kl": "KL"}),
        Chart("Objective", "score minus KL cost", {"rollout/objective": "objective"}),
        Chart("Response length", "tokens", {"rollout/response_length": "length"}),
        Chart("Entropy", "nats a token", {"rollout/entropy": "entropy"}),
        Chart(
            "EOS rate", "answers that end by themselves", {"rollout/eos_rate": "EOS"}, percentage
        ),
        Chart(
            "Explained variance", "of returns, by the value", {"ppo/explained_variance": "share"}
        ),
        Chart("Clip fraction", "of tokens", {"ppo/clip_fraction": "share"}, percentage),
        Chart("Approximate KL", "of an update, nats a token", {"ppo/approx_kl": "KL"}),
        Chart("Policy gradient norm", "before clipping", {"train/grad_norm": "norm"}),
        Chart("Value gradient norm", "before clipping", {"train/value_grad_norm": "norm"}),
        Chart("Value loss", "a token", {"loss/value": "loss"}),
        Chart("KL coefficient", "", {"ppo/kl_coef": "coefficient"}),
        Chart("ptx loss", "nats a token", {"loss/ptx": "loss"}),
    ),
}


def write_report(run: Run) -> Path:
    """Write `report.html` into the run directory; stages that are missing are left out.

    Returns:
        Its path.

    Raises:
        CheckpointError: a JSON file of the run is damaged.
    """
    path = run.path / "report.html"
    write_atomically(path, render(run))
    return path


def render(run: Run) -> str:
    """The report as HTML."""
    summary = run.summary()
    spoken = verdict(summary)
    environment = _json(run, "environment.json")
    sections = [
        ("Over-optimisation", watch_section(summary)),
        ("Win rates", win_section(summary.get("win_rates", []))),
        ("All arms in one table", rounds_section(summary.get("rounds", {}))),
        ("Results", _results(summary)),
        ("Answers side by side", samples_section(run)),
        ("Reward against distance", frontier_section(summary.get("frontier", {}))),
        ("Reward model: health card", _health(summary)),
        ("Reward model, looked at closely", _reward(summary)),
        ("Held-out labelers", labelers_section(summary.get("labelers", {}))),
        ("What it forgot", suites_section(summary.get("suites", {}))),
        *((f"Training: {stage}", _charts(run, stage, summary)) for stage in CHARTS),
        ("Memory", _memory(summary.get("memory", {}), environment.get("device") == "cpu")),
        ("Environment", _facts(environment)),
        ("Recipe", _text(run, "recipe.yaml")),
    ]
    body = "".join(f"<section><h2>{escape(t)}</h2>{c}</section>" for t, c in sections if c)
    return PAGE.format(
        title=escape(run.name),
        style=STYLE,
        tone=spoken.tone,
        verdict=escape(spoken.text),
        header=_header(run, summary),
        body=body,
    )


def _header(run: Run, summary: Json) -> str:
    status = run.status()
    words = [f"{stage} {short_time(s)}" for stage, s in summary.get("seconds", {}).items()]
    state = status.get("state", "")
    if state and state != "finished":
        stage = status.get("stage", "")
        words.append(f"{state} in {stage} at step {status.get('step', 0)}" if stage else state)
    chips = "".join(f"<li>{escape(w)}</li>" for w in words)
    error = status.get("error", "")
    trouble = f'<p class="bad">{escape(error)}</p>' if error else ""
    return (f"<ul class=chips>{chips}</ul>" if chips else "") + trouble


def _health(summary: Json) -> str:
    # Until PPO has ended again, its scores are those of the policy before.
    with_policy = "ppo" in summary.get("seconds", {})
    return health_section(summary.get("health", {}), with_policy)


# -- results -------------------------------------------------------------------------------------


def _results(summary: Json) -> str:
    """What stages reached; win rates have a section of their own."""
    rows = result_rows({k: v for k, v in summary.items() if k != "win_rates"})
    return result_table(rows) + _arms(summary.get("arms", {}))


def _arms(arms: Json) -> str:
    """Means of every arm, the parts of its utility included."""
    if not arms:
        return ""
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("utility", "utility", "{:.3f}".format),
        ("score", "score", "{:+.2f}".format),
        ("KL", "kl", "{:.1f}".format),
        ("EOS", "eos_rate", percent),
        ("length", "mean_length", "{:.0f}".format),
        ("distinct-2", "distinct_2", percent),
    ]
    columns = [c for c in columns if any(c[1] in facts for facts in arms.values())]
    parts = list(dict.fromkeys(p for facts in arms.values() for p in facts.get("parts", {})))
    rows = []
    for name, facts in arms.items():
        cells = [f"<b>{escape(arm_name(name))}</b>"]
        cells += [words(facts[key]) if key in facts else "" for _, key, words in columns]
        own = facts.get("parts", {})  # the sum below makes -0.0 of little less than nothing 0.0
        cells += [f"{round(own[p], 3) + 0.0:.3f}" if p in own else "" for p in parts]
        rows.append(row(cells))
    return table(("means", *(c[0] for c in columns), *parts), rows, "numbers")


def _reward(summary: Json) -> str:
    """What an older run knows of its reward model; a health card says more."""
    reward = summary.get("reward", {})
    if "health" in summary:
        return ""
    parts = []
    if reward.get("by_margin"):
        rows = [row((f"{m['margin']:.2f}", percent(m["accuracy"]))) for m in reward["by_margin"]]
        parts.append(table(("score difference", "accuracy"), rows, "numbers"))
    facts = []
    calibration = reward.get("calibration")
    if calibration:
        facts.append(
            f"It gives the likelier answer {percent(calibration['predicted'])} on average, and is "
            f"right {percent(calibration['observed'])} of the time."
        )
    if "length_correlation" in reward:
        value = reward["length_correlation"]
        facts.append(f"Rank correlation of its score with length: {value:+.2f}.")
    return "".join(parts) + (note(" ".join(facts)) if facts else "")


# -- charts --------------------------------------------------------------------------------------


def _charts(run: Run, stage: str, summary: Json) -> str:
    lines = run.lines(f"{stage}/metrics.jsonl")
    figures = [
        line_chart(
            chart.title,
            [Series(label, points(lines, key)) for key, label in chart.lines.items()],
            unit=chart.unit,
            form=chart.form,
            references=list(_references(chart, summary)),
        )
        for chart in CHARTS[stage]
        if not _is_flat(chart, lines)
    ]
    drawn = "".join(figures)
    return f"<div class=charts>{drawn}</div>" if drawn else ""


def _is_flat(chart: Chart, lines: Sequence[Json]) -> bool:
    """A KL coefficient that never moves is a setting, not a curve."""
    return chart.title == "KL coefficient" and len({r.get("ppo/kl_coef") for r in lines}) <= 1


def points(lines: Sequence[Json], metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, from the lines that have it."""
    return [(r["step"], float(r[metric])) for r in lines if isinstance(r.get(metric), int | float)]


def _references(chart: Chart, summary: Json) -> Iterator[Reference]:
    reward = summary.get("reward", {})
    if chart.title == "Reward accuracy":
        yield Reference("coin", 0.5)
        if "bayes_accuracy" in reward:
            yield Reference("Bayes limit", reward["bayes_accuracy"])
        if "longer_baseline" in reward:
            yield Reference("always longer", reward["longer_baseline"])
    if chart.title == "Reward loss":
        yield Reference("coin", math.log(2.0))
    if chart.title == "Explained variance":
        yield Reference("no better than the mean", 0.0)


# -- the rest ------------------------------------------------------------------------------------


def _memory(memory: Json, on_cpu: bool) -> str:
    rows = []
    for phase, sizes in memory.items():
        predicted, measured = sizes.get("predicted_gib"), sizes.get("measured_gib")
        words = [f"{v:.2f} GiB" if v is not None else "" for v in (predicted, measured)]
        off = f"{measured / predicted - 1:+.0%}" if predicted and measured is not None else ""
        rows.append(row((escape(phase), *words, off)))
    if not rows:
        return ""
    head = ("phase", "predicted", "measured", "difference")
    said = "On a CPU the measured figure is the process's peak so far, which never falls."
    return table(head, rows, "numbers") + (note(said) if on_cpu else "")


def _facts(content: Json) -> str:
    rows = [row((escape(key), escape(value))) for key, value in _flat(content)]
    return table((), rows, "facts") if rows else ""


def _flat(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list):
        yield name, ", ".join(map(str, content))
    elif content not in (None, ""):
        yield name, str(content)


def _json(run: Run, file: str) -> Json:
    path = run.path / file
    content: Json = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def _text(run: Run, file: str) -> str:
    path = run.path / file
    return f"<pre>{escape(path.read_text(encoding='utf-8'))}</pre>" if path.exists() else ""
