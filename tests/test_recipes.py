"""The shipped recipes: each one parses, can be written out and read back, and is checked."""

from pathlib import Path

import pytest
import yaml

from lora_rlhf.cli import app
from lora_rlhf.recipe_io import dump_recipe, load_recipe, parse_recipe, recipe_names

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").rglob("*.yaml"))
ON_A_CPU = ("gold-protocol", "quickstart", "stories260k")
ON_A_GPU = [p for p in RECIPES if p.stem not in ON_A_CPU]


def test_there_are_as_many_recipes_as_we_think() -> None:
    """A recipe that is added or lost must be noticed: this number is changed by hand."""
    assert len(RECIPES) == 10
    assert recipe_names() == [p.stem for p in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_parses_and_is_named_after_its_file(path: Path) -> None:
    assert load_recipe(str(path)).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_the_whole_pipeline(path: Path) -> None:
    assert {"sft", "reward", "ppo", "evaluate"} <= set(load_recipe(str(path)).stages)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_resolved_recipe_reads_back_equal(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert parse_recipe(dump_recipe(recipe), "dumped") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_header_tells_the_command_and_where_it_has_run(path: Path) -> None:
    header = [
        line[1:].strip()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    ]
    assert header[1].startswith(f"lora-rlhf run {path.stem}")
    assert any(line.startswith(("Not yet run on", "Runs on:")) for line in header)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_writes_no_default_out_without_need(path: Path) -> None:
    """Sparse: a stage with more than a dozen lines would hide what is peculiar to it."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert all(len(raw.get(stage, {})) <= 12 for stage in ("sft", "reward", "ppo", "evaluate"))


@pytest.mark.parametrize("path", ON_A_GPU, ids=lambda p: p.stem)
def test_a_recipe_for_a_card_is_checked_without_a_network(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["check", str(path)])
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", ON_A_GPU, ids=lambda p: p.stem)
def test_a_recipe_fits_the_card_in_its_name(path: Path) -> None:
    """The plan's own arithmetic, for a card of the size that the name ends in."""
    from lora_rlhf.model.memory import plan

    assert plan(load_recipe(str(path)), float(path.stem.rpartition("-")[2].removesuffix("gb"))).fits
