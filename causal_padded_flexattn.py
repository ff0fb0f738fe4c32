# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "attn-gym>=0.0.3", "matplotlib"]
# ///
"""Causal attention over a padded batch with PyTorch's FlexAttention.

Sequences of different lengths are padded to one length. `create_padding_mask` tells FlexAttention which
tokens are padding, `causal` which keys a query may see; a `BlockMask` of the two lets the kernel skip every
128 x 128 tile of scores in which nothing is allowed. FlexAttention: https://arxiv.org/abs/2412.05496 and
https://pytorch.org/blog/flexattention/.

`python causal_padded_flexattn.py` shows it at work: it checks the outputs and gradients against
`scaled_dot_product_attention` with an explicit mask, times both, and draws the mask.

Shapes, as in torch.nn.functional.scaled_dot_product_attention: B batch, Hq query heads, Hkv key/value heads,
L query length, S key length (max_seq_len), E head size of query and key, Ev head size of value.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, flex_attention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
    for the device or compiles, and it takes memory for the tokens and the tiles, not for the scores.

    Args:
        pads: (B, S), torch.bool, True where the key is padding, as a cache is where it is not written yet.
            Attention reads it again: leave it unchanged until the backward pass is done.
        q_len: L, the number of queries; all that fit when None, which a tensor q_offset rules out.
        q_offset: position of the first query among the keys; S - L when None, so that the queries are the last
            tokens. A 0-d integer tensor is not checked: that would wait for the device.
        causal: whether a query sees only the keys up to its own position.
        BLOCK_SIZE: tokens in a block, or (in a query block, in a key block).

    Returns:
        A BlockMask of shape (B, 1, L, S), for any number of heads.

    Raises:
        TypeError: `pads` is not torch.bool, or `q_offset` neither an int nor a 0-d integer tensor beside it.
        ValueError: `pads` is not two-dimensional or is empty, or the queries do not lie among the keys.
    """
    mask_mod = _mask_mod(pads, causal)
    kv_len, device = pads.shape[1], pads.device
    q_block, kv_block = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    if isinstance(q_offset, Tensor):
        if q_offset.dim() or q_offset.is_floating_point() or q_offset.device != device:
            raise TypeError(f"q_offset must be an int or a 0-d integer tensor on {device}; got {q_offset!r}")
        if q_len is None:
            raise ValueError("q_len must be given beside a tensor q_offset, which is not read; got None: pass the int")
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

    # Move padded keys behind every query and padded queries before every key: then comparing the ends of two blocks
    # is exact. Without causality, all that is not padding stands at one place.
    places = torch.arange(kv_len, dtype=torch.int32, device=device)
    if not causal:
        places.zero_()
    query_places = torch.add(places, pads, alpha=-kv_len)  # (B, S)
    if q_len < kv_len:
        # The mask_mod captures tensors: an int would be compiled in, a kernel for every decoding step. And a copy,
        # since a cache counts its length up in place.
        q_offset = q_offset.clone() if isinstance(q_offset, Tensor) else torch.full((), q_offset, device=device)
        rows = torch.arange(q_len, device=device) + q_offset
        query_places = query_places.index_select(1, rows)  # (B, L)
        mask_mod = _shift_queries(mask_mod, q_offset, torch.full_like(q_offset, kv_len - 1))
    # A tile has an allowed pair where its last query >= its first key, and no other where its first query >= its last
    # key: these are (last, first) of the queries and (first, last) of the keys.
    queries = _block_ends(query_places, q_block, -1, last_first=True)
    keys = _block_ends(torch.add(places, pads, alpha=kv_len), kv_block, kv_len)
    blocks = max(queries.shape[3], keys.shape[3])
    dtype = torch.int8 if blocks < 2**7 else torch.int16 if blocks < 2**15 else torch.int32  # no wider than it need be
    numbers = torch.arange(1, blocks + 1, dtype=dtype, device=device)
    list_tiles = _opaque_list_tiles if torch.compiler.is_compiling() else _list_tiles
    counts, indices = list_tiles(queries, keys, numbers, False)
    # The backward pass goes through the queries of each key. Its kernels read a list that is not contiguous wrongly, so
    # these come from the comparison turned round, not from transposed tiles.
    q_counts, q_indices = list_tiles(keys, queries, numbers, True)
    return BlockMask(
        (q_len, kv_len),
        kv_num_blocks=counts[0],
        kv_indices=indices[0],
        full_kv_num_blocks=counts[1],
        full_kv_indices=indices[1],
        q_num_blocks=q_counts[0],
        q_indices=q_indices[0],
        full_q_num_blocks=q_counts[1],
        full_q_indices=q_indices[1],
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


def _block_ends(places: Tensor, block: int, outside: int, last_first: bool = False) -> Tensor:
    """The first and the last place in each block: (B, N) to (2, B, 1, blocks, 1); past N is `outside`."""
    if places.shape[1] % block:
        places = F.pad(places, (0, -places.shape[1] % block), value=outside)
    places = places.view(places.shape[0], 1, -1, block)
    ends = places.new_empty(2, *places.shape[:-1], 1)
    torch.aminmax(places, dim=-1, keepdim=True, out=(ends[int(last_first)], ends[int(not last_first)]))
    return ends


def _list_tiles(rows: Tensor, columns: Tensor, numbers: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """How many partial tiles each row has, and in which columns; then the same of the full tiles.

    Ends of blocks, (2, B, 1, rows, 1) and (2, B, 1, columns, 1), and the numbers from 1, to (2, B, 1, rows) and
    (2, B, 1, rows, columns). It costs launches more than work: few operations, both lists in each.
    """
    # (2, B, 1, rows, columns): a pair allowed, no other; int8, since cumsum would copy booleans
    tiles = rows.new_empty(*rows.shape[:-1], columns.shape[-2], dtype=torch.int8)
    (torch.le if transposed else torch.ge)(rows, columns.mT, out=tiles)
    some, full = tiles.unbind()
    some ^= full  # partial
    rank = tiles.cumsum(-1, dtype=numbers.dtype)
    del tiles, some, full
    # The k-th tile of a row is where its rank first reaches k; what is left of the row repeats the last one.
    count = rank.select(-1, -1)
    wanted = torch.minimum(numbers[: rank.shape[-1]], count.unsqueeze(-1))
    return count.int().contiguous(), torch.searchsorted(rank, wanted, out_int32=True)


# In a graph of the caller's, the compiler would lay the lists out as it likes, and flex read them as if contiguous:
# wrong results. What happens within an operator of its own the compiler does not see.
_opaque_list_tiles = torch.library.custom_op("causal_padded_flexattn::list_tiles", _list_tiles, mutates_args=())
_opaque_list_tiles.register_fake(_list_tiles)


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
        backend: "triton", "flash" (FlashAttention-4), or "auto": "flash" where it is installed, can be used and is
            faster, which it is for large inputs; never under `torch.use_deterministic_algorithms`.
        safe_padding: zero the padded rows first. Without it NaN or Inf there reach real rows: those of `value`
            the output (0 * NaN is NaN in a tile that is not all real), those of all three the gradients. It costs a
            copy of the three each way: 0.6 ms forward, 0.4 backward at B8 H16 S4096 D64 (bfloat16, H200, torch 2.11).

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
    # On the CPU flex takes nothing that requires a gradient, and what it compiles to fails to build at some shapes.
    if query.device.type == "cpu" and (compiling or any(x.requires_grad for x in (query, key, value))):
        return _masked_sdpa(query, key, value, _dense_mask(block_mask, query), scale)
    if backend == "auto":
        backend = "flash" if _is_faster_with_flash(query, key, value, block_mask) else "triton"
    flex: Any = flex_attention if compiling else _compiled_flex_attention(query.device.type)
    options, grouped = _kernel_options(query, key, block_mask, backend), query.shape[1] != key.shape[1]
    return flex(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=grouped, kernel_options=options)


@cache
def _compiled_flex_attention(device_type: str) -> Callable[..., Tensor]:
    _raise_recompile_limit()
    # On the CPU compiling takes 5 s and more for each shape: there torch traces it, and runs plain operators.
    return torch.compile(flex_attention) if device_type != "cpu" else torch.compile(flex_attention, backend="eager")


@cache
def _raise_recompile_limit() -> None:
    # After 8 kinds of input (head sizes, dtypes, lengths, with gradients or without, ...) torch would go on uncompiled,
    # with memory for every score. There is one limit for the whole process.
    torch.compiler.config.recompile_limit = max(64, torch.compiler.config.recompile_limit)


def _kernel_options(
    query: Tensor, key: Tensor, block_mask: BlockMask | None = None, backend: str = "triton"
) -> dict[str, Any] | None:
    if backend == "flash":
        return {"BACKEND": "FLASH"}
    rows = query.shape[2] * query.shape[1] // key.shape[1]
    if not query.is_cuda or query.shape[2] == 1 or rows <= 16:
        return None  # and torch takes its decoding kernel
    # Left to itself torch takes that for up to 127 queries, and has no configuration of it from 129 rows on.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    # Whether no tile reaches past the end. Torch 2.11 sees it only in lengths that are compiled in, and wrongly where
    # a block of the mask is larger than 128.
    blocks = (128, 128) if block_mask is None else block_mask.BLOCK_SIZE
    options["IS_DIVISIBLE"] = not any(
        x.shape[2] % 128 or x.shape[2] % block for x, block in zip((query, key), blocks, strict=True)
    )
    if query.shape[3] <= 64 and query.element_size() == 2:
        # The tiles that torch 2.11 takes on an H100 spill registers forward, and are slower backward.
        options |= {"fwd_BLOCK_N": 64, "bwd_num_warps": 4}
        options |= dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 64)
    return options


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
                "unsqueeze or transpose it"
            )
        if x.dtype != query.dtype:
            raise TypeError(f"query, key and value must share a dtype; got {query.dtype}, {name} {x.dtype}: cast it")
        if x.device != pads.device:
            raise ValueError(f"{name} is on {x.device}, pads on {pads.device}: move them to one device")
    (batch_size, q_heads, q_len, head_dim), (_, kv_heads, kv_len, _) = query.shape, key.shape
    masks, mask_heads, *mask_lengths = (1, 1, q_len, kv_len) if block_mask is None else block_mask.shape
    fits = masks in (1, batch_size) and mask_heads in (1, q_heads) and mask_lengths == [q_len, kv_len]
    for holds, rule in (
        (key.shape[:3] == value.shape[:3], "key and value must agree in batch, heads and length"),
        ((batch_size, head_dim) == (key.shape[0], key.shape[3]), "query and key must agree in batch and head size"),
        (q_heads % kv_heads == 0, "the heads of query must be a multiple of those of key and value"),
        (pads.shape == (batch_size, kv_len), "pads must have one flag for each key, also for those in a cache"),
        (q_len <= kv_len, "query must not be longer than key: the queries are the last tokens"),
        (fits, "block_mask must fit: build it with create_causal_padding_block_mask(pads, query.shape[2])"),
    ):
        if not holds:
            shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
            block_shape = f", block_mask {tuple(block_mask.shape)}" if block_mask is not None else ""
            raise ValueError(f"{rule}; got {shapes}, pads {tuple(pads.shape)}{block_shape}")
    if backend not in ("auto", "triton", "flash"):
        raise ValueError(f'backend must be "auto", "triton" or "flash"; got {backend!r}')
    if backend == "flash" and (obstacle := _flash_obstacle(query, key, value)):
        raise ValueError(f'backend="flash" {obstacle}; or pass backend="auto"')


def _flash_obstacle(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What keeps the FLASH kernel from being used, if anything; after the checks of flash_attn.cute.interface."""
    if not _HAS_FLASH:
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


_FLASH_FROM = 1e11  # B Hq L S E


def _is_faster_with_flash(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> bool:
    # Measured on an H100 and an H200 with torch 2.11, head sizes of 64 and 128: its kernels are faster, its launch
    # takes the host longer. What the padding leaves to compute cannot be asked without waiting for the device.
    return (
        query.numel() * key.shape[2] >= _FLASH_FROM
        and max(query.shape[3], value.shape[3]) <= 128
        and block_mask.BLOCK_SIZE == (128, 128)
        and not torch.are_deterministic_algorithms_enabled()
        and _flash_obstacle(query, key, value) is None
    )


def sequence_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, mesh: "DeviceMesh", **kwargs: Any
) -> Tensor:
    """`causal_padded_attention` over sequences that are shared out over the ranks of a mesh.

    Each rank gives its tokens and gets all tokens of some heads, attends, and gives them back: an all-to-all before
    and one after. The scheme of DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509. Gradients go the same way.

    Args:
        query: (B, Hq, S / ranks, E): this rank's tokens, in the order of the ranks.
        key: (B, Hkv, S / ranks, E).
        value: (B, Hkv, S / ranks, Ev).
        pads: (B, S), torch.bool, True where the token is padding: of the whole sequence, on every rank.
        mesh: of one dimension. Its ranks must divide Hq, and divide Hkv or be a multiple of it: then each head of key
            and value is sent to several ranks.
        kwargs: what `causal_padded_attention` takes. A block mask is that of the whole sequence.

    Returns:
        (B, Hq, S / ranks, Ev): the output for this rank's tokens.

    Raises:
        TypeError, ValueError: the mesh, the length or the heads do not fit, or what `causal_padded_attention` says.
    """
    from torch.distributed.tensor import DTensor, Shard

    ranks = mesh.size()
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension; got {mesh.ndim}: pass the one that shares out the sequence")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or x.shape[2] * ranks != pads.shape[-1]:
            raise ValueError(
                f"{name} must be this rank's part, (batch, heads, length of pads / {ranks} ranks, head size); "
                f"got {tuple(x.shape)}, pads {tuple(pads.shape)}: pad to a multiple of the ranks, padding is skipped"
            )
    q_heads, kv_heads = query.shape[1], key.shape[1]
    if q_heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"{ranks} ranks must divide the heads of query, and divide those of key or be a multiple of them; "
            f"got {q_heads} and {kv_heads}: use fewer ranks"
        )
    copies = max(1, ranks // kv_heads)
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)

    def exchange(x: Tensor, ours: int, wanted: int) -> Tensor:
        return DTensor.from_local(x, mesh, [Shard(ours)]).redistribute(mesh, [Shard(wanted)]).to_local()

    query, key, value = (exchange(x, 2, 1) for x in (query, key, value))  # (B, H / ranks, S, E)
    return exchange(causal_padded_attention(query, key, value, pads, **kwargs), 1, 2)


def _has_flash() -> bool:
    """Whether FlashAttention-4 is there, without importing it; version 2 is a package of the same name."""
    spec = importlib.util.find_spec("flash_attn")
    folders = (spec and spec.submodule_search_locations) or ()
    return any(Path(folder, "cute").is_dir() for folder in folders) and importlib.util.find_spec("cutlass") is not None


_HAS_FLASH = _has_flash()  # now, as torch.compile cannot find out when it traces


def transformers_block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskMod | None = None,
    attention_mask: Tensor | None = None,
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> BlockMask:
    """Build the block masks of Hugging Face transformers in closed form, where they are causal and padded.

    `AttentionMaskInterface.register("flex_attention", transformers_block_mask)` lets every model that was loaded with
    attn_implementation="flex_attention" use it. Padded queries then attend to nothing; transformers lets them see.

    Args:
        batch_size, q_length, kv_length: B, L and S.
        q_offset, kv_offset: positions of the first query and of the first key, as caches have them.
        mask_function: what transformers wants masked. For any but its causal_mask_function, or None, which means the
            same, transformers builds the mask as it does without us.
        attention_mask: (B, up to kv_offset + S), 0 or False where the token is padding; none is when None.
        device: where the mask is built when there is no attention_mask.
        kwargs: handed on with the rest where transformers builds the mask.

    Returns:
        A BlockMask of shape (B, 1, L, S).

    Raises:
        ImportError: transformers is not installed, or older than 5.
    """
    from transformers.masking_utils import causal_mask_function, flex_attention_mask

    if mask_function not in (None, causal_mask_function):
        sizes = batch_size, q_length, kv_length, q_offset, kv_offset
        return flex_attention_mask(*sizes, mask_function, attention_mask, device, **kwargs)  # type: ignore[arg-type]
    if attention_mask is None:
        pads = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        pads = attention_mask[:, kv_offset : kv_offset + kv_length] == 0
        pads = F.pad(pads, (0, kv_length - pads.shape[1]), value=True)  # what a static cache has room for
    return create_causal_padding_block_mask(pads, q_length, q_offset=q_offset - kv_offset)


def transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the "flex_attention" of Hugging Face transformers with the kernels that `causal_padded_attention` chooses.

    After `AttentionInterface.register("flex_attention", transformers_attention)`; with any mask. Left to itself, torch
    2.11 takes slow tiles for heads of 64, and none at all for some prompts below 128 tokens.

    Args:
        module, query, key, value, attention_mask, kwargs: what transformers hands to an attention; kernel_options in
            a call of the model go before those chosen here.

    Returns:
        The output, (B, L, Hq, Ev), and the logarithms of the softmax's sums, None on the CPU.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    _raise_recompile_limit()
    block_mask = attention_mask if isinstance(attention_mask, BlockMask) else None
    kwargs.setdefault("kernel_options", _kernel_options(query, key, block_mask))
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


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


_LARGEST_MASK = 2**32


def _masked_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    if mask.shape[2] * mask.shape[3] > _LARGEST_MASK:
        # Torch 2.11's efficient kernel reads more of it at the wrong place, https://github.com/pytorch/pytorch/issues/187227.
        halves = zip(query.chunk(2, dim=2), mask.chunk(2, dim=2), strict=True)
        return torch.cat([_masked_sdpa(rows, key, value, part, scale) for rows, part in halves], dim=2)
    # A softmax over no key is NaN unless a kernel looks out for it: let those rows see every key, and zero them and
    # their gradients after.
    empty = ~mask.any(-1, keepdim=True)  # (B, 1, L, 1)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(query, key, value, mask | empty, scale=scale).masked_fill(empty, 0.0)


# ---- the demonstration: python causal_padded_flexattn.py ------------------------------------------------------


def _draw_mask(path: Path, padding_side: str = "right") -> None:
    """With attention-gym, the mask of a sequence of 8 tokens, padded to 12."""
    import matplotlib

    matplotlib.use("Agg")  # no window, also where a display exists
    from attn_gym import visualize_attention_scores

    mask_mod = and_masks(causal, create_padding_mask(_pads([12, 8], 12, padding_side)))
    tokens = torch.ones(2, 1, 12, 8)  # (B, H, S, E); only the mask is drawn
    with contextlib.redirect_stdout(io.StringIO()):
        visualize_attention_scores(
            tokens, tokens, mask_mod=mask_mod, device="cpu", name="causal_padding_mask", path=path, batch_idx=1
        )


def _draw_tiles(path: Path) -> None:
    """What a BlockMask makes of right padding, of left padding and of holes."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tokens, length = 16 * 128, 11 * 128 - 50
    place = torch.arange(tokens)
    kinds = {
        "right padding": place >= length,
        "left padding": place < tokens - length,
        "holes": (place % 700 > 400) & (place < 1800),
    }
    names, shades = ["skipped", "partial: asks the mask_mod", "full"], ["white", "#fdae61", "#2c5985"]
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    for axes, (name, pads) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        block_mask = create_causal_padding_block_mask(pads[None])
        counts, indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        assert counts is not None and indices is not None
        tiles = block_mask.to_dense() + BlockMask.from_kv_blocks(counts, indices).to_dense()  # full ones count twice
        axes.pcolormesh(tiles[0, 0], cmap=ListedColormap(shades), vmin=0, vmax=2, edgecolor="0.7", linewidth=0.5)
        ticks = range(0, 17, 4)
        axes.set(title=name, xlabel="key block", ylabel="query block", aspect="equal", xticks=ticks, yticks=ticks)
        axes.invert_yaxis()
    patches = [Patch(facecolor=shade, edgecolor="0.7", label=name) for name, shade in zip(names, shades, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def _pads(lengths: Sequence[int], max_seq_len: int, padding_side: str, device: str | torch.device = "cpu") -> Tensor:
    """(B, max_seq_len): True where a sequence of that length, padded on that side, holds padding."""
    positions = torch.arange(max_seq_len, device=device)
    length = torch.tensor(lengths, device=device)[:, None]
    return positions >= length if padding_side == "right" else positions < max_seq_len - length


def _same_block_mask(ours: BlockMask, theirs: BlockMask) -> bool:
    same = True
    for name in ("kv", "full_kv", "q", "full_q"):
        (counts, indices), (their_counts, their_indices) = (
            (getattr(x, f"{name}_num_blocks"), getattr(x, f"{name}_indices")) for x in (ours, theirs)
        )
        listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
        same &= torch.equal(counts, their_counts) and torch.equal(indices[listed], their_indices[listed])
    return same


_RESULTS = ("output", "query gradient", "key gradient", "value gradient")


def _attend(attention: Callable[..., Any], inputs: Sequence[Tensor], grad_output: Tensor | None) -> list[Tensor]:
    """The output and, given its gradient, the gradients of the inputs."""
    inputs = [x.detach().requires_grad_(grad_output is not None) for x in inputs]
    output = attention(*inputs)
    return [output] if grad_output is None else [output, *torch.autograd.grad(output, inputs, grad_output)]


def _wall_ms(run: Callable[[], object]) -> float:
    from torch.utils.benchmark import Timer  # warms up, waits for the device, and takes the median of many

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.3).median * 1e3


def _device_ms(run: Callable[[], object]) -> float:
    # Device events, warm-up, and a cold L2 cache before each run.
    from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

    return do_bench(run, return_mode="median")


def _peak_mib(run: Callable[[], object]) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _compare_with_one_rank(
    say: Callable[[str, str], None], inputs: Sequence[Tensor], grad: Tensor, pads: Tensor
) -> bool:
    """--sequence-parallel: every rank has the whole batch, and attends to its part of it and to all of it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("nccl" if pads.is_cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def part_of(x: Tensor) -> Tensor:
        return x.chunk(ranks, dim=2)[rank].contiguous()

    mesh = init_device_mesh(pads.device.type, (ranks,))
    shared = partial(sequence_parallel_attention, pads=pads, mesh=mesh)
    ways = {
        f"{ranks} ranks": partial(_attend, shared, [*map(part_of, inputs)], part_of(grad)),
        "one rank": partial(_attend, partial(causal_padded_attention, pads=pads), inputs, grad),
    }
    if pads.is_cuda:
        say("compile", "flex_attention, for part of the heads and for all of them ...")
    same = True
    say("check", "largest difference from one rank, and two roundings:")
    for name, part, whole in zip(_RESULTS, *(run() for run in ways.values()), strict=True):
        error = (part - part_of(whole)).abs().max()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        bound = 2 * torch.finfo(part.dtype).eps * whole.abs().max().item()
        say("", f"{name:<16}{error.item():.1e}   {bound:.1e}")
        same &= error.item() <= bound
    say("time", "forward and backward, medians of 10 ...")
    for name, run in ways.items():
        seconds = []
        for _ in range(10):  # the same number on every rank
            dist.barrier()
            start = time.perf_counter()
            run()
            if pads.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        memory = f", {_peak_mib(run):.0f} MiB at its peak" if pads.is_cuda else ""
        say("", f"{name:<16}{statistics.median(seconds) * 1e3:.2f} ms{memory}")
    dist.destroy_process_group()
    return same


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
        epilog="Sizes left out: B8 H16 S4096 D64 in bfloat16 on CUDA, B4 H4 S512 D64 in float32 on the CPU.",
    )
    add = parser.add_argument
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto, the default, is cuda if there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"])
    add("--batch-size", type=_count, metavar="B")
    add("--heads", type=_count, metavar="H", help="of query")
    add("--kv-heads", type=_count, metavar="H", help="of key and value: as many as of query if left out")
    add("--max-seq-len", type=_count, metavar="S", help="tokens of a padded sequence")
    add("--head-dim", type=_count, metavar="D", default=64)
    add("--lengths", type=lambda text: [*map(_count, text.split(","))], metavar="N,N,...", help="random if left out")
    add("--padding-side", choices=["right", "left"], default="right", help="default: right")
    add("--seed", type=int, default=0, help="of the lengths and the numbers; default: 0")
    add("--output", type=Path, metavar="PATH", default="causal_padding_mask.png", help="default: %(default)s")
    add("--figure", choices=["tokens", "tiles"], default="tokens", help="scores of one sequence, or tiles of several")
    add("--no-figure", action="store_true")
    add("--sequence-parallel", action="store_true", help="under torchrun: compare several ranks with one")
    args = parser.parse_args(argv)

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: pass --device cpu, or install a CUDA build of torch")
    ranks = int(os.environ.get("WORLD_SIZE", 0))  # torchrun says it
    if args.sequence_parallel and not ranks:
        parser.error("run --sequence-parallel under torchrun --nproc-per-node N")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.lengths and args.batch_size not in (None, len(args.lengths)):
        parser.error(f"--lengths has {len(args.lengths)} sequences: leave --batch-size {args.batch_size} out")
    sizes = ("bfloat16", 8, 16, 4096) if args.device == "cuda" else ("float32", 4, 4, 512)
    dtype, batch_size, heads, max_seq_len = sizes
    args.dtype, args.heads = args.dtype or dtype, args.heads or heads
    args.kv_heads, args.max_seq_len = args.kv_heads or args.heads, args.max_seq_len or max_seq_len
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    torch.manual_seed(args.seed)
    if not args.lengths:
        shortest = max(1, args.max_seq_len // 8)
        args.lengths = torch.randint(shortest, args.max_seq_len + 1, (args.batch_size or batch_size,)).tolist()
    if args.sequence_parallel and (args.max_seq_len % ranks or args.heads % ranks or args.kv_heads % ranks):
        parser.error(f"{ranks} ranks must divide --max-seq-len, --heads and --kv-heads: use fewer")
    if max(args.lengths) > args.max_seq_len:
        parser.error(f"--lengths has {max(args.lengths)} tokens: raise --max-seq-len {args.max_seq_len}")
    if args.output.suffix != ".png" or not args.output.parent.is_dir():
        parser.error(f"--output must be a .png file in a folder that exists; got {args.output}")
    if not (args.no_figure or args.sequence_parallel):
        if not os.access(args.output if args.output.exists() else args.output.parent, os.W_OK):
            parser.error(f"--output {args.output} cannot be written: name another, or pass --no-figure")
        try:
            importlib.import_module("matplotlib")
            importlib.import_module("attn_gym")
        except Exception as error:  # not only ImportError: a broken installation can raise anything
            parser.error(
                f"the figure needs attn_gym and matplotlib ({type(error).__name__}: {error}): "
                "pip install attn-gym matplotlib, or pass --no-figure"
            )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; --help lists its options.

    Args:
        argv: the arguments of the command line; those of the process when None.

    Returns:
        The exit status: 0 when the checks hold, 1 when they do not, 2 without a compiler, 130 when interrupted.
        Unusable arguments exit with 2.
    """
    args = _parse(argv)
    try:
        return _demonstrate(args)
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        print("torch.compile found no C++ compiler: install g++, or name another in CXX", file=sys.stderr)
        return 2


def _demonstrate(args: argparse.Namespace) -> int:
    # On the CPU, one kernel does not repay precompiling C++ headers; torch reads this when it first compiles.
    os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    # That a CUDA toolkit is there, but no card, is nothing to act on.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    device, dtype, on_cuda = torch.device(args.device), getattr(torch, args.dtype), args.device == "cuda"
    if args.sequence_parallel and on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    speaks = not args.sequence_parallel or os.environ["RANK"] == "0"
    batch_size, max_seq_len = len(args.lengths), args.max_seq_len
    pads = _pads(args.lengths, max_seq_len, args.padding_side, device)  # (B, S)
    query, key, value, grad_output = (
        torch.randn(batch_size, heads, max_seq_len, args.head_dim, device=device, dtype=dtype)
        for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    )
    inputs, grad = (query, key, value), grad_output if on_cuda else None

    def say(label: str, text: str) -> None:
        if speaks:
            print(f"{label:<12}{text}", flush=True)

    say("device", f"{torch.cuda.get_device_name() if on_cuda else 'CPU'}, torch {torch.__version__}, {args.dtype}")
    if not on_cuda and not args.sequence_parallel:
        say("", "forward only: FlexAttention has no backward on the CPU")
    heads = f"{args.heads} query and {args.kv_heads} key heads of {args.head_dim}"
    padding = f"{pads.float().mean():.0%} of it padding on the {args.padding_side}"
    say("batch", f"{batch_size} x {max_seq_len} tokens, {padding}; {heads}")

    if args.sequence_parallel:
        return int(not _compare_with_one_rank(say, inputs, grad_output, pads))

    say("block mask", "building ...")
    mask_mod = and_masks(causal, create_padding_mask(pads))
    ways: dict[str, Callable[[], BlockMask]] = {
        "create_block_mask": partial(create_block_mask, mask_mod, batch_size, None, max_seq_len, max_seq_len, device),
        "closed form": partial(create_causal_padding_block_mask, pads),
    }
    block_mask, closed = (build() for build in ways.values())
    wrong = [] if _same_block_mask(closed, block_mask) else ["the block masks"]
    full, partly = (int(x.sum()) for x in (closed.full_kv_num_blocks, closed.kv_num_blocks) if x is not None)
    tiles = closed.kv_indices.numel()
    say("", f"{tiles} tiles of 128 x 128: {full} full, {partly} partial, {tiles - full - partly} skipped")
    for name, build in ways.items():
        memory = f", {_peak_mib(build):.1f} MiB at its peak" if on_cuda else ""
        say("", f"{name:<20}{_wall_ms(build):.2f} ms{memory}")
    say("", "not the same" if wrong else "the same, both ways")

    say("compile", f"flex_attention, forward{' and backward' if on_cuda else ''} ...")
    options, grouped = _kernel_options(query, key, block_mask), args.heads != args.kv_heads
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    flex = partial(compiled, block_mask=block_mask, enable_gqa=grouped, kernel_options=options)
    sdpa = partial(sdpa_reference, pads=pads)
    start = time.perf_counter()
    results = _attend(flex, inputs, grad)
    if on_cuda:
        torch.cuda.synchronize()
    say("", f"{time.perf_counter() - start:.1f} s")

    say("check", "largest error against SDPA in higher precision, SDPA's own, and the bound:")
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    rows = zip(*(x.to(wide).split(1) for x in (*inputs, grad_output)), pads.split(1), strict=True)
    # One sequence at a time, since float64 has no kernel that saves memory.
    exact = [
        _attend(partial(sdpa_reference, pads=pad), row, row_grad if on_cuda else None) for *row, row_grad, pad in rows
    ]
    for name, ours, own, *truth in zip(_RESULTS, results, _attend(sdpa, inputs, grad), *exact, strict=False):
        error, own_error = ((x - torch.cat(truth)).abs().max().item() for x in (ours, own))
        # FlashAttention's habit: twice plain PyTorch's error, thrice for gradients, and two roundings. And 16 of
        # float32, in which a weight is 2 to the power of a difference of numbers of up to 10 or 20.
        rounding = (2 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * own.abs().max().item()
        bound = (2 if name == "output" else 3) * own_error + rounding
        say("", f"{name:<16}{error:.1e}   {own_error:.1e}   {bound:.1e}")
        if not error <= bound:
            wrong.append(name)

    say("time", "medians ...")
    for name, passes in [("forward", None)] + ([("with backward", grad)] if on_cuda else []):
        measure = _device_ms if on_cuda else _wall_ms
        ours_ms, own_ms = (measure(partial(_attend, attention, inputs, passes)) for attention in (flex, sdpa))
        times = f"flex {ours_ms:.2f} ms, SDPA with the explicit mask {own_ms:.2f} ms"
        say("", f"{name:<16}{times}: {own_ms / ours_ms:.1f} x")

    if not args.no_figure:
        if args.figure == "tokens":
            _draw_mask(args.output, args.padding_side)
        else:
            _draw_tiles(args.output)
        say("figure", str(args.output))
    if wrong:
        print(f"FlexAttention and what it was checked against differ: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
