"""Training steps of changing shapes, of attention alone and of models; decoding.

On a CUDA card:

python benchmarks/models.py stream | transformers | packed | step | generate

Each way runs in a process of its own that starts with nothing compiled. Results go to
benchmarks/results/NAME.json; --table shows them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from cases import padded, right_padding
from common import Row, Table, ms, parser_of, peak_mib, spaced, synchronize, table, wall_milliseconds
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask
from tqdm import tqdm

from causal_padded_flexattn import attend, causal, create_causal_padding_block_mask, create_padding_mask
from causal_padded_integrations.transformers import register

STREAM = {way: way for way in ("closed form", "create_block_mask", "compiled create_block_mask")}
BATCHES = 24  # of the stream
MODELS = {
    "sdpa": "sdpa",
    "shipped": "flex_attention, as shipped",
    "ours": "flex_attention, after register()",
}
KINDS = ("llama", "mistral", "gemma3")
CACHES = ("dynamic", "static")
PACKED = [8192, 5000, 7000, 3000, 6000, 4000, 8000, 2000, 7500, 8192]  # the lengths of rows of documents
DOCUMENTS = 30  # in each
STEP = {  # of a training step: whether it is packed, and the attention
    "padded, ours": (False, "ours"),
    "padded, SDPA is_causal": (False, "sdpa"),
    "packed, ours": (True, "ours"),
}
STEP_SIZES = [(32, 1024), (8, 4096)]
SIZES_OF_MODEL = 5


def timed(run: Callable[[], Any], device: str) -> tuple[Any, Row]:
    from torch._dynamo.utils import counters  # no public counter of compilations exists

    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "compilations": counters["stats"]["unique_graphs"]}


def stream_of(way: str, device: str) -> Iterator[Row]:
    """24 batches of random size, forward and backward."""
    create, generator = create_block_mask, torch.Generator().manual_seed(0)
    if way.startswith("compiled"):
        create = torch.compile(create_block_mask)
    scale, dtype = (1, torch.bfloat16) if device == "cuda" else (32, torch.float32)
    for _ in range(BATCHES):
        batch_size = int(torch.randint(1, 9, (), generator=generator))
        length = int(torch.randint(100, 4097, (), generator=generator)) // scale
        pads = right_padding(batch_size, length, generator, device)
        shape = (3, batch_size, 16, length, 64)
        inputs = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

        def step(pads: Tensor = pads, inputs: Tensor = inputs) -> None:
            if way == "closed form":
                block_mask = create_causal_padding_block_mask(pads)
            else:
                mask_mod = and_masks(causal, create_padding_mask(pads))
                block_mask = create(mask_mod, len(pads), None, pads.shape[1], pads.shape[1], device)
            output = attend(*inputs, block_mask)
            output.backward(torch.ones_like(output))

        yield {"batch_size": batch_size, "length": length} | timed(step, device)[1]


def make_model(kind: str, scale: int, layers: int = 4, kv_heads: int = 4) -> torch.nn.Module:
    """All layers of Mistral and every other layer of Gemma 3 have a window of 1024."""
    import transformers

    sizes = {
        "vocab_size": 32000 // scale,
        "hidden_size": 1024 // scale,
        "intermediate_size": 2816 // scale,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": kv_heads,
        "head_dim": 64 // scale,
    }
    window = {"sliding_window": 1024 // scale}
    if kind == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, **window))
    if kind == "gemma3":
        types = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}
        config = transformers.Gemma3TextConfig(**sizes, **window, **types, query_pre_attn_scalar=64 // scale)
        return transformers.Gemma3ForCausalLM(config)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def model_for(way: str, kind: str, device: str, **more: int) -> tuple[torch.nn.Module, int]:
    """With its attention; and by how much it is smaller, for the CPU to try it out."""
    if way == "ours":
        register()
    scale = 1 if device == "cuda" else 32
    torch.manual_seed(0)
    model = make_model(kind, scale, **more).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    model.set_attn_implementation("sdpa" if way == "sdpa" else "flex_attention")
    return model, scale


def generate_of(way: str, kind: str, cache: str, device: str, rounds: int) -> Iterator[Row]:
    """128 new tokens for eight prompts of 500 to 2000, padded on the left, again and again."""
    model, scale = model_for(way, kind, device)
    length, new = 2000 // scale, 128 // scale
    lengths = torch.linspace(500 // scale, length, 8).long().tolist()
    attention_mask = (~padded(lengths, length, "left", device)).long()
    input_ids = torch.randint(1, 32000 // scale, (8, length), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    options |= {"input_ids": input_ids.to(device), "attention_mask": attention_mask}
    run = partial(model.eval().generate, **options, cache_implementation=cache)
    for round_ in range(rounds):
        tokens, step = timed(run, device)
        tokens = tokens[:, length:]
        yield step | {"round": round_, "tokens": tokens.numel(), "sum": int(tokens.sum())}


def transformers_of(way: str, kind: str, device: str, rounds: int) -> Iterator[Row]:
    """Padded batches of varying size through a small model, forward and backward, again and again."""
    model, scale = model_for(way, kind, device)
    for round_ in range(rounds):
        generator = torch.Generator().manual_seed(0)
        for _ in range(SIZES_OF_MODEL):
            batch_size = int(torch.randint(2, 9, (), generator=generator))
            length = int(torch.randint(1560, 3711, (), generator=generator)) // scale
            attention_mask = (~right_padding(batch_size, length, generator, device)).long()
            input_ids = torch.randint(32000 // scale, (batch_size, length), generator=generator).to(device)
            batch = {"input_ids": input_ids, "attention_mask": attention_mask}
            batch["labels"] = input_ids.masked_fill(attention_mask == 0, -100)
            loss, step = timed(partial(loss_of, model, batch), device)
            yield {"round": round_, "batch_size": batch_size, "length": length, "loss": loss.item()} | step
            model.zero_grad()


def loss_of(model: torch.nn.Module, batch: Row) -> Tensor:
    """After its backward pass."""
    loss = model(**batch).loss
    loss.backward()
    return loss


def packed_of(way: str, device: str) -> Iterator[Row]:
    """Ten packed batches of different lengths through a Llama; of the longest also the mask alone."""
    from transformers import masking_utils

    model, scale = model_for(way, "llama", device)
    generator = torch.Generator().manual_seed(0)
    for length in (length // scale for length in PACKED):
        begins = torch.rand(4, length, generator=generator).argsort(1)[:, : DOCUMENTS - 1]
        begins = torch.zeros(4, length, dtype=torch.long).scatter(1, begins, 1)
        begins[:, 0] = 1
        places = torch.arange(length).expand(4, -1)
        position_ids = (places - torch.where(begins == 1, places, 0).cummax(1).values).to(device)
        input_ids = torch.randint(32000 // scale, (4, length), generator=generator).to(device)
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": input_ids,
            "use_cache": False,
        }

        def step(batch: Row = batch) -> float:
            model.zero_grad()
            return loss_of(model, batch).item()

        loss, row = timed(step, device)
        if length == PACKED[0] // scale:
            of_batch = (model.config, model.get_input_embeddings()(input_ids), None, None, position_ids)
            mask = partial(masking_utils.create_causal_mask, *of_batch)
            row |= {"mask_ms": wall_milliseconds(mask, device, 20), "mask_mib": peak_mib(mask, device)}
            row |= {"step_ms": wall_milliseconds(step, device, 5), "step_mib": peak_mib(step, device)}
        yield {"length": length, "loss": loss} | row


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows of sequences, the longest first, each in the first row that has room for it."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row in rows if sum(row) + length <= capacity), None)
        if row is None:
            rows.append([length])
        else:
            row.append(length)
    return rows


def step_batch(packed: bool, batch_size: int, length: int, vocabulary: int, device: str) -> Row:
    """What a model takes, and labels: sequences of a fifth of the length to all of it, 40 % padding."""
    lengths = torch.linspace(0.2, 1, batch_size).mul(length).long().tolist()
    rows = first_fit(lengths, length) if packed else [[n] for n in lengths]
    tokens = lambda n: torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(n))
    places, ids = torch.zeros(2, len(rows), length, dtype=torch.long)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        filled = [*row, length - sum(row)]  # what is left is a document of its own
        places[i] = torch.cat([torch.arange(n) for n in filled])
        ids[i] = torch.cat([tokens(n) for n in filled])
        real[i, : sum(row)] = True
    labels = ids.masked_fill(~real | (places == 0), -100)  # no sequence foretells the next one
    inputs = {"input_ids": ids, "labels": labels}
    inputs |= {"position_ids": places} if packed else {"attention_mask": real.long()}
    return {"use_cache": False} | {name: x.to(device) for name, x in inputs.items()}


def step_of(way: str, device: str) -> Iterator[Row]:
    for batch_size, length in STEP_SIZES:
        yield measure_step(way, batch_size, length, device)


def measure_step(way: str, batch_size: int, length: int, device: str) -> Row:
    """A step of AdamW with a compiled Llama of twelve layers: ms, real tokens a second, MiB at the peak."""
    packed, attention = STEP[way]
    more = {"layers": 12 if device == "cuda" else 2, "kv_heads": 16}
    model, scale = model_for(attention, "llama", device, **more)
    batch_size, length = (batch_size, length) if device == "cuda" else (batch_size // 4, length // scale)
    batch = step_batch(packed, batch_size, length, 32000 // scale, device)
    real = int((batch["labels"] != -100).sum())
    if way.endswith("is_causal"):
        del batch["attention_mask"]  # right padding needs none: no real token sees it
    compiled = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")

    def step() -> Tensor:
        loss = loss_of(compiled, batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    row: Row = {"loss": step().item()}
    step()
    quartiles = wall_milliseconds(step, device, 10)
    row |= {"rows": len(batch["labels"]), "length": length, "batch_size": batch_size, "real": real}
    row |= {"quartiles": quartiles, "tokens_per_s": real / quartiles[1] * 1e3}
    return row | {"peak_mib": peak_mib(step, device)}


def measure(arguments: list[str], limit: float) -> Row:
    """A process that starts with nothing compiled: its steps, and their sum."""
    with tempfile.TemporaryDirectory() as cold:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cold, "TRITON_CACHE_DIR": cold}
        command = ["timeout", str(limit), sys.executable, __file__, *arguments, "--here"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    row: Row = {"batches": len(steps), "steps": steps}
    if done.returncode:
        return row | ({"stopped_after_s": limit} if done.returncode == 124 else {"failed": done.returncode})
    if "seconds" not in steps[0]:
        return row
    seconds = [step["seconds"] for step in steps]
    worst = {"worst_step_s": max(seconds), "compilations": steps[-1]["compilations"]}
    return row | {"total_s": sum(seconds), **worst}


def stopped(row: Row) -> str:
    why = f"stopped after {row['stopped_after_s']:.0f} s" if "stopped_after_s" in row else "failed"
    return f"{why}, {row['batches']} steps"


def stream_table(result: Row) -> str:
    cells = []
    for row in result["results"]:
        cell = stopped(row)
        if "total_s" in row:
            cell = f"{row['total_s']:.0f} s ({row['worst_step_s']:.0f} s, {row['compilations']})"
        cells.append(("24 steps (slowest, compilations)", row["way"], cell))
    return table("", cells)


def transformers_table(result: Row) -> str:
    """The first round alone: from cold."""
    cells = []
    for row in result["results"]:
        seconds = sum(step["seconds"] for step in row["steps"] if step["round"] == 0)
        cell = f"{seconds:.0f} s ({row['compilations']})" if "total_s" in row else stopped(row)
        cells.append((row["model"], row["way"], cell))
    return table("five steps (compilations)", cells)


def packed_table(result: Row) -> str:
    """The mask and a training step of the last batch, and all ten batches from a cold start."""
    cells = []
    for row in result["results"]:
        if "total_s" not in row:
            cells += [(row["way"], "mask", stopped(row))]
            continue
        last = row["steps"][-1]
        cells += [(row["way"], "mask", f"{ms(last['mask_ms'])} ms")]
        cells += [(row["way"], "training step", f"{ms(last['step_ms'], 0)} ms")]
        cells += [
            (row["way"], "ten batches (compilations)", f"{row['total_s']:.1f} s ({row['compilations']})")
        ]
    return table("", cells)


def generate_table(result: Row) -> str:
    """The median of all rounds but the first, which compiles; and that round's seconds."""
    cells = []
    for row in result["results"]:
        if "total_s" not in row:
            cell = stopped(row)
        else:
            first, *others = row["steps"]
            rate = statistics.median(step["tokens"] / step["seconds"] for step in others)
            cell = f"{rate:.0f} ({first['seconds']:.0f} s)"
        cells.append((f"{row['model']}, {row['cache']} cache", row["way"], cell))
    return table("tokens a second (first round)", cells)


def step_table(result: Row) -> str:
    cells = []
    for row in result["results"]:
        for step in row["steps"]:
            size, rate = f"{step['batch_size']} x {spaced(step['length'])}", step["tokens_per_s"] / 1e3
            cells.append((size, row["way"], f"{rate:.0f}"))
    return table("thousand real tokens a second", cells)


def readme_figures(folder: Path) -> str:
    """The speed of a step of each way at the first and the last size."""
    ways = {"SDPA": "padded, SDPA is_causal", "this file": "padded, ours", "packed rows": "packed, ours"}
    steps = {row["way"]: row["steps"] for row in common.load("step", folder)["results"]}
    rates = {name: [f"{step['tokens_per_s'] / 1e3:.0f}" for step in steps[way]] for name, way in ways.items()}
    return ", ".join(f"{' / '.join(rate)} ({name})" for name, rate in rates.items())


TABLES: dict[str, Table] = {
    "stream": stream_table,
    "transformers": transformers_table,
    "packed": packed_table,
    "step": step_table,
    "generate": generate_table,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("--of", nargs="+", help="ways, all if left out")
    parser.add_argument("--models", nargs="+", choices=KINDS, default=KINDS, help="of transformers, generate")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES, help="to generate with")
    parser.add_argument("--rounds", type=int, default=10, help="of models; the first compiles")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that each of them may take")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one way, in this process
    args = parser.parse_args()
    if args.table:
        return print(common.show(args.what, TABLES[args.what], args.results))
    if args.here:
        way, kind, device = args.of[0], args.models[0], args.device
        steps = {  # none begins before it is asked for a step
            "stream": stream_of(way, device),
            "transformers": transformers_of(way, kind, device, args.rounds),
            "packed": packed_of(way, device),
            "step": step_of(way, device),
            "generate": generate_of(way, kind, args.caches[0], device, args.rounds),
        }
        for step in steps[args.what]:
            print(json.dumps(step), flush=True)
        return None
    names = {"stream": STREAM, "step": {way: way for way in STEP}}.get(args.what, MODELS)
    ways = [
        (way, kind, cache)
        for kind in (args.models if args.what in ("transformers", "generate") else [""])
        for cache in (args.caches if args.what == "generate" else [""])
        for way in names
        if way in (args.of or names)
    ]
    rows = []
    for way, kind, cache in tqdm(ways, desc=args.what):
        arguments = [args.what, "--of", way, "--device", args.device, "--rounds", str(args.rounds)]
        arguments += (["--models", kind] if kind else []) + (["--caches", cache] if cache else [])
        row = {"way": names[way], "model": kind, "cache": cache} | measure(arguments, args.limit)
        rows.append(row)
        tqdm.write(str({key: value for key, value in row.items() if key != "steps"}))
        common.save(args.what, rows, args.results, args.device)
    return None


if __name__ == "__main__":
    main()
