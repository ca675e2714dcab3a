"""What a stage's adapter starts as: a copy of another role, or an earlier one of its own role."""

from pathlib import Path

from lora_rlhf.errors import CheckpointError
from lora_rlhf.training.session import Session

_HAS_HEAD = {"reward": True, "policy": False}


def start_adapter(session: Session, role: str, source: str, start_from: str | None) -> None:
    """Put `role` in place, to be trained.

    Args:
        session: whose backbone gets it.
        role: reward or policy.
        source: the role on the backbone that it is copied from.
        start_from: directory of an adapter to go on from instead, as in `<stage>.start_from`.

    Raises:
        CheckpointError: no adapter of that role, or of another backbone.
    """
    adapters = session.backbone.adapters
    if start_from is None:
        adapters.copy(source, role)
        return
    path = Path(start_from).expanduser()
    adapters.heads.pop(role, None)
    adapters.load(role, path)
    if (role in adapters.heads) != _HAS_HEAD[role]:
        found = "a scalar head" if role in adapters.heads else "no scalar head"
        raise CheckpointError(
            f"{role}: {path} has {found}, so it is no {role} adapter. Give the "
            f"{'reward' if role == 'reward' else 'ppo'}/adapter of a run."
        )
    adapters.parents[role] = role
