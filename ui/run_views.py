"""A run as HTML: its card in the list, its head, its curves, its answers, its report.

Every text of a run passes `html.escape` here.
"""

import math
import time
from collections.abc import Iterator, Sequence
from html import escape

from lora_rlhf.charts import Reference, plain_number
from lora_rlhf.display import short_time
from lora_rlhf.report import CHARTS, Chart
from lora_rlhf.results import Row, arm_name, judge_name, percent, result_rows
from lora_rlhf.runs import Json
from ui.charts import Line, curve, interval
from ui.run_facts import OTHER_SHAPE, STAGES, RunFacts, Sample, file_of, text_of, verdict_of
from ui.tracks import MetricFile, metric_file

STATES = {
    "running": ("\u25b6", "running"),
    "finished": ("\u2713", "finished"),
    "stopped": ("\u25a0", "stopped"),
    "failed": ("\u2715", "failed"),
    "interrupted": ("\u2016", "interrupted"),
    "damaged": ("!", "damaged"),
    "new": ("\u25cb", "not started"),
}
NO_RUNS = (
    '<div class="lr-empty"><h3>No runs yet</h3><p>A run appears here as soon as it starts. '
    "Make the first one in a terminal; it takes about ten minutes on a CPU:</p>"
    "<pre>lora-rlhf run quickstart</pre></div>"
)
DOT = " \u00b7 "
_MOST_PROMPTS = 12
_DAY = 86400.0
# A report is text of a file: no scripts, no forms, no origin, nothing fetched.
_CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def ago(then: float, now: float | None = None) -> str:
    """A time in the past, as people say it."""
    if not then:
        return ""
    seconds = max(0.0, (time.time() if now is None else now) - then)
    for unit, size in (("d", _DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def state_pill(run: RunFacts) -> str:
    """State as a mark and a word."""
    mark, word = STATES[run.state]
    return f'<span class="lr-state lr-{run.state}"><i aria-hidden="true">{mark}</i>{word}</span>'


def progress(run: RunFacts) -> str:
    """Where a run stands, in words and as a bar; "" for one that stands nowhere."""
    if not run.stage or run.state in ("finished", "new"):
        return ""
    stage = escape(run.stage)
    if run.total <= 0:
        return f'<div class="lr-progress"><span>{stage}</span></div>'
    share = min(1.0, max(0.0, run.step / run.total))
    return (
        f'<div class="lr-progress"><span>{stage}, step {run.step} of {run.total}</span>'
        f'<progress value="{share:.3f}" max="1" aria-label="{stage}"></progress></div>'
    )


# -- the list -------------------------------------------------------------------------------------


def list_html(runs: Sequence[RunFacts], chosen: str | None) -> str:
    """The runs as cards that can be pressed."""
    if not runs:
        return NO_RUNS
    cards = "".join(_card(run, run.name == chosen) for run in runs)
    return f'<nav class="lr-runs" aria-label="Runs">{cards}</nav>'


def _card(run: RunFacts, is_chosen: bool) -> str:
    current = ' aria-current="true"' if is_chosen else ""
    facts = (run.model, run.quantization, ago(run.time))
    base = DOT.join(escape(fact) for fact in facts if fact)
    headline = f'<span class="lr-headline">{escape(run.headline)}</span>' if run.headline else ""
    return (
        f'<button type="button" class="lr-run" data-run="{escape(run.name)}"{current}>'
        f'<span class="lr-run-top"><b>{escape(run.name)}</b>{state_pill(run)}</span>'
        f"{progress(run)}{headline}"
        f'<span class="lr-soft">{base}</span></button>'
    )


# -- the head -------------------------------------------------------------------------------------


def head_html(run: RunFacts) -> str:
    """Name, state, verdict and results of a run."""
    tone, words = verdict_of(run.summary)
    spoken = f'<p class="lr-verdict lr-{tone}">{escape(words)}</p>' if run.summary else ""
    if not spoken and run.state == "running":
        spoken = (
            '<p class="lr-verdict lr-even">Nothing has ended yet; the curves below are live.</p>'
        )
    trouble = f'<p class="lr-trouble">{escape(run.error)}</p>' if run.error else ""
    return (
        f'<header class="lr-head"><div class="lr-run-top"><h2>{escape(run.name)}</h2>'
        f"{state_pill(run)}</div>{progress(run)}{trouble}{spoken}{_chips(run)}</header>"
    )


def _chips(run: RunFacts) -> str:
    words = [w for w in (run.model, run.quantization) if w]
    seconds = run.summary.get("seconds")
    if isinstance(seconds, dict):
        words += [f"{k} {short_time(v)}" for k, v in seconds.items() if isinstance(v, int | float)]
    return f'<ul class="lr-chips">{"".join(f"<li>{escape(w)}</li>" for w in words)}</ul>'


def results_html(run: RunFacts) -> str:
    """The result table of the report."""
    try:
        rows = result_rows(run.summary)
    except OTHER_SHAPE:
        rows = []
    if not rows:
        why = "Each stage adds its lines when it ends; the evaluation adds the win rates."
        return f'<div class="lr-empty"><h3>No results yet</h3><p>{why}</p></div>'
    body = "".join(_result(row) for row in rows)
    return (
        '<table class="lr-table lr-results">'
        '<thead><tr><th scope="col">what</th><th scope="col">value</th>'
        '<th scope="col">95% interval, from 0 to 100%</th><th scope="col">note</th></tr></thead>'
        f"<tbody>{body}</tbody></table>{_judge(run.summary)}"
    )


def _judge(summary: Json) -> str:
    evaluate = summary.get("evaluate")
    judge = evaluate.get("judge") if isinstance(evaluate, dict) else None
    if not isinstance(judge, str):
        return ""
    return f'<p class="lr-note">Judge: {escape(judge_name(judge))}. Ties count half.</p>'


def _result(row: Row) -> str:
    bar = ""
    if row.interval is not None and row.share is not None:
        low, high = row.interval
        bar = interval(row.share, low, high, row.name)
        bar += f'<span class="lr-range">{percent(low)} to {percent(high)}</span>'
    return (
        f'<tr><th scope="row">{escape(row.name)}</th><td>{escape(row.value)}</td><td>{bar}</td>'
        f'<td class="lr-soft">{escape(row.note)}</td></tr>'
    )


# -- curves ---------------------------------------------------------------------------------------


def stages_of(run: RunFacts) -> list[str]:
    """Stages with numbers to draw, in the order of the pipeline."""
    return [s for s in STAGES if file_of(run.path, f"{s}/metrics.jsonl") is not None]


def metrics_of(run: RunFacts, stage: str) -> MetricFile | None:
    """The numbers of a stage as far as they were read; None where there are none."""
    path = file_of(run.path, f"{stage}/metrics.jsonl") if stage in STAGES else None
    return None if path is None else metric_file(path).refresh()


def curves_html(run: RunFacts, stage: str, everything: bool) -> str:
    """The charts of a stage.

    Args:
        run: whose.
        stage: one of `stages_of`.
        everything: what the report leaves out as well.
    """
    metrics = metrics_of(run, stage)
    if metrics is None or not metrics.tracks:
        waiting = "It writes its first numbers after its first step."
        return f'<div class="lr-empty"><h3>No curves yet</h3><p>{waiting}</p></div>'
    figures = [_chart(chart, metrics, run.summary) for chart in CHARTS.get(stage, ())]
    if everything:
        drawn = {key for chart in CHARTS.get(stage, ()) for key in chart.lines}
        rest = sorted(metrics.tracks.keys() - drawn)
        figures += [curve(key, [Line(key, metrics.tracks[key])]) for key in rest]
    note = f"{metrics.lines} lines to step {plain_number(metrics.step)}"
    if metrics.read < 1.0:
        note += f"; reading, {percent(metrics.read)} so far"
    if any(len(track.stretches) < track.count for track in metrics.tracks.values()):
        note += ". Many steps a pixel: the line is their mean, the band their range"
    return f'<div class="lr-charts">{"".join(figures)}</div><p class="lr-note">{note}.</p>'


def _chart(chart: Chart, metrics: MetricFile, summary: Json) -> str:
    lines = [
        Line(label, metrics.tracks[key])
        for key, label in chart.lines.items()
        if key in metrics.tracks
    ]
    if chart.title == "KL coefficient" and all(line.track.is_flat for line in lines):
        return ""
    return curve(
        chart.title,
        lines,
        unit=chart.unit,
        form=chart.form,
        references=list(_references(chart, summary)),
    )


def _references(chart: Chart, summary: Json) -> Iterator[Reference]:
    if chart.title == "Reward accuracy":
        yield Reference("coin", 0.5)
        reward = summary.get("reward")
        limit = reward.get("bayes_accuracy") if isinstance(reward, dict) else None
        if isinstance(limit, float):
            yield Reference("Bayes limit", limit)
    elif chart.title == "Reward loss":
        yield Reference("coin", math.log(2.0))


# -- answers --------------------------------------------------------------------------------------


def steps_of(samples: Sequence[Sample]) -> list[int]:
    """Steps at which answers were kept."""
    return sorted({sample.step for sample in samples})


def prompts_of(samples: Sequence[Sample]) -> list[str]:
    """Their prompts, in the order they came."""
    return list(dict.fromkeys(sample.prompt for sample in samples))


def shown_step(steps: Sequence[int], wanted: object) -> int:
    """The last look up to a step; the newest for what is no step."""
    if not isinstance(wanted, int | float):
        return steps[-1]
    return max([s for s in steps if s <= wanted] or steps[:1])


def steps_html(samples: Sequence[Sample], step: int, prompt: str | None) -> str:
    """Answers at a step beside those at the first one.

    Args:
        samples: of a stage of training.
        step: one of `steps_of`.
        prompt: this one alone; None for all.
    """
    steps = steps_of(samples)
    if not steps:
        return _no_samples("PPO keeps a few answers every so many steps (ppo.sample_every).")
    looks = {(sample.step, sample.prompt): sample for sample in samples}
    articles = []
    for text in _wanted(samples, prompt):
        sides = [
            (f"step {s}", looks[s, text])
            for s in dict.fromkeys((steps[0], step))
            if (s, text) in looks
        ]
        articles.append(_article(text, sides))
    return "".join(articles)


def arms_html(samples: Sequence[Sample], prompt: str | None) -> str:
    """Answers of the evaluation's arms to the same prompts.

    Args:
        samples: of the evaluation.
        prompt: this one alone; None for all.
    """
    if not samples:
        return _no_samples("The evaluation keeps answers of every arm when it runs.")
    return "".join(
        _article(text, [(arm_name(s.arm), s) for s in samples if s.prompt == text])
        for text in _wanted(samples, prompt)
    )


def _wanted(samples: Sequence[Sample], prompt: str | None) -> list[str]:
    prompts = prompts_of(samples)
    return [prompt] if prompt in prompts else prompts[:_MOST_PROMPTS]


def _no_samples(why: str) -> str:
    return f'<div class="lr-empty"><h3>No answers yet</h3><p>{why}</p></div>'


def _article(prompt: str, sides: Sequence[tuple[str, Sample]]) -> str:
    answers = "".join(
        f'<div class="lr-answer"><h4>{escape(name)}{_numbers(sample)}</h4>'
        f"<p>{escape(sample.response.strip()) or '<i>nothing</i>'}</p></div>"
        for name, sample in sides
    )
    return (
        f'<article class="lr-article"><p class="lr-prompt">{escape(prompt.strip())}</p>'
        f'<div class="lr-answers">{answers}</div></article>'
    )


def _numbers(sample: Sample) -> str:
    words = []
    if sample.score is not None:
        words.append(f"score {sample.score:+.2f}")
    if sample.utility is not None:
        words.append(f"utility {sample.utility:.2f}")
    if sample.kl is not None:
        words.append(f"KL {abs(sample.kl):.1f} nats")
    return f' <span class="lr-soft">{DOT.join(words)}</span>' if words else ""


# -- the report -----------------------------------------------------------------------------------


def report_html(run: RunFacts) -> str:
    """The run's report in a frame that may do nothing; why there is none, where there is none."""
    text = text_of(run.path, "report.html")
    if text is None:
        why = "It is written when the run ends; the curves and answers here are the same, live."
        return f'<div class="lr-empty"><h3>No report yet</h3><p>{why}</p></div>'
    page = f'<!doctype html><meta http-equiv="Content-Security-Policy" content="{_CSP}">{text}'
    return (
        f'<iframe class="lr-report" sandbox="" referrerpolicy="no-referrer" '
        f'title="Report of {escape(run.name)}" srcdoc="{escape(page)}"></iframe>'
    )
