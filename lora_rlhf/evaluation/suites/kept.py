"""Answers and scores that are on disk as soon as they are there, one file an adapter."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_rlhf.model.backbone import Backbone

Value = tuple[float, bool] | str
"""A log-likelihood in nats and whether greedy decoding gives it, or an answer's text."""


class Kept:
    """Requests that were computed before, by key; a crash costs the line it fell on alone.

    Args:
        path: of the file, a JSON line a request; made when it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Value] = {}
        if not path.exists():
            return
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        if cut:
            # A line appended to half a line would be lost with it.
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)
        for line in whole.splitlines():
            record = json.loads(line)
            value = record["v"]
            self._values[record["k"]] = value if isinstance(value, str) else (value[0], value[1])

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Value:
        return self._values[key]

    def put(self, found: Sequence[tuple[str, Value]]) -> None:
        """Add requests, on disk when this returns."""
        self._values.update(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"k": key, "v": value}, ensure_ascii=False) for key, value in found]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def key_of(kind: str, *parts: object) -> str:
    """The key of a request: a hash of all that its result depends on but the adapter."""
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:32]


def identity_of(backbone: Backbone, adapter: str | None) -> str:
    """A hash of the base and of an adapter's weights (None: the bare base), whatever its name."""
    print_ = backbone.fingerprint
    facts = [print_.weights, print_.quantization, print_.template, str(backbone.compute_dtype)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    if adapter is not None:
        config = backbone.adapters.config(adapter)
        digest.update(json.dumps([config.r, config.lora_alpha, config.use_rslora]).encode())
        for name, parameter in sorted(backbone.adapters.parameters(adapter).items()):
            digest.update(".".join(p for p in name.split(".") if p != adapter).encode())
            flat = parameter.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
