"""A small app served for real, and visitors that speak HTTP to it."""

import json
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
from fastapi.openapi.utils import get_openapi

from ui import users as users_module
from ui.people import person_of, require_admin
from ui.server import Running, Settings, start
from ui.users import add_user
from ui.wiring import told

STRONG = users_module._N, users_module._R, users_module._P  # before `quick_passwords`
PASSWORDS = {"ana": "correct horse", "bob": "battery staple"}  # ana is the admin
STEPS, STEP_SECONDS = 5, 0.15


def small_app() -> gr.Blocks:
    """Handlers of every kind the real app has; each is known by its api_name."""
    with gr.Blocks(title="small") as app:
        text = gr.Textbox()
        kept = gr.State("")
        file = gr.DownloadButton()
        hidden = gr.Button(visible=False)

        def whoami(request: gr.Request) -> str:
            person = person_of(request)
            return f"{person.name} {person.is_admin} {person.session}"

        def export(request: gr.Request) -> str:
            require_admin(person_of(request), "Exporting")
            return "everything"

        def count(prompt: str) -> Iterator[str]:
            for step in range(STEPS):
                time.sleep(STEP_SECONDS)
                yield f"{prompt} {step}"

        def keep(new: str) -> tuple[str, str]:
            return new, new

        def make() -> str:
            path = Path(tempfile.mkdtemp()) / "votes.jsonl"
            path.write_text("{}\n")
            return str(path)

        hidden.click(whoami, None, text, api_name="whoami")
        hidden.click(whoami, None, text, api_name="whoami_now", queue=False)
        hidden.click(told(export), None, text, api_visibility="private", queue=False)
        hidden.click(count, text, text, api_name="count", concurrency_limit=8)
        hidden.click(keep, text, [kept, text], api_name="keep")
        hidden.click(lambda kept: kept, kept, text, api_name="recall")
        hidden.click(make, None, file, api_name="make")
        hidden.click(lambda: "called", None, text, api_name="plain_now", queue=False)
    return app


@contextmanager
def quick_passwords() -> Iterator[None]:
    """Hashes that take a millisecond, for tests that log in again and again."""
    strong = users_module._N, users_module._P
    users_module._N, users_module._P = 2**4, 1
    try:
        yield
    finally:
        users_module._N, users_module._P = strong


def users_file(folder: Path) -> Path:
    path = folder / "users.txt"
    for name, password in PASSWORDS.items():
        add_user(path, name, password, admin=name == "ana")
    return path


@contextmanager
def served(settings: Settings | None = None, **options: Any) -> Iterator[Running]:
    running = start(small_app, settings or Settings(port=0), **options)
    try:
        yield running
    finally:
        running.close()


class Visitor(httpx.Client):
    """A browser's page as far as HTTP goes: cookies, a session, calls of handlers by name."""

    def __init__(self, running: Running, **options: Any) -> None:
        # No proxy of the environment may stand between.
        super().__init__(base_url=running.url, trust_env=False, timeout=30, **options)
        self.running = running
        self.session = secrets.token_hex(6)
        self.page = ""
        fns = running._blocks.fns.values()
        self.functions = {fn.api_name if fn.api_name else fn.name: fn._id for fn in fns}

    def open(self) -> "Visitor":
        self.page = self.get("/").raise_for_status().text
        return self

    def page_scripts(self) -> list[str]:
        """Paths of the scripts that the page loads first."""
        return [
            src.removeprefix(".")
            for src in re.findall(r'src="(\./assets/[^"]+)"', self.open().page)
        ]

    def login(self, name: str, password: str | None = None) -> httpx.Response:
        form = {"username": name, "password": password or PASSWORDS[name]}
        return self.post("/login", data=form)

    def body(self, function: str, *data: Any) -> dict[str, Any]:
        return {
            "data": list(data),
            "fn_index": self.functions[function],
            "session_hash": self.session,
        }

    def now(self, function: str, *data: Any) -> httpx.Response:
        """Call a handler that has queue=False."""
        return self.post("/gradio_api/run/predict", json=self.body(function, *data))

    def join(self, function: str, *data: Any) -> httpx.Response:
        return self.post("/gradio_api/queue/join", json=self.body(function, *data))

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """The messages of the page's stream, each with its time of arrival."""
        path = f"/gradio_api/queue/data?session_hash={self.session}"
        with self.stream("GET", path) as stream:
            stream.raise_for_status()
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield time.perf_counter(), json.loads(line[6:])

    def ask(self, function: str, *data: Any) -> Any:
        """Call a handler through the queue; its first output."""
        self.join(function, *data).raise_for_status()
        for _, message in self.events():
            if message["msg"] == "process_completed":
                return message["output"]["data"][0]
        raise AssertionError("the stream ended before the handler did")

    def whoami(self) -> tuple[str, bool, str]:
        name, is_admin, session = (
            self.now("whoami_now").raise_for_status().json()["data"][0].split()
        )
        return name, is_admin == "True", session


def gradio_routes(running: Running) -> list[tuple[str, str]]:
    """Every route of the Gradio that is installed, as (method, path), blanks filled in."""
    schema = get_openapi(title="", version="", routes=running._gradio.routes)
    return [
        (method.upper(), re.sub(r"\{[^}]*\}", "0", path))
        for path, methods in schema["paths"].items()
        for method in methods
    ]
