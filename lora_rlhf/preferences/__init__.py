"""Rankings by people and by simulated labelers."""
