"""Few queries: decoding steps, caches, prefill in chunks, on the CPU and on CUDA."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import (
    DEVICES,
    assert_as_exact,
    block_mask_of,
    exact_attention,
    explicit_mask,
    with_gradients,
    written_out,
)
from helpers import capture, make_inputs, make_pads, make_spans, make_until, masked_sdpa
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import causal_padded_flexattn as cpf
from causal_padded_flexattn import causal_padded_attention


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


@pytest.mark.parametrize(
    ("device", "padding"),
    [("cpu", "left"), ("cpu", "right"), pytest.param("cuda", "right", marks=pytest.mark.cuda)],
)
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
    ("heads", "dtype", "sizes"),
    [
        ((8, 2), torch.bfloat16, (192, 128)),
        ((14, 2), torch.float16, (24, 40)),
        ((24, 1), torch.bfloat16, (192, 128)),
        ((32, 1), torch.float16, (24, 40)),
        ((32, 1), torch.float32, (72, 64)),
    ],
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
def test_a_growing_cache_compiles_three_times_at_most(compilations: Callable[[], int]) -> None:
    for length in [*range(2, 20), *range(120, 140), *range(250, 260), 600, 1000]:
        (query, key, value), _ = make_inputs("cuda", torch.bfloat16, 16, lengths=(1, length))
        with torch.no_grad():
            causal_padded_attention(query, key, value, make_pads("left", length, "cuda", 16))
    assert 1 <= compilations() <= 3  # for one tile, and two key heads of two tiles, again


@pytest.mark.cuda
def test_no_timing_decides_how_decoding_adds_up_its_splits(compilations: Callable[[], int]) -> None:
    """It decided for what took three times as long, in one process of two."""
    with fresh_cache(), torch.no_grad():
        inputs, _ = make_inputs("cuda", torch.bfloat16, lengths=(1, 600))
        causal_padded_attention(*inputs, make_pads("left", 600, "cuda"))
    assert compilations() == 1
    assert not [name for name in counters["inductor"] if name.startswith("benchmarking")]


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


def test_into_how_many_parts_decoding_splits_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the whole card, and no more than one of 64 keys each needs."""
    monkeypatch.setattr(cpf, "_is_on_hopper", lambda x: True)
    parts = {}
    for batch_size in (1, 2, 8, 32, 128, 1024):
        for kv_heads in (1, 8):
            query, key = torch.empty(batch_size, 8, 1, 64), torch.empty(batch_size, kv_heads, 4096, 64)
            options = cpf._decoding_options(query, key, key, None)
            programs = batch_size * kv_heads * options["SPLIT_KV"]
            assert options["SPLIT_KV"] in (1, 32) or 512 <= programs <= 1024
            parts[batch_size * kv_heads] = options["SPLIT_KV"]
    ordered = [parts[n] for n in sorted(parts)]
    assert ordered == sorted(ordered, reverse=True) and ordered[0] == 32 and ordered[-1] == 1
