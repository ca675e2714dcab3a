"""The run directory of a retraining before anything trains: snapshot, recipe, the adapter `sft`.

Everything after that is the ordinary command line's. Nothing here imports torch at the top.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_rlhf.continuing import next_free_name
from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.preferences.events import Judgement, Task
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import STAGES, Recipe
from lora_rlhf.recipe_io import dump_recipe, load_recipe
from lora_rlhf.recipe_rules import JUDGES
from lora_rlhf.runs import Run, write_atomically
from ui.retraining import Wishes

SNAPSHOT = "rankings.db"
# Copies of the adapters that new ones go on from: the base run may be gone by then.
BEFORE = {"reward": "reward_before", "policy": "policy_before"}
DISCARDED = ".discarded"  # under runs/; no list shows what begins with a dot
_NUMBERED = re.compile(r"(.+)-\d+")
_RECIPE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
# What the copied `sft` and the snapshot do not depend on. Paths, hub ids, trackers and judges of
# one's own would let a page read files, reach the network, or import code.
_OPEN_SECTIONS = ("reward", "ppo", "evaluate")
_SECTION_OF = {"reward": "reward", "policy": "ppo"}
_OPEN_FIELDS = ("seed", "base.micro_batch_tokens", "base.gradient_checkpointing")


# -- names --------------------------------------------------------------------------------------


def new_name(runs_dir: Path, base: str) -> str:
    """NAME-N with the lowest N that no run has or had: votes are stored under a run's name."""
    numbered = _NUMBERED.fullmatch(base)
    root = numbered[1] if numbered and (runs_dir / numbered[1]).is_dir() else base
    taken = runs_dir / DISCARDED
    name, number = next_free_name(runs_dir, root), 2
    while (taken / name).exists() or (runs_dir / name).exists():
        name, number = f"{root}-{number}", number + 1
    return name


# -- the recipe ---------------------------------------------------------------------------------


def recipe_of(base: Run) -> Recipe:
    """The recipe that a run was made with.

    Raises:
        UserError: it has none, or one of a newer version.
    """
    return load_recipe(str(base.path / "recipe.yaml"), finished=STAGES)


def retraining_recipe(
    base: Run, folder: Path, wishes: Wishes, defaults: Sequence[str] = ()
) -> Recipe:
    """The base run's recipe over the snapshot, with what the admin typed.

    Args:
        base: the run to start from.
        folder: of the new run.
        wishes: of the admin.
        defaults: `key=value` that yield to the admin's.

    Raises:
        ConfigError: an override that is not allowed, not a setting, or out of range.
    """
    old = recipe_of(base)
    for override in wishes.overrides:
        _require_open(override, old)
    snapshot = json.dumps(str((folder / SNAPSHOT).absolute()))
    heldout = ", heldout: true" if wishes.heldout else ""
    changes = ["rank=null", f"data.rankings={{path: {snapshot}{heldout}}}"]
    if _RECIPE_NAME.fullmatch(folder.name):
        changes.append(f"name={folder.name}")
    if old.reward is None:
        changes.append("reward={}")
    going_on = goes_on(base, wishes)
    for role, section in _SECTION_OF.items():
        if section == "reward" or old.ppo is not None:
            start = str((folder / BEFORE[role]).absolute()) if role in going_on else None
            changes.append(f"{section}.start_from={json.dumps(start)}")
    if old.evaluate is not None:
        # That promise was made for the recipe's own data.
        changes.append("evaluate.expect_win_rate=null")
    # The reward model alone keeps the sections of later stages, which may be run by hand.
    if wishes.stages[-1] == "ppo":
        changes.append("evaluate=null")
    overrides = [*changes, *defaults, *wishes.overrides]
    recipe = load_recipe(str(base.path / "recipe.yaml"), overrides, finished=("sft",))
    for stage in wishes.stages:
        if stage not in recipe.stages:
            raise ConfigError(
                f"{base.name} was made without {stage}. Choose less, or give the section a value, "
                f"such as {'ppo.steps=50' if stage == 'ppo' else f'{stage}.prompts=64'}."
            )
    return recipe


def goes_on(base: Run, wishes: Wishes) -> tuple[str, ...]:
    """Roles whose new adapter starts as a copy of the base run's."""
    there = base.adapters()
    return tuple(role for role in BEFORE if role in there) if wishes.go_on else ()


def _require_open(override: str, old: Recipe) -> None:
    key, _, value = override.partition("=")
    key = key.strip()
    section, _, field = key.partition(".")
    is_open = section in _OPEN_SECTIONS and field and field != "start_from"
    if key not in _OPEN_FIELDS and not is_open:
        raise ConfigError(
            f"{override!r} cannot be changed here. Allowed: fields of reward, ppo and evaluate "
            f"(reward.epochs=2), {', '.join(_OPEN_FIELDS)}. For anything else use the command line."
        )
    before = getattr(getattr(old, section, None), field, None)
    if field == "judge" and value.strip() not in (*JUDGES, "null", str(before)):
        raise ConfigError(
            f"{override!r}: a page cannot name code to import. Allowed: {', '.join(JUDGES)}, null."
        )


# -- the snapshot -------------------------------------------------------------------------------


def fill(path: Path, store: Store, events: Iterable[Task | Judgement]) -> str:
    """Write events into a new store at `path`, to be read and never changed; its SHA-256.

    Args:
        path: of the snapshot.
        store: what the events came from; tasks that theirs repeat are looked up there.
        events: tasks before their judgements.
    """
    events = list(events)
    there = {e.task_id for e in events if isinstance(e, Task)}
    repeated = {e.repeat_of for e in events if isinstance(e, Task) and e.repeat_of} - there
    first = [task for task in map(store.task, sorted(repeated)) if task is not None]
    filling = path.with_name(f".{path.name}.filling")
    try:
        with Store.open(filling) as copy:
            copy.add_many([*first, *events])
            # A copy has no log beside it, so that one file is all there is to hash.
            return copy.snapshot(path)
    finally:
        for leftover in path.parent.glob(f"{filling.name}*"):
            leftover.unlink()


# -- the directory ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What training needs and what there is, in GiB.

    Attributes:
        card: the GPU, or the machine's memory.
        needs: of training, at its peak.
        usable: of the card.
        held: by this app and whatever else is on the card now.
    """

    card: str
    needs: float
    usable: float
    held: float

    @property
    def fits_beside(self) -> bool:
        """Whether chat can stay loaded meanwhile."""
        return self.needs + self.held <= self.usable


def predict_memory(recipe: Recipe) -> Memory:
    """By the memory plan; loads torch, which the app's engine has loaded anyway.

    Raises:
        UserError: the base or the device is not there.
    """
    from lora_rlhf.model.memory import plan

    found = plan(recipe)
    return Memory(found.card_name, found.needs_gib, found.usable_gib, _held(recipe))


def _held(recipe: Recipe) -> float:
    """GiB in use: of the whole GPU, else of this process."""
    import torch

    from lora_rlhf.model.backbone import pick_device
    from lora_rlhf.model.footprint import GIB

    device = pick_device(recipe.base.device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / GIB
    return _resident() / GIB


def _resident() -> int:
    """Bytes of memory of this process; its peak where the system tells no more."""
    import resource
    import sys

    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def copy_adapters(base: Run, new: Run, going_on: Sequence[str]) -> None:
    """Put the base run's `sft` into the new run, complete, so that it starts with the rewards.

    Args:
        base: the run to start from.
        new: the run that is made.
        going_on: roles whose adapters are copied, too, to go on from.

    Raises:
        CheckpointError: the base run has none.
    """
    if "sft" not in base.adapters():
        raise CheckpointError(f"{base.path} has no adapter sft to start from. Choose another run.")
    shutil.copytree(base.adapter("sft"), new.adapter("sft"))
    for role in going_on:
        shutil.copytree(base.adapter(role), new.path / BEFORE[role])
    summary = base.summary()
    new.finish_stage("sft", summary.get("seconds", {}).get("sft", 0.0), sft=summary.get("sft", {}))


def write_recipe(new: Run, recipe: Recipe) -> None:
    """The last file of a new run: from here on it is one."""
    write_atomically(new.path / "recipe.yaml", dump_recipe(recipe))
