"""Under deterministic algorithms a sequence gets the same bits, whatever shares its batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import explicit_mask, view_of_tokens, written_out
from torch import Tensor

import causal_padded_flexattn
from causal_padded_flexattn import (
    _attend_in_plain_operators,
    _decoding_options,
    _fill_blocks,
    _is_view_of_tokens,
    causal_padded_attention,
    create_causal_padding_block_mask,
)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Place:
    """Where the sequence stands: which row of how large a batch, and behind how much padding."""

    batch_size: int
    row: int
    kv_len: int
    left: int = 0


def random(seed: int, *shape: int, dtype: torch.dtype, device: str = "cuda") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


def pads_of(place: Place, length: int) -> Tensor:
    """The others are of any length, padded on the side that the sequence is."""
    generator = torch.Generator().manual_seed(place.batch_size + place.kv_len)
    lengths = torch.randint(1, place.kv_len + 1, (place.batch_size, 1), generator=generator)
    places = torch.arange(place.kv_len)
    pads = places < place.kv_len - lengths if place.left else places >= lengths
    pads[place.row] = (places < place.left) | (places >= place.left + length)
    return pads.cuda()


def seen(kind: str, place: Place, length: int) -> dict[str, Any]:
    """The options of the mask; those that are tensors count from where the sequence begins."""
    if kind == "window":
        return {"window": 100}
    if kind in ("plain", "views", "views of a contiguous gradient", "score_mod"):
        return {}
    inside = torch.arange(place.kv_len) - place.left
    values = {
        "documents": inside.clamp(min=0) // 53,
        "spans": torch.where(inside < 0, inside, inside // 77),
        "until": place.left + torch.where(inside % 3 == 0, inside + 40, place.kv_len),
    }[kind]
    return {kind: values.repeat(place.batch_size, 1).cuda()}


def alibi() -> Any:
    slopes = torch.linspace(0.1, 1, 16, device="cuda")
    return lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)


def results(kind: str, tensors: list[Tensor], place: Place, length: int, lse: bool) -> list[Tensor]:
    """Of the sequence: output, gradients and, if asked for, log-sum-exp."""
    end, batch = place.left + length, []
    for i, x in enumerate(tensors):
        shape = (place.batch_size, x.shape[0], place.kv_len, x.shape[2])
        filled = random(100 * place.batch_size + i, *shape, dtype=x.dtype)
        is_view = kind == "views" or (kind == "views of a contiguous gradient" and i < 3)  # as in models
        if is_view and place.batch_size > 1:  # it gets the bits of a contiguous sequence
            filled = view_of_tokens(filled)
        filled[place.row, :, place.left : end] = x[:, :length]
        batch.append(filled)
    pads = pads_of(place, length)
    query, key, value = (x.requires_grad_() for x in batch[:3])
    options = seen(kind, place, length)
    if kind == "score_mod":
        options["score_mod"] = alibi()
    if lse:
        options["return_lse"] = True
    result = causal_padded_attention(query, key, value, pads, **options)
    output, *rest = result if lse else (result,)
    gradients = torch.autograd.grad(output, (query, key, value), batch[3])
    return [x[place.row, :, place.left : end].detach().clone() for x in (output, *gradients, *rest)]


CASES = [
    *(("plain", torch.bfloat16, heads) for heads in ((16, 4, 128), (4, 4, 64), (8, 8, 96), (8, 2, 256))),
    ("plain", torch.float16, (8, 2, 64)),
    ("plain", torch.float32, (4, 2, 64)),
    *((kind, torch.bfloat16, (8, 2, 128)) for kind in ("window", "documents", "spans", "until", "score_mod")),
    ("window", torch.bfloat16, (8, 2, 64)),
    *(("views", torch.bfloat16, heads) for heads in ((8, 2, 64), (8, 2, 128), (32, 8, 256))),
    ("views of a contiguous gradient", torch.bfloat16, (8, 2, 64)),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "dtype", "heads"), CASES, ids=lambda x: str(x).replace("torch.", ""))
def test_whole_sequences(kind: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    q_heads, kv_heads, size = heads
    tensors = [random(i, h, 700, size, dtype=dtype) for i, h in enumerate((q_heads, kv_heads, kv_heads))]
    tensors.append(random(3, q_heads, 700, size, dtype=dtype))
    for length in (1, 16, 100, 128, 300, 700):
        alone = Place(1, 0, length)
        others = [
            *(Place(1, 0, length + 1), Place(2, 1, length), Place(3, 0, length + -length % 128)),
            *(Place(17, 11, 900), Place(5, 2, 1024), Place(8, 7, 1000)),
            *(Place(2, 0, length + 128, left=128), Place(4, 3, length + 384, left=384)),
        ]
        # Of two cases, because each asks for kernels of its own.
        asks = kind == "plain" and dtype == torch.bfloat16 and size in (64, 128) and length > 1
        for lse in (False, True) if asks else (False,):
            expected = results(kind, tensors, alone, length, lse)
            for place in others:
                for name, x, y in zip(
                    ("output", "query gradient", "key gradient", "value gradient", "log-sum-exp"),
                    results(kind, tensors, place, length, lse),
                    expected,
                    strict=False,
                ):
                    assert torch.equal(x, y), f"{name} of {length} tokens at {place}"


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 16, 64), (2, 1, 64)])
@pytest.mark.parametrize(("queries", "before"), [(1, None), (4, None), (4, 7)])
@torch.no_grad()
def test_decoding(heads: tuple[int, int, int], queries: int, before: int | None) -> None:
    """At batch sizes for which the keys would be split otherwise, and in caches of three capacities.

    After steps of another number of queries, this number is a variable of the kernels.
    """
    q_heads, kv_heads, size = heads
    torch.compiler.reset()
    if before:
        counts = ((q_heads, before), (kv_heads, 700), (kv_heads, 700))
        inputs = [random(0, 1, h, n, size, dtype=torch.bfloat16) for h, n in counts]
        causal_padded_attention(*inputs, torch.zeros(1, 700, dtype=torch.bool, device="cuda"))
    shapes = ((q_heads, queries), (kv_heads, 700), (kv_heads, 700))
    tensors = [random(i, h, n, size, dtype=torch.bfloat16) for i, (h, n) in enumerate(shapes)]
    expected = None
    for place in (
        *(Place(1, 0, 768), Place(1, 0, 4096), Place(2, 1, 1000)),
        *(Place(17, 9, 1000), Place(40, 3, 1000), Place(3, 2, 2048, left=128)),
    ):
        end = place.left + 700
        batch = [
            random(i, place.batch_size, x.shape[0], n, size, dtype=x.dtype)
            for i, (x, n) in enumerate(zip(tensors, (queries, place.kv_len, place.kv_len), strict=True))
        ]
        batch[0][place.row] = tensors[0]
        for filled, x in zip(batch[1:], tensors[1:], strict=True):
            filled[place.row, :, place.left : end] = x
        pads = torch.zeros(place.batch_size, place.kv_len, dtype=torch.bool, device="cuda")
        pads[:, end:] = True  # not written yet
        pads[place.row, : place.left] = True
        offset = torch.tensor(end - queries, device="cuda")
        block_mask = create_causal_padding_block_mask(pads, queries, q_offset=offset)
        output = causal_padded_attention(*batch, pads, block_mask=block_mask)
        both = causal_padded_attention(*batch, pads, block_mask=block_mask, return_lse=True)
        found = [x[place.row].clone() for x in (output, *both)]
        expected = expected or found
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(x, y), f"result {i} at {place}"


@pytest.mark.cuda
def test_in_a_graph_of_the_caller() -> None:
    """It is filled up there, too; its bits are for that compilation to decide."""
    compiled = torch.compile(causal_padded_attention, fullgraph=True)
    for length, is_view in ((300, False), (300, True), (384, True)):
        inputs = random(0, 3, 2, 4, length, 64, dtype=torch.bfloat16)
        inputs = view_of_tokens(inputs) if is_view else inputs
        inputs.requires_grad_()
        pads = torch.arange(length, device="cuda") >= torch.tensor([[length], [90]], device="cuda")
        found = []
        for attention in (compiled, causal_padded_attention):
            output = attention(*inputs, pads, score_mod=alibi())
            found.append((output, *torch.autograd.grad(output, inputs, torch.ones_like(output))))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_the_split_does_not_follow_the_batch() -> None:
    splits = set()
    for batch_size in (1, 7, 40):
        query, key = torch.empty(batch_size, 8, 1, 64), torch.empty(batch_size, 4, 1000, 64)
        options = _decoding_options(query, key, key, None)
        assert options
        splits.add(options["SPLIT_KV"])
    assert len(splits) == 1


@pytest.mark.parametrize("block", [16, 128, (64, 32)])
@pytest.mark.parametrize("kind", ["causal", "both", "window", "until", "cross"])
def test_what_is_filled_up_is_not_seen(block: Any, kind: str) -> None:
    """What the kernels compute, in plain operators: neither the mask nor the score_mod reaches the zeros."""
    length, options = 150, dict[str, Any]()
    pads = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 0.3
    if kind == "cross":
        options = {"causal": False, "query_pads": pads.flip(1)}
    elif kind == "until":
        options = {"until": (torch.arange(length) + 9).repeat(3, 1)}
    elif kind != "causal":
        options = {"causal": kind == "window", "window": 20 if kind == "window" else None}
    query, key, value = (random(i, 3, 2, length, 16, dtype=torch.float64, device="cpu") for i in range(3))
    bias = random(4, 3, 2, length, length, dtype=torch.float64, device="cpu")
    score_mod = lambda score, b, h, q_idx, kv_idx: score + bias[b, h, q_idx, kv_idx]
    block_mask = create_causal_padding_block_mask(pads, BLOCK_SIZE=block, **options)
    *filled, modifies, filled_mask = _fill_blocks(query, key, value, score_mod, block_mask)
    q_block, kv_block = block if isinstance(block, tuple) else (block, block)
    assert filled[0].shape[2] == filled_mask.shape[2] == length + -length % q_block
    assert filled[1].shape[2] == filled_mask.shape[3] == length + -length % kv_block
    rows, columns = (torch.arange(x.shape[2]) for x in filled[:2])
    inside = bias[0, 0, rows.clamp(max=length - 1)][:, columns.clamp(max=length - 1)]
    b = h = torch.zeros((), dtype=torch.long)
    assert torch.equal(modifies(torch.zeros(()), b, h, rows[:, None], columns), inside)
    output = _attend_in_plain_operators(*filled, modifies, filled_mask, None, False)[:, :, :length]
    expected, _ = written_out(query, key, value, explicit_mask(pads, **options), score_mod=score_mod)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("length", [1, 100, 128])
@pytest.mark.parametrize(
    ("order", "is_view"), [("bhle", False), ("blhe", True), ("lbhe", False), ("bleh", False)]
)
def test_the_query_is_laid_out_alike(
    order: str, is_view: bool, length: int, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At lengths that are filled up and at one that is not; before torch 2.15 it is always contiguous."""
    monkeypatch.setattr(causal_padded_flexattn, "_SUMS_VIEWS_ALIKE", keeps)
    sizes = {"b": 2, "h": 3, "l": length, "e": 16}
    memory = random(0, *(sizes[x] for x in order), dtype=torch.float32, device="cpu")
    x = memory.permute(*(order.index(x) for x in "bhle"))
    pads = torch.zeros(2, length, dtype=torch.bool)
    filled = _fill_blocks(x, x, x, None, create_causal_padding_block_mask(pads))[:3]
    for y in filled:
        assert torch.equal(y[:, :, :length], x) and y[:, :, length:].count_nonzero() == 0
    assert _is_view_of_tokens(filled[0]) == (is_view and keeps)
    assert (filled[0].transpose(1, 2) if is_view and keeps else filled[0]).is_contiguous()


def test_a_promise_about_padding_changes_nothing() -> None:
    pads = torch.arange(200) >= torch.tensor([[200], [90]])
    promised = create_causal_padding_block_mask(pads, padding_side="right")
    other = create_causal_padding_block_mask(pads)
    assert promised.mask_mod.__code__ is other.mask_mod.__code__
    assert torch.equal(promised.kv_indices, other.kv_indices)
    assert not promised.mask_mod.is_computed
