"""The block mask in closed form is the one that create_block_mask finds by evaluating every score."""

import pytest
import torch
from conftest import DEVICES, explicit_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, noop_mask

from causal_padded_flexattn import (
    _opaque_list_tiles,
    causal,
    create_causal_padding_block_mask,
    create_padding_mask,
)

LISTS = ["kv", "full_kv", "q", "full_q"]


def assert_same_block_mask(ours: BlockMask, theirs: BlockMask) -> None:
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in LISTS:
        counts, indices = getattr(ours, f"{name}_num_blocks"), getattr(ours, f"{name}_indices")
        their_counts, their_indices = getattr(theirs, f"{name}_num_blocks"), getattr(theirs, f"{name}_indices")
        for x, y in ((counts, their_counts), (indices, their_indices)):
            assert x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
            assert x.is_contiguous(), f"{name}: the kernels for the backward pass need contiguous lists"
        assert torch.equal(counts, their_counts), name
        valid = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
        assert torch.equal(indices[valid], their_indices[valid]), name
        assert ((indices >= 0) & (indices < indices.shape[-1])).all(), f"{name}: an index out of range"


def textbook(pads, q_len, q_offset, is_causal, block_size) -> BlockMask:
    """By create_block_mask, from a mask_mod that looks the mask up in the one written out."""
    mask = explicit_mask(pads, q_len, q_offset, is_causal)
    return create_block_mask(
        lambda b, h, q_idx, kv_idx: mask[b, q_idx, kv_idx],
        *(pads.shape[0], None, mask.shape[1], pads.shape[1]),
        device=pads.device,
        BLOCK_SIZE=block_size,
    )


@st.composite
def problems(draw):
    batch_size, kv_len = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    rows = []
    for _ in range(batch_size):
        kind = draw(st.sampled_from(["right", "left", "empty", "none", "bits", "runs"]))
        length = draw(st.integers(0, kv_len))
        if kind == "right":
            row = [i >= length for i in range(kv_len)]
        elif kind == "left":
            row = [i < length for i in range(kv_len)]
        elif kind == "bits":
            bits = draw(st.binary(min_size=kv_len, max_size=kv_len))
            row = [bit % 2 == 1 for bit in bits]
        elif kind == "runs":  # whole blocks of padding and of tokens, and their edges
            cuts = sorted(draw(st.lists(st.integers(0, kv_len), max_size=8)))
            row = [sum(cut <= i for cut in cuts) % 2 == 1 for i in range(kv_len)]
        else:
            row = [kind == "empty"] * kv_len
        rows.append(row)
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    q_offset = draw(st.integers(0, kv_len - q_len))
    block_size = draw(st.sampled_from([64, 128, (64, 128), (256, 128)]))
    pads = torch.tensor(rows)
    if draw(st.booleans()):  # a view of wider rows
        pads = torch.nn.functional.pad(pads, (1, 2), value=True)[:, 1:-2]
    return pads, q_len, q_offset, draw(st.booleans()), block_size


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=300, deadline=None)
@given(problem=problems(), as_tensor=st.booleans())
def test_same_as_create_block_mask(device: str, problem, as_tensor: bool) -> None:
    pads, q_len, q_offset, is_causal, block_size = problem
    pads = pads.to(device)
    given_offset = torch.tensor(q_offset, device=device) if as_tensor else q_offset
    ours = create_causal_padding_block_mask(pads, q_len, q_offset=given_offset, causal=is_causal, BLOCK_SIZE=block_size)
    assert_same_block_mask(ours, textbook(pads, q_len, q_offset, is_causal, block_size))
    mask = create_mask(ours.mask_mod, pads.shape[0], 1, q_len, pads.shape[1], device)
    assert torch.equal(mask[:, 0], explicit_mask(pads, q_len, q_offset, is_causal))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_size"),
    [(2100, 2100, 16), (1016, 1016, 8), (1024, 1024, 8), (1, 32767, 1), (1, 32768, 1)],
)
def test_more_tiles_in_a_row_than_a_small_integer_counts(device: str, q_len: int, kv_len: int, block_size: int) -> None:
    pads = torch.rand(2, kv_len, device=device) < 0.1
    pads[1] = False
    ours = create_causal_padding_block_mask(pads, q_len, BLOCK_SIZE=block_size)
    assert_same_block_mask(ours, textbook(pads, q_len, kv_len - q_len, True, block_size))


@pytest.mark.parametrize("device", DEVICES)
def test_defaults(device: str) -> None:
    pads = torch.zeros(2, 300, dtype=torch.bool, device=device)
    pads[0, 120:] = pads[1, :130] = True
    whole = create_block_mask(and_masks(causal, create_padding_mask(pads)), 2, None, 300, 300, device=device)
    assert_same_block_mask(create_causal_padding_block_mask(pads), whole)
    last = textbook(pads, 40, 260, True, 128)
    assert_same_block_mask(create_causal_padding_block_mask(pads, 40), last)
    assert_same_block_mask(create_causal_padding_block_mask(pads, q_offset=260), last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [700, 100])
def test_the_operator_that_hides_the_lists_from_the_compiler(device: str, q_len: int) -> None:
    ends = torch.randint(0, 700, (2, 3, 1, 12, 1), device=device, dtype=torch.int32).sort(0).values
    queries, keys = ends[:, :, :, : -(-q_len // 128)].flip(0), ends[:, :, :, 6:]
    numbers = torch.arange(1, 7, dtype=torch.int8, device=device)
    torch.library.opcheck(_opaque_list_tiles, (queries, keys, numbers, False))
    torch.library.opcheck(_opaque_list_tiles, (keys, queries, numbers, True))


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


def test_no_int_is_captured() -> None:
    # A captured int is compiled in, and every decoding step would compile again.
    def captured(function) -> list:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        return [x for cell in cells for x in (captured(cell) if callable(cell) else [cell])]

    pads = torch.zeros(1, 300, dtype=torch.bool)
    contents = captured(create_causal_padding_block_mask(pads, 1, q_offset=7).mask_mod)
    assert contents and not any(isinstance(x, int) for x in contents)


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
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize(("batch_size", "kv_len", "mib"), [(8, 32768, 20), (8, 131072, 200)])
def test_memory(batch_size: int, kv_len: int, mib: int) -> None:
    pads = (
        torch.arange(kv_len, device="cuda") >= torch.linspace(kv_len // 4, kv_len, batch_size, device="cuda")[:, None]
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    create_causal_padding_block_mask(pads)
    assert torch.cuda.max_memory_allocated() - before <= mib * 2**20


PADS = torch.zeros(2, 100, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pads": PADS.int()}, TypeError, r"pads must be torch.bool.*attention_mask == 0"),
        ({"pads": PADS[0]}, ValueError, r"pads must be \(batch_size, max_seq_len\).*got \(100,\)"),
        ({"pads": PADS[:, :0]}, ValueError, r"neither of them 0; got \(2, 0\)"),
        ({"q_len": 0}, ValueError, "among the 100 keys.*q_len=0"),
        ({"q_len": -1}, ValueError, "among the 100 keys.*q_len=-1"),
        ({"q_len": 101}, ValueError, "among the 100 keys.*q_len=101"),
        ({"q_offset": -1}, ValueError, "among the 100 keys.*q_offset=-1"),
        ({"q_offset": 100}, ValueError, "among the 100 keys.*q_offset=100"),
        ({"q_len": 10, "q_offset": 91}, ValueError, "among the 100 keys.*q_len=10, q_offset=91"),
        ({"q_offset": torch.tensor(5)}, ValueError, "q_len must be given beside a tensor q_offset"),
        ({"q_len": 10, "q_offset": torch.zeros(2, dtype=int)}, TypeError, "q_offset must be an int or a 0-d integer"),
        ({"q_len": 10, "q_offset": torch.tensor(1.0)}, TypeError, r"a 0-d integer tensor on cpu; got tensor\(1\.\)"),
        ({"q_len": 10, "q_offset": torch.tensor(1, device="meta")}, TypeError, "a 0-d integer tensor on cpu.*meta"),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_causal_padding_block_mask(**{"pads": PADS, **arguments})
