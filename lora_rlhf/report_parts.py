"""What the sections of a report are put together from."""

from collections.abc import Sequence
from html import escape
from typing import Any

from lora_rlhf.charts import interval_bar
from lora_rlhf.results import Row, percent

Json = dict[str, Any]


def row(cells: Sequence[str]) -> str:
    """A table row of cells that are HTML already."""
    return "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def table(head: Sequence[str], rows: Sequence[str], kind: str) -> str:
    """A table that scrolls by itself where it is too wide; "" without rows.

    Args:
        head: text of the headings; none of them, no heading.
        rows: of `row`.
        kind: class: results, numbers, facts or looks.
    """
    if not rows:
        return ""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    header = f"<thead><tr>{top}</tr></thead>" if head else ""
    # Quoted: a kind may be two classes.
    body = f"<tbody>{''.join(rows)}</tbody>"
    return f'<div class=wide><table class="{kind}">{header}{body}</table></div>'


def result_table(rows: Sequence[Row]) -> str:
    """Named values with their intervals."""
    drawn = [row((escape(r.name), escape(r.value), _bar(r), escape(r.note))) for r in rows]
    return table(("", "value", "95% interval, 0 to 100%", ""), drawn, "results")


def _bar(one: Row) -> str:
    if one.interval is None or one.share is None:
        return ""
    low, high = one.interval
    bar = interval_bar(one.share, low, high)
    return f'{bar}<span class="range">{percent(low)} to {percent(high)}</span>'


def share_row(name: str, share: Json, note: str = "") -> Row:
    """A share of summary.json as a row."""
    interval = (share["low"], share["high"])
    return Row(name, percent(share["value"]), interval, share["value"], note)


def verdict(sentence: str, tone: str) -> str:
    """A sentence that says how something stands; tone is good, even or bad."""
    return f'<p class="said {tone}">{escape(sentence)}</p>'


def note(sentence: str) -> str:
    """Small print."""
    return f"<p class=note>{escape(sentence)}</p>"


def score(value: float | None) -> str:
    """What the reward model gives, beside a name."""
    return "" if value is None else f" <small>score {value:+.2f}</small>"


def answer(side: str, name: str, text: str, value: float | None, extra: str = "") -> str:
    """One answer of several to a prompt.

    Args:
        side: class: before, after, or empty.
        name: whose it is.
        text: the answer.
        value: its score.
        extra: further words after the score.
    """
    more = f" <small>{escape(extra)}</small>" if extra else ""
    body = escape(text.strip()) or "<i>nothing</i>"
    kind = f" class={side}" if side else ""
    return f"<div{kind}><h4>{escape(name)}{score(value)}{more}</h4><p>{body}</p></div>"


def answers(prompt: str, sides: Sequence[str]) -> str:
    """A prompt with its answers side by side."""
    return (
        f"<article><p class=prompt>{escape(prompt.strip())}</p>"
        f"<div class=pair>{''.join(sides)}</div></article>"
    )


def folded(summary: str, body: str) -> str:
    """What is shown on demand, and always on paper; "" for an empty body."""
    if not body:
        return ""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
