"""Inline SVG without scripts: curves of a run, intervals of votes. Colours come from studio.css.

Everything is escaped here. Lines differ in their strokes and dots, not in their colour alone, and
every drawing says in words what it shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from lora_rlhf.charts import Reference, nice_ticks, plain_number, smoothed
from ui.tracks import COUNT, FIRST, HIGH, LAST, LOW, TOTAL, Stretches, Track

_WIDTH, _HEIGHT = 360, 184
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 18, 30
_MOST_STRETCHES = 160  # two a pixel of a phone would not be seen
_MOST_TIPS = 24
_SMOOTH_FROM = 40  # stretches from which a moving average lies over the raw line
_SPIKES = 1.0  # times the usual range beyond it, from where a spike is cut and written out

Form = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in the legend.
        track: what is drawn.
    """

    label: str
    track: Track


def curve(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    form: Form = plain_number,
    references: Sequence[Reference] = (),
) -> str:
    """A metric by step: the mean of each stretch, its range as a band, and a read-out on hover.

    Args:
        title: above the chart.
        lines: at most a few; the first is drawn solid, the others dashed with dots.
        unit: after the title.
        form: how a value is written.
        references: horizontal lines to hold the values against.
    """
    lines = [line for line in lines if line.track.count]
    if not lines:
        return ""
    drawn = [line.track.thinned(_MOST_STRETCHES) for line in lines]
    frame = _Frame.around(drawn, references)
    marks = [_grid(frame, form)]
    marks += [_reference(frame, reference, form) for reference in references]
    # The solid line last, on top of the others.
    for i in reversed(range(len(lines))):
        marks.append(_line(frame, drawn[i], i))
    marks.append(_cut_note(frame, drawn, form))
    marks.append(_tips(frame, lines, drawn, form))
    about = "; ".join(
        _in_words(line, stretches, form) for line, stretches in zip(lines, drawn, strict=True)
    )
    return (
        f'<figure class="lr-chart"><figcaption><b>{escape(title)}</b>{_legend(lines, form)}'
        f'<span class="lr-soft">{escape(unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)} by step. {escape(about)}">{"".join(marks)}</svg></figure>'
    )


def _in_words(line: Line, stretches: Stretches, form: Form) -> str:
    first, low, high = stretches[0], stretches[:, LOW].min(), stretches[:, HIGH].max()
    begins = form(first[TOTAL] / first[COUNT])
    return (
        f"{line.label}: {line.track.count} points to step {stretches[-1, LAST]:.0f}, begins at "
        f"{begins}, last {form(line.track.newest)}, lowest {form(low)}, highest {form(high)}"
    )


def _legend(lines: Sequence[Line], form: Form) -> str:
    items = []
    for i, line in enumerate(lines):
        key = ""
        if len(lines) > 1:
            key = (
                f'<svg class="lr-key" viewBox="0 0 22 8" aria-hidden="true">'
                f'<path class="lr-line lr-l{i}" d="M1 4H21"/></svg>{escape(line.label)} '
            )
        broken = f", {line.track.broken} not finite" if line.track.broken else ""
        items.append(f"<span>{key}<b>{form(line.track.newest)}</b>{broken}</span>")
    return f'<span class="lr-legend">{"".join(items)}</span>'


# -- the drawing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """The map from data to the drawing."""

    x_low: float
    x_high: float
    y_ticks: list[float]

    @classmethod
    def around(cls, drawn: Sequence[Stretches], references: Sequence[Reference]) -> "_Frame":
        rows = np.concatenate(drawn)
        low, high = _usual_range(rows)
        spread = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-9)
        near = [r.value for r in references if low - spread <= r.value <= high + spread]
        low, high = min([low, *near]), max([high, *near])
        if high - low < spread:
            low, high = low - spread, high + spread
        x_low, x_high = float(rows[:, FIRST].min()), float(rows[:, LAST].max())
        return cls(x_low, x_high if x_high > x_low else x_low + 1.0, nice_ticks(low, high, 5))

    def x(self, step: float) -> float:
        share = (step - self.x_low) / (self.x_high - self.x_low)
        return float(_LEFT + share * (_WIDTH - _LEFT - _RIGHT))

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        share = min(1.0, max(0.0, share))
        return float(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM))


def _usual_range(rows: Stretches) -> tuple[float, float]:
    """From the lowest to the highest value, but for the rare ones far away from all others."""
    low, high = float(rows[:, LOW].min()), float(rows[:, HIGH].max())
    if len(rows) < _SMOOTH_FROM:
        return low, high
    usual_low = float(np.percentile(rows[:, LOW], 1))
    usual_high = float(np.percentile(rows[:, HIGH], 99))
    room = _SPIKES * (usual_high - usual_low)
    if low < usual_low - room:
        low = usual_low
    if high > usual_high + room:
        high = usual_high
    return low, high


def _grid(frame: _Frame, form: Form) -> str:
    parts = []
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(f'<path class="lr-rule" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="lr-end" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{form(tick)}</text>')
    for tick in nice_ticks(frame.x_low, frame.x_high):
        if frame.x_low <= tick <= frame.x_high and tick == int(tick):
            x = frame.x(tick)
            anchor = "lr-end" if x > right - 8 else "lr-mid"
            text = plain_number(tick)
            parts.append(f'<text class="{anchor}" x="{x:.1f}" y="{bottom + 13}">{text}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<path class="lr-axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text class="lr-mid" x="{middle}" y="{_HEIGHT - 4}">step</text>')
    return "".join(parts)


def _reference(frame: _Frame, reference: Reference, form: Form) -> str:
    if not frame.y_ticks[0] <= reference.value <= frame.y_ticks[-1]:
        return ""
    y = frame.y(reference.value)
    label = f"{reference.label} {form(reference.value)}"
    return (
        f'<path class="lr-ref" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text class="lr-end lr-halo" x="{_WIDTH - _RIGHT - 2}" y="{y - 3:.1f}">'
        f"{escape(label)}</text>"
    )


def _line(frame: _Frame, stretches: Stretches, index: int) -> str:
    xs = [frame.x(x) for x in (stretches[:, FIRST] + stretches[:, LAST]) / 2]
    means = stretches[:, TOTAL] / stretches[:, COUNT]
    raw = _path(frame, xs, means)
    style = f"lr-l{index}"
    if len(xs) == 1:
        return (
            f'<circle class="lr-dot {style}" cx="{xs[0]:.1f}" cy="{frame.y(means[0]):.1f}" r="3"/>'
        )
    if len(xs) < _SMOOTH_FROM:
        dots = "".join(
            f'<circle class="lr-dot {style}" cx="{x:.1f}" cy="{frame.y(y):.1f}" r="2.2"/>'
            for x, y in zip(xs, means, strict=True)
        )
        return f'<path class="lr-line {style}" d="{raw}"/>{dots}'
    below = f'<path class="lr-raw {style}" d="{raw}"/>'
    if stretches[:, COUNT].max() > 1:
        there = _path(frame, xs, stretches[:, HIGH])
        back = _path(frame, xs[::-1], stretches[::-1, LOW]).replace("M", "L", 1)
        below = f'<path class="lr-band {style}" d="{there}{back}Z"/>'
    smooth = [y for _, y in smoothed(list(zip(xs, means.tolist(), strict=True)))]
    return f'{below}<path class="lr-line {style}" d="{_path(frame, xs, smooth)}"/>'


def _path(frame: _Frame, xs: Sequence[float], values: Sequence[float] | np.ndarray) -> str:
    points = (f"{x:.1f} {frame.y(y):.1f}" for x, y in zip(xs, values, strict=True))
    return "M" + "L".join(points)


def _cut_note(frame: _Frame, drawn: Sequence[Stretches], form: Form) -> str:
    """What lies beyond the drawing, in words."""
    rows = np.concatenate(drawn)
    low, high = rows[:, LOW].min(), rows[:, HIGH].max()
    words = []
    if high > frame.y_ticks[-1]:
        words.append(f"spikes to {form(high)}")
    if low < frame.y_ticks[0]:
        words.append(f"dips to {form(low)}")
    text = ", ".join(words)
    return f'<text class="lr-halo" x="{_LEFT}" y="10">{escape(text)}</text>' if text else ""


def _tips(frame: _Frame, lines: Sequence[Line], drawn: Sequence[Stretches], form: Form) -> str:
    """Strips that show what lies under the pointer, by CSS alone."""
    tracks = [line.track.thinned(_MOST_TIPS) for line in lines]
    main = max(tracks, key=len)
    if len(main) < 2:
        return ""
    centres = [frame.x(x) for x in (main[:, FIRST] + main[:, LAST]) / 2]
    edges = [
        _LEFT,
        *((a + b) / 2 for a, b in pairwise(centres)),
        _WIDTH - _RIGHT,
    ]
    parts = []
    for i, (stretch, x) in enumerate(zip(main, centres, strict=True)):
        words = [f"step {_span(stretch)}"]
        dots = []
        for j, (line, rows) in enumerate(zip(lines, tracks, strict=True)):
            row = rows[int(np.abs(rows[:, LAST] - stretch[LAST]).argmin())]
            mean = row[TOTAL] / row[COUNT]
            words.append(f"{line.label} {form(mean)}" if len(lines) > 1 else form(mean))
            dots.append(
                f'<circle class="lr-dot lr-l{j}" cx="{x:.1f}" cy="{frame.y(mean):.1f}" r="3.5"/>'
            )
        said = escape(" \u00b7 ".join(words))
        parts.append(
            f'<g class="lr-tip"><path d="M{edges[i]:.1f} 0H{edges[i + 1]:.1f}V{_HEIGHT}'
            f'H{edges[i]:.1f}Z"/><path class="lr-ref" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
            f'{"".join(dots)}<text class="lr-end lr-halo" x="{_WIDTH - _RIGHT}" y="11">'
            f"{said}</text></g>"
        )
    return "".join(parts)


def _span(stretch: np.ndarray) -> str:
    first, last = stretch[FIRST], stretch[LAST]
    return f"{first:.0f}" if first == last else f"{first:.0f} to {last:.0f}"


# -- shares ---------------------------------------------------------------------------------------

_BAR_WIDTH, _BAR_HEIGHT = 240, 22


def tone_of(low: float, high: float) -> str:
    """What an interval says of a coin's 50%: above, below, or even (it cannot be told apart)."""
    return "above" if low > 0.5 else "below" if high < 0.5 else "even"


def interval(share: float, low: float, high: float, about: str = "") -> str:
    """A share with its interval on a line from 0 to 100%, with a mark at 50%.

    The dot is filled where the interval is on one side of 50%, hollow where it is not.

    Args:
        share: between 0 and 1.
        low: where the interval begins.
        high: where it ends.
        about: what it is a share of, for whoever cannot see it.
    """
    left, span, middle = 6, _BAR_WIDTH - 12, _BAR_HEIGHT / 2

    def at(value: float) -> str:
        return f"{left + span * min(1.0, max(0.0, value)):.1f}"

    words = f"{about} {100 * share:.1f}%, 95% interval {100 * low:.1f}% to {100 * high:.1f}%"
    return (
        f'<svg class="lr-interval lr-{tone_of(low, high)}" viewBox="0 0 {_BAR_WIDTH} {_BAR_HEIGHT}"'
        f' role="img" aria-label="{escape(words.strip())}">'
        f'<path class="lr-axis" d="M{left} {middle}h{span}"/>'
        f'<path class="lr-half" d="M{at(0.5)} 1V{_BAR_HEIGHT - 1}"/>'
        f'<path class="lr-span" d="M{at(low)} {middle}H{at(high)}"/>'
        f'<path class="lr-span-end" d="M{at(low)} {middle - 4}v8M{at(high)} {middle - 4}v8"/>'
        f'<circle cx="{at(share)}" cy="{middle}" r="5"/></svg>'
    )
