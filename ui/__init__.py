"""The app: chat, compare, rank, see the votes, retrain. Imports `lora_rlhf`, never the reverse."""
