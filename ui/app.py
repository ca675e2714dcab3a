"""The page: a bar, six tabs, and what passes between them. No logic."""

import html
import secrets
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ui.assets import text_of
from ui.chatting import Talk
from ui.comparing import Pane, carry, compare_turn, restore
from ui.people import person_of
from ui.studio import Studio
from ui.tabs import chat, compare, rank, retrain, runs, votes
from ui.tabs.compare import layout, updates
from ui.wiring import page_of, told

TITLE = "lora-rlhf studio"
_LOOK_SECONDS = 2.0


def look() -> dict[str, Any]:
    """Theme, style and script, which Gradio takes when it launches."""
    return {
        # The machine's own fonts: nothing to fetch, and every script has its letters.
        "theme": gr.themes.Soft(
            primary_hue="indigo",
            secondary_hue="indigo",
            neutral_hue="slate",
            font=["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"],
            font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
        ).set(
            block_title_background_fill="transparent",
            block_title_background_fill_dark="transparent",
            block_title_text_color="*neutral_600",
            block_title_text_color_dark="*neutral_300",
            block_title_padding="0",
            block_title_text_weight="500",
            # 4.5:1 for small print (WCAG 1.4.3).
            body_text_color_subdued="*neutral_500",
            block_info_text_color="*neutral_500",
            # An unticked box is a box: 3:1 against what is around it and in it (WCAG 1.4.11).
            checkbox_border_color="*neutral_500",
            checkbox_border_color_dark="*neutral_300",
            checkbox_border_color_focus_dark="*primary_400",
            checkbox_border_color_hover="*neutral_700",
            checkbox_border_color_hover_dark="*neutral_100",
        ),
        "css": text_of("studio.css"),
        "js": text_of("studio.js"),
    }


def build_app(studio: Studio) -> gr.Blocks:
    """Lay out every tab over one studio."""
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=False, delete_cache=(3600, 86400)
    ) as app:
        server = secrets.token_hex(8)
        bar = gr.HTML(_bar(studio, "", server), elem_id="studio-top")
        with gr.Tabs(elem_id="studio-tabs") as tabs:
            with gr.Tab("Chat", id="chat"):
                chat_tab = chat.build(studio)
            with gr.Tab("Compare", id="compare"):
                compare_tab = compare.build(studio)
            with gr.Tab("Rank", id="rank") as rank_tab:
                who = rank.build(studio, rank_tab)
            with gr.Tab("Votes", id="votes"):
                votes.build(studio)
            with gr.Tab("Retrain", id="retrain") as retrain_tab:
                retrain.build(studio, retrain_tab)
            with gr.Tab("Runs", id="runs"):
                runs.build(studio)
        pickers = [chat_tab.adapter, chat_tab.other, compare_tab.first, compare_tab.second, who]
        _keep_fresh(studio, app, bar, server, pickers)
        _wire_compare(studio, app, tabs, chat_tab, compare_tab)
    return app


def _wire_compare(
    studio: Studio,
    app: gr.Blocks,
    tabs: gr.Tabs,
    chat_tab: chat.ChatTab,
    compare_tab: compare.CompareTab,
) -> None:
    def on_compare(
        talk: Talk, other: str, before: Pane, box: bool, request: gr.Request
    ) -> Iterator[Any]:
        me, page = person_of(request), page_of(request)
        for pane in compare_turn(studio, me, page, talk, other):
            yield gr.Tabs(selected="compare"), *updates(carry(pane, before, box))

    def on_load(box: bool, request: gr.Request) -> Any:
        found = restore(studio, person_of(request))
        return *layout(found), *updates(carry(found, found, box))

    chat_tab.compare.click(
        told(on_compare),
        [chat_tab.talk, chat_tab.other, compare_tab.pane, compare_tab.blind],
        [tabs, *compare_tab.outputs],
        show_progress="hidden",
        concurrency_limit=None,
    ).then(None, js="() => window.studio.shown('cmp')")
    app.load(
        told(on_load),
        compare_tab.blind,
        [*compare_tab.asking, *compare_tab.outputs],
        show_progress="hidden",
    )


def _keep_fresh(
    studio: Studio, app: gr.Blocks, bar: gr.HTML, server: str, pickers: list[gr.Dropdown]
) -> None:
    """Adapters that were adopted appear in every open page; the bar says how things stand."""
    seen = gr.State((-1, ""))

    def on_tick(before: tuple[int, str], request: gr.Request) -> Any:
        now = (studio.engine.version(), studio.engine.state())
        if now == before:
            return (gr.skip(),) * (2 + len(pickers))
        names = studio.engine.answerers()
        fresh = [gr.Dropdown(choices=names) for _ in pickers]
        return now, _bar(studio, person_of(request).name, server), *fresh

    timer = gr.Timer(_LOOK_SECONDS)
    for listen in (timer.tick, app.load):
        listen(told(on_tick), [seen], [seen, bar, *pickers], show_progress="hidden", queue=False)


def _bar(studio: Studio, name: str, server: str) -> str:
    # A page that has slept through a restart sees another server here, and loads itself again.
    facts, state = studio.engine.facts(), studio.engine.state()
    ready = state == "ready"
    what = f"{facts.model} \u00b7 {facts.quantization} \u00b7 {facts.device}"
    said = "ready" if ready else state
    who = f'<span class="what me">you are {html.escape(name)}</span>' if name else ""
    return (
        f'<div id="studio-bar" data-server="{server}"><span class="name">lora-rlhf studio</span>'
        '<button type="button" id="studio-shortcuts" aria-haspopup="dialog">'
        "<kbd>?</kbd> Shortcuts</button>"
        f'<span class="what"><span class="dot {"ready" if ready else ""}"></span>'
        f'<span class="said">{html.escape(said)}</span>'
        '<span class="lost">connection lost, trying again</span>'
        f" \u00b7 {html.escape(what)}</span>{who}</div>"
    )
