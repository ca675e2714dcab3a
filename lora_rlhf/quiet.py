"""The few lines other libraries print at every start and no user can act on; nothing else."""

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

# What takes longer than this shows its bar after all.
_SHORT_SECONDS = 3.0
_BARS = ("Loading weights", "Writing model shards")


def hush_imports() -> None:
    """Silence what is said while libraries are imported; call it before torch is. Imports none.

    - bitsandbytes logs, on CPUs with AVX512-BF16, that an optional kernel of the hub is missing.
      The backbone must not use that kernel (it breaks LoRA gradients), so its absence is no news.
    - transformers warns that `is_gradient_checkpointing` is deprecated; PEFT is what reads it,
      each time an adapter is first put on a model.
    """
    # A filter acts on records of its own logger alone, hence the full name.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if _is_news not in log.filters:
        log.addFilter(_is_news)
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )


def hush() -> None:
    """`hush_imports`, and no bar for weights that are read or written within seconds."""
    hush_imports()
    from transformers.utils import logging as hf_logging

    set_hook = getattr(hf_logging, "set_tqdm_hook", None)  # new in transformers 5
    if set_hook is not None:
        set_hook(_late_bar)


def _is_news(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


def _late_bar(make: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    if options.get("desc") in _BARS:
        options = {**options, "delay": _SHORT_SECONDS, "leave": False}
    return make(*args, **options)
