"""Who may import whom, how long a file and a function may be, and where torch may not be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lora_rlhf", "ui")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MOST_LINES = 400
MOST_TEST_LINES = 600
MOST_FUNCTION_LINES = 60

# A module may import from its own layer and the ones below; the longest matching name counts.
LAYERS = {
    "lora_rlhf": 0,
    "lora_rlhf.errors": 0,
    "lora_rlhf.quiet": 0,
    "lora_rlhf.recipe": 1,
    "lora_rlhf.recipe_yaml": 1,
    "lora_rlhf.recipe_problems": 1,
    "lora_rlhf.recipe_rules": 1,
    "lora_rlhf.recipe_io": 1,
    "lora_rlhf.runs": 1,
    "lora_rlhf.losses": 1,
    "lora_rlhf.tiny": 1,
    "lora_rlhf.preferences": 2,
    "lora_rlhf.data": 2,
    "lora_rlhf.model": 2,
    "lora_rlhf.charts": 3,
    "lora_rlhf.results": 3,
    "lora_rlhf.plots": 3,
    "lora_rlhf.report_frontier": 3,
    "lora_rlhf.report_health": 3,
    "lora_rlhf.report_judging": 3,
    "lora_rlhf.report_parts": 3,
    "lora_rlhf.report_samples": 3,
    "lora_rlhf.report_style": 3,
    "lora_rlhf.report_suites": 3,
    "lora_rlhf.display": 3,
    "lora_rlhf.report": 3,
    "lora_rlhf.doctor": 3,
    "lora_rlhf.training": 3,
    "lora_rlhf.evaluation": 3,
    "lora_rlhf.chat": 3,
    "lora_rlhf.stages": 4,
    "lora_rlhf.pipeline": 5,
    "lora_rlhf.continuing": 5,
    "lora_rlhf.evaluating": 6,
    "lora_rlhf.cli_evaluate": 6,
    "lora_rlhf.checking": 5,
    "lora_rlhf.cli_protocol": 6,
    "lora_rlhf.cli_ui": 6,
    "lora_rlhf.cli_preferences": 6,
    "lora_rlhf.cli": 6,
    "lora_rlhf.__main__": 7,
    "ui": 8,
}
# The one way up: the command that opens the app, and only when it is called.
OPENS_THE_APP = "lora_rlhf.cli_ui"
# What must come up without torch: help, checks of a recipe, the app's shell.
NO_TORCH = (
    "lora_rlhf.errors",
    "lora_rlhf.recipe",
    "lora_rlhf.recipe_io",
    "lora_rlhf.runs",
    "lora_rlhf.preferences.store",
    "lora_rlhf.preferences.exports",
    "lora_rlhf.preferences.imports",
    "lora_rlhf.preferences.ratings",
    "lora_rlhf.preferences.choice",
    "lora_rlhf.cli",
    "lora_rlhf.continuing",
    "ui.asking",
    "ui.jobs",
    "ui.opening",
    "ui.people",
    "ui.security",
    "ui.server",
    "ui.studio",
    "ui.turns",
    "ui.users",
)
# Gradio reads its environment when it is imported, so whoever sets that must come first.
NO_GRADIO = ("lora_rlhf.cli", "ui.opening", "ui.people", "ui.security", "ui.server", "ui.users")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, and by choice those in functions."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        yield node
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(node, inside_functions)


def imports(path: Path, inside_functions: bool) -> set[str]:
    """Full names of the modules a file imports; `from a import b` gives a.b where it is one."""
    found: set[str] = set()
    for node in statements(parse(path), inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


MODULES = {module_name(path): path for path in SOURCES}


def layer(module: str) -> int:
    names = [name for name in LAYERS if module == name or module.startswith(f"{name}.")]
    return LAYERS[max(names, key=len)]


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in PACKAGES}


def test_every_module_has_a_layer() -> None:
    library = [module for module in MODULES if module.split(".")[0] == "lora_rlhf"]
    tops = {".".join(module.split(".")[:2]) for module in library}
    assert tops <= set(LAYERS), "new: give it a layer here, and say who may import it"


def test_imports_go_down_or_sideways() -> None:
    upward = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in ours(imports(path, inside_functions=True))
        if layer(other) > layer(module)
        and not (module == OPENS_THE_APP and layer(other) == LAYERS["ui"])
    ]
    assert upward == []


def test_the_library_loads_nothing_of_the_app() -> None:
    """Not even the command that opens it, before it is called."""
    at_load = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if module.split(".")[0] == "lora_rlhf"
        for other in imports(path, inside_functions=False)
        if other.split(".")[0] == "ui"
    ]
    assert at_load == []


def test_losses_import_torch_and_each_other_alone() -> None:
    known = {*sys.stdlib_module_names, "torch", "jaxtyping"}
    foreign = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if module.startswith("lora_rlhf.losses")
        for name in imports(path, inside_functions=True)
        if name.split(".")[0] not in known and not name.startswith("lora_rlhf.losses")
    ]
    assert foreign == []


def test_a_stage_imports_no_other_stage() -> None:
    between = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if module.startswith("lora_rlhf.stages.")
        for other in imports(path, inside_functions=True)
        if other.startswith("lora_rlhf.stages.")
    ]
    assert between == []


def test_modules_import_each_other_without_cycles() -> None:
    """Cycles at load time; a depth-first walk that comes back to a module it is in."""
    graph = {m: ours(imports(p, inside_functions=False)) & set(MODULES) for m, p in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in sorted(graph[module] - {module}):
                walk(other, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_every_library_that_is_imported_is_a_declared_requirement() -> None:
    """What only another library brings along may vanish with that library's next release."""
    required = {re.split(r"[^\w-]", r)[0].lower() for r in requires("lora-rlhf") or []}
    homes = packages_distributions()
    undeclared = {
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in {n.split(".")[0] for n in imports(path, inside_functions=True)}
        if name not in {*sys.stdlib_module_names, *PACKAGES}
        and not required & {home.lower().replace("_", "-") for home in homes.get(name, [name])}
    }
    assert undeclared == set()


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch_is_loaded_by(name: str) -> None:
    assert loaded_by(name, "torch", "transformers", "datasets") == []


@pytest.mark.parametrize("name", NO_GRADIO)
def test_no_gradio_is_loaded_by(name: str) -> None:
    assert loaded_by(name, "gradio", "huggingface_hub") == []


def loaded_by(name: str, *heavy: str) -> list[str]:
    """Asked of a fresh interpreter, so that what the module imports in turn counts too."""
    code = f"import sys, {name}; print(*[m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=ROOT,
    )
    return result.stdout.split()


def test_files_are_short_enough_to_read() -> None:
    limits = [(path, MOST_LINES) for path in SOURCES] + [(path, MOST_TEST_LINES) for path in TESTS]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path, _ in limits}
    assert [f"{at(p)}: {lengths[p]} lines" for p, most in limits if lengths[p] > most] == []


def test_functions_are_short_enough_to_read() -> None:
    long = []
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and length(node) > MOST_FUNCTION_LINES:
                long.append(f"{at(path)}:{node.lineno}: {node.name} has {length(node)} lines")
    assert long == []


def at(path: Path) -> str:
    return str(path.relative_to(ROOT))


def length(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_nothing_prints_outside_the_command_line() -> None:
    """print() is allowed in cli.py, and under `if __name__ == "__main__"` and its main()."""
    prints = []
    for path in SOURCES:
        tree = parse(path)
        allowed = {id(n) for main in mains(tree) for n in ast.walk(main)}
        for node in ast.walk(tree):
            is_print = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            if is_print and path.name != "cli.py" and id(node) not in allowed:
                prints.append(f"{at(path)}:{node.lineno}")
    assert prints == []


def mains(tree: ast.Module) -> list[ast.stmt]:
    """`if __name__ == "__main__"`, and a function `main` where there is such a block."""
    blocks = [n for n in tree.body if isinstance(n, ast.If) and "__name__" in ast.unparse(n.test)]
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    return [*blocks, *functions] if blocks else []


def test_nothing_is_left_to_do() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    left = [(at(p), w) for p in SOURCES for w in words if w in p.read_text(encoding="utf-8")]
    assert left == []


def test_no_exception_is_swallowed_whole() -> None:
    """`except Exception` and its like are legal only where the block raises again."""
    swallowed = []
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = "everything" if node.type is None else ast.unparse(node.type)
                raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                if caught in ("everything", "Exception", "BaseException") and not raises:
                    swallowed.append(f"{at(path)}:{node.lineno}: except {caught}")
    assert swallowed == []
