"""Which judgements count for what, and the pairs in them."""

from itertools import combinations

from lora_rlhf.preferences.events import Judgement, Task
from lora_rlhf.preferences.store import Judged

_WORDS_A_MINUTE = 300
_TOO_FAST = 0.25
_MS_A_MINUTE = 60_000

Pair = tuple[str, str]


def why_not_counted(judged: Judged) -> str | None:
    """Why a judgement says nothing unbiased of win rates; None when it counts.

    Tasks chosen by anything but chance are no fair sample of prompts, and whoever knows the
    adapters, or sees scores, judges these rather than the answers.
    """
    task, judgement = judged.task, judged.judgement
    checks = {
        "retracted": judged.retracted,
        "imported": task.sampler.strategy == "import",
        "a like": judgement.type == "like",
        "skipped": judgement.outcome == "skip",
        "unfinished answer": bool(task.unfinished),
        "a repeat": task.sampler.strategy == "repeat",
        "actively chosen": task.sampler.strategy == "active",
        "not blind": not (task.blind and judgement.blind),
        "scores were shown": judgement.scores_visible,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def counts_for_win_rate(judged: Judged) -> bool:
    """Whether a judgement is uniform, blind and of finished answers."""
    return why_not_counted(judged) is None


def pairs_of(judged: Judged) -> tuple[list[Pair], list[Pair]]:
    """(better, worse) rids of all strict pairs of a ranking, and the pairs that tie."""
    groups = judged.judgement.ranking
    strict = [(a, b) for better, worse in combinations(groups, 2) for a in better for b in worse]
    return strict, [pair for group in groups for pair in combinations(group, 2)]


def seconds_of(judgement: Judgement) -> float | None:
    """How long a judgement took: by the browser's clock, else by the server's; None: unknown."""
    ms = judgement.client_ms if judgement.client_ms is not None else judgement.server_ms
    return None if ms is None else ms / 1000


def is_too_fast(task: Task, judgement: Judgement) -> bool:
    """Whether it came in under a quarter of the time that reading at 300 words a minute takes.

    So says the browser's clock, or a flag that the app has set; a skip needs no reading.
    """
    if judgement.outcome == "skip":
        return False
    if "fast" in judgement.flags:
        return True
    if judgement.client_ms is None:
        return False
    texts = [m["content"] for m in task.prompt] + [r.text for r in task.responses]
    words = sum(len(text.split()) for text in texts)
    return judgement.client_ms < _TOO_FAST * words / _WORDS_A_MINUTE * _MS_A_MINUTE
