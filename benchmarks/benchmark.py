"""What causal attention over a padded batch costs, each way of doing it; and what its block mask costs.

python benchmarks/benchmark.py attention | scaling | block-mask | stream | transformers | all    on a CUDA card
python benchmarks/benchmark.py table | plot                                            shows what was measured

Results go to benchmarks/results/NAME.json, with the card and the versions they were measured with.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from causal_padded_flexattn import (
    _attend,
    _compiled_flex_attention,
    _flash_obstacle,
    _kernel_options,
    _pads,
    _peak_mib,
    causal,
    causal_padded_attention,
    create_causal_padding_block_mask,
    create_padding_mask,
    transformers_attention,
    transformers_block_mask,
)

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def versions(device: str) -> Row:
    found: Row = {"date": date.today().isoformat(), "torch": torch.__version__, "card": "CPU"}
    for package in ("triton", "flash-attn-4"):
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
    (folder / f"{name}.json").write_text(json.dumps({**versions(device), **more, "results": result}, indent=1) + "\n")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compile_afresh() -> None:
    """So that the next shape is compiled in, as in a model that keeps to one, and not any shape."""
    torch._dynamo.reset()
    _compiled_flex_attention.cache_clear()


# ---- attention ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    batch_size: int
    kv_len: int
    head_dim: int
    heads: int
    kv_heads: int
    padding: int  # percent of the tokens
    side: str

    def lengths(self) -> list[int]:
        """Evenly spread about their mean, which leaves that much padding; up to the whole length at 40 %."""
        real = 1 - self.padding / 100
        spread = min(1 - real, 0.9 * real) if self.batch_size > 1 else 0.0
        return [
            max(1, round(self.kv_len * share))
            for share in torch.linspace(real - spread, real + spread, self.batch_size).tolist()
        ]

    def flops(self) -> int:
        """Of the forward pass: two matrix products, for the pairs that the mask allows."""
        pairs = sum(length * (length + 1) // 2 for length in self.lengths())
        return 4 * self.heads * self.head_dim * pairs

    @classmethod
    def of(cls, row: Row) -> "Case":
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        padding = f"{self.padding} % {self.side} padding" if self.padding else "no padding"
        return f"B{self.batch_size} S{self.kv_len} {heads} D{self.head_dim}, {padding}"


class _Pack(torch.autograd.Function):
    """index_select whose backward pass writes, as FlashAttention's does, where torch's own adds."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.length, *grad.shape[1:]).index_copy_(0, rows, grad), None


class NotMeasuredError(Exception):
    """Why a way cannot be measured here, or computes something else."""


class Batch:
    """The tensors of a case: as models have them, (B, H, S, D) views of (B, S, H, D); and packed, (T, H, D)."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.pads = _pads(case.lengths(), case.kv_len, case.side, device)  # (B, S)
        self.real = (~self.pads).flatten().nonzero().squeeze(1)  # (T,)
        self.cumulative = F.pad((~self.pads).sum(1).cumsum(0), (1, 0)).int()  # (B + 1,)

        def tensor(heads: int) -> Tensor:
            shape = (case.batch_size, case.kv_len, heads, case.head_dim)
            return torch.randn(shape, device=device, dtype=self.dtype, generator=generator).transpose(1, 2)

        self.inputs = [tensor(case.heads), tensor(case.kv_heads), tensor(case.kv_heads)]
        self.grad_output = tensor(case.heads).masked_fill(self.pads[:, None, :, None], 0.0)

    def pack(self, x: Tensor) -> Tensor:
        """(B, H, S, D) to (T, H, D): the real tokens alone."""
        return _Pack.apply(x.transpose(1, 2).flatten(0, 1), self.real)

    def unpack(self, x: Tensor) -> Tensor:
        """(T, H, D) to (B, H, S, D): zeros where padding is."""
        rows = x.new_zeros(self.pads.numel(), *x.shape[1:]).index_copy(0, self.real, x)
        return rows.unflatten(0, self.pads.shape).transpose(1, 2)

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        """The output and the gradients, packed: each sequence alone, in that dtype, nothing but causality left."""
        results = []
        packed = [self.pack(x).to(dtype) for x in (*self.inputs, self.grad_output)]
        for *inputs, grad in zip(*(x.split(self.case.lengths()) for x in packed), strict=True):
            group = self.case.heads // self.case.kv_heads

            def attention(query: Tensor, key: Tensor, value: Tensor, group: int = group) -> Tensor:
                key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
                views = (x.transpose(0, 1)[None] for x in (query, key, value))
                return F.scaled_dot_product_attention(*views, is_causal=True)[0].transpose(0, 1)

            results.append(_attend(attention, inputs, grad))
        return [torch.cat(x) for x in zip(*results, strict=True)]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def needs_cuda(batch: Batch) -> None:
    if batch.device != "cuda":
        raise NotMeasuredError("needs CUDA")


def needs_right_padding(batch: Batch) -> None:
    if batch.case.side == "left":
        raise NotMeasuredError("does not mask left padding")


def ours(batch: Batch, backend: str, dynamic: bool = False, safe_padding: bool = False) -> Attention:
    if backend == "flash" and (obstacle := _flash_obstacle(*batch.inputs)):
        raise NotMeasuredError(obstacle)
    block_mask = create_causal_padding_block_mask(batch.pads)
    if dynamic:
        needs_cuda(batch)
        compiled, options = torch.compile(flex_attention, dynamic=True), _kernel_options(*batch.inputs[:2], block_mask)
        grouped = batch.case.heads != batch.case.kv_heads
        return partial(compiled, block_mask=block_mask, enable_gqa=grouped, kernel_options=options)
    options = {"block_mask": block_mask, "backend": backend, "safe_padding": safe_padding}
    return partial(causal_padded_attention, pads=batch.pads, **options)


def sdpa(batch: Batch, kernel: SDPBackend, explicit: bool) -> Attention:
    needs_cuda(batch)
    if not explicit:
        needs_right_padding(batch)
    group = batch.case.heads // batch.case.kv_heads
    mask = (~batch.pads[:, :, None] & ~batch.pads[:, None, :]).tril()[:, None] if explicit else None

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if kernel == SDPBackend.EFFICIENT_ATTENTION:  # which knows nothing of groups
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=not explicit, enable_gqa=query.shape[1] != key.shape[1]
            )

    return attention


def varlen(batch: Batch, package: str) -> Attention:
    needs_cuda(batch)
    longest = max(batch.case.lengths())
    if package == "torch":
        from torch.nn.attention.varlen import varlen_attn

        lengths = (batch.cumulative, batch.cumulative, longest, longest)
        return lambda *inputs: varlen_attn(*inputs, *lengths, window_size=(-1, 0))  # type: ignore[return-value]
    flash = flash_attention_4()
    lengths = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), batch.cumulative)
    lengths |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), longest)
    return lambda *inputs: flash(*inputs, causal=True, **lengths)[0]


def with_lengths(batch: Batch) -> Attention:
    """Over the padded batch as it is, each sequence up to its length. It leaves padded rows unwritten: zero them."""
    needs_cuda(batch)
    needs_right_padding(batch)
    flash = flash_attention_4()
    lengths = dict.fromkeys(("seqused_q", "seqused_k"), batch.cumulative.diff())
    padded = batch.pads[:, :, None, None]  # (B, S, 1, 1)

    def attention(*inputs: Tensor) -> Tensor:
        views = [x.transpose(1, 2) for x in inputs]  # (B, S, H, D)
        for x in views:
            if x.requires_grad:
                x.register_hook(lambda grad: grad.masked_fill_(padded, 0.0))
        output = flash(*views, causal=True, **lengths)[0]
        output.data.masked_fill_(padded, 0.0)  # in place, unseen by autograd: the kernels do not read there either
        return output.transpose(1, 2)

    return attention


def flash_attention_4() -> Callable[..., tuple[Tensor, ...]]:
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:
        raise NotMeasuredError("flash-attn-4 is not installed") from None
    return flash_attn_varlen_func


def documents(batch: Batch) -> Attention:
    needs_cuda(batch)
    tokens = len(batch.real)
    document = batch.real // batch.case.kv_len  # (T,)
    mask_mod = and_masks(causal, lambda b, h, q_idx, kv_idx: document[q_idx] == document[kv_idx])
    block_mask = create_block_mask(mask_mod, 1, None, tokens, tokens, device=batch.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = batch.case.heads != batch.case.kv_heads

    def attention(*inputs: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in inputs)  # (1, H, T, D)
        options = _kernel_options(query, key, block_mask)
        output = compiled(query, key, value, block_mask=block_mask, enable_gqa=grouped, kernel_options=options)
        return output[0].transpose(0, 1)

    return attention


# What is computed, from what: (how to make it of a batch, whether its inputs are packed, whether it packs them).
WAYS: dict[str, tuple[Callable[[Batch], Attention], bool, bool]] = {
    "ours, auto": (partial(ours, backend="auto"), False, False),
    "ours, Triton": (partial(ours, backend="triton"), False, False),
    "ours, Triton compiled for changing shapes": (partial(ours, backend="triton", dynamic=True), False, False),
    "ours, Triton, safe_padding": (partial(ours, backend="triton", safe_padding=True), False, False),
    "ours, FLASH": (partial(ours, backend="flash"), False, False),
    "SDPA, explicit mask, efficient": (
        partial(sdpa, kernel=SDPBackend.EFFICIENT_ATTENTION, explicit=True),
        False,
        False,
    ),
    "SDPA, explicit mask, cuDNN": (partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION, explicit=True), False, False),
    "SDPA, is_causal, cuDNN, computes the padding": (
        partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION, explicit=False),
        False,
        False,
    ),
    "FlashAttention-2 varlen (torch), padded to padded": (partial(varlen, package="torch"), False, True),
    "FlashAttention-2 varlen (torch), already packed": (partial(varlen, package="torch"), True, False),
    "FlashAttention-4 with lengths, padded rows zeroed": (with_lengths, False, False),
    "FlashAttention-4 varlen, padded to padded": (partial(varlen, package="flash-attn-4"), False, True),
    "FlashAttention-4 varlen, already packed": (partial(varlen, package="flash-attn-4"), True, False),
    "flex, document mask, already packed": (documents, True, False),
}


@cache
def filler() -> Tensor:
    """To be zeroed before a run: it empties the L2 cache, and takes the device a millisecond to launch behind."""
    return torch.empty(2**32, dtype=torch.int8, device="cuda")


def milliseconds(run: Callable[[], object], device: str) -> tuple[list[float], float]:
    """The device's: the first quartile, the median and the third; and the host's until all is launched: the median."""

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


def measure(way: str, batch: Batch, exact: list[Tensor], plain: list[Tensor]) -> Row:
    make, packed, packs = WAYS[way]
    compile_afresh()
    attention = make(batch)
    if packs:
        inner = attention
        attention = lambda *inputs: batch.unpack(inner(*map(batch.pack, inputs)))  # noqa: E731
    inputs = [batch.pack(x) if packed else x for x in batch.inputs]
    grad = batch.pack(batch.grad_output) if packed else batch.grad_output
    results = _attend(attention, inputs, grad)
    errors = []
    for ours_, truth, own in zip(results, exact, plain, strict=True):
        ours_ = ours_ if packed else batch.pack(ours_)
        error, own_error = ((x - truth).norm().item() / truth.norm().item() for x in (ours_, own))
        if not error <= 3 * own_error:
            if way.startswith("ours"):
                raise ValueError(f"{way} is wrong in {batch.case}: error {error:.1e}, SDPA's own {own_error:.1e}")
            raise NotMeasuredError(f"wrong, error {error:.1e}")
        errors.append(error)
    del results
    row: Row = {"error": errors[0], "gradient_error": max(errors[1:])}
    if batch.device == "cuda":
        row["peak_mib"] = _peak_mib(lambda: _attend(attention, inputs, grad))
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        attention(*inputs)  # a graph of its own to compile
        row["forward_ms"], row["forward_host_ms"] = milliseconds(lambda: attention(*inputs), batch.device)
    output = attention(*inputs)
    row["backward_ms"], row["backward_host_ms"] = milliseconds(
        lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True), batch.device
    )
    return row


def matmul_tflops(device: str) -> float:
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    (_, median, _), _ = milliseconds(lambda: a @ b, device)
    return 2 * size**3 / median / 1e9


def attention(name: str, cases: Iterable[Case], ways: Sequence[str], folder: Path, device: str) -> None:
    torch._functorch.config.donated_buffer = False  # the backward pass runs again and again on one graph
    rows: list[Row] = []
    rate = matmul_tflops(device)
    for case in tqdm(list(cases), desc=name):
        batch = Batch(case, device)
        exact = batch.reference(torch.float32 if device == "cuda" else torch.float64)
        plain = batch.reference(batch.dtype)
        for way in tqdm(ways, desc=str(case), leave=False):
            row: Row = {**asdict(case), "way": way}
            try:
                row |= measure(way, batch, exact, plain)
            except NotMeasuredError as reason:
                row["not_measured"] = str(reason)
            except torch.OutOfMemoryError:
                row["not_measured"] = "out of memory"
            if device == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            tqdm.write(f"{case}: {way}: {row.get('not_measured') or (row['forward_ms'], row['backward_ms'])}")
            save(name, rows, folder, device, matmul_tflops=rate)


def cases(
    sizes: Iterable[str], head_dims: Iterable[int], heads: Iterable[str], padding: Iterable[int], sides: Iterable[str]
) -> list[Case]:
    """Every combination; without padding there is no side to it."""
    return [
        Case(*map(int, size.split("x")), head_dim, *map(int, both.split("/")), percent, side)
        for head_dim in head_dims
        for size in sizes
        for both in heads
        for percent in padding
        for side in (sides if percent else ("right",))
    ]


def usual_cases() -> list[Case]:
    """Two sizes and head sizes, and for one of them other heads and paddings, one thing changed at a time."""
    sizes = cases(["4x16384", "8x4096"], [128, 64], ["16/16"], [40], ["right"])
    usual = cases(["8x4096"], [128], ["16/16"], [40], ["right"])[0]
    others: list[Row] = [{"kv_heads": 4}, {"padding": 0}, {"padding": 75}, {"side": "left"}]
    return [*sizes, *(replace(usual, **change) for change in others)]


# ---- the block mask -----------------------------------------------------------------------------------------

SIZES = [(8, 2048), (8, 4096), (4, 16384), (8, 32768), (8, 131072)]
BATCHES = 24  # of the stream
BUILDERS = {"closed": "closed form", "eager": "create_block_mask", "compiled": "compiled create_block_mask"}


def right_padding(
    batch_size: int, kv_len: int, generator: torch.Generator | None = None, device: str = "cuda"
) -> Tensor:
    """(B, S): lengths between an eighth of kv_len and all of it, about 44 % padding."""
    lengths = torch.randint(kv_len // 8, kv_len + 1, (batch_size,), generator=generator)
    return _pads(lengths.tolist(), kv_len, "right", device)


def build_eagerly(pads: Tensor, create: Callable[..., BlockMask] = create_block_mask) -> BlockMask:
    mask_mod = and_masks(causal, create_padding_mask(pads))
    return create(mask_mod, pads.shape[0], None, pads.shape[1], pads.shape[1], device="cuda")


def builder(way: str) -> Callable[[Tensor], BlockMask]:
    if way == "compiled":
        compiled = torch.compile(create_block_mask)
        return lambda pads: build_eagerly(pads, compiled)
    return create_causal_padding_block_mask if way == "closed" else build_eagerly


def measure_build(build: Callable[[Tensor], BlockMask], pads: Tensor) -> Row:
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
            row: Row = {"batch_size": batch_size, "kv_len": kv_len, "way": BUILDERS[way]}
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


def in_a_process(what: str, ways: dict[str, str], steps: int, limit: float, folder: Path, device: str = "cuda") -> None:
    """Each way in a process of its own that starts with nothing compiled: its steps, and their sum."""
    rows = []
    for way, name in tqdm(ways.items(), desc=what):
        with tempfile.TemporaryDirectory() as cold:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cold, "TRITON_CACHE_DIR": cold}
            command = ["timeout", str(limit), sys.executable, __file__, f"{what}-of", "--of", way, "--device", device]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        row: Row = {"way": name, "batches": len(lines), "steps": lines}
        if len(lines) == steps:
            seconds = [line["seconds"] for line in lines]
            row |= {"total_s": sum(seconds), "worst_step_s": max(seconds), "compilations": lines[-1]["compilations"]}
        else:
            row |= {"stopped_after_s": limit}
        rows.append(row)
        tqdm.write(str({key: value for key, value in row.items() if key != "steps"}))
        save(what, rows, folder, device)


# ---- a model of transformers --------------------------------------------------------------------------------

MODELS = {
    "sdpa": "sdpa",
    "shipped": "flex_attention, as shipped",
    "mask": "flex_attention, mask in closed form",
    "ours": "flex_attention, mask in closed form and kernels chosen",
}
SIZES_OF_MODEL = 5
# The lengths of each round are multiplied by it, and the batch divided; the first round compiles.
ROUNDS = [1] * 4 + [2] * 3 + [4] * 3


def transformers_of(way: str, device: str) -> None:
    """Padded batches of varying size through a small Llama, forward and backward, again and again."""
    import transformers
    from torch._dynamo.utils import counters

    if way != "shipped":
        transformers.AttentionMaskInterface.register("flex_attention", transformers_block_mask)
    if way == "ours":
        transformers.AttentionInterface.register("flex_attention", transformers_attention)
    scale = 1 if device == "cuda" else 32  # the CPU tries it out
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000 // scale,
        hidden_size=1024 // scale,
        intermediate_size=2816 // scale,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    model.set_attn_implementation("sdpa" if way == "sdpa" else "flex_attention")
    for round_, longer in enumerate(ROUNDS):
        generator = torch.Generator().manual_seed(0)
        for _ in range(SIZES_OF_MODEL):
            batch_size = max(2, int(torch.randint(2, 9, (), generator=generator)) // longer)
            length = int(torch.randint(1560, 3711, (), generator=generator)) // scale * longer
            attention_mask = (~right_padding(batch_size, length, generator, device)).long()
            input_ids = torch.randint(config.vocab_size, (batch_size, length), generator=generator).to(device)
            labels = input_ids.masked_fill(attention_mask == 0, -100)
            synchronize(device)
            start = time.perf_counter()
            loss = model(input_ids, attention_mask=attention_mask, labels=labels).loss
            loss.backward()
            synchronize(device)
            step = {"seconds": time.perf_counter() - start, "compilations": counters["stats"]["unique_graphs"]}
            sizes = {"round": round_, "batch_size": batch_size, "length": length, "loss": loss.item()}
            print(json.dumps({**sizes, **step}), flush=True)
            model.zero_grad()


# ---- what was measured ----------------------------------------------------------------------------------------


def load(name: str, folder: Path) -> Row:
    return json.loads((folder / f"{name}.json").read_text())


def made_with(result: Row) -> str:
    driver = f", driver {result['driver']}" if "driver" in result else ""
    flash = f", flash-attn-4 {result['flash-attn-4']}" if result.get("flash-attn-4") else ""
    return f"({result['card']}{driver}, torch {result['torch']}{flash}, {result['date']})"


def block_mask_table(folder: Path) -> str:
    result = load("block_mask", folder)
    lines = ["| batch x length | `create_block_mask` | closed form |", "|---|---|---|"]
    cells: dict[str, list[str]] = {}
    for row in result["results"]:
        size = f"{row['batch_size']} x {row['kv_len']:,}".replace(",", " ")
        cell = "out of memory" if "ms" not in row else f"{row['ms']:.2f} ms, {row['peak_mib']:.1f} MiB"
        cells.setdefault(size, ["", ""])[row["way"] == BUILDERS["closed"]] = cell
    lines += [f"| {size} | {textbook} | {closed} |" for size, (textbook, closed) in cells.items()]
    return "\n".join([*lines, "", made_with(result)])


def stream_table(folder: Path) -> str:
    result = load("stream", folder)
    lines = ["| block mask | all 24 steps | slowest step | compilations |", "|---|---|---|---|"]
    for row in result["results"]:
        if "total_s" in row:
            cells = f"{row['total_s']:.0f} s | {row['worst_step_s']:.0f} s | {row['compilations']}"
        else:
            cells = f"stopped after {row['stopped_after_s']:.0f} s, {row['batches']} steps | | "
        lines.append(f"| {row['way']} | {cells} |")
    return "\n".join([*lines, "", made_with(result)])


def attention_table(folder: Path) -> str:
    """The first case with TFLOP/s of the pairs that the mask allows, percent of the matrix products'; then all."""
    result = load("attention", folder)
    rate, rows = result["matmul_tflops"], result["results"]
    measured = list(dict.fromkeys(map(Case.of, rows)))
    header = "| | ms forward | TFLOP/s | ms backward | TFLOP/s | host ms | peak MiB |"
    lines = [f"{measured[0]}", "", header, "|---" * 7 + "|"]
    for row in rows:
        if Case.of(row) != measured[0]:
            continue
        if "not_measured" in row:
            lines.append(f"| {row['way']} | {row['not_measured']} | | | | | |")
            continue
        cells = [row["way"]]
        for passes, share in (("forward", 1), ("backward", 2.5)):  # five matrix products backward, two forward
            median = row[f"{passes}_ms"][1]
            tflops = share * measured[0].flops() / median / 1e9
            cells += [f"{median:.2f}", f"{tflops:.0f} ({tflops / rate:.0%})"]
        cells += [f"{row['forward_host_ms']:.2f} / {row['backward_host_ms']:.2f}", f"{row.get('peak_mib', 0):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    product = f"percent of a bf16 matrix product of 8192 x 8192 x 8192, {rate:.0f} TFLOP/s in the same run"
    lines += ["", f"In brackets: {product}. All cases, ms forward / backward:", ""]
    lines += [f"| | {' | '.join(map(str, measured))} |", "|---" * (len(measured) + 1) + "|"]
    cells_of: dict[str, list[str]] = {}
    for row in rows:
        medians = [f"{row[passes][1]:.2f}" for passes in ("forward_ms", "backward_ms") if passes in row]
        cells_of.setdefault(row["way"], []).append(" / ".join(medians) or row["not_measured"])
    lines += [f"| {' | '.join([way, *cells])} |" for way, cells in cells_of.items()]
    return "\n".join([*lines, "", made_with(result)])


def scaling_table(folder: Path) -> str:
    """Milliseconds forward and backward together, and GiB at the peak, against the length."""
    result = load("scaling", folder)
    lengths = list(dict.fromkeys(row["kv_len"] for row in result["results"]))
    lines = [f"| ms (GiB) | {' | '.join(f'{length:,}'.replace(',', ' ') for length in lengths)} |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    cells: dict[str, list[str]] = {}
    for row in result["results"]:
        if "forward_ms" in row:
            both = row["forward_ms"][1] + row["backward_ms"][1]
            cell = f"{both:.{1 if both < 100 else 0}f} ({row.get('peak_mib', 0) / 1024:.1f})"
        else:
            cell = row["not_measured"]
        cells.setdefault(row["way"], []).append(cell)
    return "\n".join([*lines, *(f"| {' | '.join([way, *row])} |" for way, row in cells.items()), "", made_with(result)])


def transformers_table(folder: Path) -> str:
    """The first round, and the median of the later ones at each length."""
    result = load("transformers", folder)
    factors = list(dict.fromkeys(ROUNDS))
    lines = [f"| | from cold | warm {''.join(f'| {n} x as long ' for n in factors[1:])}| compilations |"]
    lines.append("|---" * (len(factors) + 3) + "|")
    for row in result["results"]:
        if "total_s" not in row:
            lines.append(
                f"| {row['way']} | stopped after {row['stopped_after_s']:.0f} s " + "| " * len(factors) + "| |"
            )
            continue
        rounds = [0.0] * len(ROUNDS)
        for step in row["steps"]:
            rounds[step["round"]] += step["seconds"]
        cells = [f"{rounds[0]:.0f} s"]
        for factor in factors:
            warm = [seconds for i, seconds in enumerate(rounds) if ROUNDS[i] == factor and i]
            cells.append(f"{statistics.median(warm) * 1e3:.0f} ms")
        lines.append(f"| {' | '.join([row['way'], *cells])} | {row['compilations']} |")
    return "\n".join([*lines, "", made_with(result)])


TABLES = {
    "block-mask": block_mask_table,
    "stream": stream_table,
    "attention": attention_table,
    "scaling": scaling_table,
    "transformers": transformers_table,
}


def plot(folder: Path) -> None:
    """Bars of the first case of the attention, and times against length; told apart without colour."""
    from matplotlib.figure import Figure

    result = load("attention", folder)
    measured = [row for row in result["results"] if "forward_ms" in row]
    case = Case.of(measured[0])
    first = [row for row in measured if Case.of(row) == case][::-1]
    figure = Figure(figsize=(9, 0.45 * len(first) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(first))
    for passes, shift, hatch in (("forward_ms", 0.2, ""), ("backward_ms", -0.2, "////")):
        bars = axes.barh(
            [place + shift for place in places],
            [row[passes][1] for row in first],
            height=0.4,
            hatch=hatch,
            color="0.35" if passes == "forward_ms" else "0.85",
            edgecolor="0.2",
            label=passes.removesuffix("_ms"),
        )
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set(xscale="log", xlabel="ms, on a log axis")
    figure.suptitle(f"{case}\n{made_with(result)}", fontsize=9)
    axes.set_yticks(places, [row["way"] for row in first])
    axes.legend(loc="lower right")
    axes.margins(x=0.15)
    figure.savefig(folder / "attention.png", dpi=120)

    if not (folder / "scaling.json").exists():
        return
    result = load("scaling", folder)
    figure = Figure(figsize=(14, 5), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    ways = list(dict.fromkeys(row["way"] for row in result["results"]))
    for axes, passes in zip(both, ("forward_ms", "backward_ms"), strict=True):
        for i, way in enumerate(ways):
            rows = [row for row in result["results"] if row["way"] == way and passes in row]
            style = {
                "marker": "osv^Dx*+P<>hpd"[i % 14],
                "linewidth": 3 if i == 0 else 1.5,  # ours
                "linestyle": ["-", "--", ":"][i % 3],
                "color": str(0.15 * (i % 4)),
            }
            axes.plot([row["kv_len"] for row in rows], [row[passes][1] for row in rows], label=way, **style)
        axes.set(yscale="log", xlabel="max_seq_len", title=passes.removesuffix("_ms"))
        axes.set_xscale("log", base=2)
    both[0].set_ylabel("ms")
    figure.legend(*both[1].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.suptitle(f"131 072 tokens a batch, H16 D128, 40 % right padding\n{made_with(result)}", fontsize=9)
    figure.savefig(folder / "scaling.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = ["attention", "scaling", "block-mask", "stream", "transformers"]
    parser.add_argument("what", choices=[*measurements, "all", "table", "plot", "stream-of", "transformers-of"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="of attention; cpu tries it out")
    parser.add_argument("--sizes", nargs="+", metavar="BxS", help="of attention or scaling, instead of the usual cases")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128], metavar="D")
    parser.add_argument("--heads", nargs="+", default=["16/16"], metavar="Hq/Hkv")
    parser.add_argument("--padding", nargs="+", type=int, default=[40], metavar="PERCENT")
    parser.add_argument("--sides", nargs="+", choices=["right", "left"], default=["right"])
    parser.add_argument("--ways", nargs="+", default=[""], help="of attention: those whose name contains one of these")
    parser.add_argument("--of", nargs="+", help="ways of stream or transformers, all if left out; for -of, the one")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that each of them may take")
    parser.add_argument("--table", choices=TABLES, default="attention", help="which table")
    args = parser.parse_args()
    ways = [way for way in WAYS if any(part in way for part in args.ways)]
    chosen = cases(args.sizes or [], args.head_dims, args.heads, args.padding, args.sides)
    if args.what in ("attention", "all"):
        attention("attention", chosen or usual_cases(), ways, args.results, args.device)
    if args.what in ("scaling", "all"):
        tokens = 2**17
        sizes = [f"{tokens // kv_len}x{kv_len}" for kv_len in (2**n for n in range(10, 18))]
        longer = cases(sizes, [128], ["16/16"], [40], ["right"])
        attention("scaling", chosen or longer, ways, args.results, args.device)
    if args.what in ("block-mask", "all"):
        block_mask(args.results)
    for what, names, steps in (("stream", BUILDERS, BATCHES), ("transformers", MODELS, len(ROUNDS) * SIZES_OF_MODEL)):
        if args.what in (what, "all"):
            chosen_ways = {way: name for way, name in names.items() if way in (args.of or names)}
            in_a_process(what, chosen_ways, steps, args.limit, args.results, args.device)
    if args.what == "stream-of":
        stream_of(args.of[0])
    if args.what == "transformers-of":
        transformers_of(args.of[0], args.device)
    if args.what == "table":
        print(TABLES[args.table](args.results))
    if args.what in ("plot", "all"):
        plot(args.results)


if __name__ == "__main__":
    main()
