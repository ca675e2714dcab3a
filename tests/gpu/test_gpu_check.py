"""The GPU check itself, on the embedded base and the CPU."""

import json
from pathlib import Path

import pytest
import torch

from lora_rlhf.model.memory import forget_measurements
from tests.gpu.gpu_check import RECIPES, card_of, main


def test_the_check_runs_every_stage_and_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    assert main(["--tiny", "--out", str(out)]) == 0
    (result,) = json.loads(out.read_text()).values()
    assert result["frozen weights unchanged"]
    assert result["kl before the first update"] == 0.0
    assert result["ppo tokens"] <= 4 * 32
    assert {"load", "sft", "reward", "ppo collect", "ppo update"} == set(result["seconds"])
    for phase in ("load", "rollout", "score", "train"):
        sizes = result["memory"][phase]
        assert 0.1 < sizes["measured_gib"] < 4.0
        assert sizes["predicted_gib"] == pytest.approx(result["plan"]["phases"][phase], abs=1e-3)
    forget_measurements()


def test_every_recipe_of_the_check_names_its_card() -> None:
    assert [card_of(name) for name in RECIPES] == [12, 24, 24, 24, 16, 12, 8, 6]


@pytest.mark.gpu
def test_the_smallest_recipe_fits_its_card(tmp_path: Path) -> None:
    """On a GPU: measured within a tenth of the plan, on the phases that reach their full size."""
    out = tmp_path / "gpu.json"
    smallest = RECIPES[-1]
    assert main(["--out", str(out), smallest]) == 0
    result = json.loads(out.read_text())[smallest]
    assert result["frozen weights unchanged"]
    assert result["reserved_gib"] + result["context_gib"] < card_of(smallest)
    torch.cuda.empty_cache()
    forget_measurements()
