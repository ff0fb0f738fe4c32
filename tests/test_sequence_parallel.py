"""sequence_parallel_attention on two ranks is what one rank computes."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import PAIRS_OF_DEVICES
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from causal_padded_flexattn import (
    attend,
    causal,
    create_block_mask_from_runs,
    create_causal_padding_block_mask,
)
from causal_padded_integrations.sequence_parallel import sequence_parallel_attention

RANKS = 2


def compare(
    rank: int, mesh: DeviceMesh, device: str, heads: tuple[int, int], is_causal: bool, value_size: int
) -> None:
    length, shapes = 300, ((heads[0], 32), (heads[1], 32), (heads[1], value_size))
    inputs = [torch.randn(3, n, length, size).to(device).requires_grad_() for n, size in shapes]
    grad_output = torch.randn(3, heads[0], length, value_size).to(device)
    pads = (torch.arange(length) >= torch.tensor([[length], [130], [1]])).to(device)
    pads[0, :7] = True
    block_mask = (
        create_causal_padding_block_mask(pads) if is_causal else create_block_mask_from_runs(None, None, pads)
    )
    expected = attend(*inputs, block_mask)
    gradients = torch.autograd.grad(expected, inputs, grad_output)

    ours = [x.detach().chunk(RANKS, dim=2)[rank].requires_grad_() for x in inputs]
    output = sequence_parallel_attention(*ours, block_mask, mesh)
    results = torch.autograd.grad(output, ours, grad_output.chunk(RANKS, dim=2)[rank])
    for name, result, whole in zip("oqkv", (output, *results), (expected, *gradients), strict=True):
        assert type(result) is torch.Tensor
        truth = whole.chunk(RANKS, dim=2)[rank]
        # The same kernels on the same heads: the same bits. But the gradients of query and key begin with a
        # sum over the value's size, which the compiler may round otherwise for another layout: of 16 it did.
        exact = device == "cuda" and heads[1] >= RANKS
        if exact and (value_size == 32 or name in "ov"):
            assert torch.equal(result, truth), name
        else:
            torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)


def compare_score_mod(
    rank: int, mesh: DeviceMesh, device: str, heads: tuple[int, int], block_mask: BlockMask
) -> None:
    """It looks h up: the heads of the whole model, also for the gradient of what it looks up."""
    inputs = [torch.randn(2, n, 200, 32).to(device) for n in (heads[0], heads[1], heads[1])]
    slopes = torch.rand(heads[0]).to(device).requires_grad_()
    tilt = lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)
    whole = attend(*inputs, block_mask, score_mod=tilt)
    (expected,) = torch.autograd.grad(whole.square().sum(), slopes)
    parts = [x.chunk(RANKS, dim=2)[rank] for x in inputs]
    ours = sequence_parallel_attention(*parts, block_mask, mesh, score_mod=tilt)
    torch.testing.assert_close(ours, whole.chunk(RANKS, dim=2)[rank], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.square().sum(), slopes)  # what this rank adds to it
    dist.all_reduce(gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def attend_on_all(rank: int, store: str, device: str) -> None:
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (RANKS,))
    torch.manual_seed(0)
    for heads, is_causal, value_size in (
        ((4, 4), True, 32),
        ((4, 2), False, 32),
        ((4, 1), True, 16),
        ((4, 4), True, 16),
    ):
        compare(rank, mesh, device, heads, is_causal, value_size)
    inputs, pads = (
        torch.randn(3, 2, 4, 200, 32).to(device),
        (torch.arange(200) >= 150).expand(2, -1).to(device),
    )
    parts = [x.chunk(RANKS, dim=2)[rank] for x in inputs]
    window = create_causal_padding_block_mask(pads, window=50)
    whole = attend(*inputs, window, return_lse=True)
    ours = sequence_parallel_attention(*parts, window, mesh, return_lse=True)
    for result, truth in zip(ours, whole, strict=True):
        torch.testing.assert_close(result, truth.chunk(RANKS, dim=2)[rank], rtol=1e-5, atol=1e-5)
    places = torch.arange(200, device=device)
    packed = create_block_mask_from_runs(places // 60 * 60, places, pads)
    for heads in ((4, 4), (4, 2), (4, 1)):
        compare_score_mod(rank, mesh, device, heads, packed)
    make = partial(sequence_parallel_attention, block_mask=packed, mesh=mesh)
    torch.testing.assert_close(
        torch.compile(make, fullgraph=True)(*parts), make(*parts), rtol=1e-5, atol=1e-5
    )
    dist.barrier()  # else one rank may leave while the other's exchange still has a thread
    dist.destroy_process_group()


@pytest.mark.parametrize("device", PAIRS_OF_DEVICES)
def test_two_ranks(device: str, tmp_path: Path) -> None:
    mp.spawn(attend_on_all, (str(tmp_path / "store"), device), nprocs=RANKS)


MASK = create_causal_padding_block_mask(torch.zeros(1, 40, dtype=torch.bool))


class Mesh:
    def __init__(self, *shape: int) -> None:
        self.shape, self.ndim = shape, len(shape)

    def size(self) -> int:
        return int(torch.tensor(self.shape).prod())


@pytest.mark.parametrize(
    ("mesh", "heads", "length", "message"),
    [
        (Mesh(2, 2), (4, 4), 10, "mesh must have one dimension.*got 2"),
        (Mesh(3), (6, 6), 10, r"\(B, heads, S / ranks, head size\); got \(1, 6, 10, 8\).*3 ranks"),
        (Mesh(4), (6, 2), 10, r"ranks must divide the heads of query.*use fewer; got 4 ranks, 6 and 2 heads"),
        (Mesh(4), (12, 3), 10, r"and divide those of key or be a multiple.*12 and 3 heads"),
        (Mesh(4), (12, 6), 10, r"got 4 ranks, 12 and 6 heads"),
    ],
)
def test_bad_input(mesh: Mesh, heads: tuple[int, int], length: int, message: str) -> None:
    query, key, value = (torch.zeros(1, n, length, 8) for n in (heads[0], heads[1], heads[1]))
    with pytest.raises(ValueError, match=message):
        sequence_parallel_attention(query, key, value, MASK, mesh)


def test_every_tensor_is_this_ranks_part() -> None:
    query, whole = torch.zeros(1, 4, 10, 8), torch.zeros(1, 4, 40, 8)
    with pytest.raises(ValueError, match=r"value must be this rank's part.*got \(1, 4, 40, 8\)"):
        sequence_parallel_attention(query, query, whole, MASK, Mesh(4))
    with pytest.raises(ValueError, match=r"query must be this rank's part.*got \(4, 10, 8\)"):
        sequence_parallel_attention(query[0], query, query, MASK, Mesh(4))


def test_the_mask_is_of_all_heads() -> None:
    query, by_head = torch.zeros(1, 4, 10, 8), create_block_mask(causal, 1, 4, 40, 40, "cpu")
    for mask, got in ((by_head, r"\(1, 4, 40, 40\)"), (torch.zeros(1, 40), "Tensor")):
        with pytest.raises(ValueError, match=rf"block_mask must be a BlockMask of the whole.*got .*{got}"):
            sequence_parallel_attention(query, query, query, mask, Mesh(4))
