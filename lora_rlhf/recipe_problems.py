"""What pydantic found wrong in a recipe, in the user's words: where, found, allowed, what to do."""

import difflib
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError

from lora_rlhf.recipe import Recipe

Json = dict[str, Any]
Path = tuple[str | int, ...]
Problem = tuple[Path, str]

# What other tools call our fields.
_ELSEWHERE = {
    "lr": "learning_rate",
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "cliprange": "clip_range",
    "cliprange_value": "value_clip_range",
    "vf_coef": "value_coef",
    "lam": "gae_lambda",
    "beta": "kl_coef",
    "init_kl_coef": "kl_coef",
    "num_ppo_epochs": "ppo_epochs",
    "num_train_epochs": "epochs",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup_fraction",
    "model_name_or_path": "model",
    "load_in_4bit": "quantization",
    "dataset": "hub",
    "save_steps": "checkpoint_every",
    "eval_steps": "evaluate_every",
    "report_to": "tracker",
}


def dotted(path: Path) -> str:
    """A path as it is written on the command line: ("ppo", "kl_coef") -> ppo.kl_coef."""
    return ".".join(map(str, path))


def explain(error: ValidationError) -> list[Problem]:
    """Every error of a validation as (path, sentence), one a field."""
    problems: dict[Path, str] = {}
    listed: set[Path] = set()
    for item in error.errors(include_url=False):
        path = _known(item["loc"])
        if path in problems:
            continue
        if item["type"] == "extra_forbidden":
            problems[path] = _unknown(path, with_fields=path[:-1] not in listed)
            listed.add(path[:-1])
        else:
            problems[path] = _sentence(path, item)
    return list(problems.items())


def accepts_null(path: Path) -> bool:
    """Whether null is a value of the field; False for a field that does not exist."""
    schema = _schema_at(path)
    return schema is not None and any(s.get("type") == "null" for s in _alternatives(schema))


def _sentence(path: Path, item: Any) -> str:
    name = dotted(path)
    kind, found = item["type"], _found(item["input"])
    if kind == "missing":
        schema = _schema_at(path) or {}
        return f"{name} is missing. {schema.get('description', '')}".strip()
    if kind == "value_error":
        hint = f" To replace all of it: {name}={{path: FILE}}" if path[0] == "data" else ""
        return f"{name}: {item['ctx']['error']}.{hint}"
    allowed = _allowed(_schema_at(path) or {})
    hint = ""
    if isinstance(item["input"], str) and "enum" in json.dumps(_schema_at(path) or {}):
        hint = _did_you_mean(item["input"], _choices(_schema_at(path) or {}))
    elif kind == "string_type" and isinstance(item["input"], int | float):
        hint = " Put it in quotes to make it text."
    elif kind == "bool_type" and str(item["input"]).lower() in ("yes", "no", "on", "off"):
        hint = " Write true or false."
    return f"{name} is {found}.{hint} Allowed: {allowed}."


def _unknown(path: Path, with_fields: bool) -> str:
    name, fields = str(path[-1]), _fields(path[:-1])
    near = _near(name, fields) or [p for p in _all_fields() if _near(name, [p.rpartition(".")[2]])]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else ""
    allowed = f" Allowed: {', '.join(fields)}." if with_fields else ""
    return f"{dotted(path)} is not a field.{hint}{allowed}"


def _near(name: str, fields: list[str]) -> list[str]:
    """Fields that may be meant, the likeliest first: other tools' names, typing errors, parts."""
    if _ELSEWHERE.get(name) in fields:
        return [_ELSEWHERE[name]]
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.7)
    return close or [f for f in fields if name in f.split("_")]


def _did_you_mean(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _found(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# -- the schema of a recipe ---------------------------------------------------------------------


@cache
def _schema() -> Json:
    return Recipe.model_json_schema()


def _alternatives(schema: Json) -> list[Json]:
    """The schema with references followed and unions flattened."""
    if "$ref" in schema:
        return _alternatives(_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return [s for each in schema["anyOf"] for s in _alternatives(each)]
    return [schema]


def _schema_at(path: Path) -> Json | None:
    schema = _schema()
    for part in path:
        for each in _alternatives(schema):
            if part in each.get("properties", {}):
                schema = each["properties"][part]
                break
            if isinstance(each.get("additionalProperties"), dict):
                schema = each["additionalProperties"]
                break
            if isinstance(part, int) and "items" in each:
                schema = each["items"]
                break
        else:
            return None
    return schema


def _known(loc: Path) -> Path:
    """The error's place without pydantic's names for the branches of a union."""
    path: Path = ()
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if _schema_at((*path, part)) is None and not (last and _fields(path)):
            break
        path = (*path, part)
    return path


def _fields(path: Path) -> list[str]:
    schema = _schema_at(path)
    alternatives = _alternatives(schema) if schema else []
    return [field for each in alternatives for field in each.get("properties", {})]


@cache
def _all_fields() -> list[str]:
    def walk(path: Path) -> Iterator[str]:
        for field in _fields(path):
            yield dotted((*path, field))
            yield from walk((*path, field))

    return list(walk(()))


def _choices(schema: Json) -> list[str]:
    values = [v for s in _alternatives(schema) for v in s.get("enum", [])]
    return [v for v in values if isinstance(v, str)]


def _allowed(schema: Json) -> str:
    alternatives = _alternatives(schema)
    if any("properties" in s for s in alternatives):  # a section is removed, not set to null
        alternatives = [s for s in alternatives if s.get("type") != "null"]
    return " or ".join(map(_one, alternatives)) or "nothing"


def _one(schema: Json) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type", "anything")
    if kind in ("integer", "number"):
        noun = "a whole number" if kind == "integer" else "a number"
        return noun + _range(schema)
    if kind == "string":
        return f"text matching {schema['pattern']}" if "pattern" in schema else "text"
    if kind == "array":
        return f"a list of {_allowed(schema.get('items', {}))}"
    if kind == "object":
        fields = list(schema.get("properties", {}))
        return f"a mapping of {', '.join(fields)}" if fields else "a mapping"
    return {"boolean": "true or false"}.get(str(kind), str(kind))


def _range(schema: Json) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "over",
        "maximum": "at most",
        "exclusiveMaximum": "under",
    }
    bounds = [f"{word} {schema[key]:g}" for key, word in words.items() if key in schema]
    return " " + " and ".join(bounds) if bounds else ""
