"""The Compare tab: two answers side by side, named or blind, and a vote on them."""

import html
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from ui.chatting import controls_of
from ui.comparing import POOL, TYPED, Pane, Vote, ask_both, carry, undo, vote
from ui.people import person_of
from ui.studio import Studio
from ui.tabs.parts import sampling_panel
from ui.wiring import page_of, status_html, told

_BUTTONS: list[tuple[Vote, str, str]] = [
    ("a_much", "A much better", "cmp-a-much"),
    ("a", "1 \u00b7 A", "cmp-a"),
    ("tie", "0 \u00b7 Tie", "cmp-tie"),
    ("both_bad", "9 \u00b7 Both bad", "cmp-bad"),
    ("b", "2 \u00b7 B", "cmp-b"),
    ("b_much", "B much better", "cmp-b-much"),
]
_ASK, _DRAW = "Ask both", "Draw another"
_BLIND = "hide who answers until you vote"
_OVERRULED = {False: "off for this pair: it shows who answers", True: "on for this pair"}
_BLUR = "(...sent) => { document.activeElement?.blur(); return sent; }"  # for the voting keys
_SHOWN = "() => window.studio.shown('cmp')"


@dataclass
class CompareTab:
    """What other tabs are wired to.

    Attributes:
        outputs: of `updates`.
        asking: of `layout`.
    """

    pane: gr.State
    outputs: list[Any]
    asking: list[Any]
    blind: gr.Checkbox
    first: gr.Dropdown
    second: gr.Dropdown


def build(studio: Studio) -> CompareTab:
    """Lay the tab out and wire it."""
    facts, names = studio.engine.facts(), studio.engine.answerers()
    pane = gr.State(Pane())
    client = gr.Textbox("", visible="hidden", elem_id="cmp-client")
    blind, first, second, source = _toolbar(names)
    with gr.Row(elem_classes="composer", equal_height=True):
        box = gr.Textbox(
            label="Prompt for both",
            placeholder="Ask both the same (Enter asks)",
            show_label=False,
            container=False,
            lines=1,
            max_lines=6,
            elem_id="cmp-box",
            scale=8,
        )
        asker = gr.Button(_ASK, variant="primary", elem_id="cmp-next", scale=1, min_width=110)
        stopper = gr.Button("Stop", elem_id="cmp-stop", scale=1, min_width=90)
    prompt = gr.HTML(_prompt_html(""), elem_id="cmp-prompt")
    answers, whose = _answer_cards()
    status = gr.HTML(status_html(Pane().status), elem_id="cmp-status")
    with gr.Row(elem_classes="votes", elem_id="cmp-votes"):
        voters = [
            gr.Button(label, elem_id=elem_id, interactive=False, min_width=64)
            for _, label, elem_id in _BUTTONS
        ]
    with gr.Row(elem_classes="votes quiet"):
        skip = gr.Button("S \u00b7 Skip", elem_id="cmp-skip", interactive=False, min_width=64)
        back = gr.Button("U \u00b7 Undo", elem_id="cmp-undo", interactive=False, min_width=64)
        with gr.Column(visible=False, min_width=64) as way_on:
            forth = gr.Button(
                "N \u00b7 Next", variant="primary", elem_id="cmp-another", interactive=False
            )
    panel = sampling_panel(facts, "cmp-sampling")
    outputs = [pane, prompt, *answers, *whose, status, *voters, skip, back, forth, blind]
    asking = [source, box, asker, way_on]
    _wire_votes(studio, outputs, (pane, client, blind), [*voters, skip], back)
    inputs = [pane, blind, box, source, first, second, *panel]
    _wire_asking(studio, outputs, asking, inputs, forth, stopper)
    return CompareTab(pane, outputs, asking, blind, first, second)


def _toolbar(names: list[str]) -> tuple[gr.Checkbox, gr.Dropdown, gr.Dropdown, gr.Dropdown]:
    """Blind, the two who answer, and where prompts come from."""
    with gr.Row(elem_classes="toolbar", equal_height=True):
        blind = gr.Checkbox(True, label="Blind", info=_BLIND, elem_id="cmp-blind", min_width=150)
        first = gr.Dropdown(
            names,
            value=names[max(0, len(names) - 2)],
            label="Between",
            elem_id="cmp-first",
            min_width=130,
        )
        second = gr.Dropdown(
            names, value=names[-1], label="and", elem_id="cmp-second", min_width=130
        )
        source = gr.Dropdown(
            [TYPED, POOL], value=TYPED, label="Prompts", elem_id="cmp-source", min_width=130
        )
    return blind, first, second, source


def _answer_cards() -> tuple[list[gr.Markdown], list[gr.HTML]]:
    """A and B: the answers, and who gave them."""
    answers, whose = [], []
    with gr.Row(elem_id="cmp-answers", equal_height=True):
        for letter in ("A", "B"):
            with gr.Column(elem_classes="answer-card", min_width=280):
                gr.HTML(f'<div class="letter" aria-hidden="true">{letter}</div>')
                answers.append(
                    gr.Markdown(
                        "",
                        elem_id=f"cmp-answer-{letter.lower()}",
                        elem_classes="answer",
                        latex_delimiters=[],
                        line_breaks=True,
                    )
                )
                whose.append(gr.HTML("", elem_id=f"cmp-facts-{letter.lower()}"))
    return answers, whose


def _wire_votes(
    studio: Studio,
    outputs: list[Any],
    inputs: tuple[gr.State, gr.Textbox, gr.Checkbox],
    voters: list[gr.Button],
    back: gr.Button,
) -> None:
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}

    def on_vote(said: Vote) -> Any:
        def handler(now: Pane, sent: str, box: bool, request: gr.Request) -> Any:
            return updates(carry(vote(studio, person_of(request), now, said, sent), now, box))

        return told(handler)

    def on_undo(now: Pane, sent: str, box: bool, request: gr.Request) -> Any:
        return updates(carry(undo(studio, person_of(request)), now, box))

    said: list[Vote] = [*(button[0] for button in _BUTTONS), "skip"]
    for button, each in zip(voters, said, strict=True):
        button.click(
            on_vote(each),
            [*inputs],
            outputs,
            js="(pane, sent, box) => [pane, window.studio.done('cmp'), box]",
            **at_once,
        )
    back.click(told(on_undo), [*inputs], outputs, **at_once).then(None, js=_SHOWN)


def _wire_asking(
    studio: Studio,
    outputs: list[Any],
    asking: list[Any],
    inputs: list[Any],
    forth: gr.Button,
    stopper: gr.Button,
) -> None:
    source, box, asker, _ = asking

    def ask(
        request: gr.Request,
        now: Pane,
        blind: bool,
        text: str,
        source: str,
        first: str,
        second: str,
        *knobs: Any,
    ) -> Iterator[Any]:
        me, page = person_of(request), page_of(request)
        both = controls_of(first, *knobs), controls_of(second, *knobs)
        wish = bool(blind) if now.wish is None else now.wish
        now = replace(now, drawn=source == POOL)
        for step in ask_both(studio, me, page, text, source, wish, both):
            yield updates(carry(step, now, bool(blind)))

    def on_next(
        request: gr.Request, now: Pane, blind: bool, text: str, *more: Any
    ) -> Iterator[Any]:
        yield from ask(request, now, blind, "", POOL, *more[1:])

    def on_source(
        request: gr.Request, now: Pane, blind: bool, text: str, source: str, *more: Any
    ) -> Iterator[Any]:
        waits = now.drawn and now.can_vote
        now = replace(now, drawn=source == POOL, box=None)
        yield *layout(now), *updates(now)
        if now.drawn and not waits:
            for step in ask(request, now, blind, text, source, *more):
                yield *(gr.skip() for _ in asking), *step

    def on_stop(request: gr.Request) -> None:
        studio.stop(person_of(request).name, f"compare/{page_of(request)}")

    streaming: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
    asked = gr.on([box.submit, asker.click], told(ask), inputs, outputs, **streaming)
    drawn = forth.click(told(on_next), inputs, outputs, **streaming)
    chosen = source.input(told(on_source), inputs, [*asking, *outputs], js=_BLUR, **streaming)
    for event in (asked, drawn, chosen):
        event.then(None, js=_SHOWN)
    stopper.click(told(on_stop), queue=False, show_progress="hidden")


def updates(pane: Pane) -> list[Any]:
    """The pane as values of the tab's components."""
    buttons = [gr.Button(interactive=pane.can_vote) for _ in _BUTTONS]
    return [
        pane,
        _prompt_html(pane.prompt),
        *pane.texts,
        *(f'<div class="facts">{facts}</div>' if facts else "" for facts in pane.facts),
        status_html(pane.status, pane.tone),
        *buttons,
        gr.Button(interactive=pane.can_vote),
        gr.Button(interactive=pane.can_undo),
        gr.Button(interactive=pane.can_go_on),
        _blind_box(pane),
    ]


def _blind_box(pane: Pane) -> Any:
    if pane.box is None:
        return gr.skip()
    info = _BLIND if pane.wish is None else _OVERRULED[pane.box]
    return gr.Checkbox(value=pane.box, info=info, interactive=pane.wish is None)


def layout(pane: Pane) -> list[Any]:
    """Where prompts come from: the picker, the box to type in, the button, and the way on.

    Apart from `updates`, which a stream sends many times: what comes and goes is slow to draw.
    """
    return [
        gr.Dropdown([TYPED, POOL], value=POOL if pane.drawn else TYPED),
        gr.Textbox(visible=not pane.drawn),
        gr.Button(_DRAW if pane.drawn else _ASK),
        gr.Column(visible=pane.drawn),
    ]


def _prompt_html(text: str) -> str:
    shown = html.escape(text) or '<span class="hint">The prompt stands here.</span>'
    return f'<div class="prompt">{shown}</div>'
