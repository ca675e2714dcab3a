"""The command line: quick help, one place for errors, and which run a command means."""

import errno
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_rlhf import __version__, checking
from lora_rlhf.cli import app
from lora_rlhf.errors import TrainingError
from lora_rlhf.recipe import STAGES, Recipe
from lora_rlhf.recipe_io import dump_recipe, load_recipe
from lora_rlhf.runs import Run, write_atomically

COMMANDS = ("run", "recipes", "check", "plan", "chat", "export", "ui", "preferences", "doctor")
Calls = list[dict[str, Any]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a terminal wide enough for whole sentences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A pipeline that trains nothing, completes its stages, and remembers how it was called."""
    calls: Calls = []

    def run_pipeline(recipe: Recipe, run: Run, **options: Any) -> None:
        calls.append({"recipe": recipe, "run": run, **options})
        write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
        for stage in recipe.stages:
            run.finish_stage(stage, 1.0)
        run.set_status("finished")

    replace_pipeline(monkeypatch, run_pipeline)
    return calls


def replace_pipeline(monkeypatch: pytest.MonkeyPatch, function: Callable[..., None]) -> None:
    module = ModuleType("lora_rlhf.pipeline")
    module.run_pipeline = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lora_rlhf.pipeline", module)


def failing(error: BaseException) -> Callable[..., None]:
    def run_pipeline(recipe: Recipe, run: Run, **options: Any) -> None:
        raise error

    return run_pipeline


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        app(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def make_run(path: Path, *finished: str, state: str = "finished", **fields: Any) -> Run:
    run = Run(path)
    recipe = load_recipe("quickstart", [f"{k}={v}" for k, v in fields.items()])
    write_atomically(path / "recipe.yaml", dump_recipe(recipe))
    for stage in finished:
        run.finish_stage(stage, 1.0)
    run.set_status(state, "" if state == "finished" else "ppo", 3, 24)
    return run


# -- help ---------------------------------------------------------------------------------------


def test_help_comes_within_a_second_and_without_torch() -> None:
    """Of the processor, the best of three: a busy machine does not decide."""
    code = (
        "import sys; sys.argv = ['lora-rlhf', '--help']\n"
        "from lora_rlhf.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        start = os.times()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        end = os.times()
        seconds.append(end.children_user + end.children_system)
        seconds[-1] -= start.children_user + start.children_system
        assert result.returncode == 0, result.stderr
        assert "lora-rlhf run quickstart" in result.stdout
    assert min(seconds) < 1.0


def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lora_rlhf", "--version"], capture_output=True, text=True
    )
    assert result.stdout == f"lora-rlhf {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_in_lines_that_can_be_pasted(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command, "--help") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    examples = lines[lines.index("Try:") + 1 :]
    assert examples
    assert all(line.startswith("lora-rlhf ") for line in examples)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_pasted_lines_name_recipes_and_options_that_exist(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command, "--help") == 0
    out = capsys.readouterr().out
    options, _, examples = out.partition("Try:")
    for option in re.findall(r"(?<= )--[a-z-]+", examples):
        assert option in options
    for recipe in re.findall(
        r"(?:run|check|plan|--copy) ([a-z0-9.-]+?)(?:\.yaml)?(?=\s)", examples
    ):
        assert load_recipe(recipe)


def test_no_command_shows_the_help(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call()
    captured = capsys.readouterr()
    assert "Usage" in captured.out + captured.err


# -- errors -------------------------------------------------------------------------------------


def test_a_user_error_is_told_without_a_traceback(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "quickstart", "ppo.kl_coeff=1") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(
        "override ppo.kl_coeff=1: ppo.kl_coeff is not a field. Did you mean kl_coef?"
    )
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (here / "runs").exists()


def test_square_brackets_in_a_message_are_no_markup(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_pipeline(monkeypatch, failing(TrainingError("loss is nan in [ppo] step 3")))
    assert call("run", "quickstart") == 2
    assert capsys.readouterr().err == "loss is nan in [ppo] step 3\n"


def test_a_bug_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pipeline(monkeypatch, failing(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        app(["run", "quickstart"])


def test_an_interrupt_says_how_to_go_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_pipeline(monkeypatch, failing(KeyboardInterrupt()))
    assert call("run", "quickstart", "--name", "a b", "--runs-dir", "elsewhere", "--force") == 130
    assert capsys.readouterr().err == (
        "Stopped. Go on with:\n"
        "  lora-rlhf run quickstart --name 'a b' --runs-dir elsewhere --resume --force\n"
    )


def test_a_full_disk_is_told_in_a_sentence(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/ppo")
    replace_pipeline(monkeypatch, failing(full))
    assert call("run", "quickstart") == 2
    error = capsys.readouterr().err
    assert error.startswith("No space left on the disk (runs/x/ppo). Free some")
    assert error.endswith("lora-rlhf run quickstart --resume\n")


def test_another_os_error_is_a_bug(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pipeline(monkeypatch, failing(PermissionError(errno.EACCES, "no")))
    with pytest.raises(PermissionError):
        app(["run", "quickstart"])


# -- run: a new one -----------------------------------------------------------------------------


def test_a_run_is_named_after_its_recipe(here: Path, pipeline: Calls) -> None:
    assert call("run", "quickstart", "seed=3", "ppo=null", "--force") == 0
    (made,) = pipeline
    assert made["run"].path == Path("runs/quickstart")
    assert made["recipe"].seed == 3
    assert made["recipe"].ppo is None
    assert (made["resume"], made["only"], made["start_from"], made["force"]) == (
        False,
        None,
        None,
        True,
    )


def test_a_finished_run_is_kept_and_the_next_one_numbered(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    for expected in ("quickstart", "quickstart-2", "quickstart-3"):
        assert call("run", "quickstart") == 0
        assert pipeline[-1]["run"].name == expected
    assert "runs/quickstart is finished; this run is runs/quickstart-3." in capsys.readouterr().out


def test_a_finished_run_that_is_named_is_refused(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(here / "runs" / "mine", *STAGES)
    assert call("run", "quickstart", "--name", "mine") == 2
    error = capsys.readouterr().err
    assert "runs/mine exists (finished). Start anew: --name mine-2." in error
    assert pipeline == []


@pytest.mark.parametrize("state", ["stopped", "failed", "running"])
def test_an_unfinished_run_is_not_begun_again_silently(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    make_run(here / "runs" / "quickstart", "sft", state=state)
    assert call("run", "quickstart") == 2
    error = capsys.readouterr().err
    assert (
        f"runs/quickstart exists ({state} in ppo). Go on with it: lora-rlhf run quickstart" in error
    )
    assert "--name quickstart-2" in error


@pytest.mark.parametrize("option", ["--only", "--from"])
def test_a_stage_that_is_none_is_told_before_anything_else(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    make_run(here / "runs" / "quickstart", "sft", state="running")
    assert call("run", "quickstart", option, "rewrad") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{option} is rewrad. Allowed: sft, rank, reward, ppo, evaluate." in error


@pytest.mark.parametrize("name", ["..", "a/b", "/abs"])
def test_a_run_lies_in_the_folder_of_runs(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert call("run", "quickstart", "--name", name) == 2
    assert "Allowed: a name without a slash" in capsys.readouterr().err


# -- run: one that exists -----------------------------------------------------------------------


def test_resuming_keeps_the_recipe_the_run_was_started_with(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(here / "runs" / "quickstart", "sft", state="stopped", seed=7)
    assert call("run", "quickstart", "--resume") == 0
    assert pipeline[0]["recipe"].seed == 7
    assert pipeline[0]["resume"] is True
    assert (
        "going on with runs/quickstart/recipe.yaml, where seed is 7 (file: 0)"
        in capsys.readouterr().out
    )


def test_a_stage_to_come_may_be_changed_and_is_told(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(here / "runs" / "quickstart", "sft", "rank", "reward", state="stopped")
    assert call("run", "quickstart", "ppo.max_kl=99", "--resume") == 0
    assert pipeline[0]["recipe"].ppo.max_kl == 99
    assert "changed in runs/quickstart: ppo.max_kl 50.0 -> 99.0" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["sft.epochs=9", "lora.rank=3", "seed=5"])
def test_what_is_done_cannot_be_changed(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    make_run(here / "runs" / "quickstart", "sft", state="stopped")
    assert call("run", "quickstart", override, "--resume") == 2
    assert "comes too late: runs/quickstart was made with" in capsys.readouterr().err
    assert pipeline == []


def test_from_runs_a_stage_and_all_later_ones_again_with_changes(
    here: Path, pipeline: Calls
) -> None:
    make_run(here / "runs" / "quickstart", *STAGES)
    assert call("run", "quickstart", "ppo.kl_coef=0.2", "--from", "ppo") == 0
    assert pipeline[0]["start_from"] == "ppo"
    assert pipeline[0]["recipe"].ppo.kl_coef == 0.2
    assert call("run", "quickstart", "lora.rank=4", "--from", "sft") == 0
    assert pipeline[1]["recipe"].lora.rank == 4


def test_only_leaves_the_other_stages_fixed(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(here / "runs" / "quickstart", *STAGES)
    assert call("run", "quickstart", "--only", "evaluate", "evaluate.prompts=9") == 0
    assert pipeline[0]["only"] == "evaluate"
    assert call("run", "quickstart", "--only", "evaluate", "ppo.kl_coef=0.2") == 2
    assert "ppo.kl_coef=0.2 comes too late" in capsys.readouterr().err


def test_only_and_from_exclude_each_other(here: Path, pipeline: Calls) -> None:
    assert call("run", "quickstart", "--only", "ppo", "--from", "ppo") == 2


def test_nothing_is_resumed_where_nothing_began(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "quickstart", "--resume") == 2
    assert "runs/quickstart is not a run that can be resumed" in capsys.readouterr().err


def test_a_run_at_work_in_another_process_is_left_alone(
    here: Path, pipeline: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(here / "runs" / "quickstart", "sft", state="running")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run.write_json("status.json", run.status() | {"pid": other.pid})
        assert call("run", "quickstart", "--resume") == 2
        assert f"is at work in process {other.pid}" in capsys.readouterr().err
        assert other.stdin is not None
        other.stdin.close()
    assert call("run", "quickstart", "--resume") == 0


# -- recipes ------------------------------------------------------------------------------------


def test_recipes_are_listed_with_their_base(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it is after `make quickstart`, which installs no extra that a recipe may want.
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "vaderSentiment" else find_spec(name, *more),
    )
    assert call("recipes") == 0
    out = capsys.readouterr().out
    assert re.search(r"^quickstart +builtin:tiny +The whole pipeline", out, re.M)
    assert out.endswith("lora-rlhf run quickstart\n")


def test_a_recipe_is_copied_once_and_then_its_own(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("recipes", "--copy", "quickstart") == 0
    assert load_recipe("quickstart.yaml") == load_recipe("quickstart")
    (here / "quickstart.yaml").write_text("mine", encoding="utf-8")
    assert call("recipes", "--copy", "quickstart") == 2
    assert "quickstart.yaml exists." in capsys.readouterr().err
    assert (here / "quickstart.yaml").read_text(encoding="utf-8") == "mine"


# -- check and plan -----------------------------------------------------------------------------


def test_check_passes_the_quickstart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", "quickstart", "data.demonstrations.limit=50") == 0
    assert "No problem found. Run it: lora-rlhf run quickstart" in capsys.readouterr().out


def test_check_tells_all_problems_of_the_data_at_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f'{{"prompt": "question {i}", "response": "answer"}}' for i in range(50)]
    rows += ['{"prompt": "a"', '{"prompt": "", "response": "b"}']
    (here / "d.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    code = call("check", "quickstart", "data.demonstrations={path: d.jsonl}")
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("2 problems:\n")
    assert "d.jsonl:51: " in error
    assert "d.jsonl:52: " in error


def test_check_names_a_file_that_is_not_there(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("check", "quickstart", "data.prompts={path: none.jsonl}") == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_problems_are_counted_and_cut_at_twenty() -> None:
    text = checking.summarise([f"line {i}" for i in range(30)] + ["line 0"] * 4)
    lines = text.splitlines()
    assert lines[0] == "34 problems:"
    assert lines[1] == "line 0 (5 times)"
    assert len(lines) == 22
    assert lines[-1] == "... and 10 more"


def test_a_tracker_that_is_not_installed_is_a_problem(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problems = checking._tracker_problems(load_recipe("quickstart", ["tracker=wandb"]))
    assert problems[0].startswith("tracker: wandb is not installed. Run: pip install wandb")


def test_plan_shows_the_phases_against_a_card(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("plan", "qwen3-1.7b-12gb", "--vram", "12") == 0
    out = capsys.readouterr().out
    assert all(phase in out for phase in ("load", "rollout", "score", "train"))


# -- after a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["chat", "export"])
def test_a_run_that_is_not_there_names_those_that_are(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    make_run(here / "runs" / "quickstart")
    assert call(command, "quikstart") == 2
    said = capsys.readouterr().err
    assert "quikstart is not a run. runs/ has: quickstart. Did you mean quickstart?" in said
    assert call(command, "something-else") == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_an_adapter_that_is_not_there_names_those_that_are(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(here / "runs" / "quickstart", "sft")
    run.adapter("sft").mkdir(parents=True)
    (run.adapter("sft") / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert call("export", "quickstart", "--adapter", "policy") == 2
    assert "has no adapter policy. It has: sft." in capsys.readouterr().err


@pytest.mark.parametrize("words", [["evaluate", "q"], ["export", "q", "--adapter", "policy"]])
@pytest.mark.parametrize(("state", "pid"), [("stopped", None), ("running", 2**22 + 1)])
def test_a_run_that_stopped_says_where_and_how_to_go_on(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], state: str, pid: int | None
) -> None:
    """A killed one says so itself no more: its process is gone."""
    run = make_run(here / "runs" / "q")
    run.set_status(state, "sft")
    if pid is not None:
        run.write_json("status.json", run.status() | {"pid": pid})
    assert call(*words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "It stopped in sft. Go on with it: lora-rlhf run runs/q/recipe.yaml --name q" in said
    assert said.endswith("--resume")


def test_a_run_at_work_is_to_be_waited_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(here / "runs" / "q")
    run.set_status("running", "sft")
    assert call("export", "q", "--adapter", "policy") == 2
    assert "It is at work in sft. Wait for it." in " ".join(capsys.readouterr().err.split())


def test_an_export_never_overwrites(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(here / "runs" / "quickstart", "sft")
    run.adapter("sft").mkdir(parents=True)
    (run.adapter("sft") / "adapter_config.json").write_text("{}", encoding="utf-8")
    (here / "out").mkdir()
    (here / "out" / "mine").touch()
    assert call("export", "quickstart", "--adapter", "sft", "--to", "out") == 2
    assert "out exists. Give another directory with --to." in capsys.readouterr().err


def test_doctor_exits_with_what_it_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for healthy, code in ((True, 0), (False, 2)):
        module = ModuleType("lora_rlhf.doctor")
        module.run_doctor = lambda console, healthy=healthy: healthy  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lora_rlhf.doctor", module)
        assert call("doctor") == code
