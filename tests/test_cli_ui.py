"""The command `lora-rlhf ui`, up to where the app takes over."""

import io
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_rlhf.cli import app

Calls = list[dict[str, Any]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """An app that serves nothing, and remembers how it was opened."""
    calls: Calls = []
    module = ModuleType("ui.opening")
    module.main = lambda runs, **options: calls.append({"runs": runs, **options})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ui.opening", module)
    return calls


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        app(["ui", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_help_takes_less_than_a_second_and_loads_neither_torch_nor_gradio() -> None:
    """Seconds of the processor, in a fresh interpreter, so that a busy machine does not decide."""
    code = (
        "import sys; sys.argv = ['lora-rlhf', 'ui', '--help']\n"
        "from lora_rlhf.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'gradio', 'huggingface_hub'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert "lora-rlhf ui quickstart" in result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_nobody_but_this_machine_by_default(here: Path, opened: Calls) -> None:
    assert call() == 0
    (made,) = opened
    settings = made["settings"]
    assert (settings.host, settings.port, settings.users) == ("127.0.0.1", None, None)
    assert not settings.open_to_all
    assert (made["runs"], made["runs_dir"], made["store"]) == ([], Path("runs"), "rankings.db")


def test_everything_that_is_asked_for_arrives(here: Path, opened: Calls) -> None:
    options = "--port 9000 --users u.txt --host-name a.example --host-name b.example --open"
    where = "--runs-dir r --store postgresql:///votes --root-path https://a.example/x --listen"
    assert call("one", "two", *options.split(), *where.split()) == 0
    (made,) = opened
    settings = made["settings"]
    assert (made["runs"], made["runs_dir"], made["store"]) == (
        ["one", "two"],
        Path("r"),
        "postgresql:///votes",
    )
    assert (settings.host, settings.port, settings.users) == ("0.0.0.0", 9000, Path("u.txt"))
    assert settings.host_names == ("a.example", "b.example")
    assert (settings.root_path, settings.open_browser) == ("https://a.example/x", True)


def test_an_address_that_is_given_is_kept_when_listening(here: Path, opened: Calls) -> None:
    assert call("--listen", "--host", "192.0.2.1") == 0
    assert opened[0]["settings"].host == "192.0.2.1"


def test_nothing_makes_a_tunnel(here: Path, opened: Calls) -> None:
    assert call("--share") == 2
    assert opened == []


# -- users --------------------------------------------------------------------------------------


def test_a_user_is_added_from_a_pipe(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ui.users import Users

    monkeypatch.setattr(sys, "stdin", io.StringIO("correct horse\nand the rest\n"))
    assert call("--add-user", "ana", "--admin", "--users", "users.txt") == 0
    assert capsys.readouterr().out == "Added ana as an admin in users.txt\n"
    users = Users(here / "users.txt")
    assert users.role("ana") == "admin"
    assert users.check("ana", "correct horse")
    assert not users.check("ana", "correct horse\n")


def test_a_password_that_is_typed_is_asked_for_twice(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ui.users import Users

    asked: list[dict[str, Any]] = []

    def prompt(text: str, **options: Any) -> str:
        asked.append(options)
        return "correct horse"

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("typer.prompt", prompt)
    assert call("--add-user", "bob", "--users", "users.txt") == 0
    assert asked == [{"hide_input": True, "confirmation_prompt": True}]
    assert Users(here / "users.txt").role("bob") == "labeler"
    assert "Added bob as a labeler" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--admin"], "give --add-user NAME"),
        (["--add-user", "ana"], "needs the file to write to: --users FILE"),
        (["--add-user", "local-1", "--users", "u"], "'local-1' is no name of a user"),
        (["--add-user", "a:admin", "--users", "u"], "'a:admin' is no name of a user"),
        (["--add-user", "ana", "--users", "u"], "The password has 5 characters. Allowed: 8"),
    ],
)
def test_what_cannot_be_added_is_said(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n"))
    assert call(*arguments) == 2
    assert says in capsys.readouterr().err
    assert not (here / "u").exists()


# -- refusals before anything is loaded -----------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--listen", "--host 0.0.0.0", "--host 192.0.2.1"])
def test_others_are_not_let_in_without_a_login(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert call(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert "nobody would have to log in" in error
    assert "--users FILE" in error
    assert "--i-know-it-is-open" in error


def test_a_proxy_in_front_lets_others_in_too(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--host-name", "votes.example") == 2
    assert "Others could reach the app through a proxy" in capsys.readouterr().err


def test_no_run_yet(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2
    assert "runs has no run with an adapter yet" in capsys.readouterr().err


def test_a_run_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("quickstrat") == 2
    assert "quickstrat is not a run. runs has none yet" in capsys.readouterr().err
