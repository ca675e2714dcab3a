"""The report's public sets: what training has cost, arm beside arm."""

from html import escape
from typing import Any

from lora_rlhf.charts import plain_number
from lora_rlhf.display import short_time
from lora_rlhf.report_parts import note, row, table
from lora_rlhf.results import arm_name

Json = dict[str, Any]

_DIRECTIONS = (
    "Higher is better but for perplexity, bits_per_byte, likelihood_diff, over_refusal and the "
    "marks of people (flags); pct_stereotype is best at one half."
)


def suites_section(suites: Json) -> str:
    """A row a task and metric, a column an arm, the first of which the rest are held against."""
    tasks = suites.get("tasks", {})
    if not tasks:
        return _skipped(suites)
    arms = list(
        dict.fromkeys(a for metrics in tasks.values() for own in metrics.values() for a in own)
    )
    rows = []
    for task, metrics in tasks.items():
        for metric, own in metrics.items():
            first = own.get(arms[0])
            cells = [_cell(own.get(arm), first, arm == arms[0]) for arm in arms]
            rows.append(row((f"<b>{escape(task)}</b> <small>{escape(metric)}</small>", *cells)))
    head = ("", *(arm_name(arm) for arm in arms))
    words = (
        f"Small: 95% intervals over documents. ▲ and ▼: the interval lies above or below that of "
        f"{arm_name(arms[0])}. {_DIRECTIONS}"
    )
    seconds = suites.get("seconds", {})
    if seconds:
        words += f" They took {short_time(sum(seconds.values()))}."
    return table(head, rows, "numbers tax") + note(words) + _skipped(suites)


def _cell(share: Json | None, first: Json | None, is_first: bool) -> str:
    if not share or share.get("value") is None:
        return ""
    low, high = share["low"], share["high"]
    moved = ""
    if first and not is_first:
        moved = " ▲" if low > first["high"] else " ▼" if high < first["low"] else ""
    interval = f"{_figure(low)} to {_figure(high)}"
    return f"{_figure(share['value'])}{moved} <small>{interval}</small>"


def _figure(value: float) -> str:
    """Shares in as many digits as their neighbours; what would be 0.000 and is not, in one."""
    if value == 0.0 or 5e-4 <= abs(value) <= 1.0:
        return f"{value:.3f}"
    return plain_number(value)


def _skipped(suites: Json) -> str:
    rows = [
        row((escape(task), escape(str(why)))) for task, why in suites.get("skipped", {}).items()
    ]
    return f"<h3>Left out</h3>{table((), rows, 'facts')}" if rows else ""
