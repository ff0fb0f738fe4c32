"""One long sequence divided between processes: each holds a part of its tokens, and attends to all of them.

    python examples/several_gpus.py

It starts two processes itself, on two GPUs if there are two, and else on the CPU. Every process gives its
part of query, key and value, and receives its part of the output. In between it computes some of the heads
for the whole sequence, so it needs the block mask of the whole. If batches or heads are divided instead, each
process calls `attend` for its own, and nothing of this is needed.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from causal_padded_flexattn import attend, create_causal_padding_block_mask
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

    part = lambda x: x.detach().chunk(RANKS, dim=2)[rank]
    own = [part(x).requires_grad_() for x in (query, key, value)]  # (BATCH, heads, LENGTH / RANKS, SIZE)
    output = sequence_parallel_attention(*own, block_mask, mesh, score_mod=alibi)
    own_gradients = torch.autograd.grad(output.square().sum(), own)

    torch.testing.assert_close(output, part(whole), rtol=1e-3, atol=1e-4)
    for ours, expected in zip(own_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, part(expected), rtol=1e-3, atol=1e-4)
    if rank == 0:
        print(f"{LENGTH} tokens on {RANKS} processes ({device}): {output.shape[2]} on each")
        print("output and gradients are those of one process, with padding and ALiBi in all heads")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not there on every machine
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder,), RANKS)
