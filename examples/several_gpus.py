"""One long sequence divided between processes: each holds a part of its tokens, and attends to all of them.

    python examples/several_gpus.py

It starts two processes itself, on two GPUs if there are two, and else on the CPU. Every process gives its
part of query, key and value, and receives its part of the output. There are two ways. In the first a process
computes some of the heads for the whole sequence, and needs the block mask of the whole. In the second it
gathers the keys and values, and tokens are divided in an order that gives all processes the same work. If
batches or heads are divided instead, each process calls `attend` for its own, and nothing of this is needed.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from causal_padded_flexattn import attend, create_causal_padding_block_mask
from causal_padded_integrations.context_parallel import (
    balanced_places,
    context_parallel_attention,
    context_parallel_block_mask,
)
from causal_padded_integrations.sequence_parallel import sequence_parallel_attention

RANKS, BATCH, HEADS, KV_HEADS, LENGTH, SIZE = 2, 2, 4, 2, 512, 32
device = "cuda" if torch.cuda.device_count() >= RANKS else "cpu"


def run(rank: int, folder: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    mesh = init_device_mesh(device, (RANKS,))

    # In training a process has its own tokens only. Here each makes all of them, to compare.
    torch.manual_seed(0)
    query = torch.randn(BATCH, HEADS, LENGTH, SIZE).to(device).requires_grad_()
    key = torch.randn(BATCH, KV_HEADS, LENGTH, SIZE).to(device).requires_grad_()
    value = torch.randn(BATCH, KV_HEADS, LENGTH, SIZE).to(device).requires_grad_()
    pads = torch.arange(LENGTH, device=device) >= torch.tensor([[LENGTH], [300]], device=device)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0], device=device)
    alibi = lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)

    block_mask = create_causal_padding_block_mask(pads)  # of the whole sequence, on every process
    whole = attend(query, key, value, block_mask, score_mod=alibi)
    gradients = torch.autograd.grad(whole.square().sum(), (query, key, value))

    def check(way, part) -> None:
        own = [
            part(x.detach()).requires_grad_() for x in (query, key, value)
        ]  # (B, heads, LENGTH / RANKS, SIZE)
        output = way(*own)
        own_gradients = torch.autograd.grad(output.square().sum(), own)
        for ours, expected in zip((output, *own_gradients), (whole, *gradients), strict=True):
            torch.testing.assert_close(ours, part(expected), rtol=1e-3, atol=1e-4)

    in_order = lambda x: x.chunk(RANKS, dim=2)[rank]
    check(lambda *x: sequence_parallel_attention(*x, block_mask, mesh, score_mod=alibi), in_order)

    places = balanced_places(pads, RANKS)  # (BATCH, LENGTH), the same on every process
    own_places = places.chunk(RANKS, dim=1)[rank]
    balanced = lambda x: x.gather(2, own_places[:, None, :, None].expand(-1, x.shape[1], -1, SIZE))
    own_mask = context_parallel_block_mask(pads, places, mesh)
    options = {"score_mod": alibi, "places": places}
    check(lambda *x: context_parallel_attention(*x, own_mask, mesh, **options), balanced)

    tiles = torch.stack([own_mask.kv_num_blocks.sum(), own_mask.full_kv_num_blocks.sum()]).sum()
    found = [torch.zeros_like(tiles) for _ in range(RANKS)]
    dist.all_gather(found, tiles)
    if rank == 0:
        print(f"{LENGTH} tokens on {RANKS} processes ({device}): {LENGTH // RANKS} on each")
        print("output and gradients are those of one process, both ways, with padding and ALiBi in all heads")
        print(f"tiles of the processes, balanced: {', '.join(str(int(x)) for x in found)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not there on every machine
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder,), RANKS)
