"""create_block_mask_from_runs: random runs, and every kind of mask that they describe."""

from typing import Any

import pytest
import torch
from conftest import DEVICES, assert_as_exact, explicit_mask, with_gradients, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import assert_same_block_mask, rows_of_padding, textbook
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from causal_padded_flexattn import attend, create_block_mask_from_runs


def mask_of_runs(first, last, pads: Tensor, query_pads: Tensor, until: Tensor | None = None) -> Tensor:
    """(B, L, S), written out."""
    keys, queries = torch.arange(pads.shape[1]), torch.arange(query_pads.shape[1])
    mask = ~query_pads[:, :, None] & ~pads[:, None, :]
    mask = mask if first is None else mask & (keys >= first[..., :, None])
    mask = mask if last is None else mask & (keys <= last[..., :, None])
    return mask if until is None else mask & (queries[:, None] <= until[:, None, :])


def assert_as_written_out(ours: BlockMask, expected: Tensor, block_size: Any, exact: bool) -> None:
    """The mask at every pair, and tiles: the same ones, or at least those that hold an allowed pair."""
    theirs = textbook(expected, block_size)
    mask = create_mask(ours.mask_mod, expected.shape[0], 1, *expected.shape[1:], "cpu")[:, 0]
    assert torch.equal(mask, expected)
    if exact:
        assert_same_block_mask(ours, theirs)
        return
    assert (ours.to_dense() >= theirs.to_dense()).all()
    for name in ("full_kv", "full_q"):
        counts, indices = getattr(theirs, f"{name}_num_blocks"), getattr(theirs, f"{name}_indices")
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), counts)
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(ours, f"{name}_indices")[listed], indices[listed])


BLOCK_SIZES = [16, 64, 128, (64, 128), (128, 32)]


DTYPES = [torch.int64, torch.int32, torch.int16]


SIDES = ("right", "left", "bits", "runs", "none", "empty")


@st.composite
def runs(draw, q_len: int, kv_len: int, kind: str) -> tuple[list[int], list[int]]:
    """The ends of runs: "own" ones rise and hold the query's place, "touching" ones rise and skip no key."""
    if kind == "any":
        place = st.integers(-40, kv_len + 40)
        small = draw(st.lists(st.tuples(place, place), min_size=1, max_size=40))
        return [small[i * 7 % len(small)][0] for i in range(q_len)], [
            small[i % len(small)][1] for i in range(q_len)
        ]
    steps = draw(st.lists(st.integers(0, draw(st.sampled_from([1, 3, 30]))), min_size=1, max_size=30))
    back, ahead = draw(st.integers(0, 200)), draw(st.integers(0, 200))
    first, last = [], []
    for i in range(q_len):
        if kind == "own":
            first.append(max(i - back - steps[i % len(steps)], first[-1] if first else -(2**40)))
            last.append(max(i + ahead + steps[i * 3 % len(steps)], last[-1] if last else 0))
            first[-1] = min(first[-1], i)
        else:
            begin = first[-1] + steps[i % len(steps)] if first else 0
            begin = min(begin, last[-1] + 1 if last else 0, kv_len - 1)
            first.append(begin)
            last.append(max(begin + steps[i * 5 % len(steps)], last[-1] if last else 0))
    return first, last


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(["own", "own", "touching", "any"]),
    block_size=st.sampled_from(BLOCK_SIZES),
)
def test_random_runs(data: st.DataObject, kind: str, block_size: Any) -> None:
    batch_size, kv_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 400))
    q_len = kv_len if kind == "own" else data.draw(st.integers(1, 400))
    pads = torch.tensor([data.draw(rows_of_padding(kv_len, SIDES)) for _ in range(batch_size)])
    query_pads = pads
    if kind != "own":
        query_pads = torch.tensor([data.draw(rows_of_padding(q_len, SIDES)) for _ in range(batch_size)])
        pads, query_pads = (torch.zeros_like(x) if kind == "touching" else x for x in (pads, query_pads))
    per_row = data.draw(st.booleans())
    ends = [data.draw(runs(q_len, kv_len, kind)) for _ in range(batch_size if per_row else 1)]
    dtype = torch.int64 if kind == "own" else data.draw(st.sampled_from(DTYPES))
    first, last = (torch.tensor([run[i] for run in ends], dtype=dtype) for i in range(2))
    first, last = (x if per_row else x[0] for x in (first, last))
    first = data.draw(st.sampled_from([first, first, None]))
    last = data.draw(st.sampled_from([last, last, None]))
    given_pads = None if kind == "own" and data.draw(st.booleans()) else query_pads
    ours = create_block_mask_from_runs(first, last, pads, query_pads=given_pads, BLOCK_SIZE=block_size)
    assert_as_written_out(ours, mask_of_runs(first, last, pads, query_pads), block_size, kind != "any")


@settings(max_examples=100, deadline=None)
@given(data=st.data(), block_size=st.sampled_from(BLOCK_SIZES))
def test_random_runs_and_until(data: st.DataObject, block_size: Any) -> None:
    q_len, kv_len = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    pads, query_pads = (torch.tensor([data.draw(rows_of_padding(n, SIDES))]) for n in (kv_len, q_len))
    first, last = (torch.tensor(x) for x in data.draw(runs(q_len, kv_len, "any")))
    numbers = data.draw(st.lists(st.integers(-5, q_len + 5) | st.just(2**62), min_size=1, max_size=50))
    until = torch.tensor([[numbers[i % len(numbers)] for i in range(kv_len)]])
    with torch.set_grad_enabled(data.draw(st.booleans())):
        ours = create_block_mask_from_runs(
            first, last, pads, query_pads=query_pads, until=until, BLOCK_SIZE=block_size
        )
    expected = mask_of_runs(first, last, pads, query_pads, until)
    mask = create_mask(ours.mask_mod, 1, 1, q_len, kv_len, "cpu")[:, 0]
    assert torch.equal(mask, expected)
    assert (ours.to_dense() >= textbook(expected, block_size).to_dense()).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ends_as_far_away_as_can_be(dtype: torch.dtype) -> None:
    """What would overflow, if it were not cut off."""
    pads = torch.zeros(2, 300, dtype=torch.bool)
    pads[0, 100:] = pads[1, :200] = True
    far = torch.full((300,), torch.iinfo(dtype).max, dtype=dtype)
    for first, last in ((-far - 1, far), (-far, far), (far, -far - 1), (far, far), (-far, -far)):
        ours = create_block_mask_from_runs(first, last, pads)
        sees = bool(first[0] < 0 < last[0])
        assert_as_written_out(ours, explicit_mask(pads, causal=False) & sees, 128, exact=True)


PLACES, N = torch.arange(200), 37


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integers_of_any_type(device: str, dtype: torch.dtype) -> None:
    numbers = torch.arange(120, device=device).expand(2, -1) // 40 * 40 + 39  # until: the end of its forty
    pads = torch.rand(2, 120, device=device) < 0.2
    given = {"first": None, "last": None, "until": None, "BLOCK_SIZE": 16}
    for name in ("first", "last", "until"):
        plain = create_block_mask_from_runs(pads=pads, **{**given, name: numbers})
        small = create_block_mask_from_runs(pads=pads, **{**given, name: numbers.to(dtype)})
        assert_same_block_mask(small, plain)


PADS = {
    "none": torch.zeros(3, 200, dtype=torch.bool),
    "right": torch.stack([n <= PLACES for n in (200, 120, 5)]),
    "left": torch.stack([n > PLACES for n in (0, 80, 195)]),
    "holes": torch.stack([n == PLACES % 7 for n in (0, 3, 20)]),
}


QUERY, CHUNK = PLACES[:, None], PLACES // N
DOCUMENTS = (PLACES // torch.tensor([[20], [37], [64]])) * 7 % 5  # in any order, and different in each row
BEGINS = DOCUMENTS.diff(dim=1, prepend=DOCUMENTS[:, :1] - 1) != 0
NUMBER = BEGINS.cumsum(1)
IS_CAUSAL = QUERY >= PLACES
# First, with place as last, and the mask it must be, less padding: (B or 1, S, S).
RECIPES: dict[str, tuple[Tensor | None, Tensor]] = {
    "causal": (None, IS_CAUSAL),
    "window": (PLACES - N + 1, IS_CAUSAL & (QUERY - PLACES < N)),
    "packed, by position_ids that restart": (PLACES - PLACES % N, IS_CAUSAL & (CHUNK[:, None] == CHUNK)),
    "packed, by numbers of documents": (
        torch.where(BEGINS, PLACES, 0).cummax(1).values,
        IS_CAUSAL & (NUMBER[:, :, None] == NUMBER[:, None, :]),
    ),
}


@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_recipes(name: str, padding: str, block_size: int) -> None:
    pads, (first, mask) = PADS[padding], RECIPES[name]
    expected = mask & ~pads[:, :, None] & ~pads[:, None, :]
    ours = create_block_mask_from_runs(first, PLACES, pads, BLOCK_SIZE=block_size)
    assert_as_written_out(ours, expected, block_size, exact=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
def test_values_and_gradients(name: str, device: str) -> None:
    """Against float64, as exact as plain PyTorch in the same precision."""
    like = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    for padding, pads in PADS.items():
        first, mask = RECIPES[name]
        expected = (mask & ~pads[:, :, None] & ~pads[:, None, :]).to(device)
        ends = [x if x is None else x.to(device) for x in (first, PLACES)]
        ours = create_block_mask_from_runs(*ends, pads.to(device))
        *inputs, grad = torch.randn(4, 3, 2, 200, 64, **like)
        results = with_gradients(lambda *x, mask=ours: attend(*x, mask), inputs, grad)
        wide = [x.double() for x in inputs]
        plain, exact = (
            with_gradients(lambda *x, mask=expected: written_out(*x, mask)[0], tensors, grad.to(tensors[0]))
            for tensors in (inputs, wide)
        )
        assert_as_exact(results, plain, exact)
        assert not results[0].transpose(1, 2)[~expected.any(-1)].any(), padding


def test_cross_attention() -> None:
    for pads in PADS.values():
        query_pads = torch.arange(90) >= torch.tensor([[90], [20], [1]])
        ours = create_block_mask_from_runs(None, None, pads, query_pads=query_pads)
        assert_as_written_out(ours, ~query_pads[:, :, None] & ~pads[:, None, :], 128, exact=True)
