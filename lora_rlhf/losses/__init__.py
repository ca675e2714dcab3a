"""Pure tensor functions: masks, log-probabilities and the losses of SFT, reward model and PPO.

They know no recipe and no model. Shapes: b batch, r response, n rows of any kind, d hidden,
v vocabulary, k answers of one prompt. Every mask is Bool and True means live.
"""
