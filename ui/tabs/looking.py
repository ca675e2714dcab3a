"""What tabs share that look again by themselves while somebody sees them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr


@dataclass(frozen=True)
class Looking:
    """An open page that is told only what changed.

    Attributes:
        told: hash of each part as it was sent last.
    """

    told: dict[str, int] = field(default_factory=dict, kw_only=True)


def news(
    page: Looking, parts: Mapping[str, Any], updates: Mapping[str, Any]
) -> tuple[dict[str, int], list[Any]]:
    """What to keep in `Looking.told`, and of each part what to send: nothing if it is as it was.

    Args:
        page: what it was told last.
        parts: of the tab by name, hashable, in the order of the outputs.
        updates: what is sent of a part, where it is not the part itself.
    """
    hashes = {name: hash(part) for name, part in parts.items()}
    sent = [
        gr.skip() if page.told.get(name) == hashes[name] else updates.get(name, part)
        for name, part in parts.items()
    ]
    return hashes, sent


def unseen(outputs: int) -> list[Any]:
    """What a tick answers that nobody sees: the second output, the timer, stops.

    Args:
        outputs: how many there are.
    """
    return [gr.skip(), gr.Timer(active=False), *[gr.skip()] * (outputs - 2)]


def is_seen_js(root: str) -> str:
    """Puts into the last of the inputs whether somebody can see a part of the page.

    Args:
        root: its id.
    """
    return f"""(...inputs) => {{
  const root = document.getElementById('{root}');
  inputs[inputs.length - 1] = root !== null && root.offsetParent !== null;
  return inputs;
}}"""


def one_by_one(tab: str) -> dict[str, Any]:
    """Options of a tab's events: a look that began before a press must not end after it.

    Args:
        tab: a name of its own.
    """
    return {
        "show_progress": "hidden",
        "api_visibility": "private",
        "concurrency_id": tab,
        "concurrency_limit": 1,
    }
