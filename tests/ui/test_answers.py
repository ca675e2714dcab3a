"""Headers, cookies and the policy of what a real Gradio app answers, and that it still streams."""

import asyncio
import base64
import hashlib
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise

import httpx
import pytest

from tests.ui.served import STEP_SECONDS, STEPS, Visitor, quick_passwords, served, users_file
from ui.answers import policy
from ui.server import Running, Settings


@pytest.fixture(scope="module")
def open_app() -> Iterator[Running]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def closed_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with quick_passwords():
        users = users_file(tmp_path_factory.mktemp("users"))
        with served(Settings(port=0, users=users)) as running:
            yield running


@pytest.fixture
def visitor(open_app: Running) -> Iterator[Visitor]:
    with Visitor(open_app) as visitor:
        yield visitor


def directives(answer: httpx.Response) -> dict[str, set[str]]:
    parts = [part.split() for part in answer.headers["content-security-policy"].split(";")]
    return {part[0]: set(part[1:]) for part in parts}


# -- headers --------------------------------------------------------------------------------------


ANSWERS = {
    "page": ("GET", "/", 200),
    "json": ("GET", "/gradio_api/app_id", 200),
    "call": ("POST", "/gradio_api/run/predict", 200),
    "style": ("GET", "/theme.css", 200),
    "not found by us": ("GET", "/nothing/here", 404),
    "not found by Gradio": ("GET", "/assets/nothing.js", 404),
    "uploads": ("POST", "/gradio_api/upload", 403),
    "wrong method": ("PUT", "/", 405),
    "not valid": ("POST", "/gradio_api/cancel", 422),
    "a handler that fails": ("POST", "/gradio_api/queue/join", 400),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_every_answer_has_the_headers(visitor: Visitor, kind: str) -> None:
    method, path, code = ANSWERS[kind]
    body = visitor.body("whoami_now")
    if kind == "a handler that fails":
        body["fn_index"] = 999
    if kind == "not valid":
        body = {"session_hash": visitor.session}
    answer = visitor.request(method, path, json=body if method == "POST" else None)
    if kind == "a handler that fails":
        assert answer.status_code >= 400
    else:
        assert answer.status_code == code
    check_headers(answer)


def test_a_stream_has_the_headers(visitor: Visitor) -> None:
    visitor.join("count", "x")
    path = f"/gradio_api/queue/data?session_hash={visitor.session}"
    with visitor.stream("GET", path) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        check_headers(stream)


def test_the_login_has_the_headers(closed_app: Running) -> None:
    with Visitor(closed_app) as visitor:
        for answer in (visitor.get("/"), visitor.login("ana", "wrong"), visitor.login("ana")):
            check_headers(answer)
        check_headers(visitor.get("/logout"))


def check_headers(answer: httpx.Response) -> None:
    headers = answer.headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "camera=()" in headers["permissions-policy"]
    assert len(headers.get_list("content-security-policy")) == 1
    assert "server" not in headers
    assert not [name for name in headers if name.startswith("access-control-")]


def test_no_other_origin_is_let_in_by_cors(visitor: Visitor) -> None:
    """Gradio's own CORS answers any origin when the host is no loopback, with credentials."""
    own = str(visitor.base_url).rstrip("/")
    answer = visitor.get("/gradio_api/app_id", headers={"origin": own})
    assert answer.status_code == 200
    check_headers(answer)
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = visitor.options("/gradio_api/queue/join", headers=preflight)
    assert answer.status_code == 405
    check_headers(answer)


def test_what_is_of_a_person_is_not_kept_by_a_cache(visitor: Visitor) -> None:
    for path in ("/", "/gradio_api/app_id"):
        assert visitor.get(path).headers["cache-control"] == "no-store"
    script = visitor.page_scripts()[0]
    assert "immutable" in visitor.get(script).headers["cache-control"]
    assert "immutable" not in visitor.get("/assets/nothing.js").headers.get("cache-control", "")


# -- the policy -----------------------------------------------------------------------------------


def test_the_policy_lets_nothing_in_or_out(visitor: Visitor) -> None:
    allowed = directives(visitor.get("/gradio_api/app_id"))
    assert allowed["default-src"] == {"'none'"}
    assert allowed["connect-src"] == {"'self'"}
    assert allowed["img-src"] == {"'self'", "data:", "blob:"}
    assert allowed["script-src"] == {"'self'", "'unsafe-eval'"}
    assert allowed["style-src"] == {"'self'", "'unsafe-inline'"}
    assert allowed["base-uri"] == allowed["form-action"] == {"'self'"}
    for name in ("frame-ancestors", "frame-src", "object-src", "script-src-attr"):
        assert allowed[name] == {"'none'"}
    sources = {source for sources in allowed.values() for source in sources}
    assert not {s for s in sources if "*" in s or "http" in s or s.startswith("ws")}


class _Inline(HTMLParser):
    """The text of the inline scripts of a page, by the parser of the standard library."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script" and "src" not in dict(attrs)
        if self._inside:
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def test_scripts_in_the_page_run_by_their_hash_and_no_others(visitor: Visitor) -> None:
    answer = visitor.get("/")
    parser = _Inline()
    parser.feed(answer.text)
    assert len(parser.texts) >= 3
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in parser.texts
    }
    assert directives(answer)["script-src"] == {"'self'", "'unsafe-eval'", *hashes}
    assert "'unsafe-inline'" not in policy(" 'sha256-x'").split("style-src")[0]


# -- cookies --------------------------------------------------------------------------------------


def test_who_has_no_login_gets_an_id_once(visitor: Visitor) -> None:
    (cookie,) = visitor.get("/").headers.get_list("set-cookie")
    name, _, rest = cookie.partition("=")
    value, *flags = rest.split("; ")
    assert name == "lora-rlhf-id"
    assert len(bytes.fromhex(value)) == 16
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(flags)
    assert "Secure" not in flags
    first = visitor.whoami()
    assert value not in first[0] + first[2]
    assert "set-cookie" not in visitor.get("/").headers
    assert visitor.whoami() == first


def test_the_first_call_knows_who_asks_already(open_app: Running) -> None:
    with Visitor(open_app) as visitor:
        name = visitor.whoami()[0]
        assert visitor.whoami()[0] == name
    with Visitor(open_app) as other:
        assert other.whoami()[0] != name


@pytest.mark.parametrize("forged", ["x", "0" * 31, "0" * 33, "Z" * 32, "../../x"])
def test_an_id_that_is_none_is_replaced(open_app: Running, forged: str) -> None:
    with Visitor(open_app, cookies={"lora-rlhf-id": forged}) as visitor:
        (cookie,) = visitor.get("/").headers.get_list("set-cookie")
        assert f"={forged};" not in cookie


def test_the_cookies_of_a_login_stay_at_home(closed_app: Running) -> None:
    with Visitor(closed_app) as visitor:
        assert "set-cookie" not in visitor.get("/").headers
        cookies = visitor.login("ana").headers.get_list("set-cookie")
        assert len(cookies) == 2
        for cookie in cookies:
            assert "HttpOnly" in cookie
            assert cookie.lower().count("samesite=") == 1
            assert "SameSite=Strict" in cookie


def test_over_tls_every_cookie_is_secure() -> None:
    with quick_passwords():
        settings = Settings(port=0, open_to_all=True, host_names=("votes.example",))
        with served(settings) as running, Visitor(running) as visitor:
            headers = {"host": "votes.example", "x-forwarded-proto": "https"}
            (cookie,) = visitor.get("/", headers=headers).headers.get_list("set-cookie")
            assert "Secure" in cookie.split("; ")


# -- streams --------------------------------------------------------------------------------------


def test_answers_stream_as_they_grow(visitor: Visitor) -> None:
    """A handler that yields every 0.15 s: each piece arrives while the next one is made."""
    visitor.join("count", "x").raise_for_status()
    times = [at for at, m in visitor.events() if m["msg"] == "process_generating"]
    pieces = times[:STEPS]
    assert len(pieces) == STEPS
    spread = pieces[-1] - pieces[0]
    assert spread > 0.6 * (STEPS - 1) * STEP_SECONDS
    late = [after - before for before, after in pairwise(pieces)]
    assert max(late) < 0.7 * spread


def test_a_heartbeat_begins_at_once(visitor: Visitor) -> None:
    start = time.perf_counter()
    with visitor.stream("GET", f"/gradio_api/heartbeat/{visitor.session}") as stream:
        assert next(stream.iter_lines()) == "data: ALIVE"
        assert time.perf_counter() - start < 5


def test_the_page_comes_whole(open_app: Running, visitor: Visitor) -> None:
    """It is held back until its scripts are known; what is sent is still what Gradio made."""
    inside = httpx.ASGITransport(app=open_app._gradio)

    async def fetch() -> str:
        async with httpx.AsyncClient(transport=inside, base_url=open_app.url) as client:
            return (await client.get("/")).text

    assert visitor.get("/").text == asyncio.run(fetch())
