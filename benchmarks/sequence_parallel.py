"""What sequence_parallel_attention costs on any number of GPUs of one host.

torchrun --nproc-per-node N benchmarks/sequence_parallel.py      measure; for N = 1, 2, 4, ... in turn
python benchmarks/sequence_parallel.py --table                   show what was measured

Results go to benchmarks/results/sequence_parallel.json; a run replaces the rows that it measures again.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from common import Row, compile_afresh, load, parser_of, save, show, spaced, synchronize
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from causal_padded_flexattn import create_causal_padding_block_mask
from causal_padded_integrations.sequence_parallel import _Exchange, sequence_parallel_attention

# A sequence is made in as many parts, each from its own seed, so that it is the same on any number of ranks.
CHUNKS = 16


def make_part(seed: int, heads: int, length: int, head_dim: int, device: str, dtype: torch.dtype) -> Tensor:
    """(1, heads, length / ranks, head_dim): this rank's part of the sequence."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = []
    for chunk in range(rank * CHUNKS // ranks, (rank + 1) * CHUNKS // ranks):
        generator = torch.Generator(device).manual_seed(seed * CHUNKS + chunk)
        shape = (1, length // CHUNKS, heads, head_dim)
        parts.append(torch.randn(shape, device=device, dtype=dtype, generator=generator).transpose(1, 2))
    return torch.cat(parts, dim=2)


def checksums(part: Tensor) -> list[int]:
    """Of the bits of each chunk of the whole sequence, on every rank."""
    bits = part.detach().contiguous().view(torch.int16 if part.element_size() == 2 else torch.int32).long()
    weights = torch.arange(1, bits.shape[3] + 1, device=part.device)  # so that two exchanged numbers show
    ours = torch.stack([(x * weights).sum() for x in bits.chunk(CHUNKS // dist.get_world_size(), dim=2)])
    gathered = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, ours)
    return torch.cat(gathered).tolist()


def milliseconds(run: Callable[[], object], device: str, times: int) -> float:
    """Of the slowest rank: the median of three queues of runs, as many as take 2 s, or of a run alone."""

    def queue(runs: int) -> float:
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(runs):
            run()
        synchronize(device)
        slowest = torch.tensor((time.perf_counter() - start) / runs, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item() * 1e3

    queue(1)  # compiles
    alone = queue(1)
    runs = min(times, int(2000 / alone))
    return statistics.median(queue(runs) for _ in range(3)) if runs else alone


def attention_over(length: int, mesh: DeviceMesh, device: str) -> Callable[..., Tensor]:
    compile_afresh()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pads = torch.arange(length, device=device)[None] >= round(0.6 * length)  # 40 % right padding
    block_mask = create_causal_padding_block_mask(pads)
    # Triton's kernels give the same bits every time.
    return lambda *inputs: sequence_parallel_attention(*inputs, block_mask, mesh, backend="triton")


def measure(
    length: int, heads: int, kv_heads: int, head_dim: int, mesh: DeviceMesh, device: str, times: int
) -> Row:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = (heads, kv_heads, kv_heads, heads)
    *parts, grad_output = (
        make_part(seed, n, length, head_dim, device, dtype) for seed, n in enumerate(sizes)
    )
    inputs = [x.detach().requires_grad_() for x in parts]
    attend = attention_over(length, mesh, device)

    def both() -> list[Tensor]:
        output = attend(*inputs)
        return [output, *torch.autograd.grad(output, inputs, grad_output)]

    def exchange() -> None:  # what `both` does of it: query, key, value, the output, and their gradients
        gathered = [_Exchange.apply(x, 2, mesh.get_group()) for x in inputs]
        output = _Exchange.apply(gathered[0], 1, mesh.get_group())
        torch.autograd.grad(
            [output, *gathered[1:]], inputs, [grad_output, *map(torch.ones_like, gathered[1:])]
        )

    row: Row = {"checksums": [checksums(x) for x in both()]} | memory(device)
    sent, received = torch.zeros(2, grad_output.numel(), device=device, dtype=dtype)

    def wire() -> None:  # the same bytes, without the copies
        for x in (*parts, grad_output) * 2:
            dist.all_to_all_single(received[: x.numel()], sent[: x.numel()])

    runs: dict[str, Callable[[], object]] = {"forward_ms": lambda: attend(*parts), "both_ms": both}
    if mesh.size() > 1:
        runs |= {"exchange_ms": exchange, "wire_ms": wire}
    return row | {name: milliseconds(run, device, times) for name, run in runs.items()}


def measure_layers(
    layers: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mesh: DeviceMesh,
    device: str,
    times: int,
) -> Row:
    """The attention of a decoder with its projections, which add to what is kept for the backward pass."""
    dtype, width = torch.bfloat16 if device == "cuda" else torch.float32, heads * head_dim
    attend, sizes = attention_over(length, mesh, device), [heads, kv_heads, kv_heads]
    x = (
        make_part(0, heads, length, head_dim, device, dtype).transpose(1, 2).flatten(2)
    )  # (1, length / ranks, width)
    shapes = [(width, sum(sizes) * head_dim), (width, width)] * layers
    weights = [
        torch.randn(shape, device=device, dtype=dtype).div_(width**0.5).requires_grad_() for shape in shapes
    ]

    def both() -> None:
        y = x
        for into, out in zip(weights[::2], weights[1::2], strict=True):
            query, key, value = (y @ into).unflatten(-1, (-1, head_dim)).transpose(1, 2).split(sizes, dim=1)
            y = y + attend(query, key, value).transpose(1, 2).flatten(2) @ out
        torch.autograd.grad(y, weights, torch.ones_like(y))

    both()
    return {**memory(device), "both_ms": milliseconds(both, device, times)}


def memory(device: str) -> Row:
    return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if device == "cuda" else {}


def parallel_table(result: Row) -> str:
    """Milliseconds, memory, and the efficiency against the fewest ranks of a length."""
    shape = "B{batch_size} H{heads}/{kv_heads} D{head_dim}, 40 % right padding: tokens".format(**result)
    header = f"{shape} | GPUs | ms forward | with backward | exchange (wire) | GiB | efficiency | same bits"
    lines = [f"| {header} |", "|---|---|---|---|---|---|---|---|"]
    for row, base in with_base(result["results"]):
        layers = f", {row['layers']} layers" if "layers" in row else ""
        start = f"| {spaced(row['length'])}{layers} | {row['ranks']} |"
        if base is None:
            lines.append(f"{start} out of memory | | | | | |")
            continue
        exchanges = "exchange_ms" in row and row["ranks"] > 1
        cells = [
            f"{row['forward_ms']:.1f}" if "forward_ms" in row else "",
            f"{row['both_ms']:.1f}",
            f"{row['exchange_ms']:.1f} ({row['wire_ms']:.1f})" if exchanges else "",
            f"{row['peak_mib'] / 1024:.1f}" if "peak_mib" in row else "",
            f"{efficiency(row, base):.0%}",
            "" if row is base or layers else "yes" if row["checksums"] == base["checksums"] else "no",
        ]
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"sequence-parallel": parallel_table}


def size(row: Row) -> tuple[int, int, int]:
    return row.get("layers", 0), row["length"], row["ranks"]


def with_base(rows: list[Row]) -> list[tuple[Row, Row | None]]:
    """Each row in order, with that of the fewest ranks that hold its length; None if it does not fit."""
    rows = sorted(rows, key=size)
    fits = [row for row in rows if "both_ms" in row]
    return [
        (row, next(x for x in fits if size(x)[:2] == size(row)[:2]) if row in fits else None) for row in rows
    ]


def efficiency(row: Row, base: Row) -> float:
    return base["both_ms"] * base["ranks"] / (row["both_ms"] * row["ranks"])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--lengths", nargs="*", type=int, default=[2**13, 2**15, 2**17, 2**19, 2**20], metavar="S"
    )
    parser.add_argument("--layers", type=int, default=24, help="of a decoder")
    parser.add_argument(
        "--layers-lengths", nargs="*", type=int, default=[2**17], metavar="S", help="for the decoder"
    )
    parser.add_argument("--heads", default="32/8", metavar="Hq/Hkv")
    parser.add_argument("--head-dim", type=int, default=128, metavar="D")
    parser.add_argument("--times", type=int, default=10)
    args = parser.parse_args()
    if args.table:
        return print(show("sequence-parallel", parallel_table, args.results))

    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(minutes=3))
    ranks = dist.get_world_size()
    mesh = init_device_mesh(args.device, (ranks,))
    heads, kv_heads = map(int, args.heads.split("/"))
    shape = {"batch_size": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": args.head_dim}
    measured = (args.results / "sequence_parallel.json").exists()
    rows = load("sequence_parallel", args.results)["results"] if measured else []
    over_layers = partial(measure_layers, args.layers)
    for way, length in [(measure, n) for n in args.lengths] + [(over_layers, n) for n in args.layers_lengths]:
        row: Row = {"ranks": ranks, "length": length} | (
            {"layers": args.layers} if way is over_layers else {}
        )
        try:
            row |= way(length, heads, kv_heads, args.head_dim, mesh, args.device, args.times)
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
        rows = [x for x in rows if size(x) != size(row)] + [row]
        if dist.get_rank() == 0:
            print({key: value for key, value in row.items() if key != "checksums"}, flush=True)
            save("sequence_parallel", rows, args.results, args.device, **shape)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()
    if args.device == "cpu":  # all is done; torch's gloo aborts now and then while Python ends
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
