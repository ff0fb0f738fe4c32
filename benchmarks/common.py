"""What the benchmarks share: timers, versions, results on disk and their tables."""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from causal_padded_flexattn import _HAS_FLASH, _compile

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Table = Callable[[Row], str]


def versions(device: str) -> Row:
    found: Row = {"date": date.today().isoformat(), "torch": torch.__version__, "card": "CPU"}
    for package in ("triton", "flash-attn-4", "nvidia-cudnn-frontend", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        found["card"] = torch.cuda.get_device_name()
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return found


def save(name: str, result: Sequence[Row], folder: Path, device: str = "cuda", **more: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    saved = {**versions(device), **more, "results": result}
    (folder / f"{name}.json").write_text(json.dumps(saved, indent=1) + "\n")


def load(name: str, folder: Path) -> Row:
    return json.loads((folder / f"{name}.json").read_text())


class NotMeasuredError(Exception):
    """Why a way cannot be measured here, or computes something else."""


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise NotMeasuredError(reason)


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0]


def flash_attention_4() -> Callable[..., tuple[Tensor, ...]]:
    require(_HAS_FLASH, "flash-attn-4 is not installed")
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def parser_of(script: str | None, measures: bool = True) -> argparse.ArgumentParser:
    """Of a script's docstring, with where its results are, and what the scripts that measure share."""
    parser = argparse.ArgumentParser(description=script, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files and plots")
    if measures:
        parser.add_argument("--table", action="store_true", help="show what was measured; measure nothing")
        parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries tiny sizes")
    return parser


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compile_afresh() -> None:
    """So that the next shape is compiled in, as in a model that keeps to one, and not any shape."""
    torch._dynamo.reset()
    _compile.cache_clear()


@contextmanager
def deterministic() -> Iterator[None]:
    """What is done inside gives the same bits again."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def differentiate(attention: Callable[..., Any], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs)
    return [output, *torch.autograd.grad(output, inputs, grad)]


# ---- tables ---------------------------------------------------------------------------------------------


def made_with(result: Row) -> str:
    driver = f", driver {result['driver']}" if "driver" in result else ""
    flash = f", flash-attn-4 {result['flash-attn-4']}" if result.get("flash-attn-4") else ""
    return f"({result['card']}{driver}, torch {result['torch']}{flash}, {result['date']})"


def table(corner: str, cells: Iterable[tuple[str, str, str]]) -> str:
    """Of (row, column, cell): rows and columns in the order in which they come."""
    found = {(row, column): cell for row, column, cell in cells}
    names, columns = (list(dict.fromkeys(place)) for place in zip(*found, strict=True))
    rows = [[name, *(found.get((name, column), "") for column in columns)] for name in names]
    header = [corner, *columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def show(name: str, make: Table, folder: Path) -> str:
    result = load(name.replace("-", "_"), folder)
    return f"{make(result)}\n\n{made_with(result)}"


def ms(quartiles: Sequence[float], digits: int = 2) -> str:
    """The median; in brackets the other two, where they are more than a tenth of it apart."""
    first, median, third = quartiles
    brief = [f"{x:.2g}" if x < 99 else f"{x:.0f}" for x in (first, third)]
    return f"{median:.{digits}f}" + (f" ({'-'.join(brief)})" if third - first > 0.1 * median else "")


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


# ---- timers ---------------------------------------------------------------------------------------------


@cache
def filler() -> Tensor:
    """To be zeroed before a run: it empties the L2 cache, and the host gets a millisecond ahead."""
    return torch.empty(2**32, dtype=torch.int8, device="cuda")


def milliseconds(run: Callable[[], object], device: str) -> tuple[list[float], float]:
    """The quartiles of the device's time, and the median of the host's until all is launched."""

    def sample() -> tuple[float, float]:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            filler().zero_()
            start.record()
        begin = time.perf_counter()
        run()
        on_host = (time.perf_counter() - begin) * 1e3
        if device != "cuda":
            return on_host, on_host
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), on_host

    sample()
    samples = [sample() for _ in range(3)]
    while len(samples) < 100 and sum(on_device for on_device, _ in samples) < 100:
        samples.append(sample())
    on_device, on_host = zip(*samples, strict=True)
    return statistics.quantiles(on_device, n=4), statistics.median(on_host)


def wall_milliseconds(run: Callable[[], object], device: str, times: int) -> list[float]:
    """The quartiles of the time until the device is done."""
    samples = []
    for _ in range(times + 1):  # the first does not count
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.quantiles(samples[1:], n=4)


def matmul_tflops(device: str) -> float:
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    (_, median, _), _ = milliseconds(lambda: a @ b, device)
    return 2 * size**3 / median / 1e9


def peak_mib(run: Callable[[], object], device: str) -> float:
    if device != "cuda":
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
