"""Widths, targets, focus, announcements, and the list of shortcuts."""

import re
from typing import Any

import pytest
from playwright.sync_api import Locator, expect

from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor, quiet_for
from tests.ui.browser.serving import Served

pytestmark = pytest.mark.ui

TABS = ("Chat", "Compare", "Rank", "Votes", "Retrain", "Runs")
WIDTHS = (390, 1024, 1440)
TARGET = 44  # CSS pixels a finger hits
WORD = "Donaudampfschifffahrtsgesellschaftskapitaensmuetze" * 3
# Visible, and partly beyond the right edge; what scrolls by itself may be as wide as it likes.
TOO_WIDE = """() => {
  const scrolls = (node) => {
    for (let up = node; up && !up.matches('.gradio-container'); up = up.parentElement)
      if (getComputedStyle(up).overflowX !== 'visible') return true;
    return false;
  };
  return [...document.querySelectorAll('.gradio-container *')].filter((node) => {
    const box = node.getBoundingClientRect();
    return node.checkVisibility() && box.width && box.right > innerWidth + 1 && !scrolls(node);
  }).map((node) => `${node.tagName} #${node.id} .${node.className}`);
}"""
FOCUSED = """() => {
  const node = document.activeElement, style = getComputedStyle(node);
  const name = node.getAttribute('aria-label') || node.textContent.trim().slice(0, 30);
  return {
    what: `${node.tagName} ${node.id} ${name}`,
    outline: style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth),
    shown: node.checkVisibility({opacityProperty: true, visibilityProperty: true}),
  };
}"""


def have_something_everywhere(me: Visitor) -> None:
    """Long words in every tab that shows what somebody wrote."""
    me.chat(f"Say {WORD}")
    me.tab("Compare")
    me.ask_both(f"Say {WORD}")
    me.press("1")
    me.wait_for_votes(1)
    me.tab("Rank")
    me.wait_for_ranking()
    me.press("b", "a", "c", "Enter")
    me.wait_for_votes(2)
    me.wait_for_ranking()
    me.press("d", "f")


def test_no_tab_is_wider_than_the_window(visit: Visit, fake: Served) -> None:
    me = visit(fake)
    have_something_everywhere(me)
    for tab in TABS:
        me.tab(tab)
        expect(me.page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        me.page.wait_for_timeout(300)  # what the tab asks for when it is opened
        for width in WIDTHS:
            me.page.set_viewport_size({"width": width, "height": 900})
            me.page.wait_for_timeout(100)
            scroll = me.page.evaluate(
                "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
            )
            assert scroll == [width] * 3, f"{tab} at {width}"
            assert me.page.evaluate(TOO_WIDE) == [], f"{tab} at {width}"


def test_the_width_check_sees_what_is_too_wide(me: Visitor) -> None:
    me.tab("Chat")
    me.at("#studio-bar").evaluate("bar => { bar.style.width = '3000px'; }")
    assert any("studio-bar" in found for found in me.page.evaluate(TOO_WIDE))
    me.at("#studio-bar").evaluate("bar => { bar.style.width = ''; }")


def assert_targets(buttons: Locator, least: int) -> None:
    sizes = buttons.evaluate_all(
        "nodes => nodes.filter(n => n.checkVisibility()).map(n => [n.innerText, n.offsetWidth,"
        " n.offsetHeight, n.innerText ? n.scrollWidth - n.clientWidth : 0])"
    )
    assert len(sizes) >= least
    small = [s for s in sizes if s[1] < TARGET or s[2] < TARGET or s[3] > 0]
    assert small == [], "too small, or the label does not fit"


def test_a_finger_hits_every_control_of_a_judgement(visit: Visit, fake: Served) -> None:
    phone = {"width": 390, "height": 844}
    me = visit(fake, tab="Compare", viewport=phone, has_touch=True, is_mobile=True)
    me.at("#cmp-box textarea").fill("Tell of the moon.")
    me.at("#cmp-next").tap()
    expect(me.at("#cmp-a")).to_be_enabled()
    assert_targets(me.page.get_by_role("tab"), len(TABS))  # none is behind a menu of the rest
    assert_targets(me.at(".votes button"), 8)
    assert_targets(me.at(".composer button, #studio-shortcuts"), 3)
    me.at("#cmp-tie").tap()
    me.wait_for_votes(1)
    me.tab("Rank")
    me.wait_for_ranking()
    me.at('.rk-card[data-letter="B"]').tap()
    me.at('.rk-action[data-key="F"]').tap()
    assert_targets(me.at(".rk-action, .rk-chip, .rk-card, .rk-flags label"), 20)
    me.tab("Chat")
    me.chat("Tell of the sun.")
    assert_targets(me.at("#chat-log").get_by_role("button"), 7)


def test_whoever_tabs_sees_where_they_are(visit: Visit, fake: Served) -> None:
    me = visit(fake)
    have_something_everywhere(me)
    for tab in TABS:
        opened = me.page.get_by_role("tab", name=tab)
        opened.focus()
        me.press("Enter")
        expect(opened).to_have_attribute("aria-selected", "true")
        me.page.wait_for_timeout(300)
        seen = []
        for _ in range(18):
            me.press("Tab")
            seen.append(me.page.evaluate(FOCUSED))
            if seen[-1]["what"].startswith("BODY"):
                seen.pop()
                break
        assert len({focus["what"] for focus in seen}) > 5
        lost = [focus for focus in seen if focus["outline"] < 2 or not focus["shown"]]
        assert lost == [], tab


# Colours as they are painted: of the border of a box without its tick, of what is around it and of
# what is in it. A ratio is that of WCAG 2.2.
BORDERS = """nodes => nodes.filter(node => node.checkVisibility()).map(node => {
  const pen = new OffscreenCanvas(1, 1).getContext('2d');
  const paint = (colour) => { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); };
  const light = () => [...pen.getImageData(0, 0, 1, 1).data.slice(0, 3)].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const around = [];
  for (let up = node.parentElement; up; up = up.parentElement) around.unshift(up);
  const ticked = node.checked;
  node.checked = false;
  const style = getComputedStyle(node), painted = {};
  paint('white');
  around.forEach(each => paint(getComputedStyle(each).backgroundColor));
  painted.around = light();
  paint(style.backgroundColor);
  painted.inside = light();
  paint(style.borderTopColor);
  const border = light(), drawn = style.borderTopStyle === 'solid' && style.appearance === 'none';
  node.checked = ticked;
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return {
    what: `${node.type} ${(node.closest('label, [id]') || node).textContent.trim()}`,
    width: drawn ? parseFloat(style.borderTopWidth) : 0,
    ratio: Math.min(ratio(border, painted.around), ratio(border, painted.inside)),
  };
})"""
BOXES = "input[type=checkbox], input[type=radio]"
LEAST_RATIO = 3.0  # WCAG 1.4.11


def faint(me: Visitor) -> list[dict[str, Any]]:
    """Visible boxes whose edge can hardly be seen without their tick."""
    # A chosen radio has a label of another colour, and cannot be unticked.
    found = me.at(f":is({BOXES}):not([type=radio]:checked)").evaluate_all(BORDERS)
    return [box for box in found if box["width"] < 1 or box["ratio"] < LEAST_RATIO]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_an_unticked_box_can_be_seen(visit: Visit, fake: Served, theme: str) -> None:
    me = visit(fake, query=f"/?__theme={theme}")
    me.page.add_style_tag(content="* { transition: none !important; }")
    me.tab("Compare")
    expect(me.at("#cmp-blind")).to_be_visible()
    assert faint(me) == []
    me.tab("Rank")
    me.wait_for_ranking()
    me.press("f")
    me.page.get_by_role("button", name="What is ranked").click()
    expect(me.at("#rank-active")).to_be_visible()
    assert me.at(".rk-flags input[type=checkbox]").count() > 3
    assert faint(me) == []
    me.tab("Retrain")
    me.at("#train-more").get_by_role("button").click()
    expect(me.at("#train-force")).to_be_visible()
    expect(me.at("#train-scope input[type=radio]")).to_have_count(3)
    assert faint(me) == []
    me.press("Shift+?")
    expect(me.at("#studio-help input[type=checkbox]")).to_be_visible()
    assert faint(me) == []
    me.at("#studio-help input").evaluate(
        "box => { box.style.borderColor = 'rgb(128 128 128 / 0.2)'; }"
    )
    assert len(faint(me)) == 1, "and one that cannot be seen is found"
    me.press("Escape")


def test_what_was_saved_is_announced(me: Visitor) -> None:
    live = me.at("#studio-live")
    expect(live).to_have_attribute("role", "status")
    live.evaluate("node => { node.isTheSame = true; }")
    me.tab("Compare")
    me.ask_both("Tell of the wind.")
    expect(live).to_have_text("Which is better?")
    me.press("2")
    expect(live).to_contain_text("B is better. Saved after")
    me.tab("Rank")
    me.wait_for_ranking()
    me.press("x")
    expect(live).to_contain_text("All bad. Saved after")
    # Readers hear changes of what was there before, not what is put in its place.
    assert live.evaluate("node => node.isTheSame === true && node.isConnected")


def test_a_refusal_is_said_and_nothing_is_stored(me: Visitor) -> None:
    me.tab("Compare")
    me.ask_both("Tell of the snow.")
    me.press("1")
    me.wait_for_votes(1)
    expect(me.at("#cmp-a")).to_be_disabled()
    me.heard.expected.append("500")  # Gradio's status of every refusal
    with quiet_for(me):
        me.at("#cmp-b").evaluate("button => { button.disabled = false; button.click(); }")
        expect(me.page.get_by_role("alert")).to_have_text(re.compile("."))
    me.heard.errors.clear()
    me.heard.expected.clear()


def test_shortcuts_are_listed_and_can_be_switched_off(visit: Visit, fake: Served) -> None:
    me = visit(fake, tab="Compare")
    task = me.ask_both("Tell of the hill.")
    listed = me.page.get_by_role("dialog", name="Keyboard shortcuts")
    me.press("Shift+?")
    expect(listed).to_be_visible()
    for key in ("Shift+1 / Shift+2", "Backspace", "Esc"):
        expect(listed.get_by_text(key, exact=True)).to_be_visible()
    with quiet_for(me):
        me.press("1", "2", "0")
    me.press("Escape")
    expect(listed).not_to_be_visible()
    me.page.get_by_role("button", name="Shortcuts").click()
    listed.get_by_role("checkbox").uncheck()
    listed.get_by_role("button", name="Close").click()
    with quiet_for(me):
        me.press("1", "s", "n")
    me.open()
    me.tab("Compare")
    expect(me.at("#cmp-a")).to_be_enabled()
    with quiet_for(me):
        me.press("1", "s", "Shift+?")
    expect(listed).not_to_be_visible()
    me.tab("Rank")
    me.wait_for_ranking()
    with quiet_for(me):
        me.press("x", "s")
    me.tab("Compare")
    me.at("#cmp-a").click()  # the buttons go on
    assert me.wait_for_votes(1)[0].task.task_id == task.task_id
    me.page.get_by_role("button", name="Shortcuts").click()
    listed.get_by_role("checkbox").check()
    me.press("Escape", "u")
    me.wait_for_votes(0)
