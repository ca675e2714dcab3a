"""The drawings: ticks are round, points land where they belong, spikes and gaps survive."""

import itertools
import math
import random
import re
import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.charts import (
    Reference,
    Series,
    interval_bar,
    line_chart,
    nice_ticks,
    percentage,
    plain_number,
    smoothed,
)


def coordinates(svg: str, kind: str) -> list[tuple[float, float]]:
    """Points of the first path of a class."""
    path = re.search(rf'<path class="{kind}" d="([^"]*)"', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[1])]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_few_and_cover_the_range(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    steps = {f"{b - a:.6e}" for a, b in itertools.pairwise(ticks)}
    # Rounding of large ticks may show in the last printed digits of a small step.
    sizes = [float(s) for s in steps]
    assert max(sizes) - min(sizes) <= 1e-6 * max(sizes) + 1e-9 * max(map(abs, ticks))
    leading = sizes[0] / 10 ** math.floor(math.log10(sizes[0] * (1 + 1e-6)))
    assert min(abs(leading - f) for f in (1, 2, 5)) < 1e-3
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


def test_points_land_where_they_belong() -> None:
    """Steps 0 to 100 over x 46..346, values 0 to 10 over y 180..10, top is larger."""
    svg = line_chart("t", [Series("s", [(0, 0.0), (50, 5.0), (100, 10.0)])])
    assert coordinates(svg, "line c0") == [(46.0, 180.0), (196.0, 95.0), (346.0, 10.0)]


def test_a_value_that_is_not_finite_breaks_the_line() -> None:
    svg = line_chart("t", [Series("s", [(0, 0.0), (1, math.nan), (2, 1.0), (3, math.inf)])])
    assert len(coordinates(svg, "line c0")) == 2
    assert svg.count('d="M') >= 1
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower().replace("info", "")


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("t", [Series("s", [])]) == ""
    assert line_chart("t", [Series("s", [(0, math.nan)])]) == ""


def test_one_point_and_a_constant_are_drawn() -> None:
    assert "<circle" in line_chart("t", [Series("s", [(7, 1.5)])])
    flat = line_chart("t", [Series("s", [(0, 2.0), (1, 2.0)])])
    assert coordinates(flat, "line c0")[0][1] == coordinates(flat, "line c0")[1][1]
    assert "<path" in line_chart("t", [Series("s", [(0, 0.0), (1, 0.0)])])


@pytest.mark.parametrize("value", [0.0, 1.0, 1.437, 64.0, 97.3, -0.0123])
@pytest.mark.parametrize("wobble", [0.0, 0.001])
def test_a_line_that_hardly_moves_has_ticks_that_differ(value: float, wobble: float) -> None:
    points = [(0, value), (1, value * (1 + wobble))]
    for form in (plain_number, percentage):
        coin = [Reference("coin", 0.5)] if value == 0 else []
        svg = line_chart("t", [Series("s", points)], form=form, references=coin)
        found = re.findall(r'class="tick end"[^>]*>([^<]+)<', svg)
        assert len(found) == len(set(found)) >= 3, found
        assert value != 0 or not any(label.startswith("-") for label in found)


def test_long_series_are_thinned_but_keep_their_spikes() -> None:
    values = [(i, 100.0 if i == 777 else 1.0) for i in range(5000)]
    svg = line_chart("t", [Series("s", values)])
    raw = coordinates(svg, "raw c0")
    assert len(raw) <= 260
    assert min(y for _, y in raw) == 10.0  # the spike reaches the top tick
    assert len(svg) < 20_000


def test_smoothing_is_a_moving_average() -> None:
    """Of 100 points the window is 11 wide; a line stays a line away from the ends."""
    line = [(float(i), 3.0 * i) for i in range(100)]
    assert smoothed(line)[50] == (50.0, 150.0)
    spike = [(float(i), 11.0 if i == 50 else 0.0) for i in range(100)]
    assert [y for _, y in smoothed(spike)[44:57]] == [0.0] + [1.0] * 11 + [0.0]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9, 10, 11, 57, 100, 101, 459])
def test_every_window_is_the_mean_of_its_own_points(count: int) -> None:
    noise = random.Random(count)
    values = [noise.uniform(-1, 1) for _ in range(count)]
    half = max(2, count // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(count)]
    found = [y for _, y in smoothed(list(enumerate(values)))]
    # 1e-12: rounding of at most 47 additions of numbers below 1.
    assert found == pytest.approx([statistics.fmean(w) for w in windows], abs=1e-12)


def test_a_huge_value_does_not_spoil_what_comes_after_it() -> None:
    values = [(i, 1e30 if i == 10 else 0.5) for i in range(200)]
    assert smoothed(values)[100][1] == 0.5


def test_smoothing_a_long_run_takes_no_time() -> None:
    """Its cost grew with the square of the points: 70 s for these."""
    points = [(i, float(i % 7)) for i in range(100_000)]
    started = time.process_time()
    smoothed(points)
    assert time.process_time() - started < 3.0


def test_references_are_drawn_only_where_they_help() -> None:
    series = [Series("s", [(0, 0.5), (1, 0.7)])]
    near = line_chart("t", series, references=[Reference("coin", 0.5)])
    assert "coin" in near
    far = line_chart("t", series, references=[Reference("coin", 50.0)])
    assert "coin" not in far


def test_labels_are_escaped() -> None:
    svg = line_chart("<b>", [Series("<i>", [(0, 1.0), (1, 2.0)]), Series("b", [(0, 1.0)])])
    assert "<b>&lt;b&gt;</b>" in svg
    assert "<i>" not in svg


def test_the_interval_bar_shows_share_interval_and_coin() -> None:
    """0 to 100 % over x 4..156: 0.25 at 42, 0.5 at 80, 0.75 at 118."""
    bar = interval_bar(0.5, 0.25, 0.75)
    assert 'd="M42.0 10H118.0"' in bar
    assert 'cx="80.0"' in bar
    assert 'd="M80.0 2v16"' in bar
    assert "interval even" in bar
    assert "interval good" in interval_bar(0.7, 0.6, 0.8)
    assert "interval bad" in interval_bar(0.3, 0.2, 0.4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (-1.5, "-1.5"),
        (1200.0, "1200"),
        (25_000.0, "25k"),
        (2e-5, "2e-5"),
    ],
)
def test_numbers_are_written_plainly(value: float, text: str) -> None:
    assert plain_number(value) == text


def test_shares_are_written_as_percentages() -> None:
    assert percentage(0.12345) == "12.3%"
