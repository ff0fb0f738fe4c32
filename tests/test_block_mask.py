"""The block mask in closed form is the one that create_block_mask finds by evaluating every score."""

import inspect
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import DEVICES, block_mask_of, explicit_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, noop_mask

from causal_padded_flexattn import (
    _origin_of,
    causal,
    create_block_mask_from_runs,
    create_causal_padding_block_mask,
    create_padding_mask,
)

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
def numbers_of(draw, row: list[bool], most: int = 8) -> list[int]:
    """Numbers that never fall along the real tokens, and any at all where padding is."""
    begins = sorted(draw(st.lists(st.integers(0, len(row)), max_size=most)))
    step, noise = draw(st.integers(1, 50)), draw(st.sampled_from([[0], [-100, 100], [7, -(2**40), 3]]))
    return [
        noise[i % len(noise)] if pad else step * sum(cut <= i for cut in begins) - 60
        for i, pad in enumerate(row)
    ]


@st.composite
def spans_of(draw, row: list[bool]) -> list[int]:
    """A prefix, images, chunks, or any numbers that do not fall."""
    kind, size = draw(st.sampled_from(["any", "prefix", "images", "chunks"])), draw(st.integers(1, 150))
    if kind == "any":
        return draw(numbers_of(row, 40))
    if kind == "prefix":
        return [max(i, size - 1) for i in range(len(row))]
    if kind == "chunks":
        return [i // size for i in range(len(row))]
    return [i // size * size if i // size % 2 else i for i in range(len(row))]


@st.composite
def until_of(draw, length: int) -> list[int]:
    """At least the own place of each key; often to the end of one of nested branches."""
    ends = [*sorted(draw(st.lists(st.integers(0, length), max_size=12))), length - 1]
    kind = draw(st.sampled_from(["branches", "near", "far", "mixed"]))
    branch = [next(end for end in ends if end >= i) for i in range(length)]
    far = draw(st.sampled_from([length - 1, length, 2**31, 2**62]))
    steps = draw(st.lists(st.integers(0, 300), min_size=1, max_size=50))
    near = [i + steps[i % len(steps)] for i in range(length)]
    return {
        "branches": branch,
        "near": near,
        "far": [far] * length,
        "mixed": [(x, y, far)[i // 7 % 3] for i, (x, y) in enumerate(zip(branch, near, strict=True))],
    }[kind]


@st.composite
def problems(draw):
    """pads, and what else the block mask is made of."""
    batch_size, kv_len = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    side = draw(st.sampled_from([None, None, "right", "left"]))
    rows = [draw(rows_of_padding(kv_len, *([(side,)] if side else []))) for _ in range(batch_size)]
    pads = torch.tensor(rows)
    if draw(st.booleans()):  # a view of wider rows
        pads = torch.nn.functional.pad(pads, (1, 2), value=True)[:, 1:-2]
    causal = draw(st.sampled_from([True, True, False]))
    if not causal and draw(st.integers(0, 3)) == 0:
        q_len = draw(st.integers(1, 500))
        query_pads = torch.tensor([draw(rows_of_padding(q_len)) for _ in range(batch_size)])
        return pads, {"causal": False, "query_pads": query_pads}
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    problem = {"q_len": q_len, "q_offset": draw(st.integers(0, kv_len - q_len)), "causal": causal}
    window = st.one_of(st.integers(1, 5), st.integers(1, kv_len + 200), st.just(2**40))
    problem["window"] = draw(st.one_of(st.none(), window))
    if draw(st.booleans()):
        problem["documents"] = torch.tensor([draw(numbers_of(row)) for row in rows])
    if causal and draw(st.booleans()):
        problem["spans"] = torch.tensor([draw(spans_of(row)) for row in rows])
    if causal and draw(st.booleans()):
        problem["until"] = torch.tensor([draw(until_of(kv_len)) for _ in rows])
    promises = side and causal and not problem.keys() & {"spans", "until"}
    return pads, problem | ({"padding_side": side} if promises else {})


def may_list_more(seen: dict) -> bool:
    """Beside a window, and where it reaches past its document, `until` may list a tile without a pair."""
    return "until" in seen and (seen["window"] is not None or "documents" in seen)


def assert_right(ours: BlockMask, pads: Tensor, seen: dict, block_size) -> None:
    """The tiles of create_block_mask, and the mask itself at every pair."""
    expected = explicit_mask(pads, **seen)
    theirs = textbook(expected, block_size)
    if ours.full_kv_num_blocks is None:
        assert ours.q_num_blocks is ours.full_q_num_blocks is None
        assert ours.kv_num_blocks.shape == theirs.kv_num_blocks.shape
        assert ours.kv_num_blocks.is_contiguous() and ours.kv_indices.is_contiguous()
    if may_list_more(seen):
        assert (ours.to_dense() >= theirs.to_dense()).all()
        if ours.full_kv_num_blocks is not None:
            for name in ("full_kv_num_blocks", "full_q_num_blocks"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
    elif ours.full_kv_num_blocks is None:
        assert torch.equal(ours.to_dense(), theirs.to_dense())
    else:
        assert_same_block_mask(ours, theirs)
    mask = create_mask(ours.mask_mod, pads.shape[0], 1, *expected.shape[1:], pads.device)
    assert torch.equal(mask[:, 0], expected)


def place(problem, device: str, as_tensor: bool) -> tuple[Tensor, dict, dict]:
    """pads, what a query sees, and that as the function is given it."""
    pads, seen = problem
    pads, seen = pads.to(device), {k: x.to(device) if isinstance(x, Tensor) else x for k, x in seen.items()}
    given_ = dict(seen)
    if as_tensor and "q_offset" in seen:
        given_["q_offset"] = torch.tensor(seen["q_offset"], device=device)
    return pads, seen, given_


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=300, deadline=None)
@given(
    problem=problems(),
    as_tensor=st.booleans(),
    block_size=st.sampled_from([64, 128, (64, 128), (256, 128), (128, 32)]),
)
def test_same_as_create_block_mask(device: str, problem, as_tensor: bool, block_size) -> None:
    pads, seen, given_ = place(problem, device, as_tensor)
    assert_right(block_mask_of(pads, BLOCK_SIZE=block_size, **given_), pads, seen, block_size)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100, deadline=None)
@given(problem=problems(), q_len=st.integers(1, 18), as_tensor=st.booleans(), block=st.sampled_from([4, 64]))
def test_few_queries_without_gradients_have_one_list(
    device: str, problem, q_len: int, as_tensor: bool, block: int
) -> None:
    pads, seen = problem
    if "query_pads" in seen:
        seen["query_pads"] = seen["query_pads"][:, :q_len]
        q_len = seen["query_pads"].shape[1]
    else:
        q_len = min(q_len, pads.shape[1])
        seen |= {"q_len": q_len, "q_offset": min(seen["q_offset"], pads.shape[1] - q_len)}
    pads, seen, given_ = place((pads, seen), device, as_tensor)
    with torch.no_grad():
        ours = block_mask_of(pads, BLOCK_SIZE=(16, block), **given_)
    assert (ours.full_kv_num_blocks is None) == (q_len <= 16)
    assert_right(ours, pads, seen, (16, block))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_size"),
    [(2100, 2100, 16), (1016, 1016, 8), (1024, 1024, 8), (1, 32767, 1), (1, 32768, 1)],
)
def test_more_tiles_in_a_row_than_a_small_integer_counts(
    device: str, q_len: int, kv_len: int, block_size: int
) -> None:
    pads = torch.rand(2, kv_len, device=device) < 0.1
    pads[1] = False
    ours = block_mask_of(pads, q_len, BLOCK_SIZE=block_size)
    assert_same_block_mask(ours, textbook(explicit_mask(pads, q_len), block_size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
def test_windows_that_begin_in_the_padding_at_the_end_of_a_block(device: str, causal: bool) -> None:
    place = torch.arange(600, device=device)
    pads = torch.stack([place % 128 >= 40, place % 64 < 30, place % 200 > 90])
    for window in (1, 10, 39, 60, 88, 100, 128, 150, 190, 300):
        for block_size in (64, 128, (128, 64)):
            ours = block_mask_of(pads, causal=causal, window=window, BLOCK_SIZE=block_size)
            assert_same_block_mask(
                ours, textbook(explicit_mask(pads, causal=causal, window=window), block_size)
            )


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
    for first, some_until in (
        (None, None),
        (last.expand(2, -1) - 50, None),
        (last - 50, until),
        (None, until),
    ):
        arguments = (first, last, some_until, keys, pads, pads[:, -q_len:], 128, 64, decodes)
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
        arguments = (first, runs.T, some_until, numbers, pads.T, queries.T, length, 64, decodes)
        torch.library.opcheck(torch.ops.causal_padded_flexattn.find_tiles.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [300, 150])
def test_pads_in_any_layout(device: str, q_len: int) -> None:
    pads = torch.rand(300, 3, device=device) < 0.3
    plain = block_mask_of(pads.T.contiguous(), q_len)
    assert_same_block_mask(block_mask_of(pads.T, q_len), plain)
    assert_same_block_mask(
        block_mask_of(pads.T[:1].expand(3, 300), q_len),
        block_mask_of(pads.T[:1].repeat(3, 1), q_len),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", ["first", "last", "until"])
def test_integers_of_any_type(device: str, dtype: torch.dtype, name: str) -> None:
    numbers = torch.arange(120, device=device).expand(2, -1) // 40 * 40 + 39  # until: the end of its forty
    pads = torch.rand(2, 120, device=device) < 0.2
    given = {"first": None, "last": None, "until": None, "BLOCK_SIZE": 16}
    plain = create_block_mask_from_runs(pads=pads, **{**given, name: numbers})
    small = create_block_mask_from_runs(pads=pads, **{**given, name: numbers.to(dtype)})
    assert_same_block_mask(small, plain)


def test_without_padding_it_is_the_causal_mask() -> None:
    ours = block_mask_of(torch.zeros(1, 1000, dtype=torch.bool))
    assert_same_block_mask(ours, create_block_mask(causal, 1, None, 1000, 1000, device="cpu"))
    both_ways = block_mask_of(torch.zeros(1, 1000, dtype=torch.bool), causal=False)
    assert_same_block_mask(both_ways, create_block_mask(noop_mask, 1, None, 1000, 1000, device="cpu"))


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


ONE_GROUP = torch.zeros(1, 300, dtype=torch.int64)


@pytest.mark.parametrize(
    ("more", "looks_up"),
    [
        ({}, ["last_key", "pads"]),
        ({"window": 5}, ["last_key", "first_key", "pads"]),
        ({"documents": ONE_GROUP}, ["last_key", "first_key", "pads"]),
        ({"spans": ONE_GROUP}, ["last_key", "pads"]),
        ({"until": ONE_GROUP + 300}, ["last_key", "last_query"]),
        ({"padding_side": "right"}, ["end"]),
        ({"padding_side": "left"}, ["begin"]),
        ({"padding_side": "right", "window": 5}, ["end", "reach"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_what_the_mask_mod_looks_up(more: dict, looks_up: list[str]) -> None:
    """No int, which would be compiled in, for every decoding step again; and no more than the case needs."""

    def captured_by(function) -> dict:
        found = {}
        for name, x in inspect.getclosurevars(function).nonlocals.items():
            for y in x if isinstance(x, list) else [x]:
                found |= captured_by(y) if callable(y) and not isinstance(y, Tensor) else {name: y}
        return found

    pads = torch.zeros(1, 300, dtype=torch.bool)
    found = captured_by(block_mask_of(pads, **more).mask_mod)
    dims = 1 if "padding_side" in more else 2
    assert all(isinstance(x, Tensor) and x.dim() == dims for x in found.values())
    assert found.keys() == {*looks_up}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("window", [None, 1, 90])
def test_a_promise_of_the_padding_side(device: str, side: str, window: int | None) -> None:
    places, lengths = torch.arange(300, device=device), torch.tensor([[300], [130], [1], [0]], device=device)
    pads = places >= lengths if side == "right" else places < 300 - lengths
    seen = {"window": window, "padding_side": side}
    for q_len in (300, 40):
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
        ({}, (False, False)),
        ({"window": 5}, (True, False)),
        ({"padding_side": "left"}, (False, True)),
        ({"padding_side": "left", "q_len": 5}, (False, False)),
    ):
        make = partial(create_causal_padding_block_mask, **more)
        ask = torch.compile(lambda pads, make=make: (*_origin_of(make(pads)), pads + 1), backend="eager")
        assert _origin_of(make(pads).to("meta")) == origin == ask(pads)[:2]
    assert _origin_of(create_block_mask_from_runs(None, None, pads)) == (False, False)
    assert _origin_of(create_block_mask(causal, 1, None, 300, 300, device="cpu")) == (None, False)
    assert _origin_of(None) == (None, False)


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
@pytest.mark.parametrize(("batch_size", "kv_len", "mib"), [(8, 32768, 20), (8, 131072, 220)])
@pytest.mark.parametrize("more", [{}, {"window": 1000}, {"spans": True, "until": True}])
def test_memory(batch_size: int, kv_len: int, mib: int, more: dict) -> None:
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


PADS = torch.zeros(2, 100, dtype=torch.bool)
PLACES = torch.arange(100).expand(2, -1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pads": PADS.int()}, TypeError, r"pads must be a torch.bool tensor.*attention_mask == 0"),
        ({"pads": None}, TypeError, "pads must be a torch.bool tensor.*got pads None"),
        (
            {"pads": [5, 3]},
            TypeError,
            r"torch.arange\(S\) >= lengths\[:, None\] for lengths.*; got pads \[5, 3\]",
        ),
        (
            {"pads": torch.tensor([5, 3])},
            TypeError,
            r">= lengths\[:, None\] for lengths.*; got pads \(2,\) torch.int64",
        ),
        ({"pads": PADS.float()}, TypeError, "additive_mask < 0 for one that is added to scores.*float32"),
        ({"pads": PADS[0]}, ValueError, r"pads must be of shape \(B, S\).*got pads \(100,\) "),
        ({"pads": PADS[:, :0]}, ValueError, r"pads must be.*no dimension may be empty.*\(2, 0\) "),
        ({"q_len": 0}, ValueError, "among the keys.*q_len 0"),
        ({"q_len": -1}, ValueError, "among the keys.*q_len -1"),
        ({"q_len": 101}, ValueError, "among the keys.*q_len 101"),
        ({"q_offset": -1}, ValueError, "among the keys.*q_offset -1"),
        ({"q_offset": 100}, ValueError, "among the keys.*q_offset 100"),
        ({"q_len": 10, "q_offset": 91}, ValueError, "among the keys.*q_len 10, q_offset 91"),
        ({"q_offset": torch.tensor(5)}, ValueError, "q_len must be given beside a tensor q_offset"),
        *(
            (
                {"q_len": 10, "q_offset": offset},
                TypeError,
                f"q_offset must be an int, or a 0-d tensor.*{shown}",
            )
            for offset, shown in (
                (torch.zeros(2, dtype=int), r"\(2,\)"),
                (torch.tensor(1.0), "float32"),
                (torch.tensor(1, dtype=torch.int8), "int8"),
                (torch.tensor(1, device="meta"), "meta"),
            )
        ),
        ({"q_offset": 4.0}, TypeError, "q_offset must be an int or a 0-d integer tensor.*4.0"),
        ({"q_len": 4.0}, TypeError, "q_len must be an int; got q_len 4.0"),
        ({"causal": False}, TypeError, "unexpected keyword argument 'causal'"),
        (
            {"BLOCK_SIZE": 0},
            ValueError,
            "BLOCK_SIZE must be an int of at least 1, .*; got BLOCK_SIZE 0",
        ),
        ({"BLOCK_SIZE": (128, -1)}, ValueError, r"BLOCK_SIZE must be.*got BLOCK_SIZE \(128, -1\)"),
        ({"BLOCK_SIZE": [128, 128]}, ValueError, "BLOCK_SIZE must be.*a tuple of two"),
        ({"window": 0}, ValueError, "window must be at least 1.*got window 0"),
        ({"window": -3}, ValueError, "window must be at least 1.*got window -3"),
        ({"window": 2.0}, TypeError, "window must be an int.*got window 2.0"),
        ({"window": True}, TypeError, "window must be an int.*got window True"),
        ({"documents": PADS.int()}, TypeError, "unexpected keyword argument 'documents'"),
        ({"padding_side": "both"}, ValueError, 'padding_side must be "right", "left" or None; got .*both'),
        *(
            (
                {"padding_side": side, "pads": pads},
                ValueError,
                f"all padding stands on the {side}, and some does not",
            )
            for side, pads in (("right", PLACES < 3), ("left", PLACES > 3), ("left", PLACES == 3))
        ),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_causal_padding_block_mask(**{"pads": PADS, **arguments})
