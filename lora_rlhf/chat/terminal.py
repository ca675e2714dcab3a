"""The terminal around a chat: reads lines, and knows Ctrl-C from Ctrl-D."""

import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

from rich.console import Console

from lora_rlhf.chat.commands import Chat
from lora_rlhf.chat.engine import Engine
from lora_rlhf.errors import UserError
from lora_rlhf.quiet import hush
from lora_rlhf.runs import Run

_PROMPT = "> "


def chat(
    run: Run,
    console: Console | None = None,
    read: Callable[[str], str] | None = None,
    best_of: int = 1,
) -> None:
    """Talk to the adapters of a run until the user leaves.

    Args:
        run: any adapters it has are there to talk to; the base always is.
        console: where answers are written; unset, the terminal.
        read: gives a line for a prompt, and raises EOFError at the end; unset, standard input.
        best_of: as `/set best_of`.

    Raises:
        UserError: the run's base or adapters cannot be loaded, or nothing can choose the best.
    """
    hush()
    console = console or Console(highlight=False)
    with console.status(f"Loading {run.name}"):
        engine = Engine.open(run)
    talk = Chat(engine, console)
    talk.welcome()
    if best_of > 1:
        talk.handle(f"/set best_of {best_of}")
    converse(talk, read or _line_reader(console))


def converse(talk: Chat, read: Callable[[str], str]) -> None:
    """Handle line after line; a user's mistake is told and the chat goes on."""
    console = talk.console
    while True:
        try:
            if not talk.handle(read(_PROMPT)):
                return
        except UserError as error:
            console.print(str(error), style="red", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D leaves.", style="dim", markup=False)
        except EOFError:
            console.print()
            return


def _line_reader(console: Console) -> Callable[[str], str]:
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on every system; brings line editing and history
            import_module("readline")
        return input

    def read(prompt: str) -> str:
        """A line of a pipe or file, shown, so that what comes out reads as a dialogue."""
        line = input()
        console.print(prompt + line, markup=False, highlight=False, soft_wrap=True)
        return line

    return read
