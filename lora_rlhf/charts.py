"""Line charts and interval bars as inline SVG, without scripts; colours come from the page's CSS.

A chart is drawn in units of a phone's width and scales up, so that its text is readable at 390
pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 10, 30
_MOST_POINTS = 240
_LEAST_SPREAD = (
    0.02  # of the value: ticks closer than a hundredth would be of the same three digits
)
_LABEL_ROOM = 14.0  # between a dashed line and the next one above it, for its label
_SMOOTH_FROM = 40  # points from which a moving average is drawn over the raw line


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: in the legend.
        points: (step, value); values that are not finite break the line.
    """

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Reference:
    """A horizontal line to hold the series against."""

    label: str
    value: float


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low to high.

    Args:
        low: smallest value.
        high: largest value, greater than low.
        most: no more ticks than this.
    """
    assert high > low
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1.0, 2.0, 5.0, 10.0, 20.0):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= most:
            break
    return [i * step for i in range(first, last + 1)]


def plain_number(value: float) -> str:
    """A number in three digits, as a person writes it."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 1e3:
        return f"{value / 1e3:.4g}k" if size >= 1e4 else f"{value:.0f}"
    return f"{value:.3g}"


def percentage(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.3g}%"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    form: Callable[[float], str] = plain_number,
    references: Sequence[Reference] = (),
    x_label: str = "step",
) -> str:
    """A figure with axes, a grid, a legend and one line a series; "" where there are no points.

    Args:
        title: above the chart.
        series: lines, in the order of their colours.
        unit: after the title.
        form: how a value is written on the axis.
        references: dashed horizontal lines.
        x_label: below the chart.
    """
    series = [s for s in series if any(math.isfinite(y) for _, y in s.points)]
    if not series:
        return ""
    frame = Frame.around(series, references)
    marks = [grid(frame, form, x_label)]
    marks += [_line(frame, s, i) for i, s in enumerate(series)]
    marks.append(_references(frame, references))
    last = ", ".join(f"{s.label} {form(_last(s))}" for s in series)
    return figure(title, unit, _legend(series, form), "".join(marks), f"{title}: {last} at the end")


def figure(title: str, unit: str, legend: str, marks: str, about: str) -> str:
    """A chart with its title.

    Args:
        title: above it.
        unit: after the title.
        legend: HTML.
        marks: SVG.
        about: for who cannot see it.
    """
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span>'
        f"{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">'
        f"{marks}</svg></figure>"
    )


@dataclass(frozen=True)
class Frame:
    """The map from data to the drawing.

    Attributes:
        x_ticks: where the x axis has marks.
        y_ticks: where the y axis has marks; the first and the last bound it.
        x_low: left end.
        x_high: right end.
    """

    x_ticks: list[float]
    y_ticks: list[float]
    x_low: float
    x_high: float

    @classmethod
    def around(cls, series: Sequence[Series], references: Sequence[Reference]) -> "Frame":
        """That holds lines over steps, and the references that are near them."""
        xs = [x for s in series for x, _ in s.points]
        ys = [y for s in series for _, y in s.points if math.isfinite(y)]
        low, high = min(ys), max(ys)
        # Of a line that hardly moves not the last digits, which all its ticks would share.
        spread = max(high - low, _LEAST_SPREAD * max(abs(low), abs(high))) or 1.0
        if high == low == 0.0:
            high = spread
        near = [r.value for r in references if low - spread <= r.value <= high + spread]
        low, high = min([low, *near]), max([high, *near])
        if high - low < spread:
            low, high = low - spread, high + spread
        x_low, x_high = min(xs), max(xs)
        if x_high == x_low:
            x_high = x_low + 1.0
        x_ticks = [x for x in nice_ticks(x_low, x_high) if x_low <= x <= x_high and x == int(x)]
        return cls(x_ticks, nice_ticks(low, high), x_low, x_high)

    def x(self, value: float) -> float:
        """Place of a value on the x axis."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Place of a value on the y axis; top is larger."""
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def holds(self, value: float) -> bool:
        """Whether the y axis reaches so far."""
        return self.y_ticks[0] <= value <= self.y_ticks[-1]


def grid(
    frame: Frame,
    form: Callable[[float], str],
    x_label: str,
    x_form: Callable[[float], str] = plain_number,
) -> str:
    """Axes with their marks and the lines behind the data."""
    parts = []
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 5}" y="{y + 4:.1f}">{form(tick)}</text>')
    for tick in frame.x_ticks:
        x = frame.x(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom}v4"/>')
        text = x_form(tick)
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 15}">{text}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    label = escape(x_label)
    parts.append(f'<text class="tick mid" x="{middle}" y="{HEIGHT - 3}">{label}</text>')
    return "".join(parts)


def _references(frame: Frame, references: Sequence[Reference]) -> str:
    parts = []
    above = -_LABEL_ROOM
    for reference in sorted(references, key=lambda r: -r.value):
        if not frame.holds(reference.value):
            continue
        y = frame.y(reference.value)
        # Below its line where there is no room above it.
        text_y = y + 12 if y - above < _LABEL_ROOM or y < _TOP + 12 else y - 4
        above = y
        parts.append(
            f'<path class="ref" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
            f'<text class="tick halo" x="{_LEFT + 5}" y="{text_y:.1f}">'
            f"{escape(reference.label)}</text>"
        )
    return "".join(parts)


def _line(frame: Frame, series: Series, index: int) -> str:
    color = f"c{index % 4}"
    points = [(x, y) for x, y in series.points if math.isfinite(y)]
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="{color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
    if len(points) < _SMOOTH_FROM:
        return f'<path class="line {color}" d="{_path(frame, series.points)}"/>'
    raw = _path(frame, _thinned(points))
    smooth = _path(frame, _thinned(smoothed(points)))
    return f'<path class="raw {color}" d="{raw}"/><path class="line {color}" d="{smooth}"/>'


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A moving average over a tenth of the points, at least 5: centred, one-sided at the ends.

    Additions grow with the number of points alone: a window is the tail of one block of its width
    and the head of the next. Differences of running sums would do too, but one huge value spoils
    all sums after it.

    Source: van Herk 1992, with sums for maxima.
    """
    count = len(points)
    half = max(2, count // 20)
    width = 2 * half + 1
    heads, tails = [y for _, y in points], [y for _, y in points]
    for i in range(1, count):
        if i % width:
            heads[i] += heads[i - 1]
    for i in reversed(range(count - 1)):
        if (i + 1) % width:
            tails[i] += tails[i + 1]
    result = []
    for i, (x, _) in enumerate(points):
        first, last = max(0, i - half), min(count - 1, i + half)
        if first // width < last // width:
            total = tails[first] + heads[last]
        else:  # one block: cut off by the end of the points, or whole
            total = heads[last] if first % width == 0 else tails[first]
        result.append((x, total / (last - first + 1)))
    return result


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, the lowest and highest of each stretch, so that spikes stay."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen = "L"
    return "".join(parts)


def _last(series: Series) -> float:
    return [y for _, y in series.points if math.isfinite(y)][-1]


def _legend(series: Sequence[Series], form: Callable[[float], str]) -> str:
    """Labels with their colour and last value; the value alone where there is one line."""
    items = []
    for i, one in enumerate(series):
        label = f"{escape(one.label)}, " if len(series) > 1 else ""
        key = f'<i class="key c{i % 4}"></i>' if len(series) > 1 else ""
        items.append(f"<span>{key}{label}last {form(_last(one))}</span>")
    return f'<span class="legend">{"".join(items)}</span>'


def interval_bar(share: float, low: float, high: float) -> str:
    """A share with its interval on a line from 0 to 100%, with a mark at a coin's 50%."""
    tone = "good" if low > 0.5 else "bad" if high < 0.5 else "even"
    about = f"{share:.1%}, 95% interval {low:.1%} to {high:.1%}"
    return span_bar(share, low, high, (0.0, 1.0), about, mark=0.5, tone=tone)


def span_bar(
    value: float,
    low: float,
    high: float,
    ends: tuple[float, float],
    about: str,
    mark: float | None = None,
    tone: str = "plain",
) -> str:
    """A value with its interval on a line.

    Args:
        value: the dot.
        low: where its interval begins.
        high: where it ends.
        ends: of the line, different from each other.
        about: for who cannot see it.
        mark: what to hold the value against.
        tone: good, even, bad or plain.
    """
    left, span = 4, 152

    def at(number: float) -> str:
        share = (number - ends[0]) / (ends[1] - ends[0])
        return f"{left + span * min(1.0, max(0.0, share)):.1f}"

    middle = "" if mark is None else f'<path class="ref" d="M{at(mark)} 2v16"/>'
    return (
        f'<svg class="interval {tone}" viewBox="0 0 160 20" role="img" '
        f'aria-label="{escape(about)}">'
        f'<path class="axis" d="M{left} 10h{span}"/>{middle}'
        f'<path class="span" d="M{at(low)} 10H{at(high)}"/>'
        f'<circle cx="{at(value)}" cy="10" r="4.5"/></svg>'
    )
