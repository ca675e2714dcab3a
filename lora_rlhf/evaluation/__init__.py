"""How good an adapter is: win rates, health of a reward model, best-of-n, public sets."""
