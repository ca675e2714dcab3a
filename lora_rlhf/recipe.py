"""A recipe: one YAML file is one whole pipeline, with one section a stage.

The models here are the only definition of what a recipe may hold. They import no torch, so that
the command line and the app can read and check a recipe in a fraction of a second.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]

_STORE = re.compile(r"[a-z0-9+]+://.*|.*\.(db|sqlite3?)", re.IGNORECASE | re.DOTALL)

STAGES = ("sft", "rank", "reward", "ppo", "evaluate")


class Section(BaseModel):
    """A frozen section that knows all its fields; an unknown one is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Base(Section):
    """The one backbone every role shares."""

    model: str
    """A local directory, a hub id, or `builtin:tiny`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: 4-bit NormalFloat with double quantisation. `none`: the dtype below."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 on a GPU that has it and float32 on a CPU."""
    chat_template: Literal["auto", "default", "none"] = "auto"
    """auto: the tokenizer's own, else the stated default; none: plain continuation of text."""
    pad_token: str | None = None
    """A token that is in the vocabulary and is not an end token; needed where pad equals EOS."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass; unset: the memory plan decides."""
    micro_batch_tokens: Annotated[int, Field(ge=16)] | None = None
    """Most tokens (padding counted) in one training forward; unset: the memory plan decides."""


class Lora(Section):
    """The shape of every adapter of the run."""

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """On the adapter path, in SFT alone; reward and PPO train without dropout (checklist G6)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


def is_store(path: str) -> bool:
    """Whether a path names a store of rankings: an SQLite file or the URL of a server."""
    return _STORE.fullmatch(path) is not None


class Source(Section):
    """Where records come from: exactly one of `path`, `hub` and `builtin`; text is a `path`."""

    path: str | None = None
    """A .jsonl, .json, .csv, .parquet or .txt file, also with .gz; rankings: .db, postgresql://."""
    hub: str | None = None
    """A dataset id on the hub."""
    builtin: Literal["demonstrations", "prompts", "text"] | None = None
    """Made by the embedded toy world."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field -> the file's column, such as {prompt: question, response: answer}."""
    limit: Count | None = None
    """At most this many rows; the number made, for a builtin source."""
    separator: str | None = None
    """For .txt: what stands between two documents; unset, one document a line."""
    prompt_tokens: Count | None = None
    """For plain text: so many first tokens of a document are the prompt, the rest the response."""
    heldout: bool = False
    """Of a store: also rankings of prompts that the app holds out, which measure nothing then."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_a_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _exactly_one_origin(self) -> "Source":
        given = [k for k in ("path", "hub", "builtin") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, hub, builtin (found: {given or 'none'})")
        if self.name is not None and self.hub is None:
            raise ValueError("name has an effect with hub alone")
        return self


class Data(Section):
    """The data every stage draws on."""

    demonstrations: Source | None = None
    """prompt and response, alpaca (instruction, input, output), messages, or plain text."""
    rankings: Source | None = None
    """prompt, chosen, rejected; HH-style dialogues; or prompt, responses, ranking."""
    prompts: Source | None = None
    """Prompts for PPO; unset: those of the demonstrations."""
    heldout_prompts: Source | None = None
    """Prompts for evaluation alone; unset: the held-out part of the prompts."""
    text: Source | None = None
    """Plain text for the ptx mix; unset: the demonstrations."""
    max_prompt_tokens: Count = 256
    """Longer prompts are dropped, counted and reported; they are never cut."""
    max_response_tokens: Count = 256
    """Longest response, the end token counted, in training and in generation."""
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.9)] = 0.1
    """Share of prompts kept out of training, chosen by the prompt's hash."""


class Optimizer(Section):
    """AdamW and its schedule; the fields every trained stage shares."""

    learning_rate: Positive
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """After warm-up: cosine to a tenth, constant, or linear to zero."""
    warmup_fraction: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Positive = 1.0
    checkpoint_every: Count = 50
    """Optimizer steps between two checkpoints."""


class Sft(Optimizer):
    """Supervised fine-tuning on demonstrations; makes the adapter `sft`."""

    learning_rate: Positive = 2e-4
    epochs: Positive = 1.0
    batch_size: Count = 16
    """Demonstrations in one optimizer step."""
    evaluate_every: Count = 50
    """Optimizer steps between two held-out losses; the best one's adapter is kept."""


class Rank(Section):
    """A simulated labeler ranks sampled answers of `sft`; for a world or rule that has a judge."""

    judge: str
    """`builtin:gold`, `vader`, or `package.module:function` taking (prompt, response) -> float."""
    prompts: Count = 1000
    answers: Annotated[int, Field(ge=2, le=16)] = 4
    """Answers sampled for each prompt."""
    agreement: Annotated[float, Field(gt=0.5, le=1.0)] = 0.75
    """Mean chance that the noisy labeler orders two answers as the judge does."""
    temperature: Positive = 1.0


class Reward(Optimizer):
    """The reward model: adapter `reward` and its scalar head, from rankings."""

    learning_rate: Positive = 1e-4
    epochs: Positive = 1.0
    batch_size: Count = 16
    """Prompts (each with all its answers and pairs) in one optimizer step."""
    evaluate_every: Count = 50
    normalize_on: Literal["demonstrations", "none"] = "demonstrations"
    """Held-out demonstrations then score 0, in units of the held-out answers' spread."""
    start_from: str | None = None
    """Directory of a reward adapter to go on from, for new rankings; unset: a copy of `sft`."""


class Ppo(Optimizer):
    """PPO with a per-token KL penalty against the frozen `sft` adapter."""

    preset: Literal["instructgpt", "a2c"] | None = None
    """instructgpt: ALGORITHMS 1a.15. a2c: one epoch, one minibatch, no clipping."""
    learning_rate: Positive = 1e-5
    schedule: Literal["cosine", "constant", "linear"] = "constant"
    value_learning_rate: Positive = 1e-5
    steps: Count = 100
    """Rollout-and-update rounds."""
    batch_size: Count = 64
    """Responses collected in a round."""
    minibatch_size: Count = 32
    """Responses in one optimizer step."""
    ppo_epochs: Count = 2
    temperature: Positive = 1.0
    """Of sampling, and of every log-probability (checklist G5)."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    adaptive_kl_target: Positive | None = None
    """Nats a sequence; set, kl_coef follows it (P12)."""
    adaptive_kl_horizon: Count = 10_000
    clip_range: Positive | None = 0.2
    """Null: no clipping of the policy ratio."""
    value_clip_range: Positive | None = 0.2
    """In units of the normalised reward; null: none."""
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    loss_aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"
    """Of the policy loss: every token weighs the same, or every response (P17)."""
    whiten_rewards: bool = False
    """Divide rewards by their spread, keeping the mean (P8)."""
    value: Literal["adapter", "shared"] = "adapter"
    """adapter: a LoRA of its own, copied from `reward`; shared: a head on the policy's trunk."""
    value_coef: Positive = 0.1
    """Weight of the value loss on a shared trunk."""
    value_warmup_steps: Annotated[int, Field(ge=0)] = 2
    """First rounds that train the value alone, so that it starts calibrated."""
    missing_eos: Literal["penalty", "replace", "none"] = "replace"
    """Without an end token: missing_eos_score is added to the score, replaces it, or is unused."""
    missing_eos_score: float = -1.0
    target_kl: Positive | None = None
    """Stop the inner epochs when mean approx_kl a token passes this."""
    max_kl: Positive = 50.0
    """The run stops, saying so, when the mean KL of a round (nats a sequence) passes this."""
    max_length_drift: Positive = 0.6
    """The run stops when mean length has moved by this share of the start's."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Keep an exponential mean of the policy adapter, and save it as the policy."""
    ptx_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the language-model loss (a mean per token) mixed into each policy step."""
    ptx_batch_size: Count = 16
    """Texts of the ptx mix in one optimizer step."""
    sample_every: Count = 10
    """Rounds between two samples of the fixed prompts and two looks at the best checkpoint."""
    sample_prompts: Count = 32
    """Fixed prompts of that sampling; the first few answers are kept in samples.jsonl."""
    checkpoint_every: Count = 5
    keep: Literal["best", "last"] = "best"
    """best: the round with the highest score minus kl_coef * KL on the fixed prompts."""
    start_from: str | None = None
    """Directory of a policy adapter to go on from, held to the same `sft`; unset: a copy of it."""
    random_reward: bool = False
    """A control: the score is noise drawn from the response's own text, not the reward model."""
    judge: str | None = None
    """A bound: the score is a judge's, as in rank, not the reward model; unset: the adapter."""
    keep_policies_every: Count | None = None
    """Keep the policy adapter of every so many rounds under ppo/policies; unset: none."""

    @model_validator(mode="after")
    def _one_score(self) -> "Ppo":
        if self.random_reward and self.judge is not None:
            raise ValueError("random_reward and judge exclude each other. Give one of them")
        return self

    @model_validator(mode="after")
    def _minibatches_divide_the_batch(self) -> "Ppo":
        if self.batch_size % self.minibatch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of "
                f"minibatch_size ({self.minibatch_size})"
            )
        return self


class Evaluate(Section):
    """Arms against each other on held-out prompts."""

    prompts: Count = 256
    best_of: Annotated[int, Field(ge=0, le=64)] = 4
    """Best-of-n of `sft` by the reward adapter as an arm; 0: none."""
    judge: str | None = None
    """As in rank, or human[:STORE], openai:MODEL[@URL]; unset: the reward adapter itself."""
    temperature: Positive = 1.0
    base: bool = True
    """Sample the bare base as an arm too."""
    arms: tuple[str, ...] | None = None
    """As `lora-rlhf evaluate --arms`, without paths; unset: base, sft, best-of-n and policy."""
    reference: str = "sft"
    """The arm that all others are compared with."""
    frontier: Annotated[int, Field(ge=0, le=64)] = 0
    """Reward against KL, of PPO's kept policies and of best-of-n up to this n; 0: none."""
    expect_win_rate: Fraction | None = None
    """A recipe's own check: the run fails where the policy beats `sft` less often than this."""


class Recipe(Section):
    """One pipeline: SFT, rankings, reward, PPO, evaluation. A missing section does not run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    base: Base
    lora: Lora = Lora()
    data: Data = Data()
    sft: Sft | None = None
    rank: Rank | None = None
    reward: Reward | None = None
    ppo: Ppo | None = None
    evaluate: Evaluate | None = None
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """A tracker beside metrics.jsonl; none by default."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that run, in order."""
        return tuple(s for s in STAGES if getattr(self, s) is not None)
