"""The figures of public sets on a terminal: nothing is cut, at any usual width."""

import io
import re
import subprocess

import pytest
from rich.console import Console

from lora_rlhf.evaluation.suites.public import suite_table
from lora_rlhf.report_style import STYLE
from lora_rlhf.report_suites import suites_section
from tests.conftest import CHROMIUM

ARMS = ["base", "sft", "policy", "ppo@20", "quickstart", "ptx"]
METRICS = {
    "truthfulqa_mc1": ["acc"],
    "crows_pairs_entropy": ["entropy_basic", "entropy_respectful", "entropy_biased"],
    "ifeval": ["prompt_level_strict", "inst_level_strict"],
    "perplexity": ["perplexity"],
}


def results():
    """Each figure another one, so that a missing one is seen: 0.101, 0.102, ..."""
    numbers = iter(range(101, 1000))
    tasks = {
        task: {
            metric: {
                arm: {"value": next(numbers) / 1000, "low": 0.0, "high": 1.0, "n": 9}
                for arm in ARMS
            }
            for metric in metrics
        }
        for task, metrics in METRICS.items()
    }
    return {"tasks": tasks, "seconds": {}, "skipped": {}}


def shown(found, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(suite_table(found))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_names_and_figures_are_whole(width):
    found = results()
    page = shown(found, width)
    assert "…" not in page
    words = page.split()
    for task, metrics in found["tasks"].items():
        assert task in words
        for metric, arms in metrics.items():
            assert metric in words
            for share in arms.values():
                assert words.count(f"{share['value']:.3f}") == 1
    for name in ("base", "SFT", "PPO", "ppo@20", "quickstart", "ptx"):
        assert words.count(name) == 1
    lines = page.splitlines()
    assert all(len(line) <= width for line in lines)
    assert sum("0.000 to 1.000" in line for line in lines) >= 7, "an interval stays on one line"


def test_arms_stand_side_by_side_where_there_is_room():
    heads = [line.split() for line in shown(results(), 80).splitlines() if "ptx" in line.split()]
    assert heads == [["ppo@20", "quickstart", "ptx"]]
    wide = [line.split() for line in shown(results(), 130).splitlines() if "ptx" in line.split()]
    assert wide == [["base", "SFT", "PPO", "ppo@20", "quickstart", "ptx"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.0005, "0.001"), (2e-5, "2e-5"), (1.0, "1.000"), (-0.25, "-0.250")],
)
def test_what_is_not_nothing_is_not_shown_as_nothing(value, text):
    one = {"t": {"m": {"base": {"value": value, "low": value, "high": 3.14159, "n": 9}}}}
    found = {"tasks": one, "seconds": {}, "skipped": {}}
    assert f"{text} to 3.14" in shown(found, 80)
    assert f"{text} <small>{text} to 3.14</small>" in suites_section(found)


def test_the_report_says_which_way_is_better():
    page = suites_section(results())
    for metric in ("perplexity", "bits_per_byte", "likelihood_diff", "over_refusal", "flags"):
        assert metric in page.split("Higher is better but for")[1].split(";")[0]
    assert "pct_stereotype is best at one half" in page


@pytest.mark.ui
def test_six_arms_fit_a_report_of_1200_pixels(tmp_path):
    """A table that is wider than its frame hides its last arms until somebody scrolls."""
    script = (
        "<script>const e=document.querySelector('.wide');"
        "document.title=e.scrollWidth+'/'+e.clientWidth</script>"
    )
    page = f"<!doctype html><title>?</title><style>{STYLE}</style><main>"
    file = tmp_path / "page.html"
    file.write_text(f"{page}{suites_section(results())}</main>{script}", encoding="utf-8")
    call = [CHROMIUM, "--headless", "--no-sandbox", "--window-size=1200,900", "--dump-dom"]
    result = subprocess.run(
        [*call, file.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r"<title>(\d+)/(\d+)</title>", result.stdout)
    assert found is not None
    assert int(found[1]) <= int(found[2])
