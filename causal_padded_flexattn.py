# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "attn-gym", "matplotlib"]
# ///
"""Causal attention over a padded batch with PyTorch's FlexAttention.

Sequences of different lengths are padded to one length. `create_padding_mask` tells FlexAttention which
tokens are padding, `causal` which keys a query may see; a `BlockMask` of the two lets the kernel skip every
128 x 128 tile of scores in which nothing is allowed.

`python causal_padded_flexattn.py` shows it at work: it checks the outputs and gradients against
`scaled_dot_product_attention` with an explicit mask, times both, and draws the mask.

Shapes, as in torch.nn.functional.scaled_dot_product_attention: B batch, Hq query heads, Hkv key/value heads,
L query length, S key length (max_seq_len), E head size of query and key, Ev head size of value.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, flex_attention

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# ---- what may attend to what --------------------------------------------------------------------------------


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """mask_mod: a query sees the keys up to its own position.

    Args:
        b, h, q_idx, kv_idx: integer tensors: batch element, head, position of the query, position of the key.

    Returns:
        A boolean tensor, True where the score is computed.
    """
    return q_idx >= kv_idx


def create_padding_mask(pads: Tensor) -> MaskMod:
    """Make the mask_mod that computes a score only where neither the query nor the key is padding.

    After the padding question of attention-gym, https://github.com/meta-pytorch/attention-gym/issues/38.

    Args:
        pads: (B, max_seq_len), torch.bool, True where the token is padding. The mask_mod reads it when
            attention runs, so leave it unchanged until then.

    Returns:
        The mask_mod.

    Raises:
        TypeError: `pads` is not torch.bool.
        ValueError: `pads` is not two-dimensional, or is empty.
    """
    if pads.dtype != torch.bool:
        raise TypeError(
            f"pads must be torch.bool, True where padding; got {pads.dtype}: "
            "from a Hugging Face attention_mask, pass attention_mask == 0"
        )
    if pads.dim() != 2 or pads.numel() == 0:
        raise ValueError(
            f"pads must be (batch_size, max_seq_len), neither of them 0; got {tuple(pads.shape)}: "
            "pass one row of flags for each sequence of the batch"
        )

    def padding(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~pads[b, q_idx] & ~pads[b, kv_idx]

    return padding


# ---- the block mask -----------------------------------------------------------------------------------------


def create_causal_padding_block_mask(
    pads: Tensor,
    q_len: int | None = None,
    *,
    q_offset: int | Tensor | None = None,
    causal: bool = True,
    BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:
    """Build in closed form the BlockMask that `create_block_mask` finds by evaluating every score.

    It depends on the padding alone: build it once for a batch and hand it to every layer. Nothing here waits
    for the device or compiles, and no tensor holds more than a number for each tile.

    Args:
        pads: (B, S), torch.bool, True where the key is padding, as a cache is where it is not written yet.
            Attention reads it again: leave it unchanged until the backward pass is done.
        q_len: L, the number of queries; all that fit when None.
        q_offset: position of the first query among the keys; S - L when None, so that the queries are the last
            tokens. A 0-d integer tensor is not checked: that would wait for the device.
        causal: whether a query sees only the keys up to its own position.
        BLOCK_SIZE: tokens in a block, or (in a query block, in a key block).

    Returns:
        A BlockMask of shape (B, 1, L, S), for any number of heads.

    Raises:
        TypeError: `pads` is not torch.bool, or `q_offset` no integer.
        ValueError: `pads` is not two-dimensional, or the queries do not lie among the keys.
    """
    mask_mod = _mask_mod(pads, causal)
    kv_len, device = pads.shape[1], pads.device
    q_block, kv_block = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    if isinstance(q_offset, Tensor):
        if q_offset.dim() or q_offset.is_floating_point() or q_offset.device != device:
            raise TypeError(f"q_offset must be an int or a 0-d integer tensor on {device}; got {q_offset!r}")
        q_len = kv_len if q_len is None else q_len
        fits = 1 <= q_len <= kv_len
    else:
        q_len = kv_len - (q_offset or 0) if q_len is None else q_len
        q_offset = kv_len - q_len if q_offset is None else q_offset
        fits = 0 <= q_offset < q_offset + q_len <= kv_len
    if not fits:
        raise ValueError(
            f"the queries must lie among the {kv_len} keys that pads covers; got q_len={q_len}, q_offset={q_offset}: "
            "with a preallocated cache, pads covers all of it"
        )

    # A padded key stands after every query and a padded query before every key: then comparing the ends of two
    # blocks is exact. Without causality, all that is not padding stands at one place.
    positions = torch.arange(kv_len, dtype=torch.int32, device=device)
    if not causal:
        positions.zero_()
    rows = torch.where(pads, -1, positions)  # (B, S)
    if q_len < kv_len:
        # The mask_mod captures tensors: an int would be compiled in, a kernel for every decoding step. And a copy,
        # since a cache counts its length up in place.
        q_offset = torch.full((), q_offset, device=device) if isinstance(q_offset, int) else q_offset.clone()
        rows = rows.index_select(1, q_offset + torch.arange(q_len, device=device))  # (B, L)
        mask_mod = _shift_queries(mask_mod, q_offset, torch.full_like(q_offset, kv_len - 1))
    first_query, last_query = _block_ends(rows, q_block, -1)  # (B, query blocks)
    first_key, last_key = _block_ends(torch.where(pads, kv_len, positions), kv_block, kv_len)  # (B, key blocks)
    # A tile has an allowed pair where last_query >= first_key, and only such where first_query >= last_key.
    queries, keys = torch.stack([last_query, first_query]), torch.stack([first_key, last_key])
    return BlockMask(
        (q_len, kv_len),
        *_list_tiles(torch.ge, queries, keys),
        # The backward pass goes through the queries of each key. Its kernels read a list that is not contiguous
        # wrongly, so these come from the comparison turned round, not from transposed tiles.
        *_list_tiles(torch.le, keys, queries),
        BLOCK_SIZE=(q_block, kv_block),
        mask_mod=mask_mod,
    )


def _mask_mod(pads: Tensor, is_causal: bool) -> MaskMod:
    padding = create_padding_mask(pads)
    return and_masks(causal, padding) if is_causal else padding


def _shift_queries(mask_mod: MaskMod, q_offset: Tensor, last: Tensor) -> MaskMod:
    def shifted(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # Kernels for the CPU evaluate rows past the queries too: those must not read past pads.
        return mask_mod(b, h, torch.minimum(q_idx + q_offset, last), kv_idx)

    return shifted


def _block_ends(places: Tensor, block: int, outside: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest place in each block, (B, N) to twice (B, blocks); past the end is `outside`."""
    if places.shape[1] % block:
        places = F.pad(places, (0, -places.shape[1] % block), value=outside)
    smallest, largest = places.unflatten(1, (-1, block)).aminmax(dim=-1)
    return smallest, largest


def _list_tiles(compare: Callable[..., Tensor], rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """How many partial tiles each row has, and in which columns; the same of the full tiles.

    From the ends of blocks, (2, B, rows) and (2, B, columns), to twice (B, 1, rows) and (B, 1, rows, columns), int32.
    """
    tiles = compare(rows[:, :, None, :, None], columns[:, :, None, None, :])  # those with a pair, those with all
    tiles[0] ^= tiles[1]  # partial: with a pair, but not all
    size = columns.shape[-1]
    rank_dtype = torch.int16 if size < 2**15 else torch.int32  # the largest tensors here: half the memory
    rank = tiles.cumsum(-1, dtype=rank_dtype)
    del tiles
    counts = rank[..., -1].to(torch.int32)
    # The k-th tile of a row is where the rank first reaches k; slots without a tile repeat the last one.
    wanted = torch.minimum(torch.arange(1, size + 1, dtype=rank_dtype, device=rank.device), rank[..., -1:])
    indices = torch.searchsorted(rank, wanted, out_int32=True)
    return counts[0], indices[0], counts[1], indices[1]


# ---- attention ----------------------------------------------------------------------------------------------


def causal_padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pads: Tensor,
    *,
    block_mask: BlockMask | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: Literal["auto", "triton", "flash"] = "auto",
    safe_padding: bool = False,
) -> Tensor:
    """Attention over a padded batch by FlexAttention, compiled once: softmax(scale query keyᵀ) value where allowed.

    Use it in training, prefill and decoding, in a compiled model or not, under autocast. With fewer queries than
    keys, the queries are the last tokens, unless a block mask made with `q_offset` says otherwise. On the CPU it
    needs memory for every score; its gradients come from SDPA, as FlexAttention has none there.

    Args:
        query: (B, Hq, L, E); a transposed view of (B, L, Hq, E) needs no copy, here and below.
        key: (B, Hkv, S, E), with Hq a multiple of Hkv (grouped-query attention).
        value: (B, Hkv, S, Ev).
        pads: (B, S), torch.bool, True where the key is padding.
        block_mask: what `create_causal_padding_block_mask` made of the same `pads`, to be shared by all layers;
            made here when None. It then decides, also over `causal`.
        causal: whether a query sees only the keys up to its own position.
        scale: factor of the scores before the softmax; 1 / sqrt(E) when None.
        backend: "triton", "flash" (FlashAttention-4), or "auto", for now "triton".
        safe_padding: zero the padded rows first. Without it NaN or Inf there reach real rows: those of `value`
            the output (0 * NaN is NaN in a tile that is not all real), those of all three the gradients.

    Returns:
        (B, Hq, L, Ev); padded query rows are exact zeros, and gradients in padded rows are too.

    Raises:
        TypeError, ValueError: inputs that do not fit together, each with what to do.
    """
    if torch.is_autocast_enabled(query.device.type):  # as SDPA does
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    _check_inputs(query, key, value, pads, block_mask, backend)
    if block_mask is None:
        block_mask = create_causal_padding_block_mask(pads, query.shape[2], causal=causal)
    if safe_padding:
        all_queries = query.shape[2] == key.shape[2]
        q_pads = pads if all_queries else ~_dense_mask(block_mask, query).any(-1)[:, 0]  # (B, L)
        query = query.masked_fill(q_pads[:, None, :, None], 0.0)
        key, value = (x.masked_fill(pads[:, None, :, None], 0.0) for x in (key, value))

    compiling = torch.compiler.is_compiling()
    if query.device.type == "cpu":
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        # On the CPU flex has no backward, and what it compiles to fails to build at some shapes.
        if needs_grad or compiling:
            return _masked_sdpa(query, key, value, _dense_mask(block_mask, query), scale)
    flex = flex_attention if compiling else _compiled_flex_attention(query.device.type)
    return flex(
        query,
        key,
        value,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"BACKEND": "FLASH"} if backend == "flash" else None,
    )


@cache
def _compiled_flex_attention(device_type: str) -> Callable[..., Tensor]:
    # On the CPU compiling takes 5 s and more for each shape: there torch traces it, and runs plain operators.
    return torch.compile(flex_attention) if device_type != "cpu" else torch.compile(flex_attention, backend="eager")


def _dense_mask(block_mask: BlockMask, query: Tensor) -> Tensor:
    """(B, H or 1, L, S): the mask_mod at every score."""
    _, heads, q_len, kv_len = block_mask.shape
    return create_mask(block_mask.mask_mod, query.shape[0], heads, q_len, kv_len, query.device)


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, block_mask: BlockMask | None, backend: str
) -> None:
    """Say what does not fit before a kernel runs; nothing here waits for the device."""
    create_padding_mask(pads)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be (batch, heads, length, head size), none of them 0; got {tuple(x.shape)}: "
                "add or transpose dimensions"
            )
        if x.dtype != query.dtype:
            raise TypeError(f"query, key and value must share a dtype; got {query.dtype}, {name} {x.dtype}: cast it")
        if x.device != pads.device:
            raise ValueError(f"{name} is on {x.device}, pads on {pads.device}: move them to one device")
    (batch_size, q_heads, q_len, head_dim), (_, kv_heads, kv_len, _) = query.shape, key.shape
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must agree in batch, heads and length; got {shapes}")
    if batch_size != key.shape[0] or head_dim != key.shape[3]:
        raise ValueError(f"query and key must agree in batch and head size; got {shapes}")
    if q_heads % kv_heads:
        raise ValueError(f"the heads of query must be a multiple of those of key and value; got {shapes}")
    if pads.shape != (batch_size, kv_len):
        raise ValueError(
            f"pads must cover the keys, ({batch_size}, {kv_len}); got {tuple(pads.shape)}: "
            "pass one flag for each token of key, also of a cache"
        )
    if q_len > kv_len:
        raise ValueError(f"query must not be longer than key; got {shapes}: the queries are the last of the tokens")
    if block_mask is not None:
        masks, heads, *lengths = block_mask.shape
        if masks not in (1, batch_size) or heads not in (1, q_heads) or lengths != [q_len, kv_len]:
            raise ValueError(
                f"block_mask is for {block_mask.shape} (batch, heads, query length, key length); got {shapes}: "
                "build it with create_causal_padding_block_mask(pads, q_len)"
            )
    if backend not in ("auto", "triton", "flash"):
        raise ValueError(f'backend must be "auto", "triton" or "flash"; got {backend!r}')
    obstacle = _flash_obstacle(query, key, value) if backend == "flash" else None
    if obstacle:
        raise ValueError(f'backend="flash" {obstacle}; pass backend="auto"')


def _flash_obstacle(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What keeps the FLASH kernel from being used, if anything; after the checks of flash_attn.cute.interface."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return "needs the package flash-attn-4: pip install --pre flash-attn-4"
    major = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 0
    if major not in (9, 10, 11):
        return f"needs a Hopper or Blackwell card; query is on {query.device}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16; got {query.dtype}"
    largest = 256 if major == 9 else 128
    if any(x.shape[3] % 8 or x.shape[3] > largest for x in (query, value)):
        return f"needs head sizes that are multiples of 8 up to {largest}; got {query.shape[3]} and {value.shape[3]}"
    if query.shape[2] != key.shape[2]:
        return f"needs as many queries as keys; got {query.shape[2]} and {key.shape[2]}"
    return None


# ---- the reference ------------------------------------------------------------------------------------------


def sdpa_reference(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """The same attention by `scaled_dot_product_attention` with the explicit mask: O(B L S) memory, any device.

    Args:
        query: (B, Hq, L, E), the last L positions of the sequence.
        key: (B, Hkv, S, E), with Hq a multiple of Hkv.
        value: (B, Hkv, S, Ev).
        pads: (B, S), torch.bool, True where the token is padding.
        causal: whether a query sees only the keys up to its own position.
        scale: factor of the scores before the softmax; 1 / sqrt(E) when None.

    Returns:
        (B, Hq, L, Ev); padded query rows are exact zeros and receive and give exact zero gradients.

    Raises:
        TypeError, ValueError: what `create_padding_mask` says of `pads`.
    """
    create_padding_mask(pads)  # for its checks
    q_len, kv_len = query.shape[-2], key.shape[-2]
    mask = ~pads[:, kv_len - q_len :, None] & ~pads[:, None, :]  # (B, L, S)
    if causal:
        mask = mask.tril(kv_len - q_len)
    return _masked_sdpa(query, key, value, mask[:, None], scale)


def _masked_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    # A softmax over no key is NaN: let those rows see every key, and zero them and their gradients after.
    empty = ~mask.any(-1, keepdim=True)  # (B, 1, L, 1)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(query, key, value, mask | empty, scale=scale).masked_fill(empty, 0.0)


# ---- the demonstration: python causal_padded_flexattn.py ------------------------------------------------------


def draw_mask(path: Path, padding_side: str = "right") -> None:
    """Draw the combined mask of a sequence of 8 tokens, padded to 12, with attention-gym's visualizer.

    Args:
        path: the PNG file to write.
        padding_side: "right" or "left".

    Raises:
        ImportError: attn_gym or matplotlib is not installed.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, also where a display exists
    from attn_gym import visualize_attention_scores

    pads = _pads([12, 8], 12, padding_side)
    tokens = torch.ones(2, 1, 12, 8)  # (B, H, S, E); only the mask is drawn
    with contextlib.redirect_stdout(io.StringIO()):
        visualize_attention_scores(
            tokens,
            tokens,
            mask_mod=and_masks(causal, create_padding_mask(pads)),
            device="cpu",
            name="causal_padding_mask",
            path=path,
            batch_idx=1,
        )


def _pads(lengths: Sequence[int], max_seq_len: int, padding_side: str, device: str | torch.device = "cpu") -> Tensor:
    """(B, max_seq_len): True where a sequence of that length, padded on that side, holds padding."""
    positions = torch.arange(max_seq_len, device=device)
    length = torch.tensor(lengths, device=device)[:, None]
    return positions >= length if padding_side == "right" else positions < max_seq_len - length


def _attend(
    attention: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor | None
) -> tuple[Tensor, ...]:
    """The output and, given the gradient of the output, those of query, key and value."""
    inputs = [x.detach().requires_grad_(grad_output is not None) for x in inputs]
    output = attention(*inputs)
    return (output, *torch.autograd.grad(output, inputs, grad_output)) if grad_output is not None else (output,)


_RESULTS = ("output", "query gradient", "key gradient", "value gradient")


def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench  # device events, warm-up, a cold L2 cache before each run

        return do_bench(run, return_mode="median")
    return _wall_ms(run)


def _peak_memory(run: Callable[[], object], device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return f", {(torch.cuda.max_memory_allocated() - before) / 2**20:.1f} MiB at its peak"


def _wall_ms(run: Callable[[], object]) -> float:
    from torch.utils.benchmark import Timer  # warms up, and waits for the device

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.3).median * 1e3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"{self.prog}: {message}\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        description="Causal attention over a padded batch: FlexAttention checked against SDPA, timed, and drawn.",
        epilog="Sizes left out are B8 H16 S4096 in bfloat16 on CUDA, B4 H4 S512 in float32 on CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto is cuda where there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="of query, key and value")
    add("--batch-size", type=_count, metavar="B", help="sequences")
    add("--heads", type=_count, metavar="H", help="query heads")
    add("--kv-heads", type=_count, metavar="H", help="key and value heads, as many as --heads if left out")
    add("--max-seq-len", type=_count, metavar="S", help="tokens of a padded sequence")
    add("--head-dim", type=_count, metavar="D", default=64, help="size of a head")
    add("--lengths", metavar="N,N,...", help="real tokens of each sequence, drawn by --seed if left out")
    add("--padding-side", choices=["right", "left"], default="right", help="where the padding stands")
    add("--seed", type=int, default=0, help="of the lengths and the numbers")
    add("--output", type=Path, metavar="PATH", default="causal_padding_mask.png", help="the figure, a .png file")
    add("--no-figure", action="store_true", help="draw nothing")
    args = parser.parse_args(argv)

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: pass --device cpu, or install a CUDA build of torch")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, batch_size, heads, max_seq_len = (
        ("bfloat16", 8, 16, 4096) if args.device == "cuda" else ("float32", 4, 4, 512)
    )
    args.dtype = getattr(torch, args.dtype or dtype)
    args.heads = args.heads or heads
    args.kv_heads = args.kv_heads or args.heads
    args.max_seq_len = args.max_seq_len or max_seq_len
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    if args.lengths is None:
        generator = torch.Generator().manual_seed(args.seed)
        shortest = max(1, args.max_seq_len // 8)
        size = (args.batch_size or batch_size,)
        args.lengths = torch.randint(shortest, args.max_seq_len + 1, size, generator=generator).tolist()
    else:
        try:
            args.lengths = [_count(length) for length in args.lengths.split(",")]
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --lengths: {error}")
        if args.batch_size not in (None, len(args.lengths)):
            parser.error(f"--lengths has {len(args.lengths)} sequences: leave --batch-size {args.batch_size} out")
        if max(args.lengths) > args.max_seq_len:
            parser.error(f"--lengths has {max(args.lengths)} tokens: raise --max-seq-len {args.max_seq_len}")
    if args.output.suffix != ".png" or not args.output.parent.is_dir():
        parser.error(f"--output must be a .png file in a folder that exists; got {args.output}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; --help lists its options.

    Args:
        argv: the arguments of the command line; those of the process when None.

    Returns:
        The exit status: 0 when the check holds, 1 when it does not. Unusable arguments exit with 2.
    """
    args = _parse(argv)
    torch.manual_seed(args.seed)
    device, dtype, on_cuda = torch.device(args.device), args.dtype, args.device == "cuda"
    batch_size, q_len = len(args.lengths), args.max_seq_len
    pads = _pads(args.lengths, q_len, args.padding_side, device)  # (B, S)

    def make(heads: int) -> Tensor:
        return torch.randn(batch_size, heads, q_len, args.head_dim, device=device, dtype=dtype)

    inputs = make(args.heads), make(args.kv_heads), make(args.kv_heads)  # query, key, value
    grad_output = make(args.heads) if on_cuda else None

    def say(label: str, text: str) -> None:
        print(f"{label:<12}{text}", flush=True)

    card = torch.cuda.get_device_name() if on_cuda else "CPU"
    say("device", f"{card}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}")
    if not on_cuda:
        say("", "forward only: FlexAttention has no backward on the CPU")
    heads = f"{args.heads} query and {args.kv_heads} key heads of {args.head_dim}"
    padding = f"{pads.float().mean():.0%} of it padding on the {args.padding_side}"
    say("batch", f"{batch_size} x {q_len} tokens, {padding}; {heads}")

    def build() -> BlockMask:
        mask_mod = and_masks(causal, create_padding_mask(pads))
        return create_block_mask(mask_mod, batch_size, None, q_len, q_len, device=device)

    say("block mask", "building ...")
    block_mask = build()
    assert block_mask.full_kv_num_blocks is not None
    full, part = int(block_mask.full_kv_num_blocks.sum()), int(block_mask.kv_num_blocks.sum())
    tiles = block_mask.kv_indices.numel()
    say("", f"{tiles} tiles of 128 x 128: {full} full, {part} partial, {tiles - full - part} skipped")
    say("", f"create_block_mask: {_wall_ms(build):.2f} ms{_peak_memory(build, device)}")

    # One kernel does not repay precompiled C++ headers (CPU only).
    os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    say("compile", "flex_attention, forward" + (" and backward" if on_cuda else "") + " ...")
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=block_mask, enable_gqa=args.heads != args.kv_heads)

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa_reference(query, key, value, pads)

    start = time.perf_counter()
    results = _attend(flex, inputs, grad_output)
    if on_cuda:
        torch.cuda.synchronize()
    say("", f"{time.perf_counter() - start:.1f} s")

    say("check", "largest error against SDPA in higher precision, SDPA's own, and the bound:")
    wide = torch.float64 if dtype == torch.float32 else torch.float32

    def exact(row: slice) -> tuple[Tensor, ...]:
        return _attend(
            lambda query, key, value: sdpa_reference(query, key, value, pads[row]),
            [x[row].to(wide) for x in inputs],
            None if grad_output is None else grad_output[row].to(wide),
        )

    # One sequence at a time: float64 has no kernel that saves memory.
    exacts = [torch.cat(rows) for rows in zip(*(exact(slice(i, i + 1)) for i in range(batch_size)), strict=True)]
    wrong = []
    for name, ours, own, truth in zip(
        _RESULTS[: len(results)], results, _attend(sdpa, inputs, grad_output), exacts, strict=True
    ):
        error, own_error = ((x - truth).abs().max().item() for x in (ours, own))
        # FlashAttention's habit: twice plain PyTorch's error, thrice for gradients, and here one rounding more.
        bound = (2 if name == "output" else 3) * own_error + torch.finfo(dtype).eps * truth.abs().max().item()
        say("", f"{name:<16}{error:.1e}   {own_error:.1e}   {bound:.1e}")
        if not error <= bound:
            wrong.append(name)

    say("time", "medians ...")
    for name, grad in [("forward", None)] + ([("with backward", grad_output)] if on_cuda else []):
        ours, own = (_median_ms(partial(_attend, attention, inputs, grad), device) for attention in (flex, sdpa))
        say("", f"{name:<16}flex {ours:.2f} ms, SDPA with the explicit mask {own:.2f} ms: {own / ours:.1f} x")

    if not args.no_figure:
        draw_mask(args.output, args.padding_side)
        say("figure", str(args.output))
    if wrong:
        print(f"FlexAttention and SDPA differ by more than the bound: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
