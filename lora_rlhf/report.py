"""`report.html`: one file that holds a whole run; no network and no scripts."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lora_rlhf.charts import (
    Reference,
    Series,
    interval_bar,
    line_chart,
    percentage,
    plain_number,
)
from lora_rlhf.display import short_time
from lora_rlhf.report_style import PAGE, STYLE
from lora_rlhf.results import (
    arm_name,
    judge_name,
    percent,
    result_rows,
    sample_pairs,
    verdict,
)
from lora_rlhf.runs import Json, Run, write_atomically

_LOOKS = 12  # answers to one fixed prompt that are shown through training


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
        ("Results", _results(summary)),
        ("Answers before and after", _samples(run)),
        *((f"Training: {stage}", _charts(run, stage, summary)) for stage in CHARTS),
        ("Reward model, looked at closely", _reward(summary.get("reward", {}))),
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


# -- results -------------------------------------------------------------------------------------


def _results(summary: Json) -> str:
    rows = []
    for row in result_rows(summary):
        bar = ""
        if row.interval is not None and row.share is not None:
            low, high = row.interval
            bar = interval_bar(row.share, low, high)
            bar += f'<span class="range">{percent(low)} to {percent(high)}</span>'
        cells = (escape(row.name), escape(row.value), bar, escape(row.note))
        rows.append(_row(cells))
    if not rows:
        return ""
    head = ("", "value", "95% interval, 0 to 100%", "")
    judge = summary.get("evaluate", {}).get("judge")
    note = (
        f"<p class=note>Judge: {escape(judge_name(judge))}. Ties count half.</p>" if judge else ""
    )
    return _table(head, rows, "results") + note + _arms(summary.get("arms", {}))


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
        own = facts.get("parts", {})
        cells += [f"{own[p]:.3f}" if p in own else "" for p in parts]
        rows.append(_row(cells))
    return _table(("means", *(c[0] for c in columns), *parts), rows, "numbers")


def _reward(reward: Json) -> str:
    parts = []
    if reward.get("by_margin"):
        rows = [_row((f"{m['margin']:.2f}", percent(m["accuracy"]))) for m in reward["by_margin"]]
        parts.append(_table(("score difference", "accuracy"), rows, "numbers"))
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
    return "".join(parts) + (f"<p class=note>{escape(' '.join(facts))}</p>" if facts else "")


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


# -- samples -------------------------------------------------------------------------------------


def _samples(run: Run) -> str:
    parts = []
    for pair in sample_pairs(run):
        sides = (
            ("before", pair.before_name, pair.before, pair.before_score),
            ("after", pair.after_name, pair.after, pair.after_score),
        )
        answers = "".join(
            f"<div class={side}><h4>{escape(name)}{_score(score)}</h4>"
            f"<p>{escape(text.strip()) or '<i>nothing</i>'}</p></div>"
            for side, name, text, score in sides
        )
        prompt = escape(pair.prompt.strip())
        parts.append(
            f"<article><p class=prompt>{prompt}</p><div class=pair>{answers}</div></article>"
        )
    return "".join(parts) + _through_training(run.lines("ppo/samples.jsonl"))


def _score(score: float | None) -> str:
    return "" if score is None else f" <small>score {score:+.2f}</small>"


def _through_training(records: Sequence[Json]) -> str:
    """One fixed prompt's answer at every look."""
    if not records:
        return ""
    prompt = records[0]["prompt"]
    looks = [r for r in records if r["prompt"] == prompt]
    every = math.ceil(len(looks) / _LOOKS)
    shown = looks[::every] + ([looks[-1]] if (len(looks) - 1) % every else [])
    rows = [
        _row((f"step {r['step']}{_score(r.get('score'))}", escape(r["response"].strip())))
        for r in shown
    ]
    if len(rows) < 2:
        return ""
    return (
        f"<details><summary>One prompt through training</summary>"
        f"<p class=prompt>{escape(prompt.strip())}</p>{_table((), rows, 'looks')}</details>"
    )


# -- the rest ------------------------------------------------------------------------------------


def _memory(memory: Json, on_cpu: bool) -> str:
    rows = []
    for phase, sizes in memory.items():
        predicted, measured = sizes.get("predicted_gib"), sizes.get("measured_gib")
        words = [f"{v:.2f} GiB" if v is not None else "" for v in (predicted, measured)]
        off = f"{measured / predicted - 1:+.0%}" if predicted and measured is not None else ""
        rows.append(_row((escape(phase), *words, off)))
    if not rows:
        return ""
    head = ("phase", "predicted", "measured", "difference")
    note = "On a CPU the measured figure is the process's peak so far, which never falls."
    return _table(head, rows, "numbers") + (f"<p class=note>{note}</p>" if on_cpu else "")


def _facts(content: Json) -> str:
    rows = [_row((escape(key), escape(value))) for key, value in _flat(content)]
    return _table((), rows, "facts") if rows else ""


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


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _table(head: Sequence[str], rows: Sequence[str], kind: str) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    header = f"<thead><tr>{top}</tr></thead>" if head else ""
    return (
        f"<div class=wide><table class={kind}>{header}<tbody>{''.join(rows)}</tbody></table></div>"
    )
