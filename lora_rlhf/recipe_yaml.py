"""YAML as a recipe needs it: every key with its line, no duplicates, no surprises in scalars.

Scalars follow YAML 1.2, so that `1e-3` is a number and `12:30` is text; anchors, aliases and tags
are refused, because a recipe says everything where it stands.
"""

import re
from typing import Any

import yaml

Path = tuple[str | int, ...]
Lines = dict[Path, int]


class YamlProblem(Exception):
    """What is wrong with a YAML text, and in which line; the caller knows the file."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line
        self.text = text


_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - add_implicit_resolver fills it

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise YamlProblem(line, "aliases are not allowed; write the value out where it stands")
        return super().compose_node(parent, index)

    def expected_tag(self, node: yaml.Node) -> str:
        """The tag a node has when none is written."""
        plain = getattr(node, "style", None) is None
        return str(self.resolve(type(node), node.value, (plain, not plain)))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Write a shared value out each time, since aliases are not read back."""
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
        )


def read_yaml(text: str) -> tuple[Any, Lines]:
    """Parse one document into plain data, with the line (from 1) of every key and list item.

    Raises:
        YamlProblem: a syntax error, a duplicate key, a key that is not text, an alias, a tag.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: Lines = {}
            return (None if node is None else _plain(loader, node, (), lines)), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise YamlProblem(*_told(error)) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise YamlProblem(line, f"the character {error.character!r} is not allowed") from error
    except RecursionError as error:
        raise YamlProblem(1, "lists or mappings stand too deep in one another") from error


def write_yaml(content: dict[str, Any]) -> str:
    """Plain data as a text that `read_yaml` reads back equal."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=96)


def _plain(loader: _Loader, node: yaml.Node, path: Path, lines: Lines) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if node.tag != loader.expected_tag(node):
        raise YamlProblem(line, f"the tag {node.tag} is not allowed; write plain YAML")
    if isinstance(node, yaml.MappingNode):
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node)
            if key in content:
                first = lines[(*path, key)]
                raise YamlProblem(
                    key_node.start_mark.line + 1,
                    f"{key} is given twice (first in line {first}). Keep one of the two.",
                )
            lines[(*path, key)] = key_node.start_mark.line + 1
            content[key] = _plain(loader, value_node, (*path, key), lines)
        return content
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, n, (*path, i), lines) for i, n in enumerate(node.value)]
    return loader.construct_object(node)


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith(":str"):
        found = getattr(node, "value", "")
        raise YamlProblem(node.start_mark.line + 1, f"the key {found!r} is not a name")
    return str(node.value)


def _told(error: yaml.MarkedYAMLError) -> tuple[int, str]:
    mark = error.problem_mark or error.context_mark
    line = 1 if mark is None else mark.line + 1
    problem = error.problem or "cannot be read"
    if "found character '\\t'" in problem:
        problem = "a tab where spaces are needed"
    elif "another document" in problem:
        problem = "a second document begins here; a recipe is one document"
    where = "" if mark is None else f" (column {mark.column + 1})"
    return line, f"not valid YAML: {problem}{where}"
