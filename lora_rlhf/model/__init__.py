"""The frozen backbone and everything on it: adapters, heads, generation, memory."""
