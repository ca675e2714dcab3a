"""Talk to the adapters of a run: `engine` answers, `commands` understands, `terminal` reads."""

from lora_rlhf.chat.terminal import chat

__all__ = ["chat"]
