"""A recipe's sources as records, and the look at all of them before anything trains."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from lora_rlhf.data import fields
from lora_rlhf.data.fields import to_demonstration, to_prompt, to_ranking, to_text
from lora_rlhf.data.plain import split_document
from lora_rlhf.data.problems import BadRow, Loaded, Problem, UselessRow, require
from lora_rlhf.data.readers import OF_APP, Row, Unreachable, name_of, read_rows
from lora_rlhf.data.records import Demonstration, Prompt, R, Ranking, Text, user
from lora_rlhf.data.template import ChatFormat
from lora_rlhf.errors import DataError
from lora_rlhf.recipe import Recipe, Source

_BUILTIN_COUNT = 2000

__all__ = [
    "Loaded",
    "Problem",
    "check_data",
    "load_demonstrations",
    "load_prompts",
    "load_rankings",
    "load_text",
    "require",
]


def load_demonstrations(
    source: Source, tokenizer: Any = None, seed: int = 0
) -> Loaded[Demonstration]:
    """Demonstrations; plain text is cut into prompt and response after `prompt_tokens` tokens.

    Args:
        source: from the recipe.
        tokenizer: needed where `source.prompt_tokens` is set.
        seed: of a builtin source.
    """
    if source.builtin is not None:
        return _builtin(source, seed, False, to_demonstration)
    if source.prompt_tokens is not None:
        return _load(
            source,
            fields.TEXT_FIELDS,
            lambda row: _split_text(row, source.prompt_tokens, tokenizer),
        )
    return _load(source, fields.DEMONSTRATION_FIELDS, _whole_demonstration)


def load_rankings(source: Source) -> Loaded[Ranking]:
    """Preferences and K-way rankings; those in which nothing is preferred are counted, not kept.

    So are those of a store on prompts that the app holds out, unless `source.heldout`.
    """
    loaded = _load(source, fields.RANKING_FIELDS, to_ranking)
    if loaded.dropped and not loaded.records and not loaded.problems:
        reasons = ", ".join(f"{n} x {why}" for why, n in loaded.dropped.items())
        found = f"no row can be trained on ({reasons})"
        allowed = "at least one row in which one answer is better than another"
        if OF_APP in loaded.dropped:
            allowed += f"; heldout: true beside path trains on what is {OF_APP}, too"
        loaded.problems.append(Problem(name_of(source), 0, found, allowed, "one class only"))
    return loaded


def load_prompts(
    source: Source, tokenizer: Any = None, heldout: bool = False, seed: int = 0
) -> Loaded[Prompt]:
    """Prompts; of plain text the first `prompt_tokens` tokens, or without that each document.

    Args:
        source: from the recipe.
        tokenizer: needed where `source.prompt_tokens` is set.
        heldout: of a builtin source, the prompts that its training never sees; of a store, also
            those that the app holds out.
        seed: of a builtin source.
    """
    if source.builtin is not None:
        return _builtin(source, seed, heldout, to_prompt)
    if heldout:
        source = source.model_copy(update={"heldout": True})
    if source.prompt_tokens is not None:
        count = source.prompt_tokens
        return _load(
            source,
            fields.TEXT_FIELDS,
            lambda row: Prompt(_split_text(row, count, tokenizer).prompt),
        )
    return _load(source, fields.PROMPT_FIELDS, _whole_prompt)


def load_text(source: Source, seed: int = 0) -> Loaded[Text]:
    """Plain texts."""
    if source.builtin is not None:
        return _builtin(source, seed, False, lambda row: Text(to_text(row)))
    return _load(source, fields.TEXT_FIELDS, lambda row: Text(to_text(row)))


# -- rows to records ----------------------------------------------------------------------------


def _load(source: Source, allowed: Sequence[str], convert: Callable[[Row], R]) -> Loaded[R]:
    """Every row converted; bad ones become problems, useless ones are counted."""
    name, loaded = name_of(source), Loaded[R]()
    loaded.problems += _unknown_fields(source, allowed)
    if loaded.problems:
        return loaded
    missing: dict[tuple[str, str], list[int]] = {}
    try:
        for line, row in read_rows(source):
            try:
                if isinstance(row, BadRow | UselessRow):
                    raise row
                loaded.records.append(convert(fields.renamed(row, source.columns)))
            except UselessRow as useless:
                loaded.drop(str(useless))
            except BadRow as bad:
                if bad.kind == "missing column":
                    missing.setdefault((bad.found, bad.allowed), []).append(line)
                elif source.hub is not None and bad.kind.startswith("empty ") and line:
                    loaded.drop(bad.found)  # nobody can mend a row of the hub
                else:
                    loaded.problems.append(Problem(name, line, bad.found, bad.allowed, bad.kind))
    except Unreachable as error:
        loaded.skipped = str(error)
    # A column that lacks everywhere is one fault, not one a row.
    for (found, instead), lines in missing.items():
        rows = f" in {len(lines)} rows, first in this one" if len(lines) > 1 else ""
        loaded.problems.append(Problem(name, lines[0], found + rows, instead, "missing column"))
    loaded.problems.sort(key=lambda problem: problem.line)
    return loaded


def _unknown_fields(source: Source, allowed: Sequence[str]) -> list[Problem]:
    """Names on the left of `columns` that no record has."""
    problems = []
    for name in source.columns:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found = f"columns names {name}, which is not one of our fields{hint}"
            problems.append(Problem(name_of(source), 0, found, ", ".join(allowed), "unknown field"))
    return problems


def _builtin(source: Source, seed: int, heldout: bool, convert: Callable[[Row], R]) -> Loaded[R]:
    from lora_rlhf import tiny

    count = source.limit or _BUILTIN_COUNT
    makers: dict[str | None, Callable[[], list[Any]]] = {
        "demonstrations": lambda: tiny.demonstrations(count, seed),
        "prompts": lambda: tiny.prompts(count, seed, heldout),
        "text": lambda: tiny.plain_text(count, seed),
    }
    try:
        rows = makers[source.builtin]()
    except ValueError as error:
        found = f"limit is {count}: {error}"
        return Loaded(problems=[Problem(name_of(source), 0, found, "a lower limit", "limit")])
    return Loaded([convert(row) for row in rows])


def _whole_demonstration(row: Row) -> Demonstration:
    if row.keys() == {"text"}:
        found, allowed = "plain text and no prompt_tokens", "prompt_tokens: N, which cuts it in two"
        raise BadRow("missing column", found, allowed)
    return to_demonstration(row)


def _whole_prompt(row: Row) -> Prompt:
    return Prompt(user(to_text(row))) if row.keys() == {"text"} else to_prompt(row)


def _split_text(row: Row, prompt_tokens: int | None, tokenizer: Any) -> Demonstration:
    assert prompt_tokens is not None
    assert tokenizer is not None, "prompt_tokens counts tokens"
    if not tokenizer.is_fast:
        raise DataError(
            "prompt_tokens needs to know where in a text its tokens lie, and this base's tokenizer "
            "is a slow one, which does not. Use a base with a tokenizer.json, or give prompt and "
            "response in two columns."
        )
    # BOS counts, so that prompt_tokens == max_prompt_tokens drops nothing.
    tokens = max(1, prompt_tokens - (tokenizer.bos_token_id is not None))
    parts = split_document(tokenizer, to_text(row).strip(), tokens)
    if parts is None:
        raise UselessRow(f"a text of at most {prompt_tokens} tokens, which all go to the prompt")
    return Demonstration(user(parts[0]), parts[1])


# -- the check before training ------------------------------------------------------------------


def check_data(
    recipe: Recipe, tokenizer: Any = None, extra_stop_ids: Sequence[int] = ()
) -> tuple[list[Problem], list[str]]:
    """Look at every source of a recipe; nothing is trained.

    Args:
        recipe: resolved.
        tokenizer: of the base where it can be had without a network; lengths need it.
        extra_stop_ids: as `ChatFormat` takes them.

    Returns:
        (problems, notes): notes are sentences, each starting with data.FIELD, on what was counted
        and on sources that were "not checked", such as hub ids without a network.
    """
    from lora_rlhf.data.checks import check_records, leaks  # brings torch; loading needs none

    data, problems, notes = recipe.data, list[Problem](), list[str]()
    loaders: dict[str, Callable[[Source], Loaded[Any]]] = {
        "demonstrations": lambda source: load_demonstrations(source, tokenizer),
        "rankings": load_rankings,
        "prompts": lambda source: load_prompts(source, tokenizer),
        "heldout_prompts": lambda source: load_prompts(source, tokenizer, heldout=True),
        "text": load_text,
    }
    chat_format = _format_of(recipe, tokenizer, extra_stop_ids, problems)
    usable: dict[str, list[Any]] = {}
    for name, load in loaders.items():
        source: Source | None = getattr(data, name)
        if source is None:
            continue
        if name != "text" and source.prompt_tokens is not None and tokenizer is None:
            notes.append(f"data.{name}: not checked, since the base's tokenizer is not at hand")
            continue
        loaded = load(source)
        problems += loaded.problems
        if loaded.skipped:
            notes.append(f"data.{name}: not checked: {loaded.skipped}")
            continue
        if loaded.records or not loaded.problems:  # or the problems say it all
            notes.append(f"data.{name}: {len(loaded.records)} usable rows in {name_of(source)}")
        notes += [f"data.{name}: {n} rows dropped ({why})" for why, n in loaded.dropped.items()]
        if loaded.records:
            usable[name] = loaded.records
    for name, records in usable.items():
        found, told = check_records(data, name, records, chat_format)
        problems += found
        notes += told
    return problems + leaks(usable), notes


def _format_of(
    recipe: Recipe, tokenizer: Any, extra_stop_ids: Sequence[int], problems: list[Problem]
) -> ChatFormat | None:
    if tokenizer is None:
        return None
    try:
        base = recipe.base
        return ChatFormat(tokenizer, base.chat_template, base.pad_token, extra_stop_ids)
    except DataError as error:
        allowed = "a token that ends a response, and another one that can pad"
        problems.append(Problem("base", 0, str(error), allowed, "tokenizer"))
        return None
