"""Keys that are stored in any order, and attention over tokens that ranks keep in such orders."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import DEVICES, PAIRS_OF_DEVICES, assert_as_exact, with_gradients, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import rows_of_padding
from test_runs import BLOCK_SIZES, SIDES, assert_as_written_out
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from causal_padded_flexattn import (
    attend,
    causal_padded_attention,
    create_block_mask_from_runs,
    create_causal_padding_block_mask,
)
from causal_padded_integrations.context_parallel import (
    balanced_places,
    context_parallel_attention,
    context_parallel_block_mask,
)


def orders(kind: str, batch_size: int, length: int, block: int) -> Tensor:
    """(S,) or (B, S): permutations of the places, by tokens or by blocks."""
    if kind == "tokens":
        return torch.randperm(length)
    if kind == "tokens of each row":
        return torch.rand(batch_size, length).argsort(1)
    blocks = torch.rand(batch_size, -(-length // block)).argsort(1)
    places = (blocks[:, :, None] * block + torch.arange(block)).flatten(1)
    return torch.stack([row[row < length] for row in places])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), block_size=st.sampled_from(BLOCK_SIZES), window=st.sampled_from([None, None, 1, 70]))
def test_random_orders(data: st.DataObject, block_size: Any, window: int | None) -> None:
    """Causal masks, of which keys and queries are stored in orders of their own."""
    torch.manual_seed(data.draw(st.integers(0, 2**30)))
    batch_size, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 300))
    pads = torch.tensor([data.draw(rows_of_padding(length, SIDES)) for _ in range(batch_size)])
    kinds = st.sampled_from(["tokens", "tokens of each row", "blocks"])
    keys, queries = (orders(data.draw(kinds), batch_size, length, 64) for _ in range(2))
    queries = queries[..., : data.draw(st.integers(1, length))]
    stored, query_pads = (pads.gather(1, x.expand(batch_size, -1)) for x in (keys, queries))
    first = None if window is None else queries - window + 1
    options: Any = {"query_pads": query_pads, "BLOCK_SIZE": block_size}
    ours = create_block_mask_from_runs(
        first,
        queries,
        stored,
        key_places=keys.to(data.draw(st.sampled_from([torch.int64, torch.int16]))),
        **options,
    )
    distance = queries.expand(batch_size, -1)[:, :, None] - keys.expand(batch_size, -1)[:, None]
    mask = (distance >= 0) & (distance < (window or length)) & ~query_pads[:, :, None] & ~stored[:, None]
    assert_as_written_out(ours, mask, block_size, exact=window is None)


def test_places_of_any_size() -> None:
    """With `until`, which follows the order in which the keys are stored."""
    places, until = torch.tensor([2**62, 5, -(2**62), 0]), torch.tensor([[0, 3, 1, 3]])
    pads = torch.zeros(1, 4, dtype=torch.bool)
    ours = create_block_mask_from_runs(
        torch.tensor([0, 5, -1, 0]), torch.tensor([5, 5, 2**40, 4]), pads, until=until, key_places=places
    )
    expected = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]).bool()
    assert_as_written_out(ours, expected[None], 128, exact=False)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_in_another_order(device: str) -> None:
    """Values and gradients, against float64; also from key places that are a transposed view, in a graph."""
    inputs = torch.randn(3, 2, 4, 300, 32, device=device)
    grad = torch.randn(2, 4, 300, 32, device=device)
    places = torch.rand(2, 300, device=device).argsort(1)
    pads = (places > 200) & torch.tensor([[True], [False]], device=device)
    seen = (places[:, :, None] >= places[:, None]) & ~pads[:, :, None] & ~pads[:, None]

    def ours(query: Tensor, key: Tensor, value: Tensor, places: Tensor = places) -> Tensor:
        return attend(query, key, value, create_block_mask_from_runs(None, places, pads, key_places=places))

    results = with_gradients(ours, inputs, grad)
    plain, exact = (
        with_gradients(lambda *x: written_out(*x, seen)[0], inputs.to(dtype), grad.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert_as_exact(results, plain, exact)
    transposed = places.mT.contiguous().mT
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    torch.testing.assert_close(compiled(*inputs, transposed), results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (torch.arange(7), r"key_places must be of shape \(S\), but S is 7 in it and 8 in pads"),
        (torch.zeros(3, 8).long(), "but B is 3 in it and 2 in pads"),
        (torch.zeros(8), "key_places must be a tensor of integers, one for each key"),
    ],
)
def test_bad_places(places: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        create_block_mask_from_runs(None, None, torch.zeros(2, 8, dtype=torch.bool), key_places=places)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), ranks=st.sampled_from([1, 2, 4]), side=st.sampled_from(["right", "left"]))
def test_balanced_places(data: st.DataObject, ranks: int, side: str) -> None:
    """Every token once, in whole blocks."""
    blocks = ranks * data.draw(st.integers(1, 8))
    real = torch.tensor(data.draw(st.lists(st.integers(0, 8 * blocks), min_size=2, max_size=2)))[:, None]
    place = torch.arange(8 * blocks)
    pads = place >= real if side == "right" else place < 8 * blocks - real
    places = balanced_places(pads, ranks, 8)
    assert torch.equal(places.sort(1).values, place.expand(2, -1))
    assert (places.unflatten(1, (-1, 8)).diff(dim=2) == 1).all()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_have_equal_numbers_of_tiles(ranks: int, window: int | None) -> None:
    """But for one or two of some hundred, where blocks do not allow it."""
    place = torch.arange(512)
    pads = torch.stack([place >= 512, place >= 300, place < 212])
    block_mask = create_causal_padding_block_mask(pads, BLOCK_SIZE=8, window=window)
    tiles = block_mask.to_dense()[:, 0].sum(-1)  # (B, blocks)
    order = balanced_places(pads, ranks, 8).unflatten(1, (-1, 8))[:, :, 0] // 8
    shares = tiles.gather(1, order).unflatten(1, (ranks, -1)).sum(2)
    assert (shares.max(1).values - shares.min(1).values <= 2).all() and shares.min() >= 100


def test_lengths_that_ranks_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"must be a multiple of ranks \* block.*got 40 tokens, 2 ranks"):
        balanced_places(torch.zeros(1, 40, dtype=torch.bool), 2, 8 * 3)


def compare(mesh: DeviceMesh, device: str, heads: tuple[int, int], window: int | None, alibi: bool) -> None:
    rank, ranks, length = mesh.get_local_rank(), mesh.size(), 256
    inputs = [
        torch.randn(2, n, length, 16).to(device).requires_grad_() for n in (heads[0], heads[1], heads[1])
    ]
    grads = torch.randn(2, heads[0], length, 16).to(device), torch.randn(2, heads[0], length).to(device)
    pads = torch.arange(length) >= torch.tensor([[length], [130]])
    pads[0, :40] = True
    pads[1, 70:90] = True
    pads = pads.to(device)
    slopes = torch.linspace(0.1, 1, heads[0]).to(device)
    tilt: Any = (lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)) if alibi else None
    whole = causal_padded_attention(*inputs, pads, window=window, score_mod=tilt, return_lse=True)
    real = ~pads[:, None]
    loss = lambda x, lse, one, other, real: (x * one).sum() + (lse.masked_fill(~real, 0) * other).sum()
    expected = torch.autograd.grad(loss(*whole, *grads, real), inputs)

    places = balanced_places(pads, ranks, 16)
    mine = places.chunk(ranks, dim=1)[rank]
    part = lambda x: x.gather(
        2, mine.view(2, 1, -1, *[1] * (x.dim() - 3)).expand(*x.shape[:2], -1, *x.shape[3:])
    )
    block_mask = context_parallel_block_mask(
        pads, places, mesh, window=window, block=16 if device == "cpu" else 128
    )
    own = [part(x.detach()).requires_grad_() for x in inputs]
    options: Any = {"score_mod": tilt, "places": places} if alibi else {}
    output = context_parallel_attention(*own, block_mask, mesh, return_lse=True, **options)
    results = torch.autograd.grad(loss(*output, *map(part, grads), part(real)), own)
    for result, truth in zip((*output, *results), (*whole, *expected), strict=True):
        assert type(result) is Tensor
        torch.testing.assert_close(result, part(truth), rtol=1e-4, atol=1e-4)
    if heads[0] == heads[1]:
        way = partial(context_parallel_attention, block_mask=block_mask, mesh=mesh)
        compiled = torch.compile(way, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
        for ours, eager in zip(
            *(with_gradients(x, own, part(grads[0])) for x in (compiled, way)), strict=True
        ):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def attend_on_all(rank: int, store: str, device: str, ranks: int) -> None:
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    mesh = init_device_mesh(device, (ranks,))
    torch.manual_seed(0)
    for heads, window, alibi in (((16, 16), None, False), ((16, 2), 50, True), ((15, 3), None, True)):
        compare(mesh, device, heads, window, alibi)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("device", PAIRS_OF_DEVICES)
def test_two_ranks(device: str, tmp_path: Path) -> None:
    mp.spawn(attend_on_all, (str(tmp_path / "store"), device, 2), nprocs=2)


def test_four_ranks(tmp_path: Path) -> None:
    mp.spawn(attend_on_all, (str(tmp_path / "store"), "cpu", 4), nprocs=4)


class Mesh:
    def __init__(self, *shape: int) -> None:
        self.shape, self.ndim = shape, len(shape)

    def size(self) -> int:
        return int(torch.tensor(self.shape).prod())


def test_what_does_not_fit() -> None:
    x, pads = torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"window must be at least 1, .*; got 0"):
        context_parallel_block_mask(pads, torch.arange(16)[None], Mesh(2), window=0)
    mask, whole = (create_causal_padding_block_mask(pads, n) for n in (8, 16))
    for mesh, block_mask, options, message in (
        (Mesh(2, 2), mask, {}, "mesh must have one dimension.*got 2"),
        (Mesh(2), whole, {}, r"this rank's queries against all keys.*got \(1, 1, 16, 16\) and 2 ranks"),
        (Mesh(2), pads, {}, "block_mask must be a BlockMask.*got .*Tensor"),
        (Mesh(2), mask, {"score_mod": lambda score, *_: score}, "a score_mod needs places"),
    ):
        with pytest.raises(ValueError, match=message):
            context_parallel_attention(x, x, x, block_mask, mesh, **options)
