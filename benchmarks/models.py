"""Training steps of changing shapes, of attention alone and of models; decoding; first steps; small ones.

On a CUDA card:

python benchmarks/models.py stream | transformers | packed | step | generate | first-step | small

Each way, but for small, runs in a process of its own that starts with nothing compiled. Results go to
benchmarks/results/NAME.json; benchmarks/report.py shows them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import padded, right_padding
from common import Row, compile_afresh, parser_of, peak_mib, save, synchronize, wall_milliseconds
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask
from tqdm import tqdm

from causal_padded_flexattn import (
    attend,
    causal,
    causal_padded_attention,
    create_causal_padding_block_mask,
    create_padding_mask,
)
from causal_padded_integrations import transformers as integration

STREAM = {way: way for way in ("closed form", "create_block_mask", "compiled create_block_mask")}
BATCHES = 24  # of the stream
MODELS = {
    "sdpa": "sdpa",
    "shipped": "flex_attention, as shipped",
    "mask": "flex_attention, masks in closed form",
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
KEPT = {  # in turn: the folder of the caches, and the file of the artifacts
    "nothing kept": ("caches", "artifacts"),
    "cache folders kept": ("caches", "unused"),
    "artifacts loaded": ("empty", "artifacts"),
}
MODES = {
    "eager": None,
    "torch.compile": "default",
    'torch.compile, mode="reduce-overhead"': "reduce-overhead",
}
SIZES_OF_MODEL = 5
# The lengths of each round are multiplied by it, and the batch divided; the first round compiles.
ROUNDS = [1] * 4 + [2] * 3 + [4] * 3


def compilations() -> int:
    from torch._dynamo.utils import counters  # no public counter exists

    return counters["stats"]["unique_graphs"]


def stream_of(way: str) -> None:
    """24 batches of random size, forward and backward, in this process; a line of JSON for each."""
    create, generator = create_block_mask, torch.Generator().manual_seed(0)
    if way.startswith("compiled"):
        create = torch.compile(create_block_mask)
    for _ in range(BATCHES):
        batch_size = int(torch.randint(1, 9, (), generator=generator))
        length = int(torch.randint(100, 4097, (), generator=generator))
        pads = right_padding(batch_size, length, generator)
        shape = (3, batch_size, 16, length, 64)
        inputs = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        if way == "closed form":
            block_mask = create_causal_padding_block_mask(pads)
        else:
            mask_mod = and_masks(causal, create_padding_mask(pads))
            block_mask = create(mask_mod, batch_size, None, length, length, device="cuda")
        output = attend(*inputs, block_mask)
        output.backward(torch.ones_like(output))
        torch.cuda.synchronize()
        step = {"seconds": time.perf_counter() - start, "compilations": compilations()}
        print(json.dumps({"batch_size": batch_size, "length": length, **step}), flush=True)


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
    from transformers import AttentionMaskInterface

    if way == "mask":
        AttentionMaskInterface.register("flex_attention", integration.block_mask)
    if way == "ours":
        integration.register()
    scale = 1 if device == "cuda" else 32
    torch.manual_seed(0)
    model = make_model(kind, scale, **more).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    model.set_attn_implementation("sdpa" if way == "sdpa" else "flex_attention")
    return model, scale


def generate_of(way: str, kind: str, cache: str, device: str, rounds: int) -> None:
    """128 new tokens for eight prompts of 500 to 2000, padded on the left, again and again."""
    model, scale = model_for(way, kind, device)
    length, new = 2000 // scale, 128 // scale
    lengths = torch.linspace(500 // scale, length, 8).long().tolist()
    attention_mask = (~padded(lengths, length, "left", device)).long()
    input_ids = torch.randint(1, 32000 // scale, (8, length), generator=torch.Generator().manual_seed(0))
    prompts = {"input_ids": input_ids.to(device), "attention_mask": attention_mask}
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    for round_ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        tokens = model.eval().generate(**prompts, **options, cache_implementation=cache)[:, length:]
        synchronize(device)
        step = {"seconds": time.perf_counter() - start, "compilations": compilations()}
        step |= {"round": round_, "tokens": tokens.numel(), "sum": int(tokens.sum())}
        print(json.dumps(step), flush=True)


def first_step(artifacts: Path, device: str) -> None:
    """One training step of attention in this process, with what another process has kept, if it has."""
    length, dtype = (2048, torch.bfloat16) if device == "cuda" else (64, torch.float32)
    pads = right_padding(4, length, torch.Generator().manual_seed(0), device)
    inputs = torch.randn(3, 4, 4, length, 64, device=device, dtype=dtype, requires_grad=True)
    synchronize(device)
    start = time.perf_counter()
    if artifacts.exists():
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    output = causal_padded_attention(*inputs, pads)
    output.backward(torch.ones_like(output))
    synchronize(device)
    print(json.dumps({"seconds": time.perf_counter() - start, "compilations": compilations()}), flush=True)
    made = torch.compiler.save_cache_artifacts()
    if made is not None and not artifacts.exists():
        artifacts.write_bytes(made[0])


def measure_first_steps(device: str, limit: float) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way, (caches, artifacts) in KEPT.items():
            arguments = ["first-step-of", "--device", device, "--artifacts", f"{folder}/{artifacts}"]
            rows.append({"way": way} | measure(arguments, 1, limit, f"{folder}/{caches}"))
    return rows


def transformers_of(way: str, kind: str, device: str, rounds: int) -> None:
    """Padded batches of varying size through a small model, forward and backward, again and again."""
    model, scale = model_for(way, kind, device)
    for round_, longer in enumerate(ROUNDS[:rounds]):
        generator = torch.Generator().manual_seed(0)
        for _ in range(SIZES_OF_MODEL):
            batch_size = max(2, int(torch.randint(2, 9, (), generator=generator)) // longer)
            length = int(torch.randint(1560, 3711, (), generator=generator)) // scale * longer
            attention_mask = (~right_padding(batch_size, length, generator, device)).long()
            input_ids = torch.randint(32000 // scale, (batch_size, length), generator=generator).to(device)
            labels = input_ids.masked_fill(attention_mask == 0, -100)
            synchronize(device)
            start = time.perf_counter()
            loss = model(input_ids, attention_mask=attention_mask, labels=labels).loss
            loss.backward()
            synchronize(device)
            step = {"seconds": time.perf_counter() - start, "compilations": compilations()}
            sizes = {"round": round_, "batch_size": batch_size, "length": length, "loss": loss.item()}
            print(json.dumps({**sizes, **step}), flush=True)
            model.zero_grad()


def packed_of(way: str, device: str) -> None:
    """Ten packed batches of different lengths through a Llama; of the last also the mask alone."""
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
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}

        def step(inputs: dict[str, Any] = inputs) -> float:
            model.zero_grad()
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            return loss.item()

        synchronize(device)
        start = time.perf_counter()
        row = {"length": length, "loss": step()}
        synchronize(device)
        row |= {"seconds": time.perf_counter() - start, "compilations": compilations()}
        if length == PACKED[0] // scale:
            embeds = model.get_input_embeddings()(input_ids)
            of_batch = (model.config, embeds, None, None, position_ids)
            mask = partial(masking_utils.create_causal_mask, *of_batch)
            row |= {
                "mask_ms": wall_milliseconds(mask, device, 20),
                "step_ms": wall_milliseconds(step, device, 5),
            }
            row |= {"mask_mib": peak_mib(mask), "step_mib": peak_mib(step)} if device == "cuda" else {}
        print(json.dumps(row), flush=True)


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


def step_batch(packed: bool, batch_size: int, length: int, vocabulary: int, device: str) -> dict[str, Tensor]:
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
    return {name: x.to(device) for name, x in inputs.items()}


def step_of(way: str, batch_size: int, length: int, device: str) -> Row:
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

    def step() -> float:
        loss = compiled(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    row: Row = {"loss": step().item()}
    step()
    quartiles = wall_milliseconds(step, device, 10)
    row |= {"rows": len(batch["labels"]), "length": length, "batch_size": batch_size, "real": real}
    row |= {"quartiles": quartiles, "tokens_per_s": real / quartiles[1] * 1e3}
    return row | ({"peak_mib": peak_mib(step)} if device == "cuda" else {})


class Layers(torch.nn.Module):
    """Four of attention alone, of a causal model over a padded batch; the mask is made with them."""

    def __init__(self, ours: bool, heads: int, head_dim: int) -> None:
        super().__init__()
        self.ours, self.heads, width = ours, heads, heads * head_dim
        sizes = (3 * width, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, n) for _ in range(4) for n in sizes)

    def forward(self, x: Tensor, pads: Tensor) -> Tensor:  # x: (B, S, heads * head_dim)
        attention: Any
        if self.ours:
            attention = partial(attend, block_mask=create_causal_padding_block_mask(pads))
        else:
            square = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
            mask = ~pads[:, None, None] & square.tril()
            attention = partial(F.scaled_dot_product_attention, attn_mask=mask)
        for qkv, out in zip(self.layers[::2], self.layers[1::2], strict=True):
            heads = qkv(x).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
            x = x + out(attention(*heads).transpose(1, 2).flatten(2))
        return x


def measure_small_steps(device: str) -> list[Row]:
    """Wall time of forward and backward together, where launching takes longer than computing."""
    scale, dtype = (1, torch.bfloat16) if device == "cuda" else (16, torch.float32)
    rows: list[Row] = []
    for way in ("ours", "SDPA, explicit mask"):
        for name, mode in MODES.items():
            compile_afresh()
            torch.manual_seed(0)
            model = Layers(way == "ours", 16, 64 // scale).to(device, dtype)
            x = torch.randn(4, 512 // scale, 1024 // scale).to(device, dtype)
            pads = right_padding(4, 512 // scale, torch.Generator().manual_seed(0), device)
            run: Any = model if mode is None else torch.compile(model, mode=mode, fullgraph=True)

            def step(model: Any = model, run: Any = run, x: Tensor = x, pads: Tensor = pads) -> Tensor:
                model.zero_grad()  # else the next pass would add to what a graph overwrites
                output = run(x, pads)
                output.backward(torch.ones_like(output))
                return output

            for _ in range(4):  # compiles, and records the graphs
                output = step()
            norm = output[~pads].float().norm().item()
            rows.append({"way": way, "mode": name, "ms": wall_milliseconds(step, device, 100), "norm": norm})
            tqdm.write(str(rows[-1]))
    return rows


def measure(arguments: list[str], steps: int, limit: float, kept: str | None = None) -> Row:
    """A process that starts with nothing compiled, or with what a folder keeps: its steps, and their sum."""
    with tempfile.TemporaryDirectory() as cold:
        folder = kept or cold
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        command = ["timeout", str(limit), sys.executable, __file__, *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    row: Row = {"batches": len(lines), "steps": lines}
    if len(lines) < steps:
        return row | {"stopped_after_s": limit}
    if "seconds" not in lines[0]:
        return row
    seconds = [line["seconds"] for line in lines]
    worst = {"worst_step_s": max(seconds), "compilations": lines[-1]["compilations"]}
    return row | {"total_s": sum(seconds), **worst}


def main() -> None:
    parser = parser_of(__doc__)
    choices = ["stream", "transformers", "packed", "step", "generate", "first-step"]
    parser.add_argument("what", choices=["small", *choices, *(f"{choice}-of" for choice in choices)])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries all but stream")
    parser.add_argument("--of", nargs="+", help="ways, all if left out; for -of, the one")
    parser.add_argument("--models", nargs="+", choices=KINDS, default=KINDS, help="of transformers")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES, help="to generate with")
    parser.add_argument("--rounds", type=int, default=len(ROUNDS), help="of models: the first compiles")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that each of them may take")
    parser.add_argument("--artifacts", type=Path, help="for first-step-of")
    args = parser.parse_args()
    if args.what == "stream-of":
        return stream_of(args.of[0])
    if args.what == "transformers-of":
        return transformers_of(args.of[0], args.models[0], args.device, args.rounds)
    if args.what == "generate-of":
        return generate_of(args.of[0], args.models[0], args.caches[0], args.device, args.rounds)
    if args.what == "packed-of":
        return packed_of(args.of[0], args.device)
    if args.what == "step-of":
        for size in STEP_SIZES:
            print(json.dumps(step_of(args.of[0], *size, args.device)), flush=True)
        return None
    if args.what == "first-step-of":
        return first_step(args.artifacts, args.device)
    if args.what == "small":
        return save("small", measure_small_steps(args.device), args.results, args.device)
    if args.what == "first-step":
        return save("first_step", measure_first_steps(args.device, args.limit), args.results, args.device)
    names = {"stream": STREAM, "step": {way: way for way in STEP}}.get(args.what, MODELS)
    ways = [
        (way, kind, cache)
        for kind in ([""] if args.what in ("stream", "packed", "step") else args.models)
        for cache in (args.caches if args.what == "generate" else [""])
        for way in names
        if way in (args.of or names)
    ]
    rows = []
    for way, kind, cache in tqdm(ways, desc=args.what):
        arguments = [f"{args.what}-of", "--of", way, "--device", args.device, "--rounds", str(args.rounds)]
        arguments += (["--models", kind] if kind else []) + (["--caches", cache] if cache else [])
        rounds = args.rounds * (1 if cache else SIZES_OF_MODEL)
        steps = {"stream": BATCHES, "packed": len(PACKED), "step": len(STEP_SIZES)}.get(args.what, rounds)
        row = {"way": names[way], "model": kind, "cache": cache} | measure(arguments, steps, args.limit)
        rows.append(row)
        tqdm.write(str({key: value for key, value in row.items() if key != "steps"}))
        save(args.what, rows, args.results, args.device)


if __name__ == "__main__":
    main()
