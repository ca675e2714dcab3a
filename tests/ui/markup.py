"""HTML that handlers make: well-formed, and nothing in it but what they meant."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

NASTY = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "' autofocus onfocus=alert(1) x='",
    "</p></div></table></svg><iframe src=javascript:alert(1)></iframe>",
    "<!--<b>--!><a href=javascript:alert(1)>x</a>",
    "${alert(1)}{{7*7}}<%= 7*7 %>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\u202eevil\u0000\x1b[31m",
)
VOID = {"br", "hr", "input"}
MEANT = {
    *("a", "article", "b", "button", "caption", "circle", "dd", "details", "div", "dl", "dt"),
    *("figcaption", "figure", "g", "h2", "h3", "h4", "header", "i", "iframe", "li", "nav", "ol"),
    *("p", "path", "pre", "progress", "rect", "section", "small", "span", "strong", "summary"),
    *("svg", "table", "tbody", "td", "text", "th", "thead", "title", "tr", "ul"),
}


@dataclass
class Seen(HTMLParser):
    """What a piece of HTML holds.

    Attributes:
        texts: between tags, as a person reads them.
        tags: names, in order.
        attributes: (tag, name, value), in order.
    """

    texts: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    unclosed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def text(self) -> str:
        """All texts in one."""
        return " ".join(" ".join(self.texts).split())

    def values(self, name: str) -> list[str]:
        """Of all attributes of a name."""
        return [value for _, attribute, value in self.attributes if attribute == name]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in MEANT, f"<{tag}> was not meant"
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} on <{tag}>"
            assert name not in ("href", "src", "action", "formaction"), f"{name} on <{tag}>"
            assert name != "srcdoc" or ("sandbox", "") in attrs, "a frame that may run scripts"
            self.attributes.append((tag, name, value or ""))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed, f"</{tag}> closes nothing"
        assert self.unclosed.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(html: str) -> Seen:
    """Parse HTML that a handler made; nothing that it was not meant to hold passes."""
    seen = Seen()
    seen.feed(html)
    seen.close()
    assert seen.unclosed == []
    return seen
