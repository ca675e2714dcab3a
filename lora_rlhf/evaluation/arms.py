"""Arms of an evaluation: who answers, as a person writes it, and as adapters on the backbone.

base, sft, policy          the bare base and the adapters of the run
few_shot_K[:ARM]           an arm (unset: base) after K demonstrations
best_of_N[:ARM]            the best of N answers of an arm (unset: sft) by the reward adapter
STAGE@STEP                 a checkpoint of sft or ppo
PATH                       an adapter from elsewhere, or a run, whose policy it is
NAME=ARM                   any of these under another name
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_rlhf.data.records import Messages, prompt_key
from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.evaluation.choosing import OWN, Chooser
from lora_rlhf.recipe import Evaluate
from lora_rlhf.runs import Run
from lora_rlhf.training.checkpoint import set_role_state
from lora_rlhf.training.material import TokenisedPrompt, split_demonstrations
from lora_rlhf.training.session import Session

MOST_DRAWS = 64
_NAME = re.compile(r"(?P<name>[A-Za-z0-9_][\w./ -]{0,60})=(?P<rest>.+)")
_BEST = re.compile(r"best_of_(?P<n>[0-9]{1,6})(?::(?P<rest>.+))?")
_SHOTS = re.compile(r"few_shot_(?P<n>[0-9]{1,6})(?::(?P<rest>.+))?")
_CHECKPOINT = re.compile(r"(?P<stage>sft|ppo)@(?P<step>[0-9]{1,9})")
_ROLES = ("sft", "policy")
_ALLOWED = (
    "Allowed: base, sft, policy, few_shot_K, best_of_N (such as best_of_4:policy), ppo@STEP, "
    "sft@STEP, the directory of an adapter or of a run, and NAME= before any of these."
)


@dataclass(frozen=True)
class ArmSpec:
    """One way to answer, as it was written.

    Attributes:
        name: under which it is reported.
        source: base, sft, policy, STAGE@STEP or a path.
        shots: demonstrations before the prompt.
        best_of: answers drawn, of which the reward adapter's favourite is given.
    """

    name: str
    source: str
    shots: int = 0
    best_of: int = 1


@dataclass(frozen=True)
class ReadyArm:
    """An arm whose adapter is on the backbone.

    Attributes:
        spec: what was asked for.
        adapter: its name on the backbone; None: the bare base.
        identity: what two evaluations must share for this to be the same arm: a hash of the
            adapter's weights, shots, n, and hashes of the demonstrations and of who chooses.
        origin: where its weights lie, relative to the run's parent where they do; "" for the base.
    """

    spec: ArmSpec
    adapter: str | None
    identity: str
    origin: str = ""

    @property
    def name(self) -> str:
        """Under which it is reported."""
        return self.spec.name


def parse_arm(text: str, paths: bool = True) -> ArmSpec:
    """An arm from its text.

    Args:
        text: as above.
        paths: allow them; a recipe does not, since a page may change it.

    Raises:
        ConfigError: it means nothing, or its numbers are out of range.
    """
    named = _NAME.fullmatch(text)
    name, rest = (named["name"], named["rest"]) if named else (text, text)
    best_of, shots = 1, 0
    if found := _BEST.fullmatch(rest):
        best_of, rest = int(found["n"]), found["rest"] or "sft"
        if not 2 <= best_of <= MOST_DRAWS:
            raise ConfigError(f"arm {text}: best-of is {best_of}. Allowed: 2 to {MOST_DRAWS}.")
    if found := _SHOTS.fullmatch(rest):
        shots, rest = int(found["n"]), found["rest"] or "base"
        if not 1 <= shots <= MOST_DRAWS:
            raise ConfigError(f"arm {text}: {shots} demonstrations. Allowed: 1 to {MOST_DRAWS}.")
    known = rest in ("base", *_ROLES) or _CHECKPOINT.fullmatch(rest)
    if not known and not paths:
        raise ConfigError(
            f"evaluate.arms: {text} cannot stand in a recipe. {_ALLOWED} Paths: on the command "
            f"line alone, with lora-rlhf evaluate RUN --arms."
        )
    if name in ("base", *_ROLES) and (rest, best_of, shots) != (name, 1, 0):
        raise ConfigError(f"arm {text}: {name} is the name of another arm. Choose another name.")
    if not known:
        path = Path(rest).expanduser()
        if not (path / "adapter_config.json").is_file() and not (path / "recipe.yaml").is_file():
            raise ConfigError(f"arm {text}: there is no adapter and no run in {rest}. {_ALLOWED}")
        if named is None:
            name = text.removesuffix(rest) + _name_of(path)
    return ArmSpec(name, rest, shots, best_of)


def parse_arms(texts: Sequence[str], reference: str = "sft", paths: bool = True) -> list[ArmSpec]:
    """Arms from their texts; the reference is put first where it is not among them.

    Raises:
        ConfigError: of `parse_arm`; two arms of one name.
    """
    specs = [parse_arm(text.strip(), paths) for text in texts]
    if reference not in [spec.name for spec in specs]:
        specs.insert(0, parse_arm(reference, paths))
    twice = [name for name, n in Counter(spec.name for spec in specs).items() if n > 1]
    if twice:
        raise ConfigError(
            f"two arms have the name {twice[0]}. Name one of them, such as again={twice[0]}."
        )
    return specs


def default_arms(settings: Evaluate, has_reward: bool, has_policy: bool) -> list[str]:
    """What a recipe that names no arms compares."""
    arms = ["base"] * settings.base + ["sft"]
    if has_reward and settings.best_of > 1:
        arms.append(f"best_of_{settings.best_of}")
    return arms + ["policy"] * has_policy


def _name_of(path: Path) -> str:
    """RUN/ROLE of an adapter in a run, else the name of its directory."""
    path = path.resolve()
    if (path / "recipe.yaml").is_file():
        return f"{path.name}/{'policy' if 'policy' in Run(path).adapters() else 'sft'}"
    for parent in list(path.parents)[:3]:
        if (parent / "recipe.yaml").is_file():
            inner = path.relative_to(parent).as_posix().removesuffix("/adapter")
            return f"{parent.name}/{ {'ppo': 'policy'}.get(inner, inner) }"
    return path.name


# -- onto the backbone --------------------------------------------------------------------------


def ready(
    session: Session, specs: Sequence[ArmSpec], chooser: Chooser | None = None
) -> list[ReadyArm]:
    """Put the adapters of all arms on the backbone, each once, frozen.

    Args:
        session: with the run's adapters in place.
        specs: what was asked for.
        chooser: of the best of n; None: the run's reward adapter.

    Raises:
        CheckpointError: there is none, or it was made on another backbone.
        ConfigError: best-of-n without a reward adapter.
    """
    adapters = session.backbone.adapters
    sources: dict[str, tuple[str | None, str, str]] = {}
    arms = []
    for spec in specs:
        if spec.best_of > 1 and chooser is None and OWN not in adapters.heads:
            raise ConfigError(
                f"arm {spec.name} is chosen by the reward adapter, and {session.run.path} has "
                f"none. Leave the arm out, or train a reward model."
            )
        if spec.source not in sources:
            sources[spec.source] = _load(session, spec.source, len(sources))
        adapter, sha256, origin = sources[spec.source]
        identity = f"{sha256[:16]}+{spec.shots}x{spec.best_of}"
        if spec.shots:
            identity += f"+{_demonstrations(session)}"
        if spec.best_of > 1:
            identity += f"+{(chooser or Chooser()).identity(session.backbone)[:8]}"
        arms.append(ReadyArm(spec, adapter, identity, origin))
    return arms


def _demonstrations(session: Session) -> str:
    """A hash of what `with_shots` chooses from."""
    train, _ = split_demonstrations(session)
    rows = sorted(f"{prompt_key(d.prompt)} {d.response}" for d in train)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:8]


def _load(session: Session, source: str, number: int) -> tuple[str | None, str, str]:
    """(name on the backbone, hash of the weights, where they lie) of a source."""
    adapters, run = session.backbone.adapters, session.run
    if source == "base":
        return None, "base", ""
    if source in _ROLES:
        if source not in adapters.names:
            raise CheckpointError(
                f"{run.path} has no adapter {source}. It has: "
                f"{', '.join(run.adapters()) or 'none yet'}. Leave the arm out, or run that stage."
            )
        return source, _sha256(run.adapter(source)), _origin(session, run.adapter(source))
    name = f"arm_{number}"
    if found := _CHECKPOINT.fullmatch(source):
        path = _checkpoint(session, name, found["stage"], int(found["step"]))
    else:
        path = _directory(Path(source).expanduser())
        adapters.load(name, path)
    adapters.freeze(name)
    return name, _sha256(path), _origin(session, path)


def _directory(path: Path) -> Path:
    """The adapter itself, or the policy (else sft) of a run.

    Raises:
        CheckpointError: the run has neither.
    """
    if (path / "adapter_config.json").is_file():
        return path
    run = Run(path)
    roles = [role for role in ("policy", "sft") if role in run.adapters()]
    if not roles:
        raise CheckpointError(
            f"{path} has no adapter that answers: neither policy nor sft. Run those stages first."
        )
    return run.adapter(roles[0])


def _checkpoint(session: Session, name: str, stage: str, step: int) -> Path:
    """Load a kept policy, or what an unfinished stage has saved of its adapter.

    Raises:
        CheckpointError: there is none of this step; names those that are.
    """
    run, adapters = session.run, session.backbone.adapters
    kept = run.kept_policies() if stage == "ppo" else {}
    if step in kept:
        adapters.load(name, kept[step])
        return kept[step]
    states = {
        int(file.parent.name.removeprefix("step-")): file
        for file in sorted((run.path / stage / "checkpoints").glob("step-*/state.pt"))
    }
    if step not in states:
        there = ", ".join(f"{stage}@{n}" for n in sorted({*kept, *states}))
        keep = "ppo.keep_policies_every keeps those of PPO" if stage == "ppo" else ""
        raise CheckpointError(
            f"{run.path} has no checkpoint {stage}@{step}. It has: {there or 'none'}. A finished "
            f"stage keeps its last adapter alone{'; ' + keep if keep else ''}."
        )
    state = torch.load(states[step], map_location="cpu", weights_only=True)
    tensors = state["trainer"]["policy"] if stage == "ppo" else state["role"]
    role = {"ppo": "policy"}.get(stage, stage)
    adapters.copy("sft", name)
    set_role_state(session.backbone, name, _renamed(tensors, role, name))
    return states[step].parent


def _renamed(tensors: dict[str, Any], role: str, name: str) -> dict[str, Any]:
    """The same tensors under the keys of another adapter."""
    return {
        ".".join(name if part == role else part for part in key.split(".")): value
        for key, value in tensors.items()
    }


def _sha256(directory: Path) -> str:
    """Of an adapter's weights; of its path where nothing has been saved."""
    for file in ("adapter_model.safetensors", "state.pt"):
        if (directory / file).is_file():
            return hashlib.sha256((directory / file).read_bytes()).hexdigest()
    return hashlib.sha256(str(directory).encode()).hexdigest()


def _origin(session: Session, path: Path) -> str:
    parent = session.run.path.resolve().parent
    resolved = path.resolve()
    return str(resolved.relative_to(parent) if resolved.is_relative_to(parent) else resolved)


# -- prompts ------------------------------------------------------------------------------------


def with_shots(session: Session, prompts: Sequence[TokenisedPrompt], shots: int) -> list[list[int]]:
    """Ids of the prompts after so many demonstrations, the same ones for each.

    They are turns of the same dialogue; for a base that continues plain text, texts before it.
    Of the training demonstrations those in the middle of the lengths are taken, so that neither a
    one-word answer nor the longest of all stands for the rest.

    Raises:
        ConfigError: there are too few, or prompt and answer would not fit the base's context.

    Source: the prompted baseline of Ouyang et al. 2022, section 3.5.
    """
    if not shots:
        return [ids for ids, _ in prompts]
    train, _ = split_demonstrations(session)
    held = {prompt_key(prompt.messages) for _, prompt in prompts}
    usable = [
        d
        for d in train
        if prompt_key(d.prompt) not in held and all(m["role"] != "system" for m in d.prompt)
    ]
    if len(usable) < shots:
        raise ConfigError(
            f"few_shot_{shots} needs {shots} demonstrations and there are {len(usable)}. Lower it."
        )
    usable.sort(key=lambda d: len(d.response))
    start = (len(usable) - shots) // 2
    chosen = usable[start : start + shots]
    form = session.backbone.format
    found = []
    for _, prompt in prompts:
        if form.mode == "none":
            before = "\n\n".join(_as_text(d.prompt) + d.response for d in chosen)
            text = f"{before}\n\n{_as_text(prompt.messages)}"
            messages: Messages = ({"role": "user", "content": text},)
        else:
            turns = [
                turn
                for d in chosen
                for turn in (*d.prompt, {"role": "assistant", "content": d.response})
            ]
            messages = (*turns, *prompt.messages)  # type: ignore[arg-type]
        found.append(form.prompt_ids(messages))
    _require_room(session, found, shots)
    return found


def _as_text(messages: Messages) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _require_room(session: Session, prompts: Sequence[list[int]], shots: int) -> None:
    context = getattr(session.backbone.causal_lm.config, "max_position_embeddings", None)
    longest = max(map(len, prompts)) + session.recipe.data.max_response_tokens
    if context is not None and longest > context:
        raise ConfigError(
            f"few_shot_{shots}: prompt and answer take {longest} tokens, and the base's context "
            f"has {context}. Use fewer demonstrations."
        )
