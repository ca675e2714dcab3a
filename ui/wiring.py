"""Between Gradio and the handlers: who asks, errors as a sentence, numbers as text."""

import functools
import html
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lora_rlhf.errors import UserError

_ERROR_SECONDS = 8.0


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose UserError is shown as its sentence; anything else stays a bug."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except UserError as error:
                raise _as_toast(error) from error

        return stream

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise _as_toast(error) from error

    return call


def _as_toast(error: UserError) -> gr.Error:
    # The toast renders markup, and an error may quote what somebody typed.
    return gr.Error(html.escape(str(error)), duration=_ERROR_SECONDS, print_exception=False)


def page_of(request: gr.Request) -> str:
    """Which of a person's open pages asks; Gradio's own id of it."""
    return str(getattr(request, "session_hash", "") or "")


def status_html(text: str, tone: str = "") -> str:
    """A status line; `studio.js` has screen readers announce what the visible one says.

    Args:
        text: plain; escaped here.
        tone: "", good or bad; a mark stands beside the colour.
    """
    mark = {"good": "\u2713 ", "bad": "! "}.get(tone, "")
    return f'<div class="status {tone}">{mark}{html.escape(text)}</div>'
