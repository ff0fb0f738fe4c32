"""What the block mask costs, by create_block_mask and in closed form.

python benchmarks/block_mask.py      on a CUDA card

Results go to benchmarks/results/block_mask.json; benchmarks/report.py shows them.
"""

from collections.abc import Callable
from functools import partial

import torch
from cases import block_mask_of, right_padding
from common import Row, parser_of, peak_mib, save, wall_milliseconds
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
    return create_block_mask(mask_mod, batch_size, None, kv_len, kv_len, device="cuda")


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


def measure(build: Callable[[], BlockMask]) -> Row:
    """Wall time until the device is done, and the peak of the memory allocated, the result included."""
    first, median, third = wall_milliseconds(build, "cuda", times=50)
    return {"ms": median, "quartiles_ms": [first, third], "peak_mib": peak_mib(build)}


def main() -> None:
    parser = parser_of(__doc__)
    args = parser.parse_args()
    rows = []
    for batch_size, kv_len in tqdm(SIZES, desc="block mask"):
        pads = right_padding(batch_size, kv_len, torch.Generator().manual_seed(0))
        for way, build in ways(pads).items():
            row: Row = {"batch_size": batch_size, "kv_len": kv_len, "way": way}
            try:
                row |= measure(build)
            except torch.OutOfMemoryError:
                row |= {"out_of_memory": True}
            torch.cuda.empty_cache()
            rows.append(row)
            tqdm.write(str(row))
    save("block_mask", rows, args.results)


if __name__ == "__main__":
    main()
