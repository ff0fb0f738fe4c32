"""The textbook, and the block mask in closed form, which is the one that create_block_mask finds."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import DEVICES, assert_as_exact, block_mask_of, exact_attention, explicit_mask, with_gradients
from helpers import looks_up, make_inputs, make_pads, masked_sdpa
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
)

from causal_padded_flexattn import (
    _origin_of,
    causal,
    create_block_mask_from_runs,
    create_causal_padding_block_mask,
    create_padding_mask,
    textbook_attention,
)

# # is a padded token of the sequence, 1 in a row below it a score that is computed.
CASES = {
    "no padding": ("....", "1... 11.. 111. 1111"),
    "right": ("..##", "1... 11.. .... ...."),
    "left": ("##..", ".... .... ..1. ..11"),
    "both sides": ("#..#", ".... .1.. .11. ...."),
    "hole": (".#..", "1... .... 1.1. 1.11"),
    "empty sequence": ("####", ".... .... .... ...."),
    "length one": (".###", "1... .... .... ...."),
}


def _bits(text: str, one: str) -> torch.Tensor:
    return torch.tensor([[c == one for c in row] for row in text.split()])


def test_padding_alone_looks_both_ways() -> None:
    mask = create_mask(create_padding_mask(_bits(".#..", "#")), 1, 1, 4, 4, "cpu")
    assert torch.equal(mask[0, 0], _bits("1.11 .... 1.11 1.11", "1"))


def test_causal_alone() -> None:
    mask = create_mask(causal, 1, 1, 3, 5, "cpu")
    assert torch.equal(mask[0, 0], _bits("1.... 11... 111..", "1"))


def test_each_sequence_has_its_own_padding() -> None:
    pads = torch.cat([_bits(pads, "#") for pads, _ in CASES.values()])
    mask = create_mask(and_masks(causal, create_padding_mask(pads)), len(CASES), 1, 4, 4, "cpu")
    assert torch.equal(mask[:, 0], torch.stack([_bits(expected, "1") for _, expected in CASES.values()]))


@pytest.mark.parametrize("device", DEVICES)
def test_the_textbook(device: str) -> None:
    """Its values and, where flex has them, gradients; a mask that is shared; few compilations."""
    counters.clear()
    pads = make_pads("left", 256, device)
    block_mask = create_block_mask(
        and_masks(causal, create_padding_mask(pads)), 3, None, 256, 256, device=device
    )
    mask = explicit_mask(pads)
    for shared in (None, block_mask, None):
        inputs, grad = make_inputs(device, lengths=(256, 256))
        grad = grad if device == "cuda" else None
        results = with_gradients(lambda *x, m=shared: textbook_attention(*x, pads, m), inputs, grad)
        own = with_gradients(lambda *x: masked_sdpa(*x, mask, None), inputs, grad)
        wide = [x.double() for x in inputs]
        exact = with_gradients(lambda *x: exact_attention(*x, mask), wide, grad)
        assert_as_exact(results, own, exact)
        assert not results[0].transpose(1, 2)[pads].any()
    assert counters["stats"]["unique_graphs"] <= 2  # with gradients, and uncompiled flex's own


LISTS = ["kv", "full_kv", "q", "full_q"]


def assert_same_block_mask(ours: BlockMask, theirs: BlockMask) -> None:
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in LISTS:
        counts, indices = getattr(ours, f"{name}_num_blocks"), getattr(ours, f"{name}_indices")
        their_counts, their_indices = (
            getattr(theirs, f"{name}_num_blocks"),
            getattr(theirs, f"{name}_indices"),
        )
        for x, y in ((counts, their_counts), (indices, their_indices)):
            assert x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
            assert x.is_contiguous(), f"{name}: the kernels for the backward pass need contiguous lists"
        assert torch.equal(counts, their_counts), name
        valid = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
        assert torch.equal(indices[valid], their_indices[valid]), name
        assert ((indices >= 0) & (indices < indices.shape[-1])).all(), f"{name}: an index out of range"


def textbook(mask: Tensor, block_size: int | tuple[int, int] = 128) -> BlockMask:
    """By create_block_mask, from a mask_mod that looks the mask up in the one written out, (B, L, S)."""
    return create_block_mask(
        lambda b, h, q_idx, kv_idx: mask[b, q_idx, kv_idx],
        *(mask.shape[0], None, *mask.shape[1:]),
        device=mask.device,
        BLOCK_SIZE=block_size,
    )


@st.composite
def rows_of_padding(
    draw, length: int, kinds=("right", "left", "empty", "none", "bits", "runs")
) -> list[bool]:
    kind = draw(st.sampled_from(kinds))
    edge = draw(st.integers(0, length))
    if kind == "right":
        return [i >= edge for i in range(length)]
    if kind == "left":
        return [i < edge for i in range(length)]
    if kind == "bits":
        return [bit % 2 == 1 for bit in draw(st.binary(min_size=length, max_size=length))]
    if kind == "runs":  # whole blocks of padding and of tokens, and their edges
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
        return [sum(cut <= i for cut in cuts) % 2 == 1 for i in range(length)]
    return [kind == "empty"] * length


@st.composite
def problems(draw):
    """pads, and what else the block mask is made of."""
    batch_size, kv_len = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    side = draw(st.sampled_from([None, None, "right", "left"]))
    rows = [draw(rows_of_padding(kv_len, *([(side,)] if side else []))) for _ in range(batch_size)]
    pads = torch.tensor(rows)
    if draw(st.booleans()):  # a view of wider rows
        pads = torch.nn.functional.pad(pads, (1, 2), value=True)[:, 1:-2]
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    window = st.one_of(st.integers(1, 5), st.integers(1, kv_len + 200), st.just(2**40))
    problem = {"q_len": q_len, "q_offset": draw(st.integers(0, kv_len - q_len))}
    problem["window"] = draw(st.one_of(st.none(), window))
    return pads, problem | ({"padding_side": side} if side else {})


def assert_right(ours: BlockMask, pads: Tensor, seen: dict, block_size) -> None:
    """The tiles of create_block_mask, and the mask itself at every pair."""
    expected = explicit_mask(pads, **seen)
    theirs = textbook(expected, block_size)
    if ours.full_kv_num_blocks is None:
        assert ours.q_num_blocks is ours.full_q_num_blocks is None
        assert ours.kv_num_blocks.shape == theirs.kv_num_blocks.shape
        assert ours.kv_num_blocks.is_contiguous() and ours.kv_indices.is_contiguous()
        assert torch.equal(ours.to_dense(), theirs.to_dense())
    else:
        assert_same_block_mask(ours, theirs)
    mask = create_mask(ours.mask_mod, pads.shape[0], 1, *expected.shape[1:], pads.device)
    assert torch.equal(mask[:, 0], expected)


def given_of(seen: dict, device: str, as_tensor: bool) -> dict:
    """What a query sees, as the function is given it."""
    return seen | ({"q_offset": torch.tensor(seen["q_offset"], device=device)} if as_tensor else {})


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=300, deadline=None)
@given(
    problem=problems(),
    as_tensor=st.booleans(),
    block_size=st.sampled_from([64, 128, (64, 128), (256, 128), (128, 32)]),
)
def test_same_as_create_block_mask(device: str, problem, as_tensor: bool, block_size) -> None:
    pads, seen = problem[0].to(device), problem[1]
    options = given_of(seen, device, as_tensor)
    ours = create_causal_padding_block_mask(pads, BLOCK_SIZE=block_size, **options)
    assert_right(ours, pads, seen, block_size)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100, deadline=None)
@given(
    problem=problems(),
    q_len=st.integers(1, 18),
    as_tensor=st.booleans(),
    blocks=st.sampled_from([(16, 4), (16, 64), (4, 64)]),
)
def test_few_queries_without_gradients_have_one_list(
    device: str, problem, q_len: int, as_tensor: bool, blocks: tuple[int, int]
) -> None:
    pads, seen = problem[0].to(device), problem[1]
    q_len = min(q_len, pads.shape[1])
    seen |= {"q_len": q_len, "q_offset": min(seen["q_offset"], pads.shape[1] - q_len)}
    options = given_of(seen, device, as_tensor)
    with torch.no_grad():
        ours = create_causal_padding_block_mask(pads, BLOCK_SIZE=blocks, **options)
    assert (ours.full_kv_num_blocks is None) == (q_len <= blocks[0])
    assert_right(ours, pads, seen, blocks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("q_len", "kv_len", "block_size"), [(2100, 2100, 16), (1, 32767, 1), (1, 32768, 1)])
def test_more_tiles_in_a_row_than_a_small_integer_counts(
    device: str, q_len: int, kv_len: int, block_size: int
) -> None:
    pads = torch.rand(2, kv_len, device=device) < 0.1
    pads[1] = False
    ours = block_mask_of(pads, q_len, BLOCK_SIZE=block_size)
    assert_same_block_mask(ours, textbook(explicit_mask(pads, q_len), block_size))


@pytest.mark.parametrize("device", DEVICES)
def test_defaults(device: str) -> None:
    pads = torch.zeros(2, 300, dtype=torch.bool, device=device)
    pads[0, 120:] = pads[1, :130] = True
    whole = create_block_mask(and_masks(causal, create_padding_mask(pads)), 2, None, 300, 300, device=device)
    assert_same_block_mask(create_causal_padding_block_mask(pads), whole)
    last = textbook(explicit_mask(pads, 40, 260))
    assert_same_block_mask(block_mask_of(pads, 40), last)
    assert_same_block_mask(block_mask_of(pads, q_offset=260), last)
    both_ways = textbook(explicit_mask(pads, 40, 260, causal=False))
    assert_same_block_mask(block_mask_of(pads, 40, causal=False), both_ways)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("q_len", "decodes"), [(700, False), (384, False), (7, False), (7, True), (1, True)])
def test_the_operator_that_hides_the_tiles_from_the_compiler(device: str, q_len: int, decodes: bool) -> None:
    pads = torch.rand(2, 700, device=device) < 0.3
    keys = torch.arange(700, device=device, dtype=torch.int32)
    last, until = keys[-q_len:], torch.full((2, 700), 650 - (700 - q_len), device=device, dtype=torch.int32)
    operator = torch.ops.causal_padded_flexattn.find_tiles.default
    for least, first, some_until in (
        (1, None, None),
        (2, last.expand(2, -1) - 50, None),
        (1, last - 50, until),
        (2, None, until),
    ):
        for length in (700, 60):  # with 60, less than the least number of blocks
            of = lambda x, n=length: x if x is None else x[..., -n:].contiguous()
            tokens = (keys[:length], of(pads), of(pads[:, -q_len:]))
            arguments = (of(first), of(last), of(some_until), *tokens, 128, 64, least, decodes)
            torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("length", "decodes"), [(256, False), (16, True)])
def test_the_operator_with_masks_that_lie_length_first(device: str, length: int, decodes: bool) -> None:
    """As sequence-first models have them. At whole blocks nothing is filled up, which would copy them."""
    numbers = torch.arange(256, device=device, dtype=torch.int32)
    pads = torch.rand(256, 2, device=device) < 0.3
    runs, queries = numbers[:length, None].expand(-1, 2).contiguous(), pads[-length:].contiguous()
    until = numbers[:, None].expand(-1, 2).contiguous()
    for first, some_until in ((None, None), (runs.T - 50, until.T)):
        arguments = (first, runs.T, some_until, numbers, pads.T, queries.T, length, 64, 2, decodes)
        torch.library.opcheck(torch.ops.causal_padded_flexattn.find_tiles.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [300, 150])
def test_pads_in_any_layout(device: str, q_len: int) -> None:
    pads = torch.rand(300, 3, device=device) < 0.3
    plain = block_mask_of(pads.T.contiguous(), q_len)
    assert_same_block_mask(block_mask_of(pads.T, q_len), plain)
    assert_same_block_mask(
        block_mask_of(pads.T[:1].expand(3, 300), q_len), block_mask_of(pads.T[:1].repeat(3, 1), q_len)
    )


def test_a_tensor_offset_may_change_afterwards() -> None:
    # A static cache counts its length up in place, before attention runs.
    pads, offset = torch.zeros(1, 300, dtype=torch.bool), torch.tensor(3)
    block_mask = block_mask_of(pads, 1, q_offset=offset)
    offset += 1
    mask = create_mask(block_mask.mask_mod, 1, 1, 1, 300, "cpu")
    assert torch.equal(mask[:, 0], explicit_mask(pads, 1, 3))


def test_rows_past_the_queries_may_be_asked_for() -> None:
    # As compiled kernels do on the CPU, for the rest of a block.
    pads = torch.zeros(1, 300, dtype=torch.bool)
    mask = create_mask(block_mask_of(pads, 10).mask_mod, 1, 1, 128, 300, "cpu")
    assert torch.equal(mask[:, 0, :10], explicit_mask(pads, 10))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_promise_of_the_padding_side(device: str, side: str) -> None:
    places, lengths = torch.arange(300, device=device), torch.tensor([[300], [130], [1], [0]], device=device)
    pads = places >= lengths if side == "right" else places < 300 - lengths
    for q_len, window in itertools.product((300, 40), (None, 1, 90)):
        seen = {"window": window, "padding_side": side}
        ours = create_causal_padding_block_mask(pads, q_len, **seen)
        assert_right(ours, pads, {"q_len": q_len, "q_offset": 300 - q_len, **seen}, 128)


@pytest.mark.cuda
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_promise_that_is_broken_on_the_device(side: str) -> None:
    code = f"""
import torch
from causal_padded_flexattn import create_causal_padding_block_mask
pads = torch.arange(300, device="cuda")[None] {">" if side == "left" else "<"} 100
create_causal_padding_block_mask(pads, padding_side={side!r})
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode and "device-side assert" in done.stderr


def test_the_origin_of_a_mask() -> None:
    """It is found again after .to() and in a graph of the caller."""
    pads = torch.zeros(1, 300, dtype=torch.bool)
    for more, origin in (
        ({}, (True, False, False)),
        ({"window": 5}, (True, True, False)),
        ({"padding_side": "left"}, (True, False, True)),
        ({"padding_side": "left", "q_len": 5}, (True, False, False)),
    ):
        make = partial(create_causal_padding_block_mask, **more)
        ask = torch.compile(lambda pads, make=make: (*_origin_of(make(pads)), pads + 1), backend="eager")
        assert _origin_of(make(pads).to("meta")) == origin == ask(pads)[:3]
    assert _origin_of(create_block_mask_from_runs(None, None, pads)) == (True, False, False)
    assert _origin_of(create_block_mask(causal, 1, None, 300, 300, device="cpu")) == (False, False, False)
    assert _origin_of(None) == (False, False, False)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("window", [None, 5])
def test_a_promise_makes_the_mask_compute(side: str, window: int | None) -> None:
    """Where the queries are the keys; elsewhere runs are looked up, as they are without a promise."""
    make = partial(create_causal_padding_block_mask, make_pads(side, 300, "cpu"), window=window)
    assert looks_up(make()) and looks_up(make(q_len=5, padding_side=side))
    assert not looks_up(make(padding_side=side))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", ["compiled", "vmap"])
def test_a_promise_that_is_broken_where_it_is_traced(side: str, how: str) -> None:
    make = lambda pads: create_causal_padding_block_mask(pads, padding_side=side).kv_num_blocks + 0
    broken = torch.arange(300)[None] > 100 if side == "left" else torch.arange(300)[None] < 100
    kept = broken.flip(1)
    if how == "compiled":
        make = torch.compile(make, fullgraph=True, backend="aot_eager")
    else:
        make, kept, broken = torch.vmap(make), kept[None], broken[None]
    make(kept)
    with pytest.raises(RuntimeError, match=f"all padding stands on the {side}, and some does not"):
        make(broken)


@pytest.mark.cuda
def test_it_does_not_wait_for_the_device() -> None:
    pads = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
    offset = torch.tensor(5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        create_causal_padding_block_mask(pads)
        create_causal_padding_block_mask(pads, 1, q_offset=5)
        create_causal_padding_block_mask(pads, 1, q_offset=offset)
        create_causal_padding_block_mask(pads, window=100, padding_side="right")
        create_block_mask_from_runs(None, None, pads)
        create_block_mask_from_runs(pads.int(), None, pads, until=pads.long() + 300)
        create_block_mask_from_runs(None, None, pads, query_pads=pads[:, :50])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("more", [{}, {"window": 1000}, {"spans": True, "until": True}])
def test_memory(more: dict) -> None:
    batch_size, kv_len, mib = 8, 131072, 220
    pads = (
        torch.arange(kv_len, device="cuda")
        >= torch.linspace(kv_len // 4, kv_len, batch_size, device="cuda")[:, None]
    )
    if "spans" in more:  # and six tensors of eight bytes a token
        numbers = torch.arange(kv_len, device="cuda").expand(batch_size, -1)
        last, until = numbers // 100 * 100 + 99, numbers + 1000
        make, mib = (
            partial(create_block_mask_from_runs, None, last, pads, until=until),
            mib + 6 * 8 * pads.numel() // 2**20,
        )
    else:
        make = partial(create_causal_padding_block_mask, pads, **more)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    make()
    assert torch.cuda.max_memory_allocated() - before <= mib * 2**20


@pytest.mark.parametrize("name", ["holes", "window", "runs", "few queries"])
def test_a_kernel_reads_the_lists(name: str) -> None:
    """Attention here reads no list of tiles on the CPU, but compiled flex_attention does."""
    pads = torch.arange(500).expand(3, -1) % 200 > 120
    query, key, value = torch.randn(3, 3, 2, 500, 16)
    mask, block_mask = explicit_mask(pads), block_mask_of(pads)
    if name == "window":
        pads = torch.arange(500) < torch.tensor([[400], [10], [0]])
        block_mask = block_mask_of(pads, window=100, padding_side="left")
        mask = explicit_mask(pads, window=100)
    elif name == "runs":
        first, last, until = torch.randint(0, 500, (3, 3, 500))
        block_mask = create_block_mask_from_runs(first, last, pads, until=until)
        place = torch.arange(500)
        mask = (
            ~pads[:, :, None] & ~pads[:, None, :] & (place >= first[..., None]) & (place <= last[..., None])
        )
        mask &= place[:, None] <= until[:, None, :]
    elif name == "few queries":
        query, mask, block_mask = query[:, :, -200:], explicit_mask(pads, 200), block_mask_of(pads, 200)
    with torch.no_grad():
        output = torch.compile(flex_attention, dynamic=False)(query, key, value, block_mask=block_mask)
    scores = (query.double() @ key.double().mT / 4).masked_fill(~mask[:, None], -torch.inf)
    exact = scores.softmax(-1).nan_to_num() @ value.double()
    torch.testing.assert_close(output, exact.float(), rtol=1e-4, atol=1e-5)
