"""Refusals that quote what somebody typed: read as text, whichever way they come."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from lora_rlhf.errors import ConfigError
from tests.ui.browser.conftest import Visit
from tests.ui.browser.serving import InLine, Served, serve

pytestmark = pytest.mark.ui

TYPED = "<img src=x onerror='window.__xss = 1'><b>bold</b> & ${window.__xss = 2} {{x}}"


class Refusing(InLine):
    """Refuses every prompt, and says which one."""

    def stream(self, asks: Any, **of_the_job: Any) -> Generator[Any, None, None]:
        """As `Engine.stream`."""
        raise ConfigError(f"Not answered: {asks[0].messages[-1]['content']}")
        yield


@pytest.fixture
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An app that answers nothing."""
    with serve(Refusing(), tmp_path_factory.mktemp("refusing")) as served:
        yield served


def test_a_refusal_shows_what_was_typed_as_text(refusing: Served, visit: Visit) -> None:
    me = visit(refusing)
    # The chat shows the question, too: without its handlers, and its picture is not there.
    me.heard.expected += ["inline event handler", "404"]
    for tab, box in (("Chat", "#chat-box"), ("Compare", "#cmp-box")):
        me.tab(tab)
        me.at(f"{box} textarea").fill(TYPED)
        me.at(f"{box} textarea").press("Enter")
        toast = me.page.get_by_test_id("toast-body")
        expect(toast).to_contain_text(f"Not answered: {TYPED}")
        expect(toast.locator("img, b")).to_have_count(0)
        toast.get_by_role("button", name="Close", exact=True).click()
        expect(toast).to_have_count(0)
    assert me.page.evaluate("window.__xss") is None
    me.page.evaluate("window.__violations = []")


def test_a_refusal_that_went_around_the_queue_does_so_too(visit: Visit, fake: Served) -> None:
    me = visit(fake, tab="Rank")
    me.heard.expected.append("500")
    me.wait_for_ranking()
    session = next(u for u in me.heard.requests if "/heartbeat/" in u).rsplit("/", 1)[1]
    # A flag that there is not, as the page itself would send it.
    sent = {"outcome": "skip", "flags": [TYPED]}
    me.page.evaluate(
        """async ([session, sent]) => {
          const sheet = gradio_config.components.find((c) => c.props.elem_id === 'rank-sheet');
          const call = gradio_config.dependencies.find(
            (d) => d.targets.some(([of, what]) => of === sheet.id && what === 'submit'));
          const value = (id) => gradio_config.components.find((c) => c.id === id).props.value;
          const body = {
            data: call.inputs.map((id) => value(id) ?? null), event_data: sent, fn_index: call.id,
            session_hash: session,
          };
          await fetch('gradio_api/run/predict', {
            method: 'POST', headers: {'content-type': 'application/json'},
            body: JSON.stringify(body),
          });
        }""",
        [session, sent],
    )
    expect(me.at("#studio-toast")).to_contain_text(TYPED[:30])
    expect(me.at("#studio-toast").locator("*")).to_have_count(0)
    assert me.page.evaluate("window.__xss") is None
    assert not me.votes
