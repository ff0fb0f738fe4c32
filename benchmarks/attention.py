"""What causal attention over a padded batch costs, each way of doing it.

On a CUDA card:
python benchmarks/attention.py attention | scaling | need | same-bits | window | documents
Results go to benchmarks/results/NAME.json, with the card and the versions; --table and plots.py show them.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import torch._functorch.config
import torch.nn.functional as F
from cases import Batch, Case, block_mask_of
from common import Attention, NotMeasuredError, Row, Table, milliseconds, ms, require, spaced, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, flex_attention
from tqdm import tqdm

import causal_padded_flexattn as cpf

LEFT = "does not mask left padding"


def mask_of(batch: Batch, **options: Any) -> cpf.BlockMask:
    documents = batch.documents if batch.case.documents > 1 else None
    return block_mask_of(batch.pads, batch.case.window, documents, **options)


def ours(batch: Batch, backend: str, promises: bool = False, block: int = 128) -> Attention:
    usable = backend != "flash" or cpf._can_use_flash(*batch.inputs, None, False)
    require(usable, "needs flash-attn-4, Hopper, half precision, heads of at most 128")
    trains = block == 128 or batch.device == "cpu" or torch.__version__ >= "2.14"
    require(trains, "trains on blocks of 128 only")
    require(not promises or batch.case.documents == 1, "promises nothing about documents")
    promise = {"padding_side": batch.case.side} if promises else {}
    block_mask = mask_of(batch, **promise, BLOCK_SIZE=block)
    return partial(cpf.attend, block_mask=block_mask, backend=backend)


def textbook(batch: Batch, kernel_options: dict[str, Any] | None = None, **how: bool) -> Attention:
    require(batch.device == "cuda", "needs CUDA")
    require(not batch.case.window and batch.case.documents == 1, "knows causality and padding alone")
    require(how.keys() <= inspect.signature(create_block_mask).parameters.keys(), "is not in this torch")
    mask_mod, length = and_masks(cpf.causal, cpf.create_padding_mask(batch.pads)), batch.case.kv_len
    sizes = batch.case.batch_size, None, length, length
    options: Any = {"block_mask": create_block_mask(mask_mod, *sizes, batch.device, **how)}
    options |= {"enable_gqa": batch.case.heads != batch.case.kv_heads, "kernel_options": kernel_options}
    return partial(torch.compile(flex_attention), **options)


@common.deterministic()
def same_bits(batch: Batch) -> Attention:
    keeps = batch.device == "cpu" or (cpf._keeps_bits() and batch.case.kv_len % 128 == 0)
    require(keeps, "needs torch 2.15 and lengths that are multiples of 128")
    return common.deterministic()(ours(batch, "triton"))


def cudnn(batch: Batch, explicit: bool) -> Attention:
    require(batch.device == "cuda", "needs CUDA")
    require(explicit or batch.case.side == "right", LEFT)
    require(explicit or not (batch.case.window or batch.case.documents > 1), "knows causality alone")
    sizes = batch.case.batch_size, 1, batch.case.kv_len, batch.case.kv_len, batch.device
    mask = create_mask(mask_of(batch).mask_mod, *sizes) if explicit else None

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"is_causal": not explicit, "enable_gqa": query.shape[1] != key.shape[1]}
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, mask, **options)

    return attention


def varlen(batch: Batch, package: str, chooses: bool = False) -> Attention:
    require(batch.device == "cuda", "needs CUDA")
    longest, reach = max(batch.case.pieces()), (batch.case.window or 0) - 1
    if package == "torch":
        from torch.nn.attention.varlen import varlen_attn

        lengths = (batch.cumulative, batch.cumulative, longest, longest)
        grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
        options = {"window_size": (reach, 0)} | ({"enable_gqa": True} if grouped else {})

        def attention(*inputs: Tensor) -> Tensor:
            try:
                with sdpa_kernel(
                    [SDPBackend.FLASH_ATTENTION, *([SDPBackend.CUDNN_ATTENTION] if chooses else [])]
                ):
                    return varlen_attn(*inputs, *lengths, **options)
            except RuntimeError as error:  # where this cuDNN is older than the one torch is made for
                raise NotMeasuredError(str(error).splitlines()[0]) from error

        return attention
    options = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), batch.cumulative)
    options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), longest)
    options |= {"window_size": (reach, 0)} if batch.case.window else {"causal": True}
    flash = common.flash_attention_4()
    return lambda *inputs: flash(*inputs, **options)[0]


def with_lengths(batch: Batch) -> Attention:
    """Over the padded batch as it is, each sequence up to its length; padded rows, left unwritten, zeroed."""
    require(batch.device == "cuda", "needs CUDA")
    require(batch.case.side == "right", LEFT)
    require(batch.case.documents == 1, "knows one document a row")
    flash, window = common.flash_attention_4(), batch.case.window
    options = dict.fromkeys(("seqused_q", "seqused_k"), batch.cumulative.diff())
    options |= {"window_size": (window - 1, 0)} if window else {"causal": True}
    pads = batch.pads[:, :, None, None]  # (B, S, 1, 1)

    def attention(*inputs: Tensor) -> Tensor:
        views = [x.transpose(1, 2) for x in inputs]  # (B, S, H, D)
        for x in views:
            if x.requires_grad:
                x.register_hook(lambda grad: grad.masked_fill_(pads, 0.0))
        output = flash(*views, **options)[0]
        # Another tensor of the same memory, unseen by autograd: the kernels do not read there either.
        torch.from_dlpack(output.detach()).masked_fill_(pads, 0.0)
        return output.transpose(1, 2)

    return attention


def cudnn_flex(batch: Batch) -> Attention:
    """Of nvidia-cudnn-frontend: every query sees the keys [0, F0) and [F1, F2), here none and its run."""
    require(batch.device == "cuda", "needs CUDA")
    try:
        from cudnn.flex_attention import create_mask_plan, flex_attn_func
    except ImportError as error:
        raise NotMeasuredError("nvidia-cudnn-frontend is not installed") from error
    first = torch.maximum(batch.first, batch.places - (batch.case.window or batch.case.kv_len) + 1)
    ends = torch.zeros(1, 3, batch.pads.numel(), dtype=torch.int32, device=batch.device)  # padding sees none
    ends[0, 1, batch.real], ends[0, 2, batch.real] = first.int(), batch.places.int() + 1
    views = [x.transpose(1, 2) for x in batch.inputs]  # (B, S, H, D)
    plan = create_mask_plan(ends, *views, build_backward=True)
    return lambda *x: flex_attn_func(*(y.transpose(1, 2) for y in x), mask_plan=plan).transpose(1, 2)


fa2, fa4 = (partial(varlen, package=package) for package in ("torch", "flash-attn-4"))
triton = partial(ours, backend="triton")
# For the same bits in any batch, https://github.com/pytorch/torchtitan/pull/3077.
TORCHTITAN = {"BLOCK_M": 16, "BLOCK_N": 16, "IS_DIVISIBLE": False, "FORCE_USE_FLEX_ATTENTION": True}
# How to make it of a batch, whether its inputs are packed, whether it packs them.
WAYS: dict[str, tuple[Callable[[Batch], Attention], bool, bool]] = {
    "ours, auto": (partial(ours, backend="auto"), False, False),
    "ours, auto, padding_side": (partial(ours, backend="auto", promises=True), False, False),
    "ours, Triton": (triton, False, False),
    "ours, Triton, padding_side": (partial(triton, promises=True), False, False),
    "ours, Triton, blocks of 64, padding_side": (partial(triton, promises=True, block=64), False, False),
    "ours, Triton, same bits": (same_bits, False, False),
    "ours, FLASH": (partial(ours, backend="flash"), False, False),
    "the textbook": (textbook, False, False),
    "the textbook, FLASH": (partial(textbook, kernel_options={"BACKEND": "FLASH"}), False, False),
    "the textbook, one list of tiles": (partial(textbook, separate_full_blocks=False), False, False),
    "the textbook, torchtitan's tiles of 16": (partial(textbook, kernel_options=TORCHTITAN), False, False),
    "SDPA, explicit mask, cuDNN": (partial(cudnn, explicit=True), False, False),
    "SDPA, is_causal, cuDNN, computes the padding": (partial(cudnn, explicit=False), False, False),
    "FlashAttention-2 varlen (torch), padded to padded": (fa2, False, True),
    "FlashAttention-2 varlen (torch), already packed": (fa2, True, False),
    "varlen_attn as torch chooses, already packed": (partial(fa2, chooses=True), True, False),
    "FlashAttention-4 with lengths, padded rows zeroed": (with_lengths, False, False),
    "FlashAttention-4 varlen, padded to padded": (fa4, False, True),
    "FlashAttention-4 varlen, already packed": (fa4, True, False),
    "cudnn.flex_attention": (cudnn_flex, False, False),
}


def measure(way: str, batch: Batch, exact: list[Tensor], plain: list[Tensor]) -> Row:
    make, packed, packs = WAYS[way]
    common.compile_afresh()
    start = time.perf_counter()
    attention = make(batch)
    if packs:
        inner = attention
        attention = lambda *inputs: batch.unpack(inner(*map(batch.pack, inputs)))
    inputs = [batch.pack(x) if packed else x for x in batch.inputs]
    grad = batch.pack(batch.grad_output) if packed else batch.grad_output
    results = common.differentiate(attention, inputs, grad)
    common.synchronize(batch.device)
    row: Row = {"first_s": time.perf_counter() - start}
    errors = []
    for result, truth, own in zip(results, exact, plain, strict=True):
        result = result if packed else batch.pack(result)
        error, own_error = ((x - truth).norm().item() / truth.norm().item() for x in (result, own))
        if not error <= 3 * own_error:
            if way.startswith("ours"):
                raise ValueError(f"{way} is wrong in {batch.case}: error {error:.1e}, SDPA's {own_error:.1e}")
            raise NotMeasuredError(f"wrong, error {error:.1e}")
        errors.append(error)
    del results
    row |= {"error": errors[0], "gradient_error": max(errors[1:])}
    row["peak_mib"] = common.peak_mib(lambda: common.differentiate(attention, inputs, grad), batch.device)
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        attention(*inputs)  # a graph of its own to compile
        row["forward_ms"], row["forward_host_ms"] = milliseconds(lambda: attention(*inputs), batch.device)
    output = attention(*inputs)
    backward = partial(torch.autograd.grad, output, inputs, grad, retain_graph=True)
    row["backward_ms"], row["backward_host_ms"] = milliseconds(backward, batch.device)
    return row


@torch._functorch.config.patch(donated_buffer=False)  # the backward pass runs again and again on one graph
def run(name: str, cases: Iterable[Case], ways: Sequence[str], folder: Path, device: str) -> None:
    rows, rate = list[Row](), common.matmul_tflops(device)
    for case in tqdm(list(cases), desc=name):
        batch = Batch(case, device)
        exact = batch.reference(torch.float32 if device == "cuda" else torch.float64)
        plain = batch.reference(batch.dtype)
        for way in tqdm(ways, desc=str(case), leave=False):
            row: Row = {**asdict(case), "way": way}
            try:
                row |= measure(way, batch, exact, plain)  # of which nothing is left: a mask may take it all
                row["mask_ms"] = common.wall_milliseconds(partial(WAYS[way][0], batch), device, times=10)
            except torch.OutOfMemoryError:
                row["not_measured"] = "out of memory"
            except Exception as error:  # a rival refuses in many ways
                if way.startswith("ours") and not isinstance(error, NotMeasuredError):
                    raise
                row["not_measured"] = common.reason(error)
            torch.cuda.empty_cache()
            rows.append(row)
            shown = row.get("not_measured") or (row["forward_ms"], row["backward_ms"])
            tqdm.write(f"{case}: {way}: {shown}")
            common.save(name.replace("-", "_"), rows, folder, device, matmul_tflops=rate)


LARGE = Case(4, 16384, 128, 16, 16, 40, "right")
SMALL = replace(LARGE, batch_size=8, kv_len=4096)
CASES = {
    "attention": [
        *(LARGE, SMALL, replace(LARGE, head_dim=64), replace(SMALL, head_dim=64)),
        *(replace(SMALL, kv_heads=4), replace(SMALL, padding=0), replace(SMALL, padding=75)),
        replace(SMALL, side="left"),
    ],
    "scaling": [replace(LARGE, batch_size=2**17 >> n, kv_len=2**n) for n in range(9, 18)],
    "need": [
        *(replace(SMALL, batch_size=32, kv_len=1024), SMALL, LARGE),
        *(replace(SMALL, head_dim=64), replace(SMALL, side="left")),
    ],
    "same-bits": [
        *(replace(SMALL, kv_len=length) for length in (4096, 3996)),
        *(replace(LARGE, kv_len=length) for length in (16384, 16284)),
        *(replace(case, head_dim=64) for case in (SMALL, LARGE)),
    ],
    "window": [LARGE, replace(LARGE, window=1024)],
    "documents": [replace(LARGE, padding=10, documents=8)],
}


RIVALS = [  # for the real tokens alone
    *("FlashAttention-4 with lengths, padded rows zeroed", "FlashAttention-4 varlen, padded to padded"),
    *("FlashAttention-4 varlen, already packed", "cudnn.flex_attention"),
]
MASKED = ["ours, Triton", "ours, FLASH", "SDPA, explicit mask, cuDNN", *RIVALS]
OF = {  # the ways of these, where none are named
    "attention": [
        *("ours, auto", "ours, Triton", "SDPA, explicit mask, cuDNN"),
        "SDPA, is_causal, cuDNN, computes the padding",
        "FlashAttention-2 varlen (torch), padded to padded",
        "varlen_attn as torch chooses, already packed",
        *RIVALS,
    ],
    "window": MASKED,
    "documents": MASKED,
    "scaling": [
        *("ours, auto", "ours, auto, padding_side", "ours, Triton, padding_side"),
        *("ours, Triton, blocks of 64, padding_side", "SDPA, explicit mask, cuDNN"),
        *("SDPA, is_causal, cuDNN, computes the padding", "FlashAttention-4 varlen, already packed"),
        "FlashAttention-2 varlen (torch), padded to padded",
        "FlashAttention-4 with lengths, padded rows zeroed",
        "cudnn.flex_attention",
    ],
    "need": [
        *("ours, Triton", "ours, auto", "ours, auto, padding_side", "the textbook", "the textbook, FLASH"),
        *("SDPA, is_causal, cuDNN, computes the padding", "SDPA, explicit mask, cuDNN"),
    ],
    "same-bits": [
        *("ours, Triton", "ours, Triton, same bits", "the textbook", "the textbook, one list of tiles"),
        "the textbook, torchtitan's tiles of 16",
    ],
}


def both(row: Row) -> list[float]:
    """The quartiles of both passes, added."""
    return [sum(passes) for passes in zip(row["forward_ms"], row["backward_ms"], strict=True)]


def together(row: Row | None, digits: int = 2) -> str:
    if row is None:
        return "not measured"
    why = row.get("not_measured")
    return ms(both(row), digits) if why is None else "wrong" if why == LEFT else why


def passes_of(result: Row) -> list[tuple[str, str, str]]:
    cells = []
    for row in result["results"]:
        done = "forward_ms" in row
        cell = f"{ms(row['forward_ms'])} / {ms(row['backward_ms'])}" if done else row["not_measured"]
        cells.append((row["way"], str(Case.of(row)), cell))
    return cells


def passes_table(result: Row) -> str:
    return table("ms forward / backward", ((case, way, cell) for way, case, cell in passes_of(result)))


def attention_table(result: Row) -> str:
    """With the TFLOP/s of the pairs that the first case allows, and their share of the matrix products'."""
    rate, first, rates = result["matmul_tflops"], Case.of(result["results"][0]), []
    for row in result["results"]:
        if Case.of(row) == first and "forward_ms" in row:
            passes = (1, row["forward_ms"]), (2.5, row["backward_ms"])  # two matrix products, and five
            tflops = [share * first.flops() / median / 1e9 for share, (_, median, _) in passes]
            cell = " / ".join(f"{x:.0f} ({x / rate:.0%})" for x in tflops)
            rates.append((row["way"], f"TFLOP/s (of {rate:.0f})", cell))
    cells = passes_of(result)
    return table("ms forward / backward", [cells[0], *rates, *cells[1:]])


def scaling_table(result: Row) -> str:
    rows = result["results"]
    return table("ms", ((row["way"], spaced(row["kv_len"]), together(row, 1)) for row in rows))


def same_bits_table(result: Row) -> str:
    """With how many times the usual way's they are."""
    usual, cells = dict[tuple[str, bool], float](), []
    for row in result["results"]:
        case, way, share = str(Case.of(row)), row["way"], ""
        if way in ("ours, Triton", "the textbook"):  # these come first
            usual[case, way.startswith("ours")] = both(row)[1] if "forward_ms" in row else math.nan
        elif "forward_ms" in row:
            share = f" ({both(row)[1] / usual[case, way.startswith('ours')]:.2f} x)"
        cells.append((way, case, together(row) + share))
    return table("ms", cells)


NEEDED = {
    "this file, as installed (Triton)": "ours, Triton",
    "this file with flash-attn-4": "ours, auto",
    "the same, with `padding_side`": "ours, auto, padding_side",
    "the textbook": "the textbook",
    'the textbook, `kernel_options={"BACKEND": "FLASH"}`': "the textbook, FLASH",
    "SDPA, `is_causal`": "SDPA, is_causal, cuDNN, computes the padding",
    "SDPA, explicit mask": "SDPA, explicit mask, cuDNN",
}
SIZES = ("32 x 1 024", "8 x 4 096", "4 x 16 384", "8 x 4 096, heads of 64", "8 x 4 096, left padding")


def need_table(result: Row) -> str:
    rows = {(Case.of(row), row["way"]): row for row in result["results"]}
    cases = dict(zip(SIZES, CASES["need"], strict=True))
    pairs = ((name, way, size) for name, way in NEEDED.items() for size in SIZES)
    return table("ms", ((name, size, together(rows.get((cases[size], way)))) for name, way, size in pairs))


TABLES: dict[str, Table] = {
    "attention": attention_table,
    "scaling": scaling_table,
    "need": need_table,
    "same-bits": same_bits_table,
    "window": passes_table,
    "documents": passes_table,
}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--ways", nargs="+", help="of this name, or whose name contains it")
    parser.add_argument("--cases", nargs="+", type=int, metavar="N", help="places in the list, default: all")
    args = parser.parse_args()
    if args.table:
        return print(common.show(args.what, TABLES[args.what], args.results))
    cases = CASES[args.what]
    cases = [cases[i] for i in args.cases or range(len(cases))]
    if args.device == "cpu":
        small = {"batch_size": 2, "kv_len": 40, "heads": 2, "kv_heads": 1, "head_dim": 16}
        cases = [replace(case, **small, window=case.window and 8) for case in cases]
    wanted = args.ways or OF[args.what]
    named = [way for way in WAYS if any(x == way or (x not in WAYS and x in way) for x in wanted)]
    return run(args.what, cases, named, args.results, args.device)


if __name__ == "__main__":
    main()
