"""Everything a stage needs to go on as if it had never stopped."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_rlhf.errors import CheckpointError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.runs import Run, directory_atomically

_FILE = "state.pt"


def save_checkpoint(run: Run, stage: str, step: int, state: dict[str, Any]) -> None:
    """Write `<stage>/checkpoints/step-NNNNNN/` atomically, then drop all but it and the one before.

    Args:
        run: the run directory.
        stage: its stage.
        step: optimizer steps (PPO: rounds) taken.
        state: tensors, numbers, strings, and lists and dicts of them.
    """
    folder = run.stage(stage) / "checkpoints"
    with directory_atomically(folder / f"step-{step:06d}") as making:
        torch.save(state | {"step": step, "rng": rng_state()}, making / _FILE)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(run: Run, stage: str) -> dict[str, Any] | None:
    """The newest state of a stage, its random generators set; None when there is none.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    found = sorted((run.path / stage / "checkpoints").glob("step-*"))
    if not found:
        return None
    path = found[-1] / _FILE
    try:
        # torch takes what is no archive for its old format, and fails in many ways.
        if not zipfile.is_zipfile(path):
            raise OSError("it is missing, or not whole")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read ({reason}). Delete that directory to go "
            f"back to the checkpoint before it, then --resume again."
        ) from error
    set_rng_state(state["rng"])
    return state


def drop_checkpoints(run: Run, stage: str) -> None:
    """Remove the checkpoints of a stage that has ended."""
    shutil.rmtree(Path(run.path / stage / "checkpoints"), ignore_errors=True)


def rng_state() -> dict[str, Any]:
    """State of torch's generators. Nothing else is drawn from: order and rows have own seeds."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Set torch's generators to a saved state."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def role_state(backbone: Backbone, name: str) -> dict[str, Tensor]:
    """An adapter's parameters and its head's tensors, on the CPU."""
    tensors = {k: p.detach().cpu().clone() for k, p in backbone.adapters.parameters(name).items()}
    head = backbone.adapters.heads.get(name)
    if head is not None:
        tensors |= {f"head.{k}": v.detach().cpu().clone() for k, v in head.state_dict().items()}
    return tensors


def set_role_state(backbone: Backbone, name: str, tensors: dict[str, Tensor]) -> None:
    """Put back what `role_state` took; the adapter (and head) must exist."""
    with torch.no_grad():
        for key, parameter in backbone.adapters.parameters(name).items():
            parameter.copy_(tensors[key])
    head = backbone.adapters.heads.get(name)
    if head is not None:
        own = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
        head.load_state_dict(own)
