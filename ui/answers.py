"""An answer as the middleware lets it out: its headers, its cookies, its policy."""

import base64
import hashlib
import re

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from ui.asked import Asked, Route
from ui.people import COOKIE

_YEAR = 365 * 24 * 3600
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=(), "
    "serial=(), hid=(), midi=(), display-capture=()",
    "x-robots-tag": "noindex, nofollow",
}
_NOT_TOLD = ("server", "x-powered-by")


def policy(scripts: str = "") -> str:
    """The Content-Security-Policy, with the hashes of the scripts that stand in the page.

    Gradio compiles templates, `js=` and chart expressions from text, hence 'unsafe-eval'; it
    writes styles into elements, hence 'unsafe-inline' for styles. Scripts in the page run by
    their hash alone, so that markup which a handler lets through runs nothing; and nothing is
    ever fetched from, or sent to, another origin.
    """
    return (
        "default-src 'none'; "
        f"script-src 'self' 'unsafe-eval'{scripts}; script-src-attr 'none'; "
        "style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self'; "
        "connect-src 'self'; manifest-src 'self'; "
        "frame-src 'none'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'; "
        "object-src 'none'"
    )


def script_hashes(page: bytes) -> str:
    """The hashes of the inline scripts of a page, as sources of a policy."""
    inline = re.findall(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in inline)
    return "".join(f" 'sha256-{digest}'" for digest in digests)


class Answer:
    """Sends what Gradio answers, as it comes; it waits for the body of the page alone.

    Args:
        asked: the request.
        send: of the server.

    Attributes:
        route: of the request; unset while it is refused.
        new_id: for the cookie of a person without a login.
    """

    def __init__(self, asked: Asked, send: Send) -> None:
        self.route: Route | None = None
        self.new_id: str | None = None
        self._asked, self._send = asked, send
        self._start: Message | None = None  # of the page, until its scripts are known
        self._page = b""
        self._is_open = False

    async def send(self, message: Message) -> None:
        """Send on one message of ASGI."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._dress(headers, message["status"])
            if self._asked.path == "/" and "content-encoding" not in headers:
                self._start = message
                return
        elif self._start is not None and message["type"] == "http.response.body":
            self._page += message.get("body", b"")
            if message.get("more_body"):
                return
            headers = MutableHeaders(scope=self._start)
            headers["content-security-policy"] = policy(script_hashes(self._page))
            await self._send(self._start)
            self._start = None
            message = {**message, "body": self._page}
        self._is_open = message["type"] == "http.response.start" or message.get("more_body", False)
        await self._send(message)

    async def finish(self) -> None:
        """End what was begun, where it was cut off."""
        if self._is_open:
            await self.send({"type": "http.response.body", "body": b""})

    def _dress(self, headers: MutableHeaders, status: int) -> None:
        cross_origin = {name for name in headers if name.startswith("access-control-")}
        for name in (*cross_origin, *_NOT_TOLD):
            if name in headers:
                del headers[name]
        for name, value in _HEADERS.items():
            headers[name] = value
        headers["content-security-policy"] = policy()
        if self.route is None or not self.route.fixed:
            headers["cache-control"] = "no-store"
        elif self._asked.path.startswith("/assets/") and status == 200:
            # The names of these files bear a hash of what is in them.
            headers["cache-control"] = f"public, max-age={_YEAR}, immutable"
        self._dress_cookies(headers)

    def _dress_cookies(self, headers: MutableHeaders) -> None:
        """Gradio's cookies of a login say SameSite=None or nothing, and ours come along."""
        cookies = headers.getlist("set-cookie")
        if cookies:
            del headers["set-cookie"]
        if self.new_id:
            cookies = [*cookies, f"{COOKIE}={self.new_id}; HttpOnly; Max-Age={_YEAR}; Path=/"]
        for cookie in cookies:
            parts = [p for p in cookie.split("; ") if not p.lower().startswith("samesite=")]
            is_secure = any(part.lower() == "secure" for part in parts)
            added = ["Secure"] if self._asked.is_https() and not is_secure else []
            headers.append("set-cookie", "; ".join([*parts, "SameSite=Strict", *added]))
