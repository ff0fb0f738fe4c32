"""What a decoding step's attention costs over a padded cache, beside the memory that it must read.

python benchmarks/decode.py      on a CUDA card

Sequences of varying length, padded on the left, and an eighth of the cache not written yet. Results go to
benchmarks/results/decode.json.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, Row, compile_afresh, milliseconds, save
from torch import Tensor
from tqdm import tqdm

from causal_padded_flexattn import causal_padded_attention, create_causal_padding_block_mask

# B, Hq, Hkv, L, S, D
SIZES = [
    (8, 32, 8, 1, 4096, 128),
    (32, 32, 8, 1, 4096, 128),
    (8, 16, 16, 1, 4096, 64),
    (1, 32, 8, 1, 131072, 128),
    (8, 32, 8, 1, 32768, 128),
    (13, 32, 8, 1, 4096, 128),
    (8, 32, 8, 16, 4096, 128),
    (8, 32, 8, 64, 4096, 128),
]
TINY = [(3, 4, 2, 1, 60, 16), (1, 2, 2, 5, 40, 16)]


def copy_rate(device: str) -> float:
    """Bytes a second that a large copy reads and writes."""
    x = torch.ones(2**30 if device == "cuda" else 2**20, dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    (_, median, _), _ = milliseconds(lambda: y.copy_(x), device)
    return 2 * x.numel() / median * 1e3


def cache_pads(batch_size: int, q_len: int, kv_len: int, device: str) -> tuple[Tensor, int]:
    """(B, S), and the place of the first query: the longest sequence has no padding before it."""
    written = kv_len - kv_len // 8
    shares = torch.linspace(0.25, 1, batch_size) if batch_size > 1 else torch.tensor([0.45])
    begin = (written - (shares * written).long()).to(device)[:, None]
    place = torch.arange(kv_len, device=device)
    return (place < begin) | (place >= written), written - q_len


def ways(inputs: list[Tensor], pads: Tensor, offset: int) -> dict[str, Callable[[], Tensor]]:
    query, key = inputs[:2]
    q_len, kv_len = query.shape[2], key.shape[2]
    q_offset = torch.tensor(offset, device=pads.device)
    block_mask = create_causal_padding_block_mask(pads, q_len, q_offset=q_offset)
    rows = offset + torch.arange(q_len, device=pads.device)
    seen = torch.arange(kv_len, device=pads.device) <= rows[:, None]
    mask = (seen & ~pads[:, None])[:, None]  # (B, 1, L, S)
    mask = mask | ~mask.any(-1, keepdim=True)
    return {
        "block mask": partial(create_causal_padding_block_mask, pads, q_len, q_offset=q_offset),
        "ours": partial(causal_padded_attention, *inputs, pads, block_mask=block_mask),
        "SDPA, mask row": partial(
            F.scaled_dot_product_attention, *inputs, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
        ),
    }


@torch.no_grad()
def measure(size: tuple[int, ...], device: str, rate: float) -> list[Row]:
    batch_size, heads, kv_heads, q_len, kv_len, head_dim = size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pads, offset = cache_pads(batch_size, q_len, kv_len, device)
    shapes = [(heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)]
    inputs = [torch.randn(batch_size, *shape, head_dim, device=device, dtype=dtype) for shape in shapes]
    token = 2 * kv_heads * head_dim * dtype.itemsize  # key and value
    real, rows = int((~pads).sum()), []
    sizes = dict(zip(("batch_size", "heads", "kv_heads", "q_len", "kv_len", "head_dim"), size, strict=True))
    sizes |= {"real_tokens": real, "limit_ms": real * token / rate * 1e3}
    sizes |= {"limit_of_all_ms": pads.numel() * token / rate * 1e3}
    results = {}
    for way, run in ways(inputs, pads, offset).items():
        if way != "block mask":
            real_queries = ~pads[:, offset : offset + q_len]  # (B, L)
            results[way] = run().transpose(1, 2)[real_queries].float()
        quartiles, host = milliseconds(run, device)
        rows.append({**sizes, "way": way, "ms": quartiles[1], "quartiles": quartiles, "host_ms": host})
    difference = (results["ours"] - results["SDPA, mask row"]).abs().max()
    if not difference < 2e-2 * results["SDPA, mask row"].abs().max():
        raise ValueError(f"{size}: ours and SDPA differ by {difference}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries it out at tiny sizes"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    compile_afresh()
    rate, rows = copy_rate(args.device), []
    for size in tqdm(SIZES if args.device == "cuda" else TINY, desc="decode"):
        rows += measure(size, args.device, rate)  # one process: every size comes after other batch sizes
        save("decode", rows, args.results, args.device, copy_bytes_per_s=rate)


if __name__ == "__main__":
    main()
