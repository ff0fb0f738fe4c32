"""What building the block mask costs, and what a stream of changing shapes costs.

python benchmarks/benchmark.py block-mask | stream | all | table

Results go to benchmarks/results/NAME.json, with the card and the versions they were measured with; `table` prints
those of the block mask as the README shows them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from causal_padded_flexattn import (
    _pads,
    _peak_mib,
    causal,
    causal_padded_attention,
    create_causal_padding_block_mask,
    create_padding_mask,
)

RESULTS = Path(__file__).parent / "results"
SIZES = [(8, 2048), (8, 4096), (4, 16384), (8, 32768), (8, 131072)]
BATCHES = 24  # of the stream
WAYS = {"closed": "closed form", "eager": "create_block_mask", "compiled": "compiled create_block_mask"}


def versions() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "card": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def save(name: str, result: object, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**versions(), "results": result}, indent=1) + "\n")


def right_padding(batch_size: int, kv_len: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """(B, S): lengths between an eighth of kv_len and all of it, about 44 % padding."""
    lengths = torch.randint(kv_len // 8, kv_len + 1, (batch_size,), generator=generator)
    return _pads(lengths.tolist(), kv_len, "right", "cuda")


def build_eagerly(pads: torch.Tensor, create: Callable[..., BlockMask] = create_block_mask) -> BlockMask:
    mask_mod = and_masks(causal, create_padding_mask(pads))
    return create(mask_mod, pads.shape[0], None, pads.shape[1], pads.shape[1], device="cuda")


def builder(way: str) -> Callable[[torch.Tensor], BlockMask]:
    if way == "compiled":
        compiled = torch.compile(create_block_mask)
        return lambda pads: build_eagerly(pads, compiled)
    return create_causal_padding_block_mask if way == "closed" else build_eagerly


def measure_build(build: Callable[[torch.Tensor], BlockMask], pads: torch.Tensor) -> dict[str, object]:
    """Wall time until the device is done, and the peak of the memory allocated, the result included."""
    build(pads)
    samples = []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        build(pads)
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    quartiles = statistics.quantiles(samples, n=4)
    return {
        "ms": statistics.median(samples),
        "quartiles_ms": [quartiles[0], quartiles[2]],
        "peak_mib": _peak_mib(partial(build, pads)),
    }


def block_mask(folder: Path) -> None:
    rows = []
    for batch_size, kv_len in tqdm(SIZES, desc="block-mask"):
        pads = right_padding(batch_size, kv_len, torch.Generator().manual_seed(0))
        for way in ("closed", "eager"):
            row = {"batch_size": batch_size, "kv_len": kv_len, "way": WAYS[way]}
            try:
                row |= measure_build(builder(way), pads)
            except torch.OutOfMemoryError:
                row |= {"out_of_memory": True}
            torch.cuda.empty_cache()
            rows.append(row)
            tqdm.write(str(row))
    save("block_mask", rows, folder)


def stream_of(way: str) -> None:
    """24 batches of random size, forward and backward, in this process; a line of JSON for each."""
    from torch._dynamo.utils import counters  # no public counter of compilations exists

    build, generator = builder(way), torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        batch_size = int(torch.randint(1, 9, (), generator=generator))
        length = int(torch.randint(100, 4097, (), generator=generator))
        pads = right_padding(batch_size, length, generator)
        inputs = [
            torch.randn(batch_size, 16, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = causal_padded_attention(*inputs, pads, block_mask=build(pads))
        output.backward(torch.ones_like(output))
        torch.cuda.synchronize()
        step = {"seconds": time.perf_counter() - start, "compilations": counters["stats"]["unique_graphs"]}
        print(json.dumps({"batch_size": batch_size, "length": length, **step}), flush=True)


def stream(folder: Path, ways: list[str], limit: float) -> None:
    rows = []
    for way in tqdm(ways, desc="stream"):
        with tempfile.TemporaryDirectory() as cold:  # each way compiles all it needs
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cold, "TRITON_CACHE_DIR": cold}
            command = ["timeout", str(limit), sys.executable, __file__, "stream-of", "--ways", way]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        steps = [json.loads(line) for line in done.stdout.splitlines()]
        row = {"way": WAYS[way], "batches": len(steps), "steps": steps}
        if len(steps) == BATCHES:
            seconds = [step["seconds"] for step in steps]
            row |= {"total_s": sum(seconds), "worst_step_s": max(seconds), "compilations": steps[-1]["compilations"]}
        else:
            row |= {"stopped_after_s": limit}
        rows.append(row)
        tqdm.write(str({key: value for key, value in row.items() if key != "steps"}))
        save("stream", rows, folder)


def table(folder: Path) -> str:
    """The block mask's results in Markdown."""
    result = json.loads((folder / "block_mask.json").read_text())
    lines = ["| batch x length | `create_block_mask` | closed form |", "|---|---|---|"]
    cells: dict[str, list[str]] = {}
    for row in result["results"]:
        size = f"{row['batch_size']} x {row['kv_len']:,}".replace(",", " ")
        cell = "out of memory" if "ms" not in row else f"{row['ms']:.2f} ms, {row['peak_mib']:.1f} MiB"
        cells.setdefault(size, ["", ""])[row["way"] == WAYS["closed"]] = cell
    lines += [f"| {size} | {textbook} | {closed} |" for size, (textbook, closed) in cells.items()]
    made_with = f"({result['card']}, driver {result['driver']}, torch {result['torch']}, {result['date']})"
    return "\n".join([*lines, "", made_with])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["block-mask", "stream", "all", "table", "stream-of"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of the stream")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that a way may take for the stream")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    args = parser.parse_args()
    if args.what in ("block-mask", "all"):
        block_mask(args.results)
    if args.what in ("stream", "all"):
        stream(args.results, args.ways, args.limit)
    if args.what == "table":
        print(table(args.results))
    if args.what == "stream-of":
        stream_of(args.ways[0])


if __name__ == "__main__":
    main()
