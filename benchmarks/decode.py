"""What a decoding step's attention costs over a padded cache, beside the memory that it must read.

python benchmarks/decode.py [--same-bits]      on a CUDA card

Sequences of varying length. Padded on the left they end together, where the cache is written to; padded on
the right each has its query behind its own last token. On the device a step is timed in a CUDA graph, with
nothing in the L2 cache; on the host it is launched without. Results go to benchmarks/results/decode.json, or
with --same-bits, what deterministic algorithms cost at the first sizes, to decode_same_bits.json; --table
shows them.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from cases import padded
from common import NotMeasuredError, Row, deterministic, milliseconds, ms, parser_of, require, save, table
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm

import causal_padded_flexattn as cpf

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from same_bits import mask_of_training, step_of_training


@dataclass(frozen=True)
class Step:
    batch_size: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    side: str = "left"
    filled: float = 7 / 8  # of the cache

    def lengths(self) -> list[int]:
        written, least = int(self.kv_len * self.filled), 0.25
        shares = torch.linspace(least, 1, self.batch_size).tolist() if self.batch_size > 1 else [0.45]
        return [max(self.q_len, int(written * (1 if self.side == "none" else share))) for share in shares]

    @classmethod
    def of(cls, row: Row) -> "Step":
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        heads = f"H{self.heads}/{self.kv_heads} D{self.head_dim}"
        padding = "no padding" if self.side == "none" else f"{self.side} padding"
        queries = f", {self.q_len} queries" if self.q_len > 1 else ""
        return f"B{self.batch_size} S{self.kv_len} {heads}, {padding}, {self.filled:.3g} written{queries}"


FIRST = Step(8, 32, 8, 1, 4096, 128)
STEPS = [
    FIRST,
    replace(FIRST, batch_size=32),
    replace(FIRST, heads=16, kv_heads=16, head_dim=64),
    replace(FIRST, batch_size=1, kv_len=131072),
    replace(FIRST, kv_len=32768),
    replace(FIRST, batch_size=13),
    replace(FIRST, q_len=16),
    replace(FIRST, q_len=64),
    *(replace(FIRST, side=side, filled=n) for side in ("left", "right", "none") for n in (1 / 8, 1 / 2, 1.0)),
]


def copy_rate(device: str) -> float:
    """Bytes a second that a large copy reads and writes."""
    x = torch.ones(2**30 if device == "cuda" else 2**20, dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    (_, median, _), _ = milliseconds(lambda: y.copy_(x), device)
    return 2 * x.numel() / median * 1e3


class Cache:
    """The tensors of a step."""

    def __init__(self, step: Step, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        shapes = [(step.heads, step.q_len), *[(step.kv_heads, step.kv_len)] * 2]
        self.inputs = [
            torch.randn(step.batch_size, *shape, step.head_dim, device=device, dtype=dtype)
            for shape in shapes
        ]
        self.step, self.written = step, int(step.kv_len * step.filled)
        side = "left" if step.side == "left" else "right"
        pads = padded(step.lengths(), self.written, side, device)
        self.pads = F.pad(pads, (0, step.kv_len - self.written), value=True)  # (B, S)
        self.lengths = torch.tensor(step.lengths(), dtype=torch.int32, device=device)  # (B,)

    def make_mask(self) -> Tensor:
        """(B, 1, L, S); rows that see nothing, all."""
        rows = self.written - self.step.q_len + torch.arange(self.step.q_len, device=self.pads.device)
        seen = torch.arange(self.step.kv_len, device=self.pads.device) <= rows[:, None]
        mask = (seen & ~self.pads[:, None])[:, None]
        return mask | ~mask.any(-1, keepdim=True)


def block_mask(cache: Cache) -> Callable[[], object]:
    q_len, device = cache.step.q_len, cache.pads.device
    if cache.step.side == "right":  # one query, behind its own sequence: it sees all keys that are real
        query_pads = torch.zeros(cache.step.batch_size, 1, dtype=torch.bool, device=device)
        return partial(cpf.create_block_mask_from_runs, None, None, cache.pads, query_pads=query_pads)
    q_offset = torch.tensor(cache.written - q_len, device=device)
    return partial(cpf.create_causal_padding_block_mask, cache.pads, q_len, q_offset=q_offset)


def ours(cache: Cache) -> Callable[[], Tensor]:
    return partial(cpf.attend, *cache.inputs, block_mask(cache)())


@deterministic()
def same_bits(cache: Cache) -> Callable[[], Tensor]:
    require(cpf._keeps_bits() or not cache.pads.is_cuda, "needs torch 2.15")
    return deterministic()(ours(cache))


@deterministic()
def bits_of_training(cache: Cache) -> Callable[[], Tensor]:
    """As examples/same_bits.py has it."""
    require(cache.step.q_len == 1 and cache.step.side == "left", "measured for one query")
    pads = cache.pads.clone()
    pads[:, cache.written :] = False
    mask = mask_of_training(cache.written - 1, cache.step.heads // cache.step.kv_heads, pads)
    return deterministic()(partial(step_of_training, *cache.inputs, mask))


def sdpa(cache: Cache) -> Callable[[], Tensor]:
    gqa = cache.step.heads != cache.step.kv_heads
    return partial(F.scaled_dot_product_attention, *cache.inputs, attn_mask=cache.make_mask(), enable_gqa=gqa)


def in_place(cache: Cache) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels for variable lengths take: each sequence begins in the row where it is padded to.

    The query (B, Hq, D), keys and values (B * S, Hkv, D), where queries and keys begin, and the lengths.
    """
    require(cache.step.q_len == 1, "measured for one query")
    step, device = cache.step, cache.pads.device
    query, *keys = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in cache.inputs)
    rows = torch.arange(step.batch_size + 1, dtype=torch.int32, device=device)
    begins = rows * step.kv_len
    if step.side == "left":
        begins[:-1] += cache.written - cache.lengths
    return [query, *keys], [rows, begins, cache.lengths]


def fa4(cache: Cache, num_splits: int) -> Callable[[], Tensor]:
    flash, (inputs, (rows, begins, lengths)) = common.flash_attention_4(), in_place(cache)
    options: Any = {"cu_seqlens_q": rows, "cu_seqlens_k": begins, "seqused_k": lengths, "max_seqlen_q": 1}
    options |= {"max_seqlen_k": cache.step.kv_len, "num_splits": num_splits}
    return lambda: flash(*inputs, **options)[0].unsqueeze(2)


def torch_varlen(cache: Cache) -> Callable[[], Tensor]:
    require(cache.pads.is_cuda, "needs CUDA")
    inputs, (rows, begins, lengths) = in_place(cache)
    options: Any = {"seqused_k": lengths, "enable_gqa": True}
    return lambda: varlen_attn(*inputs, rows, begins, 1, cache.step.kv_len, **options).unsqueeze(2)


WAYS = {
    "block mask": block_mask,  # once for all layers
    "ours": ours,
    "SDPA, mask row": sdpa,
    "FlashAttention-4": partial(fa4, num_splits=1),
    "FlashAttention-4, splits chosen": partial(fa4, num_splits=0),
    "varlen_attn": torch_varlen,
}
SAME_BITS = {"ours": ours, "ours, same bits": same_bits, "ours, the bits of training": bits_of_training}


@torch.no_grad()
def measure(step: Step, device: str, rate: float, ways: dict[str, Any] = WAYS) -> list[Row]:
    cache, rows = Cache(step, device), []
    token = 2 * step.kv_heads * step.head_dim * cache.inputs[0].element_size()  # key and value
    limit = int(cache.lengths.sum()) * token / rate * 1e3
    real = ~cache.pads[:, cache.written - step.q_len : cache.written]  # (B, L)
    real = torch.ones_like(real) if step.side == "right" else real
    expected = sdpa(cache)().transpose(1, 2)[real].float()
    for way, make in ways.items():
        row: Row = {**asdict(step), "way": way, "limit_ms": limit}
        rows.append(row)
        try:
            run = make(cache)
            result: Any = run()
        except Exception as error:  # a rival refuses in many ways
            if not isinstance(error, NotMeasuredError) and (way.startswith("ours") or way == "block mask"):
                raise
            row["not_measured"] = common.reason(error)
            continue
        if way != "block mask":
            error = (result.transpose(1, 2)[real] - expected).abs().max()
            if not error < 2e-2 * expected.abs().max():
                raise ValueError(f"{step}: {way} and SDPA differ by {error}")
        row["quartiles"], row["host_ms"] = milliseconds(run, device)
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = run()
            row["quartiles"], _ = milliseconds(graph.replay, device)
        row["ms"] = row["quartiles"][1]
        tqdm.write(f"{step}: {way}: {row['ms']:.4f} ms, limit {limit:.4f}")
    return rows


def decode_table(result: Row) -> str:
    """On the device, beside the limit: the bytes of the real keys and values, copied."""
    cells, host = [], dict[str, dict[str, str]]()
    for row in result["results"]:
        step, done = str(Step.of(row)), "ms" in row
        cells += [(step, "limit", f"{row['limit_ms']:.3f}")]
        cells += [(step, row["way"], ms(row["quartiles"], 3) if done else "")]
        host.setdefault(step, {})[row["way"]] = f"{row['host_ms']:.2f}" if done else ""
    shown = ((step, f"{of['ours']} / {of['SDPA, mask row']}") for step, of in host.items())
    return table("ms", [*cells, *((step, "host ms, ours / SDPA", cell) for step, cell in shown)])


def same_bits_table(result: Row) -> str:
    """How many times the usual way's milliseconds the others' are."""
    usual = {Step.of(row): row["ms"] for row in result["results"] if row["way"] == "ours"}
    cells = []
    for row in result["results"]:
        cell = row.get("not_measured") or ms(row["quartiles"], 3)
        if "ms" in row and row["way"] != "ours":
            cell += f" ({row['ms'] / usual[Step.of(row)]:.2f} x)"
        cells.append((row["way"], str(Step.of(row)), cell))
    return table("ms", cells)


def readme_figures(folder: Path) -> str:
    """The first step, on the device and on the host."""
    mask, ours, sdpa = common.load("decode", folder)["results"][:3]
    text = f"{ours['ms']:.3f} ms, {mask['ms']:.3f} ms for its mask, and {sdpa['ms']:.3f} ms with SDPA"
    host = f"{ours['host_ms']:.2f}, {mask['host_ms']:.2f} and {sdpa['host_ms']:.2f} ms"
    return f"{text}, on the device; on the host {host}"


TABLES = {"decode": decode_table, "decode-same-bits": same_bits_table}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--same-bits", action="store_true", help="what deterministic algorithms cost")
    args = parser.parse_args()
    name, ways = ("decode-same-bits", SAME_BITS) if args.same_bits else ("decode", WAYS)
    if args.table:
        return print(common.show(name, TABLES[name], args.results))
    common.compile_afresh()
    rate, rows, steps = copy_rate(args.device), [], STEPS[:7] if args.same_bits else STEPS
    if args.device == "cpu":
        tiny = {"batch_size": 3, "heads": 4, "kv_heads": 2, "kv_len": 64, "head_dim": 16}
        steps = [replace(step, **tiny, q_len=min(step.q_len, 5)) for step in steps]
    for step in tqdm(steps, desc="decode"):
        rows += measure(step, args.device, rate, ways)  # one process: sizes come after other batch sizes
        save(name.replace("-", "_"), rows, args.results, args.device, copy_bytes_per_s=rate)
    return None


if __name__ == "__main__":
    main()
