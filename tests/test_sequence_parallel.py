"""sequence_parallel_attention on two ranks is what one rank computes."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import PAIRS_OF_DEVICES
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from causal_padded_flexattn import (
    causal_padded_attention,
    create_causal_padding_block_mask,
    sequence_parallel_attention,
)

RANKS = 2


def compare(
    rank: int, mesh: DeviceMesh, device: str, heads: tuple[int, int], causal: bool, value_size: int
) -> None:
    length, shapes = 300, ((heads[0], 32), (heads[1], 32), (heads[1], value_size))
    inputs = [torch.randn(3, n, length, size).to(device).requires_grad_() for n, size in shapes]
    grad_output = torch.randn(3, heads[0], length, value_size).to(device)
    pads = (torch.arange(length) >= torch.tensor([[length], [130], [1]])).to(device)
    pads[0, :7] = True
    expected = causal_padded_attention(*inputs, pads, causal=causal)
    gradients = torch.autograd.grad(expected, inputs, grad_output)

    ours = [x.detach().chunk(RANKS, dim=2)[rank].requires_grad_() for x in inputs]
    block_mask = create_causal_padding_block_mask(pads, causal=causal)
    output = sequence_parallel_attention(*ours, pads, mesh, block_mask=block_mask)
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


def attend(rank: int, store: str, device: str) -> None:
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (RANKS,))
    torch.manual_seed(0)
    for heads, causal, value_size in (
        ((4, 4), True, 32),
        ((4, 2), False, 32),
        ((4, 1), True, 16),
        ((4, 4), True, 16),
    ):
        compare(rank, mesh, device, heads, causal, value_size)
    inputs, pads = (
        torch.randn(3, 2, 4, 200, 32).to(device),
        (torch.arange(200) >= 150).expand(2, -1).to(device),
    )
    whole = causal_padded_attention(*inputs, pads, window=50, return_lse=True)
    parts = [x.chunk(RANKS, dim=2)[rank] for x in inputs]
    ours = sequence_parallel_attention(*parts, pads, mesh, window=50, return_lse=True)
    for result, truth in zip(ours, whole, strict=True):
        torch.testing.assert_close(result, truth.chunk(RANKS, dim=2)[rank], rtol=1e-5, atol=1e-5)
    documents = torch.arange(200, device=device).expand(2, -1) // 60  # of the whole sequence, on every rank
    seen = {"documents": documents, "spans": documents * 3, "until": documents * 0 + 120 + documents * 60}
    whole = causal_padded_attention(*inputs, pads, **seen)
    ours = sequence_parallel_attention(*parts, pads, mesh, **seen)
    torch.testing.assert_close(ours, whole.chunk(RANKS, dim=2)[rank], rtol=1e-5, atol=1e-5)
    compiled = torch.compile(partial(sequence_parallel_attention, pads=pads, mesh=mesh), fullgraph=True)
    expected = sequence_parallel_attention(*parts, pads, mesh)
    torch.testing.assert_close(compiled(*parts), expected, rtol=1e-5, atol=1e-5)
    dist.barrier()  # else one rank may leave while the other's exchange still has a thread
    dist.destroy_process_group()


@pytest.mark.parametrize("device", PAIRS_OF_DEVICES)
def test_two_ranks(device: str, tmp_path: Path) -> None:
    mp.spawn(attend, (str(tmp_path / "store"), device), nprocs=RANKS)


class Mesh:
    def __init__(self, *shape: int) -> None:
        self.shape, self.ndim = shape, len(shape)

    def size(self) -> int:
        return int(torch.tensor(self.shape).prod())


@pytest.mark.parametrize(
    ("mesh", "heads", "length", "message"),
    [
        (Mesh(2, 2), (4, 4), 10, "mesh must have one dimension.*got ndim 2"),
        (Mesh(3), (6, 6), 10, r"length of pads / ranks, head size\); got query \(1, 6, 10, 8\) .*ranks 3"),
        (
            Mesh(4),
            (6, 2),
            10,
            r"ranks must divide the heads of query.*use fewer; got ranks 4, heads \(6, 2\)",
        ),
        (Mesh(4), (12, 3), 10, r"and divide those of key or be a multiple.*heads \(12, 3\)"),
        (Mesh(4), (12, 6), 10, r"got ranks 4, heads \(12, 6\)"),
    ],
)
def test_bad_input(mesh: Mesh, heads: tuple[int, int], length: int, message: str) -> None:
    query, key, value = (torch.zeros(1, n, length, 8) for n in (heads[0], heads[1], heads[1]))
    with pytest.raises(ValueError, match=message):
        sequence_parallel_attention(query, key, value, torch.zeros(1, 40, dtype=torch.bool), mesh)


def test_every_tensor_is_this_ranks_part() -> None:
    query, whole, pads = (
        torch.zeros(1, 4, 10, 8),
        torch.zeros(1, 4, 40, 8),
        torch.zeros(1, 40, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match=r"value must be this rank's part.*got value \(1, 4, 40, 8\) "):
        sequence_parallel_attention(query, query, whole, pads, Mesh(4))
    with pytest.raises(ValueError, match=r"query must be this rank's part.*got query \(4, 10, 8\) "):
        sequence_parallel_attention(query[0], query, query, pads, Mesh(4))
