"""A request as the middleware sees it: what is asked for, by which route, from where."""

import html
import re
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, QueryParams
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from ui.hosts import LOOPBACK_NAMES, is_loopback, name_of

_API = "/gradio_api"
_READ = "GET HEAD"
# Headers by which proxies say that somebody else is behind them.
_PROXIES = (b"forwarded", b"x-forwarded-", b"x-real-ip", b"via", b"cf-")


class Refused(Exception):
    """A request that is not let through to Gradio.

    Args:
        status: of the answer.
        detail: what the answer says.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers

    def response(self) -> Response:
        """The answer."""
        return JSONResponse({"detail": self.detail}, self.status, self.headers)


@dataclass(frozen=True)
class Route:
    """A route of Gradio that its page calls.

    Attributes:
        methods: allowed ones, with spaces between.
        path: what the whole path matches.
        public: answered without a login.
        fixed: part of the page: the same for everybody, and kept by the browser.
    """

    methods: str
    path: str
    public: bool = False
    fixed: bool = False


# All there is: found by driving the real page, its components and a restart of the server under
# it. /config, /info, /call, /stream, /proxy=, /deep_link, /token, /monitoring, /mcp, /dev, /vibe
# and the history of runs are Gradio's for other clients.
ROUTES = (
    Route(_READ, "/", public=True),
    Route("POST", "/login", public=True),
    Route("GET", "/logout"),
    Route(_READ, "/(assets|static)/[^/].*", public=True, fixed=True),
    Route(_READ, r"/theme\.css|/favicon\.ico|/manifest\.json", public=True, fixed=True),
    # A page whose server has gone asks this one until it is back.
    Route("GET", f"{_API}/app_id", public=True),
    Route("POST", f"{_API}/queue/join"),
    Route("GET", f"{_API}/queue/data"),
    Route("POST", f"{_API}/run/predict"),  # handlers with queue=False
    Route("POST", f"{_API}/cancel"),
    Route("POST", f"{_API}/reset"),
    Route("GET", f"{_API}/heartbeat/(?P<session>[^/]+)"),
    Route(_READ, f"{_API}/file=(?P<file>.+)"),  # downloads that handlers made
)
_UPLOADS = re.compile(f"{_API}/(upload|upload_progress|process_recording|component_server)/?")


def route_of(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The route of a request, and the named parts of its path.

    Raises:
        Refused: there is none.
    """
    for route in ROUTES:
        found = re.fullmatch(route.path, path)
        if found is None:
            continue
        if method not in route.methods.split():
            allow = route.methods.replace(" ", ", ")
            raise Refused(405, f"Allowed: {allow}.", allow=allow)
        return route, found.groupdict()
    if _UPLOADS.fullmatch(path):
        raise Refused(403, "Nothing is uploaded here.")
    raise Refused(404, "Not found.")


@dataclass
class Asked:
    """A request.

    Attributes:
        scope: what Gradio gets: ours to write to, and without headers by which Gradio's own
            servers would tell it the address of the page.
        foreign: a page of another site links to us.
    """

    scope: Scope
    foreign: bool = False
    headers: Headers = field(init=False)
    cookies: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        kept = [(k, v) for k, v in self.scope["headers"] if not k.startswith(b"x-gradio-")]
        self.scope = {**self.scope, "headers": kept}
        self.headers = Headers(scope=self.scope)
        self.cookies = cookie_parser(self.headers.get("cookie", ""))

    @property
    def method(self) -> str:
        """Upper case."""
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        """Decoded."""
        return str(self.scope["path"])

    @property
    def peer(self) -> str:
        """The address at the other end of the connection."""
        return str((self.scope.get("client") or ("",))[0])

    def query(self, name: str) -> str | None:
        """A parameter of the address; of several, the one that Gradio takes."""
        return QueryParams(self.scope["query_string"]).get(name)

    @property
    def is_picture(self) -> bool:
        """Asked for as a picture: an answer may hold one whose address is such as /logout."""
        wanted = self.headers.get("accept", "").startswith("image/")
        return wanted or self.headers.get("sec-fetch-dest") == "image"

    def is_from_own_machine(self) -> bool:
        """No proxy, no network: somebody who sits at this machine, or came to it by ssh."""
        proxied = any(name.startswith(_PROXIES) for name, _ in self.scope["headers"])
        named_so = name_of(self.headers.get("host", "")) in LOOPBACK_NAMES
        return is_loopback(self.peer) and named_so and not proxied

    def is_https(self) -> bool:
        """At the browser's end, as far as the proxy says."""
        through = self.headers.get("x-forwarded-proto", str(self.scope.get("scheme", "http")))
        return through.split(",")[0].strip() == "https"

    def bounce(self) -> str:
        """A page that opens this same address.

        Cookies that are SameSite=Strict stay at home when a link of another site is followed;
        they go along with what a page of ours opens.
        """
        query = html.escape(self.scope["query_string"].decode("latin-1"))
        return f'<!doctype html><meta http-equiv="refresh" content="0;url=?{query}">'


def json_session(content: Any) -> str | None:
    """The page's session that the body of a call names.

    Raises:
        Refused: what is there is none.
    """
    if not isinstance(content, dict):
        raise Refused(400, "The body is no JSON object.")
    session = content.get("session_hash")
    if session is not None and not isinstance(session, str):
        raise Refused(400, "That is no session.")
    return session
