"""The report: one valid, self-contained file that shows all there is and runs nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lora_rlhf.report import CHARTS, render, write_report
from lora_rlhf.runs import Run
from tests.fabricated import NASTY, finished_run

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Checker(HTMLParser):
    """Collects tags and attributes, and refuses what is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return finished_run(tmp_path / "quickstart")


def test_the_report_is_valid_and_holds_every_section(run: Run) -> None:
    path = write_report(run)
    assert path == run.path / "report.html"
    page = checked(path.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    for heading in (
        "Results",
        "Win rates",
        "Answers side by side",
        "Training: sft",
        "Training: reward",
        "Training: ppo",
        "Memory",
        "Environment",
        "Recipe",
    ):
        assert heading in text
    for words in (
        "PPO beats SFT on 74%",
        "69% to 79%",
        "0.84 GiB",
        "+5%",
        "2.13.0",
        "builtin:tiny",
    ):
        assert words in text


def test_the_report_asks_nothing_of_anyone(run: Run) -> None:
    html = render(run)
    page = checked(html)
    assert "script" not in page.tags
    assert not {"iframe", "object", "img", "form"} & set(page.tags)
    addresses = [v for name, v in page.attributes if name in ("href", "src", "action", "data")]
    assert addresses == ["data:,"]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|//\w|url\(|@import", html)


def test_samples_are_text_and_never_markup(run: Run) -> None:
    html = render(run)
    assert NASTY not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4
    assert NASTY in "".join(checked(html).text)


def test_a_run_named_like_markup_is_text(tmp_path: Path) -> None:
    html = render(Run(tmp_path / "<b>x"))
    assert "<b>x" not in html
    assert "&lt;b&gt;x" in html


def test_all_charts_that_have_numbers_are_drawn(run: Run) -> None:
    html = render(run)
    without = {"KL coefficient", "ptx loss"}  # constant; not mixed in
    titles = {chart.title for charts in CHARTS.values() for chart in charts}
    drawn = set(re.findall(r"<figcaption><b>([^<]*)</b>", html))
    assert drawn == titles - without
    assert html.count("<svg viewBox") == len(drawn)


def test_a_kl_coefficient_that_moves_is_a_chart(run: Run) -> None:
    run.append("ppo/metrics.jsonl", {"step": 61, "ppo/kl_coef": 0.07})
    assert "KL coefficient" in render(run)


def test_charts_hold_the_metrics_values(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for step, value in ((1, 0.0), (2, 4.0), (3, 2.0)):
        run.append("ppo/metrics.jsonl", {"step": step, "rollout/kl": value})
    (path,) = re.findall(r'class="line c0" d="([^"]*)"', render(run))
    # y 180 is 0, y 10 is 4: the second point is the top, the third is half way.
    assert path == "M46.0 180.0L196.0 10.0L346.0 95.0"


@pytest.mark.parametrize("missing", ["sft", "reward", "ppo", "evaluate"])
def test_a_missing_stage_leaves_a_valid_report(run: Run, missing: str) -> None:
    for file in (run.path / missing).iterdir():
        file.unlink()
    summary = run.summary()
    for key in (missing, *(("win_rates", "arms") if missing == "evaluate" else ())):
        summary.pop(key, None)
    run.write_json("summary.json", summary)
    checked(render(run))


def test_an_empty_and_a_failed_run_say_so(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert "No stage has ended yet" in render(run)
    run.set_status("failed", "ppo", 12, 60, error="loss <nan> at step 12")
    html = render(run)
    checked(html)
    assert "failed in ppo at step 12" in html
    assert "loss &lt;nan&gt; at step 12" in html


def test_numbers_that_are_not_finite_do_not_reach_the_page(run: Run) -> None:
    with (run.path / "ppo" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, "rollout/kl": float("nan")}) + "\n")
    figures = re.findall(r"<figure>.*?</figure>", render(run))
    assert figures
    assert not [f for f in figures if "nan" in f.lower()]


def test_a_part_of_the_utility_that_is_next_to_nothing_has_no_sign(run: Run) -> None:
    summary = run.summary()
    summary["arms"]["policy"]["parts"] = {"clean": -0.0001, "length": -0.0312}
    run.write_json("summary.json", summary)
    page = render(run)
    assert "-0.000" not in page
    assert "-0.031" in page


def test_the_report_is_light_enough_to_send(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "long", steps=3000)
    assert len(render(run)) < 500_000
