"""Under deterministic algorithms a sequence gets the same bits in any batch of whole blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from conftest import block_mask_of, view_of_tokens
from torch import Tensor

import causal_padded_flexattn
from causal_padded_flexattn import (
    _decoding_options,
    attend,
    causal_padded_attention,
    create_causal_padding_block_mask,
)

EXAMPLE = run_path(str(Path(__file__).parent.parent / "examples" / "same_bits.py"))


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


promised = pytest.mark.skipif(
    torch.cuda.is_available() and causal_padded_flexattn._TORCH < (2, 15),
    reason="promised from torch 2.15 on",
)


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
    if kind == "padding_side":
        return {"padding_side": "left" if place.left else "right"}
    inside = torch.arange(place.kv_len) - place.left
    values = {
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
    more: dict[str, Any] = {"score_mod": alibi()} if kind == "score_mod" else {}
    result = attend(query, key, value, block_mask_of(pads, **options), return_lse=lse, **more)
    output, *rest = result if lse else (result,)
    gradients = torch.autograd.grad(output, (query, key, value), batch[3])
    return [x[place.row, :, place.left : end].detach().clone() for x in (output, *gradients, *rest)]


KINDS = ("window", "spans", "until", "score_mod", "padding_side")
CASES = [
    *(("plain", torch.bfloat16, heads) for heads in ((16, 4, 128), (4, 4, 64), (8, 8, 96), (8, 2, 256))),
    ("plain", torch.float16, (8, 2, 64)),
    ("plain", torch.float32, (4, 2, 64)),
    *((kind, torch.bfloat16, (8, 2, 128)) for kind in KINDS),
    ("window", torch.bfloat16, (8, 2, 64)),
    *(("views", torch.bfloat16, heads) for heads in ((8, 2, 64), (8, 2, 128), (32, 8, 256))),
    ("views of a contiguous gradient", torch.bfloat16, (8, 2, 64)),
]


@promised
@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "dtype", "heads"), CASES, ids=lambda x: str(x).replace("torch.", ""))
def test_whole_sequences(kind: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    q_heads, kv_heads, size = heads
    tensors = [random(i, h, 700, size, dtype=dtype) for i, h in enumerate((q_heads, kv_heads, kv_heads))]
    tensors.append(random(3, q_heads, 700, size, dtype=dtype))
    for length in (1, 16, 100, 128, 300, 700):
        end = length + -length % 128
        alone = Place(1, 0, end)
        others = [
            *(Place(1, 0, end + 128), Place(2, 1, end), Place(3, 0, end + 256)),
            *(Place(17, 11, 896), Place(5, 2, 1024), Place(8, 7, 1024)),
        ]
        if kind != "padding_side" or length == end:  # which promises that padding stands on one side only
            others += [Place(2, 0, end + 128, left=128), Place(4, 3, end + 384, left=384)]
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


@promised
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("heads", "queries", "before"),
    [
        *(((32, 8, 128), *steps) for steps in ((1, None), (4, None), (4, 7))),
        ((16, 16, 64), 1, None),
        ((2, 1, 64), 4, 7),
    ],
)
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
        output = attend(*batch, block_mask)
        both = attend(*batch, block_mask, return_lse=True)
        found = [x[place.row].clone() for x in (output, *both)]
        expected = expected or found
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(x, y), f"result {i} at {place}"


@promised
@pytest.mark.cuda
def test_in_a_graph_of_the_caller() -> None:
    """Its bits are for that compilation to decide."""
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


def test_the_split_does_not_follow_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_padded_flexattn, "_TORCH", (2, 15))
    splits = set()
    for batch_size in (1, 7, 40):
        query, key = torch.empty(batch_size, 8, 1, 64), torch.empty(batch_size, 4, 1000, 64)
        options = _decoding_options(query, key, key, None)
        assert options
        splits.add(options["SPLIT_KV"])
    assert len(splits) == 1


def test_flash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_padded_flexattn, "_can_use_flash", lambda *_: True)
    inputs, pads = torch.zeros(3, 2, 1, 128, 16), torch.zeros(2, 128, dtype=torch.bool)
    with pytest.raises(ValueError, match=r'backend="flash" adds gradients up in any order: .* pass "auto"'):
        causal_padded_attention(*inputs, pads, backend="flash")


KINDS = [  # of heads and dtype
    *((size, torch.bfloat16) for size in (64, 96, 128, 256)),
    *((128, torch.float16), (64, torch.float32)),
]


@promised
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("size", "dtype", "is_deterministic"), [*((*kind, False) for kind in KINDS), (128, torch.bfloat16, True)]
)
def test_chunks_of_whole_blocks_have_the_bits_of_the_whole_pass(
    size: int, dtype: torch.dtype, is_deterministic: bool
) -> None:
    torch.use_deterministic_algorithms(is_deterministic)
    length = 1024
    query, key, value = (random(i, 4, heads, length, size, dtype=dtype) for i, heads in enumerate((8, 2, 2)))
    how: dict[str, Any] = {"return_lse": True, "backend": "triton"}
    for left in (0, 256):
        pads = pads_of(Place(4, 1, length, left), 700)
        for window in (None, 300):
            mask = create_causal_padding_block_mask(pads, window=window)
            whole = attend(query, key, value, mask, **how)
            for chunk in (128, 256, 512):
                for start in range(0, length, chunk):
                    mask = create_causal_padding_block_mask(pads, chunk, q_offset=start, window=window)
                    part = attend(query[:, :, start : start + chunk], key, value, mask, **how)
                    for result, expected in zip(part, whole, strict=True):
                        assert torch.equal(result, expected[:, :, start : start + chunk])


@promised
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("size", "dtype", "rows"),
    [
        *((*kind, 128) for kind in KINDS),
        *((size, dtype, 64) for size in (64, 128) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_a_step_has_the_bits_of_training(size: int, dtype: torch.dtype, rows: int) -> None:
    """The query heads that share a key head are rows of one block, in other batches and other caches."""
    length = 1024
    query, key, value = (random(i, 4, heads, length, size, dtype=dtype) for i, heads in enumerate((8, 2, 2)))
    pads = torch.zeros(4, length, dtype=torch.bool, device="cuda")
    pads[1, :128], pads[3, :200] = True, True
    training = attend(query, key, value, create_causal_padding_block_mask(pads))
    for chosen, capacity in (([0, 1, 2, 3], 1024), ([1], 1024), ([1, 3], 1536)):
        cache = [torch.randn(len(chosen), 2, capacity, size, device="cuda").to(dtype) for _ in range(2)]
        known = torch.zeros(len(chosen), capacity, dtype=torch.bool, device="cuda")
        known[:, :length] = pads[chosen]
        for place in (130, 201, 256, 511, 700, 1023):
            for x, whole in zip(cache, (key, value), strict=True):
                x[:, :, : place + 1] = whole[chosen, :, : place + 1]
            mask = EXAMPLE["mask_of_training"](place, 4, known, rows)
            step = EXAMPLE["step_of_training"](query[chosen, :, place, None], *cache, mask)[:, :, 0]
            real = ~pads[chosen, place]
            assert torch.equal(step[real], training[chosen, :, place][real])


@pytest.mark.parametrize("place", [0, 127, 128, 201, 383])
def test_the_tiles_of_a_step_are_those_of_training(place: int) -> None:
    pads = torch.arange(384) < torch.tensor([[0], [128], [200]])
    step, block, real = EXAMPLE["mask_of_training"](place, 4, pads), place // 128, ~pads[:, place]
    training = create_causal_padding_block_mask(pads)
    for kind in ("kv", "full_kv"):
        count = getattr(training, f"{kind}_num_blocks")[real, :, block, None]
        assert torch.equal(getattr(step, f"{kind}_num_blocks")[real], count)
        listed = torch.arange(3) < count[..., None]
        found, expected = (getattr(x, f"{kind}_indices")[real] for x in (step, training))
        assert torch.equal(found[listed], expected[:, :, block, None][listed])
