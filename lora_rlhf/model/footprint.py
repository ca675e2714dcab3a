"""Bytes of every part of a run, from the shape of the model and the settings of the recipe."""

import math
from dataclasses import dataclass

from lora_rlhf.losses.logprobs import default_chunk
from lora_rlhf.model.shapes import Shape
from lora_rlhf.recipe import Recipe

GIB = 2**30
# Context and library workspaces of a CUDA process, and the share that fragmentation adds to the
# allocated tensors; a card is planned up to 93 %, because a desktop or a browser takes some too.
CUDA_CONTEXT_GIB = 0.75
FRAGMENTATION = 1.05
USABLE = 0.93
# Resident memory of a Python process that has imported torch, transformers, peft and bitsandbytes.
PROCESS_GIB = 0.5

# Bytes a token and layer in units of (hidden, query, key_value, intermediate) width, by the bytes
# of a number in compute precision. Counted in Llama layers with LoRA on every linear map (2: fp32
# adapters under bf16 autocast): what autograd saves, what its backward pass adds to that, and the
# peak of live storages in either half of a layer when nothing is saved.
_SAVED = {2: (18, 6, 4, 8), 4: (16, 8, 8, 16)}
_IN_BACKWARD = {2: (10, 2, 0, 6), 4: (8, 2, 1, 8)}
_IN_MLP = {2: (12, 0, 0, 8), 4: (16, 0, 0, 16)}
_IN_ATTENTION = {2: (8, 10, 4, 0), 4: (14, 14, 11, 0)}


@dataclass(frozen=True)
class Card:
    """What the plan is for: a GPU, or the memory of a machine without one."""

    name: str
    gib: float
    is_gpu: bool
    compute_bytes: int


def nf4_bytes(elements: int) -> int:
    """Storage of one weight in NF4 with double quantisation: 4.127 bit an element.

    Half a byte each; a byte of scale for 64 of them; an fp32 scale for 256 scales; two code books.
    """
    scales = math.ceil(elements / 64)
    books = (16 + 256 + 1) * 4
    return math.ceil(elements / 2) + scales + 4 * math.ceil(scales / 256) + books


class Footprint:
    """Bytes of every term, for one recipe, model shape and card."""

    def __init__(self, recipe: Recipe, shape: Shape, card: Card) -> None:
        self.recipe = recipe
        self.shape = shape
        self.card = card
        self.width = card.compute_bytes
        data = recipe.data
        self.prompt = data.max_prompt_tokens
        self.sequence = data.max_prompt_tokens + data.max_response_tokens
        self.budget = USABLE * card.gib * GIB
        self.quantised = recipe.base.quantization == "nf4"

    @property
    def trained(self) -> list[str]:
        """Stages of the recipe that train."""
        return [s for s in self.recipe.stages if s in ("sft", "reward", "ppo")]

    @property
    def sampled(self) -> list[str]:
        """Stages of the recipe that sample answers."""
        return [s for s in self.recipe.stages if s in ("rank", "ppo", "evaluate")]

    # -- what stays ------------------------------------------------------------------------------

    def weights(self) -> float:
        """Bytes of the quantised linear layers."""
        if not self.quantised:
            return self.width * sum(self.shape.linears)
        return sum(map(nf4_bytes, self.shape.linears))

    def embeddings(self) -> float:
        """Bytes of what is never quantised: embeddings, head, norms, biases."""
        return self.width * self.shape.other

    def adapters(self, stage: str) -> tuple[float, float]:
        """Bytes of a stage's adapters in training and at rest.

        In training: weight, gradient and two AdamW moments in fp32, and under autocast a copy in
        compute precision. At rest: bf16 on a GPU, fp32 on a CPU.
        """
        ppo = self.recipe.ppo
        own_value = ppo is not None and ppo.value == "adapter"
        trained = {"sft": 1, "reward": 1, "ppo": 1 + own_value}.get(stage, 0)
        resting = {"reward": 1, "rank": 1, "ppo": 2, "evaluate": 3}.get(stage, 0)
        each = 16 + (self.width if self.width < 4 else 0)
        extra = 0
        if stage == "ppo" and ppo is not None:
            # fp32 copies: the exponential mean; the PPO gradient while that of ptx is added.
            extra = 4 * (ppo.ema_decay is not None) + 4 * (ppo.ptx_coef > 0.0)
        at_rest = 2 if self.card.is_gpu else 4
        parameters = self.shape.adapter
        return parameters * (trained * each + extra), parameters * resting * at_rest

    def stays(self, stage: str) -> float:
        """Bytes that every phase of a stage holds."""
        process = 0.0 if self.card.is_gpu else PROCESS_GIB * GIB
        return process + self.weights() + self.embeddings() + sum(self.adapters(stage))

    # -- what comes and goes ---------------------------------------------------------------------

    def token(self, table: dict[int, tuple[int, int, int, int]]) -> float:
        """Bytes a token and layer, by one of the tables above."""
        shape = self.shape
        hidden, query, key_value, intermediate = table[self.width]
        total = hidden * shape.hidden + query * shape.query + key_value * shape.key_value
        return total + intermediate * shape.intermediate

    def saved_token(self) -> float:
        """Bytes a token and layer that autograd keeps until the backward pass."""
        shape, lora = self.shape, self.recipe.lora
        total = self.token(_SAVED)
        if shape.normalises_queries:
            total += 4 * (shape.query + shape.key_value)
        maps = len(shape.linears) / shape.layers
        total += self.width * lora.rank * maps
        if lora.dropout > 0.0:  # a mask of one byte an input of each map
            total += 5 * shape.hidden + shape.query + shape.intermediate
        return total

    def passing_token(self) -> float:
        """Bytes a token of a pass without gradients: the larger half of one layer."""
        return max(self.token(_IN_MLP), self.token(_IN_ATTENTION))

    def unpacked(self) -> float:
        """Bytes of the largest layer in compute precision, which a 4-bit product makes."""
        return self.width * max(self.shape.linears) if self.quantised else 0.0

    def logits(self, tokens: float) -> float:
        """Bytes of one block of logits: two copies in fp32, and one in bf16 where that computes."""
        rows = min(tokens, default_chunk(self.shape.vocabulary))
        return (8 + (self.width if self.width < 4 else 0)) * rows * self.shape.vocabulary

    def activations(self, tokens: float, checkpointing: bool) -> float:
        """Bytes of one training micro-batch, forward and backward."""
        layers = self.shape.layers
        if checkpointing:
            kept = layers * self.width * self.shape.hidden + self.saved_token()
        else:
            kept = layers * self.saved_token()
        return tokens * (kept + self.token(_IN_BACKWARD))

    def cache(self, rows: float) -> float:
        """Bytes of keys and values of `rows` whole sequences."""
        return 2 * self.shape.layers * self.shape.key_value * self.width * rows * self.sequence

    def sampling(self, rows: float) -> float:
        """Bytes beside the cache while decoding: the prompts' pass, or one step's distributions.

        A step holds the logits, their softmax in fp32, that and its running sum in fp64 (24 bytes),
        and one layer's keys and values repeated for every query head.
        """
        step = 24 * self.shape.vocabulary + 2 * self.shape.query * self.width * self.sequence
        return rows * max(step, self.prompt * self.passing_token())

    # -- phases ----------------------------------------------------------------------------------

    def longest(self, stage: str) -> int:
        """Tokens of the longest item of a stage, which goes alone where it passes the budget.

        The answers of one prompt are one item of the reward stage; 2 where their number is unknown.
        """
        answers = 1
        if stage == "reward":
            answers = self.recipe.rank.answers if self.recipe.rank else 2
        return answers * self.sequence

    def train(self, stage: str, tokens: float, checkpointing: bool) -> float:
        """Peak bytes of a stage's optimizer step; reward passes have no language-model head."""
        tokens = max(tokens, self.longest(stage))
        logits = 0.0 if stage == "reward" else self.logits(tokens)
        moving = self.activations(tokens, checkpointing) + logits + self.unpacked()
        return self.stays(stage) + moving

    def score(self, stage: str, tokens: float) -> float:
        """Peak bytes of a pass without gradients: log-probabilities, values, scores."""
        tokens = max(tokens, self.sequence)
        moving = tokens * self.passing_token() + self.logits(tokens)
        return self.stays(stage) + moving + self.unpacked()

    def rollout(self, stage: str, rows: float) -> float:
        """Peak bytes of sampling."""
        return self.stays(stage) + self.cache(rows) + self.sampling(rows) + self.unpacked()

    def load(self) -> float:
        """Peak bytes of loading: the finished model and one layer that is not yet quantised."""
        layer = self.width * sum(self.shape.linears) / self.shape.layers if self.quantised else 0.0
        return self.stays("load") + layer

    def needs(self, peak: float) -> float:
        """What the card must have for a peak of allocated bytes, in bytes."""
        context = CUDA_CONTEXT_GIB * GIB if self.card.is_gpu else 0.0
        return context + FRAGMENTATION * peak

    def terms(self, tokens: int, checkpointing: bool, rows: int) -> dict[str, float]:
        """Where the memory goes in the recipe's heaviest stage, in bytes, for a person to read."""
        stage = "ppo" if self.recipe.ppo else (self.trained or ["evaluate"])[-1]
        trained, resting = self.adapters(stage)
        kind = "4-bit weights" if self.quantised else f"{8 * self.width}-bit weights"
        terms = {
            kind: self.weights(),
            "embeddings and head": self.embeddings(),
            "adapters in training": trained,
            "adapters at rest": resting,
            "one layer unpacked": self.unpacked(),
        }
        if self.trained:
            longest = max(tokens, self.sequence)
            terms["activations"] = self.activations(longest, checkpointing)
            terms["logits, one chunk"] = self.logits(longest)
        if self.sampled:
            terms["KV cache"] = self.cache(rows)
            terms["sampling"] = self.sampling(rows)
        if not self.card.is_gpu:
            terms["Python and libraries"] = PROCESS_GIB * GIB
        return {name: size for name, size in terms.items() if size > 0.0}
