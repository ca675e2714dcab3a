"""The middleware in front of a real Gradio app, asked over HTTP: who is let in, to what."""

import asyncio
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ui.served import (
    PASSWORDS,
    Visitor,
    gradio_routes,
    quick_passwords,
    served,
    small_app,
    users_file,
)
from ui import security
from ui.asked import ROUTES
from ui.server import Running, Settings
from ui.users import Users, add_user

UPLOADS = ("/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/upload?upload_id=x")


@pytest.fixture(scope="module")
def open_app() -> Iterator[Running]:
    """On this machine, without logins."""
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def closed_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With logins."""
    with quick_passwords():
        users = users_file(tmp_path_factory.mktemp("users"))
        with served(Settings(port=0, users=users)) as running:
            yield running


@pytest.fixture(scope="module")
def bare_app() -> Iterator[str]:
    """The same app as Gradio launches it: what the middleware is there for."""
    app = small_app()
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, share=False)
    yield url
    app.close(verbose=False)


@pytest.fixture
def visitor(open_app: Running) -> Iterator[Visitor]:
    with Visitor(open_app) as visitor:
        yield visitor.open()


@pytest.fixture
def stranger(closed_app: Running) -> Iterator[Visitor]:
    """Not logged in."""
    with Visitor(closed_app) as visitor:
        yield visitor


@pytest.fixture
def ana(closed_app: Running) -> Iterator[Visitor]:
    """The admin, logged in."""
    with Visitor(closed_app) as visitor:
        assert visitor.login("ana").json() == {"success": True}
        yield visitor


@pytest.fixture
def bob(closed_app: Running) -> Iterator[Visitor]:
    """A labeler, logged in."""
    with Visitor(closed_app) as visitor:
        assert visitor.login("bob").json() == {"success": True}
        yield visitor


def is_listed(method: str, path: str) -> bool:
    return any(method in r.methods.split() and re.fullmatch(r.path, path) for r in ROUTES)


# -- what is served at all ------------------------------------------------------------------------


def test_what_the_page_needs_works_through_it(visitor: Visitor) -> None:
    assert "window.gradio_config" in visitor.page
    name, is_admin, _ = visitor.whoami()
    assert name.startswith("local-")
    assert is_admin
    assert visitor.ask("whoami").startswith(name)
    visitor.join("keep", "kept between calls")
    assert [m["output"]["data"][1] for _, m in visitor.events() if "output" in m] == [
        "kept between calls"
    ]
    assert visitor.ask("recall", None) == "kept between calls"
    made = visitor.ask("make")
    assert visitor.get(f"/gradio_api/file={made['path']}").text == "{}\n"
    assert visitor.post("/gradio_api/reset", json={"event_id": "x"}).json() == {"success": True}
    assert visitor.get("/gradio_api/app_id").json()["app_id"]
    assert visitor.get("/theme.css").status_code == 200


def test_of_gradio_s_routes_only_the_listed_ones_answer(visitor: Visitor) -> None:
    """Asked of the routes of the Gradio that is installed, so that new ones are closed, too."""
    routes = gradio_routes(visitor.running)
    closed = [(method, path) for method, path in routes if not is_listed(method, path)]
    assert len(closed) > 40
    answers = {(m, p): visitor.request(m, p, json={}).status_code for m, p in closed}
    assert {k: v for k, v in answers.items() if v not in (403, 404, 405)} == {}


@pytest.mark.parametrize(
    "path",
    [
        "/config",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/token",
        "/gradio_api/user",
        "/gradio_api/startup-events",
        "/monitoring/summary",
        "/robots.txt",
    ],
)
def test_gradio_alone_would_answer(bare_app: str, visitor: Visitor, path: str) -> None:
    assert httpx.get(bare_app.rstrip("/") + path, trust_env=False).status_code == 200
    assert visitor.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/monitoring"])
def test_no_descriptions_and_no_monitoring(visitor: Visitor, path: str) -> None:
    assert visitor.get(path).status_code == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GET"])
def test_a_route_takes_its_own_methods_alone(visitor: Visitor, method: str) -> None:
    answer = visitor.request(method, "/gradio_api/queue/join")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


def test_queued_handlers_are_not_called_past_the_queue(visitor: Visitor) -> None:
    assert visitor.now("count", "x").status_code == 404


def test_a_web_socket_is_refused(open_app: Running) -> None:
    line = first_line(
        open_app,
        b"GET /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )
    assert line == b"HTTP/1.1 405 Method Not Allowed"


def test_a_web_socket_is_refused_by_whatever_server_speaks_it(open_app: Running) -> None:
    """Ours does not; the middleware would not let it through either."""
    guard = open_app._server.config.app
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# -- uploads and files ----------------------------------------------------------------------------


def test_gradio_alone_takes_uploads(bare_app: str) -> None:
    files = {"files": ("x.html", b"<script>1</script>")}
    url = bare_app.rstrip("/") + UPLOADS[0]
    assert httpx.post(url, files=files, trust_env=False).status_code == 200


@pytest.mark.parametrize("path", [*UPLOADS, "/gradio_api/component_server"])
@pytest.mark.parametrize("who", ["visitor", "stranger", "bob", "ana"])
def test_nothing_is_uploaded(request: pytest.FixtureRequest, who: str, path: str) -> None:
    someone = request.getfixturevalue(who)
    folder = someone.running._files
    before = sorted(folder.rglob("*"))
    answer = someone.post(path, files={"files": ("x.html", b"<script>1</script>")})
    assert answer.status_code == 403
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("who", ["visitor", "stranger", "ana"])
@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "//etc/passwd",
        "{files}/../../etc/passwd",
        "/proc/self/environ",
        "{here}",
        "app.py",
        "ui/app.py",
        "rankings.db",
        "http://127.0.0.1:1/x",
        "https://example.com/x",
        "file:///etc/passwd",
        "{files}",
        "{files}/%00",
        "x" * 5000,
    ],
)
def test_no_file_of_this_machine_is_served(
    request: pytest.FixtureRequest, who: str, name: str
) -> None:
    someone = request.getfixturevalue(who)
    path = name.format(here=__file__, files=someone.running._files)
    for prefix in ("/gradio_api/file=", "/gradio_api/file/", "/file="):
        answer = someone.get(httpx.URL(f"{someone.base_url}{prefix.lstrip('/')}{path}"))
        assert 400 <= answer.status_code < 500
        assert "root:" not in answer.text


def test_an_address_is_not_fetched_for_whoever_asks(
    visitor: Visitor, bare_app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio would ask it of its own machine's network; here nothing is even looked up."""
    import gradio.routes

    asked: list[str] = []

    async def fetch(url: str, request: Any) -> Any:
        asked.append(url)
        raise gradio.routes.HTTPException(502)

    monkeypatch.setattr(gradio.routes, "secure_url_stream_response", fetch)
    path = "/gradio_api/file=https://example.com/x"
    httpx.get(bare_app.rstrip("/") + path, trust_env=False)
    assert asked == ["https://example.com/x"]
    assert visitor.get(path).status_code == 403
    assert len(asked) == 1


def test_a_link_out_of_the_folder_is_not_followed(visitor: Visitor) -> None:
    link = visitor.running._files / "link"
    link.symlink_to("/etc/passwd")
    answer = visitor.get(f"/gradio_api/file={link}")
    assert answer.status_code == 403
    assert answer.json() == {"detail": "No such download."}  # before Gradio looks


# -- size and time --------------------------------------------------------------------------------


def first_line(running: Running, request: bytes) -> bytes:
    """Of the answer to what is sent as it stands, and goes no further."""
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(5)
        connection.sendall(request)
        return connection.recv(1000).split(b"\r\n")[0]


CALL = b"POST /gradio_api/run/predict HTTP/1.1\r\nHost: localhost\r\n"


def test_a_body_has_a_limit_said_or_streamed() -> None:
    with served(most_body_bytes=2000) as running, Visitor(running) as visitor:
        visitor.open()
        padded = visitor.body("whoami_now")
        padded["pad"] = "x" * (2000 - len(json.dumps(padded | {"pad": ""})) - 20)
        assert visitor.post("/gradio_api/run/predict", json=padded).status_code == 200
        for end in (
            b"Content-Length: 2001\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n" + b"1f4\r\n%b\r\n" % (b"x" * 500) * 5,
        ):
            assert first_line(running, CALL + end).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("length", [b"-1", b"9999999999999", b"1e3", b"5, 6"])
def test_a_length_that_is_none_is_refused(open_app: Running, length: bytes) -> None:
    line = first_line(open_app, CALL + b"Content-Length: " + length + b"\r\n\r\n{}")
    assert line[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for(
    open_app: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "BODY_SECONDS", 0.2)
    line = first_line(open_app, CALL + b"Content-Length: 100\r\n\r\n{")
    assert line.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b"[" * 100_000, b'{"session_hash": 3}'])
def test_a_call_that_is_none_is_refused_in_words(visitor: Visitor, body: bytes) -> None:
    answer = visitor.post("/gradio_api/queue/join", content=body)
    assert answer.status_code == 400
    assert answer.json()["detail"]


# -- hosts and origins ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "[::1]:7860", "LOCALHOST"])
def test_the_names_of_the_loopback_are_served(visitor: Visitor, host: str) -> None:
    assert visitor.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/gradio_api/app_id", "/assets/x.js"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.0.2.7", "", "a b"]
)
def test_a_name_of_a_stranger_is_not(visitor: Visitor, host: str, path: str) -> None:
    """DNS rebinding: the stranger's name leads here, and its page would be of our origin."""
    assert visitor.get(path, headers={"host": host}).status_code == 400


def test_a_second_host_and_a_forwarded_one_are_checked_too(
    open_app: Running, visitor: Visitor
) -> None:
    for lines in (b"Host: localhost\r\nHost: evil.example", b"X-A: b"):
        line = first_line(open_app, b"GET / HTTP/1.1\r\n" + lines + b"\r\n\r\n")
        assert line.startswith(b"HTTP/1.1 400 ")
    assert visitor.get("/", headers={"x-forwarded-host": "evil.example"}).status_code == 400
    page = visitor.get("/", headers={"x-gradio-server": "http://evil.example"})
    assert page.status_code == 200
    assert "evil.example" not in page.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"origin": "http://localhost.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"referer": "https://evil.example/page"},
    ],
)
def test_a_page_of_another_site_calls_nothing(visitor: Visitor, headers: dict[str, str]) -> None:
    answer = visitor.post(
        "/gradio_api/run/predict", json=visitor.body("whoami_now"), headers=headers
    )
    assert answer.status_code == 403
    assert visitor.get("/gradio_api/app_id", headers=headers).status_code == 403
    assert visitor.get("/theme.css", headers=headers).status_code == 403


def test_gradio_alone_is_called_by_pages_of_other_sites(bare_app: str) -> None:
    headers = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    body = {"data": [], "fn_index": 7}
    url = f"{bare_app}gradio_api/run/predict"
    answer = httpx.post(url, json=body, headers=headers, trust_env=False)
    assert answer.json()["data"] == ["called"]


def test_our_own_page_calls(visitor: Visitor) -> None:
    origin = str(visitor.base_url).rstrip("/")
    headers = {"origin": origin, "sec-fetch-site": "same-origin", "referer": f"{origin}/"}
    body = visitor.body("whoami_now")
    assert visitor.post("/gradio_api/run/predict", json=body, headers=headers).status_code == 200


def test_others_may_link_to_the_page_which_then_opens_itself(ana: Visitor) -> None:
    """Strict cookies stay at home on the way from another site, so that it bounces once."""
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    document = link | {"sec-fetch-dest": "document"}
    bounced = ana.get('/?__theme=dark&x="><script>', headers=document)
    assert bounced.status_code == 200
    assert "url=?__theme=dark&amp;x=" in bounced.text
    assert "<script" not in bounced.text
    assert "gradio_config" not in bounced.text
    assert "set-cookie" not in bounced.headers
    assert ana.get("/", headers=link | {"sec-fetch-dest": "iframe"}).status_code == 403
    assert ana.get("/logout", headers=document).status_code == 403
    assert ana.whoami()[0] == "ana"


# -- who may do what ------------------------------------------------------------------------------


def test_without_a_login_nothing_but_the_login_is_there(stranger: Visitor, bob: Visitor) -> None:
    """Gradio itself leaves cancel, reset and heartbeat open."""
    calls = [
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/queue/data?session_hash=x"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/cancel"),
        ("POST", "/gradio_api/reset"),
        ("GET", "/gradio_api/heartbeat/x"),
        ("GET", f"/gradio_api/file={stranger.running._files}/x"),
        ("GET", "/logout"),
    ]
    listed = {route.path for route in ROUTES if not route.public}
    assert len(calls) == len(listed), "a new route: ask for it here"
    for method, path in calls:
        answer = stranger.request(method, path, json=stranger.body("whoami_now"))
        assert answer.status_code == 401, path
    page = stranger.get("/").text
    assert '"auth_required":true' in page
    assert "whoami" not in page
    for forged in ("", "x", "None"):
        stranger.cookies.set(f"access-token-{stranger.running._gradio.cookie_id}", forged)
        answer = stranger.post(calls[2][1], json=stranger.body("whoami_now"))
        assert answer.status_code == 401


def test_gradio_alone_lets_strangers_cancel(closed_app: Running) -> None:
    """Asked of the app behind the middleware."""
    from fastapi.testclient import TestClient

    body = {"session_hash": "x", "fn_index": 0, "event_id": "x"}
    answer = TestClient(closed_app._gradio).post("/gradio_api/cancel", json=body)
    assert answer.status_code == 200


def test_who_logs_in_is_who_the_file_says(ana: Visitor, bob: Visitor) -> None:
    assert ana.whoami()[:2] == ("ana", True)
    assert bob.whoami()[:2] == ("bob", False)
    assert ana.whoami()[2] != bob.whoami()[2]
    assert bob.ask("whoami").startswith("bob False ")


def test_a_hidden_handler_refuses_whoever_is_no_admin(ana: Visitor, bob: Visitor) -> None:
    """Gradio calls hidden and private handlers for anybody: they have to look for themselves."""
    refused = bob.now("export")
    assert refused.status_code == 500
    assert refused.json()["error"] == "Exporting is for the admin alone, and bob is none."
    assert ana.now("export").json()["data"] == ["everything"]


def test_who_logs_out_is_out(closed_app: Running) -> None:
    with Visitor(closed_app) as visitor:
        visitor.login("bob")
        kept = dict(visitor.cookies)
        assert visitor.get("/logout").status_code == 302
        visitor.cookies.update(kept)
        assert visitor.now("whoami_now").status_code == 401


def test_a_file_of_users_that_broke_lets_nobody_in_and_ends_no_login(tmp_path: Path) -> None:
    with quick_passwords():
        users = users_file(tmp_path)
        with served(Settings(port=0, users=users)) as running, Visitor(running) as visitor:
            visitor.login("bob")
            assert visitor.now("whoami_now").status_code == 200
            text = users.read_text()
            users.write_text("nonsense\n")
            assert visitor.now("whoami_now").status_code == 503
            assert "nonsense" not in visitor.now("whoami_now").text
            users.write_text(text)
            assert visitor.now("whoami_now").status_code == 200


def change_password(users: Path) -> None:
    add_user(users, "bob", "another staple", admin=False)


def remove(users: Path) -> None:
    users.write_text(users.read_text().splitlines()[0] + "\n")


def remove_and_add_again(users: Path) -> None:
    remove(users)
    add_user(users, "bob", PASSWORDS["bob"], admin=False)


@pytest.mark.parametrize("change", [change_password, remove, remove_and_add_again])
def test_a_login_ends_with_the_password_it_was_got_with(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    with quick_passwords():
        users = users_file(tmp_path)
        with (
            served(Settings(port=0, users=users)) as running,
            Visitor(running) as bob,
            Visitor(running) as ana,
        ):
            ana.login("ana")
            bob.login("bob")
            assert bob.now("whoami_now").status_code == 200
            change(users)
            assert '"auth_required":true' in bob.get("/").text, "Gradio has forgotten it, too"
            assert bob.now("whoami_now").status_code == 401
            assert bob.join("whoami").status_code == 401
            assert ana.now("whoami_now").status_code == 200
            if change is change_password:
                assert bob.login("bob").status_code == 400
                assert bob.login("bob", "another staple").status_code == 200
                assert bob.whoami()[:2] == ("bob", False)
                kept = dict(bob.cookies)
                assert bob.get("/logout").status_code == 302
                bob.cookies.update(kept)
                assert bob.now("whoami_now").status_code == 401


def test_a_token_that_was_got_past_the_door_is_good_for_nothing(closed_app: Running) -> None:
    with Visitor(closed_app) as visitor:
        closed_app._gradio.tokens["forged"] = "ana"
        visitor.cookies.set(f"access-token-{closed_app._gradio.cookie_id}", "forged")
        assert visitor.now("whoami_now").status_code == 401
        assert "forged" not in closed_app._gradio.tokens


def test_a_password_that_changes_while_it_is_checked_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quick_passwords():
        users = users_file(tmp_path)
        with served(Settings(port=0, users=users)) as running, Visitor(running) as bob:
            check = Users.check

            def slowly(self: Users, name: str, password: str) -> bool:
                right = check(self, name, password)
                change_password(users)
                return right

            monkeypatch.setattr(Users, "check", slowly)
            bob.login("bob")
            assert bob.now("whoami_now").status_code == 401


def test_a_page_s_session_is_of_whoever_opened_it(closed_app: Running) -> None:
    """Its State, its stream and its running jobs hang on an id that a browser made up."""
    with Visitor(closed_app) as ana, Visitor(closed_app) as bob:
        ana.login("ana")
        bob.login("bob")
        ana.join("keep", "of ana alone")
        assert [m for _, m in ana.events()]
        bob.session = ana.session
        assert bob.join("recall", None).status_code == 403
        assert bob.now("whoami_now").status_code == 403
        assert bob.get(f"/gradio_api/heartbeat/{ana.session}").status_code == 403
        path = f"/gradio_api/queue/data?session_hash=x&session_hash={ana.session}"
        assert bob.get(path).status_code == 403
        cancel = {"session_hash": ana.session, "fn_index": 0, "event_id": "x"}
        assert bob.post("/gradio_api/cancel", json=cancel).status_code == 403
        assert ana.ask("recall", None) == "of ana alone"


@pytest.mark.parametrize("session", ["", "a/b", "x" * 65, "a b"])
def test_a_session_has_the_form_of_one(visitor: Visitor, session: str) -> None:
    visitor.session = session
    assert visitor.join("whoami").status_code == 400


# -- how often ------------------------------------------------------------------------------------


def test_calls_of_a_person_are_limited_and_others_are_not() -> None:
    with (
        served(burst=5, rate=0.001) as running,
        Visitor(running) as one,
        Visitor(running) as other,
    ):
        one.open()
        other.open()
        codes = [one.now("whoami_now").status_code for _ in range(7)]
        assert codes == [200] * 5 + [429] * 2
        assert int(one.now("whoami_now").headers["retry-after"]) > 60
        assert one.get("/").status_code == 200
        assert other.now("whoami_now").status_code == 200


def test_a_new_cookie_with_every_call_does_not_help() -> None:
    with served(burst=2, rate=0.001) as running, Visitor(running) as visitor:
        codes = []
        for _ in range(20):
            visitor.cookies.clear()
            visitor.session = os.urandom(6).hex()
            codes.append(visitor.now("whoami_now").status_code)
        assert codes == [200] * 16 + [429] * 4
