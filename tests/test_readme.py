"""The README's commands are commands, its files exist, and the first two stand by line 40."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.recipe_io import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`(lora-rlhf [^`\n]+)`", README)))
PLACEHOLDER = re.compile(r"[A-Z]{2,}|=[A-Z]\b|\[|\.\.\.")


def test_the_two_make_commands_stand_by_line_40_and_are_targets():
    top = "\n".join(README.splitlines()[:40])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("quickstart", "test"):
        assert f"make {target}" in top
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_make_itself_accepts_them():
    for target in ("quickstart", "test"):
        found = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_exists_with_its_options(command):
    verb = shlex.split(command)[1]
    text = CliRunner().invoke(app, [verb, "--help"]).output
    assert "Usage" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    for option in re.findall(r"--[a-z-]+", command):
        assert option in plain, f"{command}: {verb} has no {option}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if not PLACEHOLDER.search(c)])
def test_every_command_without_placeholders_names_a_recipe_and_fields_that_exist(command):
    words = shlex.split(command)[1:]
    if words[0] not in ("run", "check", "plan"):
        return
    overrides = [w for w in words[2:] if "=" in w and not w.startswith("--")]
    recipe = load_recipe(words[1], overrides)
    assert recipe.stages


def test_every_recipe_is_in_the_table():
    for name in recipe_names():
        assert f"`{name}`" in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+/[\w.]*)`", README))))
def test_every_path_of_the_readme_exists(path):
    if path.startswith("runs/"):
        return
    candidates = [ROOT / path, ROOT / "lora_rlhf" / path]
    assert any(c.exists() for c in candidates), path


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", README))))
def test_every_module_of_the_readme_can_be_run(module):
    assert importlib.util.find_spec(module) is not None
    assert sys.version_info >= (3, 10)
