"""Who chooses the best of n answers: a reward adapter, or an ensemble of several."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.runs import Run
from lora_rlhf.training.checkpoint import role_state
from lora_rlhf.training.rollout import score_answers

Floats = NDArray[np.float64]
Rule = Literal["mean", "worst", "uncertainty"]
OWN = "reward"


@dataclass(frozen=True)
class Chooser:
    """A reward adapter, or an ensemble of several on the one backbone.

    Attributes:
        members: names of reward adapters on the backbone.
        rule: mean; worst: the lowest member's score; uncertainty: mean - weight * variance.
        weight: lambda of the last.

    Source: Coste et al. 2023, arXiv:2310.02743 (WCO, UWO; the variance is over the k members, not
    k - 1). Their members are normalised, as ours are (RM3).
    """

    members: tuple[str, ...] = (OWN,)
    rule: Rule = "mean"
    weight: float = 0.5

    def combine(self, scores: Floats) -> Floats:
        """Scores of the members, (k, ...), to one, (...)."""
        assert len(scores) == len(self.members)
        mean: Floats = scores.mean(0)
        if self.rule == "worst":
            worst: Floats = scores.min(0)
            return worst
        if self.rule == "uncertainty":
            return mean - self.weight * scores.var(0)
        return mean

    def score(
        self,
        backbone: Backbone,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        max_tokens: int,
    ) -> Floats:
        """Scores of each member, (k, n), one pass over all responses a member.

        Raises:
            CheckpointError: a member is not on the backbone, or has no head.
        """
        return member_scores(backbone, self.members, prompts, responses, max_tokens)

    def identity(self, backbone: Backbone) -> str:
        """A hash of all that decides which answer is chosen."""
        parts = [self.rule, str(self.weight), *sorted(digest(backbone, m) for m in self.members)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def choose(self, scores: Floats) -> int:
        """The place of the best answer by the members' scores, (k, n); the first of equals."""
        return int(self.combine(scores).argmax())


def member_scores(
    backbone: Backbone,
    members: Sequence[str],
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    max_tokens: int,
) -> Floats:
    """Scores of reward adapters for responses, (k, n).

    Raises:
        CheckpointError: a member is not on the backbone, or has no head.
    """
    require_scorers(backbone, members)
    found = [
        score_answers(backbone, prompts, responses, max_tokens, adapter=member).double().numpy()
        for member in members
    ]
    return np.stack(found)


def require_scorers(backbone: Backbone, members: Sequence[str]) -> None:
    """Refuse to choose by adapters that give no scores.

    Raises:
        CheckpointError: one is not on the backbone, or has no head.
    """
    heads = [name for name in backbone.adapters.heads if name != "value"]
    missing = [name for name in members if name not in heads]
    if missing or not members:
        raise CheckpointError(
            f"best-of-n chooses by a reward adapter, and {', '.join(missing) or 'none'} is not one "
            f"here. There are: {', '.join(heads) or 'none'}. Train one: lora-rlhf run quickstart "
            f"--only reward, or ask for one answer."
        )


# -- from elsewhere -----------------------------------------------------------------------------


def chooser_of(backbone: Backbone, run: Run, rewards: Sequence[str], rule: str) -> Chooser:
    """A chooser of the adapters that somebody names, which are put on the backbone, frozen.

    Args:
        backbone: with the run's adapters.
        run: whose own reward adapter "reward" is.
        rewards: "reward", or directories of reward adapters or of runs; (): the run's own.
        rule: of `Chooser`.

    Raises:
        ConfigError: a rule that is none, one adapter named twice, no reward adapter in a directory.
        CheckpointError: an adapter of another backbone, or one without a head.
    """
    if rule not in get_args(Rule):
        raise ConfigError(f"--rule is {rule}. Allowed: {', '.join(get_args(Rule))}.")
    members = {text: _put(backbone, run, text, n) for n, text in enumerate(rewards or [OWN])}
    by_weights: dict[str, str] = {}
    for text, name in members.items():
        other = by_weights.setdefault(digest(backbone, name), text)
        if other != text:
            raise ConfigError(f"--reward {text} has the weights of {other}. Name each once.")
    if len(members) < len(rewards):
        raise ConfigError("--reward names one adapter twice. Name each once.")
    return Chooser(tuple(members.values()), rule)  # type: ignore[arg-type]


def _put(backbone: Backbone, run: Run, text: str, number: int) -> str:
    """The name under which a reward adapter is on the backbone."""
    if text == OWN:
        require_scorers(backbone, (OWN,))
        return OWN
    path, name = Path(text).expanduser(), f"chooser_{number}"
    if (path / "recipe.yaml").is_file() and OWN in Run(path).adapters():
        path = Run(path).adapter(OWN)
    if not (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"--reward {text}: there is no reward adapter. Allowed: reward (that of {run.path}), "
            f"the directory of a reward adapter, or of a run that has one."
        )
    backbone.adapters.load(name, path)
    if name not in backbone.adapters.heads:
        raise CheckpointError(f"--reward {text}: the adapter has no head that scores.")
    backbone.adapters.freeze(name)
    return name


def digest(backbone: Backbone, adapter: str) -> str:
    """SHA-256 of an adapter's scale, its weights and its head's, in the order of their names."""
    config = backbone.adapters.config(adapter)
    scale = json.dumps([config.r, config.lora_alpha, config.use_rslora])
    sha256 = hashlib.sha256(scale.encode())
    for _, tensor in sorted(role_state(backbone, adapter).items()):
        sha256.update(tensor.float().contiguous().numpy().tobytes())
    return sha256.hexdigest()
