"""Log-probabilities from hidden states: numbers, gradients, dtypes and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_rlhf.losses.logprobs import default_chunk, logprobs_from_logits, token_logprobs
from tests.losses.checks import (
    check_logprobs_from_logits,
    check_token_logprobs,
    close,
    full_logprobs,
)


def _case(n=9, d=6, v=13, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, v, (n,), generator=g)


def test_values_entropy_and_gradient_equal_the_full_log_softmax_in_fp64():
    check_token_logprobs(token_logprobs)


def test_logprobs_from_logits_equal_counted_probabilities():
    check_logprobs_from_logits(logprobs_from_logits)


def test_fp64_equals_the_full_log_softmax_to_rounding():
    hidden, weight, targets = _case(dtype=torch.float64)
    logprobs, entropy = token_logprobs(hidden, weight, targets, 0.8, chunk=4)
    expected, spread = full_logprobs(hidden, weight, None, targets, 0.8)
    close(logprobs, expected, rtol=1e-12, atol=1e-12)
    close(entropy, spread, rtol=1e-12, atol=1e-12)


def test_huge_logits_do_not_overflow():
    hidden, weight, targets = _case()
    logprobs, entropy = token_logprobs(1e4 * hidden, weight, targets)
    expected, spread = full_logprobs(1e4 * hidden, weight, None, targets, 1.0)
    close(logprobs, expected)
    close(entropy, spread)


def test_the_chunk_changes_nothing():
    hidden, weight, targets = _case(n=50)
    hidden.requires_grad_()
    results = []
    for chunk in (None, 1, 7, 50):
        logprobs, entropy = token_logprobs(hidden, weight, targets, chunk=chunk)
        results.append((logprobs, entropy, *torch.autograd.grad(logprobs.sum(), hidden)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_rows_give_no_logprobs_and_a_gradient_of_no_rows():
    hidden, weight, targets = _case(n=0)
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_a_bfloat16_head_multiplies_in_bfloat16_and_normalises_in_float32(hidden_dtype):
    hidden, weight, targets = _case(n=20)
    weight = weight.bfloat16()
    hidden = hidden.to(hidden_dtype).requires_grad_()
    logprobs, _ = token_logprobs(hidden, weight, targets, chunk=8)
    logits = (hidden.detach().bfloat16() @ weight.T).float()
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(20), targets]
    assert logprobs.dtype == torch.float32
    close(logprobs, expected)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == hidden_dtype


def test_autocast_changes_neither_values_nor_gradient():
    hidden, weight, targets = _case(n=20)
    hidden.requires_grad_()
    plain, _ = token_logprobs(hidden, weight, targets)
    (expected,) = torch.autograd.grad(plain.sum(), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert torch.equal(plain, logprobs)
    assert torch.equal(expected, gradient)


def test_a_head_that_wants_a_gradient_is_refused():
    hidden, weight, targets = _case()
    with pytest.raises(AssertionError, match="frozen"):
        token_logprobs(hidden, weight.requires_grad_(), targets)
    with torch.no_grad():
        token_logprobs(hidden, weight, targets)


class LargestTensor(TorchDispatchMode):
    """Notes the most entries that any one operation's result has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self.entries = max(self.entries, leaf.numel())
        return out


def _largest(function, hidden, weight, targets) -> int:
    hidden = hidden.clone().requires_grad_()
    with LargestTensor() as seen:
        function(hidden, weight, targets).sum().backward()
    return seen.entries


def test_logits_of_all_rows_never_exist_at_once():
    n, d, v, chunk = 64, 4, 50, 8
    case = _case(n, d, v)
    ours = _largest(lambda *x: token_logprobs(*x, chunk=chunk)[0], *case)
    naive = _largest(lambda h, w, t: logprobs_from_logits(h @ w.T, t), *case)
    assert ours == max(chunk * v, n * d)
    assert naive == n * v, "the meter must see what it is to forbid"


def test_nothing_wider_than_the_hidden_states_is_kept_for_the_backward_pass():
    hidden, weight, targets = _case(n=64, d=4, v=50)
    hidden.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_logprobs(hidden, weight, targets, chunk=8)
    assert sum(x.numel() for x in kept) == hidden.numel() + weight.numel() + 2 * len(targets)


def test_the_default_chunk_bounds_a_block_at_128_mib():
    assert default_chunk(512) == 1024
    assert default_chunk(128_256) == 2**25 // 128_256 == 261
    assert default_chunk(2**30) == 1


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_stays_below_the_logits():
    """bf16, 8B-like head: (4096, 128256) logits in fp32 would be 1.96 GiB."""
    n, d, v = 4096, 1024, 128_256
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / 32
    targets = torch.randint(0, v, (n,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, _ = token_logprobs(hidden, weight, targets)
    logprobs.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.5 * n * v * 4
