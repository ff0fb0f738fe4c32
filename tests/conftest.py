"""The references that the tests compare with, written without the module."""

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
PAIRS_OF_DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, _TWO_GPUS])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def explicit_mask(pads: Tensor, q_len: int | None = None, q_offset: int | None = None, causal: bool = True) -> Tensor:
    """(B, L, S): True where query q_offset + i may see key j; the last L positions by default."""
    kv_len = pads.shape[1]
    q_len = kv_len if q_len is None else q_len
    q_offset = kv_len - q_len if q_offset is None else q_offset
    rows = torch.arange(q_offset, q_offset + q_len, device=pads.device)
    columns = torch.arange(kv_len, device=pads.device)
    seen = rows[:, None] >= columns[None, :] if causal else torch.ones(q_len, kv_len, dtype=bool, device=pads.device)
    return seen & ~pads[:, rows][:, :, None] & ~pads[:, None, :]


def exact_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention in float64, differentiable; rows of the mask (B, L, S) that allow nothing give zeros."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = mask[:, None]
    scores = torch.einsum("bhle,bhse->bhls", query, key) * scale
    weights = scores.masked_fill(~mask, -1e30).softmax(-1) * mask  # a row of nothing: uniform, then zero
    return torch.einsum("bhls,bhsv->bhlv", weights, value)


def with_gradients(attention, inputs, grad_output: Tensor | None) -> list[Tensor]:
    """The output and, given its gradient, the gradients of the inputs."""
    inputs = [x.detach().requires_grad_(grad_output is not None) for x in inputs]
    output = attention(*inputs)
    return [output] if grad_output is None else [output, *torch.autograd.grad(output, inputs, grad_output)]


def assert_as_exact_as_sdpa(results: list[Tensor], sdpa: list[Tensor], exact: list[Tensor]) -> None:
    """FlashAttention's habit: at most twice plain PyTorch's error (thrice for gradients), and two roundings.

    And since flash kernels compute a weight as 2 to the power of a float32 difference of numbers of up to 10 or 20,
    sixteen roundings of float32, which matter in float32 alone.
    """
    for i, (ours, plain, truth) in enumerate(zip(results, sdpa, exact, strict=True)):
        error = (ours.double() - truth.double()).abs().max().item()
        plain_error = (plain.double() - truth.double()).abs().max().item()
        rounding = (2 * torch.finfo(ours.dtype).eps + 16 * torch.finfo(torch.float32).eps) * truth.abs().max().item()
        bound = (3 if i else 2) * plain_error + rounding
        name = ["output", "query gradient", "key gradient", "value gradient"][i]
        assert error <= bound, f"{name}: error {error:.2e}, SDPA's own {plain_error:.2e}, bound {bound:.2e}"
