"""lm-eval's model interface over one arm of the live backbone; no second copy of the model.

Import it where lm-eval is known to be installed (`lm_eval_tasks.require_lm_eval`).
"""

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lora_rlhf.errors import ConfigError
from lora_rlhf.evaluation.suites.engine import Engine, Row

_MAX_NEW_TOKENS = 256  # where a task does not say; that of lm-eval's own models


class ArmModel(TemplateLM):
    """An arm as lm-eval sees a model.

    What lm-eval asks of one arm the engine computes for all of them, so that the next arm's
    requests are there already. Tokens are those of lm-eval's HFLM: the tokenizer's own special
    tokens before a context, BOS (else EOS) alone before a text without one.

    Args:
        engine: over the backbone.
        arm: its name there.
    """

    def __init__(self, engine: Engine, arm: str) -> None:
        super().__init__()
        self._engine, self._arm = engine, arm
        self.tokenizer = engine.backbone.tokenizer

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's own caches."""
        return self._engine.backbone.format.sha256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; BOS that it spells at its start is not put there again."""
        bos = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, verbose=False, **more)
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval's own, without its bar: the engine draws one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        rows: list[Row] = [(context, continuation) for _, context, continuation in requests]
        return self._engine.loglikelihoods(rows)[self._arm]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log p of whole texts, in windows of the model's length."""
        rows: list[Row] = []
        counts: list[int] = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._engine.max_length,
                context_len=1,
            )
            own = [make_disjoint_window(window) for window in windows]
            rows += own
            counts.append(len(own))
        scored = iter(self._engine.loglikelihoods(rows)[self._arm])
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Greedy answers.

        Raises:
            ConfigError: a task that samples.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(index)
        found: dict[int, str] = {}
        for (room, until), indices in groups.items():
            prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
            texts = self._engine.answers(prompts, room, until)[self._arm]
            found |= dict(zip(indices, texts, strict=True))
        return [found[i] for i in range(len(requests))]


def _settings(kwargs: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """(most new tokens, stop strings) of a task's generation settings."""
    if kwargs.get("do_sample") or kwargs.get("temperature"):
        raise ConfigError(
            "this lm-eval task samples its answers; suites decode greedily, so that two arms "
            "differ by their adapters alone. Choose a task with do_sample: false."
        )
    until = kwargs.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return int(kwargs.get("max_gen_toks", _MAX_NEW_TOKENS)), stops
