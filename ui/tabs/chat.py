"""The Chat tab: any adapter answers, streaming; stop, retry, undo, edit, copy, like."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_rlhf.errors import UserError
from ui.chatting import Talk, controls_of, edit, like, retry, send, undo
from ui.people import Person, person_of
from ui.studio import Studio
from ui.tabs.parts import sampling_panel
from ui.wiring import page_of, status_html, told


@dataclass
class ChatTab:
    """What other tabs are wired to."""

    talk: gr.State
    adapter: gr.Dropdown
    other: gr.Dropdown
    compare: gr.Button


def build(studio: Studio) -> ChatTab:
    """Lay the tab out and wire it."""
    facts, names = studio.engine.facts(), studio.engine.answerers()
    talk = gr.State(Talk())
    with gr.Row(elem_classes="toolbar", equal_height=True):
        adapter = gr.Dropdown(
            names, value=names[-1], label="Who answers", elem_id="chat-adapter", scale=2
        )
        other = gr.Dropdown(
            names,
            value=names[-2] if len(names) > 1 else names[-1],
            label="Compare this answer with",
            elem_id="chat-other",
            scale=2,
        )
        compare = gr.Button(
            "Compare", elem_id="chat-compare", elem_classes="beside-field", scale=1, min_width=110
        )
    chatbot = gr.Chatbot(
        elem_id="chat-log",
        height="52vh",
        show_label=False,
        layout="bubble",
        editable="user",
        buttons=["copy"],
        allow_file_downloads=False,
        allow_tags=False,
        latex_delimiters=[],
        feedback_options=["Like", "Dislike"],
        placeholder="### Say something\nAnswers come from one frozen backbone; pick who answers.",
    )
    status = gr.HTML(status_html("Type a message."), elem_id="chat-status")
    with gr.Row(elem_classes="composer", equal_height=True):
        box = gr.Textbox(
            label="Message",
            placeholder="Message (Enter sends, Shift+Enter breaks the line)",
            show_label=False,
            lines=1,
            max_lines=8,
            elem_id="chat-box",
            scale=8,
            container=False,
        )
        sender = gr.Button("Send", variant="primary", elem_id="chat-send", scale=1, min_width=90)
        stopper = gr.Button("Stop", elem_id="chat-stop", scale=1, min_width=90)
        clear = gr.Button("New", elem_id="chat-new", scale=1, min_width=90)
    panel = sampling_panel(facts, "chat-sampling", best_of=True)
    _wire(studio, talk, chatbot, status, box, [adapter, *panel], (sender, stopper, clear))
    return ChatTab(talk, adapter, other, compare)


def _wire(
    studio: Studio,
    talk: gr.State,
    chatbot: gr.Chatbot,
    status: gr.HTML,
    box: gr.Textbox,
    panel: list[Any],
    buttons: tuple[gr.Button, gr.Button, gr.Button],
) -> None:
    shown = [talk, chatbot, status, box]
    sender, stopper, clear = buttons

    def on_send(request: gr.Request, now: Talk, text: str, *knobs: Any) -> Iterator[Any]:
        me, page = person_of(request), page_of(request)
        box: str | None = (
            ""  # emptied once: the next question may be typed while this one is answered
        )
        for step in send(studio, me, page, now, text, controls_of(*knobs)):
            yield _updates(step, step.unsent or box)
            box = None

    def on_retry(request: gr.Request, event: gr.RetryData, now: Talk, *knobs: Any) -> Iterator[Any]:
        me, page = person_of(request), page_of(request)
        for step in retry(studio, me, page, now, event.index, controls_of(*knobs)):
            yield _updates(step)

    def on_edit(request: gr.Request, event: gr.EditData, now: Talk, *knobs: Any) -> Iterator[Any]:
        me, page = person_of(request), page_of(request)
        for step in edit(studio, me, page, now, event.index, event.value, controls_of(*knobs)):
            yield _updates(step, step.unsent or None)

    def on_undo(now: Talk, event: gr.UndoData) -> Any:
        return _updates(*undo(now, event.index))

    def on_like(now: Talk, request: gr.Request, event: gr.LikeData) -> Iterator[Any]:
        yield from _liked(studio, person_of(request), now, event)

    def on_stop(request: gr.Request) -> None:
        studio.stop(person_of(request).name, f"chat/{page_of(request)}")

    sending = gr.on(
        [box.submit, sender.click],
        told(on_send),
        [talk, box, *panel],
        shown,
        show_progress="hidden",
        concurrency_limit=None,
    )
    streaming: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
    retrying = chatbot.retry(told(on_retry), [talk, *panel], shown, **streaming)
    editing = chatbot.edit(told(on_edit), [talk, *panel], shown, **streaming)
    at_once: dict[str, Any] = {"show_progress": "hidden", "queue": False}
    chatbot.undo(told(on_undo), [talk], shown, **at_once)
    chatbot.like(told(on_like), [talk], [talk, chatbot, status], **streaming)
    stopper.click(told(on_stop), **at_once)
    # Else the answer that is being written would bring the old dialogue back.
    anew = [clear.click, chatbot.clear]
    left = gr.on(anew, None, cancels=[sending, retrying, editing], queue=False)
    left.then(lambda: _updates(Talk(status="A new dialogue.")), None, shown, **at_once)


def _liked(
    studio: Studio, person: Person, now: Talk, event: gr.LikeData
) -> Iterator[tuple[Any, ...]]:
    value = event.liked
    if isinstance(value, bool):
        value = "Like" if value else "Dislike"
    try:
        done = like(studio, person, now, event.index, value)
    except UserError as error:
        # In the page the thumb is up already, and goes down again only where its value changes.
        line = status_html(str(error), "bad")
        yield now, gr.Chatbot(feedback_value=[value for _ in now.feedback()]), line
        yield now, gr.Chatbot(feedback_value=now.feedback()), line
        return
    yield done, gr.skip(), status_html(done.status, "good")


def _updates(talk: Talk, box: str | None = None) -> tuple[Any, ...]:
    chatbot = gr.Chatbot(talk.display(), feedback_value=talk.feedback())
    text = gr.skip() if box is None else box
    return talk, chatbot, status_html(talk.status or "Ready."), text
