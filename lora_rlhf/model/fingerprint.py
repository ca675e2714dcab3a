"""Which backbone an adapter belongs to."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from lora_rlhf.errors import CheckpointError

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


def hash_weights(model: str, revision: str | None) -> str:
    """A hash of a checkpoint's safetensors files: names, sizes, heads and tails.

    Reading 4 MiB at both ends of each file tells checkpoints apart without reading 16 GB; the
    same files give the same hash from a directory and from the hub's cache.
    """
    directory = Path(model)
    if not directory.is_dir():
        found = cached_file(model, "config.json", revision=revision)
        assert found is not None
        directory = Path(found).parent
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_SAMPLE_BYTES))
            handle.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
