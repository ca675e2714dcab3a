"""What the terminal shows: at most 80 columns, nothing lost, nothing taken for markup."""

import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_rlhf import display
from lora_rlhf.display import StageRow, short_count, short_time
from lora_rlhf.model.memory import MemoryPlan
from lora_rlhf.runs import Run
from tests.fabricated import finished_run
from tests.judged import health


def screen(width: int = 80, **settings: Any) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, highlight=False, **settings), out


def lines(out: io.StringIO) -> list[str]:
    return out.getvalue().split("\n")


def a_plan(fits: bool = True) -> MemoryPlan:
    return MemoryPlan(
        card_name="a GPU of 12 GB",
        card_gib=12.0,
        phases={"load": 2.0, "rollout": 9.0, "score": 3.0, "train": 8.0},
        stages={"sft": 6.0, "ppo": 9.0},
        needs_gib=10.2 if fits else 13.0,
        terms={"4-bit weights": 1.75, "KV cache": 4.5, "one layer unpacked": 0.001},
        micro_batch_tokens=4096,
        gradient_checkpointing=True,
        rollout_rows=64,
        adapter_parameters=41_943_040,
        fits=fits,
        advice=() if fits else ("ppo.value=shared: needs 11.0 GB, fits.",),
    )


def test_everything_fits_80_columns(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    console, out = screen()
    long = "a copy of sft; 123,456 rankings of shared/preferences.jsonl, held-out 10%"
    rows = [StageRow("sft", "sft", long, 41_943_040, 10.25, done=True), StageRow("rank")]
    display.stage_table(console, rows)
    display.result_table(console, run.summary())
    display.samples_panel(console, run)
    display.render_plan(a_plan(), console)
    display.render_plan(a_plan(fits=False), console)
    assert max(map(len, lines(out))) <= 80


def test_a_terminal_without_unicode_is_drawn_for(tmp_path: Path) -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    display.result_table(console, finished_run(tmp_path / "run").summary())
    display.render_plan(a_plan(), console)
    console.file.flush()
    assert b"#" in raw.getvalue()


def test_the_stage_table_shows_what_will_run() -> None:
    console, out = screen()
    rows = [
        StageRow("sft", "sft", "fresh LoRA", 41_943_040, 6.02, done=True),
        StageRow("ppo", "policy, value", "copies of [sft] and reward", 83_886_080, 9.5),
    ]
    display.stage_table(console, rows)
    text = out.getvalue()
    for word in ("sft (done)", "fresh LoRA", "41.9M", "6.0 GB", "[sft]", "83.9M", "9.5 GB"):
        assert word in text


def test_results_show_the_verdict_the_interval_and_the_times(tmp_path: Path) -> None:
    console, out = screen()
    display.result_table(console, finished_run(tmp_path / "run").summary())
    text = out.getvalue()
    assert "PPO beats SFT on 74% of answers" in text
    (row,) = [line for line in lines(out) if line.strip().startswith("PPO vs SFT")]
    drawn = row[row.index("wins") + 4 :]
    # 0 to 100% in 21 cells: the coin at 10, the interval from 14 to 16, the value at 15.
    assert drawn.strip().startswith("··········│···━●━····")
    assert "sft 1:02" in text
    assert "4:47 in all" in text


def test_the_health_card_is_its_verdict_and_a_few_rows() -> None:
    card = health("[bold]")
    console, out = screen()
    display.health_card(console, card)
    text = out.getvalue()
    assert "".join(text.split()).startswith("".join(card["verdict"]["sentence"].split()))
    assert max(map(len, lines(out))) <= 80
    (row,) = [line for line in lines(out) if line.strip().startswith("accuracy")]
    assert f"{100 * card['accuracy']['value']:.0f}%" in row
    (row,) = [line for line in lines(out) if "nothing [bold]" in line]
    assert "-2.10" in row
    assert "beats 4% of SFT" in row


def test_samples_keep_their_brackets(tmp_path: Path) -> None:
    console, out = screen()
    display.samples_panel(console, finished_run(tmp_path / "run"))
    text = out.getvalue()
    assert "[the] owl" in text
    assert "[red]hoo[/red]" in text
    assert "score +1.25" in text


def test_next_steps_name_the_adapters_and_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    run = Run(tmp_path / "run")
    console, out = screen()
    display.next_steps(console, run)
    assert out.getvalue() == ""
    for role in ("reward", "policy"):
        run.adapter(role).mkdir(parents=True)
        (run.adapter(role) / "adapter_config.json").write_text("{}")
        display.next_steps(console, run)
    text = out.getvalue()
    assert "Next:" in text
    assert "activate" not in text
    monkeypatch.setattr("shutil.which", lambda name: None)
    for folder, shown in ((Path.cwd() / ".venv", ".venv"), (tmp_path, str(tmp_path))):
        monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
        display.next_steps(console, run)
        assert f"Next (first: source {shown}/bin/activate):" in out.getvalue()
    assert str(run.adapter("policy")) in text
    assert f"lora-rlhf ui {run.path}" in text
    assert f"lora-rlhf chat {run.path}" in text
    assert f"lora-rlhf export {run.path} --adapter policy" in text


def test_the_plan_says_whether_it_fits_and_what_to_change() -> None:
    console, out = screen()
    display.render_plan(a_plan(), console)
    assert out.getvalue().startswith("fits: needs 10.2 GB of 12.0 GB, a GPU of 12 GB")
    assert "4096 tokens; activations are recomputed" in out.getvalue()
    # 9 of 12 GB are 30 of 40 cells.
    assert "█" * 30 + "░" * 10 in out.getvalue()
    console, out = screen()
    display.render_plan(a_plan(fits=False), console)
    assert out.getvalue().startswith("does not fit")
    assert "ppo.value=shared" in out.getvalue()


def test_a_plain_bar_prints_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=2)  # two seconds a step
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock) / 2)
    console, out = screen(force_terminal=False)
    with display.progress(console, "ppo", 40) as bar:
        for step in range(1, 41):
            bar.update(step, score=0.5, kl=3.21, tokens_per_second=1234.0)
    printed = lines(out)[:-1]
    assert printed[0] == "ppo 1/40  score +0.50  KL 3.2  1.23k tok/s"
    assert printed[-1] == "ppo 40/40  score +0.50  KL 3.2  1.23k tok/s"
    assert 6 <= len(printed) <= 12
    # The clock ticks twice a step; 40 steps of 2 s, after step 6 are 34 left.
    assert printed[1].endswith("left")


def test_time_left_counts_the_steps_of_this_session_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 110.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    bar = display.Bar("ppo", 100)
    assert bar._left(50) == ""
    # 10 s for 5 steps; 45 are left.
    assert bar._left(55) == "1:30 left"


@pytest.mark.parametrize("width", [80, 60])
def test_a_live_bar_fits_one_line(width: int) -> None:
    console, out = screen(width, force_terminal=True, color_system=None)
    with display.progress(console, "evaluate", 1200) as bar:
        bar.update(3, loss=2.345, heldout_accuracy=0.7123, tokens_per_second=12345.0)
        bar.update(4, loss=2.345, heldout_accuracy=0.7123, tokens_per_second=12345.0)
    last = lines(out)[0].split("\r")[-1]
    assert len(last) <= width + 10  # control codes around it
    if width == 80:
        assert "4/1200 loss 2.345  held out 71%  12.3k tok/s" in last


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (1234, "1.23k"), (41_943_040, "41.9M"), (8e9, "8B")],
)
def test_counts_are_short(number: float, text: str) -> None:
    assert short_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (62.4, "1:02"), (3599.6, "1:00:00"), (11_520, "3:12:00")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert short_time(seconds) == text


@pytest.mark.parametrize("module", ["display", "report", "results", "charts"])
def test_reading_a_run_needs_no_torch(module: str) -> None:
    code = f"import sys, lora_rlhf.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
