"""What people do in the tabs, and what their pages must not have said meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import BrowserContext, Locator, Page, expect

from lora_rlhf.preferences.events import Response, Task
from lora_rlhf.preferences.store import Judged
from tests.ui.browser.serving import Served


@dataclass
class Heard:
    """What a page said and did.

    Attributes:
        errors: of the console, and uncaught ones.
        dialogs: that opened.
        requests: addresses that were asked for.
        blocked: those of them that the page's policy held back.
        expected: parts of errors that the test provokes.
    """

    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def listen(self, context: BrowserContext) -> None:
        """To every page of a context."""
        context.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        context.on("weberror", lambda e: self.errors.append(str(e.error)))
        context.on("request", lambda r: self.requests.append(r.url))
        context.on("requestfailed", self._failed)
        context.on("dialog", self._refuse)

    def _failed(self, request: Any) -> None:
        if request.failure and "csp" in request.failure.lower():
            self.blocked.append(request.url)

    def _refuse(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def problems(self) -> list[str]:
        """Errors that the test did not provoke, and dialogs."""
        errors = [e for e in self.errors if not any(part in e for part in self.expected)]
        return errors + [f"dialog {message!r}" for message in self.dialogs]


@dataclass
class Visitor:
    """Somebody with a browser of their own.

    Attributes:
        since: votes up to this event of the store are of another test.
    """

    page: Page
    heard: Heard
    served: Served
    since: int = 0

    @property
    def context(self) -> BrowserContext:
        """Cookies and storage."""
        return self.page.context

    @property
    def name(self) -> str:
        """What their votes are stored under."""
        bar = self.page.locator("#studio-bar .me")
        expect(bar).to_have_count(1)
        return (bar.text_content() or "").removeprefix("you are ")

    def open(self, query: str = "/") -> None:
        """Open the page, until it knows who this is."""
        self.page.goto(query, wait_until="commit")
        assert self.name

    def problems(self) -> list[str]:
        """What nobody should have to hear of."""
        broken = [] if self.page.is_closed() else self.page.evaluate("window.__violations")
        found = [*self.heard.problems(), *broken]
        if found:
            refused = [a for a in self.served.wire.answers if a.status >= 400]
            found += [f"{a.path}: {a.body.decode()}" for a in refused]
        return found

    def at(self, selector: str) -> Locator:
        """Part of the page."""
        return self.page.locator(selector)

    def press(self, *keys: str) -> None:
        """One key after the other."""
        for key in keys:
            self.page.keyboard.press(key)

    def tab(self, name: str) -> None:
        """Open a tab."""
        self.page.get_by_role("tab", name=name, exact=True).click()

    # -- in the store ---------------------------------------------------------------------------

    @property
    def votes(self) -> list[Judged]:
        """Their judgements that stand."""
        return self.served.studio.store.judged(self.name, self.since)

    def open_task(self, mode: str) -> Task:
        """What waits for their judgement."""
        task = self.served.studio.store.open_task(self.name, mode)  # type: ignore[arg-type]
        assert task is not None
        return task

    def wait_for_votes(self, count: int) -> list[Judged]:
        """Until so many stand."""
        wait_until(lambda: len(self.votes) == count, f"{count} votes, not {len(self.votes)}")
        return self.votes

    # -- in the tabs ----------------------------------------------------------------------------

    def chat(self, text: str, until_done: bool = True) -> None:
        """Say something in Chat."""
        answers = self.page.get_by_test_id("bot")
        before = answers.count()
        self.at("#chat-box textarea").fill(text)
        self.at("#chat-box textarea").press("Enter")
        expect(answers).to_have_count(before + 1)
        if until_done:
            expect(self.at("#chat-status")).to_contain_text("token")
            expect(self.at("#chat-status")).not_to_contain_text("answers")

    def new_dialogue(self) -> None:
        """In Chat, whatever was said there before."""
        self.tab("Chat")
        self.at("#chat-new").click()
        expect(self.at("#chat-status")).to_contain_text("A new dialogue.")

    def ask_both(self, text: str) -> Task:
        """In Compare, by keyboard, until the pair can be voted on."""
        self.press("/")
        expect(self.at("#cmp-box textarea")).to_be_focused()
        self.press("Control+a")
        self.page.keyboard.type(text)
        before = self.served.studio.store.open_task(self.name, "pair")
        self.press("Enter")
        wait_until(
            lambda: self.served.studio.store.open_task(self.name, "pair") != before, "a new pair"
        )
        expect(self.at("#cmp-prompt")).to_have_text(text)
        expect(self.at("#cmp-a")).to_be_enabled()
        return self.open_task("pair")

    def answer(self, side: str) -> Locator:
        """Of A or B in Compare, without Gradio's own signs around it."""
        return self.at(f"#cmp-answer-{side}").get_by_test_id("markdown")

    def wait_for_ranking(self) -> Task:
        """In Rank, until there is a task."""
        expect(self.at(".rk-card").first).to_be_visible()
        expect(self.at(".rk-chip")).to_have_count(0)
        return self.open_task("rank")


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 30.0) -> float:
    """Look until something holds; the seconds it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, f"waited {seconds:g} s for {what}"
        time.sleep(0.005)
    return time.monotonic() - began


def timely(goal: float, measure: Callable[[], float], attempts: int = 3) -> None:
    """A duration in seconds that keeps to its goal.

    Measured again, at most twice, where it does not: on a machine that is shared, somebody else's
    work may stand in the way of any single one.
    """
    took = []
    for _ in range(attempts):
        took.append(measure())
        if took[-1] <= goal:
            return
    raise AssertionError(f"goal {goal:g} s, took {took}")


def shown(task: Task) -> list[Response]:
    """Answers as they lie on the screen: the first is A."""
    return sorted(task.responses, key=lambda r: r.pos)


def letters(judged: Judged) -> list[str]:
    """A ranking as the keys that make it: best first, ties together."""
    place = {r.rid: "ABCDEFGHI"[r.pos] for r in judged.task.responses}
    return ["".join(sorted(place[rid] for rid in group)) for group in judged.judgement.ranking]


@contextmanager
def quiet_for(visitor: Visitor, seconds: float = 0.4) -> Iterator[None]:
    """Nothing may be stored by what happens in here, nor a moment after it."""
    before = visitor.served.studio.store.version()
    yield
    visitor.page.wait_for_timeout(1000 * seconds)
    assert visitor.served.studio.store.version() == before
