"""What the block mask costs, by create_block_mask and in closed form.

python benchmarks/block_mask.py      on a CUDA card

Results go to benchmarks/results/block_mask.json; --table shows them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cases import block_mask_of, right_padding
from common import Row, load, ms, parser_of, peak_mib, save, show, spaced, table, wall_milliseconds
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from tqdm import tqdm

from causal_padded_flexattn import causal, create_padding_mask

SIZES = [(8, 2048), (8, 4096), (4, 16384), (8, 32768), (8, 131072)]
WINDOW, DOCUMENTS = 1024, 8


def documents_of(pads: Tensor) -> Tensor:
    batch_size, kv_len = pads.shape
    names = torch.arange(kv_len, device=pads.device) * DOCUMENTS // kv_len
    return names.expand(batch_size, -1).contiguous()


def textbook(pads: Tensor) -> BlockMask:
    mask_mod = and_masks(causal, create_padding_mask(pads))
    batch_size, kv_len = pads.shape
    return create_block_mask(mask_mod, batch_size, None, kv_len, kv_len, pads.device)


def ways(pads: Tensor) -> dict[str, Callable[[], BlockMask]]:
    documents = documents_of(pads)
    ours = partial(block_mask_of, pads)
    return {
        "closed form": ours,
        "closed form, window": partial(ours, window=WINDOW),
        "closed form, documents": partial(ours, documents=documents),
        "closed form, window and documents": partial(ours, window=WINDOW, documents=documents),
        "closed form, one query": torch.no_grad()(partial(ours, q_len=1, q_offset=pads.shape[1] // 2)),
        "create_block_mask": partial(textbook, pads),
    }


def measure(build: Callable[[], BlockMask], device: str) -> Row:
    """Wall time until the device is done, and the peak of the memory allocated, the result included."""
    first, median, third = wall_milliseconds(build, device, times=50)
    return {"ms": median, "quartiles_ms": [first, third], "peak_mib": peak_mib(build, device)}


def block_mask_table(result: Row) -> str:
    """Each way's milliseconds, and the memory of the first and of the last."""
    cells, memory = [], dict[str, list[str]]()
    for row in result["results"]:
        size, (first, third) = (
            f"{row['batch_size']} x {spaced(row['kv_len'])}",
            row.get("quartiles_ms", (0, 0)),
        )
        cells.append((size, row["way"], ms([first, row["ms"], third]) if "ms" in row else "out of memory"))
        memory.setdefault(size, []).append(f"{row['peak_mib']:.1f}" if "ms" in row else "out of memory")
    cells += [(size, "MiB, first / last", f"{all_of[0]} / {all_of[-1]}") for size, all_of in memory.items()]
    return table("ms", cells)


def readme_figures(folder: Path) -> str:
    """Of 8 x 4096: two ways."""
    results = load("block_mask", folder)["results"]
    rows = {row["way"]: row for row in results if (row["batch_size"], row["kv_len"]) == (8, 4096)}
    ours, theirs = (rows[way] for way in ("closed form", "create_block_mask"))
    both = [f"{row['ms']:.2f} ms and {row['peak_mib']:.1f} MiB" for row in (ours, theirs)]
    return f"{both[0]}, where `create_block_mask` takes {both[1]}"


TABLES = {"block-mask": block_mask_table}


def main() -> None:
    args = parser_of(__doc__).parse_args()
    if args.table:
        return print(show("block-mask", block_mask_table, args.results))
    rows = []
    for batch_size, kv_len in tqdm(SIZES, desc="block mask"):
        pads = right_padding(batch_size, kv_len, torch.Generator().manual_seed(0), args.device)
        for way, build in ways(pads).items():
            row: Row = {"batch_size": batch_size, "kv_len": kv_len, "way": way}
            try:
                row |= measure(build, args.device)
            except torch.OutOfMemoryError:
                row |= {"out_of_memory": True}
            torch.cuda.empty_cache()
            rows.append(row)
            tqdm.write(str(row))
    return save("block_mask", rows, args.results, args.device)


if __name__ == "__main__":
    main()
