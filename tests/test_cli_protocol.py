"""The protocol's command: its jobs, what a kill leaves, and a whole reduced seed."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lora_rlhf import cli_protocol
from lora_rlhf.cli import app
from lora_rlhf.cli_protocol import run_all, run_job
from lora_rlhf.errors import TrainingError
from lora_rlhf.evaluation.protocol_arms import TRAINED, Job, jobs_of
from lora_rlhf.runs import Run

ROOT = Path(__file__).resolve().parents[1]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["protocol", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return " ".join((result.output + (result.stderr if result.stderr_bytes else "")).split())


# -- jobs ---------------------------------------------------------------------------------------

# What stands for a job: it notes when it ran, and ends as a real one does. Its summary is there at
# once or not at all, as that of a real one: the command looks at it while it is being written.
FAKE = """
import json, sys, time
folder, name, bad = sys.argv[1:]
with open(f"{folder}/events", "a") as events:
    events.write(f"start {name}\\n"); events.flush()
    time.sleep(0.2)
    events.write(f"end {name}\\n")
if bad in name:
    sys.exit(1)
import os
os.makedirs(f"{folder}/{name}", exist_ok=True)
with open(f"{folder}/{name}/being_written", "w") as summary:
    json.dump({"protocol": {}}, summary)
os.replace(f"{folder}/{name}/being_written", f"{folder}/{name}/summary.json")
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    bad = {"name": "nobody"}

    def start(folder: Path, job: Job) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", FAKE, str(folder), job.name, bad["name"]])

    monkeypatch.setattr(cli_protocol, "_start", start)
    monkeypatch.setattr(cli_protocol, "_LOOK_SECONDS", 0.02)
    return bad


def events(folder: Path) -> list[tuple[str, str]]:
    file = folder / "events"
    lines = file.read_text().splitlines() if file.exists() else []
    return [tuple(line.split()) for line in lines]


def test_two_run_at_once_and_an_arm_after_its_base(tmp_path: Path, fake: dict[str, str]) -> None:
    jobs = jobs_of([0, 1])
    run_all(tmp_path, jobs, 2, quiet())
    order = events(tmp_path)
    assert sorted(n for what, n in order if what == "start") == sorted(job.name for job in jobs)
    at_once = list(itertools.accumulate(1 if what == "start" else -1 for what, _ in order))
    assert max(at_once) == 2
    for job in jobs:
        if job.needs is not None:
            assert order.index(("end", job.needs.name)) < order.index(("start", job.name))
    (tmp_path / "events").unlink()
    run_all(tmp_path, jobs, 2, quiet())
    assert events(tmp_path) == [], "what has ended is not made again"


def test_what_fails_is_named_and_the_rest_is_made(tmp_path: Path, fake: dict[str, str]) -> None:
    fake["name"] = "seed-0-base"
    with pytest.raises(TrainingError, match=r"^6 of 12 runs failed"):
        run_all(tmp_path, jobs_of([0, 1]), 2, quiet())
    started = [n for what, n in events(tmp_path) if what == "start"]
    assert [n for n in started if n.startswith("seed-0")] == ["seed-0-base"]
    assert len([n for n in started if n.startswith("seed-1")]) == 6
    fake["name"] = "nobody"
    run_all(tmp_path, jobs_of([0, 1]), 2, quiet())


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import time
from lora_rlhf.cli_protocol import _leave_with_parent
_leave_with_parent()
print("up", flush=True)
time.sleep(120)
'''], start_new_session=True)
print(child.pid, flush=True)
time.sleep(120)
"""


def test_a_job_ends_when_whoever_started_it_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "up\n"
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    ends_at = time.monotonic() + 20  # it looks twice a second; the machine may be busy
    while time.monotonic() < ends_at:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return  # dead, and nobody has asked how
        time.sleep(0.1)
    pytest.fail("the job outlived the command that started it")


# -- what is refused ----------------------------------------------------------------------------


def test_mistakes_are_told_before_anything_runs(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    assert "--seeds is 0,x" in refusal(folder, "--seeds", "0,x")
    assert "--seeds is 1,1" in refusal(folder, "--seeds", "1,1")
    assert "holds no protocol" in refusal(folder, "--table")
    assert "Give one first, then KEY=VALUE" in refusal("ppo.steps=3")
    assert "needs ppo" in refusal(folder, "ppo=null")
    assert "evaluate.best_of is 4" in refusal(folder, "evaluate.best_of=4")
    assert not folder.exists()


def test_a_folder_keeps_the_recipe_it_was_begun_with(tmp_path: Path) -> None:
    cli_protocol._recipe(tmp_path, ["ppo.steps=9"], reduced=True, create=True)
    assert "begun with another recipe (ppo.steps 9 -> 8)" in refusal(
        tmp_path, "--reduced", "ppo.steps=8"
    )
    kept = cli_protocol._recipe(tmp_path, [], reduced=False, create=False)
    assert kept.ppo.steps == 9


def test_two_commands_do_not_work_on_one_folder(tmp_path: Path, fake: dict[str, str]) -> None:
    cli_protocol._recipe(tmp_path, [], reduced=True, create=True)
    with cli_protocol._alone(tmp_path):
        assert "is being worked on by another" in refusal(tmp_path)
    assert events(tmp_path) == []


# -- a whole seed -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_of_a_reduced_seed_says_what_its_runs_say(tmp_path: Path) -> None:
    """All arms through the real stages, in this process; then each figure from the files."""
    folder = tmp_path / "protocol"
    cli_protocol._recipe(folder, [], reduced=True, create=True)
    for job in jobs_of([3]):
        run_job(folder, job, quiet())
    result = CliRunner().invoke(app, ["protocol", str(folder), "--seeds", "3", "--table", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "protocol.json").read_text())
    assert json.loads(result.stdout) == found
    assert [row["letter"] for row in found["criteria"]] == list("abcdefgh")
    (arms,) = found["arms"]
    assert set(arms) == {"sft", "best-of-4", "best-of-16", "best-of-64", *TRAINED}
    assert set(found["seconds"]) == {job.name for job in jobs_of([3])}

    base = Run(folder / "seed-3-base")
    start = base.lines("evaluate/best_of_n.jsonl")[1:]
    gold = [g for line in start for g in line["gold"]]
    assert len(gold) == 4 * 64
    mean = sum(gold) / len(gold)
    spread = (sum((g - mean) ** 2 for g in gold) / len(gold)) ** 0.5
    assert arms["sft"]["gold"] == pytest.approx(mean)
    best = [max(zip(line["scores"][0], line["gold"], strict=True)) for line in start]
    assert arms["best-of-64"]["proxy"] == pytest.approx(sum(s for s, _ in best) / 4)
    # Of equal scores, which only equal answers have here, gold is equal too.
    assert arms["best-of-64"]["gold"] == pytest.approx(sum(g for _, g in best) / 4)
    gains = {}
    for name in TRAINED:
        lines = Run(folder / f"seed-3-{name}").lines("evaluate/policies.jsonl")[1:]
        last = lines[-1]["policy"]
        mine = [line for line in lines if line["policy"] == last]
        assert len(mine) == 4
        own = [g for line in mine for g in line["gold"]]
        gains[name] = (sum(own) / len(own) - mean) / spread
        assert arms[name]["gain_sd"] == pytest.approx(gains[name], abs=1e-9)
        wins = [
            (g > other) + 0.5 * (g == other)
            for line, against in zip(mine, start, strict=True)
            for g in line["gold"]
            for other in against["gold"]
        ]
        assert arms[name]["win_rate"] == pytest.approx(sum(wins) / len(wins))
    rows = {row["letter"]: row for row in found["criteria"]}
    reward = base.summary()["reward"]
    assert rows["a"]["figures"]["accuracy"] == reward["accuracy"]
    right = reward["accuracy"] >= reward["bayes_accuracy"] - 0.05
    assert rows["a"]["passed"] is (right and reward["accuracy"] > reward["longer_baseline"] + 0.05)
    assert rows["b"]["figures"]["gain sd"] == pytest.approx(gains["ppo"])
    assert rows["g"]["figures"]["random reward sd"] == pytest.approx(gains["ppo-random"])
    sft, reference = (folder / f"seed-3-{n}/sft/adapter" for n in ("base", "ppo-free"))
    weights = "adapter_model.safetensors"
    assert (sft / weights).read_bytes() == (reference / weights).read_bytes()
    assert len(Run(folder / "seed-3-ppo-free").kept_policies()) >= 2
