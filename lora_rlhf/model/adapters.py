"""Every role's adapter on the one backbone, and the only switch between them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.model.fingerprint import Fingerprint
from lora_rlhf.model.heads import ScalarHead
from lora_rlhf.model.mixed import Rows, mix
from lora_rlhf.recipe import Lora
from lora_rlhf.runs import directory_atomically

SCORE_KEY = "base_model.model.score.weight"
HEAD_FILE = "scalar_head.safetensors"


class Adapters:
    """The adapters and scalar heads on a backbone, by role name.

    Three rules keep roles apart (each was measured to fail silently otherwise): `use` is the only
    switch; a forward and its backward lie in the same `use` block; optimizers are built from
    `parameters(name)`, never from `requires_grad`.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        fingerprint: Fingerprint,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._causal_lm = causal_lm
        self._fingerprint = fingerprint
        self._compute_dtype = compute_dtype
        self._peft: PeftModel | None = None
        self._active: str | None = None
        self._mixing = False
        self._layers: list[BaseTunerLayer] = []
        self._owned: dict[str, nn.Parameter] = {}
        self.heads: dict[str, ScalarHead] = {}
        self.parents: dict[str, str] = {}

    # -- what there is --------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the adapters there are."""
        return list(self._peft.peft_config) if self._peft else []

    @property
    def active(self) -> str | None:
        """The adapter in use; None for the bare base."""
        return self._active

    def config(self, name: str) -> LoraConfig:
        """The LoRA settings of an adapter."""
        assert self._peft is not None
        config = self._peft.peft_config[name]
        assert isinstance(config, LoraConfig)
        return config

    def owns(self, parameter_name: str) -> bool:
        """Whether a parameter of the model belongs to an adapter rather than to the base."""
        return "lora_" in parameter_name

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by their name in the model; its head is not among them."""
        own = {key: p for key, p in self._owned.items() if name in key.split(".")}
        assert own, f"no adapter {name}; there are {self.names}"
        return own

    # -- making ---------------------------------------------------------------------------------

    def add(self, name: str, lora: Lora, seed: int = 0) -> None:
        """Make a fresh adapter, whose function is zero until it is trained.

        Raises:
            ConfigError: `target_modules` names nothing in the model, or its head.
        """
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=self._targets(lora.target_modules),
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            task_type=TaskType.CAUSAL_LM,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._attach(name, config)

    def copy(self, source: str, target: str) -> None:
        """Make `target` (again) an exact copy of `source`, head included, without dropout."""
        assert self._peft is not None
        if target in self.names:
            self.delete(target)
        self._attach(target, _without_dropout(self.config(source)))
        tensors = self._tensors(source)
        self._fill(target, tensors, Path(source))
        self.to_dtype(target, torch.float32)
        if source in self.heads:
            self.add_head(target)
            self.heads[target].copy_from(self.heads[source])
        self.parents[target] = source

    def add_head(self, name: str, seed: int = 0) -> ScalarHead:
        """Give an adapter a fresh scalar head."""
        weight = self._causal_lm.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        self.heads[name] = ScalarHead(weight.shape[1], seed).to(weight.device)
        return self.heads[name]

    def delete(self, name: str) -> None:
        """Remove an adapter and its head."""
        assert self._peft is not None
        assert self._active != name
        self._peft.delete_adapter(name)
        self.heads.pop(name, None)
        self._index()
        self._switch(self._active)

    def freeze(self, name: str) -> None:
        """Mark a finished adapter: no dropout any more, and at rest in the compute dtype.

        Under bf16 autocast its products are the same as in fp32, at half the memory. Where fp32 is
        computed in, it stays fp32: a coarser reference would make the KL of a copy nonzero.
        """
        for layer in self._layers:
            dropout = getattr(layer, "lora_dropout", {})
            if name in dropout:
                dropout[name] = nn.Identity()
        self.to_dtype(name, self._compute_dtype)

    def to_dtype(self, name: str, dtype: torch.dtype) -> None:
        """Cast an adapter's parameters in place; trained ones must be fp32."""
        for parameter in self.parameters(name).values():
            parameter.data = parameter.data.to(dtype)

    # -- the switch -----------------------------------------------------------------------------

    @contextmanager
    def use(self, name: str | None, train: bool = False) -> Iterator[None]:
        """Run the block under one adapter (None: the bare base), then restore what was.

        Restores the active adapter and every `requires_grad` flag, which PEFT's own `set_adapter`
        turns on for a frozen adapter and off for the others.

        Args:
            name: the role.
            train: its parameters collect gradients in the block; no others ever do.
        """
        flags = [(p, p.requires_grad) for p in self._owned.values()]
        before = self._active
        self._switch(name)
        if train:
            assert name is not None
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            self._switch(before)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @contextmanager
    def mixed(self, names: Sequence[str | None]) -> Iterator[Rows]:
        """Run the block with one adapter a row (None: the bare base), then restore what was.

        For forwards without gradient whose batch has exactly these rows. No other adapter can be
        switched to in the block; scalar heads play no part in it.

        Raises:
            NotByRowError: they cannot share a batch, as `mix` says.
        """
        for name in names:
            self._require(name)
        with self.use(None), mix(self._layers, names, self._compute_dtype) as rows:
            self._mixing = True
            try:
                yield rows
            finally:
                self._mixing = False

    def _require(self, name: str | None) -> None:
        assert name is None or name in self.names, f"no adapter {name}; there are {self.names}"

    def _switch(self, name: str | None) -> None:
        self._require(name)
        assert not self._mixing, "no other adapter can be used while rows have each their own"
        for layer in self._layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
        for parameter in self._owned.values():
            parameter.requires_grad_(False)
        self._active = name

    def _index(self) -> None:
        """Walk the model once after its adapters change, so that a switch is cheap."""
        self._layers = [m for m in self._causal_lm.modules() if isinstance(m, BaseTunerLayer)]
        self._owned = {k: p for k, p in self._causal_lm.named_parameters() if self.owns(k)}

    # -- files ----------------------------------------------------------------------------------

    def save(
        self, name: str, path: Path, role: str, stage: str, data: dict[str, Any] | None = None
    ) -> None:
        """Write a plain PEFT directory plus `lora_rlhf.json`, in one atomic replacement.

        An adapter with a head is written as a sequence classifier (task SEQ_CLS, `score` among
        its modules_to_save), which transformers and PEFT load as they are.

        Args:
            name: of the adapter.
            path: of its directory.
            role: that it plays.
            stage: that made it.
            data: what is told of what it was trained on.
        """
        with directory_atomically(path) as making:
            self.write(name, making, role, stage, data)

    def write(self, name: str, directory: Path, role: str, stage: str, data: Any = None) -> None:
        """Write the adapter's files into an existing directory; arguments as `save`."""
        assert self._peft is not None
        tensors = {k: v.detach().cpu().contiguous() for k, v in self._tensors(name).items()}
        config = deepcopy(self.config(name))
        config.inference_mode = True
        config.base_model_name_or_path = self._fingerprint.model
        facts: dict[str, Any] = {
            "role": role,
            "stage": stage,
            "parent": self.parents.get(name),
            "fingerprint": self._fingerprint.as_dict(),
            "versions": {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")},
        }
        if data is not None:
            facts["data"] = data
        head = self.heads.get(name)
        if head is not None:
            config.task_type = TaskType.SEQ_CLS
            config.modules_to_save = ["score"]
            tensors[SCORE_KEY] = head.weight.detach().cpu()[None].contiguous()
            facts["score"] = {"gain": head.gain.item(), "shift": head.shift.item()}
            save_file({k: v.cpu() for k, v in head.state_dict().items()}, directory / HEAD_FILE)
        config.save_pretrained(str(directory))
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "lora_rlhf.json").write_text(json.dumps(facts, indent=1) + "\n")

    def load(self, name: str, path: Path) -> None:
        """Load an adapter directory of ours, of PEFT or of TRL (SFT and reward) as `name`.

        Raises:
            CheckpointError: not an adapter, made on another backbone, or its tensors do not fit.
        """
        config_file, weights_file = path / "adapter_config.json", path / "adapter_model.safetensors"
        if not config_file.is_file() or not weights_file.is_file():
            raise CheckpointError(
                f"{path} is not an adapter: it must hold adapter_config.json and "
                f"adapter_model.safetensors. Train one with `lora-rlhf run`, or give its directory."
            )
        facts_file = path / "lora_rlhf.json"
        if facts_file.is_file():
            facts = json.loads(facts_file.read_text())
            self._fingerprint.require_same(facts["fingerprint"], path)
            if facts.get("parent"):
                self.parents[name] = facts["parent"]
        config = LoraConfig.from_pretrained(str(path))
        assert isinstance(config, LoraConfig)
        tensors = load_file(weights_file)
        score = tensors.pop(SCORE_KEY, None)
        _require_lora_alone(tensors, path)
        if name in self.names:
            self.delete(name)
        self._attach(name, _without_dropout(config))
        self._fill(name, tensors, path)
        if score is not None:
            self._load_head(name, score, path)

    def _load_head(self, name: str, score: Tensor, path: Path) -> None:
        if score.shape[0] != 1:
            raise CheckpointError(
                f"{path}: its score head has {score.shape[0]} outputs; a reward model has 1. "
                f"Train it with num_labels=1."
            )
        head = self.add_head(name)
        if (path / HEAD_FILE).is_file():
            head.load_state_dict(load_file(path / HEAD_FILE))
        else:
            head.weight.data.copy_(score[0])

    def _attach(self, name: str, config: LoraConfig) -> None:
        before = self._active
        if self._peft is None:
            self._peft = PeftModel(self._causal_lm, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        self._index()
        self.to_dtype(name, torch.float32)
        self._switch(before)

    def _fill(self, name: str, tensors: dict[str, Tensor], where: Path) -> None:
        assert self._peft is not None
        expected = self._tensors(name)
        if expected.keys() != tensors.keys() or any(
            expected[k].shape != v.shape for k, v in tensors.items()
        ):
            odd = sorted(expected.keys() ^ tensors.keys())[:2] or "their shapes"
            raise CheckpointError(
                f"{where}: its tensors do not fit {self._fingerprint.model} (such as {odd}). Load "
                f"the base it was trained on."
            )
        set_peft_model_state_dict(self._peft, dict(tensors), adapter_name=name)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors under the keys of PEFT's files."""
        assert self._peft is not None
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self._peft, adapter_name=name, save_embedding_layers=False
        )
        return found

    def _targets(self, wanted: str | tuple[str, ...]) -> list[str]:
        """Module names for PEFT, spelt out so that any host of the adapter finds the same ones."""
        head = self._causal_lm.get_output_embeddings()
        linears = {
            key.rsplit(".", 1)[-1]
            for key, module in self._causal_lm.named_modules()
            if isinstance(module, nn.Linear) and module is not head and "lora_" not in key
        } - {"base_layer"}
        if self._peft is not None:
            linears |= set(self.config(self.names[0]).target_modules or ())
        if not linears:
            raise ConfigError(
                f"base.model: {self._fingerprint.model} has no linear layer that LoRA can sit on "
                f"(GPT-2 keeps Conv1D ones). Allowed: models of nn.Linear layers, such as Llama, "
                f"Qwen, Mistral, Phi."
            )
        if wanted == "all-linear":
            return sorted(linears)
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        unknown = [n for n in names if n not in linears]
        if unknown:
            raise ConfigError(
                f"lora.target_modules: {', '.join(unknown)} names no linear layer of "
                f"{self._fingerprint.model}. Allowed: all-linear, or any of "
                f"{', '.join(sorted(linears))}."
            )
        return names


def _require_lora_alone(tensors: dict[str, Tensor], where: Path) -> None:
    """Refuse an adapter of PEFT or TRL that trained more than one frozen backbone can share."""
    if any(".score.lora_" in key for key in tensors):
        raise CheckpointError(
            f"{where}: LoRA was put on its score head and the head itself not saved, so its scores "
            f"are lost. Train it with task_type=SEQ_CLS or modules_to_save=['score']."
        )
    names = (k.removeprefix("base_model.model.") for k in tensors if "lora_" not in k)
    more = sorted({name.rpartition(".")[0] for name in names})
    if more:
        raise CheckpointError(
            f"{where}: it holds trained weights of {', '.join(more[:3])} beside its LoRA, but all "
            f"roles share one frozen backbone. Train it without modules_to_save and new tokens."
        )


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """The same shape for a causal backbone, dropping nothing: RL and reward train so (G6)."""
    copy = deepcopy(config)
    copy.lora_dropout = 0.0
    copy.modules_to_save = None
    copy.task_type = TaskType.CAUSAL_LM
    copy.inference_mode = False
    return copy
