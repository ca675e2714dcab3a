"""Pictures of every tab: `python -m tests.ui.browser.screenshots --run runs/quickstart --out DIR`.

At three widths, light and dark, over a real run and a store of its own with a few votes in it.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

from lora_rlhf.runs import Run
from tests.conftest import CHROMIUM
from tests.ui.browser.conftest import ARGUMENTS, PATIENCE_MS, enter
from tests.ui.browser.people import Visitor
from tests.ui.browser.serving import Served, start, stop
from ui.chatting import Controls
from ui.comparing import POOL, ask_both, vote
from ui.engine import StudioEngine
from ui.people import Person
from ui.ranking import Sheet, next_sheet, plan_of, submit
from ui.server import prepare_environment

SIZES = {1440: 900, 1024: 768, 390: 844}
THEMES = ("light", "dark")
PAIRS, RANKINGS = 24, 12
VOTES = ("a", "b", "a_much", "tie", "b", "a", "both_bad")


@contextmanager
def served(run: Path) -> Iterator[Served]:
    """The app on a run, with a store that is thrown away."""
    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        engine = StudioEngine([Run(run)]).start().ready()
        app = start(engine, Path(folder) / "rankings.db", run.parent)
        try:
            yield app
        finally:
            stop(app)


def fill(app: Served, people: tuple[str, ...] = ("ana", "ben")) -> None:
    """Votes of two people who do not always agree."""
    studio, dice = app.studio, random.Random(3)
    first, second = studio.engine.answerers()[-2:]
    length = studio.engine.facts().default_new_tokens
    both = tuple(Controls(name, 1.0, 1.0, length, None) for name in (first, second))
    for number in range(PAIRS):
        person = Person(people[number % len(people)], True, "s")
        *_, pane = ask_both(studio, person, "page", "", POOL, True, (both[0], both[1]))
        seconds = {"ms": int(dice.lognormvariate(9.7, 0.3)), "keys": 1, "device": "desktop"}
        vote(studio, person, pane, dice.choice(VOTES), seconds)  # type: ignore[arg-type]
    for name in people:
        person, sheet = Person(name, True, "s"), Sheet()
        plan = plan_of(studio, person, [first, second], 4, 1.0, 1.0, length)
        for _ in range(RANKINGS // len(people)):
            *_, sheet = next_sheet(studio, person, plan, sheet)
            letters = [answer["letter"] for answer in sheet.answers]
            dice.shuffle(letters)
            sent = {"order": [[x] for x in letters], "outcome": "decided", "ms": 48_000}
            sheet = submit(studio, person, sheet, sent)


# -- tabs -----------------------------------------------------------------------------------------


def chat(me: Visitor, prompt: str) -> None:
    """A question and its answer."""
    me.chat(prompt)


def compare(me: Visitor, prompt: str) -> None:
    """A blind pair after its vote."""
    me.ask_both(prompt)
    me.page.wait_for_timeout(1500)
    me.press("1")
    expect(me.at("#cmp-status")).to_contain_text("Saved")


def rank(me: Visitor, prompt: str) -> None:
    """A ranking that is nearly done, with a tie."""
    me.wait_for_ranking()
    me.press("b", "d", "=", "c")


def retrain(me: Visitor, prompt: str) -> None:
    """What would be trained on."""
    me.at("#train-dry").click()
    me.page.wait_for_timeout(4000)


def wait(me: Visitor, prompt: str) -> None:
    """Until what the tab shows is there."""
    me.page.wait_for_timeout(2500)


TABS: dict[str, Callable[[Visitor, str], None]] = {
    "Chat": chat,
    "Compare": compare,
    "Rank": rank,
    "Votes": wait,
    "Retrain": retrain,
    "Runs": wait,
}


def shoot(browser: Browser, app: Served, out: Path, whole: bool) -> Iterator[Path]:
    """Every tab at every size in both themes."""
    prompt = app.engine.pool("train")[0].messages[-1]["content"]
    for width, height in SIZES.items():
        touch = {"has_touch": True, "is_mobile": True} if width < 640 else {}
        for theme in THEMES:
            me = enter(browser, app, viewport={"width": width, "height": height}, **touch)
            me.open(f"/?__theme={theme}")
            for tab, prepare in TABS.items():
                me.tab(tab)
                prepare(me, prompt)
                path = out / f"{tab.lower()}-{width}-{theme}.png"
                me.page.screenshot(path=path, full_page=whole, animations="disabled")
                yield path
            me.context.close()


def main() -> None:
    """Parse the command line and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the pictures")
    parser.add_argument("--whole", action="store_true", help="whole pages, not what a screen shows")
    wanted = parser.parse_args()
    wanted.out.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    with served(wanted.run) as app, sync_playwright() as playwright:
        fill(app)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for path in shoot(browser, app, wanted.out, wanted.whole):
            sys.stdout.write(f"{path}\n")
        browser.close()


if __name__ == "__main__":
    main()
