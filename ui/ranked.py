"""What is said of a ranking once it is saved: who wrote what, and how much somebody has ranked."""

import time
from dataclasses import dataclass

from lora_rlhf.preferences.agreement import median_seconds
from lora_rlhf.preferences.events import Judgement, Response, Task
from lora_rlhf.preferences.store import Judged
from ui.tasks import LETTERS, as_shown
from ui.words import facts_text

_DAY = 86_400.0
_REVEALS = {
    "decided": "Your last ranking, best first:",
    "tie": "Your last ranking, all tied:",
    "both_bad": "All bad in your last ranking:",
    "skip": "Who wrote what you skipped:",
}


@dataclass(frozen=True)
class Reveal:
    """Who wrote the answers of a judged task.

    Attributes:
        title: above the lines.
        lines: one an answer, best first: its place, such as "2 =" where it is tied, "" where it
            has none; and its letter, adapter and numbers.
    """

    title: str
    lines: tuple[tuple[str, str], ...]


def reveal(task: Task, judgement: Judgement) -> Reveal:
    """Who wrote what, in the order of the ranking, with places, reward and KL."""
    lines, place = [], 1
    for group in judgement.ranking:
        shown = f"{place}{' =' if len(group) > 1 else ''}"
        lines += [(shown, _written(task.response(rid))) for rid in group]
        place += len(group)
    title = _REVEALS[judgement.outcome]
    if judgement.outcome != "decided":  # nothing was better than anything else
        lines = [("", _written(response)) for response in as_shown(task)]
    elif len(judgement.ranking) < len(lines):
        title = "Your last ranking, best first, = where tied:"
    return Reveal(title, tuple(lines))


def _written(r: Response) -> str:
    facts = facts_text(r.n_tokens, r.rm_score, r.kl_to_ref, r.finish_reason)
    return f"{LETTERS[r.pos]}: {r.adapter or 'base'} \u00b7 {facts}"


def tally(own: list[Judged]) -> str:
    """How much a person has ranked, skips apart, and how fast, in a line."""
    own = [j for j in own if j.judgement.outcome != "skip"]
    if not own:
        return "No ranking yet."
    now = time.time()
    today = sum(now - j.judgement.done_ts < _DAY for j in own)
    seconds = median_seconds(own)
    speed = "" if seconds is None else f" \u00b7 median {seconds:.0f} s"
    return f"{len(own)} ranked \u00b7 {today} in 24 hours{speed}"
