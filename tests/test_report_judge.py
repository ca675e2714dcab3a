"""The report of what the judge found: every key has its section, and none has one without it."""

import html as entities
import re
import subprocess
from pathlib import Path

import pytest

from lora_rlhf.charts import Frame
from lora_rlhf.plots import Cloud, Mark, calibration_plot, cloud_plot, histogram_plot
from lora_rlhf.report import render
from lora_rlhf.report_suites import suites_section
from lora_rlhf.runs import Run
from tests.conftest import CHROMIUM
from tests.fabricated import NASTY, finished_run
from tests.judged import frontier, health, judged, share
from tests.test_report import checked

SECTIONS = {
    "win_rates": "Win rates",
    "rounds": "All arms in one table",
    "labelers": "Held-out labelers",
    "health": "Reward model: health card",
    "frontier": "Reward against distance",
    "suites": "What it forgot",
}


def run_with(path: Path, found: dict) -> Run:
    run = finished_run(path / "quickstart")
    run.write_json("summary.json", run.summary() | found)
    return run


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>", page)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(run_with(tmp_path_factory.mktemp("runs"), judged()))


def test_every_key_has_its_section(page: str) -> None:
    checked(page)
    assert set(SECTIONS.values()) <= set(headings(page))
    assert "Over-optimisation" in headings(page)
    assert "Reward model, looked at closely" not in headings(page), "the card says more"
    text = " ".join(checked(page).text)
    for words in (
        "at equal lengths 66% (61% to 71%)",
        "748 prompts",
        "1340",
        "72%",
        "Calibration",
        "Scores",
        "best of 16",
        "truthfulqa",
        "alpha",
    ):
        assert words in text


@pytest.mark.parametrize("key", SECTIONS)
def test_without_its_key_there_is_no_section(tmp_path: Path, key: str) -> None:
    found = judged()
    del found[key]
    run = run_with(tmp_path, found)
    summary = run.summary()
    summary.pop(key, None)
    run.write_json("summary.json", summary)
    page = render(run)
    checked(page)
    assert SECTIONS[key] not in headings(page)
    assert set(SECTIONS.values()) - {SECTIONS[key]} <= set(headings(page))


def test_hostile_text_stays_text_everywhere(page: str) -> None:
    """Every text of every key is hostile; the page holds no tag that is not its own."""
    assert NASTY not in page
    assert "<b>bold" not in page
    tags = set(checked(page).tags)
    assert not {"script", "iframe", "img", "object", "form"} & tags
    assert not re.search(r"https?:|url\(|@import", page)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 60


def test_quotes_cannot_leave_an_attribute(tmp_path: Path) -> None:
    page = render(run_with(tmp_path, judged("\"'><svg onload=alert(1)>")))
    parsed = checked(page)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]


def test_a_policy_that_will_be_trained_again_is_not_in_the_histogram(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"health": health()})
    with_policy = render(run)
    summary = run.summary()
    del summary["seconds"]["ppo"]
    run.write_json("summary.json", summary)
    areas = [p.count('class="area') for p in (with_policy, render(run))]
    assert areas == [3, 2]


def test_a_bad_reward_model_is_said_to_be_bad(tmp_path: Path) -> None:
    card = health() | {"verdict": {"ok": False, "sentence": "Do not trust this one."}}
    page = render(run_with(tmp_path, {"health": card}))
    assert '<p class="said bad">Do not trust this one.</p>' in page


@pytest.mark.parametrize(("warned", "tone"), [(True, "bad"), (False, "good")])
def test_the_watch_stands_first_and_in_its_tone(tmp_path: Path, warned: bool, tone: str) -> None:
    page = render(run_with(tmp_path, {"frontier": frontier("x", warned)}))
    assert headings(page)[0] == "Over-optimisation"
    assert f'<p class="said {tone}">Over-optimised: x</p>' in page


def test_a_frontier_without_gold_or_fits_is_drawn_too(tmp_path: Path) -> None:
    found = frontier("x")
    for point in found["points"]:
        point |= {"gold": None, "gold_ci": None}
    found["fits"] = {"best_of_n": {"proxy": None, "gold": None}, "ppo": {}}
    page = render(run_with(tmp_path, {"frontier": found}))
    checked(page)
    assert "Gold utility" not in page
    assert page.count('class="whisker c0"') == 5
    assert page.count('class="whisker c1"') == 4


def test_a_law_is_not_taken_beyond_its_points(tmp_path: Path) -> None:
    """PPO's points reach a KL of 6 nats, best-of-n's ln 16 - 15/16 = 1.84."""
    found = frontier("x")
    found["fits"]["ppo"]["proxy"]["peak"] = 2.0  # the same object for best-of-n
    page = render(run_with(tmp_path, {"frontier": found}))
    rows = dict(
        re.findall(
            r"<tr><td><b>(best of n|PPO)</b> by the reward model.*?<td>([^<]*)</td></tr>", page
        )
    )
    assert rows == {"best of n": "beyond the points", "PPO": "4.0"}
    by_judge = re.findall(r"by the judge.*?<td>([^<]*)</td></tr>", page)
    assert by_judge == ["beyond the points"] * 2


# -- drawings -----------------------------------------------------------------------------------


def test_the_fitted_curve_passes_through_the_points_it_was_fitted_to(tmp_path: Path) -> None:
    """The points lie on the laws exactly, so each lies within a pixel of the polyline."""
    page = render(run_with(tmp_path, {"frontier": frontier("x")}))
    figure = re.search(r"<figure><figcaption><b>Reward model&#x27;s score.*?</figure>", page)
    assert figure is not None
    for color, count in (("c0", 5), ("c1", 4)):
        path = re.search(rf'<path class="line {color}" d="([^"]*)"', figure[0])
        dots = re.findall(rf'<circle class="{color}" cx="([\d.]+)" cy="([\d.]+)"', figure[0])
        assert path is not None
        assert len(dots) == count
        curve = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[1])]
        for x, y in dots:
            # 61 points over 300 units: no point of the curve is farther off than half a step.
            near = min(curve, key=lambda p: abs(p[0] - float(x)))
            slope = 8.0  # units of y for a step of x, at the steep start
            assert abs(near[1] - float(y)) < slope, (color, x, y)


def test_marks_land_where_they_belong() -> None:
    """x 0 to 2 over 46..346, y with a sixteenth of room below and above: ticks 0 to 1 by 0.2."""
    marks = [Mark(0.0, 0.2, 0.1, 0.3), Mark(2.0, 0.8, 0.7, 0.9, "top")]
    svg = cloud_plot("t", "u", [Cloud("a", marks)], "x")
    dots = re.findall(r'<circle class="c0" cx="([\d.]+)" cy="([\d.]+)"', svg)
    frame = Frame([], [0.0, 1.0], 0.0, 2.0)
    assert dots == [("46.0", f"{frame.y(0.2):.1f}"), ("346.0", f"{frame.y(0.8):.1f}")]
    assert (frame.y(0.0), frame.y(1.0)) == (180.0, 10.0)
    assert f"M46.0 {frame.y(0.1):.1f}V{frame.y(0.3):.1f}" in svg
    assert "<title>top</title>" in svg
    assert cloud_plot("t", "u", [Cloud("a", [])], "x") == ""


def test_a_calibrated_bin_lies_on_the_dashed_line() -> None:
    """The line goes from (50%, 50%) to (100%, 100%); 75 % of 75 % lies at its middle."""
    rows = [{"predicted": 0.75, "observed": 0.75, "ci": [0.6, 0.9], "n": 40}]
    svg = calibration_plot("c", rows)
    line = re.search(r'class="ref" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    dot = re.search(r'<circle class="c0" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert line is not None
    assert dot is not None
    x1, y1, x2, y2 = map(float, line.groups())
    # Coordinates are rounded to a tenth.
    assert float(dot[1]) == pytest.approx((x1 + x2) / 2, abs=0.11)  # reason: rounding
    assert float(dot[2]) == pytest.approx((y1 + y2) / 2, abs=0.11)  # reason: rounding
    assert "40 pairs" in svg
    assert calibration_plot("c", []) == ""


def test_histograms_show_shares_and_not_counts() -> None:
    """Ten of one set and a thousand of the other, both half and half, are drawn alike."""
    svg = histogram_plot("h", [0.0, 1.0, 2.0], {"few": [5, 5], "many": [500, 500]})
    paths = re.findall(r'<path class="area c\d" d="([^"]*)"', svg)
    assert len(paths) == 2
    assert paths[0] == paths[1]
    assert histogram_plot("h", [], {}) == ""


def test_an_arm_beyond_the_first_ones_interval_is_marked() -> None:
    arms = {"base": share(0.4), "sft": share(0.5), "policy": share(0.3), "near": share(0.43)}
    page = suites_section({"tasks": {"t": {"m": arms}}})
    cells = re.findall(r"<td>([\d.]+)( [▲▼])? <small>", page)
    assert cells == [("0.400", ""), ("0.500", " ▲"), ("0.300", " ▼"), ("0.430", "")]


# -- on a phone ---------------------------------------------------------------------------------


@pytest.mark.ui
def test_nothing_sticks_out_at_390_pixels(tmp_path: Path, page: str) -> None:
    """Measured in a frame of that width: Chromium's own window is never so narrow."""
    long = page.replace("<details>", "<details open>")
    long = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", long)
    script = (
        "f.onload=()=>{const e=f.contentDocument.documentElement;"
        "document.title=e.scrollWidth+'/'+f.contentWindow.innerWidth}"
    )
    file = tmp_path / "frame.html"
    file.write_text(
        f'<!doctype html><title>?</title><iframe id=f style="width:390px;height:800px;border:0" '
        f'srcdoc="{entities.escape(long)}"></iframe><script>{script}</script>'
    )
    call = [CHROMIUM, "--headless", "--no-sandbox", "--window-size=800,900", "--dump-dom"]
    result = subprocess.run(
        [*call, file.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r"<title>(\d+)/(\d+)</title>", result.stdout)
    assert found is not None
    assert int(found[2]) == 390
    assert int(found[1]) <= 390
