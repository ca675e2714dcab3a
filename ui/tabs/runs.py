"""Runs: what there is, how it goes, what it answers, its report."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from ui.run_facts import find_run, list_runs, samples_of
from ui.run_views import (
    arms_html,
    curves_html,
    head_html,
    list_html,
    metrics_of,
    prompts_of,
    report_html,
    results_html,
    shown_step,
    stages_of,
    steps_html,
    steps_of,
)
from ui.tabs.here import this_tab
from ui.tabs.looking import Looking, is_seen_js, news, one_by_one, unseen
from ui.wiring import told

if TYPE_CHECKING:
    from ui.studio import Studio

SECONDS = 3.0  # between two looks at a run that is running
ALL_PROMPTS = "All prompts"
BY_STEP, BY_ARM = "Through training", "Before and after"
_LONGEST_LABEL = 80

# The list is HTML of buttons; the one that was pressed is told to Python by its name alone.
_PRESS = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-run]');
  if (button) trigger('select', {run: button.dataset.run});
});
"""


@dataclass(frozen=True)
class Page(Looking):
    """What one open page of the app looks at, and what it was told last.

    The controls' values come from a browser and may be anything.

    Attributes:
        run: name of the chosen run; anything unknown is the newest.
        stage: of the curves; anything unknown is the one that runs, or the last that ran.
        everything: draw all numbers there are.
        kind: of the answers, `BY_STEP` or `BY_ARM`.
        step: of the answers; None follows the newest.
        prompt: number of one of the prompts; anything unknown shows all.
        wants_report: the report was opened.
    """

    run: Any = None
    stage: Any = None
    everything: Any = False
    kind: Any = BY_STEP
    step: Any = None
    prompt: Any = None
    wants_report: bool = False


@dataclass(frozen=True)
class View:
    """What the tab shows of the chosen run.

    Attributes:
        name: of the run; None where there is none.
        runs: the list, as HTML.
        head: as HTML.
        results: as HTML.
        curves: as HTML.
        stages: that have curves.
        stage: whose are shown.
        busy: something changes, so that it is worth looking again.
    """

    name: str | None
    runs: str
    head: str
    results: str
    curves: str
    stages: tuple[str, ...] = ()
    stage: str | None = None
    busy: bool = False


@dataclass(frozen=True)
class Answers:
    """What the tab shows of a run's answers.

    Attributes:
        html: the answers.
        prompts: to choose from.
        prompt: number of the one that is shown; None for all.
        first: step of the first look.
        last: step of the last look.
        step: that is shown.
    """

    html: str
    prompts: tuple[str, ...]
    prompt: int | None = None
    first: int = 0
    last: int = 0
    step: int = 0


# -- handlers -------------------------------------------------------------------------------------


def view(studio: "Studio", page: Page) -> View:
    """The list and one run."""
    runs = list_runs(studio.runs_dir)
    chosen = next((run for run in runs if run.name == page.run), runs[0] if runs else None)
    busy = any(run.state == "running" for run in runs)
    if chosen is None:
        return View(None, list_html(runs, None), "", "", "", busy=busy)
    stages = tuple(stages_of(chosen))
    stage = page.stage
    if stage not in stages:
        stage = chosen.stage if chosen.stage in stages else (stages[-1] if stages else None)
    curves = curves_html(chosen, stage or "", bool(page.everything))
    metrics = metrics_of(chosen, stage) if stage else None
    behind = metrics is not None and metrics.read < 1.0
    return View(
        name=chosen.name,
        runs=list_html(runs, chosen.name),
        head=head_html(chosen),
        results=results_html(chosen),
        curves=curves,
        stages=stages,
        stage=stage,
        busy=busy or behind,
    )


def answers(studio: "Studio", page: Page) -> Answers:
    """What the page's run answered, by step or by arm."""
    run = find_run(studio.runs_dir, page.run)
    by_arm = page.kind == BY_ARM
    samples = samples_of(run.path, "evaluate" if by_arm else "ppo") if run is not None else ()
    prompts = tuple(prompts_of(samples))
    number = page.prompt if type(page.prompt) is int and 0 <= page.prompt < len(prompts) else None
    prompt = None if number is None else prompts[number]
    if by_arm:
        return Answers(arms_html(samples, prompt), prompts, number)
    steps = steps_of(samples) or [0]
    step = shown_step(steps, page.step)
    html = steps_html(samples, step, prompt)
    return Answers(html, prompts, number, steps[0], steps[-1], step)


def report(studio: "Studio", page: Page) -> str:
    """The report of the page's run, as HTML."""
    run = find_run(studio.runs_dir, page.run)
    return "" if run is None else report_html(run)


def look(studio: "Studio", page: Page) -> list[Any]:
    """The page, whether to look again by itself, and what changed since it was told last."""
    found = view(studio, page)
    page = replace(page, run=found.name)
    kept = answers(studio, page)
    if kept.step == kept.last:
        page = replace(page, step=None)  # whoever looks at the newest goes on doing so
    parts = {
        "stage": (found.stages, found.stage),
        "prompts": (kept.prompts, kept.prompt),
        "steps": (kept.first, kept.last, kept.step),
        "runs": found.runs,
        "head": found.head,
        "results": found.results,
        "curves": found.curves,
        "answers": kept.html,
        "report": report(studio, page) if page.wants_report else "",
    }
    updates = {
        "stage": gr.Radio(list(found.stages), value=found.stage),
        "prompts": _prompt_choices(kept),
        "steps": gr.Slider(
            minimum=kept.first,
            maximum=max(kept.last, kept.first + 1),
            value=kept.step,
            visible=kept.last > kept.first,
        ),
    }
    told_now, changed = news(page, parts, updates)
    return [replace(page, told=told_now), gr.Timer(active=found.busy), *changed]


def _prompt_choices(kept: Answers) -> gr.Dropdown:
    labels = [(text[:_LONGEST_LABEL], i) for i, text in enumerate(kept.prompts)]
    return gr.Dropdown(
        [(ALL_PROMPTS, -1), *labels], value=-1 if kept.prompt is None else kept.prompt
    )


# -- layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """The components that events read and write."""

    runs: gr.HTML
    head: gr.HTML
    results: gr.HTML
    stage: gr.Radio
    everything: gr.Checkbox
    curves: gr.HTML
    kind: gr.Radio
    prompt: gr.Dropdown
    step: gr.Slider
    kept: gr.HTML
    page: gr.HTML


def build(studio: "Studio") -> None:
    """Lay out the tab; it looks when it is opened, and goes on looking while something runs."""
    tab = this_tab()
    with gr.Row(elem_id="runs-root", elem_classes="lr"):
        with gr.Column(scale=2, min_width=260, elem_classes="lr-side"):
            runs = gr.HTML(elem_id="runs-list", js_on_load=_PRESS, apply_default_css=False)
            again = gr.Button("Refresh", size="sm", elem_id="runs-refresh")
        with gr.Column(scale=5, min_width=320):
            head = gr.HTML(elem_id="runs-head", apply_default_css=False)
            with gr.Tabs(elem_id="runs-parts"):
                with gr.Tab("Curves"):
                    with gr.Row(elem_classes="lr-controls"):
                        stage = gr.Radio([], label="Stage", elem_id="runs-stage", container=False)
                        everything = gr.Checkbox(
                            label="All numbers",
                            elem_id="runs-everything",
                            container=False,
                            min_width=140,
                        )
                    curves = gr.HTML(elem_id="runs-curves", apply_default_css=False)
                with gr.Tab("Results"):
                    results = gr.HTML(elem_id="runs-results", apply_default_css=False)
                with gr.Tab("Answers"):
                    kind, prompt, step = _answer_controls()
                    kept = gr.HTML(elem_id="runs-answers", apply_default_css=False)
                with gr.Tab("Report") as report_tab:
                    page = gr.HTML(elem_id="runs-report", apply_default_css=False)
    parts = _Parts(runs, head, results, stage, everything, curves, kind, prompt, step, kept, page)
    _wire(studio, parts, again, tab, report_tab)


def _answer_controls() -> tuple[gr.Radio, gr.Dropdown, gr.Slider]:
    with gr.Row(elem_classes="lr-controls"):
        kind = gr.Radio(
            [BY_STEP, BY_ARM], value=BY_STEP, label="Which", elem_id="runs-kind", container=False
        )
        prompt = gr.Dropdown(
            [(ALL_PROMPTS, -1)],
            value=-1,
            label="Prompt",
            elem_id="runs-prompt",
            elem_classes="lr-grow",
        )
        step = gr.Slider(
            0,
            1,
            step=1,
            label="Step",
            elem_id="runs-step",
            visible=False,
            buttons=[],
            elem_classes="lr-grow",
        )
    return kind, prompt, step


def _wire(
    studio: "Studio", parts: _Parts, again: gr.Button, tab: gr.Tab, report_tab: gr.Tab
) -> None:
    page: gr.State = gr.State(Page())
    is_seen = gr.Checkbox(value=True, visible=False)
    timer = gr.Timer(SECONDS, active=False)
    outputs = [page, timer, parts.stage, parts.prompt, parts.step]
    outputs += [parts.runs, parts.head, parts.results, parts.curves, parts.kept, parts.page]
    options = one_by_one("runs")

    def turn(name: str) -> Any:
        """A handler that puts a control's value into the page."""
        return told(lambda now, value: look(studio, replace(now, **{name: value})))

    def press(event: gr.EventData, now: Page) -> list[Any]:
        sent = getattr(event, "_data", None)
        run = sent.get("run") if isinstance(sent, dict) else None
        # Another run has other stages, steps and prompts.
        return look(studio, replace(now, run=run, stage=None, step=None, prompt=None))

    def tick(now: Page, is_visible: bool) -> list[Any]:
        if is_visible:
            return look(studio, now)
        return unseen(len(outputs))

    def again_(now: Page) -> list[Any]:
        return look(studio, now)

    gr.on([tab.select, again.click], told(again_), page, outputs, **options)
    parts.runs.select(told(press), page, outputs, **options)
    timer.tick(told(tick), [page, is_seen], outputs, js=is_seen_js("runs-root"), **options)
    for name, control in (
        ("stage", parts.stage),
        ("everything", parts.everything),
        ("kind", parts.kind),
        ("prompt", parts.prompt),
    ):
        control.input(turn(name), [page, control], outputs, **options)
    parts.step.input(
        turn("step"), [page, parts.step], outputs, trigger_mode="always_last", **options
    )
    report_tab.select(
        told(lambda now: look(studio, replace(now, wants_report=True))), page, outputs, **options
    )
