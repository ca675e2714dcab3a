"""A language model that is a lookup table over every context of a small tree, on real adapters.

Vocabulary: 0, 1, 2 and the end token 3; a response ends with 3 or after `depth` tokens, so every
sequence can be enumerated and the optimum of KL-regularised RL is known in closed form. Adapters,
decode loop, chunked log-probs and the PPO trainer are the library's own; only the trunk is ours.
"""

import itertools
import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.fingerprint import Fingerprint
from lora_rlhf.recipe import Lora

BOS, PAD = 4, 5


class TableTrunk(nn.Module):
    """ids -> one-hot of the context -> a linear table; the KV cache carries the ids themselves."""

    def __init__(self, vocabulary: int, depth: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.contexts = sum(vocabulary**k for k in range(depth + 1))
        self.table = nn.Linear(self.contexts, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, past_key_values=None, **unused) -> SimpleNamespace:
        ids = input_ids
        if past_key_values is not None:
            carried = input_ids[:, None, :, None].float()
            ids = past_key_values.update(carried, carried, 0)[0][:, 0, :, 0].long()
        indices = self.context_indices(ids)[:, -input_ids.shape[1] :]
        hot = torch.nn.functional.one_hot(indices.clamp(max=self.contexts - 1), self.contexts)
        return SimpleNamespace(last_hidden_state=self.table(hot.float()))

    def context_indices(self, ids: Tensor) -> Tensor:
        """Index in the tree after each position; position 0 is the prompt, the root."""
        index = torch.zeros_like(ids)
        for t in range(1, ids.shape[1]):
            token = ids[:, t].clamp(max=self.vocabulary - 1)
            index[:, t] = index[:, t - 1] * self.vocabulary + token + 1
        return index


class TableModel(nn.Module):
    """The shape of a causal LM that Backbone and PEFT need."""

    def __init__(self, vocabulary: int, depth: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="table", tie_word_embeddings=False, get=lambda key, default=None: default
        )
        self.base_model = TableTrunk(vocabulary, depth)
        self.head = nn.Linear(vocabulary, vocabulary, bias=False)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.base_model.table.weight)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class World:
    """A random reference policy and a random reward over all sequences of the tree.

    Args:
        vocabulary: tokens, the last `ends` of them end a response.
        depth: most tokens of a response.
        ends: how many tokens are end tokens; all of them makes a bandit.
        seed: of the tables.
    """

    def __init__(self, vocabulary: int = 4, depth: int = 4, ends: int = 1, seed: int = 0) -> None:
        self.vocabulary, self.depth = vocabulary, depth
        self.stops = tuple(range(vocabulary - ends, vocabulary))
        generator = torch.Generator().manual_seed(seed)
        self.backbone = make_backbone(vocabulary, depth, self.stops)
        trunk = self.backbone.causal_lm.base_model
        self.ref_table = torch.randn(trunk.contexts, vocabulary, generator=generator) * 0.5
        self.sequences = list(self._enumerate())
        self.rewards = torch.randn(len(self.sequences), generator=generator)
        self._set_adapters(trunk)

    def _enumerate(self):
        for length in range(1, self.depth + 1):
            for tokens in itertools.product(range(self.vocabulary), repeat=length):
                inner_stop = any(t in self.stops for t in tokens[:-1])
                complete = tokens[-1] in self.stops or length == self.depth
                if not inner_stop and complete:
                    yield tokens

    def _set_adapters(self, trunk: TableTrunk) -> None:
        adapters = self.backbone.adapters
        rank = self.vocabulary
        lora = Lora(rank=rank, alpha=rank, target_modules=("table",))
        for name in ("sft", "reward"):
            adapters.add(name, lora)
        self._set("sft", self.ref_table)
        scores = torch.zeros(trunk.contexts, self.vocabulary)
        for tokens, reward in zip(self.sequences, self.rewards, strict=True):
            scores[self.index(tokens), 0] = reward
        self._set("reward", scores)
        head = adapters.add_head("reward")
        with torch.no_grad():
            head.weight.copy_(torch.eye(self.vocabulary)[0])
        adapters.copy("sft", "policy")
        adapters.copy("reward", "value")
        # V of an inner context starts at 0: only whole sequences have a reward.

    def _set(self, name: str, table: Tensor) -> None:
        parameters = self.backbone.adapters.parameters(name)
        with torch.no_grad():
            for key, parameter in parameters.items():
                value = table.T if "lora_A" in key else torch.eye(self.vocabulary)
                parameter.copy_(value)

    def index(self, tokens: tuple[int, ...]) -> int:
        """Context index after these tokens."""
        index = 0
        for token in tokens:
            index = index * self.vocabulary + token + 1
        return index

    # -- the truth, by enumeration --------------------------------------------------------------

    def sequence_logprobs(self, table: Tensor) -> Tensor:
        """Log-probability of every sequence under a policy table, in fp64."""
        logs = torch.log_softmax(table.double(), -1)
        return torch.stack(
            [
                sum(logs[self.index(tokens[:i]), t] for i, t in enumerate(tokens))
                for tokens in self.sequences
            ]
        )

    def policy_table(self) -> Tensor:
        """The trained policy's logits of every context."""
        parameters = self.backbone.adapters.parameters("policy")
        a = next(p for k, p in parameters.items() if "lora_A" in k)
        b = next(p for k, p in parameters.items() if "lora_B" in k)
        return (b @ a).T.detach()

    def optimum(self, beta: float) -> tuple[Tensor, float]:
        """log pi* and J* of max E[r] - beta KL(pi || ref): pi* ~ ref exp(r / beta)."""
        ref = self.sequence_logprobs(self.ref_table)
        unnormalised = ref + self.rewards.double() / beta
        log_z = torch.logsumexp(unnormalised, 0)
        return unnormalised - log_z, float(beta * log_z)

    def measure(self, beta: float) -> tuple[float, float]:
        """(KL(pi || pi*), J(pi) as a share of the way from J(ref) to J*)."""
        policy = self.sequence_logprobs(self.policy_table())
        assert math.isclose(float(policy.exp().sum()), 1.0, abs_tol=1e-6)
        best, j_best = self.optimum(beta)
        ref = self.sequence_logprobs(self.ref_table)
        rewards = self.rewards.double()
        j = float((policy.exp() * (rewards - beta * (policy - ref))).sum())
        j_ref = float((ref.exp() * rewards).sum())
        kl = float((policy.exp() * (policy - best)).sum())
        return kl, (j - j_ref) / (j_best - j_ref)


def make_backbone(vocabulary: int, depth: int, stops: tuple[int, ...]) -> Backbone:
    """A Backbone around the table, with the format fields that generation reads."""
    chat_format = SimpleNamespace(pad_id=PAD, stop_ids=stops)
    fingerprint = Fingerprint("table", "none", "none", "none")
    model = TableModel(vocabulary, depth)
    return Backbone(
        model,
        None,
        chat_format,
        fingerprint,
        torch.device("cpu"),
        torch.float32,  # type: ignore[arg-type]
    )
