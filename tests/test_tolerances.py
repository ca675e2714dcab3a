"""No test may be so lax that it proves nothing: the suite is searched for wide tolerances."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WIDEST = 1e-2
REASON = "# reason:"
TOLERANCES = {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol", "rel_err", "tol", "tolerance"}
# `abs(a - b) < 0.5` is a tolerance too, yet bounds of statistics are written so: not searched.


def _named_numbers(tree: ast.AST) -> Iterator[tuple[str, float, int]]:
    """(name, number, line) of tolerances in calls, in defaults, in dicts and in assignments."""
    for node in ast.walk(tree):
        pairs: list[tuple[str | None, ast.AST | None]] = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            keys = [k.value if isinstance(k, ast.Constant) else None for k in node.keys]
            pairs = list(zip(keys, node.values, strict=True))
        elif isinstance(node, ast.Assign):
            pairs = list(_assigned(node))
        elif isinstance(node, ast.arguments):
            named = node.posonlyargs + node.args
            pairs = [(a.arg, d) for a, d in zip(named[::-1], node.defaults[::-1], strict=False)]
            pairs += [(a.arg, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        for name, value in pairs:
            if str(name).lower() in TOLERANCES and value is not None:
                for part in ast.walk(value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, int | float):
                        yield str(name), float(part.value), part.lineno


def _assigned(node: ast.Assign) -> Iterator[tuple[str | None, ast.AST]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for one, value in zip(target.elts, node.value.elts, strict=False):
                yield getattr(one, "id", None), value
        else:
            yield getattr(target, "id", None), node.value


def lax(source: str) -> list[str]:
    """`line: name=number` of every tolerance above the widest whose line gives no reason."""
    lines = source.splitlines()
    return [
        f"{line}: {name}={number:g}"
        for name, number, line in _named_numbers(ast.parse(source))
        if number > WIDEST and REASON not in lines[line - 1]
    ]


def test_no_tolerance_is_above_a_hundredth_without_a_reason():
    found = [
        f"{path.relative_to(TESTS)}:{where}"
        for path in sorted(TESTS.rglob("*.py"))
        for where in lax(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"give a smaller tolerance, or `{REASON} ...` on the line: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "assert_close(a, b, rtol=1e6, atol=0)",
        "assert_close(\n    a,\n    b,\n    atol=0.05,\n)",
        "approx(1.0, rel=0.1)",
        "math.isclose(a, b, abs_tol=5)",
        "RTOL, ATOL = 1e-5, 0.5",
        "rtol = 1",
        "def close(a, b, rtol=0.02): ...",
        "def close(a, b, *, atol=0.02): ...",
        "kwargs = {'rtol': 0.02}",
    ],
)
def test_the_search_finds_lax_tolerances(source):
    assert len(lax(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "assert_close(a, b, rtol=1e-5, atol=1e-2)",
        "assert_close(a, b, rtol=0.1)  # reason: eight bits of mantissa",
        "f(temperature=1.0, absolute=3)",
    ],
)
def test_the_search_lets_the_rest_pass(source):
    assert lax(source) == []
