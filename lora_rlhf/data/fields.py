"""Rows of the common formats -> records. What is wrong with a row is raised as BadRow."""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from lora_rlhf.data.problems import BadRow, UselessRow
from lora_rlhf.data.readers import Row
from lora_rlhf.data.records import Demonstration, Message, Messages, Prompt, Ranking, user

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES |= {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_HH_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
# What other data sets call our fields.
_ELSEWHERE = {
    "prompt": ("question", "query", "instruction", "input", "text"),
    "response": ("answer", "completion", "output", "reply", "text"),
    "text": ("content", "document", "story", "body"),
    "chosen": ("preferred", "winner", "good"),
    "rejected": ("dispreferred", "loser", "bad"),
    "responses": ("answers", "completions", "outputs"),
    "ranking": ("ranks", "rank", "order"),
}
_TURNS = ("messages", "conversations")

DEMONSTRATION_FIELDS = ("prompt", "response", "instruction", "input", "output", *_TURNS, "text")
PROMPT_FIELDS = ("prompt", "instruction", "input", *_TURNS, "text", "chosen", "rejected")
RANKING_FIELDS = ("prompt", "chosen", "rejected", "responses", "ranking", "tag", "annotator")
TEXT_FIELDS = ("text",)


def renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row under our field names; a mapped column no longer goes by its own.

    Raises:
        BadRow: a mapped column that the row does not have.
    """
    result = {name: value for name, value in row.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        if theirs not in row:
            near = difflib.get_close_matches(theirs, list(row), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found = f"no column {theirs}, which columns maps to {ours}{hint}"
            raise BadRow("missing column", found, f"{', '.join(row) or 'none'}")
        result[ours] = row[theirs]
    return result


# -- records ------------------------------------------------------------------------------------


def to_demonstration(row: Row) -> Demonstration:
    """Prompt + response, alpaca's instruction, input, output, or messages / conversations.

    Of a dialogue the last answer is the response and all before it the prompt.

    Raises:
        BadRow: none of these, or an empty part.
        UselessRow: a dialogue that does not end with an answer.
    """
    if "prompt" in row and "response" in row:
        return Demonstration(_prompt(row["prompt"]), _text(row["response"], "response"))
    if "instruction" in row and "output" in row:
        return Demonstration(_instruction(row), _text(row["output"], "response", "output"))
    if any(name in row for name in _TURNS):
        turns = _dialogue(row)
        if turns[-1]["role"] != "assistant":
            raise UselessRow("the dialogue does not end with an answer")
        return Demonstration(_question(turns[:-1]), _text(turns[-1]["content"], "response"))
    raise _missing(row, ("prompt", "response"), "or messages; or instruction, input, output")


def to_prompt(row: Row) -> Prompt:
    """Prompt, messages up to the last question, instruction and input, or a preference's prompt.

    Raises:
        BadRow: none of these, or an empty one.
        UselessRow: a preference of which no prompt can be had.
    """
    if "prompt" in row:
        return Prompt(_prompt(row["prompt"]))
    if any(name in row for name in _TURNS):
        turns = _dialogue(row)
        return Prompt(_question(turns[:-1] if turns[-1]["role"] == "assistant" else turns))
    if "instruction" in row:
        return Prompt(_instruction(row))
    if "chosen" in row and "rejected" in row:
        return Prompt(to_ranking(row).prompt)
    raise _missing(row, ("prompt",), "or messages; or instruction, input")


def to_text(row: Row) -> str:
    """The column `text`.

    Raises:
        BadRow: there is none, or it is empty.
    """
    if "text" not in row:
        raise _missing(row, ("text",), "")
    return _text(row["text"], "text")


def to_ranking(row: Row) -> Ranking:
    """Prompt, chosen, rejected (text or messages), whole dialogues, or K-way rankings.

    Raises:
        BadRow: none of these, an empty answer, a ranking that does not fit its answers.
        UselessRow: nothing is preferred to anything, or no single answer is compared.
    """
    if "responses" in row or "ranking" in row:
        return _k_way(row)
    if "chosen" not in row or "rejected" not in row:
        raise _missing(row, ("chosen", "rejected"), "or prompt, responses, ranking")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and "prompt" in row:
        prompt = _prompt(row["prompt"])
        pair = _text(chosen, "response", "chosen"), _text(rejected, "response", "rejected")
    else:
        prompt, pair = _dialogue_pair(row)
    if pair[0].strip() == pair[1].strip():
        raise UselessRow("chosen and rejected are the same")
    return Ranking(prompt, pair, ((0,), (1,)), _name(row, "tag"), _name(row, "annotator"))


# -- rankings -----------------------------------------------------------------------------------


def _dialogue_pair(row: Row) -> tuple[Messages, tuple[str, str]]:
    """Two dialogues that differ in their last answer alone, or two answers as message lists.

    Public collections hold dialogues that part earlier or end in nothing; those are of no use, and
    the user cannot mend them, so that they are counted rather than refused.
    """
    good, bad = (_as_dialogue(row[name], name) for name in ("chosen", "rejected"))
    if good[0]["role"] == "assistant" == bad[0]["role"]:
        if "prompt" not in row:
            raise _missing(row, ("prompt",), "or dialogues that start with the user's turn")
        prompt = _prompt(row["prompt"])
    else:
        shared = 0
        while shared < min(len(good), len(bad)) and good[shared] == bad[shared]:
            shared += 1
        if shared == len(good) == len(bad):
            raise UselessRow("chosen and rejected are the same")
        prompt, good, bad = good[:shared], good[shared:], bad[shared:]
    if [m["role"] for m in (*good, *bad)] != ["assistant", "assistant"]:
        raise UselessRow("the dialogues part before the last answer")
    answers = good[0]["content"].strip(), bad[0]["content"].strip()
    if not all(answers):
        raise UselessRow("an empty answer in a dialogue")
    if not prompt or prompt[-1]["role"] != "user":
        raise UselessRow("no question before the answers")
    return _question(prompt), answers


def _as_dialogue(value: Any, name: str) -> Messages:
    if not isinstance(value, str):
        return _messages(value, name)
    parts = _HH_TURN.split(value)
    if len(parts) < 3 or parts[0].strip():
        raise BadRow(
            "missing column",
            f"no column prompt, and {name} is not a dialogue",
            "a column prompt; or chosen and rejected as whole dialogues, in messages or in "
            "paragraphs that start with Human: and Assistant:",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return tuple({"role": roles[role], "content": text.strip()} for role, text in pairs)


def _name(row: Row, field: str) -> str | None:
    return None if row.get(field) is None else str(row[field])


def _k_way(row: Row) -> Ranking:
    if not {"prompt", "responses", "ranking"} <= row.keys():
        raise _missing(row, ("prompt", "responses", "ranking"), "or prompt, chosen, rejected")
    given = _unpacked(row["responses"])
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
        raise BadRow("bad responses", f"responses: {_short(given)}", "a list of at least 2")
    names: list[Any] = list(range(len(given)))
    if all(isinstance(r, dict) and "rid" in r for r in given):
        names = [r["rid"] for r in given]
    texts = [r.get("text", r.get("content")) if isinstance(r, dict) else r for r in given]
    groups = _tie_groups(row["ranking"], names)
    # Sampled answers can be empty, and nobody should have to mend what a model said.
    if any(isinstance(text, str) and not text.strip() for text in texts):
        raise UselessRow("an empty answer in a ranking")
    responses = tuple(_text(text, "response") for text in texts)
    if len(set(responses)) == 1:
        raise UselessRow("all answers are the same")
    if len(groups) == 1:
        raise UselessRow("all answers tie")
    names_of_it = _name(row, "tag"), _name(row, "annotator")
    return Ranking(_prompt(row["prompt"]), responses, groups, *names_of_it)


def _tie_groups(ranking: Any, names: list[Any]) -> tuple[tuple[int, ...], ...]:
    """Groups of indices from groups of names (indices, or the responses' `rid`), best first."""
    index = {str(name): i for i, name in enumerate(names)}
    allowed = f"tie groups, best first, that name each of {_short(list(index))} once"
    ranking = _unpacked(ranking)
    if not isinstance(ranking, Sequence) or isinstance(ranking, str):
        raise BadRow("bad ranking", f"ranking: {_short(ranking)}", allowed)
    groups = [g if isinstance(g, Sequence) and not isinstance(g, str) else [g] for g in ranking]
    named = [str(name) for group in groups for name in group]
    shown = _short(ranking)
    for name in named:
        if name not in index:
            raise BadRow("bad ranking", f"ranking {shown} names no answer by {name}", allowed)
        if named.count(name) > 1:
            raise BadRow("bad ranking", f"ranking {shown} names {name} more than once", allowed)
    left = [name for name in index if name not in named]
    if left or not all(groups):
        found = f"leaves out {', '.join(left)}" if left else "has an empty group"
        raise BadRow("bad ranking", f"ranking {shown} {found}", allowed)
    return tuple(tuple(index[str(name)] for name in group) for group in groups)


# -- parts --------------------------------------------------------------------------------------


def _prompt(value: Any) -> Messages:
    """A prompt given as text or as messages."""
    if isinstance(value, str) or value is None:
        return user(_text(value, "prompt"))
    return _question(_messages(value, "prompt"))


def _instruction(row: Row) -> Messages:
    asked, given = _text(row["instruction"], "prompt", "instruction"), row.get("input")
    given = given.strip() if isinstance(given, str) else ""
    return user(f"{asked}\n\n{given}" if given else asked)


def _dialogue(row: Row) -> Messages:
    name = next(n for n in _TURNS if n in row)
    return _messages(row[name], name)


def _messages(value: Any, name: str) -> Messages:
    """Turns as role and content, or as ShareGPT's from and value."""
    value = _unpacked(value)
    allowed = "a list of {role, content} or {from, value}, with text in them"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow("bad messages", f"{name}: {_short(value)}", allowed)
    turns: list[Message] = []
    for turn in value:
        fields = turn if isinstance(turn, dict) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content")
        content = fields.get("value") if content is None else content
        if role not in _ROLES:
            found = f"{name}: a turn with the role {_short(role)}"
            raise BadRow("bad messages", found, f"{allowed}; roles {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise BadRow("bad messages", f"{name}: a turn with {_short(content)}", allowed)
        turns.append({"role": _ROLES[role], "content": content})
    return tuple(turns)


def _question(turns: Messages) -> Messages:
    """The turns, if they end with a question to answer."""
    if not turns or turns[-1]["role"] != "user":
        found = f"roles {', '.join(m['role'] for m in turns)}" if turns else "no turn"
        raise BadRow("bad prompt", f"before the answer: {found}", "a user's turn at the end")
    _text(turns[-1]["content"], "prompt")
    return turns


def _text(value: Any, what: str, name: str = "") -> str:
    where = f" ({name})" if name else ""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"empty {what}", f"an empty {what}{where}", "text with at least one character")
    if not isinstance(value, str):
        raise BadRow(f"{what} not text", f"{what}{where}: {_short(value)}", "text")
    return value


def _unpacked(value: Any) -> Any:
    """A list written as JSON in a cell of text, as CSV has to."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _missing(row: Row, names: Sequence[str], other: str) -> BadRow:
    lacking = [name for name in names if name not in row]
    mapped: dict[str, str] = {}
    for name in lacking:
        near = [n for n in _ELSEWHERE.get(name, ()) if n in row]
        near += difflib.get_close_matches(name, [n for n in row if n not in names], n=1)
        if near and near[0] not in mapped.values():
            mapped[name] = near[0]
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapped.items())
    hint = f"; did you mean columns: {{{pairs}}}?" if pairs else ""
    found = f"no column {' or '.join(lacking)} (there are: {', '.join(row) or 'none'}){hint}"
    allowed = f"{', '.join(names)} (map others with columns: {{{names[0]}: NAME}}) {other}".strip()
    return BadRow("missing column", found, allowed)
