"""`python -m lora_rlhf` is the command `lora-rlhf`."""

from lora_rlhf.cli import main

main()
