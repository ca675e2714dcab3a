"""Numbers that grow: nothing lost, nothing read twice, little kept."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.runs import Run
from ui.tracks import COUNT, FIRST, HIGH, LAST, LOW, MOST_STRETCHES, TOTAL, MetricFile, Track, merge


def row(*points: tuple[float, float]) -> list[float]:
    """A stretch of points, counted by hand."""
    steps, values = zip(*points, strict=True)
    return [steps[0], steps[-1], len(values), sum(values), min(values), max(values)]


def track_of(values: Sequence[float], cuts: Sequence[int] = ()) -> Track:
    track = Track()
    edges = [0, *sorted(cuts), len(values)]
    for start, end in pairwise(edges):
        track.add(range(start, end), values[start:end])
    return track


def write(path: Path, records: Sequence[object], mode: str = "w") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def steps(count: int, start: int = 1) -> list[dict[str, float]]:
    return [{"step": i, "loss": 1.0 / i} for i in range(start, start + count)]


# -- stretches ------------------------------------------------------------------------------------


def test_merging_adds_what_lies_together() -> None:
    points = [(1, 5.0), (2, 3.0), (4, 9.0), (5, 1.0), (7, 2.0)]
    alone = np.array([row(point) for point in points])
    assert merge(alone, 2).tolist() == [
        row(points[0], points[1]),
        row(points[2], points[3]),
        row(points[4]),
    ]
    # A stretch that is not full yet takes the points that follow.
    grown = np.array([row(points[0], points[1]), row(points[2]), row(points[3]), row(points[4])])
    assert merge(grown, 2).tolist() == merge(alone, 2).tolist()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.randoms(use_true_random=False))
def test_however_the_points_arrive_the_stretches_are_the_same(
    values: list[float], chance: random.Random
) -> None:
    cuts = [chance.randrange(len(values) + 1) for _ in range(5)]
    whole, pieces = track_of(values), track_of(values, cuts)
    assert np.array_equal(
        whole.stretches[:, [FIRST, LAST, COUNT, LOW, HIGH]],
        pieces.stretches[:, [FIRST, LAST, COUNT, LOW, HIGH]],
    )
    assert whole.stretches[:, TOTAL] == pytest.approx(pieces.stretches[:, TOTAL], abs=1e-3)
    assert whole.stretches[:, COUNT].sum() == len(values) == whole.count
    assert whole.newest == values[-1]


def test_a_spike_among_a_hundred_thousand_points_stays() -> None:
    values = np.sin(np.arange(100_000) / 500)
    values[70_123] = 50.0
    track = track_of(values.tolist())
    assert len(track.stretches) <= MOST_STRETCHES
    thin = track.thinned(160)
    assert len(thin) <= 160
    (spike,) = thin[thin[:, HIGH] > 1.0]
    assert spike[FIRST] <= 70_123 <= spike[LAST]
    assert spike[HIGH] == 50.0
    assert thin[:, TOTAL].sum() == pytest.approx(values.sum())


def test_what_is_no_number_is_counted_and_left_out() -> None:
    track = Track()
    track.add([1, 2, 3, 4, 5, 6], [1.0, float("nan"), "7", True, None, 3])
    assert (track.count, track.broken, track.newest) == (2, 4, 3.0)
    assert not track.is_flat
    track.add([7], [float("inf")])
    assert (track.count, track.broken) == (2, 5)


def test_a_value_that_never_moves_is_flat() -> None:
    assert track_of([0.1] * 2000).is_flat
    assert not track_of([0.1] * 1999 + [0.2]).is_flat
    assert Track().is_flat


# -- the file -------------------------------------------------------------------------------------


def test_only_what_was_added_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, steps(3))
    file = MetricFile(path).refresh()
    assert (file.lines, file.step, file.tracks["loss"].newest) == (3, 3, 1 / 3)
    # Were the beginning read again, the sum would be another.
    with path.open("r+b") as raw:
        raw.write(b"x" * 5)
    write(path, steps(2, start=4), mode="a")
    file.refresh()
    assert file.lines == 5
    assert file.tracks["loss"].stretches[:, TOTAL].sum() == pytest.approx(
        1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5
    )


def test_a_line_in_the_writing_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    file = MetricFile(path).refresh()
    assert (file.lines, file.read) == (1, 1.0)
    with path.open("a") as raw:
        raw.write('ss": 4.0}\n')
    assert file.refresh().lines == 2
    assert file.tracks["loss"].newest == 4.0


def test_a_resumed_stage_replaces_its_file(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for record in steps(10):
        run.append("sft/metrics.jsonl", record)
    file = MetricFile(run.path / "sft/metrics.jsonl").refresh()
    run.cut_lines_after("sft/metrics.jsonl", 4)
    for step in range(5, 20):  # longer than it was when it was last looked at
        run.append("sft/metrics.jsonl", {"step": step, "loss": 7.0})
    file.refresh()
    assert (file.lines, file.tracks["loss"].count, file.tracks["loss"].newest) == (19, 19, 7.0)


def test_a_file_that_was_cut_in_place_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, steps(10))
    file = MetricFile(path).refresh()
    write(path, steps(2))
    assert file.refresh().lines == 2


def test_a_missing_file_is_empty_and_may_come_later(tmp_path: Path) -> None:
    file = MetricFile(tmp_path / "metrics.jsonl").refresh()
    assert (file.lines, file.tracks, file.read) == (0, {}, 1.0)
    write(file.path, steps(1))
    assert file.refresh().lines == 1
    file.path.unlink()
    assert file.refresh().tracks == {}


def test_lines_that_are_no_metrics_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": 1.0}',
        "not json",
        "[1, 2]",
        '{"loss": 5.0}',
        '{"step": "two", "loss": 5.0}',
        '{"step": NaN, "loss": 5.0}',
        '{"step": 1e300, "loss": 5.0}',
        '{"step": true, "loss": 5.0}',
        "[" * 100_000,
        '{"step": 2, "loss": NaN, "time": 3.0, "note": {"a": 1}}',
    ]
    path.write_bytes("\n".join([*lines, ""]).encode() + b'\xff\xfe{"step": 3}\n')
    file = MetricFile(path).refresh()
    assert (file.lines, file.step) == (2, 2)
    assert (file.tracks["loss"].count, file.tracks["loss"].broken) == (1, 1)
    assert set(file.tracks) == {"loss", "note"}
    assert file.tracks["note"].count == 0


def test_a_file_of_endless_names_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": i, f"name{i}": 1.0, "loss": 1.0} for i in range(1000)])
    file = MetricFile(path).refresh()
    assert len(file.tracks) <= 200
    assert file.tracks["loss"].count == 1000


def test_a_look_that_ran_out_of_time_goes_on_at_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, steps(120_000))
    file = MetricFile(path).refresh(seconds=0.0)
    assert 0.0 < file.read < 1.0
    shares = [file.read]
    while file.read < 1.0:
        shares.append(file.refresh(seconds=0.0).read)
    assert shares == sorted(set(shares))
    assert (file.lines, file.tracks["loss"].count) == (120_000, 120_000)
