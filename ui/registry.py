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

    def add(self, run: Run) -> list[str]:
        """Take in a run's adapters; their names.

        Raises:
            CheckpointError: of `read`.
        """
        fresh = self.read(run)
        self.put(fresh)
        return [entry.name for entry in fresh]

    def read(self, run: Run) -> list[Registered]:
        """The adapters of a run; takes none of them in.

        Raises:
            CheckpointError: made on another backbone than those there are, without weights in
                safetensors, or another run of this name is open.
        """
        entries = []
        for role in (role for role in run.adapters() if role in _ROLES):
            path, name = run.adapter(role), f"{run.name}/{role}"
            self._require_same_backbone(path)
            if not (path / _WEIGHTS).is_file():
                raise CheckpointError(f"{path} holds no {_WEIGHTS}; other weights are not read.")
            sha256 = hashlib.sha256((path / _WEIGHTS).read_bytes()).hexdigest()
            known = self._entries.get(name)
            if known is not None and known.run.resolve() != run.path.resolve():
                raise CheckpointError(
                    f"{run.path} and {known.run} have one name, which votes are stored under. "
                    f"Rename one of them."
                )
            entries.append(Registered(name, run.path, role, path, sha256))
        return entries

    def put(self, entries: Sequence[Registered], offered: bool = True) -> None:
        """Take adapters in.

        Args:
            entries: of `read`.
            offered: to everybody. Others are candidates: known by name, and in no list but
                `loaded` and `scorers`, until they are put again as offered ones.
        """
        names = {entry.name: entry for entry in entries}
        # Replaced, not changed: others may be reading the old ones.
        if offered:
            self._candidates = {k: e for k, e in self._candidates.items() if k not in names}
            self._entries = self._entries | names
            self.version += bool(names)
        else:
            fresh = {k: e for k, e in names.items() if k not in self._entries}
            self._candidates = self._candidates | fresh

    def drop(self, run: Path) -> list[str]:
        """Forget the candidates of a run; their names."""
        names = [e.name for e in self._candidates.values() if e.run == run]
        self._candidates = {k: e for k, e in self._candidates.items() if k not in names}
        return names

    def _require_same_backbone(self, path: Path) -> None:
        file = path / "lora_rlhf.json"
        if not file.is_file():
            return  # of PEFT or TRL; loading it compares the shapes
        try:
            mine = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
            found = {k: str(mine[k]) for k in ("model", "weights", "quantization", "template")}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}). Train the run again.") from error
        theirs = self._fingerprint
        if theirs is None:
            self._fingerprint, self._made_by = found, path
            return
        differs = [k for k in ("weights", "quantization", "template") if found[k] != theirs[k]]
        if differs:
            raise CheckpointError(
                f"{path} was made on {found['model']} ({found['quantization']}) and "
                f"{self._made_by} on {theirs['model']} ({theirs['quantization']}): "
                f"{', '.join(differs)} differ, and one app has one backbone. Open them one at a "
                f"time."
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
    def scorers(self) -> list[str]:
        """Names of all reward adapters that lie on the backbone."""
        return [e.name for e in self.loaded if e.role == "reward"]

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
