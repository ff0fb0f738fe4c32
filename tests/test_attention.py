"""causal_padded_attention: values and gradients, decoding, shapes that change, inputs that do not fit."""

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import DEVICES, assert_as_exact_as_sdpa, exact_attention, explicit_mask, with_gradients
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

import causal_padded_flexattn
from causal_padded_flexattn import (
    _compiled_flex_attention,
    _flash_obstacle,
    _has_flash,
    _is_faster_with_flash,
    _raise_recompile_limit,
    causal,
    causal_padded_attention,
    create_causal_padding_block_mask,
    sdpa_reference,
)

PADDING = ["none", "right", "left", "holes", "empty"]


torch._dynamo.config.recompile_limit = 1000  # of all tests together; past it torch would run flex uncompiled


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
    shapes = [(heads[0], lengths[0], sizes[0]), (heads[1], lengths[1], sizes[0]), (heads[1], lengths[1], sizes[1])]
    inputs = [torch.randn(batch_size, *shape, device=device, dtype=dtype) for shape in shapes]
    return inputs, torch.randn(batch_size, heads[0], lengths[0], sizes[1], device=device, dtype=dtype)


def check(inputs, grad_output, pads, *, causal=True, scale=None, inference=False, **kwargs) -> None:
    """Against float64, as exact as SDPA in the same precision; padded rows exact zeros."""
    query = inputs[0]
    mask = explicit_mask(pads, query.shape[2], causal=causal)
    for grad in (None, grad_output) if inference else (grad_output,):
        ours = with_gradients(
            lambda q, k, v: causal_padded_attention(q, k, v, pads, causal=causal, scale=scale, **kwargs), inputs, grad
        )
        sdpa = with_gradients(lambda q, k, v: sdpa_reference(q, k, v, pads, causal=causal, scale=scale), inputs, grad)
        exact = with_gradients(
            lambda q, k, v: exact_attention(q, k, v, mask, scale), [x.double() for x in inputs], grad
        )
        assert_as_exact_as_sdpa(ours, sdpa, exact)
        q_pads = pads[:, pads.shape[1] - query.shape[2] :]
        for result, rows in zip(ours, (q_pads, q_pads, pads, pads), strict=False):
            assert result.isfinite().all() and result.transpose(1, 2)[rows].count_nonzero() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_padding(device: str, is_causal: bool) -> None:
    for padding in PADDING:
        check(*make_inputs(device), make_pads(padding, 200, device), causal=is_causal, inference=True)


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
        check(*make_inputs(device, dtype, lengths=(300, 300)), make_pads(padding, 300, device), inference=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(32, 32), (64, 64), (128, 128), (256, 256), (64, 32), (32, 64)])
def test_head_sizes(device: str, sizes: tuple[int, int]) -> None:
    for padding in ("right", "left"):
        check(*make_inputs(device, torch.bfloat16, sizes=sizes), make_pads(padding, 200, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2)])
def test_heads(device: str, heads: tuple[int, int]) -> None:
    check(*make_inputs(device, heads=heads), make_pads("right", 200, device))


@pytest.mark.parametrize("device", DEVICES)
def test_scale(device: str) -> None:
    check(*make_inputs(device), make_pads("right", 200, device), scale=0.3)


@pytest.mark.parametrize("device", DEVICES)
def test_transposed_views(device: str) -> None:
    inputs, grad_output = make_inputs(device)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not any(x.is_contiguous() for x in views)
    check(views, grad_output.transpose(1, 2).contiguous().transpose(1, 2), make_pads("left", 200, device))


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
    block_mask = create_causal_padding_block_mask(pads)
    for _ in range(2):
        check(*make_inputs(device), pads, block_mask=block_mask)
    both_ways = create_causal_padding_block_mask(pads, causal=False)
    check(*make_inputs(device), pads, causal=False, block_mask=both_ways)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("BLOCK_SIZE", [256, (128, 384)])
def test_blocks_that_reach_past_the_end(BLOCK_SIZE: int | tuple[int, int], is_causal: bool, device: str) -> None:
    """384 is a multiple of the kernel's tiles, not of the blocks; what lies behind must not be read."""
    inputs, grad_output = make_inputs(device, lengths=(512, 512))
    pads = make_pads("right", 512, device)
    for x in (*inputs, grad_output):
        x[:, :, 384:] = 1e4
    pads[:, 384:] = False
    block_mask = create_causal_padding_block_mask(pads[:, :384], causal=is_causal, BLOCK_SIZE=BLOCK_SIZE)
    shorter = [x[:, :, :384] for x in inputs]
    check(shorter, grad_output[:, :, :384], pads[:, :384], causal=is_causal, block_mask=block_mask)


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
        grown = causal_padded_attention(query[:, :, step], key[:, :, : i + 1], value[:, :, : i + 1], pads[:, : i + 1])
        torch.testing.assert_close(grown, whole[:, :, step], rtol=1e-5, atol=1e-5)
        position = torch.tensor(i, device=device) if i % 2 else i
        block_mask = create_causal_padding_block_mask(cache_pads, 1, q_offset=position)
        preallocated = causal_padded_attention(
            query[:, :, step], key_cache, value_cache, cache_pads, block_mask=block_mask
        )
        torch.testing.assert_close(preallocated, whole[:, :, step], rtol=1e-5, atol=1e-5)
    assert whole.shape == (3, 4, length, size)


@pytest.mark.parametrize("device", DEVICES)
def test_chunked_prefill_into_a_preallocated_cache(device: str) -> None:
    (query, key, value), _ = make_inputs(device, lengths=(300, 300))
    pads = make_pads("left", 300, device)
    whole = causal_padded_attention(query, key, value, pads)
    for start, end in ((0, 128), (128, 200), (200, 300)):
        block_mask = create_causal_padding_block_mask(pads, end - start, q_offset=start)
        chunk = causal_padded_attention(query[:, :, start:end], key, value, pads, block_mask=block_mask)
        torch.testing.assert_close(chunk, whole[:, :, start:end], rtol=1e-5, atol=1e-5)


def _poison(inputs: list[Tensor], which: int, q_pads: Tensor, pads: Tensor, poison: float) -> list[Tensor]:
    rows = (q_pads, pads, pads)[which][:, None, :, None]
    return [x.masked_fill(rows, poison) if i == which else x for i, x in enumerate(inputs)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("q_len", "offset"), [(200, None), (70, None), (70, 60)])
def test_safe_padding_lets_nothing_through(device: str, q_len: int, offset: int | None) -> None:
    pads = make_pads("holes", 200, device)
    start = 200 - q_len if offset is None else offset
    q_pads = pads[:, start : start + q_len]
    inputs, grad_output = make_inputs(device, lengths=(q_len, 200))
    block_mask = None if offset is None else create_causal_padding_block_mask(pads, q_len, q_offset=offset)
    attend = partial(causal_padded_attention, pads=pads, block_mask=block_mask, safe_padding=True)
    clean = _poison(_poison(_poison(inputs, 0, q_pads, pads, 0), 1, q_pads, pads, 0), 2, q_pads, pads, 0)
    for grad in (None, grad_output):
        expected = with_gradients(attend, clean, grad)
        for which, poison in itertools.product(range(3), (float("nan"), float("inf"))):
            results = with_gradients(attend, _poison(inputs, which, q_pads, pads, poison), grad)
            for result, truth in zip(results, expected, strict=True):
                assert torch.equal(result, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_without_safe_padding_only_value_reaches_the_output(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, _ = make_inputs(device)
    expected = causal_padded_attention(*inputs, pads)
    for which, name in enumerate(("query", "key", "value")):
        output = causal_padded_attention(*_poison(inputs, which, pads, pads, float("nan")), pads)
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
            return causal_padded_attention(query, key, value.bfloat16(), pads)  # mixed, as after rotary embeddings

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


@pytest.mark.parametrize("device", DEVICES)
def test_part_of_the_heads(device: str) -> None:
    # As a rank of a tensor-parallel model has them: the mask serves any heads.
    pads = make_pads("left", 200, device)
    inputs, grad_output = make_inputs(device)
    attend = partial(causal_padded_attention, pads=pads, block_mask=create_causal_padding_block_mask(pads))
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


class Layer(torch.nn.Module):
    def __init__(self, safe_padding: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(128, 256), torch.nn.Linear(128, 128)
        self.safe_padding = safe_padding

    def forward(self, x: Tensor, pads: Tensor, block_mask=None) -> Tensor:  # (B, S, 128)
        query, key, value = self.qkv(x).split([128, 64, 64], dim=-1)
        query, key, value = (y.unflatten(-1, (-1, 32)).transpose(1, 2) for y in (query, key, value))
        y = causal_padded_attention(query, key, value, pads, block_mask=block_mask, safe_padding=self.safe_padding)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("given_mask", "safe_padding"), [(True, False), (False, True)])
@pytest.mark.parametrize("training", [True, False])
def test_in_a_compiled_model(device: str, given_mask: bool, safe_padding: bool, training: bool) -> None:
    layer = Layer(safe_padding).to(device)
    # The C++ that torch 2.11 and 2.12 write for a lookup in a tensor of dynamic length does not build.
    dynamic = False if device == "cpu" and torch.__version__ < "2.13" else None
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for length in (200, 260, 300):
        pads = make_pads("left", length, device)
        block_mask = create_causal_padding_block_mask(pads) if given_mask else None
        x = torch.randn(3, length, 128, device=device, requires_grad=training)
        with torch.set_grad_enabled(training):
            expected, result = layer(x, pads, block_mask), compiled(x, pads, block_mask)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        if training:
            for ours, theirs in zip(
                *(torch.autograd.grad(y.square().sum(), x) for y in (result, expected)), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


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
def test_decoding_into_a_preallocated_cache_compiles_once(as_tensor: bool, compilations: Callable[[], int]) -> None:
    (query, key, value), _ = make_inputs("cuda", torch.bfloat16, lengths=(1, 512))
    for i in range(32):
        pads = torch.arange(512, device="cuda").expand(3, 512) > i
        offset = torch.tensor(i, device="cuda") if as_tensor else i
        block_mask = create_causal_padding_block_mask(pads, 1, q_offset=offset)
        with torch.no_grad():
            causal_padded_attention(query, key, value, pads, block_mask=block_mask)
    assert compilations() == 1


@pytest.mark.cuda
def test_a_growing_cache_compiles_three_times_at_most(compilations: Callable[[], int]) -> None:
    for length in [*range(2, 20), *range(120, 140), *range(250, 260), 600, 1000]:
        (query, key, value), _ = make_inputs("cuda", torch.bfloat16, lengths=(1, length))
        with torch.no_grad():
            causal_padded_attention(query, key, value, make_pads("left", length, "cuda"))
    assert 1 <= compilations() <= 3


def test_more_kinds_of_input_than_torch_compiles_left_to_itself(
    compilations: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler.config, "recompile_limit", 8)
    for cached in (_compiled_flex_attention, _raise_recompile_limit):
        cached.cache_clear()
    for size in range(16, 16 + 12):
        (query, key, value), _ = make_inputs("cpu", lengths=(8, 8), sizes=(size, size))
        with torch.no_grad():
            causal_padded_attention(query, key, value, make_pads("right", 8, "cpu"))
    assert compilations() == 12


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
    monkeypatch.setattr(causal_padded_flexattn, "_FLASH_FROM", 0)


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
def test_flash_in_a_compiled_model() -> None:
    inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(300, 300))
    pads = make_pads("right", 300, "cuda")

    def model(*inputs: Tensor) -> Tensor:
        return causal_padded_attention(*(x * 2 for x in inputs), pads) + 1

    compiled = torch.compile(model, fullgraph=True)
    for result, expected in zip(*(with_gradients(way, inputs, grad_output) for way in (compiled, model)), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "flash"),
    [
        ({}, True),
        ({"lengths": (511, 511)}, False),
        ({"lengths": (256, 1024)}, False),
        ({"dtype": torch.float32}, False),
        ({"sizes": (64, 256)}, False),
        ({"BLOCK_SIZE": 256}, False),
        ({"deterministic": True}, False),
        ({"installed": False}, False),
    ],
)
def test_when_auto_takes_flash(change: dict, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, deterministic = change.pop("installed", True), change.pop("deterministic", False)
    BLOCK_SIZE = change.pop("BLOCK_SIZE", 128)
    monkeypatch.setattr(causal_padded_flexattn, "_FLASH_FROM", 3 * 4 * 512 * 512 * 64)
    monkeypatch.setattr(causal_padded_flexattn, "_HAS_FLASH", installed)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: deterministic)
    (query, key, value), _ = make_inputs("cpu", **{"dtype": torch.bfloat16, "lengths": (512, 512), **change})
    pads = torch.zeros(3, key.shape[2], dtype=torch.bool)
    block_mask = create_causal_padding_block_mask(pads, query.shape[2], BLOCK_SIZE=BLOCK_SIZE)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    assert _is_faster_with_flash(query, key, value, block_mask) == flash


@pytest.mark.cuda
def test_flash_says_what_it_needs() -> None:
    pads = make_pads("right", 8, "cuda")
    inputs, _ = make_inputs("cuda", lengths=(8, 8))
    needs = (
        r"needs float16 or bfloat16; got torch.float32"
        if causal_padded_flexattn._HAS_FLASH
        else r"needs the package flash-attn-4: pip"
    )
    with pytest.raises(ValueError, match=f'backend="flash" {needs}'):
        causal_padded_attention(*inputs, pads, backend="flash")


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        ({"installed": False}, "the package flash-attn-4: pip install --pre flash-attn-4"),
        ({"capability": (8, 0)}, "a Hopper or Blackwell card"),
        ({"device": "cpu"}, "a Hopper or Blackwell card; query is on cpu"),
        ({"dtype": torch.float32}, "float16 or bfloat16; got torch.float32"),
        ({"sizes": (36, 64)}, "head sizes that are multiples of 8 up to 256; got 36 and 64"),
        ({"sizes": (64, 512)}, "head sizes that are multiples of 8 up to 256; got 64 and 512"),
        ({"sizes": (256, 256), "capability": (10, 0)}, "head sizes that are multiples of 8 up to 128"),
        ({"lengths": (4, 8)}, "as many queries as keys; got 4 and 8"),
        ({}, None),
    ],
)
def test_what_flash_needs(change: dict, needs: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, capability = change.pop("installed", True), change.pop("capability", (9, 0))
    monkeypatch.setattr(causal_padded_flexattn, "_HAS_FLASH", installed)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    on_cuda = change.pop("device", "cuda") == "cuda"
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: on_cuda))
    inputs, _ = make_inputs("cpu", **{"dtype": torch.bfloat16, "lengths": (8, 8), **change})
    obstacle = _flash_obstacle(*inputs)
    assert obstacle is None if needs is None else obstacle.startswith(f"needs {needs}")


@pytest.mark.parametrize(
    ("installed", "obstacle"), [(False, "the package flash-attn-4"), (True, "a Hopper or Blackwell card")]
)
def test_a_compiled_model_may_ask_what_flash_needs(
    installed: bool, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_padded_flexattn, "_HAS_FLASH", installed)
    inputs, _ = make_inputs("cpu", lengths=(8, 8))
    ask = torch.compile(lambda *x: (x[0] + 1, _flash_obstacle(*x)), fullgraph=True, backend="eager")
    assert ask(*inputs)[1].startswith(f"needs {obstacle}")


@pytest.mark.parametrize(
    ("package", "there"), [(None, False), ("version 2", False), ("version 4", True), ("version 4, no cutlass", False)]
)
def test_is_flash_installed(package: str | None, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn" / ("cute" if package and "4" in package else "other")).mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError")  # it is not imported
    if package == "version 4":
        (tmp_path / "cutlass.py").touch()
    monkeypatch.setattr("sys.path", [str(tmp_path)] if package else [])
    importlib.invalidate_caches()
    assert _has_flash() == there


def _zeros(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(shape, **kwargs)


_mask = create_causal_padding_block_mask


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pads": _zeros(3, 8, dtype=torch.int64)}, TypeError, "got torch.int64.*pass attention_mask == 0"),
        ({"pads": _zeros(8, dtype=torch.bool)}, ValueError, r"pads must be \(batch_size, max_seq_len\).*got \(8,\)"),
        ({"pads": _zeros(2, 8, dtype=torch.bool)}, ValueError, r"pads must have one flag for each key.*pads \(2, 8\)"),
        ({"pads": _zeros(3, 9, dtype=torch.bool)}, ValueError, r"pads must have one flag for each key.*pads \(3, 9\)"),
        ({"pads": _zeros(3, 8, dtype=torch.bool, device="meta")}, ValueError, "query is on cpu, pads on meta: move"),
        ({"pads": _zeros(0, 8, dtype=torch.bool)}, ValueError, "neither of them 0"),
        ({"key": _zeros(2, 2, 8, 16)}, ValueError, r"key and value must agree in batch.*key \(2, 2, 8, 16\)"),
        ({"query": _zeros(2, 4, 8, 16)}, ValueError, r"query and key must agree in batch.*query \(2, 4, 8, 16\)"),
        ({"key": _zeros(3, 2, 8, 16).half()}, TypeError, "must share a dtype; got torch.float32, key torch.float16"),
        ({"value": _zeros(3, 2, 8, 16).double()}, TypeError, "share a dtype; got torch.float32, value torch.float64"),
        ({"value": _zeros(3, 2, 8, 16, device="meta")}, ValueError, "value is on meta, pads on cpu"),
        ({"key": _zeros(3, 2, 8, 32)}, ValueError, r"query and key must agree in batch and head size"),
        ({"value": _zeros(3, 2, 9, 16)}, ValueError, r"key and value must agree in batch, heads and length"),
        ({"value": _zeros(3, 4, 8, 16)}, ValueError, r"key and value must agree in batch, heads and length"),
        ({"query": _zeros(3, 5, 8, 16)}, ValueError, r"heads of query must be a multiple.*query \(3, 5, 8, 16\)"),
        (
            {"query": _zeros(3, 8, 16)},
            ValueError,
            r"query must be \(batch, heads, length, head size\).*got \(3, 8, 16\)",
        ),
        ({"key": _zeros(3, 8, 16)}, ValueError, r"key must be \(batch, heads, length, head size\)"),
        ({"query": _zeros(3, 4, 0, 16)}, ValueError, r"none of them 0; got \(3, 4, 0, 16\)"),
        ({"query": _zeros(0, 4, 8, 16)}, ValueError, r"none of them 0; got \(0, 4, 8, 16\)"),
        ({"query": _zeros(3, 4, 9, 16)}, ValueError, "query must not be longer than key"),
        (
            {"block_mask": _mask(_zeros(3, 9, dtype=torch.bool))},
            ValueError,
            r"block_mask must fit: build it.*block_mask \(3, 1, 9, 9\)",
        ),
        (
            {"block_mask": _mask(_zeros(3, 8, dtype=torch.bool), 4)},
            ValueError,
            r"block_mask must fit: build it.*block_mask \(3, 1, 4, 8\)",
        ),
        (
            {"block_mask": _mask(_zeros(2, 8, dtype=torch.bool))},
            ValueError,
            r"block_mask must fit: build it.*block_mask \(2, 1, 8, 8\)",
        ),
        (
            {"block_mask": create_block_mask(causal, 3, 3, 8, 8, "cpu")},
            ValueError,
            r"block_mask must fit: build it.*block_mask \(3, 3, 8, 8\)",
        ),
        ({"backend": "cuda"}, ValueError, 'backend must be "auto", "triton" or "flash"; got \'cuda\''),
    ],
)
def test_inputs_that_do_not_fit(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_padded_attention(**_bad(change))
