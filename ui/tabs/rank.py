"""The Rank tab: K answers put in order by keyboard, tap or drag."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lora_rlhf.errors import UserError
from lora_rlhf.preferences.events import FLAGS
from ui.ahead import Plan
from ui.asking import BASE
from ui.assets import text_of
from ui.people import Person, person_of
from ui.ranking import (
    FEWEST,
    MOST,
    Sheet,
    failed_sheet,
    next_sheet,
    plan_of,
    ready_sheet,
    submit,
    undo,
)
from ui.studio import Studio
from ui.wiring import told


def build(studio: Studio, tab: gr.Tab) -> gr.Dropdown:
    """Lay the tab out and wire it; returns the picker of who answers."""
    facts, names = studio.engine.facts(), studio.engine.answerers()
    sheet = gr.State(Sheet())
    ranker = gr.HTML(
        Sheet().for_browser(),
        html_template=text_of("rank.html"),
        js_on_load=text_of("rank.js"),
        elem_id="rank-sheet",
        apply_default_css=False,
        flags=[{"name": flag, "label": flag.replace("_", " ")} for flag in FLAGS if flag != "fast"],
    )
    with gr.Accordion("What is ranked", open=False, elem_id="rank-settings"):
        who = gr.Dropdown(
            names,
            value=[n for n in names if n != BASE][-2:] or names,
            multiselect=True,
            label="Who answers (each about equally often; hidden until you have ranked)",
            elem_id="rank-who",
        )
        with gr.Row():
            panel = [
                gr.Slider(FEWEST, MOST, studio.settings.answers, step=1, label="Answers"),
                gr.Slider(0.1, 2.0, facts.temperature, step=0.05, label="Temperature"),
                gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Top-p"),
                gr.Slider(
                    1, facts.most_new_tokens, facts.default_new_tokens, step=1, label="Longest"
                ),
            ]
        active = gr.Checkbox(
            False,
            label="Choose tasks actively",
            info="the ones the reward model is least sure of, a quarter at random; "
            "chosen ones train the reward model and never enter the win rate",
            elem_id="rank-active",
        )
    _wire(studio, tab, sheet, ranker, [who, *panel], active)
    return who


def _wire(
    studio: Studio,
    tab: gr.Tab,
    sheet: gr.State,
    ranker: gr.HTML,
    panel: list[Any],
    active: gr.Checkbox,
) -> None:
    outputs = [sheet, ranker]

    def on_next(request: gr.Request, now: Sheet, choosing: bool, *knobs: Any) -> Iterator[Any]:
        if now.task_id is not None:
            yield gr.skip(), gr.skip()
            return
        me = person_of(request)
        try:
            plan = plan_of(studio, me, *knobs)
        except UserError as error:
            yield updates(failed_sheet(now, str(error)))
            return
        last = None
        for step in next_sheet(studio, me, plan, now, bool(choosing)):
            # Yielded even where nothing changed: only there does a page that was closed end this.
            yield updates(step) if step != last else (gr.skip(), gr.skip())
            last = step

    def on_submit(
        request: gr.Request, event: gr.EventData, now: Sheet, choosing: bool, *knobs: Any
    ) -> Any:
        me = person_of(request)
        saved = submit(studio, me, now, event._data)
        plan = plan_or_none(me, *knobs)  # what is wrong with it, `on_next` says
        ready = plan and ready_sheet(studio, me, plan, saved, bool(choosing))
        return updates(ready or saved)

    def on_undo(request: gr.Request, now: Sheet, choosing: bool, *knobs: Any) -> Any:
        me = person_of(request)
        return updates(undo(studio, me, plan_or_none(me, *knobs), now))

    def plan_or_none(me: Person, *knobs: Any) -> Plan | None:
        try:
            return plan_of(studio, me, *knobs)
        except UserError:
            return None

    inputs = [sheet, active, *panel]
    waits: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
    at_once: dict[str, Any] = {"show_progress": "hidden", "queue": False}
    tab.select(told(on_next), inputs, outputs, **waits)
    ranker.submit(told(on_submit), inputs, outputs, **at_once).then(
        told(on_next), inputs, outputs, **waits
    )
    ranker.undo(told(on_undo), inputs, outputs, **at_once)


def updates(sheet: Sheet) -> tuple[Sheet, dict[str, Any]]:
    """The sheet as values of the tab's components."""
    return sheet, sheet.for_browser()
