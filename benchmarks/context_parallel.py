"""How evenly attention is divided between ranks that each keep some of the tokens, by the order they keep.

python benchmarks/context_parallel.py      on one CUDA card

The shares of the ranks run in turn: each rank's queries against all keys, forward and backward. The orders
are plain (neighbouring tokens stay together), head-tail (a piece from the front and one from the back), and
balanced (that of causal_padded_integrations.context_parallel). Results go to
benchmarks/results/context_parallel.json, and --table shows them.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import padded
from common import Row, differentiate, milliseconds, parser_of, save, show, spaced, table, wall_milliseconds
from torch import Tensor
from tqdm import tqdm

import causal_padded_flexattn as cpf
from causal_padded_integrations.context_parallel import balanced_places, context_parallel_block_mask

KINDS: dict[str, tuple[list[float], int | None]] = {  # the lengths, as parts of a row, and the window
    "one row, 40 % right padding": ([0.6], None),
    "eight lengths": ([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 1.0], None),
    "one row, 40 % right padding, window 1024": ([0.6], 1024),
}
SIZES, RANKS, BLOCK = (32768, 131072), (2, 4, 8), 128


@dataclass
class Rank:
    """One of a mesh that is not there."""

    rank: int
    ranks: int
    ndim: int = 1

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank


def plain(pads: Tensor, ranks: int, block: int) -> Tensor:
    return torch.arange(pads.shape[1], device=pads.device).expand_as(pads)


def head_tail(pads: Tensor, ranks: int, block: int) -> Tensor:
    pieces = plain(pads, ranks, block).chunk(2 * ranks, dim=1)
    return torch.cat([pieces[i] for rank in range(ranks) for i in (rank, 2 * ranks - 1 - rank)], 1)


ORDERS = {"plain": plain, "head-tail": head_tail, "balanced": balanced_places}


def measure(pads: Tensor, places: Tensor, ranks: int, block: int, window: int | None, heads: int) -> Row:
    """The milliseconds of every rank's share, and of the first rank's mask."""
    (batch_size, length), device = pads.shape, pads.device.type
    dtype, size = (torch.bfloat16, 128) if device == "cuda" else (torch.float32, 16)
    query, key, value, grad = torch.randn(4, batch_size, heads, length, size, device=device, dtype=dtype)
    times = []
    for rank in range(ranks):
        make = partial(
            context_parallel_block_mask, pads, places, Rank(rank, ranks), window=window, block=block
        )
        attend = partial(cpf.attend, block_mask=make())
        own = slice(rank * length // ranks, (rank + 1) * length // ranks)  # of random numbers: any will do
        inputs = [query[:, :, own], key, value]
        times.append(milliseconds(partial(differentiate, attend, inputs, grad[:, :, own]), device)[0][1])
    return {"rank_ms": times, "mask_ms": wall_milliseconds(make, device, 10)[1]}


def context_parallel_table(result: Row) -> str:
    """The slowest rank's milliseconds, and in brackets how much of its time the mean rank works."""
    cells = []
    for row in result["results"]:
        name = f"{row['kind']}, {spaced(row['length'])} tokens, {row['ranks']} ranks"
        slowest = max(row["rank_ms"])
        cells.append((name, row["order"], f"{slowest:.1f} ({statistics.mean(row['rank_ms']) / slowest:.0%})"))
        if row["order"] == "balanced":
            cells.append((name, "its mask", f"{row['mask_ms']:.2f}"))
    return table("ms of the slowest rank (mean of it)", cells)


TABLES = {"context-parallel": context_parallel_table}


def main() -> None:
    args = parser_of(__doc__).parse_args()
    if args.table:
        return print(show("context-parallel", context_parallel_table, args.results))
    on_cuda, rows = args.device == "cuda", list[Row]()
    sizes, block, heads = (SIZES, BLOCK, 16) if on_cuda else ((128,), 8, 2)
    for length in sizes:
        for kind, (parts, window) in tqdm(KINDS.items(), desc=str(length)):
            pads = padded([int(length * part) for part in parts], length, "right", args.device)
            reach = window if on_cuda else window and 20
            for ranks in RANKS:
                for order, make in ORDERS.items():
                    row: Row = {"length": length, "kind": kind, "ranks": ranks, "order": order}
                    places: Any = make(pads, ranks, block)
                    rows.append(row | measure(pads, places, ranks, block, reach, heads))
                    tqdm.write(str(rows[-1]))
                    save("context_parallel", rows, args.results, args.device)


if __name__ == "__main__":
    main()
