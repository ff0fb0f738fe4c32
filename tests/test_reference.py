"""sdpa_reference against a float64 softmax: what everything else is compared with must itself be right."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, assert_as_exact_as_sdpa, exact_attention, explicit_mask, with_gradients
from torch.nn.attention import SDPBackend, sdpa_kernel

import causal_padded_flexattn
from causal_padded_flexattn import sdpa_reference


def _inputs(device: str, dtype: torch.dtype, q_len: int = 37, kv_len: int = 37, heads: int = 4, kv_heads: int = 2):
    torch.manual_seed(0)
    shapes = [(3, heads, q_len, 16), (3, kv_heads, kv_len, 16), (3, kv_heads, kv_len, 24)]
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _pads(kv_len: int, device: str) -> torch.Tensor:
    pads = torch.zeros(3, kv_len, dtype=torch.bool, device=device)
    pads[0, kv_len // 2 :] = True  # right
    pads[1, 1:5] = pads[1, -1] = True  # holes
    pads[2] = True  # empty
    return pads


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_len", [37, 5, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients(device: str, causal: bool, q_len: int, scale: float | None) -> None:
    pads = _pads(37, device)
    inputs = _inputs(device, torch.float64, q_len)
    grad_output = torch.randn(3, 4, q_len, 24, device=device, dtype=torch.float64)
    results = with_gradients(
        lambda q, k, v: sdpa_reference(q, k, v, pads, causal=causal, scale=scale), inputs, grad_output
    )
    mask = explicit_mask(pads, q_len, causal=causal)
    exact = with_gradients(lambda q, k, v: exact_attention(q, k, v, mask, scale), inputs, grad_output)
    for ours, truth in zip(results, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_padded_rows_are_exact_zeros(device: str, dtype: torch.dtype) -> None:
    pads = _pads(37, device)
    inputs = _inputs(device, dtype)
    grad_output = torch.randn(3, 4, 37, 24, device=device, dtype=dtype)
    for result in with_gradients(lambda q, k, v: sdpa_reference(q, k, v, pads), inputs, grad_output):
        assert result.isfinite().all()
        assert result.mT[pads[:, None, None].expand_as(result.mT)].count_nonzero() == 0
        assert result.mT[~pads[:, None, None].expand_as(result.mT)].count_nonzero() > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [37, 5])
def test_a_mask_in_parts(device: str, q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pads = _pads(37, device)
    inputs = _inputs(device, torch.float64, q_len)
    grad_output = torch.randn(3, 4, q_len, 24, device=device, dtype=torch.float64)
    whole = with_gradients(lambda q, k, v: sdpa_reference(q, k, v, pads), inputs, grad_output)
    monkeypatch.setattr(causal_padded_flexattn, "_LARGEST_MASK", 100)  # two rows
    sdpa = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    parts = with_gradients(lambda q, k, v: sdpa_reference(q, k, v, pads), inputs, grad_output)
    rows = [call.args[0].shape[2] for call in sdpa.call_args_list]
    assert sum(rows) == q_len and max(rows) <= 2
    for ours, truth in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.cuda
def test_more_than_65536_tokens() -> None:
    """Where torch 2.11's efficient kernel is wrong if the mask is given whole."""
    length, kv_len = 70_000, 70_100
    torch.manual_seed(0)
    *inputs, grad_output = torch.randn(4, 1, 1, kv_len, 16, device="cuda", dtype=torch.bfloat16)
    pads = torch.arange(kv_len, device="cuda")[None] >= length
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        results = with_gradients(lambda q, k, v: sdpa_reference(q, k, v, pads), inputs, grad_output)

    def without_mask(dtype: torch.dtype) -> list[torch.Tensor]:
        real, grad = ([x[:, :, :length].to(dtype) for x in tensors] for tensors in (inputs, [grad_output]))
        return with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), real, *grad)

    plain, exact = without_mask(torch.bfloat16), without_mask(torch.float32)
    assert_as_exact_as_sdpa([x[:, :, :length] for x in results], plain, exact)
    assert all(x[:, :, length:].count_nonzero() == 0 for x in results)
