"""causal_padded_attention: values and gradients, decoding, shapes that change, inputs that do not fit."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DEVICES,
    OPTIONS_OF_THE_MASK,
    assert_as_exact,
    block_mask_of,
    exact_attention,
    explicit_mask,
    view_of_tokens,
    with_gradients,
    written_out,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

import causal_padded_flexattn as cpf
from causal_padded_flexattn import (
    _can_use_flash,
    _compile,
    _is_faster_with_flash,
    _kernel_options,
    causal,
    causal_padded_attention,
    create_block_mask_from_runs,
    create_causal_padding_block_mask,
    sdpa_reference,
)

ROOT = Path(__file__).parent.parent
PADDING = ["none", "right", "left", "holes", "empty"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compilations() -> Callable[[], int]:
    """Counts the compilations from here on, starting with none made."""
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


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
    **kwargs,
) -> None:
    """Against float64, as exact as plain PyTorch in the same precision; padded rows exact zeros.

    `seen`: what says which keys a query sees: causal, window, documents, spans, until, ...
    """
    query, seen = inputs[0], seen or {}
    mask = explicit_mask(pads, query.shape[2], **seen)
    options = {"scale": scale, "score_mod": score_mod}
    if block_mask is None and not seen.keys() <= OPTIONS_OF_THE_MASK:
        block_mask = block_mask_of(pads, query.shape[2], **seen)
    if block_mask is None:
        attention = partial(causal_padded_attention, pads=pads, **seen, **options, **kwargs)
    else:
        attention = partial(cpf.attend, block_mask=block_mask, **options, **kwargs)
    for grad in (None, grad_output) if inference else (grad_output,):
        ours = with_gradients(attention, inputs, grad)
        if score_mod is None and not seen.keys() - {"causal"}:
            plain = partial(sdpa_reference, pads=pads, scale=scale, **seen)
        elif score_mod is None:
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_padding(device: str, is_causal: bool) -> None:
    for padding in PADDING:
        check(
            *make_inputs(device), make_pads(padding, 200, device), seen={"causal": is_causal}, inference=True
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(1, 2, 64, 127), (128, 129, 255, 256), (257, 384, 500)])
def test_lengths(device: str, lengths: tuple[int, ...]) -> None:
    for length in lengths:
        for padding in PADDING:
            check(*make_inputs(device, lengths=(length, length)), make_pads(padding, length, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(device: str, dtype: torch.dtype) -> None:
    for padding in ("right", "left", "holes"):
        check(
            *make_inputs(device, dtype, lengths=(300, 300)), make_pads(padding, 300, device), inference=True
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(32, 32), (64, 64), (128, 128), (256, 256), (64, 32), (32, 64)])
def test_head_sizes(device: str, sizes: tuple[int, int]) -> None:
    for padding in ("right", "left"):
        check(*make_inputs(device, torch.bfloat16, sizes=sizes), make_pads(padding, 200, device))
    check(
        *make_inputs(device, torch.bfloat16, sizes=sizes),
        make_pads("holes", 200, device),
        seen={"window": 70},
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2)])
def test_heads(device: str, heads: tuple[int, int]) -> None:
    check(*make_inputs(device, heads=heads), make_pads("right", 200, device))


@pytest.mark.parametrize("device", DEVICES)
def test_scale(device: str) -> None:
    for scale in (0.3, 0.1, 0.05):  # one after the other, because torch makes a variable of what changes
        check(*make_inputs(device), make_pads("right", 200, device), scale=scale)


@pytest.mark.parametrize("device", DEVICES)
def test_transposed_views(device: str) -> None:
    inputs, grad_output = make_inputs(device)
    views = [view_of_tokens(x) for x in inputs]
    assert not any(x.is_contiguous() for x in views)
    check(views, view_of_tokens(grad_output), make_pads("left", 200, device))


def views_of_pads(device: str) -> list[Tensor]:
    """(3, 300): rows that begin anywhere, one row for all, columns side by side."""
    pads = make_pads("holes", 301, device, batch_size=5)
    return [pads[1:4, 1:], pads[:1, 1:].expand(3, -1), pads[:3, 1:].mT.contiguous().mT]


@pytest.mark.parametrize("device", DEVICES)
def test_pads_that_are_a_view(device: str) -> None:
    for pads in views_of_pads(device):
        check(*make_inputs(device, lengths=(300, 300)), pads, inference=True)


@pytest.mark.parametrize("device", DEVICES)
def test_one_block_mask_serves_all_layers(device: str) -> None:
    pads = make_pads("right", 200, device)
    block_mask = block_mask_of(pads)
    for _ in range(2):
        check(*make_inputs(device), pads, block_mask=block_mask)
    both_ways = block_mask_of(pads, causal=False)
    check(*make_inputs(device), pads, seen={"causal": False}, block_mask=both_ways)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("BLOCK_SIZE", [256, (128, 384)])
def test_blocks_that_reach_past_the_end(
    BLOCK_SIZE: int | tuple[int, int], is_causal: bool, device: str
) -> None:
    """384 is a multiple of the kernel's tiles, not of the blocks; what lies behind must not be read."""
    inputs, grad_output = make_inputs(device, lengths=(512, 512))
    pads = make_pads("right", 512, device)
    for x in (*inputs, grad_output):
        x[:, :, 384:] = 1e4
    pads[:, 384:] = False
    block_mask = block_mask_of(pads[:, :384], causal=is_causal, BLOCK_SIZE=BLOCK_SIZE)
    shorter = [x[:, :, :384] for x in inputs]
    seen = {"causal": is_causal}
    check(shorter, grad_output[:, :, :384], pads[:, :384], seen=seen, block_mask=block_mask)


BLOCKS = [16, 64, 256, (16, 64), (128, 32), (48, 96)]


@pytest.mark.cuda
@pytest.mark.parametrize("BLOCK_SIZE", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_other_sizes(BLOCK_SIZE: int | tuple[int, int], dtype: torch.dtype) -> None:
    """Prefill, decoding, and where torch can, training."""
    sizes = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    can_train = torch.__version__ >= "2.14" or dtype == torch.float32 or not any(n % 128 for n in sizes)
    for head_size, options in ((64, "spans"), (128, "until"))[: 1 if dtype == torch.float32 else 2]:
        for q_len in (300, 16, 1):
            pads = make_pads("left", 300, "cuda")
            seen = OPTIONS[options](pads)
            inputs, _ = make_inputs("cuda", dtype, lengths=(q_len, 300), sizes=(head_size, head_size))
            with torch.no_grad():
                block_mask = block_mask_of(pads, q_len, BLOCK_SIZE=BLOCK_SIZE, **seen)
            check(inputs, None, pads, seen=seen, block_mask=block_mask)
        training = make_inputs("cuda", dtype, lengths=(300, 300), sizes=(head_size, head_size))
        block_mask = block_mask_of(pads, BLOCK_SIZE=BLOCK_SIZE, **seen)
        if can_train:
            check(*training, pads, seen=seen, block_mask=block_mask)
        else:
            with pytest.raises(ValueError, match="gradients in half precision need blocks of 128 before"):
                check(*training, pads, seen=seen, block_mask=block_mask)


@pytest.mark.cuda
def test_block_sizes_one_after_the_other() -> None:
    """Each gets its own kernel, also from torch's cache, when all sizes are variables of a graph."""
    torch.compiler.reset()
    for dtype, size, length, blocks in (
        *((torch.float32, *other) for other in ((16, 150, 128), (64, 300, (128, 32)), (64, 300, (48, 96)))),
        *((torch.bfloat16, 64, 300, block) for block in (16, 64, 256, 32)),
    ):
        for q_len in (length, 16, 1):
            pads = make_pads("left", length, "cuda", batch_size=4 if size == 16 else 3)
            shapes = {"lengths": (q_len, length), "sizes": (size, size), "batch_size": len(pads)}
            inputs, grad = make_inputs("cuda", dtype, **shapes)
            seen = {"spans": (torch.arange(length, device="cuda") // 70).expand(len(pads), -1)}
            block_mask = block_mask_of(pads, q_len, BLOCK_SIZE=blocks, **seen)
            trains = dtype == torch.float32 and q_len == length
            check(inputs, grad if trains else None, pads, seen=seen, block_mask=block_mask)


def test_batch_sizes_are_one_variable() -> None:
    """Otherwise a condition of Inductor's voids those before it in torch's cache of compiled graphs."""
    found = list[set[str]]()

    def record(graph: torch.fx.GraphModule, _: object) -> Callable:
        (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
        found.append({str(x.meta["example_value"].shape[0]) for x in node.args[:3]})
        return graph.forward

    compiled = torch.compile(cpf._flex_attention, backend=record, fullgraph=True)
    for batch_size in (2, 3, 5):
        inputs, _ = make_inputs("cpu", batch_size=batch_size)
        block_mask = block_mask_of(make_pads("left", 200, "cpu", batch_size))
        compiled(*inputs, None, block_mask, None, False, _kernel_options(*inputs, block_mask))
    assert found[0] == {"2"} and len(found) == 2
    (name,) = found[1]
    assert not name.isdecimal()


@pytest.mark.cuda
def test_blocks_that_no_kernel_divides() -> None:
    pads = make_pads("left", 300, "cuda")
    block_mask = create_causal_padding_block_mask(pads, BLOCK_SIZE=(128, 8))
    with pytest.raises(
        ValueError, match=r"on CUDA, BLOCK_SIZE must be a multiple of 16; got BLOCK_SIZE \(128, 8\)"
    ):
        cpf.attend(*make_inputs("cuda", lengths=(300, 300))[0], block_mask)


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(128, 512), (512, 128), (512, 512), (576, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_heads(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """576 and 512 are those of multi-head latent attention."""
    pads = make_pads("left", 200, "cuda")
    for lengths in ((1, 200), (200, 200)):
        inputs, grad_output = make_inputs("cuda", dtype, lengths=lengths, sizes=sizes)
        with torch.no_grad():  # a single query decodes
            check(inputs, None, pads)
    check(inputs, grad_output, pads)


def make_documents(pads: Tensor) -> Tensor:
    """(B, S): some documents in each row, padding in some of them; numbers without meaning at padding."""
    begins = torch.rand(pads.shape, device=pads.device) < 0.03
    return (begins.cumsum(1) * 7 - 20).masked_fill(pads, 5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("with_documents", [False, True])
def test_window_and_documents(device: str, is_causal: bool, with_documents: bool) -> None:
    for padding, window in itertools.product(("right", "left", "holes"), (None, 1, 40, 150, 1000)):
        pads = make_pads(padding, 300, device)
        documents = make_documents(pads) if with_documents else None
        seen = {"causal": is_causal, "window": window, "documents": documents}
        given = {"block_mask": block_mask_of(pads, **seen)} if padding == "left" else {}
        check(*make_inputs(device, lengths=(300, 300)), pads, seen=seen, **given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [1, 5, 130])
def test_window_and_documents_with_fewer_queries(device: str, q_len: int) -> None:
    for padding in ("right", "left"):
        pads = make_pads(padding, 300, device)
        seen = {"window": 100, "documents": make_documents(pads)}
        check(*make_inputs(device, lengths=(q_len, 300)), pads, seen=seen, inference=True)


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
def test_spans_and_until(device: str, options: str) -> None:
    for padding in ("none", "right", "left", "holes"):
        pads = make_pads(padding, 300, device)
        seen = OPTIONS[options](pads)
        given = {"block_mask": block_mask_of(pads, **seen)} if padding == "left" else {}
        check(
            *make_inputs(device, lengths=(300, 300)), pads, seen=seen, inference=padding == "right", **given
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
def test_spans_and_until_in_bfloat16_with_heads_of_128(device: str, options: str) -> None:
    pads = make_pads("left", 384, device)
    inputs = make_inputs(device, torch.bfloat16, lengths=(384, 384), sizes=(128, 128))
    check(*inputs, pads, seen=OPTIONS[options](pads))


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_behind_a_prefix(device: str) -> None:
    """One query, and a few, into a cache with room at the end: the prefix is a span, and branches end."""
    pads = make_pads("left", 300, device)
    pads[:, 250:] = True
    spans, until = make_spans(pads), make_until(pads)
    for q_len, offset in ((1, 249), (1, 130), (5, 245), (60, 60), (90, 0)):
        inputs, _ = make_inputs(device, lengths=(q_len, 300))
        for seen in ({"spans": spans}, {"until": until}, {"spans": spans, "until": until}):
            mask = explicit_mask(pads, q_len, offset, **seen)
            with torch.no_grad():
                block_mask = block_mask_of(pads, q_len, q_offset=offset, **seen)
                ours = cpf.attend(*inputs, block_mask=block_mask)
            exact = exact_attention(*inputs, mask)
            assert_as_exact([ours], [masked_sdpa(*inputs, mask, None)], [exact])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_promise_of_the_padding_side(device: str, side: str) -> None:
    pads, dtype = make_pads(side, 300, device), torch.float32 if device == "cpu" else torch.bfloat16
    for more in ({}, {"window": 70}):
        check(*make_inputs(device, dtype, lengths=(300, 300)), pads, seen={"padding_side": side, **more})
    check(*make_inputs(device, dtype, lengths=(70, 300)), pads, seen={"padding_side": side, "window": 90})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(300, 200), (70, 200), (200, 200), (1, 130)])
def test_cross_attention(device: str, lengths: tuple[int, int]) -> None:
    pads, query_pads = make_pads("right", lengths[1], device), make_pads("holes", lengths[0], device)
    seen = {"causal": False, "query_pads": query_pads}
    inputs = make_inputs(device, lengths=lengths)
    check(*inputs, pads, seen=seen, inference=True)
    block_mask = block_mask_of(pads, **seen)
    check(*inputs, pads, seen=seen, block_mask=block_mask)


def soft_cap(score, b, h, q_idx, kv_idx):
    return 5 * torch.tanh(score / 5)


def make_alibi(device: str):
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], device=device)
    return lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx).abs()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["soft cap", "alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_mod(device: str, kind: str, dtype: torch.dtype) -> None:
    score_mod = soft_cap if kind == "soft cap" else make_alibi(device)
    pads = make_pads("left", 200, device)
    for seen in ({}, {"window": 50, "documents": make_documents(pads)}, {"causal": False}):
        check(*make_inputs(device, dtype), pads, score_mod=score_mod, seen=seen, inference=True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_learned_bias_gets_its_gradient(device: str) -> None:
    pads, (inputs, grad_output) = make_pads("right", 200, device), make_inputs(device)
    table = torch.randn(4, 32, device=device)
    mask = explicit_mask(pads, window=60)

    def attend(way, query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        def score_mod(score, b, h, q_idx, kv_idx):
            return score + table[h, (q_idx - kv_idx).clamp(0, 31)]

        return way(query, key, value, score_mod=score_mod)

    exact = partial(attend, lambda *x, **mod: exact_attention(*x, mask, **mod))
    plain = partial(attend, lambda *x, **mod: written_out(*x, mask, **mod)[0])
    ours = partial(attend, lambda *x, **mod: causal_padded_attention(*x, pads, window=60, **mod))
    inputs = [*inputs, table]
    truth = with_gradients(exact, [x.double() for x in inputs], grad_output.double())
    assert_as_exact(
        with_gradients(ours, inputs, grad_output), with_gradients(plain, inputs, grad_output), truth
    )


@pytest.mark.cuda
def test_numbers_that_a_score_mod_captures(
    compilations: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alone is compiled in. It may not change, but a tensor may."""
    monkeypatch.setattr(cpf, "_CAPTURED", {})
    pads, (inputs, _) = make_pads("right", 200, "cuda"), make_inputs("cuda")
    attend = partial(causal_padded_attention, *inputs, pads)

    def tilt(weight):
        return lambda score, b, h, q_idx, kv_idx: score * weight

    def tilt_by_head(weight):
        return lambda score, b, h, q_idx, kv_idx: score * weight[h]

    def expected(weight: float) -> Tensor:
        return written_out(*inputs, explicit_mask(pads), None, tilt(weight))[0]

    torch.testing.assert_close(attend(score_mod=tilt(3.0)), expected(3.0), rtol=1e-3, atol=1e-4)
    for other in (tilt(0.5), lambda score, b, h, q_idx, kv_idx, weight=0.5: score + weight):
        message = r"must not capture a number that changes.*weight\[h\]; got captured 0.5, before 3.0"
        with pytest.raises(ValueError, match=message):
            attend(score_mod=other)
    for weight in (0.5, 2.0):
        result = attend(score_mod=tilt_by_head(torch.full((4,), weight, device="cuda")))
        torch.testing.assert_close(result, expected(weight), rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
def test_a_parameter_alone_wants_a_gradient() -> None:
    pads, (inputs, _) = make_pads("right", 200, "cuda"), make_inputs("cuda", lengths=(4, 200))
    weight = torch.ones(4, device="cuda", requires_grad=True)
    score_mod = lambda score, b, h, q_idx, kv_idx: score * weight[h]
    attend = partial(causal_padded_attention, *inputs, pads, score_mod=score_mod)
    (gradient,) = torch.autograd.grad(attend().sum(), weight)
    exact = written_out(*(x.double() for x in inputs), explicit_mask(pads, 4), None, score_mod)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), weight)[0], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        block_mask = block_mask_of(pads, 4)
        cpf.attend(*inputs, block_mask, score_mod=score_mod)
    with pytest.raises(ValueError, match=r"block_mask was made under torch\.no_grad"):
        cpf.attend(*inputs, block_mask, score_mod=score_mod)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [200, 3])
def test_log_sum_exp(device: str, dtype: torch.dtype, q_len: int) -> None:
    """Values, and gradients of a loss of both results."""
    pads = make_pads("right", 200, device)
    pads[:, -3:] = pads[0, -3:]  # the last queries are padding in no row, or in all
    (inputs, grad_output), grad_lse = (
        make_inputs(device, dtype, lengths=(q_len, 200)),
        torch.randn(3, 4, q_len),
    )
    mask = explicit_mask(pads, q_len, window=90)
    grad_lse = grad_lse.to(device).masked_fill(~mask.any(-1)[:, None], 0.0)

    def both(attention, *inputs: Tensor) -> Tensor:
        output, lse = attention(*inputs)
        return torch.cat(
            [output, lse.unsqueeze(-1).masked_fill(lse.unsqueeze(-1).isneginf(), 0).to(output.dtype)], -1
        )

    def ours(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = causal_padded_attention(*inputs, pads, window=90, return_lse=True)
        assert lse.shape == (3, 4, q_len) and lse.dtype == torch.float32
        assert torch.equal(lse.isneginf(), ~mask.any(-1)[:, None].expand_as(lse))
        torch.testing.assert_close(output, causal_padded_attention(*inputs, pads, window=90))
        return output, lse

    grad = torch.cat([grad_output, grad_lse.unsqueeze(-1).to(dtype)], -1) if q_len == 200 else None
    results = with_gradients(partial(both, ours), inputs, grad)
    plain = with_gradients(partial(both, lambda *x: written_out(*x, mask)), inputs, grad)
    wide = [x.double() for x in inputs]
    exact = with_gradients(
        partial(both, lambda *x: written_out(*x, mask)), wide, None if grad is None else grad.double()
    )
    assert_as_exact(results, plain, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [1, 5, 70, 130])
def test_the_queries_are_the_last_tokens(device: str, q_len: int) -> None:
    for padding in PADDING:
        check(*make_inputs(device, lengths=(q_len, 200)), make_pads(padding, 200, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_decoding_gives_the_rows_of_one_pass(device: str, padding: str) -> None:
    length, size = 40, 64
    (query, key, value), _ = make_inputs(device, lengths=(length, length))
    pads = make_pads(padding, length, device)
    whole = causal_padded_attention(query, key, value, pads)
    room = 24  # tokens of the cache that are never written
    cache_pads = torch.cat([pads, pads.new_ones(3, room)], 1)
    key_cache, value_cache = (torch.cat([x, torch.zeros_like(x[:, :, :room])], 2) for x in (key, value))
    for i in range(length):
        step = slice(i, i + 1)
        grown = causal_padded_attention(
            query[:, :, step], key[:, :, : i + 1], value[:, :, : i + 1], pads[:, : i + 1]
        )
        torch.testing.assert_close(grown, whole[:, :, step], rtol=1e-5, atol=1e-5)
        position = torch.tensor(i, device=device) if i % 2 else i
        block_mask = block_mask_of(cache_pads, 1, q_offset=position)
        preallocated = cpf.attend(query[:, :, step], key_cache, value_cache, block_mask=block_mask)
        torch.testing.assert_close(preallocated, whole[:, :, step], rtol=1e-5, atol=1e-5)
    assert whole.shape == (3, 4, length, size)


@pytest.mark.parametrize("device", DEVICES)
def test_chunked_prefill_into_a_preallocated_cache(device: str) -> None:
    (query, key, value), _ = make_inputs(device, lengths=(300, 300))
    pads = make_pads("left", 300, device)
    whole = causal_padded_attention(query, key, value, pads)
    for start, end in ((0, 128), (128, 200), (200, 300)):
        block_mask = block_mask_of(pads, end - start, q_offset=start)
        chunk = cpf.attend(query[:, :, start:end], key, value, block_mask=block_mask)
        torch.testing.assert_close(chunk, whole[:, :, start:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_of_padding_only_value_reaches_the_output(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, _ = make_inputs(device)
    expected = causal_padded_attention(*inputs, pads)
    for which, name in enumerate(("query", "key", "value")):
        poisoned = list(inputs)
        poisoned[which] = inputs[which].masked_fill(pads[:, None, :, None], torch.nan)
        output = causal_padded_attention(*poisoned, pads)
        leaked = output.transpose(1, 2)[~pads].isnan().any()
        assert leaked == (name == "value"), name
        if name != "value":
            assert torch.equal(output.transpose(1, 2)[~pads], expected.transpose(1, 2)[~pads])


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, grad_output = make_inputs(device)
    halves = [x.bfloat16() for x in inputs]
    expected = with_gradients(lambda *x: causal_padded_attention(*x, pads), halves, grad_output.bfloat16())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return causal_padded_attention(
                query, key, value.bfloat16(), pads
            )  # mixed, as after rotary embeddings

    results = with_gradients(attend, inputs, grad_output.bfloat16())
    assert results[0].dtype == torch.bfloat16 and results[1].dtype == torch.float32
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth.to(result.dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, grad_output = make_inputs(device)
    attend = partial(causal_padded_attention, pads=pads)
    expected = with_gradients(attend, inputs, grad_output)
    results = with_gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), inputs, grad_output)
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth)


@pytest.mark.cuda
def test_what_is_compiled_first_within_a_backward_pass() -> None:
    """Such checkpoints run again there, where autograd has a thread for the device."""
    torch._dynamo.reset()
    pads = make_pads("right", 200, "cuda")
    inputs, grad_output = make_inputs("cuda")
    attend = partial(causal_padded_attention, pads=pads)
    inputs = [x.requires_grad_() for x in inputs]
    output = checkpoint(attend, *inputs, use_reentrant=True)
    output.backward(grad_output)
    expected = with_gradients(attend, inputs, grad_output)
    for result, truth in zip((output, *(x.grad for x in inputs)), expected, strict=True):
        assert torch.equal(result, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_part_of_the_heads(device: str) -> None:
    # As a rank of a tensor-parallel model has them: the mask serves any heads.
    pads = make_pads("left", 200, device)
    inputs, grad_output = make_inputs(device)
    attend = partial(cpf.attend, block_mask=block_mask_of(pads))
    whole = with_gradients(attend, inputs, grad_output)
    part = with_gradients(attend, [x.chunk(2, dim=1)[1] for x in inputs], grad_output.chunk(2, dim=1)[1])
    for result, truth in zip(part, whole, strict=True):
        torch.testing.assert_close(result, truth.chunk(2, dim=1)[1])


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_without_gradients(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, _ = make_inputs(device)
    expected = causal_padded_attention(*inputs, pads)
    with torch.no_grad():
        result = causal_padded_attention(*(x.requires_grad_() for x in inputs), pads)
    torch.testing.assert_close(result, expected)
    assert not result.requires_grad


@pytest.mark.parametrize("q_len", [200, 40])
def test_a_score_mod_that_is_not_finite_where_masked(q_len: int) -> None:
    """Of masked pairs nothing reaches the gradients: their places are at or below 0 here."""
    pads = make_pads("right", 200, "cpu")
    inputs, grad_output = make_inputs("cpu", lengths=(q_len, 200))
    weight = torch.ones(4)

    def attend(way, query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        def score_mod(score, b, h, q_idx, kv_idx):
            away = q_idx + 200 - q_len - kv_idx + 1
            away = away if way is ours else away.clamp(min=1)  # what is allowed is the same
            return score / away - weight[h] * torch.log(away)

        return way(query, key, value, score_mod=score_mod)

    mask = explicit_mask(pads, q_len)
    ours = partial(causal_padded_attention, pads=pads)
    plain = partial(attend, lambda *x, **mod: written_out(*x, mask, **mod)[0])
    results = with_gradients(partial(attend, ours), [*inputs, weight], grad_output)
    expected = with_gradients(plain, [*inputs, weight], grad_output)
    exact = with_gradients(plain, [x.double() for x in (*inputs, weight)], grad_output.double())
    assert_as_exact(results, expected, exact)


def test_other_tracers() -> None:
    """vmap over pads, make_fx and fake tensors are right; torch.jit.trace is refused."""
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    both = torch.stack([pads, pads.flip(0)])

    def attend(pads: Tensor) -> Tensor:
        return causal_padded_attention(*inputs, pads, window=50, padding_side="right")

    expected = torch.stack([attend(x) for x in both])
    torch.testing.assert_close(torch.vmap(attend)(both), expected)
    torch.testing.assert_close(make_fx(attend)(pads)(both[1]), expected[1])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (*inputs, pads)]
        assert causal_padded_attention(*fakes, window=50).shape == (3, 4, 200, 64)
    with pytest.raises(TypeError, match=r"torch.jit.trace is not supported: use torch.export"):
        torch.jit.trace(attend, pads)


def test_other_devices_run_plain_operators() -> None:
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    output = causal_padded_attention(*(x.to("meta") for x in inputs), pads.to("meta"), score_mod=soft_cap)
    assert output.shape == (3, 4, 200, 64) and output.device.type == "meta"


def test_autocast_leaves_float64_alone() -> None:
    inputs, pads = [x.double() for x in make_inputs("cpu")[0]], make_pads("right", 200, "cpu")
    expected = causal_padded_attention(*inputs, pads)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_padded_attention(*inputs, pads), expected)


def test_another_default_device_changes_nothing() -> None:
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    options = {"score_mod": soft_cap, "window": 50, "padding_side": "right"}
    mask = create_block_mask_from_runs(None, torch.arange(200), pads, until=make_until(pads))
    expected = causal_padded_attention(*inputs, pads, **options)
    by_runs = cpf.attend(*inputs, block_mask=mask)
    last, until = torch.arange(200), make_until(pads)
    with torch.device("meta"):
        assert torch.equal(causal_padded_attention(*inputs, pads, **options), expected)
        mask = create_block_mask_from_runs(None, last, pads, until=until)
        assert torch.equal(cpf.attend(*inputs, block_mask=mask), by_runs)


@pytest.mark.parametrize("scale", [1, 0.5, np.float64(0.5), np.float32(0.5), np.int64(1)], ids=repr)
def test_scales_of_all_kinds(scale) -> None:
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    expected = causal_padded_attention(*inputs, pads, scale=float(scale))
    assert torch.equal(causal_padded_attention(*inputs, pads, scale=scale), expected)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(128, 256), torch.nn.Linear(128, 128)

    def forward(self, x: Tensor, pads: Tensor, block_mask=None) -> Tensor:  # (B, S, 128)
        query, key, value = self.qkv(x).split([128, 64, 64], dim=-1)
        query, key, value = (y.unflatten(-1, (-1, 32)).transpose(1, 2) for y in (query, key, value))
        if block_mask is None:
            y = causal_padded_attention(query, key, value, pads)
        else:
            y = cpf.attend(query, key, value, block_mask)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given_mask", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_in_a_compiled_model(device: str, given_mask: bool, training: bool) -> None:
    torch.compiler.reset()  # torch counts compilations by the code, so those of all these tests together
    layer = Layer().to(device)
    # On the CPU, one compilation for all lengths. The C++ that torch 2.11 and 2.12 write for a lookup in a
    # tensor of dynamic length does not build.
    dynamic = torch.__version__ >= "2.13" if device == "cpu" else None
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for length in (200, 260, 300):
        pads = make_pads("left", length, device)
        block_mask = block_mask_of(pads) if given_mask else None
        x = torch.randn(3, length, 128, device=device, requires_grad=training)
        with torch.set_grad_enabled(training):
            expected, result = layer(x, pads, block_mask), compiled(x, pads, block_mask)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        if training:
            for ours, theirs in zip(
                *(torch.autograd.grad(y.square().sum(), x) for y in (result, expected)), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def attend_with(*options: str, **more) -> Callable[..., Tensor]:
    """Attention that makes its mask, for what a caller compiles; numbers of tokens come last."""

    def model(query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *numbers: Tensor) -> Tensor:
        seen = dict(zip(options, numbers, strict=True)) | more
        return causal_padded_attention(query * 2, key, value, pads, **seen)

    return model


def two_layers(query: Tensor, key: Tensor, value: Tensor, pads: Tensor) -> Tensor:
    block_mask = block_mask_of(pads)
    attend = partial(cpf.attend, block_mask=block_mask)
    return attend(attend(query * 2, key, value), key, value)


def into_a_cache(query: Tensor, key: Tensor, value: Tensor, pads: Tensor) -> Tensor:
    last = pads.new_full((), pads.shape[1] - 1, dtype=torch.int64)
    block_mask = block_mask_of(pads, 1, q_offset=last)
    return cpf.attend(query * 2, key, value, block_mask=block_mask)


def query_of_all(length: int) -> int:
    return length


def attend_by_runs(*names: str) -> Callable[..., Tensor]:
    """Attention whose mask is made of runs, of which tensors come last."""

    def model(query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *numbers: Tensor) -> Tensor:
        given = {"first": None, "last": None} | dict(zip(names, numbers, strict=True))
        block_mask = create_block_mask_from_runs(given.pop("first"), given.pop("last"), pads, **given)
        return cpf.attend(query * 2, key, value, block_mask=block_mask)

    return model


def local_encoder(query: Tensor, key: Tensor, value: Tensor, pads: Tensor) -> Tensor:
    places = torch.arange(pads.shape[1], device=pads.device)
    block_mask = create_block_mask_from_runs(places - 30, places + 10, pads)
    return cpf.attend(query * 2, key, value, block_mask=block_mask)


def packed(query: Tensor, key: Tensor, value: Tensor, pads: Tensor, position_ids: Tensor) -> Tensor:
    places = torch.arange(pads.shape[1], device=pads.device)
    block_mask = create_block_mask_from_runs(places - position_ids, places, pads)
    return cpf.attend(query * 2, key, value, block_mask)


def make_position_ids(documents: Tensor) -> Tensor:
    """(B, S): they restart where the number of the document changes."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
    return places - torch.where(begins, places, 0).cummax(1).values


MODELS: dict[str, tuple[Callable[..., Tensor], Callable[[int], int]]] = {
    "causal": (attend_with(), query_of_all),
    "window": (attend_with(window=50), query_of_all),
    "packed": (packed, query_of_all),
    "spans and until": (attend_by_runs("last", "until"), query_of_all),
    "padding_side": (attend_with(padding_side="left", window=70), query_of_all),
    "encoder": (attend_by_runs(), query_of_all),
    "local encoder": (local_encoder, query_of_all),
    "cross-attention": (attend_by_runs("query_pads"), lambda length: length // 2 + 3),
    "two layers, one mask": (two_layers, query_of_all),
    "growing cache": (attend_with(), lambda length: 1),
    "offset": (into_a_cache, lambda length: 1),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_lengths_in_a_callers_graph(name: str, device: str, compilations: Callable[[], int]) -> None:
    """Few graphs for all lengths, with torch's own limit of eight, as the mask is made in the graph."""
    model, queries_of = MODELS[name]
    training = name not in ("growing cache", "offset")
    # On the CPU it is the trace that counts: what it is compiled to is torch's.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for length in (200, 260, 300, 384, 129, 513, 640, 1000, 256, 777):
        (query, key, value), grad_output = make_inputs(device, lengths=(queries_of(length), length))
        pads = make_pads("left", length, device)
        spans, until = make_spans(pads), make_until(pads)
        documents = torch.randint(0, 2, pads.shape, device=device).cumsum(1) // 50
        ends = explicit_mask(pads, spans=spans)
        numbers = {
            "packed": [make_position_ids(documents)],
            "spans and until": [length - 1 - ends.flip(-1).int().argmax(-1), until],
            "cross-attention": [make_pads("right", queries_of(length), device)],
        }.get(name, [])
        seen = {
            "window": {"window": 50},
            "packed": {"documents": documents},
            "spans and until": {"spans": spans, "until": until},
            "padding_side": {"window": 70},
            "encoder": {"causal": False},
            "cross-attention": {"causal": False, "query_pads": (numbers or [None])[0]},
        }.get(name, {})
        mask = explicit_mask(pads, queries_of(length), **seen)
        if name == "local encoder":
            places = torch.arange(length, device=device)
            ahead = places - places[:, None]
            mask = explicit_mask(pads, causal=False) & (ahead >= -30) & (ahead <= 10)

        def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor = mask) -> Tensor:
            output = masked_sdpa(query * 2, key, value, mask, None)
            return masked_sdpa(output, key, value, mask, None) if name == "two layers, one mask" else output

        grad = grad_output if training else None
        with torch.set_grad_enabled(training):
            results = with_gradients(lambda *x: compiled(*x, pads, *numbers), [query, key, value], grad)  # noqa: B023
            expected = with_gradients(plain, [query, key, value], grad)
        for result, truth in zip(results, expected, strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-3, atol=1e-4)
    assert 1 <= compilations() <= 4


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["causal", "window", "packed", "padding_side", "encoder", "local encoder"])
def test_exported_with_a_length_that_is_dynamic(name: str, strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *numbers: Tensor
        ) -> Tensor:
            return MODELS[name][0](query, key, value, pads, *numbers)

    def inputs_of(length: int) -> tuple:
        pads = make_pads("left", length, "cpu")
        more = [make_position_ids(torch.arange(length).expand(3, -1) // 70)] if name == "packed" else []
        return (*make_inputs("cpu", lengths=(length, length))[0], pads, *more)

    length = torch.export.Dim("length", min=129, max=4096)
    sizes = [{2: length}, {2: length}, {2: length}, {1: length}]
    sizes += [({1: length},)] if name == "packed" else []
    exported = torch.export.export(
        Model(), inputs_of(300), dynamic_shapes=tuple(sizes), strict=strict
    ).module()
    for n in (129, 200, 256, 1000):
        inputs = inputs_of(n)
        torch.testing.assert_close(exported(*inputs), Model()(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_gradients_of_views_are_not_copied() -> None:
    """Of views of tokens, as models have them, at a constant length and at a variable one."""
    for length in (256, 384, 500):
        inputs, grad = make_inputs("cuda", torch.bfloat16, lengths=(length, length))
        *inputs, grad = (view_of_tokens(x) for x in (*inputs, grad))
        pads = make_pads("left", length, "cuda")
        check(inputs, grad, pads)
        inputs = [x.requires_grad_() for x in inputs]
        output = causal_padded_attention(*inputs, pads)
        assert output.transpose(1, 2).is_contiguous()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            torch.autograd.grad(output, inputs, grad)
        assert not {"aten::contiguous", "aten::clone", "aten::copy_"} & {x.key for x in found.key_averages()}


@pytest.mark.cuda
def test_gradients_that_cancel_are_zero() -> None:
    """A token that sees itself alone has them. Inductor may round what cancels, if lengths are variable."""
    for length in (256, 384, 500):
        inputs, grad = make_inputs("cuda", torch.bfloat16, lengths=(length, length))
        *inputs, grad = (view_of_tokens(x) for x in (*inputs, grad))
        inputs, pads = [x.requires_grad_() for x in inputs], make_pads("none", length, "cuda")
        output = causal_padded_attention(*inputs, pads, window=1, backend="triton")
        query_grad, key_grad, _ = torch.autograd.grad(output, inputs, grad)
        assert max(query_grad.abs().max(), key_grad.abs().max()) < 1e-4


@pytest.mark.cuda
def test_a_stream_of_shapes_compiles_three_times_at_most(compilations: Callable[[], int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(24):
        batch_size = int(torch.randint(1, 9, (), generator=generator))
        length = int(torch.randint(100, 4097, (), generator=generator))
        inputs, grad_output = make_inputs("cuda", torch.bfloat16, batch_size, lengths=(length, length))
        pads = make_pads("right", length, "cuda", batch_size)
        with_gradients(partial(causal_padded_attention, pads=pads), inputs, grad_output)
    assert 1 <= compilations() <= 3


@pytest.mark.cuda
@pytest.mark.parametrize("as_tensor", [True, False])
def test_decoding_into_a_preallocated_cache_compiles_once(
    as_tensor: bool, compilations: Callable[[], int]
) -> None:
    (query, key, value), _ = make_inputs("cuda", torch.bfloat16, 8, lengths=(1, 512))
    for i in range(32):
        pads = torch.arange(512, device="cuda").expand(8, 512) > i
        offset = torch.tensor(i, device="cuda") if as_tensor else i
        block_mask = block_mask_of(pads, 1, q_offset=offset)
        with torch.no_grad():
            cpf.attend(query, key, value, block_mask=block_mask)
    assert compilations() == 1


def test_tiles_of_heads_of_128_follow_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, where they were measured: the block mask says whether runs begin late."""
    monkeypatch.setattr(cpf, "_is_on_hopper", lambda x: True)
    inputs, _ = make_inputs("cpu", torch.bfloat16, sizes=(128, 128))
    pads = make_pads("right", 200, "cpu")
    documents = torch.zeros(3, 200, dtype=torch.int32)
    textbook = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 200, 200, "cpu")
    small: dict = {"fwd_num_stages": 2, "fwd_num_warps": 4, "fwd_USE_TMA": True}
    large = {"fwd_BLOCK_N": 128}
    for block_mask, tiles in (
        (block_mask_of(pads), small),
        (block_mask_of(pads, causal=False), small),
        (block_mask_of(pads, window=50), large),
        (block_mask_of(pads, documents=documents), large),
        (block_mask_of(pads, spans=documents), small),
        (block_mask_of(pads, padding_side="right"), small),
        (block_mask_of(pads, padding_side="right", window=50), large),
        (textbook, {}),
        (None, {}),
    ):
        options = _kernel_options(*inputs, block_mask)
        assert {name: option for name, option in options.items() if name.startswith("fwd")} == tiles
    apart = [x.new_zeros(*x.shape[:3], 130)[..., :128] for x in inputs]
    options = _kernel_options(*apart, block_mask_of(pads))
    assert options["fwd_USE_TMA"] is False


@pytest.mark.cuda
def test_heads_of_128_wherever_their_rows_begin() -> None:
    """They are loaded by descriptors, which want multiples of 16 bytes, also where strides are dynamic."""
    pads = make_pads("right", 300, "cuda")
    for width, first in ((128, 0), (136, 0), (144, 8), (130, 0), (129, 1), (136, 1), (192, 64)):
        inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(300, 300), sizes=(128, 128))
        inputs = [F.pad(x, (first, width - 128 - first)).narrow(3, first, 128) for x in inputs]
        assert {x.stride(2) for x in inputs} == {width} and inputs[0].storage_offset() == first
        check(inputs, grad_output, pads, backend="triton", inference=True)


@pytest.mark.cuda
@pytest.mark.parametrize("first", [0, 1])
def test_heads_of_128_in_a_compiled_model(first: int) -> None:
    """They begin wherever the model's own products do, which no one copies to where descriptors may begin."""

    def model(x: Tensor, weight: Tensor, pads: Tensor, attend=causal_padded_attention) -> Tensor:
        return attend(*(x @ weight).narrow(4, first, 128), pads)

    compiled = torch.compile(model, fullgraph=True)
    for length in (300, 200, 260):
        pads = make_pads("right", length, "cuda")
        x = torch.randn(3, 3, 4, length, 136, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(136, 136, device="cuda", dtype=torch.bfloat16) / 136**0.5
        grad_output = torch.randn(3, 4, length, 128, device="cuda", dtype=torch.bfloat16)
        plain = partial(model, pads=pads, attend=sdpa_reference)
        assert_as_exact(
            with_gradients(partial(compiled, pads=pads), [x, weight], grad_output),
            with_gradients(plain, [x, weight], grad_output),
            with_gradients(plain, [x.double(), weight.double()], grad_output.double()),
        )


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of a step, and what its replays fill."""
    with torch.cuda.stream(torch.cuda.Stream()):  # compiles
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.cuda
def test_training_in_a_cuda_graph() -> None:
    """The mask, both passes, heads of 128: at each replay, what pads then holds."""
    pads = make_pads("right", 300, "cuda")
    inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(300, 300), sizes=(128, 128))

    def step() -> list[Tensor]:
        block_mask = block_mask_of(pads)
        attend = partial(cpf.attend, block_mask=block_mask, backend="triton")
        return with_gradients(attend, inputs, grad_output)

    graph, results = capture(step)
    for padding in ("left", "holes", "empty"):
        pads.copy_(make_pads(padding, 300, "cuda"))
        graph.replay()
        for result, expected in zip(results, step(), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(8, 2), (14, 2), (24, 1), (32, 1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float16, (24, 40)), (torch.bfloat16, (192, 128)), (torch.float32, (72, 64))],
    ids=str,
)
def test_few_queries(heads: tuple[int, int], dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Into a cache that is padded on the left and not written to its end."""
    for batch_size, q_len, kv_len in ((3, 1, 700), (2, 3, 1000), (5, 16, 300), (2, 100, 400)):
        inputs, _ = make_inputs("cuda", dtype, batch_size, heads, (q_len, kv_len), sizes)
        offset = kv_len - kv_len // 8 - q_len
        place = torch.arange(kv_len, device="cuda")
        pads = (place < offset * torch.rand(batch_size, 1, device="cuda")) | (place >= offset + q_len)
        mask = explicit_mask(pads, q_len, offset)
        with torch.no_grad():
            block_mask = block_mask_of(pads, q_len, q_offset=torch.tensor(offset).cuda())
            ours, lse = cpf.attend(*inputs, block_mask=block_mask, return_lse=True)
            wide, exact_lse = written_out(*(x.double() for x in inputs), mask)
            assert_as_exact([ours], [masked_sdpa(*inputs, mask, None)], [wide])
        torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.cuda
def test_decoding_compiles_for_batch_sizes_and_not_for_lengths(compilations: Callable[[], int]) -> None:
    made, sizes = [], [16, 33, 1, 9]
    for batch_size, kv_len in itertools.product([*sizes, *sizes], [600, 1200, 1700]):
        (query, key, value), _ = make_inputs("cuda", torch.bfloat16, batch_size, lengths=(1, kv_len))
        for offset in (kv_len // 2, kv_len - 1):
            pads = torch.arange(kv_len, device="cuda").expand(batch_size, kv_len) > offset
            pads = pads | (torch.arange(batch_size, device="cuda")[:, None] == 1)
            with torch.no_grad():
                block_mask = block_mask_of(pads, 1, q_offset=torch.tensor(offset).cuda())
                output = cpf.attend(query, key, value, block_mask=block_mask)
            mask = explicit_mask(pads, 1, offset)
            torch.testing.assert_close(
                output, masked_sdpa(query, key, value, mask, None), rtol=2e-2, atol=2e-2
            )
        made.append(compilations())
    # Each size once, and once more for the first change of length.
    assert made[-1] == made[3 * len(sizes) - 1] <= 2 * len(sizes)


@pytest.mark.cuda
def test_no_timing_decides_how_decoding_adds_up_its_splits(compilations: Callable[[], int]) -> None:
    """It decided for what took three times as long, in one process of two."""
    with fresh_cache(), torch.no_grad():
        inputs, _ = make_inputs("cuda", torch.bfloat16, lengths=(1, 600))
        causal_padded_attention(*inputs, make_pads("left", 600, "cuda"))
    assert compilations() == 1
    assert not [name for name in counters["inductor"] if name.startswith("benchmarking")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
def test_few_queries_of_many_sequences(device: str, training: bool) -> None:
    """Of 21, each with its own padding and its own bias."""
    inputs, grad_output = make_inputs(device, batch_size=21, lengths=(3, 200))
    pads = torch.arange(200, device=device) < 9 * torch.arange(21, device=device)[:, None]
    slopes = torch.randn(21, device=device)

    def tilt(score, b, h, q_idx, kv_idx):
        return score + slopes[b] * kv_idx / 100

    mask = explicit_mask(pads, 3)
    with torch.set_grad_enabled(training):
        attend = partial(causal_padded_attention, pads=pads, score_mod=tilt)
        _, lse = attend(*inputs, return_lse=True)
        results = with_gradients(attend, inputs, grad_output if training else None)
    plain, exact = (
        with_gradients(
            lambda *x: written_out(*x, mask, None, tilt)[0],
            [x.to(dtype) for x in inputs],
            grad_output.to(dtype) if training else None,
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert_as_exact(results, plain, exact)
    exact_lse = written_out(*(x.double() for x in inputs), mask, None, tilt)[1]
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("q_len", [1, 5])
def test_a_sequence_decodes_to_the_same_bits_whatever_the_others_hold(q_len: int) -> None:
    (query, key, value), _ = make_inputs("cuda", torch.bfloat16, 8, (8, 2), (q_len, 2000), (128, 128))
    pads = make_pads("left", 2000, "cuda", 8)
    outputs = []
    for others in (0, 1):
        if others:
            query[1:], key[1:], value[1:] = 3 * query[1:], key[1:] - 1, 2 * value[1:]
            pads = torch.cat((pads[:1], make_pads("holes", 2000, "cuda", 7)))
        with torch.no_grad():
            outputs.append(causal_padded_attention(query, key, value, pads)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_made_without_gradients_gives_none_in_silence(device: str) -> None:
    inputs, _ = make_inputs(device, lengths=(1, 50))
    pads = make_pads("left", 50, device)
    with torch.no_grad():
        block_mask = block_mask_of(pads, 1)
    cpf.attend(*inputs, block_mask=block_mask)
    with pytest.raises(ValueError, match=r"made under torch.no_grad: make it where gradients are wanted"):
        cpf.attend(inputs[0].requires_grad_(), *inputs[1:], block_mask)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4096, 2, 128, 64), torch.float32),
        ((65_535, 1, 17, 16), torch.float32),  # all that a grid of CUDA's holds
        ((1024, 96, 16, 16), torch.float32),  # too many heads for the kernel that decodes
        ((17, 32, 32768, 128), torch.bfloat16),  # more than 2 ** 31 numbers
    ],
    ids=str,
)
def test_large_batches(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch_size, _, length, _ = shape
    lengths = torch.linspace(min(length, 300), 1, batch_size, device="cuda").round()
    pads = torch.arange(length, device="cuda") >= lengths[:, None]
    query = torch.randn(shape, device="cuda", dtype=dtype)
    with torch.no_grad():
        output = causal_padded_attention(query, query, query, pads)
    for i in (0, 1, batch_size // 2, batch_size - 2, batch_size - 1):
        real = int(lengths[i])
        part = query[i : i + 1, :, :real]
        exact = exact_attention(part, part, part, explicit_mask(pads[i : i + 1, :real]))
        plain = sdpa_reference(part, part, part, pads[i : i + 1, :real])
        assert_as_exact([output[i : i + 1, :, :real]], [plain], [exact])
        assert output[i, :, real:].count_nonzero() == 0


@pytest.mark.cuda
def test_a_growing_cache_compiles_three_times_at_most(compilations: Callable[[], int]) -> None:
    for length in [*range(2, 20), *range(120, 140), *range(250, 260), 600, 1000]:
        (query, key, value), _ = make_inputs("cuda", torch.bfloat16, 16, lengths=(1, length))
        with torch.no_grad():
            causal_padded_attention(query, key, value, make_pads("left", length, "cuda", 16))
    assert 1 <= compilations() <= 3  # for one tile, and two key heads of two tiles, again


@pytest.mark.cuda
def test_more_kinds_of_input_than_torch_compiles_left_to_itself(compilations: Callable[[], int]) -> None:
    for size in range(16, 16 + 12 * 8, 8):
        inputs, _ = make_inputs("cuda", torch.bfloat16, 2, lengths=(8, 8), sizes=(size, size))
        with torch.no_grad():
            causal_padded_attention(*inputs, make_pads("right", 8, "cuda", 2))
    assert compilations() == 12


@pytest.mark.cuda
def test_after_a_call_that_fails_the_next_one_is_compiled() -> None:
    """Uncompiled, it would take memory for every score."""
    (query, key, value), _ = make_inputs("cuda", torch.bfloat16, lengths=(4096, 4096))
    pads = make_pads("right", 4096, "cuda")

    def unusable(score, b, h, q_idx, kv_idx):
        return score if score > 0 else -score  # which no compiler can follow

    attend = partial(causal_padded_attention, pads=pads)
    for fail, message in [
        (lambda: torch.func.grad(lambda q: attend(q, key, value).float().sum())(query), ""),
        (lambda: torch.func.vmap(lambda q: attend(q, key, value))(query[None]), ""),
        (lambda: attend(query, key, value, score_mod=unusable), ""),  # what these say is torch's
        (lambda: attend(query, key, value, score_mod=lambda score, b, h, q_idx, kv_idx: 1 / 0), ""),
    ]:
        with pytest.raises(Exception, match=message):
            fail()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            output = causal_padded_attention(query, key, value, pads)
        taken = torch.cuda.max_memory_allocated() - before
        assert taken < 4 * query.numel() * query.element_size() + 2**24  # the scores: 3 * 4 * 4096 ** 2
        torch.testing.assert_close(
            output[2], sdpa_reference(query, key, value, pads)[2], rtol=2e-2, atol=2e-2
        )


def test_at_the_limit_it_raises_until_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is compiled, but for a limit of 2 and a compiler that is fast."""
    compile_ = torch.compile
    limit = {"recompile_limit": 2} if "recompile_limit" in signature(compile_).parameters else {}
    with_less = partial(compile_, backend="eager", **limit)
    monkeypatch.setattr(
        "torch.compile", lambda function, fullgraph, **_: with_less(function, fullgraph=fullgraph)
    )
    compiled = _compile.__wrapped__(same_bits=False)
    monkeypatch.setattr(cpf, "_compile", lambda *kind: compiled)
    monkeypatch.setattr(torch.compiler.config, "recompile_limit", 2)  # torch 2.11

    def attend(size: int) -> None:
        inputs = torch.randn(3, 1, 2, 8, size)
        with torch.no_grad():
            cpf._run_kernel(*inputs, None, None, None, False, "triton")

    attend(16)
    attend(24)
    with pytest.raises(
        RuntimeError, match=r"64 kinds of input are compiled, the limit\. .*call torch\.compiler\.reset\(\)$"
    ):
        attend(32)
    torch.compiler.reset()
    attend(32)


LIMIT = """
import threading
import torch
from causal_padded_flexattn import causal_padded_attention

pads = torch.zeros(1, 32, dtype=torch.bool, device="cuda")

def kinds(sizes):  # more than torch compiles left to itself
    with torch.no_grad():
        for size in sizes:
            causal_padded_attention(*torch.randn(3, 1, 2, 32, size, device="cuda"), pads)

kinds([16])
errors = []
threading.excepthook = errors.append
thread = threading.Thread(target=kinds, args=(range(24, 24 + 9 * 8, 8),))
thread.start()
thread.join()
assert not errors, errors
"""


@pytest.mark.cuda
def test_another_thread_than_the_first_has_the_limit_too() -> None:
    subprocess.run([sys.executable, "-c", LIMIT], cwd=ROOT, check=True, timeout=300)


THREADS = """
import threading
import time
import torch
from causal_padded_flexattn import (
    attend, causal_padded_attention, create_causal_padding_block_mask, sdpa_reference
)

shared = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
shared[0, 200:] = True
block_mask = create_causal_padding_block_mask(shared)

def train(length):
    pads, mask = shared, block_mask
    if length != 300:
        pads, mask = torch.arange(length, device="cuda").expand(2, length) >= length - 50, None
    inputs = [torch.randn(2, 2, length, 64, device="cuda", requires_grad=True) for _ in range(3)]
    for _ in range(2):
        output = attend(*inputs, mask) if length == 300 else causal_padded_attention(*inputs, pads)
        grads = torch.autograd.grad(output.square().sum(), inputs)
    exact = torch.autograd.grad(sdpa_reference(*inputs, pads).square().sum(), inputs)
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

errors = []
threading.excepthook = errors.append
threads = [threading.Thread(target=train, args=(length,), daemon=True) for length in (300, 300, 512, 1000)]
for thread in threads:
    thread.start()
    time.sleep(0.05)
for thread in threads:
    thread.join(240)
assert not errors, errors
assert not any(thread.is_alive() for thread in threads), "hangs"
"""


@pytest.mark.cuda
def test_threads_that_begin_to_train_at_once() -> None:
    """Each compiles its forward pass, which runs autograd, while others compile backward ones."""
    subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, check=True, timeout=300)


@pytest.mark.cuda
def test_a_decoding_step_in_a_cuda_graph() -> None:
    """The mask and the attention of two layers: at each replay, what the tensors then hold."""
    (query, key, value), _ = make_inputs("cuda", torch.bfloat16, 8, (8, 2), (1, 600), (128, 128))
    pads = make_pads("left", 600, "cuda", 8)
    offset = torch.tensor(300, device="cuda")

    @torch.no_grad()
    def step() -> list[Tensor]:
        block_mask = block_mask_of(pads, 1, q_offset=offset)
        return [cpf.attend(query * n, key, value, block_mask=block_mask) for n in range(1, 3)]

    graph, outputs = capture(step)
    for place in (300, 301, 599, 10):
        offset.fill_(place)
        query.normal_()
        pads[3, :place] = place % 2 == 1
        graph.replay()
        mask = explicit_mask(pads, 1, place)
        for n, output in enumerate(outputs, 1):
            expected = masked_sdpa(query * n, key, value, mask, None)
            torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("training", [True, False])
def test_in_a_model_compiled_for_cuda_graphs(training: bool) -> None:
    layer = Layer().cuda()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for i in range(4):
        pads = make_pads(["left", "right", "holes", "none"][i], 256, "cuda")
        x = torch.randn(3, 256, 128, device="cuda", requires_grad=training)
        with torch.set_grad_enabled(training):
            expected, result = layer(x, pads), compiled(x, pads).clone()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        if training:
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (result, expected)]
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
def test_it_does_not_wait_for_the_device() -> None:
    pads = make_pads("right", 200, "cuda")
    inputs, grad_output = make_inputs("cuda", torch.bfloat16)
    attend = partial(causal_padded_attention, pads=pads)
    with_gradients(attend, inputs, grad_output)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(attend, inputs, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _bad(change: dict) -> dict:
    (query, key, value), _ = make_inputs("cpu", lengths=(8, 8), sizes=(16, 16))  # B3 Hq4 Hkv2 L8 S8 E16
    return {"query": query, "key": key, "value": value, "pads": make_pads("right", 8, "cpu"), **change}


@pytest.fixture
def _flash_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flash_attn.cute")
    monkeypatch.setattr(cpf, "_FLASH_FROM", 0)


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
@pytest.mark.parametrize("backend", ["auto", "flash"])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128)])
def test_flash(sizes: tuple[int, int], backend: str, compilations: Callable[[], int]) -> None:
    for length in (300, 384, 1000, 77):
        for padding in PADDING:
            inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(length, length), sizes=sizes)
            check(inputs, grad_output, make_pads(padding, length, "cuda"), backend=backend)
    assert 1 <= compilations() <= 4  # the fourth for a single block, a size that torch compiles in


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
def test_flash_with_pads_that_are_a_view() -> None:
    for pads in views_of_pads("cuda"):
        check(*make_inputs("cuda", torch.bfloat16, lengths=(300, 300)), pads, backend="flash")


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
@pytest.mark.parametrize("side", ["right", "left"])
def test_flash_with_a_promise_of_the_padding_side(side: str) -> None:
    for length in (300, 384):
        pads = make_pads(side, length, "cuda")
        for more in ({}, {"window": 70}):
            inputs = make_inputs("cuda", torch.bfloat16, lengths=(length, length))
            check(*inputs, pads, backend="flash", seen={"padding_side": side, **more})


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
def test_flash_in_a_compiled_model() -> None:
    inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(300, 300))
    pads = make_pads("right", 300, "cuda")

    def model(*inputs: Tensor) -> Tensor:
        return causal_padded_attention(*(x * 2 for x in inputs), pads) + 1

    compiled = torch.compile(model, fullgraph=True)
    for result, expected in zip(
        *(with_gradients(way, inputs, grad_output) for way in (compiled, model)), strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "flash"),
    [
        ({}, True),
        ({"lengths": (511, 511)}, False),
        ({"lengths": (300, 300), "side": "right"}, True),
        ({"lengths": (150, 150), "side": "right"}, False),
        ({"lengths": (256, 1024)}, False),
        ({"dtype": torch.float32}, False),
        ({"sizes": (64, 256)}, False),
        ({"BLOCK_SIZE": 256}, False),
        ({"deterministic": True}, False),
        ({"installed": False}, False),
        ({"mod": soft_cap}, False),
        ({"lse": True}, False),
    ],
)
def test_when_auto_takes_flash(change: dict, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, deterministic = change.pop("installed", True), change.pop("deterministic", False)
    BLOCK_SIZE, mod, lse = change.pop("BLOCK_SIZE", 128), change.pop("mod", None), change.pop("lse", False)
    options = {"BLOCK_SIZE": BLOCK_SIZE, "padding_side": change.pop("side", None)}
    monkeypatch.setattr(cpf, "_FLASH_FROM", 3 * 4 * 512 * 512 * 64)
    monkeypatch.setattr(cpf, "_HAS_FLASH", installed)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: deterministic)
    (query, key, value), _ = make_inputs("cpu", **{"dtype": torch.bfloat16, "lengths": (512, 512), **change})
    pads = torch.zeros(3, key.shape[2], dtype=torch.bool)
    block_mask = block_mask_of(pads, query.shape[2], **options)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    faster = _is_faster_with_flash(query, key, block_mask)
    assert (faster and _can_use_flash(query, key, value, mod, lse)) == flash


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
def test_flash_with_window_and_documents() -> None:
    for length in (300, 384):
        for padding in ("right", "left", "holes"):
            pads = make_pads(padding, length, "cuda")
            for seen in (
                {"window": 100},
                {"documents": make_documents(pads), "window": 150, "causal": False},
                *(options(pads) for options in OPTIONS.values()),
            ):
                inputs = make_inputs("cuda", torch.bfloat16, lengths=(length, length))
                check(*inputs, pads, backend="flash", seen=seen)


@pytest.mark.parametrize(
    "change",
    [
        {"installed": False},
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"hip": "7.0"},
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"sizes": (36, 64)},
        {"sizes": (64, 192)},
        {"lengths": (4, 8)},
        {"mods": {"score_mod": soft_cap}},
        {"mods": {"return_lse": True}},
        {},
    ],
)
def test_what_flash_needs(change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, change = not change, dict(change)
    monkeypatch.setattr(cpf, "_HAS_FLASH", change.pop("installed", True))
    monkeypatch.setattr(torch.version, "hip", change.pop("hip", None))
    capability = change.pop("capability", (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    on_cuda, mods = change.pop("device", "cuda") == "cuda", change.pop("mods", {})
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: on_cuda))
    inputs, _ = make_inputs("cpu", **{"dtype": torch.bfloat16, "lengths": (8, 8), **change})
    if fits:
        assert _can_use_flash(*inputs, None, False)
    else:
        message = 'backend="flash" needs flash-attn-4 .*, a Hopper card, .*; pass "auto"; got query'
        with pytest.raises(ValueError, match=message):
            causal_padded_attention(*inputs, torch.zeros(3, 8, dtype=torch.bool), backend="flash", **mods)


@pytest.mark.parametrize("installed", [True, False])
def test_a_compiled_model_may_ask_what_flash_needs(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpf, "_HAS_FLASH", installed)
    inputs, _ = make_inputs("cpu", lengths=(8, 8))
    ask = torch.compile(
        lambda *x: (x[0] + 1, _can_use_flash(*x, None, False)), fullgraph=True, backend="eager"
    )
    assert ask(*inputs)[1] == _can_use_flash(*inputs, None, False)


def _zeros(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(shape, **kwargs)


_mask = create_causal_padding_block_mask


PADS = _zeros(3, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pads": None},
            TypeError,
            r"pads must be a torch.bool tensor.*torch.arange\(S\) >= lengths.*got pads None",
        ),
        (
            {"pads": _zeros(3, 8, dtype=torch.int64)},
            TypeError,
            "pads must be a torch.bool tensor.*attention_mask == 0.*int64",
        ),
        (
            {"pads": _zeros(8, dtype=torch.bool)},
            ValueError,
            r"pads must be of shape \(B, S\).*got pads \(8,\) ",
        ),
        (
            {"pads": PADS[:2]},
            ValueError,
            r"pads must be of shape \(B, S\), but B is 2 in it and 3 in query.*pads \(2, 8\) ",
        ),
        (
            {"pads": _zeros(3, 9, dtype=torch.bool)},
            ValueError,
            r"pads must be of shape \(B, S\), but S is 9 in it and 8 in key.*pads \(3, 9\) ",
        ),
        ({"pads": PADS.to("meta")}, ValueError, "pads must be on the device of query: move it.*cpu.*meta"),
        ({"pads": PADS[:0]}, ValueError, "pads must be.*no dimension may be empty"),
        (
            {"key": _zeros(2, 2, 8, 16)},
            ValueError,
            r"key must be of shape \(B, Hkv, S, E\).*key \(2, 2, 8, 16\) ",
        ),
        ({"query": _zeros(2, 4, 8, 16)}, ValueError, r"key must be.*B is 3 in it and 2 in query"),
        (
            {"key": _zeros(3, 2, 8, 16).half()},
            TypeError,
            "key must be a floating point tensor of the same dtype as query.*float16",
        ),
        (
            {"value": _zeros(3, 2, 8, 16).double()},
            TypeError,
            "value must be a floating point tensor of the same dtype.*float64",
        ),
        ({"value": _zeros(3, 2, 8, 16, device="meta")}, ValueError, "value must be on the device of query"),
        (
            {"key": _zeros(3, 2, 8, 32)},
            ValueError,
            r"key must be of shape \(B, Hkv, S, E\), but E is 32 in it",
        ),
        ({"value": _zeros(3, 2, 9, 16)}, ValueError, r"value must be of shape \(B, Hkv, S, Ev\), but S is 9"),
        (
            {"value": _zeros(3, 4, 8, 16)},
            ValueError,
            r"value must be of shape \(B, Hkv, S, Ev\), but Hkv is 4",
        ),
        (
            {"query": _zeros(3, 5, 8, 16)},
            ValueError,
            r"heads of query must be a multiple.*query \(3, 5, 8, 16\) ",
        ),
        (
            {"query": _zeros(3, 8, 16)},
            ValueError,
            r"query must be of shape \(B, Hq, L, E\).*query \(3, 8, 16\) ",
        ),
        ({"key": _zeros(3, 8, 16)}, ValueError, r"key must be of shape \(B, Hkv, S, E\)"),
        (
            {"query": _zeros(3, 4, 0, 16)},
            ValueError,
            "query must be.*no dimension may be empty",
        ),
        ({"query": _zeros(0, 4, 8, 16)}, ValueError, "query must be.*no dimension may be empty"),
        (
            {name: _zeros(3, 8, heads, 16) for name, heads in (("query", 4), ("key", 2), ("value", 2))},
            ValueError,
            r"heads must stand before the length: pass x.transpose\(1, 2\)",
        ),
        ({"query": _zeros(3, 4, 9, 16)}, ValueError, "the queries must lie among the keys.*q_len 9"),
        ({"q_len": 8}, TypeError, "multiple values for argument 'q_len'"),
        (
            {"block_mask": _mask(_zeros(3, 9, dtype=torch.bool))},
            ValueError,
            r"block_mask must fit.*\(3, 1, 9, 9, ",
        ),
        (
            {"block_mask": _mask(PADS, 4)},
            ValueError,
            r"block_mask must fit: make it.*block_mask \(3, 1, 4, 8, ",
        ),
        (
            {"block_mask": _mask(PADS[:2])},
            ValueError,
            r"block_mask must fit: make it.*block_mask \(2, 1, 8, 8, ",
        ),
        (
            {"block_mask": _mask(PADS[:1])},
            ValueError,
            r"block_mask must fit: make it.*block_mask \(1, 1, 8, 8, ",
        ),
        (
            {"block_mask": create_block_mask(causal, 3, 3, 8, 8, "cpu")},
            ValueError,
            r"block_mask must fit.*\(3, 3, 8, 8, ",
        ),
        ({"block_mask": _mask(PADS).to("meta")}, ValueError, "block_mask must fit.*'meta'"),
        (
            {"block_mask": _zeros(3, 1, 8, 8)},
            TypeError,
            "block_mask must be a BlockMask, such as.*got.*Tensor",
        ),
        ({"block_mask": None}, TypeError, "block_mask must be a BlockMask, such as.*got.*NoneType"),
        ({"query": _zeros(3, 4, 8, 16).int()}, TypeError, "query must be a floating point tensor.*int32"),
        ({"query": [[1.0]]}, TypeError, r"query must be a floating point tensor.*query \[\[1.0\]\]"),
        ({"causal": False}, TypeError, "unexpected keyword argument 'causal'"),
        ({"documents": PADS.int()}, TypeError, "unexpected keyword argument 'documents'"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale must be a float"),
        ({"scale": "0.5"}, TypeError, "scale must be a float.*'0.5'"),
        ({"score_mod": 3.0}, TypeError, "score_mod must be a function.*got score_mod 3.0"),
        (
            {"score_mod": lambda s, b, h, q, k: s.sum(-1, keepdim=True)},
            ValueError,
            "score_mod must return a score for each pair",
        ),
        (
            {"backend": "cuda"},
            ValueError,
            'backend must be "auto", "triton" or "flash"; got backend \'cuda\'',
        ),
        ({"window": 0}, ValueError, "window must be at least 1"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, error: type[Exception], message: str) -> None:
    given = _bad(change)
    if "block_mask" in given:
        del given["pads"]
    attention = cpf.attend if "block_mask" in given else causal_padded_attention
    with pytest.raises(error, match=message):
        attention(**given)
