"""What the stages share: the loops, rollouts, optimizer, checkpoints."""
