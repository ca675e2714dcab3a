"""Which backbone an adapter belongs to."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from lora_rlhf.errors import CheckpointError, ConfigError

_SAMPLE_BYTES = 4 << 20


@dataclass(frozen=True)
class Fingerprint:
    """What must agree for an adapter to mean the same on a backbone.

    `model` is for people; the comparison reads the other three, so a moved directory still fits.
    """

    model: str
    weights: str
    quantization: str
    template: str

    def as_dict(self) -> dict[str, str]:
        """For `lora_rlhf.json`."""
        return asdict(self)

    def require_same(self, saved: dict[str, Any], where: Path) -> None:
        """Refuse an adapter that was made on another backbone.

        Raises:
            CheckpointError: one sentence that names both backbones and what differs.
        """
        mine = self.as_dict()
        differs = [k for k in ("weights", "quantization", "template") if saved.get(k) != mine[k]]
        if differs:
            raise CheckpointError(
                f"{where} was made on {saved.get('model')} ({saved.get('quantization')}), which is "
                f"not this backbone {self.model} ({self.quantization}): {', '.join(differs)} "
                f"differ; load that base, or train the adapter again on this one."
            )


def _weight_files(directory: Path) -> list[Path]:
    """The files transformers reads, and no other weights that lie beside them.

    Raises:
        ConfigError: there are none.
    """
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [directory / n for n in names if (directory / n).is_file()]
    files = files or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise ConfigError(
            f"{directory} holds no weights. Allowed: model.safetensors, or its parts with "
            f"model.safetensors.index.json, or pytorch_model.bin. Download the model again."
        )
    return files


def hash_weights(model: str, revision: str | None) -> str:
    """A hash of a checkpoint's weight files: names, sizes, heads and tails.

    Reading 4 MiB at both ends of each file tells checkpoints apart without reading 16 GB; the
    same files give the same hash from a directory and from the hub's cache.
    """
    directory = Path(model)
    if not directory.is_dir():
        found = cached_file(model, "config.json", revision=revision)
        assert found is not None
        directory = Path(found).parent
    digest = hashlib.sha256()
    for file in _weight_files(directory):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_SAMPLE_BYTES))
            handle.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
