"""The Compare tab: two answers side by side, named or blind, and a vote on them."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.chatting import controls_of
from ui.comparing import POOL, TYPED, Pane, Vote, ask_both, undo, vote
from ui.people import person_of
from ui.studio import Studio
from ui.tabs.parts import sampling_panel
from ui.wiring import page_of, status_html, told

_BUTTONS: list[tuple[Vote, str, str]] = [
    ("a_much", "A much better", "cmp-a-much"),
    ("a", "1 \u00b7 A", "cmp-a"),
    ("tie", "0 \u00b7 Tie", "cmp-tie"),
    ("both_bad", "9 \u00b7 Bad", "cmp-bad"),
    ("b", "2 \u00b7 B", "cmp-b"),
    ("b_much", "B much better", "cmp-b-much"),
]


@dataclass
class CompareTab:
    """What other tabs are wired to."""

    outputs: list[Any]
    first: gr.Dropdown
    second: gr.Dropdown


def build(studio: Studio) -> CompareTab:
    """Lay the tab out and wire it."""
    facts, names = studio.engine.facts(), studio.engine.answerers()
    pane = gr.State(Pane())
    client = gr.Textbox("", visible="hidden", elem_id="cmp-client")
    with gr.Row(elem_classes="toolbar", equal_height=True):
        blind = gr.Checkbox(
            True,
            label="Blind",
            info="hide who answers until you vote",
            elem_id="cmp-blind",
            min_width=150,
        )
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
        asker = gr.Button("Ask both", variant="primary", elem_id="cmp-next", scale=1, min_width=110)
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
    panel = sampling_panel(facts, "cmp-sampling")
    outputs = [pane, prompt, *answers, *whose, status, *voters, skip, back]
    _wire(studio, outputs, (pane, client), (box, source, blind, first, second), panel)
    asking = {"ask": asker, "stop": stopper}
    _wire_asking(studio, outputs, asking, (box, source, blind, first, second), panel)
    return CompareTab(outputs, first, second)


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


def _wire(
    studio: Studio,
    outputs: list[Any],
    hidden: tuple[gr.State, gr.Textbox],
    asked: tuple[Any, ...],
    panel: list[Any],
) -> None:
    pane, client = hidden
    voters, skip, back = outputs[-8:-2], outputs[-2], outputs[-1]

    def on_vote(said: Vote) -> Any:
        def handler(now: Pane, sent: str, request: gr.Request) -> Any:
            return updates(vote(studio, person_of(request), now, said, sent))

        return told(handler)

    def on_undo(request: gr.Request) -> Any:
        return updates(undo(studio, person_of(request)))

    for button, said in [*zip(voters, (b[0] for b in _BUTTONS), strict=True), (skip, "skip")]:
        button.click(
            on_vote(said),
            [pane, client],
            outputs,
            js="(pane, sent) => [pane, window.studio.done('cmp')]",
            queue=False,
            show_progress="hidden",
        )
    back.click(told(on_undo), None, outputs, queue=False, show_progress="hidden").then(
        None, js="() => window.studio.shown('cmp')"
    )


def _wire_asking(
    studio: Studio,
    outputs: list[Any],
    buttons: dict[str, gr.Button],
    asked: tuple[Any, ...],
    panel: list[Any],
) -> None:
    box = asked[0]

    def on_ask(
        request: gr.Request,
        text: str,
        source: str,
        blind: bool,
        first: str,
        second: str,
        *knobs: Any,
    ) -> Iterator[Any]:
        me, page = person_of(request), page_of(request)
        both = controls_of(first, *knobs), controls_of(second, *knobs)
        for step in ask_both(studio, me, page, text, source, bool(blind), both):
            yield updates(step)

    def on_stop(request: gr.Request) -> None:
        studio.stop(person_of(request).name, f"compare/{page_of(request)}")

    gr.on(
        [box.submit, buttons["ask"].click],
        told(on_ask),
        [*asked, *panel],
        outputs,
        show_progress="hidden",
        concurrency_limit=None,
    ).then(None, js="() => window.studio.shown('cmp')")
    buttons["stop"].click(told(on_stop), queue=False, show_progress="hidden")


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
    ]


def _prompt_html(text: str) -> str:
    shown = html.escape(text) or '<span class="hint">The prompt stands here.</span>'
    return f'<div class="prompt">{shown}</div>'
