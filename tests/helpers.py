"""Inputs, padding and masks that the tests share, and the check against float64."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from conftest import (
    OPTIONS_OF_THE_MASK,
    assert_as_exact,
    block_mask_of,
    exact_attention,
    explicit_mask,
    with_gradients,
    written_out,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

import causal_padded_flexattn as cpf
from causal_padded_flexattn import causal_padded_attention

PADDING = ["none", "right", "left", "holes", "empty"]


def make_pads(padding: str, kv_len: int, device: str, batch_size: int = 3) -> Tensor:
    """(B, S): the first sequence has padding of the kind named, the last none, one between a token alone."""
    pads = torch.zeros(batch_size, kv_len, dtype=torch.bool, device=device)
    place = torch.arange(kv_len, device=device)
    if padding == "right":
        pads[0] = place >= (kv_len + 1) // 2
        pads[1:-1] = place > 0
    elif padding == "left":
        pads[0] = place < kv_len // 2
        pads[1:-1] = place < kv_len - 1
    elif padding == "holes":
        pads[0] = torch.rand(kv_len, device=device) < 0.3
        pads[1:-1] = place % 200 > 120
    elif padding == "empty":
        pads[0] = True
    return pads


def make_inputs(
    device: str,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 3,
    heads: tuple[int, int] = (4, 2),
    lengths: tuple[int, int] = (200, 200),
    sizes: tuple[int, int] = (64, 64),
) -> tuple[list[Tensor], Tensor]:
    """query, key and value, and a gradient of the output."""
    shapes = [
        (heads[0], lengths[0], sizes[0]),
        (heads[1], lengths[1], sizes[0]),
        (heads[1], lengths[1], sizes[1]),
    ]
    inputs = [torch.randn(batch_size, *shape, device=device, dtype=dtype) for shape in shapes]
    return inputs, torch.randn(batch_size, heads[0], lengths[0], sizes[1], device=device, dtype=dtype)


def check(
    inputs,
    grad_output,
    pads,
    *,
    scale=None,
    score_mod=None,
    inference=False,
    seen=None,
    block_mask=None,
    mask=None,
    **kwargs,
) -> None:
    """Against float64, as exact as plain PyTorch in the same precision; padded rows exact zeros.

    `seen`: what says which keys a query sees: causal, window, documents, spans, until, ...
    """
    query, seen = inputs[0], seen or {}
    mask = explicit_mask(pads, query.shape[2], **seen) if mask is None else mask
    options = {"scale": scale, "score_mod": score_mod}
    if block_mask is None and not seen.keys() <= OPTIONS_OF_THE_MASK:
        block_mask = block_mask_of(pads, query.shape[2], **seen)
    if block_mask is None:
        attention = partial(causal_padded_attention, pads=pads, **seen, **options, **kwargs)
    else:
        attention = partial(cpf.attend, block_mask=block_mask, **options, **kwargs)
    for grad in (None, grad_output) if inference else (grad_output,):
        ours = with_gradients(attention, inputs, grad)
        if score_mod is None:
            plain = partial(masked_sdpa, mask=mask, scale=scale)
        else:
            plain = lambda q, k, v: written_out(q, k, v, mask, scale, score_mod)[0]
        own = with_gradients(plain, inputs, grad)
        exact = with_gradients(
            lambda q, k, v: exact_attention(q, k, v, mask, scale, score_mod),
            [x.double() for x in inputs],
            grad,
        )
        assert_as_exact(ours, own, exact)
        q_pads = ~mask.any(-1)
        for result, rows in zip(ours, (q_pads, q_pads, pads, pads), strict=False):
            assert result.isfinite().all() and result.transpose(1, 2)[rows].count_nonzero() == 0


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    empty = ~mask.any(-1)[:, None, :, None]
    output = F.scaled_dot_product_attention(query, key, value, mask[:, None] | empty, scale=scale)
    return output.masked_fill(empty, 0.0)


def views_of_pads(device: str) -> list[Tensor]:
    """(3, 300): rows that begin anywhere, one row for all, columns side by side."""
    pads = make_pads("holes", 301, device, batch_size=5)
    return [pads[1:4, 1:], pads[:1, 1:].expand(3, -1), pads[:3, 1:].mT.contiguous().mT]


def make_documents(pads: Tensor) -> Tensor:
    """(B, S): some documents in each row, padding in some of them; numbers without meaning at padding."""
    begins = torch.rand(pads.shape, device=pads.device) < 0.03
    return (begins.cumsum(1) * 7 - 20).masked_fill(pads, 5)


def make_spans(pads: Tensor) -> Tensor:
    """(B, S): a prefix in the first sequence, images in the second, chunks in the last."""
    places = torch.arange(pads.shape[1], device=pads.device)
    spans = [
        places.clamp(min=90),
        torch.where(places // 30 % 2 == 1, places // 30 * 30, places),
        places // 50,
    ]
    return torch.stack(spans).masked_fill(pads, 7)


def make_until(pads: Tensor) -> Tensor:
    """(B, S): a prompt of 60 tokens, and answers of 70 that do not see each other, with a branch in each."""
    places = torch.arange(pads.shape[1], device=pads.device)
    begin = (places - 60) // 70 * 70 + 60
    branch = begin + (places - begin) // 35 * 35 + 34
    until = torch.where(places - begin < 20, begin + 69, branch)
    return torch.where(places < 60, 2**40, until).expand_as(pads).masked_fill(pads, 3)


OPTIONS: dict[str, Callable[[Tensor], dict]] = {
    "spans": lambda pads: {"spans": make_spans(pads)},
    "spans, window": lambda pads: {"spans": make_spans(pads), "window": 25},
    "spans, documents": lambda pads: {"spans": make_spans(pads), "documents": make_documents(pads)},
    "until": lambda pads: {"until": make_until(pads)},
    "until, documents, window": lambda pads: {
        "until": make_until(pads),
        "documents": make_documents(pads),
        "window": 80,
    },
    "spans, until": lambda pads: {"spans": make_spans(pads), "until": make_until(pads)},
}


def soft_cap(score, b, h, q_idx, kv_idx):
    return 5 * torch.tanh(score / 5)


def make_alibi(device: str):
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], device=device)
    return lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx).abs()


class _LookUps(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.__getitem__ and args[0].dim() == 2
        return function(*args, **(kwargs or {}))


def looks_up(block_mask) -> bool:
    """Whether its mask_mod reads tables of tokens, (B, L) or (B, S)."""
    with _LookUps() as mode:
        block_mask.mask_mod(*torch.zeros(4, dtype=torch.int32).unbind())
    return mode.count > 0


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of a step, and what its replays fill."""
    with torch.cuda.stream(torch.cuda.Stream()):  # compiles
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
