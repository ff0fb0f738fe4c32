"""Decoding into a cache of fixed size: prompts padded on the left, a free row, and on CUDA one graph a step.

    python examples/decoding.py

What is not written yet counts as padding, and so does a row of the batch that is free. A step is the same
sequence of kernels each time, because the place of the next token is a tensor: a CUDA graph can replay it.
"""

import torch
from torch import Tensor

from causal_padded_flexattn import attend, causal_padded_attention, create_causal_padding_block_mask

HEADS, KV_HEADS, SIZE, ROOM, STEPS = 8, 2, 64, 512, 6
PROMPTS = [5, 2, 0]  # tokens of each prompt; the last row of the batch is free
device = "cuda" if torch.cuda.is_available() else "cpu"


def heads(count: int, tokens: int) -> Tensor:
    """(B, count, tokens, SIZE): random numbers stand for what a layer makes of its tokens."""
    return torch.randn(len(PROMPTS), count, tokens, SIZE, device=device)


class Cache:
    """Keys and values of one layer, which of their places are padding, and where the next token goes."""

    def __init__(self) -> None:
        self.key, self.value = torch.zeros(2, len(PROMPTS), KV_HEADS, ROOM, SIZE, device=device)
        self.pads = torch.ones(len(PROMPTS), ROOM, dtype=torch.bool, device=device)
        self.is_free = torch.tensor([length == 0 for length in PROMPTS], device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def write(self, key: Tensor, value: Tensor) -> None:
        places = self.place + torch.arange(key.shape[2], device=device)
        self.key.index_copy_(2, places, key)
        self.value.index_copy_(2, places, value)


@torch.no_grad()
def prefill(cache: Cache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All prompts at once. They are padded on the left, so that they end at the same place."""
    length = query.shape[2]
    cache.write(key, value)
    for row, tokens in enumerate(PROMPTS):
        cache.pads[row, length - tokens : length] = False
    block_mask = create_causal_padding_block_mask(cache.pads, length, q_offset=0)
    output = attend(query, cache.key, cache.value, block_mask)
    cache.place += length
    return output


@torch.no_grad()
def step(cache: Cache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One token of each row. Position ids are (~pads).sum(1) - 1: they count real tokens."""
    cache.write(key, value)
    cache.pads.index_copy_(1, cache.place, cache.is_free[:, None])  # a free row stays padding
    block_mask = create_causal_padding_block_mask(cache.pads, 1, q_offset=cache.place[0])
    output = attend(query, cache.key, cache.value, block_mask)
    cache.place += 1
    return output


def record(cache: Cache, inputs: list[Tensor]):
    """The step as a function: eager on the CPU, and the replay of one CUDA graph on CUDA."""
    if device == "cpu":
        return lambda: step(cache, *inputs)
    saved = [x.clone() for x in (cache.key, cache.value, cache.pads, cache.place)]
    step(cache, *inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(cache, *inputs)
    for x, y in zip((cache.key, cache.value, cache.pads, cache.place), saved, strict=True):
        x.copy_(y)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


if __name__ == "__main__":
    torch.manual_seed(0)
    longest, total = max(PROMPTS), max(PROMPTS) + STEPS
    query, key, value = heads(HEADS, total), heads(KV_HEADS, total), heads(KV_HEADS, total)
    cache = Cache()
    outputs = [prefill(cache, *(x[:, :, :longest] for x in (query, key, value)))]
    inputs = [x[:, :, longest : longest + 1].clone() for x in (query, key, value)]
    run = record(cache, inputs)
    for i in range(longest, total):
        for x, whole in zip(inputs, (query, key, value), strict=True):
            x.copy_(whole[:, :, i : i + 1])
        outputs.append(run().clone())

    # The same tokens in one pass, without a cache.
    pads = torch.arange(total, device=device) < longest - torch.tensor(PROMPTS, device=device)[:, None]
    pads[-1] = True
    whole = causal_padded_attention(query, key, value, pads)
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole, rtol=1e-3, atol=1e-4)
    assert not whole[-1].any()
    print(f"prompts of {PROMPTS} tokens, then {STEPS} steps into a cache of {ROOM}: as in one pass")
    print(f"real tokens of each row: {(~cache.pads).sum(1).tolist()}, and the free row's output is zero")
