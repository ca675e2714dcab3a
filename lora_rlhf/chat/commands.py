"""What a line typed in the chat does; written on a console, read from anywhere."""

import difflib
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lora_rlhf.chat.engine import BASE, REWARD, Engine, Judgement, Reply
from lora_rlhf.data.records import Message
from lora_rlhf.errors import ConfigError, UserError
from lora_rlhf.evaluation.best_of_n import MOST
from lora_rlhf.evaluation.choosing import require_scorers
from lora_rlhf.model.generation import Sampling
from lora_rlhf.training.ppo import row_seed

_ROLES = {
    BASE: "the model as it was pretrained, no adapter",
    "sft": "imitates the demonstrations; the reference that KL is measured from",
    "reward": "scores answers; trained on rankings",
    "policy": "trained by PPO to score high near sft",
}
_USAGE = {
    "adapter": ("[NAME]", "who answers: base, sft or policy"),
    "compare": ("[A] [B]", "answer the last prompt with two adapters, side by side"),
    "retry": ("", "answer the last prompt again"),
    "undo": ("", "take the last exchange back"),
    "new": ("", "forget the dialogue"),
    "set": ("[NAME VALUE]", "temperature, top_p, max_new_tokens, seed or best_of"),
    "save": ("FILE.jsonl", "add the dialogue to a file of demonstrations"),
    "role": ("[info]", "what each role of the run is"),
    "help": ("", "this list"),
    "quit": ("", "leave (also Ctrl-D)"),
}


@dataclass(frozen=True)
class Settings:
    """What `/set` changes.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: keep the smallest set of tokens with this much probability.
        max_new_tokens: the end token counted.
        seed: the same seed and the same lines give the same answers.
        best_of: so many answers are drawn at once, and the reward adapter's favourite is shown.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    best_of: int = 1


class Chat:
    """A dialogue with the adapters of a run.

    Args:
        engine: gives the answers.
        console: where they are written.
    """

    def __init__(self, engine: Engine, console: Console) -> None:
        self.engine = engine
        self.console = console
        self.adapter = engine.names[-1]
        self.history: list[Message] = []
        data = engine.recipe.data
        self.settings = Settings(
            engine.temperature, 1.0, data.max_response_tokens, engine.recipe.seed
        )
        self._drawn = 0  # answers since the seed was set
        self._commands: dict[str, Callable[[str], bool | None]] = {
            name: getattr(self, f"_{name}") for name in _USAGE
        }

    def handle(self, line: str) -> bool:
        """Act on one line: a command, or a message that is answered.

        Returns:
            False when the user wants to leave.

        Raises:
            UserError: what is wrong with the line; the dialogue is as it was.
        """
        line = line.strip()
        if not line:
            return True
        if line.startswith("/"):
            name, _, rest = line[1:].partition(" ")
            command = self._commands.get(name)
            if command is None:
                raise ConfigError(_not_one_of(f"/{name}", "a command", [f"/{c}" for c in _USAGE]))
            return command(rest.strip()) is not False
        self._say(line)
        return True

    def welcome(self) -> None:
        """Say who answers and how to go on."""
        others = [n for n in self.engine.names if n != self.adapter]
        also = f" (/adapter: {', '.join(others)})" if others else ", for the run has no adapter yet"
        self._tell(f"{self.adapter} answers{also}. /help lists the commands.")
        if self.engine.continues:
            self._tell("This base continues text: each message is a new beginning.")

    # -- answers ----------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        before = list(self.history)
        if before and before[-1]["role"] == "user":
            before.pop()  # it was never answered
        self.history = [*before, {"role": "user", "content": text}]
        try:
            self._answer()
        except UserError:
            self.history = before
            raise

    def _answer(self) -> None:
        """Answer the history, which ends with the user's turn, and add the answer to it."""
        start = self.history[-1]["content"] if self.engine.continues else f"{self.adapter}: "
        self._write(start, style="dim" if self.engine.continues else "bold")
        if self.settings.best_of > 1:
            reply = self._best_reply()
        else:
            reply = self.engine.answer(
                self.adapter, self.history, self._sampling(), self._next_seed(), self._write
            )
            self.console.print()
        self._tell_of(reply)
        if reply.text.strip():
            self.history.append({"role": "assistant", "content": reply.text})

    def _best_reply(self) -> Reply:
        """The best of several by the reward adapter, written whole with its score."""
        count = self.settings.best_of
        with self.console.status(f"{self.adapter} writes {count} answers"):
            reply, scores = self._draw(self.adapter, self.history, self._next_seed())
        self._write(reply.text)
        self.console.print()
        if scores:
            mean = sum(scores) / len(scores)
            self._tell(f"Best of {count}: score {scores[0]:+.2f}, their mean {mean:+.2f}.")
        return reply

    def _draw(self, name: str, asked: list[Message], seed: int) -> tuple[Reply, list[float]]:
        """A whole answer, the best of as many as are set, and their scores, best first."""
        count = self.settings.best_of
        if count == 1:
            return self.engine.answer(name, asked, self._sampling(), seed), []
        seeds = [row_seed(seed, 0, i) for i in range(count)]
        return self.engine.best(name, asked, self._sampling(), seeds)

    def _tell_of(self, reply: Reply) -> None:
        if reply.dropped:
            self._tell(
                f"The dialogue is over the {self.engine.recipe.data.max_prompt_tokens} tokens of "
                f"a prompt: its oldest {reply.dropped} turns were left out."
            )
        if reply.stopped:
            self._tell("Stopped." if reply.text else "Stopped before the first word.")
        elif not reply.text.strip():
            self._tell("An empty answer; /retry draws another.")
        elif not reply.ended:
            most = self.settings.max_new_tokens
            self._tell(f"Cut at max_new_tokens {most}; /set max_new_tokens {2 * most} allows more.")

    def _sampling(self) -> Sampling:
        chosen = self.settings
        return Sampling(chosen.max_new_tokens, chosen.temperature, chosen.top_p)

    def _next_seed(self) -> int:
        self._drawn += 1
        return row_seed(self.settings.seed, self._drawn, 0)

    def _asked(self) -> list[Message]:
        """The history up to the user's last turn."""
        asked = list(self.history)
        while asked and asked[-1]["role"] != "user":
            asked.pop()
        if not asked:
            raise ConfigError("There is no prompt yet. Type one first.")
        return asked

    # -- commands ---------------------------------------------------------------------------------

    def _adapter(self, rest: str) -> None:
        if rest:
            self.adapter = self._answerer(rest)
        others = [n for n in self.engine.names if n != self.adapter]
        also = f" (others: {', '.join(others)})" if others else ""
        self._tell(f"{self.adapter} answers{also}.")

    def _answerer(self, name: str) -> str:
        if name in self.engine.names:
            return name
        if name in ("reward", "value"):
            raise ConfigError(f"{name} gives numbers, not answers; /compare shows scores.")
        raise ConfigError(_not_one_of(name, "one that answers", self.engine.names))

    def _compare(self, rest: str) -> None:
        names = [self._answerer(n) for n in rest.split()] or self._default_pair()
        if len(names) == 1 and names[0] != self.adapter:
            names.append(self.adapter)
        if len(names) != 2 or names[0] == names[1]:
            raise ConfigError(
                f"/compare takes two adapters of {', '.join(self.engine.names)}, such as "
                f"/compare {' '.join(self._default_pair())}"
            )
        asked, seed = self._asked(), self._next_seed()
        replies = []
        for name in names:
            with self.console.status(f"{name} answers"):
                replies.append(self._draw(name, asked, seed)[0])
            if replies[-1].stopped:
                self._tell("Stopped.")
                return
        half = self.console.width // 2 - 1
        panels = [_panel(reply, self.engine.judge(reply), half) for reply in replies]
        self.console.print(Columns(panels, padding=(0, 1)))
        if self.settings.best_of > 1:
            self._tell(f"Each is the best of {self.settings.best_of} by the reward adapter.")

    def _default_pair(self) -> list[str]:
        names = self.engine.names
        if len(names) < 2:
            raise ConfigError("The run has no adapter yet, so there is nothing to compare.")
        return names[-2:]

    def _retry(self, rest: str) -> None:
        asked, before = self._asked(), self.history
        self.history = asked
        try:
            self._answer()
        except UserError:
            self.history = before
            raise

    def _undo(self, rest: str) -> None:
        taken = self._asked()
        text = taken.pop()["content"]
        self.history = taken
        self._tell(f"Took back: {_shortened(text)}")

    def _new(self, rest: str) -> None:
        self.history = []
        self._tell("A new dialogue.")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.replace("=", " ").partition(" ")
            names = [f.name for f in fields(Settings)]
            if name not in names:
                raise ConfigError(_not_one_of(name, "a setting", names))
            self.settings = self._changed(name, value.strip())
            if name == "seed":
                self._drawn = 0
        self._tell(", ".join(f"{k} {v:g}" for k, v in vars(self.settings).items()))

    def _changed(self, name: str, text: str) -> Settings:
        most = self.engine.most_new_tokens
        rules: dict[str, tuple[Callable[[str], float], Callable[[Any], bool], str]] = {
            "temperature": (float, lambda v: 0.0 <= v < 100.0, "0 (the likeliest) or more"),
            "top_p": (float, lambda v: 0.0 < v <= 1.0, "above 0, at most 1"),
            "max_new_tokens": (
                int,
                lambda v: v >= 1 and (most is None or v <= most),
                "a whole number from 1" + (f" to {most}, the base's context" if most else ""),
            ),
            "seed": (int, lambda v: v >= 0, "a whole number from 0"),
            "best_of": (int, lambda v: 1 <= v <= MOST, f"a whole number from 1 to {MOST}"),
        }
        read, is_allowed, allowed = rules[name]
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise ConfigError(f"/set {name} {text}: not allowed. Allowed: {allowed}.")
        if name == "best_of" and value > 1:
            require_scorers(self.engine.backbone, (REWARD,))
        return replace(self.settings, **{name: value})  # type: ignore[arg-type]

    def _save(self, rest: str) -> None:
        turns = list(self.history)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if not turns:
            raise ConfigError("There is no answer to save yet.")
        path = Path(rest).expanduser()
        if path.suffix != ".jsonl":
            raise ConfigError(f"/save {rest}: give a file that ends in .jsonl, such as mine.jsonl")
        # A base that continues text was given each message alone.
        dialogues = [turns]
        if self.engine.continues:
            dialogues = [turns[i : i + 2] for i in range(0, len(turns), 2)]
        try:
            with path.open("a", encoding="utf-8") as file:
                for dialogue in dialogues:
                    file.write(json.dumps({"messages": dialogue}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(f"/save {path}: cannot be written: {error.strerror}.") from error
        count = f"{len(dialogues)} line{'s' if len(dialogues) > 1 else ''}"
        self._tell(f"Added {count} to {path}. As demonstrations: data.demonstrations.path={path}")

    def _role(self, rest: str) -> None:
        if rest not in ("", "info"):
            raise ConfigError(
                f"/role {rest}: write /role info; /adapter {rest} changes who answers."
            )
        adapters = self.engine.backbone.adapters
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
        for heading in ("role", "what it is", "made from", "here"):
            table.add_column(heading, overflow="fold")
        for role, what in _ROLES.items():
            here = role == BASE or role in adapters.names
            source = self.engine.recipe.base.model if role == BASE else adapters.parents.get(role)
            now = "answers" if role == self.adapter else "yes" if here else "not trained"
            table.add_row(Text(role, "bold"), what, Text(source or ""), now)
        self.console.print(table)

    def _help(self, rest: str) -> None:
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, (arguments, what) in _USAGE.items():
            table.add_row(Text(f"/{name} {arguments}", "bold"), what)
        self.console.print(table)
        self._tell(
            "Ctrl-C stops an answer. In /compare, score is the reward model's (demonstrations: 0), "
            "and KL the nats by which the answer is likelier than under sft; of one answer it may "
            "be negative."
        )

    def _quit(self, rest: str) -> bool:
        return False

    # -- writing ----------------------------------------------------------------------------------

    def _write(self, text: str, style: str | None = None) -> None:
        self.console.print(
            _printable(text),
            end="",
            style=style,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )

    def _tell(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, emoji=False, highlight=False)


def _panel(reply: Reply, judgement: Judgement, width: int) -> Panel:
    facts = []
    if judgement.score is not None:
        facts.append(f"score {judgement.score:+.2f}")
    if judgement.kl is not None:
        facts.append(f"KL {round(judgement.kl, 1) + 0.0:+.1f}")  # + 0.0: no -0.0
    facts.append(f"{len(reply.ids)} tokens" + ("" if reply.ended else ", cut"))
    body = Group(Text(_printable(reply.text) or "(empty)"), Text(", ".join(facts), "dim"))
    return Panel(body, title=reply.adapter, width=width, box=box.ROUNDED)


def _printable(text: str) -> str:
    """The text without control characters, with which a model could steer a terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def _not_one_of(name: str, what: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{name} is not {what}.{hint} Allowed: {', '.join(allowed)}."


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
