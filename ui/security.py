"""What stands between the network and Gradio: a plain ASGI middleware, outermost of all.

It answers for an allow-list of routes, those that Gradio's page really calls, and for nothing
else; it knows who asks, limits how often and how much, and sets the headers of every answer.
Answers stream through it unbuffered, but for the page itself.
"""

import asyncio
import json
import logging
import re
from pathlib import Path

from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_rlhf.errors import UserError
from ui.answers import Answer
from ui.asked import Asked, Refused, json_session, route_of
from ui.hosts import Hosts, is_loopback
from ui.limits import Bucket, Owned
from ui.logins import PEER
from ui.people import SCOPE_KEY, Known, People

MOST_BODY_BYTES = 2**20  # a long chat is sent whole with every message
BODY_SECONDS = 20.0

_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_log = logging.getLogger(__name__)


class Guard:
    """The middleware.

    Args:
        app: the app with Gradio's in it.
        people: tells who asks.
        hosts: the names of this server.
        files: the folder that downloads come from, and nothing else does.
        behind_proxy: a proxy is in front of it: one on this machine is believed when it says who
            is behind it, and nobody counts as sitting at this machine.
        most_body_bytes: of a request.
        burst: calls of one person at once.
        rate: calls of one person a second, in the long run.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        people: People,
        hosts: Hosts,
        files: Path,
        behind_proxy: bool = False,
        most_body_bytes: int = MOST_BODY_BYTES,
        burst: float = 150,
        rate: float = 30,
    ) -> None:
        self.app = app
        self.people = people
        self.hosts = hosts
        self.files = files.resolve()
        self.behind_proxy = behind_proxy
        self.most_body_bytes = most_body_bytes
        self._calls = Bucket(burst, rate)
        # Without logins, a new cookie is a new person: all of one address share a wider bucket.
        self._calls_of_peer = Bucket(8 * burst, 8 * rate)
        self._sessions = Owned()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End every stream that is open; called in the loop that serves them."""
        self._stopping.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let Gradio answer."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # Gradio's page uses no web socket
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        asked = Asked(scope)
        answer = Answer(asked, send)
        try:
            receive = await self._admit(asked, answer, receive)
        except Refused as refused:
            await refused.response()(scope, receive, answer.send)
        except _Gone:
            return
        else:
            app = HTMLResponse(asked.bounce()) if asked.foreign else self.app
            await app(asked.scope, self._until_stopped(receive), answer.send)
            if self._stopping.is_set():
                await answer.finish()

    async def _admit(self, asked: Asked, answer: Answer, receive: Receive) -> Receive:
        """Check everything, cheapest first; returns what Gradio reads the body from."""
        self._check_host(asked)
        route, parts = route_of(asked.method, asked.path)
        self._check_origin(asked)
        if asked.is_picture and not route.fixed:
            raise Refused(403, "That is no picture.")
        answer.route = route
        if asked.foreign:
            return receive
        known = self._who(asked)
        if known is None and not route.public:
            raise Refused(401, "Not logged in.")
        if known is not None:
            asked.scope[SCOPE_KEY] = known.person
            answer.new_id = None if route.fixed else known.new_id
        session = parts.get("session") or asked.query("session_hash")
        if asked.method == "POST":
            peer = self._peer(asked)
            PEER.set(peer)
            self._check_rate(known, peer)
            body = await self._body(asked, receive)
            receive = _replayed(body, receive)
            session = None if asked.path == "/login" else json_session(_parsed(body))
        self._check_session(session, known)
        if "file" in parts:
            self._check_file(parts["file"])
        return receive

    def _until_stopped(self, receive: Receive) -> Receive:
        """What tells Gradio's streams, which would go on, that nobody listens any more."""

        async def receive_or_stop() -> Message:
            arriving = asyncio.ensure_future(receive())
            stopping = asyncio.ensure_future(self._stopping.wait())
            try:
                await asyncio.wait((arriving, stopping), return_when=asyncio.FIRST_COMPLETED)
                return arriving.result() if arriving.done() else {"type": "http.disconnect"}
            finally:
                arriving.cancel()
                stopping.cancel()

        return receive_or_stop

    def _check_host(self, asked: Asked) -> None:
        hosts = asked.headers.getlist("host")
        through = asked.headers.getlist("x-forwarded-host")
        if len(hosts) != 1 or not all(self.hosts.serves(host) for host in (*hosts, *through)):
            raise Refused(
                400, "This server does not go by that name. If it should, start it with --host-name"
            )

    def _check_origin(self, asked: Asked) -> None:
        """No page but our own calls anything; others may link to the page itself."""
        host, origin = asked.headers["host"], asked.headers.get("origin")
        site, referer = asked.headers.get("sec-fetch-site"), asked.headers.get("referer")
        if site is not None:
            asked.foreign = site not in ("same-origin", "none")
        else:  # browsers leave it out on plain http in a network
            asked.foreign = referer is not None and not self.hosts.owns(referer, host)
        is_link = (
            asked.path == "/"
            and asked.method in ("GET", "HEAD")
            and asked.headers.get("sec-fetch-dest", "document") == "document"
        )
        called = origin is not None and not self.hosts.owns(origin, host)
        if called or (asked.foreign and not is_link):
            raise Refused(403, "Called by a page of another site.")

    def _who(self, asked: Asked) -> Known | None:
        own_machine = not self.behind_proxy and asked.is_from_own_machine()
        try:
            return self.people.identify(asked.cookies, own_machine)
        except UserError as error:  # the file of users broke while we ran
            _log.error("%s", error)
            raise Refused(503, "Nobody can log in at the moment; the log says why.") from error

    def _peer(self, asked: Asked) -> str:
        if self.behind_proxy and is_loopback(asked.peer):
            # The last one was added by our own proxy; those before it are the client's words.
            through = asked.headers.get("x-forwarded-for", asked.peer)
            return through.split(",")[-1].strip()
        return asked.peer

    def _check_rate(self, known: Known | None, peer: str) -> None:
        wait = self._calls.take(known.person.name) if known else 0.0
        if known is None or self.people.users is None:
            wait = max(wait, self._calls_of_peer.take(peer))
        if wait:
            raise Refused(429, "Too many calls.", **{"retry-after": str(_whole(wait))})

    async def _body(self, asked: Asked, receive: Receive) -> bytes:
        length = asked.headers.get("content-length", "0")
        if length.isdecimal() and int(length) <= self.most_body_bytes:
            reading = _read(receive, self.most_body_bytes)
            try:
                body = await asyncio.wait_for(reading, BODY_SECONDS)
            except asyncio.TimeoutError as error:
                raise Refused(408, "The request came too slowly.", connection="close") from error
            if body is not None:
                return body
        raise Refused(413, f"Allowed: {self.most_body_bytes} bytes.", connection="close")

    def _check_session(self, session: str | None, known: Known | None) -> None:
        """A page's session, with its State and its stream, is of whoever opened the page."""
        if session is None or known is None:
            return
        if not _SESSION.fullmatch(session):
            raise Refused(400, "That is no session.")
        if not self._sessions.belongs(session, known.person.name):
            raise Refused(403, "The session of somebody else.")

    def _check_file(self, name: str) -> None:
        """Gradio checks the folder, too; but it also fetches http(s) addresses for whoever asks."""
        try:
            inside = Path(name).is_absolute() and Path(name).resolve().is_relative_to(self.files)
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, links in a circle
            inside = False
        if not inside:
            raise Refused(403, "No such download.")


class _Gone(Exception):
    """Whoever asked has left."""


def _whole(seconds: float) -> int:
    return int(seconds) + 1


async def _read(receive: Receive, most: int) -> bytes | None:
    """The whole body; None once it is longer than `most`."""
    body = bytearray()
    more = True
    while more and len(body) <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body) if len(body) <= most else None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What gives the body again, then whatever else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The body is no JSON.") from error
