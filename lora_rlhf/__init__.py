"""RLHF at home: SFT, reward model and PPO over one frozen 4-bit backbone."""

__version__ = "0.1.0"
