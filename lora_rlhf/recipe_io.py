"""Recipes as files: find one by name or path, apply overrides, validate, and write one out."""

import copy
import difflib
import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from lora_rlhf.errors import ConfigError
from lora_rlhf.recipe import Recipe
from lora_rlhf.recipe_problems import Path, Problem, accepts_null, explain
from lora_rlhf.recipe_rules import broken_rules, expand_preset, idle_fields, sections
from lora_rlhf.recipe_yaml import YamlProblem, read_yaml, write_yaml

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_SUFFIXES = (".yaml", ".yml")


# -- finding ------------------------------------------------------------------------------------


def recipe_directory() -> FilePath:
    """Where the shipped recipes lie: in the installed package, else beside it in a checkout."""
    package = FilePath(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(p.stem for p in recipe_directory().glob("*.yaml"))


def find_recipe(name: str) -> FilePath:
    """The file of a shipped recipe's name, or of a path.

    Raises:
        ConfigError: neither exists; names the near ones.
    """
    is_path = name.endswith(_SUFFIXES) or "/" in name or os.sep in name
    path = FilePath(name).expanduser() if is_path else recipe_directory() / f"{name}.yaml"
    if path.is_file():
        return path
    names = recipe_names()
    close = difflib.get_close_matches(FilePath(name).stem, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    if is_path:
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ConfigError(f"{name}: {what}. Give the path of a .yaml file or a name.{hint}")
    raise ConfigError(
        f"{name} is not a recipe.{hint} Allowed: {', '.join(names)}, or a path to a .yaml file."
    )


# -- reading ------------------------------------------------------------------------------------


def load_recipe(name: str, overrides: Sequence[str] = (), finished: Collection[str] = ()) -> Recipe:
    """Find, read, override and validate a recipe.

    Args:
        name: of a shipped recipe, or a path.
        overrides: `key=value` with dotted keys and YAML values, such as `ppo.kl_coef=0.1`;
            `ppo=null` removes a section. Relative paths are relative to the working directory.
        finished: stages whose results the run already holds, so that the recipe may lean on them.

    Raises:
        ConfigError: all that is wrong, a line each: where, found, allowed, what to do.
    """
    path = find_recipe(name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_shown(path)}: not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise ConfigError(f"{_shown(path)}: cannot be read: {error.strerror}.") from error
    return parse_recipe(text, _shown(path), overrides, finished)


def parse_recipe(
    text: str, where: str, overrides: Sequence[str] = (), finished: Collection[str] = ()
) -> Recipe:
    """As `load_recipe`, from a text; `where` names it in messages."""
    try:
        raw, lines = read_yaml(text)
    except YamlProblem as problem:
        raise ConfigError(f"{where}:{problem.line}: {problem.text}") from problem
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{where}: not a recipe; a recipe is a mapping: name, base, data, sft ..."
        )
    origin: dict[Path, str] = {path: f"{where}:{line}" for path, line in lines.items()}
    origin[()] = where
    problems = _empty_sections(raw)
    for override in overrides:
        _override(raw, override, origin)
    return _build(raw, origin, problems, finished)


def recipe_from(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate plain data, such as a form's, as a recipe.

    Raises:
        ConfigError: as `load_recipe`.
    """
    return _build(copy.deepcopy(raw), {(): where}, [], ())


def _build(
    raw: dict[str, Any],
    origin: dict[Path, str],
    problems: list[Problem],
    finished: Collection[str],
) -> Recipe:
    problems = problems + expand_preset(raw)
    recipe = None
    try:
        # JSON is what makes strict types fair: a list is a tuple, and "1" is not 1.
        recipe = Recipe.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        problems += explain(error)
    if recipe is not None:
        problems += broken_rules(recipe, finished)
    if recipe is None or problems:
        raise ConfigError("\n".join(f"{_place(origin, path)}: {text}" for path, text in problems))
    return recipe


def _place(origin: dict[Path, str], path: Path) -> str:
    """The file and line, or the override, that said the most of the path."""
    return next(origin[path[:n]] for n in range(len(path), -1, -1) if path[:n] in origin)


def _empty_sections(raw: dict[str, Any]) -> list[Problem]:
    return [
        (
            (key,),
            f"{key} is empty. Write `{key}: {{}}` to have its defaults, or remove the line.",
        )
        for key, value in raw.items()
        if value is None and key not in ("tracker",)
    ]


def _override(raw: dict[str, Any], text: str, origin: dict[Path, str]) -> None:
    """Apply one `key=value` in place."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(
            f"override {text!r}: not key=value. Write it like ppo.kl_coef=0.1 or ppo=null."
        )
    if not value_text.strip():
        raise ConfigError(
            f"override {text!r}: no value. Write {key}=null to remove it, {key}=\"''\" for no text."
        )
    try:
        value, _ = read_yaml(value_text)
    except YamlProblem as problem:
        raise ConfigError(
            f"override {text!r}: {problem.text}. Put the value in quotes: {key}=\"'...'\""
        ) from problem
    path = tuple(key.split("."))
    section = raw
    for depth, part in enumerate(path[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            inner = ".".join(path[:depth])
            raise ConfigError(
                f"override {text!r}: {inner} is the value {section!r}, which has no fields."
            )
    for known in [p for p in origin if p[: len(path)] == path]:
        del origin[known]
    origin[path] = f"override {text}"
    section[path[-1]] = value
    if value is None and not accepts_null(path):
        del section[path[-1]]


def _shown(path: FilePath) -> str:
    """The path as a user here would write it."""
    try:
        return str(path.resolve().relative_to(FilePath.cwd()))
    except ValueError:
        return str(path)


# -- writing ------------------------------------------------------------------------------------


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with every default written out; it loads back equal.

    Left out: sections that are absent, nulls that are the default, and fields that have no effect
    as the others stand (which would be errors if they were written).
    """
    content = recipe.model_dump(mode="json")
    for path, section in sections(recipe):
        inner = content
        for part in path:
            inner = inner[str(part)]
        idle = idle_fields(section)
        for field, info in type(section).model_fields.items():
            value = getattr(section, field)
            if value == info.get_default(call_default_factory=True) and (
                value is None or value == {} or field in idle
            ):
                del inner[field]
    return write_yaml(content)


def differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted field, old value, new value) wherever two recipes differ."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [*before, *(k for k in after if k not in before)]
    return [(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]


def _flat(content: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        return {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{path}.{key}" if path else key)
    return flat
