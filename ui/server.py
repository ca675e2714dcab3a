"""Serves the app: where, to whom, and how it stops. Imports gradio when it serves, not before.

Gradio is mounted into an app of our own rather than launched: `launch` binds a free port on its
own, asks itself for a page through whatever proxy the environment names, can open a tunnel, and
puts every middleware inside its own ones.
"""

import asyncio
import errno
import os
import shutil
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lora_rlhf.errors import ConfigError
from ui.hosts import Hosts, is_loopback
from ui.logins import Door, Tokens
from ui.people import People
from ui.security import Guard
from ui.users import Users

if TYPE_CHECKING:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from ui.studio import Studio

FIRST_PORT, PORTS = 7860, 100
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
MOST_WAITING_CALLS = 64
CALLS_AT_ONCE = 16  # of one handler, by as many people
MOST_SESSIONS = 500
MOST_CONNECTIONS = 512
_REFUSED: dict[int | None, tuple[str, str]] = {  # why, and what to do
    errno.EADDRINUSE: (
        "another program has it",
        "Leave --port away for the next free one, or stop that program.",
    ),
    errno.EACCES: ("only an administrator may", "Give a --port from 1024 on."),
    errno.EADDRNOTAVAIL: ("it is no address of this machine", "Give another --host."),
}
_STOP_SECONDS = 3
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """How the app is served.

    Attributes:
        host: to bind to; other than loopback needs users, or `open_to_all`.
        port: unset: 7860, or the next one that is free.
        users: the file of who may log in; unset: nobody has to.
        open_to_all: others may reach the server, and nobody has to log in: said by the user.
        host_names: names of this server besides those of the loopback, such as its proxy's.
        root_path: where a proxy serves it: a path or a whole URL.
        open_browser: open the page once it is there.
    """

    host: str = LOOPBACK
    port: int | None = None
    users: Path | None = None
    open_to_all: bool = False
    host_names: tuple[str, ...] = ()
    root_path: str = ""
    open_browser: bool = False

    @property
    def behind_proxy(self) -> bool:
        """A proxy serves it under a name or a path of its own."""
        return bool(self.host_names or self.root_path)

    def check(self) -> Users | None:
        """The users, if any.

        Raises:
            ConfigError: others could reach the server without a login, or the file of users is
                no good.
        """
        if self.users is not None:
            return Users(self.users)
        if self.open_to_all or (is_loopback(self.host) and not self.behind_proxy):
            return None
        reached = "through a proxy" if is_loopback(self.host) else f"on {self.host}"
        raise ConfigError(
            f"Others could reach the app {reached}, and nobody would have to log in. Make users: "
            "lora-rlhf ui --add-user NAME --admin --users FILE, then add --users FILE. Or let "
            "everybody in who finds it: --i-know-it-is-open"
        )


# -- the environment ----------------------------------------------------------------------------


def prepare_environment() -> None:
    """Set what Gradio and the hub read from the environment; before either is imported.

    Variables of Gradio's would open what is closed here: GRADIO_ALLOWED_PATHS files of this
    machine, GRADIO_MCP_SERVER a second interface, GRADIO_VIBE_MODE an editor of this code.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    # The base and the data were fetched when the run was made; nothing more is asked for.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


# -- the server ---------------------------------------------------------------------------------


def bind(host: str, port: int | None) -> socket.socket:
    """A socket that listens on the port, or on the first one free from 7860 on.

    Raises:
        ConfigError: taken, not allowed, or no address of this machine.
    """
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    problem: OSError | None = None
    for each in ports:
        try:
            return socket.create_server((host, each), family=family)
        except (OSError, OverflowError) as error:
            problem = error if isinstance(error, OSError) else OSError(str(error))
    tried = f"port {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    assert problem is not None
    why, then = _REFUSED.get(problem.errno, (str(problem), "Give another --port or --host."))
    raise ConfigError(f"{tried} of {host} cannot be used: {why}. {then}") from problem


@dataclass
class Running:
    """A server that answers, in a thread of its own.

    Attributes:
        url: of the page, for a browser on this machine.
        port: it listens on.
    """

    url: str
    port: int
    _blocks: "gr.Blocks"
    _server: "uvicorn.Server"
    _thread: threading.Thread
    _loop: asyncio.AbstractEventLoop
    _gradio: Any
    _guard: Guard
    _files: Path

    def stop(self) -> None:
        """Take no more calls, and end the streams that are open."""
        self._blocks._queue.close()
        self._blocks.is_running = False
        self._loop.call_soon_threadsafe(self._guard.stop)
        self._server.should_exit = True

    def close(self) -> None:
        """Stop, and wait until the port is free; seconds at most, whoever is still connected."""
        if self._thread.is_alive():
            self.stop()
            self._thread.join(2 * _STOP_SECONDS)
        shutil.rmtree(self._files, ignore_errors=True)


def start(
    build: "Callable[[], gr.Blocks]",
    settings: Settings,
    *,
    look: Mapping[str, Any] | None = None,
    secret: bytes | None = None,
    **limits: Any,
) -> Running:
    """Serve a Gradio app in a thread, and return once it answers.

    Args:
        build: makes the app; called when the environment is set.
        settings: where and to whom.
        look: theme, css, js and head of the app.
        secret: what names of people without a login are salted with; unset: a new one.
        limits: of `Guard`: most_body_bytes, burst, rate.

    Raises:
        ConfigError: of `Settings.check` and `bind`.
    """
    users = settings.check()
    listening = bind(settings.host, settings.port)
    files = Path(tempfile.mkdtemp(prefix="lora-rlhf-ui-"))  # mode 0700
    try:
        prepare_environment()
        os.environ["GRADIO_TEMP_DIR"] = str(files)  # what it writes, and serves as downloads
        os.environ["GRADIO_EXAMPLES_CACHE"] = str(files / "examples")
        blocks = build()
        loops: list[asyncio.AbstractEventLoop] = []
        app, gradio = _mounted(blocks, settings, users, look or {}, loops)
        guarded = Guard(
            app,
            people=_people(users, gradio, secret),
            hosts=Hosts(settings.host, settings.host_names, settings.root_path),
            files=files,
            behind_proxy=settings.behind_proxy,
            **limits,
        )
        server, thread = _in_thread(guarded, listening)
    except BaseException:
        listening.close()
        shutil.rmtree(files, ignore_errors=True)
        raise
    port = int(listening.getsockname()[1])
    return Running(
        _url(settings.host, port), port, blocks, server, thread, loops[0], gradio, guarded, files
    )


def _mounted(
    blocks: "gr.Blocks",
    settings: Settings,
    users: Users | None,
    look: Mapping[str, Any],
    loops: list[asyncio.AbstractEventLoop],
) -> tuple["FastAPI", Any]:
    """An app of our own with Gradio's in it, and Gradio's."""
    import gradio as gr
    from fastapi import FastAPI

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loops.append(asyncio.get_running_loop())
        yield

    blocks.analytics_enabled = False
    blocks.state_session_capacity = MOST_SESSIONS
    blocks.delete_cache = blocks.delete_cache or (3600, 86400)
    for handler in blocks.fns.values():
        handler.api_visibility = "private"  # or the page of the login would describe them
    blocks.queue(
        max_size=MOST_WAITING_CALLS, api_open=False, default_concurrency_limit=CALLS_AT_ONCE
    )
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        auth=Door(users).check if users else None,
        root_path=settings.root_path or None,
        allowed_paths=[],
        show_error=False,
        max_file_size="1kb",  # what could be uploaded, were uploads let through
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **look,
    )
    return app, app.routes[-1].app  # type: ignore[attr-defined]


def _people(users: Users | None, gradio: Any, secret: bytes | None) -> People:
    if users is None:
        return People(secret=secret)

    tokens = gradio.tokens = Tokens(users)
    return People(users, lambda cookies: tokens.login(cookies, gradio.cookie_id))


def _in_thread(app: Guard, listening: socket.socket) -> tuple["uvicorn.Server", threading.Thread]:
    import uvicorn

    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # addresses and paths of people
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True, name="http")
    thread.start()
    for _ in range(int(_START_SECONDS / 0.01)):
        if server.started or not thread.is_alive():
            break
        thread.join(0.01)
    if not server.started:
        raise RuntimeError("the web server did not start; the log above says why")
    return server, thread


def _url(host: str, port: int) -> str:
    name = {EVERYWHERE: LOOPBACK, "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


# -- until somebody stops it ---------------------------------------------------------------------


def serve(
    studio: "Studio",
    build: "Callable[[Studio], gr.Blocks]",
    settings: Settings,
    *,
    look: Mapping[str, Any] | None = None,
    secret: bytes | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve the app until somebody stops it, then cancel what runs and close the studio.

    Args:
        studio: what the handlers need.
        build: makes the app of it.
        settings: where and to whom.
        look: theme, css, js and head.
        secret: of `start`.
        say: is told where the app is.

    Raises:
        KeyboardInterrupt: Ctrl-C, once everything is closed. SIGTERM just ends it.
    """
    running: Running | None = None
    try:
        with _stoppable() as wait:
            running = start(lambda: build(studio), settings, look=look, secret=secret)
            say(_about(running, settings, studio.store.location))
            if settings.open_browser:
                webbrowser.open(running.url)
            wait()
    finally:
        if running is not None:
            running.stop()
        studio.close()
        if running is not None:
            running.close()


def _about(running: Running, settings: Settings, store: str) -> str:
    if settings.users is not None:
        who = f"the users of {settings.users}"
    elif settings.open_to_all:
        who = "everybody who finds it"
    else:
        who = "whoever uses this machine"
    line = f"{running.url}  for {who}  \u00b7  votes: {store}  \u00b7  stop: Ctrl-C"
    if settings.host not in (EVERYWHERE, "::"):
        return line
    return f"{line}\nFrom other machines: http://{own_address()}:{running.port}/"


def own_address() -> str:
    """What other machines of the network most likely reach this one by: an address, or its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            # No packet is sent: connecting a datagram socket only looks up the way out.
            route.connect(("192.0.2.1", 9))  # RFC 5737: nobody's
        except OSError:
            return socket.gethostname()
        return str(route.getsockname()[0])


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """Yields what waits for SIGTERM, which from now on ends nothing by itself."""
    asked = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield lambda: _wait(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(asked: threading.Event) -> None:
    while not asked.wait(1.0):  # in pieces: a signal is noticed between two of them at the latest
        pass
