"""The Retrain tab: from votes to the next reward model and policy. For admins alone."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from ui.people import Person, person_of
from ui.retrain_views import FORCE, RESUME
from ui.retraining import SCOPES
from ui.studio import Studio
from ui.trainer import (
    OVERRIDES_HINT,
    View,
    adopt,
    cancel,
    discard,
    dry_run,
    resume,
    start,
    view,
    wishes_of,
)
from ui.wiring import status_html, told

_LOOK_SECONDS = 1.5
_FORCE = 6  # place in the panel
# Below the plan, which is longer than the window.
_TO_THE_QUESTION = """() => setTimeout(() => {
  const yes = document.querySelector('#train-yes');
  if (yes) { yes.scrollIntoView({ block: 'center' }); yes.focus(); }
}, 100)"""
_EMPTY_PLAN = '<p class="hint">The dry run shows what would be trained on. It changes nothing.</p>'


def build(studio: Studio, tab: gr.Tab) -> None:
    """Lay the tab out and wire it."""
    status = gr.HTML(status_html("Nothing is being retrained here."), elem_id="train-status")
    with gr.Column(visible=False, elem_id="train-admin") as everything:
        result = gr.HTML("", elem_id="train-now", visible=False)
        with gr.Row(elem_classes="votes", elem_id="train-decide"):
            adopter = _hidden("Adopt", "train-adopt", "primary")
            resumer = _hidden(RESUME, "train-resume")
            discarder = _hidden("Discard", "train-discard")
            canceller = _hidden("Cancel", "train-cancel", "stop")
        panel = _panel(studio)
        with gr.Row(elem_classes="votes"):
            looker = gr.Button("Dry run", elem_id="train-dry")
            starter = gr.Button("Start", variant="primary", elem_id="train-start")
        plan = gr.HTML(_EMPTY_PLAN, elem_id="train-plan")
        with gr.Column(visible=False, elem_id="train-sure") as sure:
            gr.HTML(status_html("Train now? It takes about as long as the plan above says."))
            with gr.Row(elem_classes="votes"):
                yes = gr.Button("Yes, train", variant="primary", elem_id="train-yes")
                no = gr.Button("Not now", elem_id="train-no")
        log = gr.Textbox(
            "",
            label="Log",
            lines=10,
            max_lines=18,
            interactive=False,
            autoscroll=True,
            visible=False,
            elem_id="train-log",
        )
    timer = gr.Timer(_LOOK_SECONDS, active=False)
    shown = [status, result, log, timer, starter, canceller, resumer, adopter, discarder]
    actions: list[tuple[gr.Button, Callable[[Studio, Person], View]]] = [
        (canceller, cancel),
        (adopter, adopt),
        (discarder, discard),
        (no, view),
    ]
    _wire_planning(studio, panel, plan, (looker, starter, yes), sure, shown)
    _wire_actions(studio, actions, sure, shown)
    _wire_resuming(studio, resumer, panel[_FORCE], shown)
    _wire_looks(studio, tab, timer, everything, panel[0], shown)


def _hidden(label: str, elem_id: str, variant: Any = "secondary") -> gr.Button:
    return gr.Button(label, variant=variant, elem_id=elem_id, visible=False)


def _panel(studio: Studio) -> list[Any]:
    """The controls, in the order of `wishes_of`."""
    bases = studio.jobs.bases()
    with gr.Row(elem_classes="toolbar", equal_height=True):
        base = gr.Dropdown(
            bases, value=bases[-1] if bases else None, label="Start from", elem_id="train-base"
        )
        scope = gr.Radio(list(SCOPES), value="reward + PPO", label="How far", elem_id="train-scope")
    with gr.Row(elem_classes="toolbar"):
        go_on = gr.Checkbox(
            True,
            label="Go on from its reward model and policy",
            info="quick, and a few rankings are enough; else a fresh one learns all anew",
            elem_id="train-go-on",
        )
        earlier = gr.Checkbox(
            False,
            label="Add the earlier rankings",
            info="those its reward model was trained on; a fresh one needs them",
            elem_id="train-earlier",
        )
    go_on.change(lambda on: not on, go_on, earlier, show_progress="hidden")
    with gr.Accordion("More", open=False, elem_id="train-more"):
        heldout = gr.Checkbox(
            False,
            label="Train on votes on held-out prompts, too",
            info="they measure nothing any more, here and in runs that go on from this one",
            elem_id="train-heldout",
        )
        fast = gr.Checkbox(
            False,
            label="Train on votes that came faster than anybody reads, too",
            elem_id="train-fast",
        )
        force = gr.Checkbox(
            False,
            label=FORCE,
            info="with few rankings its accuracy is known badly",
            elem_id="train-force",
        )
        overrides = gr.Textbox(
            "",
            label="Settings",
            info=f"key=value of reward, ppo and evaluate, {OVERRIDES_HINT}",
            lines=1,
            max_lines=4,
            elem_id="train-overrides",
        )
    return [base, scope, go_on, earlier, heldout, fast, force, overrides]


# -- wiring -------------------------------------------------------------------------------------


def updates(now: View) -> list[Any]:
    """For status, progress or result, log, timer and the buttons."""
    below = now.bar or now.result
    return [
        status_html(now.status, now.tone),
        gr.HTML(below, visible=bool(below)),
        gr.Textbox(now.log, visible=bool(now.log)),
        gr.Timer(active=now.busy),
        gr.Button(interactive=now.can_start),
        gr.Button(visible=now.can_cancel),
        gr.Button(visible=now.can_resume),
        gr.Button(visible=now.can_adopt),
        gr.Button(visible=now.can_discard),
    ]


def _wire_planning(
    studio: Studio,
    panel: list[Any],
    plan: gr.HTML,
    buttons: tuple[gr.Button, gr.Button, gr.Button],
    sure: gr.Column,
    shown: list[Any],
) -> None:
    looker, starter, yes = buttons

    def on_dry_run(request: gr.Request, *knobs: Any) -> Any:
        found = dry_run(studio, person_of(request), wishes_of(*knobs))
        return found.shown, gr.skip() if found.can_start else gr.Column(visible=False)

    def on_start(request: gr.Request, *knobs: Any) -> Any:
        # The plan is shown before anybody can say yes to it.
        found = dry_run(studio, person_of(request), wishes_of(*knobs))
        return found.shown, gr.Column(visible=found.can_start)

    def on_yes(request: gr.Request, *knobs: Any) -> Any:
        now = start(studio, person_of(request), wishes_of(*knobs))
        return _EMPTY_PLAN, gr.Column(visible=False), *updates(now)

    looker.click(told(on_dry_run), panel, [plan, sure])
    asked = starter.click(told(on_start), panel, [plan, sure])
    asked.success(None, js=_TO_THE_QUESTION)
    yes.click(told(on_yes), panel, [plan, sure, *shown])


def _wire_actions(
    studio: Studio,
    actions: list[tuple[gr.Button, Callable[[Studio, Person], View]]],
    sure: gr.Column,
    shown: list[Any],
) -> None:
    def handler(act: Callable[[Studio, Person], View]) -> Callable[..., Any]:
        def on_click(request: gr.Request) -> Any:
            return gr.Column(visible=False), *updates(act(studio, person_of(request)))

        return told(on_click)

    for button, act in actions:
        button.click(handler(act), None, [sure, *shown])


def _wire_resuming(
    studio: Studio, resumer: gr.Button, force: gr.Checkbox, shown: list[Any]
) -> None:
    def on_resume(wanted: Any, request: gr.Request) -> Any:
        return updates(resume(studio, person_of(request), wanted))

    resumer.click(told(on_resume), force, shown)


def _wire_looks(
    studio: Studio,
    tab: gr.Tab,
    timer: gr.Timer,
    everything: gr.Column,
    base: gr.Dropdown,
    shown: list[Any],
) -> None:
    def on_tick(request: gr.Request) -> Any:
        return updates(view(studio, person_of(request)))

    def on_select(chosen: Any, request: gr.Request) -> Any:
        me, bases = person_of(request), studio.jobs.bases()
        kept = chosen if chosen in bases else (bases[-1] if bases else None)
        return (
            gr.Column(visible=me.is_admin),
            gr.Dropdown(choices=bases, value=kept),
            *updates(view(studio, me)),
        )

    timer.tick(told(on_tick), None, shown, show_progress="hidden", queue=False)
    tab.select(told(on_select), base, [everything, base, *shown], show_progress="hidden")
