"""The Runs tab: what run directories say, drawn, without trusting a letter of them."""

import json
import math
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from lora_rlhf.charts import Reference
from lora_rlhf.runs import Run
from tests.fabricated import finished_run
from tests.ui.markup import NASTY, Seen, read
from ui.charts import Line, curve, interval
from ui.run_facts import MOST_RUNS, facts_of, find_run, headline, list_runs, samples_of
from ui.run_views import ago, curves_html, head_html, list_html, report_html, results_html
from ui.tabs.runs import BY_ARM, BY_STEP, Page, answers, look, report, view
from ui.tracks import Track

PAGE, TIMER, STAGE, PROMPT, STEP, RUNS, HEAD, RESULTS, CURVES, ANSWERS, REPORT = range(11)

DRAWN = 0.11  # reason: coordinates are written to a tenth of a pixel


def studio(runs_dir: Path) -> Any:
    return SimpleNamespace(runs_dir=runs_dir)


def recipe(run: Run, model: str = "builtin:tiny") -> Run:
    content = {"name": run.name, "base": {"model": model, "quantization": "nf4"}}
    run.write_json("recipe.yaml", content)  # JSON is YAML
    return run


def started(path: Path, seconds: float) -> None:
    """Let a run look as if it had started so long ago."""
    os.utime(path / "recipe.yaml", (time.time() - seconds,) * 2)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run, and a newer one that runs."""
    folder = tmp_path / "runs"
    done = recipe(finished_run(folder / "done"))
    done.set_status("finished")
    started(done.path, 7200)
    going = recipe(Run(folder / "going"))
    going.set_status("running", "ppo", 3, 8)
    for step in (1, 2, 3):
        metrics = {"step": step, "rollout/score": step / 2, "rollout/kl": 0.25 * step}
        going.append("ppo/metrics.jsonl", metrics)
        sample = {"prompt": "Why?", "response": f"At {step}.", "score": 0.5, "kl": 0.0}
        going.append("ppo/samples.jsonl", {"step": 10 * step, **sample})
    return folder


# -- the list -------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first(runs: Path) -> None:
    (runs / "notes").mkdir()
    (runs / ".hidden").mkdir()
    (runs / ".hidden" / "status.json").write_text("{}")
    (runs / "file").write_text("")
    assert [run.name for run in list_runs(runs)] == ["going", "done"]
    assert list_runs(runs / "missing") == []


def test_no_more_are_listed_than_anybody_reads(tmp_path: Path) -> None:
    for i in range(MOST_RUNS + 5):
        recipe(Run(tmp_path / f"r{i}"))
    assert len(list_runs(tmp_path)) == MOST_RUNS


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, "new"),
        ({"state": "running", "pid": os.getpid(), "time": 5.0}, "running"),
        ({"state": "running", "pid": -1, "time": "now"}, "interrupted"),
        ({"state": "running", "pid": 2**80}, "interrupted"),
        ({"state": "failed", "error": "out of memory"}, "failed"),
        ({"state": "stopped"}, "stopped"),
        ({"state": "finished"}, "finished"),
        ({"state": "<b>"}, "stopped"),
        ([1, 2], "damaged"),
    ],
)
def test_states(tmp_path: Path, status: Any, state: str) -> None:
    run = recipe(Run(tmp_path / "run"))
    run.write_json("status.json", status)
    assert facts_of(run.path).state == state
    assert state == "new" or state.split()[0] in read(head_html(facts_of(run.path))).text


def test_a_run_whose_process_is_gone_is_interrupted_once_it_is_silent(tmp_path: Path) -> None:
    """A run of another machine has no process here: its status speaks for it."""
    run = Run(tmp_path / "run")
    status = {"state": "running", "stage": "ppo", "pid": dead_pid(), "time": time.time()}
    run.write_json("status.json", status)
    assert facts_of(run.path).state == "running"
    run.write_json("status.json", status | {"time": time.time() - 600})
    assert facts_of(run.path).state == "interrupted"
    assert "--resume" in facts_of(run.path).error


def test_files_that_cannot_be_read_make_a_damaged_run_and_no_more(runs: Path) -> None:
    (runs / "done" / "summary.json").write_text('{"win_rates": [')
    (runs / "done" / "recipe.yaml").write_text("base: [")
    started(runs / "done", 0)
    shown = view(studio(runs), Page("done"))
    assert "damaged" in read(shown.head).text
    assert "SFT loss" in read(curves_html(facts_of(runs / "done"), "sft", False)).text


@pytest.mark.parametrize(
    "summary",
    [
        {"win_rates": [{"a": "policy", "b": "sft"}]},
        {"win_rates": 3},
        {"reward": [], "ppo": "x"},
        {"seconds": 5, "sft": {"heldout_loss": "low"}},
        {"arms": {"policy": 1}, "win_rates": [None]},
        {"evaluate": 1, "reward": {"accuracy": None}},
    ],
)
def test_a_summary_of_another_shape_breaks_nothing(tmp_path: Path, summary: Any) -> None:
    run = recipe(Run(tmp_path / "run"))
    run.write_json("summary.json", summary)
    facts = facts_of(run.path)
    for piece in (head_html(facts), results_html(facts), list_html([facts], None)):
        read(piece)


def test_the_strongest_number_is_the_headline() -> None:
    sft = {"sft": {"heldout_loss": 1.25}}
    reward = sft | {"reward": {"accuracy": 0.7}}
    ppo = reward | {"ppo": {"score": 1.5, "kl": 3.25}}
    win = {"a": "policy", "b": "sft", "win_rate": 0.4, "ci": [0.25, 0.5]}
    assert headline({}) == ""
    assert headline(sft) == "SFT held-out loss 1.250"
    assert headline(reward) == "reward model right on 70%"
    assert headline(ppo) == "PPO score +1.50 at KL 3.2 nats"
    assert headline(ppo | {"win_rates": [win]}) == "PPO wins 40% against SFT (25% to 50%)"


def test_ages_are_said_as_people_say_them() -> None:
    ages = {0: "just now", 59: "just now", 60: "1 min ago", 7200: "2 h ago", 200_000: "2 d ago"}
    assert {s: ago(1e6, 1e6 + s) for s in ages} == ages
    assert (ago(1e6, 1e6 - 50), ago(0.0)) == ("just now", "")


def test_the_chosen_card_says_so_without_colour(runs: Path) -> None:
    seen = read(list_html(list_runs(runs), "done"))
    assert seen.values("data-run") == ["going", "done"]
    assert [tag for tag, name, _ in seen.attributes if name == "aria-current"] == ["button"]
    assert "ppo, step 3 of 8" in seen.text
    assert seen.values("value") == ["0.375"]
    assert "running" in seen.text
    assert "finished" in seen.text


def test_no_runs_say_how_to_make_one(tmp_path: Path) -> None:
    shown = view(studio(tmp_path / "none"), Page())
    assert shown.name is None
    assert "lora-rlhf run quickstart" in read(shown.runs).text


# -- nothing is trusted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc", "", ".", "..", None, 5, ["done"], {"run": "done"}, "done/ppo", "./done"],
)
def test_only_listed_names_are_runs(runs: Path, name: Any) -> None:
    recipe(Run(runs.parent / "outside"))
    assert find_run(runs, name) is None
    assert view(studio(runs), Page(name)).name == "going"
    assert report(studio(runs), Page(name)) == ""
    assert answers(studio(runs), Page(name)).prompts == ()


def test_a_link_out_of_the_run_leads_nowhere(runs: Path) -> None:
    secret = runs.parent / "secret.jsonl"
    secret.write_text('{"step": 1, "prompt": "secret", "response": "secret", "secret": 1.0}\n')
    run = runs / "done"
    for file in ("ppo/metrics.jsonl", "ppo/samples.jsonl", "report.html"):
        (run / file).unlink(missing_ok=True)
        (run / file).symlink_to(secret)
    facts = facts_of(run)
    assert samples_of(run, "ppo") == ()
    assert "secret" not in report_html(facts) + curves_html(facts, "ppo", True)
    assert view(studio(runs), Page("done")).stages == ("sft", "reward")


def test_whatever_a_run_holds_is_shown_as_text(tmp_path: Path) -> None:
    for i, nasty in enumerate(NASTY):
        name = nasty.replace("/", "\u2215").replace("\0", "")
        run = recipe(Run(tmp_path / f"{i}{name}"), model=nasty)
        run.set_status("failed", nasty, 1, 2, nasty)
        run.append("ppo/metrics.jsonl", {"step": 1, "rollout/score": 1.0, nasty: 2.0})
        run.append("ppo/metrics.jsonl", {"step": 2, "rollout/score": 1.0, nasty: 3.0})
        sample = {"step": 1, "arm": nasty, "prompt": nasty, "response": nasty, "score": 1.0}
        run.append("ppo/samples.jsonl", sample)
        run.append("evaluate/samples.jsonl", sample)
        run.finish_stage(
            "sft",
            1.0,
            evaluate={"judge": nasty},
            ppo={"stopped": nasty, "kl": 1.0},
            win_rates=[{"a": nasty, "b": nasty, "win_rate": 0.5, "ci": [0, 1], "prompts": nasty}],
        )
    for facts in list_runs(tmp_path):
        nasty = NASTY[int(facts.name[0])]
        page = Page(facts.name, everything=True)
        shown = view(studio(tmp_path), page)
        by_arm = answers(studio(tmp_path), Page(facts.name, kind=BY_ARM)).html
        pieces = [shown.runs, shown.head, shown.results, shown.curves, by_arm]
        pieces.append(answers(studio(tmp_path), page).html)
        assert [nasty.strip() in "".join(read(piece).texts) for piece in pieces] == [True] * 6


def test_a_report_is_shown_in_a_frame_that_may_do_nothing(runs: Path) -> None:
    text = '<!doctype html><p class="x">it\'s & "so"</p><script>alert(1)</script>'
    (runs / "done" / "report.html").write_text(text)
    seen = read(report(studio(runs), Page("done")))
    assert seen.tags == ["iframe"]
    assert seen.values("sandbox") == [""]
    (page,) = seen.values("srcdoc")
    policy, found, rest = page.partition(text)
    assert (found, rest) == (text, "")
    assert policy == (
        '<!doctype html><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
    )


def test_without_a_report_the_tab_says_when_there_will_be_one(runs: Path) -> None:
    assert "when the run ends" in read(report(studio(runs), Page("going"))).text
    huge = runs / "going" / "report.html"
    with huge.open("wb") as file:
        file.truncate(9 << 20)
    assert "iframe" not in report(studio(runs), Page("going"))


# -- a page that looks again ----------------------------------------------------------------------


def kept(update: Any) -> bool:
    """Whether an output stays as it is."""
    return isinstance(update, dict) and set(update) == {"__type__"}


def test_a_second_look_sends_only_what_changed(runs: Path) -> None:
    first = look(studio(runs), Page())
    assert first[PAGE].run == "going"
    assert first[TIMER].active
    assert not any(kept(update) for update in first)
    second = look(studio(runs), first[PAGE])
    assert [kept(update) for update in second[STAGE:]] == [True] * 9
    Run(runs / "going").append("ppo/metrics.jsonl", {"step": 4, "rollout/score": 9.5})
    third = look(studio(runs), second[PAGE])
    assert [i for i in range(STAGE, REPORT + 1) if not kept(third[i])] == [CURVES]
    assert "9.5" in read(third[CURVES]).text


def test_nothing_is_looked_at_by_itself_when_nothing_runs(runs: Path) -> None:
    Run(runs / "going").set_status("finished")
    assert not look(studio(runs), Page())[TIMER].active


def test_the_stage_that_runs_is_shown_unless_another_was_chosen(runs: Path) -> None:
    assert view(studio(runs), Page("going")).stage == "ppo"
    assert view(studio(runs), Page("done")).stages == ("sft", "reward", "ppo")
    assert view(studio(runs), Page("done")).stage == "ppo"
    assert view(studio(runs), Page("done", stage="sft")).stage == "sft"
    for forged in ("../sft", "evaluate", 3, None, ["sft"]):
        assert view(studio(runs), Page("done", stage=forged)).stage == "ppo"


def test_the_report_is_read_once_it_was_opened(runs: Path) -> None:
    (runs / "done" / "report.html").write_text("<p>whole</p>")
    assert look(studio(runs), Page("done"))[REPORT] == ""
    assert "whole" in look(studio(runs), Page("done", wants_report=True))[REPORT]


# -- answers --------------------------------------------------------------------------------------


def sides(html: str) -> list[str]:
    return re.findall(r"<h4>(.*?)(?: <span|</h4>)", html)


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [(None, 30), (10, 10), (19, 10), (20.0, 20), (1e9, 30), (-5, 10), ("x", 30), ([], 30)],
)
def test_the_last_look_up_to_a_step_stands_beside_the_first(
    runs: Path, wanted: Any, shown: int
) -> None:
    found = answers(studio(runs), Page("going", step=wanted))
    assert (found.first, found.last, found.step) == (10, 30, shown)
    assert sides(found.html) == ([] if shown == 10 else ["step 10"]) + [f"step {shown}"]
    assert f"At {shown // 10}." in read(found.html).text


def test_whoever_looks_at_the_newest_answers_goes_on_doing_so(runs: Path) -> None:
    newest, older = (look(studio(runs), Page("going", step=step))[PAGE] for step in (30, 20))
    line = {"step": 40, "prompt": "Why?", "response": "At 4.", "score": 0.5, "kl": 0.0}
    Run(runs / "going").append("ppo/samples.jsonl", line)
    assert answers(studio(runs), newest).step == 40
    assert answers(studio(runs), older).step == 20


def test_a_prompt_is_chosen_by_its_number(runs: Path) -> None:
    run = Run(runs / "going")
    run.append("ppo/samples.jsonl", {"step": 30, "prompt": "How?", "response": "So."})
    assert answers(studio(runs), Page("going")).prompts == ("Why?", "How?")
    assert "Why?" not in answers(studio(runs), Page("going", prompt=1)).html
    for forged in (-1, 2, "1", None, True, 0.0):
        both = answers(studio(runs), Page("going", prompt=forged))
        assert both.prompt is None
        assert "Why?" in both.html
        assert "How?" in both.html


def test_arms_stand_side_by_side_with_their_scores(runs: Path) -> None:
    found = answers(studio(runs), Page("done", kind=BY_ARM, step=3))
    assert sides(found.html) == ["base", "SFT", "PPO"]
    text = read(found.html).text
    assert "score -1.00" in text
    assert "score +1.25" in text
    assert (found.first, found.last) == (0, 0)


def test_without_answers_the_tab_says_when_there_will_be_some(tmp_path: Path) -> None:
    recipe(Run(tmp_path / "run"))
    for kind, words in ((BY_STEP, "ppo.sample_every"), (BY_ARM, "evaluation")):
        assert words in read(answers(studio(tmp_path), Page("run", kind=kind)).html).text


def test_of_answers_without_end_only_the_newest_are_read(tmp_path: Path) -> None:
    path = tmp_path / "ppo" / "samples.jsonl"
    path.parent.mkdir()
    line = json.dumps({"step": 1, "prompt": "p", "response": "x" * 9_000})
    path.write_text(f"{line}\n" * 1000 + "broken\n" + line.replace('"p"', "5") + "\n")
    # 8 MiB hold so many whole lines of this length.
    fits = math.floor(((8 << 20) - len("broken\n") - len(line) + 2 - 2) / (len(line) + 1))
    assert len(samples_of(tmp_path, "ppo")) == fits


# -- curves ---------------------------------------------------------------------------------------


def track(*values: float, first: int = 1) -> Track:
    made = Track()
    made.add(range(first, first + len(values)), values)
    return made


def drawn(seen: Seen, kind: str) -> list[tuple[float, float]]:
    """Points of the path of a class."""
    for tag, name, value in seen.attributes:
        if tag == "path" and name == "class":
            current = value.split()
        elif tag == "path" and name == "d" and kind in current:
            return [tuple(map(float, p.split())) for p in re.findall(r"[\d.]+ [\d.]+", value)]  # type: ignore[misc]
    raise AssertionError(f"no path of class {kind}")


def test_a_curve_lies_where_its_numbers_are() -> None:
    seen = read(curve("Score", [Line("score", track(0.0, 1.0, 4.0, 2.0))], unit="nats"))
    points = drawn(seen, "lr-line")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    steps = [b - a for a, b in pairwise(xs)]
    assert steps == pytest.approx([steps[0]] * 3, abs=DRAWN)
    # Heights are proportional to the values, upwards: y grows downwards in SVG.
    heights = [ys[0] - y for y in ys]
    assert heights == pytest.approx([0.0, heights[2] / 4, heights[2], heights[2] / 2], abs=DRAWN)
    assert heights[2] > 50
    (about,) = seen.values("aria-label")
    assert about == (
        "Score by step. score: 4 points to step 4, begins at 0, last 2, lowest 0, highest 4"
    )
    assert "nats" in seen.text
    assert "step 3 \u00b7 4" in seen.text  # the read-out under the pointer


def test_two_lines_differ_in_more_than_their_colour() -> None:
    lines = [Line("train", track(1.0, 0.5)), Line("held out", track(1.1, 0.7))]
    seen = read(curve("Loss", lines, references=[Reference("coin", 0.69)]))
    assert "train 0.5" in seen.text
    assert "held out 0.7" in seen.text
    assert "coin 0.69" in seen.text
    css = (Path(__file__).parents[2] / "ui/assets/studio.css").read_text()
    dashed = next(line for line in css.splitlines() if line.startswith(".lr-line.lr-l1"))
    assert "stroke-dasharray" in dashed


def test_many_points_become_a_mean_and_a_band() -> None:
    values = [float(i % 2) for i in range(4000)]
    seen = read(curve("Score", [Line("score", track(*values))]))
    mean, band = drawn(seen, "lr-line"), drawn(seen, "lr-band")
    assert len(mean) <= 160
    heights = {y for _, y in band}
    assert len(heights) == 2
    assert [y for _, y in mean] == pytest.approx([sum(heights) / 2] * len(mean), abs=DRAWN)


def test_a_far_spike_is_written_out_and_flattens_nothing() -> None:
    values = [1.0 + 0.1 * (i % 3) for i in range(2000)]
    calm = drawn(read(curve("Norm", [Line("norm", track(*values))])), "lr-line")
    values[1000] = 500.0
    seen = read(curve("Norm", [Line("norm", track(*values))]))
    assert "spikes to 500" in seen.text
    assert "highest 500" in seen.values("aria-label")[0]
    assert drawn(seen, "lr-line")[:50] == calm[:50]


def test_nothing_to_draw_draws_nothing() -> None:
    broken = Track()
    broken.add([1], [float("nan")])
    assert curve("Score", [Line("score", broken)]) == ""
    assert "0.7, " not in read(curve("Score", [Line("score", track(0.7))])).text


def test_an_interval_stands_on_a_line_from_0_to_100_percent() -> None:
    seen = read(interval(0.75, 0.5, 1.0, "PPO <b>"))
    ends = dict(zip(seen.values("class"), ["", *seen.values("d")], strict=False))
    left, right = (float(x) for x in re.findall(r"M([\d.]+) .*h([\d.]+)", ends["lr-axis"])[0])
    (dot,) = (float(x) for x in seen.values("cx"))
    assert (dot - left) / right == pytest.approx(0.75, abs=0.01)
    assert seen.values("aria-label") == ["PPO <b> 75.0%, 95% interval 50.0% to 100.0%"]
    spans = {(0.6, 0.8): "above", (0.4, 0.6): "even", (0.1, 0.3): "below", (0.5, 0.7): "even"}
    for (low, high), tone in spans.items():
        assert f'"lr-interval lr-{tone}"' in interval((low + high) / 2, low, high)


def test_curves_show_the_metrics_and_on_demand_all_others(runs: Path) -> None:
    facts = facts_of(runs / "done")
    main = read(curves_html(facts, "ppo", False))
    titles = set(re.findall(r"<figcaption><b>(.*?)</b>", curves_html(facts, "ppo", False)))
    assert {"Score", "KL from SFT", "Entropy", "Clip fraction", "Response length"} <= titles
    assert "KL coefficient" not in titles, "it never moves"
    assert "train/tokens_per_second" not in main.text
    assert "train/tokens_per_second" in read(curves_html(facts, "ppo", True)).text
    assert "60 lines to step 60" in main.text
    assert "No curves yet" in read(curves_html(facts, "evaluate", False)).text


def test_a_hundred_thousand_lines_are_looked_at_quickly(tmp_path: Path) -> None:
    run = recipe(Run(tmp_path / "run"))
    (run.path / "reward").mkdir()
    with (run.path / "reward/metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            numbers = {"step": step, "loss/reward": 1.0 + 0.1 * (step % 7), "train/accuracy": 0.5}
            file.write(json.dumps(numbers) + "\n")
    run.set_status("running", "reward", 5, 10)
    page = Page("run")
    looks = []
    while not looks or "reading" in looks[-1]:
        before = time.perf_counter()
        looks.append(view(studio(tmp_path), page).curves)
        assert time.perf_counter() - before < 10  # a slow machine's worst
        assert len(looks) < 50
    assert "100000 lines to step 100k" in read(looks[-1]).text
    assert len(looks[-1]) < 60_000
    before = time.perf_counter()
    look(studio(tmp_path), page)
    assert time.perf_counter() - before < 1.0, "it was read again"


def test_the_page_is_laid_out(runs: Path) -> None:
    from ui.tabs import runs as tab_of_runs

    with gr.Blocks() as app, gr.Tab("Runs"):
        tab_of_runs.build(studio(runs))
    listened = {target[1] for fn in app.fns.values() for target in fn.targets}
    assert {"select", "click", "tick", "input"} <= listened
    assert all(fn.api_visibility == "private" for fn in app.fns.values())
