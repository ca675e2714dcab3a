"""Judgements as HTML: at a glance, by outcome, one by one. Every text is escaped here."""

import time
from collections.abc import Sequence
from html import escape

from lora_rlhf.preferences.events import Response
from lora_rlhf.preferences.ratings import BASE
from lora_rlhf.preferences.store import Judged
from lora_rlhf.results import percent
from ui.run_views import ago
from ui.vote_numbers import Numbers
from ui.vote_rates import plural

_LONGEST_PROMPT, _LONGEST_ANSWER = 240, 600

_OUTCOMES = {"decided": "decided", "tie": "tie", "both_bad": "all bad", "skip": "skipped"}
_FLAGS = {
    "fails_instruction": "fails the instruction",
    "inappropriate_for_assistant": "inappropriate for an assistant",
    "hallucination": "hallucination",
    "harmful": "harmful",
    "sexual": "sexual content",
    "violent": "violent content",
    "encourages_harm": "encourages harm",
    "denigrates": "denigrates a group",
    "gives_harmful_advice": "gives harmful advice",
    "expresses_opinion": "expresses an opinion",
    "expresses_moral_judgment": "expresses moral judgment",
    "off_topic": "off topic",
    "too_long": "too long",
    "unsafe": "unsafe",
}
COUNTING = '<p class="lr-note" role="status">Counting the votes\u2026</p>'
NO_VOTES = (
    '<div class="lr-empty"><h3>No judgements yet</h3><p>Open <b>Rank</b> and order a few answers, '
    "or <b>Compare</b> two adapters blind. Win rates, agreement and exports appear here from the "
    "first vote on.</p></div>"
)


# -- at a glance ----------------------------------------------------------------------------------


def tiles_html(numbers: Numbers) -> str:
    """The counts."""
    pair, rank = (_seconds(numbers.seconds[kind]) for kind in ("pair", "rank"))
    tiles = [
        (f"{numbers.judgements:,}", "judgements", f"{numbers.today:,} today"),
        (f"{numbers.board.counted:,}", "count for win rates", "uniform, blind, finished"),
        (pair, "a pair", "median time"),
        (rank, "a ranking", "median time"),
        (str(len(numbers.annotators)), "people", "who judged"),
        (f"{numbers.fast:,}", "very fast", "under a quarter of reading time; not trained on"),
        (f"{numbers.retracted:,}", "taken back", "kept out of everything"),
    ]
    return '<dl class="lr-tiles">' + "".join(map(_tile, tiles)) + "</dl>"


def _tile(tile: tuple[str, str, str]) -> str:
    value, name, note = map(escape, tile)
    return (
        f'<div class="lr-tile"><dt>{name}</dt><dd><b>{value}</b>'
        f'<span class="lr-soft">{note}</span></dd></div>'
    )


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "\u2013"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


# -- what was said --------------------------------------------------------------------------------


def outcomes_html(numbers: Numbers) -> str:
    """How judgements ended."""
    bars = [(_OUTCOMES[name], n) for name, n in numbers.outcomes.items()]
    total = sum(numbers.outcomes.values())
    liked, disliked = numbers.likes
    note = ""
    if liked or disliked:
        note = (
            f'<p class="lr-note">In the chat: {plural(liked, "like")}, {disliked:,} not liked.</p>'
        )
    return _bars(bars, total) + note


def flags_html(numbers: Numbers) -> str:
    """How often each mark was set: the metadata of InstructGPT's table 3, and the app's own."""
    if not numbers.flags:
        return '<p class="lr-note">Nothing was marked yet. In Rank, F marks a task.</p>'
    bars = [(_FLAGS.get(name, name), n) for name, n in numbers.flags.items()]
    note = f"Of {plural(numbers.markable, 'judgement')} that chose or tied."
    return f'{_bars(bars, numbers.markable)}<p class="lr-note">{note}</p>'


def _bars(bars: Sequence[tuple[str, int]], total: int) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="lr-bar-cell">'
        f'<svg class="lr-bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="lr-bar-all" width="100" height="10"/>'
        f'<rect class="lr-bar-part" width="{100 * n / max(total, 1):.1f}" height="10"/></svg></td>'
        f'<td class="lr-number"><b>{n:,}</b></td>'
        f'<td class="lr-number lr-soft">{percent(n / max(total, 1))}</td></tr>'
        for name, n in bars
    )
    return f'<table class="lr-table lr-bars"><tbody>{rows}</tbody></table>'


def people_html(numbers: Numbers) -> str:
    """Who judged how much; for the admin."""
    rows = ""
    for person in numbers.annotators:
        counts = (f"{person.judgements:,}", _seconds(person.seconds), f"{person.fast:,}")
        cells = "".join(f'<td class="lr-number">{count}</td>' for count in counts)
        rows += f'<tr><th scope="row">{escape(person.name)}</th>{cells}</tr>'
    heads = "".join(
        f'<th scope="col" class="lr-number">{head}</th>'
        for head in ("judgements", "median time", "very fast")
    )
    return (
        '<table class="lr-table lr-people"><thead><tr><th scope="col">person</th>'
        f"{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


# -- one by one -----------------------------------------------------------------------------------


def recent_html(judged: Sequence[Judged], me: str, now: float | None = None) -> str:
    """Judgements one by one, the newest first; one's own can be taken back.

    Args:
        judged: in the order they are shown.
        me: whose can be taken back.
        now: seconds since 1970; unset: now.
    """
    if not judged:
        return '<p class="lr-note">None yet.</p>'
    now = time.time() if now is None else now
    return f'<ol class="lr-recent">{"".join(_entry(each, me, now) for each in judged)}</ol>'


def _entry(judged: Judged, me: str, now: float) -> str:
    task, judgement = judged.task, judged.judgement
    is_mine = judgement.annotator == me
    who = "you" if is_mine else judgement.annotator
    kind = {"pair": "pair", "rank": "ranking", "like": "chat"}[judgement.type]
    marks = "".join(f"<li>{escape(_FLAGS.get(f, f))}</li>" for f in judgement.flags)
    prompt = _cut(task.prompt[-1]["content"], _LONGEST_PROMPT)
    undo = (
        f'<button type="button" class="lr-undo" data-undo="{escape(judgement.id)}" '
        f'aria-label="Take back: {escape(_cut(prompt, 60))}">Take back</button>'
        if is_mine
        else ""
    )
    return (
        f'<li><div class="lr-entry"><p class="lr-soft">{escape(who)}, {kind}, '
        f"{ago(judgement.done_ts, now)}</p>"
        f'<p class="lr-asked">{escape(prompt)}</p><p>{_said(judged)}</p>'
        f"{f'<ul class=lr-chips>{marks}</ul>' if marks else ''}"
        f"<details><summary>Answers</summary>{_answers(judged)}</details></div>{undo}</li>"
    )


def _said(judged: Judged) -> str:
    """The choice in one line: best first."""
    task, judgement = judged.task, judged.judgement
    if judgement.type == "like":
        verb = "liked" if judgement.strength == 1 else "did not like"
        return f"{verb} <b>{escape(_name(task.responses[0]))}</b>"
    if judgement.outcome == "skip":
        return "skipped"
    names = [
        " = ".join(f"<b>{escape(_label(task.response(rid)))}</b>" for rid in group)
        for group in judgement.ranking
    ]
    words = {"tie": "tie: ", "both_bad": "all bad: "}.get(judgement.outcome, "")
    much = ", much better" if judgement.strength == 2 else ""
    return words + " &gt; ".join(names) + much


def _answers(judged: Judged) -> str:
    shown = sorted(judged.task.responses, key=lambda r: r.pos)
    return "".join(
        f'<div class="lr-answer"><h4>{escape(_label(r))}</h4>'
        f"<p>{escape(_cut(r.text, _LONGEST_ANSWER))}</p></div>"
        for r in shown
    )


def _label(response: Response) -> str:
    return f"{chr(ord('A') + response.pos)} {_name(response)}"


def _name(response: Response) -> str:
    return response.adapter or BASE


def _cut(text: str, most: int) -> str:
    text = text.strip()
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def consent_html(name: str, owes_erasure: bool = False) -> str:
    """What is stored of a person, and what is not.

    Args:
        name: of the person.
        owes_erasure: text of votes that somebody has deleted is still in the store's files.
    """
    owed = (
        " Votes that were deleted count nowhere any more, but their text is still in the file, "
        "which somebody was reading: it goes with the next vote."
    )
    return (
        f'<p class="lr-consent">Stored with each judgement, under the name <b>{escape(name)}</b>: '
        "the prompt and the answers you saw, your choice, marks and notes, when and for how long, "
        "how many keys it took, and whether on a phone. Nothing else: no address, no browser, no "
        "location. They rank adapters and train the next reward model."
        f"{owed if owes_erasure else ''}</p>"
    )
