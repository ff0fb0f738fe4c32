"""Sampling with the bits of training.

    python examples/same_bits.py

Reinforcement learning samples tokens with one kernel and trains on them with another, and the two differ in
the last bits. Here a step of sampling runs the kernel of training: it computes a block of queries, over the
same tiles in the same order. The query heads that share a key head are rows of one block. From torch 2.15 on,
these rows have the bits of training on CUDA, in a batch of another size and in a cache of another capacity. A
decoding step is faster, and has other bits. Both times are printed. The other layers of a model need
operators whose bits do not depend on the batch, either.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.benchmark import Timer

from causal_padded_flexattn import attend, create_block_mask_from_runs, create_causal_padding_block_mask

ROWS = 64  # in a block of a step. Training has 128, and each row is computed alone


def mask_of_training(place: int, group: int, pads: Tensor, rows: int = ROWS) -> BlockMask:
    """The mask of a step at `place`, where `group` query heads share a key head. All layers share it.

    `pads`, (B, capacity), marks the padding before the prompts alone, here and in training: padding among the
    queries of a block changes the order of its sums. Causality hides what comes later. With 64 rows the bits
    hold for bfloat16, float16 and heads of 64 and 128. With 128 they hold for other heads and float32, too.
    """
    places = torch.arange(rows, device=pads.device) + place // 128 * 128
    places[:group] = place  # the other rows stay in their block, so that its tiles are those of training
    query_pads = pads.new_zeros(len(pads), rows)
    return create_block_mask_from_runs(None, places, pads, query_pads=query_pads, BLOCK_SIZE=(rows, 128))


def step_of_training(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
    """Attention of one token, query (B, Hq, 1, E), by the kernel that training runs, in Hkv heads."""
    (batch_size, heads, _, size), kv_heads = query.shape, key.shape[1]
    group = heads // kv_heads
    rows = query.new_zeros(batch_size, kv_heads, block_mask.shape[2], size)
    rows[:, :, :group] = query.view(batch_size, kv_heads, group, size)
    output = attend(rows, key, value, block_mask, backend="triton")
    return output[:, :, :group].reshape(query.shape)


def mask_of_decoding(place: int, group: int, pads: Tensor) -> BlockMask:
    return create_causal_padding_block_mask(pads, 1, q_offset=place)


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # as in training: no bits depend on the batch
    on_cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_cuda else ("cpu", torch.float32)
    length, capacity, heads, kv_heads, size = (1024, 4096, 32, 8, 128) if on_cuda else (256, 384, 4, 2, 16)
    shapes = [(4, n, length, size) for n in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    pads = torch.zeros(4, length, dtype=torch.bool, device=device)
    pads[1, :128] = True  # prompts are padded on the left by whole blocks

    training = attend(query, key, value, create_causal_padding_block_mask(pads), backend="triton")

    rows = [1, 2]  # sampled in another batch, into a larger cache
    cache = key.new_zeros(2, kv_heads, capacity, size), value.new_zeros(2, kv_heads, capacity, size)
    sampled_pads = torch.zeros(2, capacity, dtype=torch.bool, device=device)
    sampled_pads[:, :length] = pads[rows]
    ways = {
        "by the kernel of training": (mask_of_training, step_of_training),
        "by the kernel for decoding": (mask_of_decoding, attend),
    }
    results: dict[str, list[Tensor]] = {name: [] for name in ways}
    with torch.no_grad():
        for place in range(length):
            for x, whole in zip(cache, (key, value), strict=True):
                x[:, :, place] = whole[rows, :, place]  # a model computes these at every step
            if place < length - 40:
                continue  # a prompt
            for name, (make_mask, step) in ways.items():
                block_mask = make_mask(place, heads // kv_heads, sampled_pads)
                results[name].append(step(query[rows, :, place : place + 1], *cache, block_mask))
        for name, (make_mask, step) in ways.items():
            found, expected = torch.cat(results[name], 2), training[rows, :, length - 40 :]
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
            same = (found == expected).all(-1).float().mean().item()
            block_mask = make_mask(length - 1, heads // kv_heads, sampled_pads)
            known = {"step": step, "x": (query[rows, :, -1:], *cache, block_mask)}
            time = Timer("step(*x)", globals=known).blocked_autorange(min_run_time=0.1).median
            print(f"{name}: {same:.0%} of the rows have the bits of training; {time * 1e6:.0f} µs a step")
            if on_cuda and torch.__version__ >= "2.15" and step is step_of_training:
                assert same == 1
    if not on_cuda:
        print("this CPU checks the values; the bits show on CUDA")


if __name__ == "__main__":
    main()
