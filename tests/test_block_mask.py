"""The block mask in closed form is the one that create_block_mask finds by evaluating every score."""

import inspect

import pytest
import torch
from conftest import DEVICES, explicit_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, noop_mask

from causal_padded_flexattn import (
    causal,
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
def rows_of_padding(draw, length: int) -> list[bool]:
    kind = draw(st.sampled_from(["right", "left", "empty", "none", "bits", "runs"]))
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
def documents_of(draw, row: list[bool]) -> list[int]:
    """Numbers that never fall along the real tokens, and any at all where padding is."""
    begins = sorted(draw(st.lists(st.integers(0, len(row)), max_size=8)))
    step, noise = draw(st.integers(1, 50)), draw(st.sampled_from([[0], [-100, 100], [7, -(2**40), 3]]))
    return [
        noise[i % len(noise)] if pad else step * sum(cut <= i for cut in begins) - 60
        for i, pad in enumerate(row)
    ]


@st.composite
def problems(draw):
    """pads, and what else the block mask is made of."""
    batch_size, kv_len = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    rows = [draw(rows_of_padding(kv_len)) for _ in range(batch_size)]
    pads = torch.tensor(rows)
    if draw(st.booleans()):  # a view of wider rows
        pads = torch.nn.functional.pad(pads, (1, 2), value=True)[:, 1:-2]
    causal = draw(st.booleans())
    if not causal and draw(st.integers(0, 3)) == 0:
        q_len = draw(st.integers(1, 500))
        query_pads = torch.tensor([draw(rows_of_padding(q_len)) for _ in range(batch_size)])
        return pads, {"causal": False, "query_pads": query_pads}
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    problem = {"q_len": q_len, "q_offset": draw(st.integers(0, kv_len - q_len)), "causal": causal}
    window = st.one_of(st.integers(1, 5), st.integers(1, kv_len + 200), st.just(2**40))
    problem["window"] = draw(st.one_of(st.none(), window))
    if draw(st.booleans()):
        problem["documents"] = torch.tensor([draw(documents_of(row)) for row in rows])
    return pads, problem


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=300, deadline=None)
@given(
    problem=problems(),
    as_tensor=st.booleans(),
    block_size=st.sampled_from([64, 128, (64, 128), (256, 128), (128, 32)]),
)
def test_same_as_create_block_mask(device: str, problem, as_tensor: bool, block_size) -> None:
    pads, seen = problem
    pads, seen = pads.to(device), {k: x.to(device) if isinstance(x, Tensor) else x for k, x in seen.items()}
    given_ = seen | (
        {"q_offset": torch.tensor(seen["q_offset"], device=device)}
        if as_tensor and "q_offset" in seen
        else {}
    )
    ours = create_causal_padding_block_mask(pads, BLOCK_SIZE=block_size, **given_)
    expected = explicit_mask(pads, **seen)
    assert_same_block_mask(ours, textbook(expected, block_size))
    mask = create_mask(ours.mask_mod, pads.shape[0], 1, *expected.shape[1:], device)
    assert torch.equal(mask[:, 0], expected)


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
    pads, seen = pads.to(device), {k: x.to(device) if isinstance(x, Tensor) else x for k, x in seen.items()}
    given_ = dict(seen)
    if as_tensor and "q_offset" in seen:
        given_["q_offset"] = torch.tensor(seen["q_offset"], device=device)
    with torch.no_grad():
        ours = create_causal_padding_block_mask(pads, BLOCK_SIZE=(16, block), **given_)
    expected = explicit_mask(pads, **seen)
    theirs = textbook(expected, (16, block))
    if q_len > 16:
        return assert_same_block_mask(ours, theirs)
    assert ours.full_kv_num_blocks is ours.q_num_blocks is ours.full_q_num_blocks is None
    assert ours.kv_num_blocks.shape == theirs.kv_num_blocks.shape
    assert ours.kv_num_blocks.is_contiguous() and ours.kv_indices.is_contiguous()
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    mask = create_mask(ours.mask_mod, pads.shape[0], 1, *expected.shape[1:], device)
    assert torch.equal(mask[:, 0], expected)


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
    ours = create_causal_padding_block_mask(pads, q_len, BLOCK_SIZE=block_size)
    assert_same_block_mask(ours, textbook(explicit_mask(pads, q_len), block_size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
def test_windows_that_begin_in_the_padding_at_the_end_of_a_block(device: str, causal: bool) -> None:
    place = torch.arange(600, device=device)
    pads = torch.stack([place % 128 >= 40, place % 64 < 30, place % 200 > 90])
    for window in (1, 10, 39, 60, 88, 100, 128, 150, 190, 300):
        for block_size in (64, 128, (128, 64)):
            ours = create_causal_padding_block_mask(pads, causal=causal, window=window, BLOCK_SIZE=block_size)
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
    assert_same_block_mask(create_causal_padding_block_mask(pads, 40), last)
    assert_same_block_mask(create_causal_padding_block_mask(pads, q_offset=260), last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [700, 100])
def test_the_operator_that_hides_the_lists_from_the_compiler(device: str, q_len: int) -> None:
    ends = torch.randint(0, 700, (2, 3, 1, 12, 1), device=device, dtype=torch.int32).sort(0).values
    queries, keys = ends[:, :, :, : -(-q_len // 128)].flip(0), ends[:, :, :, 6:]
    numbers, operators = torch.arange(1, 7, dtype=torch.int8, device=device), torch.ops.causal_padded
    for rows, columns in (([queries], [keys]), ([queries, queries.flip(0)], [keys, keys.flip(0)])):
        torch.library.opcheck(operators._list_tiles.default, (rows, columns, numbers, False))
        torch.library.opcheck(operators._list_tiles.default, (columns, rows, numbers, True))
    torch.library.opcheck(
        operators._fill.default, (torch.zeros(3, q_len, dtype=torch.int32, device=device), 28, -1)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [300, 150])
def test_pads_in_any_layout(device: str, q_len: int) -> None:
    pads = torch.rand(300, 3, device=device) < 0.3
    plain = create_causal_padding_block_mask(pads.T.contiguous(), q_len)
    assert_same_block_mask(create_causal_padding_block_mask(pads.T, q_len), plain)
    assert_same_block_mask(
        create_causal_padding_block_mask(pads.T[:1].expand(3, 300), q_len),
        create_causal_padding_block_mask(pads.T[:1].repeat(3, 1), q_len),
    )


def test_without_padding_it_is_the_causal_mask() -> None:
    ours = create_causal_padding_block_mask(torch.zeros(1, 1000, dtype=torch.bool))
    assert_same_block_mask(ours, create_block_mask(causal, 1, None, 1000, 1000, device="cpu"))
    both_ways = create_causal_padding_block_mask(torch.zeros(1, 1000, dtype=torch.bool), causal=False)
    assert_same_block_mask(both_ways, create_block_mask(noop_mask, 1, None, 1000, 1000, device="cpu"))


def test_a_tensor_offset_may_change_afterwards() -> None:
    # A static cache counts its length up in place, before attention runs.
    pads, offset = torch.zeros(1, 300, dtype=torch.bool), torch.tensor(3)
    block_mask = create_causal_padding_block_mask(pads, 1, q_offset=offset)
    offset += 1
    mask = create_mask(block_mask.mask_mod, 1, 1, 1, 300, "cpu")
    assert torch.equal(mask[:, 0], explicit_mask(pads, 1, 3))


def test_rows_past_the_queries_may_be_asked_for() -> None:
    # As compiled kernels do on the CPU, for the rest of a block.
    pads = torch.zeros(1, 300, dtype=torch.bool)
    mask = create_mask(create_causal_padding_block_mask(pads, 10).mask_mod, 1, 1, 128, 300, "cpu")
    assert torch.equal(mask[:, 0, :10], explicit_mask(pads, 10))


@pytest.mark.parametrize("more", [{}, {"window": 5}, {"documents": torch.zeros(1, 300, dtype=torch.int64)}])
def test_what_the_mask_mod_captures(more: dict) -> None:
    """No int, which would be compiled in, for every decoding step again; and no more than the case needs."""
    pads = torch.zeros(1, 300, dtype=torch.bool)
    mask_mod = create_causal_padding_block_mask(pads, 1, q_offset=7, **more).mask_mod
    captured = inspect.getclosurevars(mask_mod).nonlocals
    assert all(isinstance(x, Tensor) and x.dim() == 2 for x in captured.values())
    assert captured.keys() == {"pads", "last"} | ({"first"} if more else set())


@pytest.mark.cuda
def test_it_does_not_wait_for_the_device() -> None:
    pads = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
    offset = torch.tensor(5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        create_causal_padding_block_mask(pads)
        create_causal_padding_block_mask(pads, causal=False)
        create_causal_padding_block_mask(pads, 1, q_offset=5)
        create_causal_padding_block_mask(pads, 1, q_offset=offset)
        for is_causal in (True, False):
            create_causal_padding_block_mask(pads, causal=is_causal, window=100, documents=pads.int())
        create_causal_padding_block_mask(pads, causal=False, query_pads=pads[:, :50])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize(("batch_size", "kv_len", "mib"), [(8, 32768, 20), (8, 131072, 220)])
@pytest.mark.parametrize("more", [{}, {"window": 1000}])
def test_memory(batch_size: int, kv_len: int, mib: int, more: dict) -> None:
    pads = (
        torch.arange(kv_len, device="cuda")
        >= torch.linspace(kv_len // 4, kv_len, batch_size, device="cuda")[:, None]
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    create_causal_padding_block_mask(pads, **more)
    assert torch.cuda.max_memory_allocated() - before <= mib * 2**20


PADS = torch.zeros(2, 100, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pads": PADS.int()}, TypeError, r"pads must be torch.bool.*attention_mask == 0"),
        ({"pads": None}, TypeError, "pads must be a plain tensor"),
        ({"pads": PADS[0]}, ValueError, r"pads must be \(B, S\).*got pads \(100, "),
        ({"pads": PADS[:, :0]}, ValueError, r"pads must be.*not 0.*\(2, 0, "),
        ({"q_len": 0}, ValueError, "among the keys.*q_len 0"),
        ({"q_len": -1}, ValueError, "among the keys.*q_len -1"),
        ({"q_len": 101}, ValueError, "among the keys.*q_len 101"),
        ({"q_offset": -1}, ValueError, "among the keys.*q_offset -1"),
        ({"q_offset": 100}, ValueError, "among the keys.*q_offset 100"),
        ({"q_len": 10, "q_offset": 91}, ValueError, "among the keys.*q_len 10, q_offset 91"),
        ({"q_offset": torch.tensor(5)}, ValueError, "q_len must be given beside a tensor q_offset"),
        (
            {"q_len": 10, "q_offset": torch.zeros(2, dtype=int)},
            TypeError,
            "q_offset must be an int or a 0-d integer",
        ),
        (
            {"q_len": 10, "q_offset": torch.tensor(1.0)},
            TypeError,
            r"a 0-d integer tensor beside pads.*float32",
        ),
        (
            {"q_len": 10, "q_offset": torch.tensor(1, device="meta")},
            TypeError,
            "a 0-d integer tensor beside pads.*meta",
        ),
        (
            {"q_len": 10, "causal": False},
            ValueError,
            "without causality, q_offset or query_pads must say.*q_len 10",
        ),
        ({"BLOCK_SIZE": 0}, ValueError, "BLOCK_SIZE must be at least 1; got BLOCK_SIZE 0"),
        ({"BLOCK_SIZE": (128, -1)}, ValueError, r"BLOCK_SIZE must be at least 1; got BLOCK_SIZE \(128, -1\)"),
        ({"window": 0}, ValueError, "window must be at least 1.*got window 0"),
        ({"window": -3}, ValueError, "window must be at least 1.*got window -3"),
        ({"window": 2.0}, TypeError, "window must be an int.*got window 2.0"),
        ({"window": True}, TypeError, "window must be an int.*got window True"),
        ({"documents": PADS}, TypeError, "documents must be integers.*torch.bool"),
        ({"documents": PADS.float()}, TypeError, "documents must be integers.*torch.float32"),
        ({"documents": [0] * 100}, TypeError, "documents must be a plain tensor.*list"),
        ({"documents": PADS.int()[:, 1:]}, ValueError, r"documents must be \(B, S\).*documents \(2, 99, "),
        ({"documents": PADS.int().to("meta")}, ValueError, "documents must be on the device of pads.*meta"),
        ({"query_pads": PADS.int(), "causal": False}, TypeError, "query_pads must be torch.bool.*int32"),
        ({"query_pads": PADS[:1], "causal": False}, ValueError, r"query_pads must be \(B, L\).*\(1, 100, "),
        ({"query_pads": PADS}, ValueError, "other tokens than keys: only causal=False.*causal True"),
        *(
            (
                {"query_pads": PADS, "causal": False, **more},
                ValueError,
                "query_pads is of other tokens than keys",
            )
            for more in ({"window": 3}, {"documents": PADS.int()}, {"q_offset": 0}, {"q_len": 3})
        ),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_causal_padding_block_mask(**{"pads": PADS, **arguments})
