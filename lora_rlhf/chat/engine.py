"""Answers of a run's adapters to a dialogue, streamed; knows no terminal."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lora_rlhf.data.records import Message
from lora_rlhf.data.template import ChatFormat
from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.choosing import Chooser, require_scorers
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Answer, Sampling, generate
from lora_rlhf.recipe import STAGES, Recipe
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run
from lora_rlhf.training.rollout import adapter_logprobs, sample, score_answers, to_sequences

BASE, REWARD = "base", "reward"
_SCORED_TOKENS = 8192  # of one forward that scores
_HALF_LETTER = "\ufffd"  # what a letter decodes to before its last token has come


@dataclass(frozen=True)
class Reply:
    """An answer and where it came from.

    Attributes:
        adapter: base, sft or policy.
        prompt_ids: what it answers, after old turns were left out.
        ids: its tokens, with the end token where there is one.
        text: of the ids, as the model wrote it.
        ended: by its end token, rather than by the length limit or the user.
        stopped: by the user.
        dropped: old turns that were left out, for the prompt limit.
        seconds: from the first token of the prompt to the last of the answer.
    """

    adapter: str
    prompt_ids: list[int]
    ids: list[int]
    text: str
    ended: bool
    stopped: bool
    dropped: int
    seconds: float


@dataclass(frozen=True)
class Judgement:
    """What the run's own models say of an answer.

    Attributes:
        score: normalised, of the reward adapter; None without one.
        kl: nats, log p(answer) under its adapter minus that under `sft`, which over many answers
            averages to the KL divergence and of one answer may be negative; None without `sft`.
    """

    score: float | None
    kl: float | None


class Engine:
    """A backbone with a run's adapters on it.

    Args:
        recipe: of the run; gives the prompt limit and the temperature of training.
        backbone: with the adapters that there are.
    """

    def __init__(self, recipe: Recipe, backbone: Backbone) -> None:
        self.recipe = recipe
        self.backbone = backbone
        self.temperature = recipe.ppo.temperature if recipe.ppo is not None else 1.0

    @classmethod
    def open(cls, run: Run) -> "Engine":
        """Load the backbone of a run's recipe and all its adapters but the value function.

        Raises:
            UserError: the base cannot be loaded, or an adapter belongs to another one.
        """
        recipe = load_recipe(str(run.path / "recipe.yaml"), finished=STAGES)
        backbone = Backbone.load(recipe.base)
        for role in run.adapters():
            if role != "value":
                backbone.adapters.load(role, run.adapter(role))
                backbone.adapters.freeze(role)
        return cls(recipe, backbone)

    @property
    def names(self) -> list[str]:
        """Who can answer: base, then sft and policy where the run has them."""
        return [BASE, *(n for n in ("sft", "policy") if n in self.backbone.adapters.names)]

    @property
    def continues(self) -> bool:
        """Whether the base continues plain text, each message being a new beginning."""
        return self.backbone.format.mode == "none"

    @property
    def has_reward(self) -> bool:
        """Whether answers can be scored."""
        return "reward" in self.backbone.adapters.heads

    @property
    def most_new_tokens(self) -> int | None:
        """What the base's context leaves for an answer after the longest prompt, if it says so."""
        context = getattr(self.backbone.causal_lm.config, "max_position_embeddings", None)
        return context - self.recipe.data.max_prompt_tokens if context else None

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Ids of a dialogue within the recipe's prompt limit, and how many turns were left out.

        Left out are the oldest turns, up to the next user turn; a base that continues plain text
        is given the last message alone.

        Raises:
            DataError: the last message alone is over the limit, or the template refuses the roles.
        """
        limit = self.recipe.data.max_prompt_tokens
        starts = [i for i, m in enumerate(messages) if m["role"] == "user"]
        if messages[0]["role"] == "system":
            starts[0] = 0
        if self.continues:
            return self._within(tuple(messages[-1:]), limit), 0
        for start in starts[:-1]:
            ids = self.backbone.format.prompt_ids(tuple(messages[start:]))
            if len(ids) <= limit:
                return ids, start
        return self._within(tuple(messages[starts[-1] :]), limit), starts[-1]

    def _within(self, messages: tuple[Message, ...], limit: int) -> list[int]:
        ids = self.backbone.format.prompt_ids(messages)
        if len(ids) > limit:
            raise DataError(
                f"This message makes a prompt of {len(ids)} tokens; the run was trained with at "
                f"most {limit} (data.max_prompt_tokens). Shorten it."
            )
        return ids

    def answer(
        self,
        adapter: str,
        messages: Sequence[Message],
        sampling: Sampling,
        seed: int,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """One answer to a dialogue that ends with the user's turn.

        Ctrl-C (KeyboardInterrupt) ends the answer, and what there is of it is returned.

        Args:
            adapter: one of `names`.
            messages: the turns.
            sampling: temperature, top-p and the length limit.
            seed: decides the answer, with all the above.
            on_text: called with each new piece of the text as it comes.

        Raises:
            DataError: of `prompt_ids`.
        """
        prompt, dropped = self.prompt_ids(messages)
        stream = TextStream(self.backbone.format, on_text)

        began = time.monotonic()
        stopped = False
        try:
            with self.backbone.adapters.use(self._role(adapter)):
                generate(
                    self.backbone,
                    [prompt],
                    [seed],
                    sampling,
                    on_token=lambda _, token: stream.add(token),
                )
        except KeyboardInterrupt:
            stopped = True
        stream.finish()
        return Reply(
            adapter=adapter,
            prompt_ids=prompt,
            ids=stream.ids,
            text=stream.shown,
            ended=bool(stream.ids) and stream.ids[-1] in self.backbone.format.stop_ids,
            stopped=stopped,
            dropped=dropped,
            seconds=time.monotonic() - began,
        )

    def best(
        self,
        adapter: str,
        messages: Sequence[Message],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> tuple[Reply, list[float]]:
        """The answer that the reward adapter scores highest of several, drawn in one batch.

        Ctrl-C (KeyboardInterrupt) ends it, with an empty answer.

        Args:
            adapter: one of `names`.
            messages: the turns.
            sampling: temperature, top-p and the length limit.
            seeds: one an answer.

        Returns:
            The reply, and the scores of all, best first; none where it was stopped.

        Raises:
            CheckpointError: the run has no reward adapter.
            DataError: of `prompt_ids`.
        """
        require_scorers(self.backbone, (REWARD,))
        prompt, dropped = self.prompt_ids(messages)
        began, prompts = time.monotonic(), [prompt] * len(seeds)
        try:
            answers = sample(self.backbone, self._role(adapter), prompts, seeds, sampling)
            ids = [answer.ids for answer in answers]
            scores = Chooser((REWARD,)).score(self.backbone, prompts, ids, _SCORED_TOKENS)
            chosen = answers[Chooser((REWARD,)).choose(scores)]
        except KeyboardInterrupt:
            chosen, scores = Answer([], False, []), np.zeros((1, 0))
        reply = Reply(
            adapter=adapter,
            prompt_ids=prompt,
            ids=chosen.ids,
            text=self.backbone.format.decode(chosen.ids),
            ended=chosen.ended,
            stopped=not scores.size,
            dropped=dropped,
            seconds=time.monotonic() - began,
        )
        return reply, sorted(scores[0].tolist(), reverse=True)

    def judge(self, reply: Reply) -> Judgement:
        """Score and KL to `sft` of an answer, at the temperature of training."""
        score = kl = None
        if not reply.ids:
            return Judgement(score, kl)
        tokens = len(reply.prompt_ids) + len(reply.ids)
        if self.has_reward:
            scores = score_answers(self.backbone, [reply.prompt_ids], [reply.ids], tokens)
            score = float(scores[0])
        if "sft" in self.names:
            answer = Answer(reply.ids, reply.ended, [0.0] * len(reply.ids))
            rows, _ = to_sequences(self.backbone, [reply.prompt_ids], [answer])
            own, reference = (
                adapter_logprobs(self.backbone, role, rows, self.temperature, tokens)
                for role in (self._role(reply.adapter), "sft")
            )
            kl = float((own - reference).sum())
        return Judgement(score, kl)

    def _role(self, adapter: str) -> str | None:
        assert adapter in self.names, f"no adapter {adapter}; there are {self.names}"
        return None if adapter == BASE else adapter


class TextStream:
    """Turns tokens into pieces of text; a letter of several tokens waits for its last one.

    Attributes:
        ids: the tokens so far.
        shown: the text so far.

    Args:
        chat_format: decodes.
        on_text: called with each new piece.
    """

    def __init__(
        self, chat_format: ChatFormat, on_text: Callable[[str], None] | None = None
    ) -> None:
        self.ids: list[int] = []
        self.shown = ""
        self._format = chat_format
        self._on_text = on_text

    def add(self, token: int) -> None:
        """Take the next token."""
        self.ids.append(token)
        self._show(self._format.decode(self.ids).rstrip(_HALF_LETTER))

    def finish(self) -> None:
        """Show what was held back."""
        self._show(self._format.decode(self.ids))

    def _show(self, text: str) -> None:
        # A decoder may still change its mind about what it gave; then it is not shown twice.
        if text.startswith(self.shown) and len(text) > len(self.shown):
            piece, self.shown = text[len(self.shown) :], text
            if self._on_text is not None:
                self._on_text(piece)
