"""A world small enough to enumerate: every response, its probability and the exact objective.

Three tokens (0 ends the response), at most three of them: 15 responses over 7 states. The policy
is a table of logits, a row a state, so that J = E[score - kl_coef * log(policy / reference)] and
its gradient are exact, and so are the optimal policy and the true values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.losses.checks import close

END, TOKENS, LONGEST = 0, 3, 3
KL_COEF = 0.7
State = tuple[int, ...]


def _responses() -> list[State]:
    """All responses: letters 1 and 2, then the end token, or three letters without one."""
    letters = [p for n in range(LONGEST + 1) for p in product((1, 2), repeat=n)]
    return [(*p, END) if len(p) < LONGEST else p for p in letters]


@dataclass
class Tree:
    """All responses of the tiny world as one padded batch, with their exact probabilities."""

    responses: list[State] = field(default_factory=_responses)
    logits: Tensor = field(init=False)
    ref_logits: Tensor = field(init=False)
    scores: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(5)
        states = sorted({r[:t] for r in self.responses for t in range(len(r))})
        self.row = {s: i for i, s in enumerate(states)}
        draw = {"generator": g, "dtype": torch.float64}
        self.logits = torch.randn(len(states), TOKENS, **draw).requires_grad_()
        self.ref_logits = torch.randn(len(states), TOKENS, **draw)
        self.scores = torch.randn(len(self.responses), **draw) + 1.0
        lengths = torch.tensor([len(r) for r in self.responses])
        self.mask = torch.arange(LONGEST) < lengths.unsqueeze(1)
        self.states = torch.tensor(
            [[self.row[r[:t]] if t < len(r) else 0 for t in range(LONGEST)] for r in self.responses]
        )
        self.tokens = torch.tensor([[*r, *[END] * (LONGEST - len(r))] for r in self.responses])

    def logprobs(self, logits: Tensor, padding: float = 3.0) -> Tensor:
        """(b, r) of every token of every response; `padding` where there is none."""
        taken = torch.log_softmax(logits, -1)[self.states, self.tokens]
        return taken.masked_fill(~self.mask, padding)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(b,) of every response; they add up to 1."""
        return self.logprobs(logits, padding=0.0).sum(-1).exp()

    def objective(self, logits: Tensor, kl_coef: float = KL_COEF) -> Tensor:
        """J by the definition: the mean of score minus kl_coef times the sequence's log-ratio."""
        log_ratio = self.logprobs(logits, 0.0).sum(-1) - self.logprobs(self.ref_logits, 0.0).sum(-1)
        return (self.probabilities(logits) * (self.scores - kl_coef * log_ratio)).sum()

    def true_values(self, logits: Tensor) -> Tensor:
        """(states,): expected KL-penalised reward from a state on, by averaging its responses."""
        kl = self.logprobs(logits, 0.0) - self.logprobs(self.ref_logits, 0.0)
        values = []
        for state, _ in sorted(self.row.items(), key=lambda item: item[1]):
            n = len(state)
            inside = torch.tensor([r[:n] == state for r in self.responses])
            weight = self.logprobs(logits, 0.0)[:, n:].sum(-1).exp() * inside
            values.append((weight * (self.scores - KL_COEF * kl[:, n:].sum(-1))).sum())
        return torch.stack(values).detach()

    def optimum(self) -> tuple[Tensor, Tensor]:
        """Logits of the optimal policy, proportional to ref * exp(score / kl_coef), and J*."""
        tilted = self.probabilities(self.ref_logits) * (self.scores / KL_COEF).exp()
        z = tilted.sum()
        logits = torch.full_like(self.ref_logits, -torch.inf)
        for state, row in self.row.items():
            for token in range(TOKENS):
                follows = (*state, token)
                through = torch.tensor([r[: len(follows)] == follows for r in self.responses])
                logits[row, token] = (tilted * through).sum().log()
        return logits, KL_COEF * z.log()


def policy_gradient(
    tree: Tree,
    kl_rewards: Callable[..., Tensor],
    gae: Callable[..., tuple[Tensor, Tensor]],
    policy_loss: Callable[..., Any],
    values: Tensor,
    gae_lambda: float,
    logits: Tensor | None = None,
    sampler: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Tensor:
    """Expected gradient of the PPO loss at ratio 1: each response weighs its probability.

    Args:
        tree: the world.
        kl_rewards: and `gae`, `policy_loss`: the functions judged.
        values: (states,) any baseline.
        gae_lambda: of `gae`.
        logits: the policy; the tree's own unless given.
        sampler: the logits that the samples are drawn with; those of the policy unless given.
    """
    logits = tree.logits if logits is None else logits
    logprobs = tree.logprobs(logits)
    weight = tree.probabilities(sampler(logits)).detach().unsqueeze(-1)
    rewards = kl_rewards(
        tree.scores, logprobs.detach(), tree.logprobs(tree.ref_logits, -5.0), tree.mask, KL_COEF
    )
    padded = values[tree.states].masked_fill(~tree.mask, 11.0)
    advantages, _ = gae(rewards, padded, tree.mask, 1.0, gae_lambda)
    out = policy_loss(logprobs, logprobs.detach(), advantages * weight, tree.mask, None)
    (gradient,) = torch.autograd.grad(out.total, logits)
    return gradient


def check_objective_gradient(
    kl_rewards: Callable[..., Tensor],
    gae: Callable[..., tuple[Tensor, Tensor]],
    policy_loss: Callable[..., Any],
    sampler: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> None:
    """The three functions together climb J: their expected gradient is that of -J, exactly.

    With lambda 1 any values do, for a baseline has no expected gradient; with lambda below 1 the
    true values do. Padding holds numbers that would show.
    """
    tree = Tree()
    (truth,) = torch.autograd.grad(-tree.objective(tree.logits), tree.logits)
    g = torch.Generator().manual_seed(8)
    any_values = torch.randn(len(tree.row), generator=g, dtype=torch.float64)
    true_values = tree.true_values(tree.logits)
    for values, gae_lambda in ((any_values, 1.0), (true_values, 0.95), (true_values, 0.0)):
        gradient = policy_gradient(
            tree, kl_rewards, gae, policy_loss, values, gae_lambda, sampler=sampler
        )
        close(gradient, truth, rtol=1e-9, atol=1e-12)
