"""Sentences that several tabs say. Plain text: whoever puts them into a page escapes them."""

from typing import Any

from lora_rlhf.preferences.counting import is_too_fast, seconds_of
from lora_rlhf.preferences.events import Judgement, Task
from ui.asking import Waiting


def plain(sent: Any) -> str:
    """What somebody typed, as text that every file and tokenizer takes: no halves of letters."""
    text = "" if sent is None else str(sent)
    return text.encode("utf-8", "replace").decode("utf-8")


def waiting_text(item: Waiting) -> str:
    """For a status line."""
    before = "1 job is" if item.ahead == 1 else f"{item.ahead} jobs are"
    return f"Waiting for the device: {before} ahead of you."


def saved_text(said: str, task: Task, judgement: Judgement) -> tuple[str, str]:
    """For a status line, with its tone: that it is saved, and whether training will leave it out.

    Args:
        said: in a few words, what the judgement says.
        task: that was judged.
        judgement: as it is stored.
    """
    saved = f"{said}. Saved after {seconds_of(judgement) or 0:.0f} s"
    if is_too_fast(task, judgement):
        return f"{saved}, but that is faster than it can be read: left out of training.", "bad"
    return f"{saved}.", "good"


def facts_text(
    n_tokens: int | None, score: float | None, kl: float | None, finish: str | None = None
) -> str:
    """Reward, KL and length of an answer in one line."""
    parts = []
    if score is not None:
        parts.append(f"reward {score:+.2f}")
    if kl is not None:
        parts.append(f"KL {round(kl, 1) + 0.0:+.1f} nats")  # + 0.0: no -0.0
    if n_tokens is not None:
        parts.append(f"{n_tokens} token{'' if n_tokens == 1 else 's'}")
    if finish == "length":
        parts.append("cut at the length limit")
    elif finish == "stopped":
        parts.append("stopped")
    return " \u00b7 ".join(parts)
