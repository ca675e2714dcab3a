"""Where the app is served, to whom, with which environment, and how it stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lora_rlhf.errors import ConfigError
from tests.ui.served import Visitor, quick_passwords, served, small_app, users_file
from ui import server
from ui.server import FIRST_PORT, Settings, bind, prepare_environment, start

ROOT = Path(__file__).resolve().parents[2]


# -- to whom --------------------------------------------------------------------------------------


def test_by_default_this_machine_alone() -> None:
    with served() as running:
        assert Settings().host == "127.0.0.1"
        assert running.url == f"http://127.0.0.1:{running.port}/"
        (listening,) = running._server.servers
        assert {s.getsockname()[0] for s in listening.sockets} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "settings",
    [
        Settings(host="0.0.0.0"),
        Settings(host="::"),
        Settings(host="192.0.2.1"),
        Settings(host="votes.example"),
        Settings(host_names=("votes.example",)),
        Settings(root_path="/votes"),
    ],
)
def test_others_need_a_login_or_the_word_that_it_is_open(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"--add-user.*--i-know-it-is-open"):
        settings.check()
    with pytest.raises(ConfigError, match="nobody would have to log in"):
        start(small_app, settings)
    opened = Settings(**{**settings.__dict__, "open_to_all": True})
    assert opened.check() is None


def test_with_users_others_may_come(tmp_path: Path) -> None:
    with quick_passwords():
        path = users_file(tmp_path)
        users = Settings(host="0.0.0.0", users=path).check()
        assert users is not None
        assert users.names() == ["ana", "bob"]
        path.chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            Settings(host="0.0.0.0", users=path).check()


# -- where ----------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_a_port_that_is_taken_is_said(taken: int) -> None:
    with pytest.raises(ConfigError, match=f"port {taken} of 127.0.0.1 cannot be used") as told:
        bind("127.0.0.1", taken)
    assert "another program has it. Leave --port away" in str(told.value)
    assert "Errno" not in str(told.value)


def test_other_machines_are_told_an_address_that_reaches_it() -> None:
    settings = Settings(host="0.0.0.0", port=0, open_to_all=True)
    with served(settings) as running:
        here, *others = server._about(running, settings, "votes.db").splitlines()
        assert here.startswith(f"http://127.0.0.1:{running.port}/")
        (line,) = others
        url = line.removeprefix("From other machines: ")
        assert url != line
        name = url.removeprefix("http://").partition(":")[0]
        assert name != "127.0.0.1"
        if name != socket.gethostname():  # else there is no network, and it may not resolve
            assert httpx.get(url, trust_env=False, timeout=20).is_success
    with served() as running:
        assert "\n" not in server._about(running, Settings(), "votes.db")


def test_without_a_network_the_address_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unconnected(socket.socket):
        def connect(self, address: object) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", Unconnected)
    assert server.own_address() == socket.gethostname()


def test_the_next_free_port_is_found(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    monkeypatch.setattr(server, "FIRST_PORT", taken)
    with bind("127.0.0.1", None) as listening:
        assert taken < listening.getsockname()[1] <= taken + server.PORTS
    assert FIRST_PORT == 7860
    monkeypatch.setattr(server, "PORTS", 1)
    with pytest.raises(ConfigError, match=f"ports {taken} to {taken}"):
        bind("127.0.0.1", None)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "a b"])
def test_an_address_that_is_not_of_this_machine_is_said(host: str) -> None:
    with pytest.raises(ConfigError, match=f"port 0 of {host} cannot be used"):
        bind(host, 0)


def test_the_port_is_free_again_when_the_server_could_not_start() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ZeroDivisionError):
        start(broken, Settings(port=port))  # type: ignore[arg-type]
    with served(Settings(port=port)) as running:
        assert running.port == port


def test_under_a_path_of_a_proxy_the_page_knows_where_it_is() -> None:
    settings = Settings(port=0, root_path="https://votes.example/app", open_to_all=True)
    with served(settings) as running, Visitor(running) as visitor:
        page = visitor.get("/", headers={"host": "votes.example"}).text
        assert '"root":"https://votes.example/app"' in page


# -- the environment ------------------------------------------------------------------------------


def test_variables_of_gradio_open_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for name, value in {
        "GRADIO_ALLOWED_PATHS": str(tmp_path),
        "GRADIO_SHARE": "True",
        "GRADIO_MCP_SERVER": "True",
        "GRADIO_VIBE_MODE": "1",
        "GRADIO_ANALYTICS_ENABLED": "True",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_ROOT_PATH": "/elsewhere",
    }.items():
        monkeypatch.setenv(name, value)
    with served() as running, Visitor(running) as visitor:
        kept = {name for name in os.environ if name.startswith("GRADIO_")}
        assert kept == {"GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"}
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert running._blocks.allowed_paths == []
        assert not running._blocks.share
        assert not running._blocks.analytics_enabled
        assert '"root":"http://127.0.0.1' in visitor.open().page
        assert visitor.get(f"/gradio_api/file={secret}").status_code == 403


def test_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    prepare_environment()
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # by somebody who knows why
    prepare_environment()
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_downloads_lie_where_nobody_else_looks_and_go_with_the_server() -> None:
    with served() as running:
        assert running._files.stat().st_mode & 0o777 == 0o700
        with Visitor(running) as visitor:
            assert visitor.open().ask("make")["path"].startswith(f"{running._files}/")
    assert not running._files.exists()


# -- a process of its own -------------------------------------------------------------------------


SCRIPT = """
    import sys, threading
    sys.path.insert(0, {root!r})
    connections = []
    def hook(event, arguments):
        if event == "socket.connect":
            connections.append(arguments[1])
        if event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost"):
            connections.append(arguments[0])
    sys.addaudithook(hook)
    import ui.opening
    from ui import server
    assert "gradio" not in sys.modules
    class Store:
        location = "votes.db"
    class Studio:
        store = Store()
        def close(self):
            print("studio closed", flush=True)
    def build(studio):
        from tests.ui.served import small_app
        app = small_app()
        print("analytics", app.analytics_enabled, flush=True)
        return app
    def main(*_, settings, say, **options):
        try:
            server.serve(Studio(), build, settings, say=say)
        finally:
            outside = [c for c in connections if not (isinstance(c, tuple) and c[0] == "127.0.0.1")]
            print("outside", outside, flush=True)
    ui.opening.main = main
    from lora_rlhf.cli import main as command
    sys.argv = ["lora-rlhf", "ui", "--port", "0"]
    command()
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    script = textwrap.dedent(SCRIPT).format(root=str(ROOT))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRADIO_", "HF_"))}
    started = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    yield started
    started.kill()
    started.wait()


def url_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The address it says, and everything it said up to there."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("http://"):
            return line.split()[0], said
    raise AssertionError(said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_stops_when_it_is_told_also_in_mid_stream(
    process: subprocess.Popen[str], number: int, code: int
) -> None:
    url, said = url_of(process)
    assert "for whoever uses this machine" in said
    assert "votes: votes.db" in said
    session = {"session_hash": "abc", "data": ["a secret prompt"], "fn_index": 3}
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
        client.get("/").raise_for_status()
        client.post("/gradio_api/queue/join", json=session).raise_for_status()
        with (
            client.stream("GET", "/gradio_api/heartbeat/abc") as heartbeat,
            client.stream("GET", "/gradio_api/queue/data?session_hash=abc") as stream,
        ):
            # Both are kept: an iterator that is let go closes its connection.
            beats, lines = heartbeat.iter_lines(), stream.iter_lines()
            next(beats)
            assert any("process_generating" in line for line in lines)
            start_of_end = time.perf_counter()
            process.send_signal(number)
            assert process.wait(90) == code
            assert time.perf_counter() - start_of_end < 12
    assert process.stdout is not None
    rest = process.stdout.read()
    assert "studio closed" in rest
    assert "Traceback" not in rest
    assert "Cancel" not in rest, "a stream had to be cut off"
    assert "secret" not in said + rest
    assert ("Stopped." in rest) is (code == 130)


def test_nothing_is_asked_of_anybody_outside(process: subprocess.Popen[str]) -> None:
    """The process reports every address it looked up or connected to, by an audit hook."""
    url, said = url_of(process)
    assert "analytics False" in said
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
        page = client.get("/").text
        body = {"session_hash": "abc", "data": [], "fn_index": 7}
        answer = client.post("/gradio_api/run/predict", json=body)
        assert json.loads(answer.text)["data"] == ["called"]
    assert "gradio_config" in page
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert "outside []" in process.stdout.read()
