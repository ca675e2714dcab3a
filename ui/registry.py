"""Which adapters the app knows, read off run directories. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lora_rlhf.errors import CheckpointError
from lora_rlhf.runs import Run
from ui.asking import BASE, Registered

# The value function gives no answers and no scores anybody reads here.
_ROLES = ("sft", "reward", "policy")
_WEIGHTS = "adapter_model.safetensors"


class Registry:
    """The adapters of one or several runs on one backbone, by name.

    Args:
        runs: their directories, oldest first.

    Raises:
        CheckpointError: two runs on different backbones; one sentence that names both.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._entries: dict[str, Registered] = {}
        self._candidates: dict[str, Registered] = {}
        self._fingerprint: dict[str, str] | None = None
        self._made_by = Path()
        self.version = 0
        for run in runs:
            self.add(run)

    def add(self, run: Run, offered: bool = True) -> list[str]:
        """Take in a run's adapters; their names.

        Args:
            run: its directory.
            offered: to everybody. Others are candidates: known by name, and in no list but
                `loaded`, until they are added again as offered ones.

        Raises:
            CheckpointError: made on another backbone than those there are.
        """
        found = [role for role in run.adapters() if role in _ROLES]
        fresh = []
        for role in found:
            path = run.adapter(role)
            self._require_same_backbone(path)
            weights = (path / _WEIGHTS).read_bytes()
            name = f"{run.name}/{role}"
            fresh.append(
                Registered(name, run.path, role, path, hashlib.sha256(weights).hexdigest())
            )
        for entry in fresh:
            self._candidates.pop(entry.name, None)
            (self._entries if offered else self._candidates)[entry.name] = entry
        self.version += bool(fresh) and offered
        return [entry.name for entry in fresh]

    def drop(self, run: Path) -> list[str]:
        """Forget the candidates of a run; their names."""
        names = [e.name for e in self._candidates.values() if e.run == run]
        for name in names:
            del self._candidates[name]
        return names

    def _require_same_backbone(self, path: Path) -> None:
        file = path / "lora_rlhf.json"
        if not file.is_file():
            return  # of PEFT or TRL; loading it compares the shapes
        mine = json.loads(file.read_text())["fingerprint"]
        theirs = self._fingerprint
        if theirs is None:
            self._fingerprint, self._made_by = mine, path
            return
        differs = [k for k in ("weights", "quantization", "template") if mine[k] != theirs[k]]
        if differs:
            raise CheckpointError(
                f"{path} was made on {mine['model']} ({mine['quantization']}) and {self._made_by} "
                f"on {theirs['model']} ({theirs['quantization']}): {', '.join(differs)} differ, "
                f"and one app has one backbone. Open them one at a time."
            )

    @property
    def entries(self) -> list[Registered]:
        """All that are offered, in the order they came."""
        return list(self._entries.values())

    @property
    def loaded(self) -> list[Registered]:
        """All that lie on the backbone: those that are offered, and candidates."""
        return [*self._entries.values(), *self._candidates.values()]

    @property
    def answerers(self) -> list[str]:
        """Names that can answer, the base first; a retrained run's copy of `sft` is no new one."""
        names, seen = [BASE], set()
        for entry in self._entries.values():
            is_copy = entry.role == "sft" and entry.sha256 in seen
            if entry.role != "reward" and not is_copy:
                names.append(entry.name)
            seen.add(entry.sha256)
        return names

    @property
    def reward(self) -> str | None:
        """The reward adapter that came last."""
        names = [e.name for e in self._entries.values() if e.role == "reward"]
        return names[-1] if names else None

    def reference_of(self, name: str) -> str | None:
        """The `sft` adapter that KL of an answer by `name` is measured from."""
        beside = f"{name.rpartition('/')[0]}/sft"
        if beside in self._entries:
            return beside
        others = [e.name for e in self._entries.values() if e.role == "sft"]
        return others[0] if others else None
