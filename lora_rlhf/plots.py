"""Charts that are no curves over steps: calibration, histograms, the frontier. SVG, no scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lora_rlhf.charts import (
    HEIGHT,
    Frame,
    figure,
    grid,
    nice_ticks,
    percentage,
    plain_number,
)

Json = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """A measured point.

    Attributes:
        x: where.
        y: how high.
        low: of its 95 % interval.
        high: of the same.
        name: shown when it is pointed at.
    """

    x: float
    y: float
    low: float
    high: float
    name: str = ""


@dataclass(frozen=True)
class Cloud:
    """Points of one kind, and the curve that was fitted to them.

    Attributes:
        label: in the legend.
        marks: in order.
        curve: (x, y), or nothing.
    """

    label: str
    marks: Sequence[Mark]
    curve: Sequence[tuple[float, float]] = ()


def cloud_plot(title: str, unit: str, clouds: Sequence[Cloud], x_label: str) -> str:
    """Points with whiskers and curves in one frame; "" where there are none.

    Args:
        title: above it.
        unit: after the title.
        clouds: in the order of their colours.
        x_label: below it.
    """
    clouds = [c for c in clouds if c.marks]
    if not clouds:
        return ""
    xs = [m.x for c in clouds for m in c.marks]
    ys = [y for c in clouds for m in c.marks for y in (m.low, m.high)]
    low, high = min(ys), max(ys)
    # A fitted curve may run away from the points, and must not make them small.
    room = max(high - low, 1e-9) / 4
    frame = _frame(xs, [low - room / 4, high + room / 4])
    parts = [grid(frame, plain_number, x_label)]
    for number, cloud in enumerate(clouds):
        held = [p for p in cloud.curve if frame.holds(p[1])]
        parts.append(_curve(frame, held, f"line c{number % 4}"))
        parts += [_mark(frame, mark, number) for mark in cloud.marks]
    said = ", ".join(f"{c.label} up to {max(m.y for m in c.marks):.2f}" for c in clouds)
    return figure(title, unit, _legend([c.label for c in clouds]), "".join(parts), said)


def calibration_plot(title: str, bins: Sequence[Mapping[str, Any]]) -> str:
    """Predicted chance of the likelier answer against how often people prefer it.

    Args:
        title: above it.
        bins: of a health card's `calibration`.
    """
    if not bins:
        return ""
    marks = [
        Mark(b["predicted"], b["observed"], b["ci"][0], b["ci"][1], f"{b['n']} pairs: {_pair(b)}")
        for b in bins
    ]
    low = min(0.5, *(m.low for m in marks))
    frame = Frame([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], nice_ticks(low, 1.0), 0.5, 1.0)
    ends = f"M{frame.x(0.5):.1f} {frame.y(0.5):.1f}L{frame.x(1.0):.1f} {frame.y(1.0):.1f}"
    parts = [grid(frame, percentage, "the model's own chance", percentage)]
    parts.append(f'<path class="ref" d="{ends}"/>')
    parts += [_mark(frame, mark, 0) for mark in marks]
    said = f"{title}: " + "; ".join(map(_pair, bins))
    legend = '<span class="legend"><span>on the dashed line: calibrated</span></span>'
    return figure(title, "how often people agree", legend, "".join(parts), said)


def _pair(row: Mapping[str, Any]) -> str:
    return f"says {row['predicted']:.0%}, right {row['observed']:.0%}"


def histogram_plot(title: str, edges: Sequence[float], sets: Mapping[str, Sequence[int]]) -> str:
    """Shares of each set of numbers in common bins, as outlines over each other.

    Args:
        title: above it.
        edges: of the bins, one more than counts.
        sets: label -> counts.
    """
    shares = {
        label: [n / max(1, sum(counts)) for n in counts] for label, counts in sets.items() if counts
    }
    if not shares:
        return ""
    top = max(max(s) for s in shares.values())
    frame = _frame([edges[0], edges[-1]], [0.0, top])
    parts = [grid(frame, percentage, "score")]
    for number, counts in enumerate(shares.values()):
        points = [(edges[0], 0.0)]
        for left, right, height in zip(edges, edges[1:], counts, strict=False):
            points += [(left, height), (right, height)]
        parts.append(_curve(frame, [*points, (edges[-1], 0.0)], f"area c{number % 4}"))
    said = ", ".join(
        f"{label} most often near {_peak(edges, s):.2g}" for label, s in shares.items()
    )
    return figure(title, "of answers", _legend(list(shares)), "".join(parts), f"{title}: {said}")


def _peak(edges: Sequence[float], shares: Sequence[float]) -> float:
    place = max(range(len(shares)), key=lambda i: shares[i])
    return (edges[place] + edges[place + 1]) / 2


def _frame(xs: Sequence[float], ys: Sequence[float]) -> Frame:
    x_low, x_high = min(xs), max(xs)
    if x_high - x_low < 1e-9:
        x_high = x_low + 1.0
    y_low, y_high = min(ys), max(ys)
    if y_high - y_low < 1e-9:
        y_high = y_low + 1.0
    ticks = [x for x in nice_ticks(x_low, x_high) if x_low - 1e-9 <= x <= x_high + 1e-9]
    return Frame(ticks, nice_ticks(y_low, y_high), x_low, x_high)


def _curve(frame: Frame, points: Sequence[tuple[float, float]], kind: str) -> str:
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{path}"/>' if path else ""


def _mark(frame: Frame, mark: Mark, number: int) -> str:
    x, color = frame.x(mark.x), f"c{number % 4}"
    title = f"<title>{escape(mark.name)}</title>" if mark.name else ""
    low, high = (min(HEIGHT, max(0.0, frame.y(v))) for v in (mark.low, mark.high))
    return (
        f'<path class="whisker {color}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        f'<circle class="{color}" cx="{x:.1f}" cy="{frame.y(mark.y):.1f}" r="3.5">{title}</circle>'
    )


def _legend(labels: Sequence[str]) -> str:
    items = [
        f'<span><i class="key c{i % 4}"></i>{escape(label)}</span>'
        for i, label in enumerate(labels)
    ]
    return f'<span class="legend">{"".join(items)}</span>'
