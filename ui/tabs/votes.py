"""Votes: what they say, how far to believe it, one's own one by one, and files for other tools."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from lora_rlhf.errors import EventRefused
from lora_rlhf.preferences.events import Retract
from lora_rlhf.preferences.exports import EXPORTS, FILTERS
from lora_rlhf.preferences.store import Judged
from ui.downloads import Downloads
from ui.people import Person, person_of, require_admin
from ui.tabs.here import this_tab
from ui.tabs.looking import Looking, is_seen_js, news, one_by_one, unseen
from ui.vote_exports import EVERYTHING, export
from ui.vote_numbers import numbers
from ui.vote_rates import (
    ALL_OTHERS,
    board_html,
    checks_html,
    heat_html,
    plural,
    references,
    usual_reference,
)
from ui.vote_views import (
    COUNTING,
    NO_VOTES,
    consent_html,
    flags_html,
    outcomes_html,
    people_html,
    recent_html,
    tiles_html,
)
from ui.wiring import status_html, told

if TYPE_CHECKING:
    from ui.studio import Studio

SECONDS = 5.0  # between two looks at the store's version
RECENT = 30
_ALL_OTHERS_LABEL = "all others"
_EXPORT_LABELS = {"kto": "KTO"}
_PRESS = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-undo]');
  if (button) trigger('select', {undo: button.dataset.undo});
});
"""
_DOWNLOAD = "() => document.querySelector('a#votes-file, #votes-file a, #votes-file')?.click()"


@dataclass(frozen=True)
class Page(Looking):
    """What one open page looks at, and what it was told last.

    Attributes:
        reference: of the win rates; None for the usual one. From a browser: may be anything.
        everybody: show everybody's judgements; for the admin alone. From a browser as well.
    """

    reference: Any = None
    everybody: Any = False


# -- handlers -------------------------------------------------------------------------------------


def shown(studio: "Studio", person: Person, page: Page) -> dict[str, Any]:
    """All parts of the tab by name, as HTML, but for these.

    Returns:
        `reference`: the choices and the one in use; `everybody`: whether the person may see what
        others judged; `admin` and `some`: whether there is something for an admin, for anybody.
    """
    found = numbers(studio)
    choices = references(found.board)
    reference = page.reference if page.reference in choices else usual_reference(found.board)
    everybody = page.everybody is True and person.is_admin
    return {
        "reference": (tuple(choices), reference),
        "everybody": person.is_admin,
        "admin": person.is_admin and found.judgements > 0,
        "some": found.judgements > 0,
        "tiles": tiles_html(found) if found.judgements else NO_VOTES,
        "board": board_html(found.board, reference),
        "checks": checks_html(found),
        "outcomes": outcomes_html(found),
        "flags": flags_html(found),
        "heat": heat_html(found.heat),
        "recent": recent_html(recent(studio, person, everybody), person.name),
        "consent": consent_html(person.name, studio.store.owes_erasure),
        "people": people_html(found) if person.is_admin else "",
    }


def recent(studio: "Studio", person: Person, everybody: bool = False) -> list[Judged]:
    """The newest judgements that stand, newest first.

    Args:
        studio: whose store.
        person: who asks.
        everybody: not one's own alone.

    Raises:
        NotAllowed: everybody's, and the person is no admin.
    """
    if everybody:
        require_admin(person, "What others judged")
    judged = studio.judged()
    own = judged if everybody else [j for j in judged if j.judgement.annotator == person.name]
    return own[: -RECENT - 1 : -1]


def take_back(studio: "Studio", person: Person, judgement_id: Any) -> str:
    """Retract one's own judgement; what to say of it.

    Raises:
        EventRefused: it is none, another's, or taken back already.
    """
    found = studio.store.judgement(judgement_id) if isinstance(judgement_id, str) else None
    if found is None or found.annotator != person.name:
        raise EventRefused("There is no judgement of yours to take back here. Reload the page.")
    studio.store.add(Retract(ref=found.id, annotator=person.name))
    return "Taken back. It counts nowhere any more."


def erase(studio: "Studio", person: Person) -> str:
    """Remove all that the person judged; what to say of it."""
    count = studio.store.erase(person.name)
    said = f"{plural(count, 'judgement')} of yours removed for good."
    if not studio.store.owes_erasure:
        return said
    return f"{said} Somebody is reading the votes: the text leaves the file with the next one."


# -- layout ---------------------------------------------------------------------------------------

PARTS = (
    "reference",
    "everybody",
    "admin",
    "some",
    "tiles",
    "board",
    "checks",
    "outcomes",
    "flags",
    "heat",
    "recent",
    "consent",
    "people",
)
"""What `look` returns after the page, in this order."""


def look(studio: "Studio", person: Person, page: Page) -> list[Any]:
    """The page, and those of `PARTS` that changed since it was told last."""
    parts = shown(studio, person, page)
    choices, reference = parts["reference"]
    labels = [(_ALL_OTHERS_LABEL if name == ALL_OTHERS else name, name) for name in choices]
    updates = {
        "reference": gr.Dropdown(labels, value=reference, visible=len(labels) > 1),
        "everybody": gr.Checkbox(visible=person.is_admin),
        "admin": gr.Column(visible=parts["admin"]),
        "some": gr.Column(visible=parts["some"]),
    }
    told_now, changed = news(page, {name: parts[name] for name in PARTS}, updates)
    return [replace(page, told=told_now), *changed]


@dataclass(frozen=True)
class _Controls:
    """What events listen to, besides the parts."""

    refresh: gr.Button
    status: gr.HTML
    erase: gr.Button
    sure: gr.Column
    yes: gr.Button
    no: gr.Button
    filters: gr.CheckboxGroup
    exports: dict[str, gr.Button]
    file: gr.DownloadButton
    export_status: gr.HTML


def build(studio: "Studio") -> None:
    """Lay out the tab; it looks when it is opened, and when something was stored."""
    tab = this_tab()
    parts: dict[str, Any] = {}
    with gr.Column(elem_id="votes-root", elem_classes="lr"):
        parts["tiles"] = _html("tiles", value=COUNTING)
        with gr.Column(visible=False, elem_id="votes-some") as parts["some"]:
            refresh, status = _numbers(parts)
        _heading("Your data")
        parts["consent"] = _html("consent")
        erasing = _erasing()
        with gr.Column(visible=False, elem_id="votes-admin") as parts["admin"]:
            _heading("People")
            parts["people"] = _html("people")
            exporting = _exporting()
    _wire(studio, tab, parts, _Controls(refresh, status, *erasing, *exporting))


def _numbers(parts: dict[str, Any]) -> tuple[gr.Button, gr.HTML]:
    """What there is once somebody has judged; the parts are added to those given."""
    with gr.Row(elem_classes="lr-heading"):
        _heading("Win rates")
        parts["reference"] = gr.Dropdown(
            [(_ALL_OTHERS_LABEL, ALL_OTHERS)],
            value=ALL_OTHERS,
            label="against",
            elem_id="votes-reference",
            visible=False,
        )
        refresh = gr.Button("Refresh", size="sm", elem_id="votes-refresh")
    parts["board"] = _html("board")
    _heading("How far to believe them")
    parts["checks"] = _html("checks")
    with gr.Row(elem_classes="lr-halves"):
        with gr.Column(min_width=300):
            _heading("How they ended")
            parts["outcomes"] = _html("outcomes")
        with gr.Column(min_width=300):
            _heading("Marks")
            parts["flags"] = _html("flags")
    _heading("Who met whom")
    parts["heat"] = _html("heat")
    with gr.Row(elem_classes="lr-heading"):
        _heading("Newest judgements")
        parts["everybody"] = gr.Checkbox(
            label="everybody's", elem_id="votes-everybody", container=False, visible=False
        )
    status = gr.HTML(elem_id="votes-status")
    parts["recent"] = _html("recent", js_on_load=_PRESS)
    return refresh, status


def _html(name: str, **options: Any) -> gr.HTML:
    return gr.HTML(elem_id=f"votes-{name}", apply_default_css=False, **options)


def _heading(text: str) -> None:
    gr.HTML(f"<h3>{text}</h3>", apply_default_css=False, elem_classes="lr-title")


def _erasing() -> tuple[gr.Button, gr.Column, gr.Button, gr.Button]:
    ask = gr.Button("Delete my votes\u2026", size="sm", elem_id="votes-erase")
    with gr.Column(visible=False, elem_id="votes-sure", elem_classes="lr-sure") as sure:
        gr.HTML(
            "<p><b>Delete all your judgements for good?</b> They leave win rates, agreement and "
            "exports; models that were trained on them stay as they are. There is no way back.</p>",
            apply_default_css=False,
        )
        with gr.Row(elem_classes="lr-controls"):
            yes = gr.Button("Delete them", variant="stop", elem_id="votes-erase-yes")
            no = gr.Button("Keep them", elem_id="votes-erase-no")
    return ask, sure, yes, no


def _exporting() -> tuple[gr.CheckboxGroup, dict[str, gr.Button], gr.DownloadButton, gr.HTML]:
    _heading("Export")
    gr.HTML(
        '<p class="lr-soft">Each is a zip of JSON lines or CSV with a manifest: counts, filters, '
        "hash of the store. Pairs and rankings are what TRL and our own recipes read.</p>",
        apply_default_css=False,
    )
    filters = gr.CheckboxGroup(
        list(FILTERS), value=list(FILTERS), label="leave out", elem_id="votes-filters"
    )
    with gr.Row(elem_classes="lr-controls"):
        buttons = {
            kind: gr.Button(
                _EXPORT_LABELS.get(kind, kind.capitalize()),
                size="md",
                elem_id=f"votes-export-{kind}",
            )
            for kind in (*EXPORTS, EVERYTHING)
        }
    file = gr.DownloadButton("File", elem_id="votes-file", visible="hidden")
    return filters, buttons, file, gr.HTML(elem_id="votes-exported")


def _wire(studio: "Studio", tab: gr.Tab, parts: dict[str, Any], controls: _Controls) -> None:
    page: gr.State = gr.State(Page())
    is_seen = gr.Checkbox(value=True, visible=False)
    timer = gr.Timer(SECONDS, active=False)
    outputs = [page, timer, *(parts[name] for name in PARTS)]
    options = one_by_one("votes")

    def open_(now: Page, request: gr.Request) -> list[Any]:
        now, *changed = look(studio, person_of(request), now)
        return [now, gr.Timer(active=True), *changed]

    def tick(now: Page, is_visible: bool, request: gr.Request) -> list[Any]:
        if is_visible:
            return open_(now, request)
        return unseen(len(outputs))

    def against(now: Page, value: Any, request: gr.Request) -> list[Any]:
        return open_(replace(now, reference=value), request)

    def whose(now: Page, value: Any, request: gr.Request) -> list[Any]:
        return open_(replace(now, everybody=value), request)

    def press(event: gr.EventData, now: Page, request: gr.Request) -> list[Any]:
        sent = getattr(event, "_data", None)
        judgement = sent.get("undo") if isinstance(sent, dict) else None
        said = take_back(studio, person_of(request), judgement)
        return [status_html(said, "good"), *open_(now, request)]

    def confirm(now: Page, request: gr.Request) -> list[Any]:
        said = erase(studio, person_of(request))
        return [status_html(said, "good"), gr.Column(visible=False), *open_(now, request)]

    gr.on([tab.select, controls.refresh.click], told(open_), page, outputs, **options)
    timer.tick(told(tick), [page, is_seen], outputs, js=is_seen_js("votes-root"), **options)
    parts["reference"].input(told(against), [page, parts["reference"]], outputs, **options)
    parts["everybody"].input(told(whose), [page, parts["everybody"]], outputs, **options)
    parts["recent"].select(told(press), page, [controls.status, *outputs], **options)
    for button, is_open in ((controls.erase, True), (controls.no, False)):
        button.click(
            lambda is_open=is_open: gr.Column(visible=is_open), None, controls.sure, **options
        )
    controls.yes.click(told(confirm), page, [controls.status, controls.sure, *outputs], **options)
    _wire_exports(studio, controls, options)


def _wire_exports(studio: "Studio", controls: _Controls, options: dict[str, Any]) -> None:
    # Below Gradio's own folder: what lies elsewhere is copied there, and stays.
    downloads = Downloads(Path(controls.file.GRADIO_CACHE))

    def make(kind: str) -> Any:
        def call(filters: Any, request: gr.Request) -> tuple[str, str]:
            path, said = export(studio, person_of(request), downloads, kind, filters)
            return str(path), status_html(said, "good")

        return told(call)

    for kind, button in controls.exports.items():
        made = button.click(
            make(kind), controls.filters, [controls.file, controls.export_status], **options
        )
        made.success(None, None, None, js=_DOWNLOAD)
