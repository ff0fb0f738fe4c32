# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "attn-gym>=0.0.3", "matplotlib"]
# ///
"""Causal attention over a padded batch with PyTorch's FlexAttention, https://arxiv.org/abs/2412.05496.

A `BlockMask` lets the kernel skip every 128 x 128 tile of scores in which padding or causality allow nothing.
Import this file, or paste its parts 1 to 3, which need torch alone. As a script it checks itself against
`scaled_dot_product_attention`, times both, and draws the mask.

Shapes, as in torch.nn.functional.scaled_dot_product_attention: B batch, Hq query heads, Hkv key/value heads,
L query length, S key length (max_seq_len), E head size of query and key, Ev head size of value.
"""

import importlib.metadata
import inspect
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_mask, flex_attention

# ---- 1. What may attend to what ---------------------------------------------------------------------------


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """mask_mod: a query sees the keys up to its own position.

    Args:
        b, h, q_idx, kv_idx: integer tensors: batch element, head, position of the query, position of the key.

    Returns:
        A boolean tensor, True where the score is computed.
    """
    return q_idx >= kv_idx


def create_padding_mask(pads: Tensor) -> Callable[..., Tensor]:
    """Make the mask_mod that computes a score only where neither the query nor the key is padding.

    After the padding question of attention-gym, https://github.com/meta-pytorch/attention-gym/issues/38.

    Args:
        pads: (B, max_seq_len), torch.bool, True where the token is padding. The mask_mod reads it when
            attention runs, so leave it unchanged until then.

    Returns:
        The mask_mod.

    Raises:
        TypeError, ValueError: `pads` is not torch.bool, not two-dimensional, or empty.
    """
    _check_tensors(pads=pads)

    def padding(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~pads[b, q_idx] & ~pads[b, kv_idx]

    return padding


def _check_tensors(**tensors: Any) -> None:
    """Against their shapes and each other. No check in this file waits for the device."""
    sizes: dict[str, int] = {}
    for name, x in tensors.items():
        plain = isinstance(x, Tensor) and not hasattr(x, "to_local")
        _require(plain, f"{name} must be a plain tensor (x.to_local() of a DTensor)", TypeError, type=type(x))
        kind, right = "torch.bool, True where padding: attention_mask == 0", x.dtype == torch.bool
        if name == "documents":
            kind, right = "integers", not (x.is_floating_point() or x.dtype == torch.bool)
        elif name in ("query", "key", "value"):
            kind, right = "of one dtype with query: cast it", x.dtype == tensors["query"].dtype
        _require(right, f"{name} must be {kind}", TypeError, **tensors)
        letters, shape = _SHAPES.get(name, "B, S"), x.shape
        fits = len(shape) == letters.count(",") + 1 and 0 not in shape
        for letter, size in zip(letters.split(", "), shape, strict=False):
            fits = fits and sizes.setdefault(letter, size) == size
        _require(fits, f"{name} must be ({letters}), not 0, and agree with the others", **tensors)
        here = x.device == tensors["pads"].device
        _require(here, f"{name} must be on the device of pads: move it", **tensors)


_SHAPES = {"query": "B, Hq, L, E", "key": "B, Hkv, S, E", "value": "B, Hkv, S, Ev", "query_pads": "B, L"}


def _require(holds: bool, rule: str, error: Any = ValueError, /, **got: Any) -> None:
    if not holds:  # only now are values formatted
        show = [(name, x) for name, x in got.items() if x is not None]
        show = [(n, (*x.shape, x.dtype, str(x.device)) if isinstance(x, Tensor) else x) for n, x in show]
        raise error(f"{rule}; got {', '.join(f'{name} {x!r}' for name, x in show)}")


# ---- 2. The block mask ------------------------------------------------------------------------------------


def create_causal_padding_block_mask(
    pads: Tensor, q_len: int | None = None, *, q_offset: int | Tensor | None = None, causal: bool = True,
    window: int | None = None, documents: Tensor | None = None, query_pads: Tensor | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:  # fmt: skip
    """Build in closed form the BlockMask that `create_block_mask` finds by evaluating every score.

    Every query sees one run of keys, from `first` to `last`, less the padding; neither falls from one query
    to the next. So the ends of its two blocks say whether a tile has an allowed pair, and whether another.
    Eight tokens, of which five are real (x where allowed), causal, in blocks of two:

        key    0 1   2 3   4 -   - -      last real key of each block: 1, 3, 4, none; first: 0, 2, 4, none
      query 0  x
            1  x x                        last: 0 to 1     partial   skipped   skipped   skipped
            2  x x   x
            3  x x   x x                  last: 2 to 3     full      partial   skipped   skipped
            4  x x   x x   x
            -                             last: none to 4  partial   partial   partial   skipped

    The third row: 4, its largest last, reaches the first key of three blocks, so each has an allowed pair;
    its smallest, none, reaches the last key of no block, so none is full. The fourth row has no real query.

    Build it once for a batch, or for each kind of layer, and hand it to all layers. Nothing here waits for
    the device or compiles, and it takes memory for the tokens and the tiles, not for the scores.

    Args:
        pads: (B, S), torch.bool, True where the key is padding, as a cache is where it is not written yet.
            Attention reads it again: leave it unchanged until the backward pass is done.
        q_len: L, the number of queries; all that fit when None.
        q_offset: place of the first query among the keys; S - L when None: the queries are the last tokens.
            A 0-d integer tensor needs q_len, and is not checked: that would wait for the device.
        causal: whether a query sees only the keys up to its own position.
        window: how many keys back a query sees, itself included; without causality, as many ahead too.
        documents: (B, S), integers that never fall along the real tokens: a token sees its own document.
        query_pads: (B, L), torch.bool, True where padding: queries that are other tokens than the keys
            (cross-attention). Only with causal=False, and no q_offset, window or documents.
        BLOCK_SIZE: tokens in a block, or (in a query block, in a key block).

    Returns:
        A BlockMask of shape (B, 1, L, S), for any number of heads. Under torch.no_grad, for up to 16
        queries, it has one list of tiles, which decoding is faster with, and serves no backward pass.

    Raises:
        TypeError, ValueError: an argument does not fit, with what would.
    """
    q_block, kv_block = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    _require(min(q_block, kv_block) >= 1, "BLOCK_SIZE must be at least 1", BLOCK_SIZE=BLOCK_SIZE)
    q_len, q_offset = _find_queries(pads, q_len, q_offset, causal, window, documents, query_pads)
    kv_len, device = pads.shape[1], pads.device
    numbers = torch.arange(max(q_len, kv_len) + 1, dtype=torch.int32, device=device)
    places = numbers[:kv_len]
    rows: Any
    if isinstance(q_offset, Tensor):
        rows = positions = q_offset.reshape(1) if q_len == 1 else places[:q_len] + q_offset
        q_pads = pads.index_select(1, rows)
    else:
        rows = slice(q_offset, q_offset + q_len)
        positions, q_pads = places[rows], pads[:, rows] if query_pads is None else query_pads

    # The run of keys that each query sees: (L,) or (B, L).
    first, last = None, positions if causal else places[-1]
    if window is not None:
        reach = min(window, kv_len) - 1
        first, last = positions - reach, positions if causal else positions + reach
    if documents is not None:
        # A padded token belongs to the document before it: then none falls.
        names = documents.masked_fill(pads, torch.iinfo(documents.dtype).min).cummax(1).values
        wanted = names[:, rows].contiguous()
        start = torch.searchsorted(names, wanted, out_int32=True)
        first = start if first is None else torch.maximum(start, first)
        if not causal:
            end = torch.searchsorted(names, wanted, right=True, out_int32=True) - 1
            last = end if window is None else torch.minimum(end, last)

    # Padding is moved out of reach: a padded query's run begins behind all keys and ends before them.
    far = 2 * kv_len
    few = q_len <= min(_FEW, q_block) and not torch.is_grad_enabled()
    # One block, however short; but flex on the CPU, and kernels for whole sequences, ask for all its rows.
    of_queries = q_len if few and pads.is_cuda and q_len < kv_len else q_block
    last, lasts = _blocks(torch.add(last, q_pads, alpha=-far), of_queries, -1, few)  # largest, smallest
    # The first real key of each block, and the last key, far off if any of the block is padding.
    _, keys = _blocks(torch.add(places, pads, alpha=far), kv_block, far, few)
    q_ends, kv_ends = [lasts], [keys]
    if first is not None:
        first, firsts = _blocks(torch.add(first, q_pads, alpha=far), of_queries, far, few)
        _, real = _blocks(torch.add(places, pads, alpha=-far), kv_block, -1, few)
        real = real if few else torch.stack((real[0], keys[0]))  # the last real key, and the first key
        q_ends, kv_ends = [lasts, firsts], [keys, real]

    most = max(lasts.shape[-2], keys.shape[-2])  # tiles in a row or a column, numbered no wider than need be
    dtype = torch.int32 if few or most >= 2**15 else torch.int16 if most >= 2**7 else torch.int8
    numbers = numbers[1 : most + 1].to(dtype)
    # The backward pass goes through the queries of each key. Its kernels read a list that is not contiguous
    # wrongly, so these come from the comparison turned round, not from transposed tiles.
    if few:  # the decoding kernel shares out the tiles of one list evenly, and has no backward pass
        lists: Any = [*_list_tiles(q_ends, kv_ends, numbers, False), *[None] * 6]
    else:
        both = _list_tiles(q_ends, kv_ends, numbers, False), _list_tiles(kv_ends, q_ends, numbers, True)
        lists = [x for counts, indices in both for i in range(2) for x in (counts[i], indices[i])]

    # These capture tensors: an int would be compiled in, a kernel for every decoding step.
    def up_to_last(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= last[b, q_idx]) & ~pads[b, kv_idx]

    def from_first_to_last(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx >= first[b, q_idx]) & (kv_idx <= last[b, q_idx]) & ~pads[b, kv_idx]  # type: ignore

    mask_mod = up_to_last if first is None else from_first_to_last
    tiles: Any = (*lists, (q_block, kv_block), mask_mod)
    return BlockMask((q_len, kv_len), *tiles)


def _find_queries(
    pads: Tensor, q_len: Any, q_offset: Any, causal: bool, window: Any, documents: Any, query_pads: Any
) -> tuple[int, Any]:
    """How many queries there are, and from which place on; or what does not fit."""
    more = {"documents": documents, "query_pads": query_pads}
    _check_tensors(pads=pads, **{name: x for name, x in more.items() if x is not None})
    kv_len, got = pads.shape[1], {"q_len": q_len, "q_offset": q_offset, "pads": pads}
    if window is not None:
        _require(type(window) is int, "window must be an int, or None for all keys", TypeError, window=window)
        _require(window >= 1, "window must be at least 1, a query's own key", window=window)
    if query_pads is not None:
        alone = not causal and window is documents is q_offset is None
        alone = alone and q_len in (None, query_pads.shape[1])
        rule = "query_pads is of other tokens than keys: only causal=False, no window, documents, q_offset"
        _require(alone, rule, causal=causal, window=window, documents=documents, **got, query_pads=query_pads)
        return query_pads.shape[1], 0
    if isinstance(q_offset, Tensor):
        scalar = q_offset.dim() == 0 and not q_offset.is_floating_point() and q_offset.device == pads.device
        _require(scalar, "q_offset must be an int or a 0-d integer tensor beside pads", TypeError, **got)
        _require(q_len is not None, "q_len must be given beside a tensor q_offset, which is not read", **got)
        fits = 1 <= q_len <= kv_len
    else:
        q_len = kv_len - (q_offset or 0) if q_len is None else q_len
        known = causal or q_offset is not None or q_len == kv_len
        _require(known, "without causality, q_offset or query_pads must say what the queries are", **got)
        q_offset = kv_len - q_len if q_offset is None else q_offset
        fits = 0 <= q_offset < q_offset + q_len <= kv_len
    _require(fits, "the queries must lie among the keys; pads covers a preallocated cache whole", **got)
    return q_len, q_offset


def _blocks(places: Tensor, block: int, outside: int, few: bool) -> tuple[Tensor, Tensor]:
    """The places, the last block filled up with `outside`; and the ends of each block: (2, B, 1, blocks, 1).

    The end that `outside` is not comes first: the largest where it is -1, else the smallest. If few, that one
    alone: (B, 1, blocks, 1).
    """
    if places.shape[1] % block:
        places = _fill(places, -places.shape[1] % block, outside)
    in_blocks = places.view(places.shape[0], 1, -1, block)
    if block == 1:
        return places, in_blocks if few else in_blocks.expand(2, -1, -1, -1, -1)
    if few:
        return places, (in_blocks.amax if outside < 0 else in_blocks.amin)(-1, keepdim=True)
    ends = places.new_empty(2, *in_blocks.shape[:-1], 1)
    torch.aminmax(in_blocks, dim=-1, keepdim=True, out=ends.unbind()[:: -1 if outside < 0 else 1])
    return places, ends


def _opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """In a graph of the caller's, an operator that the compiler does not see into.

    It would lay the lists out as it likes, and flex read them as if contiguous: wrong results; and torch 2.11
    compiles no mask_mod that looks up in what was filled up there.
    """
    operator = torch.library.custom_op(f"causal_padded::{function.__name__}", function, mutates_args=())
    operator.register_fake(function)
    return lambda *x: operator(*x) if torch.compiler.is_compiling() else function(*x)


@_opaque
def _fill(places: Tensor, missing: int, value: int) -> Tensor:
    return F.pad(places, (0, missing), value=value)


@_opaque
def _list_tiles(
    rows: list[Tensor], columns: list[Tensor], numbers: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """How many tiles of a row are partial, and full, (2, B, 1, rows), or if few either, (B, 1, rows); which.

    Some pair is allowed where the largest last >= the first real key, and the smallest first <= the last real
    key; no other where the smallest last >= the last key, and the largest first <= the first key.
    """
    # It costs launches more than work: few operations, both lists in each. int8, as cumsum copies booleans.
    compare = (torch.le, torch.ge) if transposed else (torch.ge, torch.le)
    tiles = compare[0](rows[0], columns[0].mT).view(torch.int8)
    if len(rows) > 1:
        tiles &= compare[1](rows[1], columns[1].mT)
    if tiles.dim() == 5:
        tiles[0] ^= tiles[1]  # partial: some, and not all
    rank = tiles.cumsum(-1, dtype=numbers.dtype)
    del tiles
    # The k-th tile of a row is where its rank first reaches k; what is left of the row repeats the last one.
    count = rank.select(-1, -1)
    wanted = torch.minimum(numbers[: rank.shape[-1]], count.unsqueeze(-1))
    return count.int().contiguous(), torch.searchsorted(rank, wanted, out_int32=True)


# ---- 3. Attention -----------------------------------------------------------------------------------------


def causal_padded_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *, block_mask: BlockMask | None = None,
    causal: bool = True, window: int | None = None, documents: Tensor | None = None,
    query_pads: Tensor | None = None, scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None, return_lse: bool = False, backend: str = "auto",
    safe_padding: bool = False,
) -> Any:  # fmt: skip
    """Attention over a padded batch by FlexAttention: softmax(scale query keyᵀ) value where allowed.

    Fewer queries than keys are the last tokens, unless the block mask says otherwise. The CPU runs plain
    operators, with memory for every score.

    Args:
        query: (B, Hq, L, E); a transposed view of (B, L, Hq, E) needs no copy, here and below.
        key: (B, Hkv, S, E); query head i reads key head i // (Hq // Hkv).
        value: (B, Hkv, S, Ev).
        pads: (B, S), torch.bool, True where the key is padding.
        block_mask: what `create_causal_padding_block_mask` made of the same `pads`, to be shared by layers;
            made here when None. It then decides what is seen, also over `causal`.
        causal, window, documents: what a query sees, as in `create_causal_padding_block_mask`.
        query_pads: (B, L), torch.bool, True where padding: queries that are other tokens than the keys.
            Beside a block mask made with it, only safe_padding needs it.
        scale: factor of the scores before the softmax; 1 / sqrt(E) when None.
        score_mod: flex's, from score, b, h, q_idx, kv_idx to the score that is used. q_idx counts the
            queries given here. On the CPU the five are tensors that broadcast.
        return_lse: whether to return the logarithms of the softmax's sums too.
        backend: "triton", "flash" (FlashAttention-4, without score_mod and return_lse), or "auto": "flash"
            where it can be used and is faster, for large inputs; never for deterministic algorithms.
        safe_padding: zero padded rows first, for a copy of value, and of query and key where gradients are
            enabled. Without it NaN or Inf there reach real rows: in `value` the output (0 * NaN is NaN), in
            all three the gradients.

    Returns:
        (B, Hq, L, Ev); padded query rows are exact zeros, as gradients in padded rows are. With return_lse,
        also (B, Hq, L) in float32: the natural logarithm of the sum of the exponentials, -inf in padded rows.

    Raises:
        TypeError, ValueError: inputs that do not fit together, each with what to do.
    """
    query, key, value = _cast_for_autocast(query, key, value)
    _check_inputs(query, key, value, pads, block_mask, score_mod)
    known = backend in ("auto", "triton", "flash")
    _require(known, 'backend must be "auto", "triton" or "flash"', backend=backend)
    obstacle = _flash_obstacle(query, key, value, score_mod, return_lse) if backend == "flash" else None
    _require(obstacle is None, f'backend="flash" needs {obstacle}: pass "auto"', query=query, value=value)
    if block_mask is None:
        seen: Any = {"causal": causal, "window": window, "documents": documents, "query_pads": query_pads}
        block_mask = create_causal_padding_block_mask(pads, query.shape[2], **seen)
    else:
        rule = "window and documents must be in the block_mask: make it with them"
        _require(window is documents is None, rule, window=window, documents=documents)
    if safe_padding:
        value = _zero(value, pads)
        if torch.is_grad_enabled():  # padded rows of query and key reach nothing but gradients
            if query_pads is None:
                all_queries = query.shape[2] == key.shape[2]
                query_pads = pads if all_queries else ~_dense_mask(block_mask, query).any(-1)[:, 0]  # (B, L)
            query, key = _zero(query, query_pads), _zero(key, pads)
    return _attend(query, key, value, block_mask, scale, score_mod, return_lse, backend)


def _zero(x: Tensor, rows: Tensor) -> Tensor:  # in one pass, where masked_fill takes two
    return torch.where(rows[:, None, :, None], 0.0, x)


def _cast_for_autocast(*tensors: Tensor) -> Any:  # as SDPA does
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return tensors if dtype is None else [x.to(dtype) for x in tensors]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: Any, score_mod: Any, return_lse: bool,
    backend: str = "auto",
) -> Any:  # fmt: skip
    if query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return _attend_on_the_cpu(query, key, value, block_mask, scale, score_mod, return_lse)
    if backend == "auto":
        faster = _is_faster_with_flash(query, key, block_mask)
        usable = faster and _flash_obstacle(query, key, value, score_mod, return_lse) is None
        backend = "flash" if usable else "triton"
    options = _kernel_options(query, key, value, block_mask, backend)
    if torch.compiler.is_compiling():
        return _flex_attention(query, key, value, score_mod, block_mask, scale, options, return_lse)
    batch_size = query.shape[0]
    if options["BACKEND"] != "TRITON_DECODE" or _part_of(batch_size) == batch_size:
        return _run_compiled(query, key, value, score_mod, block_mask, scale, options, return_lse)
    results, start = [], 0
    while start < batch_size:
        rows = slice(start, start + _part_of(batch_size - start))
        q, k, v = query[rows], key[rows], value[rows]
        mods = _select(score_mod, block_mask, rows, torch.full((), start, device=query.device))
        options = _kernel_options(q, k, v, block_mask)
        results.append(_run_compiled(q, k, v, *mods, scale, options, return_lse))
        start = rows.stop
    return tuple(map(torch.cat, zip(*results, strict=True))) if return_lse else torch.cat(results)


def _part_of(batch_size: int) -> int:
    """The decoding kernel is compiled for a batch size. Let there be few: 1 to 16, and powers of two.

    And not too large: a CUDA grid holds 65535 sequences times key heads.
    """
    return batch_size if batch_size <= 16 else min(512, 1 << batch_size.bit_length() - 1)


def _select(score_mod: Any, block_mask: Any, rows: slice, start: Tensor) -> tuple[Any, Any]:
    """The score_mod and the block mask of some sequences of a batch."""
    part, score, mask_mod = None, None, None if block_mask is None else block_mask.mask_mod
    if score_mod is not None:
        score = lambda s, b, h, q_idx, kv_idx: score_mod(s, b + start, h, q_idx, kv_idx)  # noqa: E731
    if mask_mod is not None:
        part = block_mask[rows]
        part.mask_mod = lambda b, h, q_idx, kv_idx: mask_mod(b + start, h, q_idx, kv_idx)
    return score, part


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Any, block_mask: Any, scale: Any, options: Any,
    return_lse: bool,
) -> Any:  # fmt: skip
    # What a loop counts is compiled in, here the heads, and the batch where the decoding kernel needs it.
    static = [query.shape[1], key.shape[1]] + [query.shape[0]] * (options["BACKEND"] == "TRITON_DECODE")
    for size in static:
        for _ in range(size):
            pass
    aux = AuxRequest(lse=True) if return_lse else None
    gqa = query.shape[1] != key.shape[1]
    result: Any = flex_attention(
        query, key, value, score_mod, block_mask, scale, gqa, kernel_options=options, return_aux=aux
    )
    return (result[0], result[1].lse) if return_lse else result


def _run_compiled(*args: Any) -> Any:
    try:
        # Compiling flex runs autograd. Were that in the device's thread, it might wait there for another
        # thread's first backward pass, which waits for the compiler.
        with torch.autograd.set_multithreading_enabled(False):
            return _compiled_flex_attention()(*args)
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":  # which has no public name
            raise
        rule = f"{_KINDS} kinds of input are compiled, the limit: use fewer head sizes, dtypes, batch sizes"
        raise RuntimeError(f"{rule} to decode, score_mods; or call torch.compiler.reset()") from error


@cache
def _compiled_flex_attention() -> Any:
    # After 8 kinds of input (head sizes, dtypes, lengths, with gradients or without, ...) torch would go on
    # uncompiled, with memory for every score: allow more, and have it raise there. One thread at a time:
    # torch breaks where two import what it compiles with.
    with _LOCK:
        # Torch would time ways to add up what decoding splits, and at times take one that is thrice as slow.
        options = {"deterministic": True, "max_autotune": False}
        how: Any = {"fullgraph": True, "options": options}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            how["recompile_limit"] = _KINDS
        else:  # torch 2.11
            torch.compiler.config.recompile_limit = max(_KINDS, torch.compiler.config.recompile_limit)
        return torch.compile(_flex_attention, **how)


_KINDS = 64
_LOCK = threading.Lock()
_FEW = 16  # queries


def _attend_on_the_cpu(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: Any, score_mod: Any, return_lse: bool
) -> Any:
    """In plain operators: flex has no gradients there, and what it compiles to may fail to build."""
    wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    key, value = (x.to(wide).repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.to(wide) @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)  # (B, Hq, L, S)
    if score_mod is not None:
        places = [torch.arange(n).view([-1] + [1] * (3 - i)) for i, n in enumerate(scores.shape)]
        shape, scores = scores.shape, score_mod(scores, *places).to(wide)
        rule = "score_mod must give a score for each: look up bias[b, h, q_idx, kv_idx], not bias[b][h]"
        _require(scores.shape == shape, rule, scores=scores)
    if block_mask is not None:
        scores = scores.masked_fill(~_dense_mask(block_mask, query), -torch.inf)
    # A softmax over no key is NaN: let those rows see every key, and zero them and their gradients after.
    empty = scores.detach().amax(-1, keepdim=True).isneginf()
    scores = scores.masked_fill(empty, 0.0)
    output = (scores.softmax(-1) @ value).masked_fill(empty, 0.0).to(query.dtype)
    if not return_lse:
        return output
    return output, scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf).float()


def _dense_mask(block_mask: BlockMask, query: Tensor) -> Tensor:
    """(B, H or 1, L, S): the mask_mod at every score."""
    _, heads, q_len, kv_len = block_mask.shape
    return create_mask(block_mask.mask_mod, query.shape[0], heads, q_len, kv_len, query.device)


def _kernel_options(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Any, backend: str = "triton"
) -> dict[str, Any]:
    """What was measured on an H100 or H200 is used on Hopper; elsewhere torch chooses."""
    if backend == "flash":
        return {"BACKEND": "FLASH"}
    group, on_hopper = query.shape[1] // key.shape[1], _is_on_hopper(query)
    width = max(query.shape[3], value.shape[3]) * query.element_size()  # bytes
    blocks = (128, 128) if block_mask is None else block_mask.BLOCK_SIZE
    rows = max(group, 16 if query.shape[2] * group <= 16 else 64)  # queries times group, of a tile
    decodes = query.shape[2] <= _FEW and group & group - 1 == 0 and not (blocks[0] % rows or blocks[1] % 64)
    if decodes and (block_mask is None or block_mask.shape[1] == 1):
        options = {"BACKEND": "TRITON_DECODE", "IS_DIVISIBLE": False, "BLOCK_M": rows}
        if on_hopper:  # loads that run ahead, as far as they fit, and work for the whole card
            stages, work = 3 if width <= 256 else 2 if width <= 512 else 1, 1024 if rows <= 16 else 256
            split = min(32, max(1, work // (query.shape[0] * key.shape[1])))
            options |= {"fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": stages, "SPLIT_KV": split}
        return options
    # Whether no tile reaches past the end. Torch 2.11 sees it only in lengths that are compiled in, and
    # wrongly where a block of the mask is larger than 128.
    lengths = zip((query.shape[2], key.shape[2]), blocks, strict=True)
    divisible = not any(length % 128 or length % block for length, block in lengths)
    # Left to itself torch decodes up to 127 queries, and has no configuration of that from 129 rows on.
    options = {"BACKEND": "TRITON", "IS_DIVISIBLE": divisible}
    if width == 256 and query.element_size() == 2 and on_hopper:
        if query.shape[2] < 128:  # half the time of torch's, mostly empty, tiles
            options |= {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4}
        else:
            # Small enough that two programs share a multiprocessor: one multiplies, one exponentiates. But
            # where a window or documents cut tiles at both ends, larger ones are faster. Torch compiles loads
            # by descriptor also for rows that begin between multiples of 16 bytes, and then reads wrongly;
            # while a caller's graph is traced, where they begin cannot be asked.
            between = any(n % 8 for x in (query, key, value) for n in x.stride()[:3])
            tma = not (between or torch.compiler.is_compiling())
            small: Any = {"fwd_num_stages": 2, "fwd_num_warps": 4, "fwd_USE_TMA": tma}
            tiles = {"up_to_last": small, "from_first_to_last": {"fwd_BLOCK_N": 128}}
            mask_mod = getattr(block_mask, "mask_mod", None)
            options |= tiles.get(getattr(mask_mod, "__name__", ""), {})
    if query.shape[3] <= 64 and query.element_size() == 2 and on_hopper:
        # Torch's own tiles spill registers forward there, and are slower backward.
        options |= {"fwd_BLOCK_N": 64, "bwd_num_warps": 4}
        options |= dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 64)
    return options


def _is_on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, block_mask: Any, score_mod: Any
) -> None:
    got = {"query": query, "key": key, "value": value, "pads": pads}
    _check_tensors(pads=pads)
    transposed = key.dim() == 4 and key.shape[2] != pads.shape[1] == key.shape[1]
    _require(not transposed, "heads must stand before the length: pass x.transpose(1, 2)", **got)
    _check_tensors(**got)
    if query.is_cuda and not torch.compiler.is_compiling():
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # no public name tells
        rule = "compiled flex_attention has no torch.func: use torch.autograd.grad, and a batch for vmap"
        _require(not any(map(is_wrapped, (query, key, value))), rule, TypeError, query=type(query))
    small = query.is_cuda and min(query.shape[3], value.shape[3]) < 16
    _require(not small, "on CUDA, head sizes must be 16 at least: fill up with zeros", **got)
    large = query.is_cuda and query.shape[0] >= 2**16  # than a CUDA grid
    _require(not large, "on CUDA, a batch must be of at most 65535: make calls for parts of it", **got)
    divides = query.shape[1] % key.shape[1] == 0
    _require(divides, "the heads of query must be a multiple of those of key and value", **got)
    usable = score_mod is None or callable(score_mod)
    _require(usable, "score_mod is a function of score, b, h, q_idx, kv_idx", TypeError, score_mod=score_mod)
    if block_mask is not None:
        is_mask = isinstance(block_mask, BlockMask)
        _require(is_mask, "block_mask must be a BlockMask", TypeError, block_mask=type(block_mask))
        sliced = getattr(block_mask.mask_mod, "__name__", "") == "_sliced_mask_mod_error"
        shape, device = block_mask.shape, block_mask.kv_num_blocks.device
        rule = "block_mask is a slice, without its mask_mod: make one of a slice of pads"
        _require(not sliced, rule, block_mask=(*shape, device))
        fits = shape == (query.shape[0], shape[1], query.shape[2], key.shape[2]) and device == pads.device
        rule = "block_mask must fit: make it with create_causal_padding_block_mask(pads, query.shape[2])"
        _require(fits and shape[1] in (1, query.shape[1]), rule, block_mask=(*shape, device), **got)
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        both_ways = block_mask.q_num_blocks is not None or not grad
        rule = "block_mask was made under torch.no_grad: make it where gradients are wanted"
        _require(both_ways, rule, block_mask=(*shape, device))


_HAS_FLASH = any(importlib.metadata.distributions(name="flash-attn-4"))  # which a compiled model cannot ask
_FLASH_FROM = 1e11  # B Hq L S E


def _is_faster_with_flash(query: Tensor, key: Tensor, block_mask: BlockMask | None) -> bool:
    # Measured on an H100 and an H200: where the arithmetic outweighs its launch. What the padding leaves of
    # it cannot be asked without waiting for the device.
    large = query.numel() * key.shape[2] >= _FLASH_FROM
    fits = block_mask is not None and block_mask.BLOCK_SIZE == (128, 128)
    return large and fits and not torch.are_deterministic_algorithms_enabled()


def _flash_obstacle(query: Tensor, key: Tensor, value: Tensor, score_mod: Any, lse: bool) -> str | None:
    """What the FLASH kernel needs and lacks, if anything."""
    sizes = (query.shape[3], value.shape[3])
    needs = {
        "the package flash-attn-4 (pip install --pre flash-attn-4)": _HAS_FLASH,
        "a Hopper card, the only kind it was tried on": _is_on_hopper(query),
        "float16 or bfloat16": query.dtype in (torch.float16, torch.bfloat16),
        # Those of which its tiles divide 128.
        "head sizes that are multiples of 8 up to 128": not any(size % 8 or size > 128 for size in sizes),
        # Torch 2.11 compiles few of the one there, and scales the other wrongly.
        "neither score_mod nor return_lse": score_mod is None and not lse,
        "as many queries as keys": query.shape[2] == key.shape[2],
    }
    return next((need for need, holds in needs.items() if not holds), None)


# ---- all above is one piece to paste; it needs torch alone ------------------------------------------------


# ---- 4. The reference -------------------------------------------------------------------------------------


def sdpa_reference(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *, causal: bool = True,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The same attention by `scaled_dot_product_attention` with the explicit mask, in memory for B L S flags.

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
    mask, empty = _explicit_mask(pads, query.shape[2], causal)
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    # Torch 2.11's efficient kernel reads a mask of more than 2**32 scores at the wrong place: give it parts,
    # https://github.com/pytorch/pytorch/issues/187227.
    rows = max(1, _LARGEST_MASK // mask.shape[3])
    parts = zip(query.split(rows, dim=2), mask.split(rows, dim=2), strict=True)
    outputs = [F.scaled_dot_product_attention(part, key, value, seen, scale=scale) for part, seen in parts]
    return torch.cat(outputs, dim=2).masked_fill(empty, 0.0)


_LARGEST_MASK = 2**32


def _explicit_mask(pads: Tensor, q_len: int, causal: bool) -> tuple[Tensor, Tensor]:
    """What the last L tokens see, (B, 1, L, S), or all where nothing; and where, (B, 1, L, 1)."""
    create_padding_mask(pads)  # for its checks
    start = pads.shape[1] - q_len
    mask = ~pads[:, None, start:, None] & ~pads[:, None, None, :]
    mask = mask.tril(start) if causal else mask
    empty = ~mask.any(-1, keepdim=True)  # a softmax over no key is NaN, unless a kernel looks out for it
    return mask | empty, empty


# ---- 5. Adapters ------------------------------------------------------------------------------------------


def sequence_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, mesh: Any, **kwargs: Any
) -> Any:
    """`causal_padded_attention` over sequences that are shared out over the ranks of a mesh.

    Each rank gives its tokens and gets all tokens of some heads, attends, and gives them back: an all-to-all
    before and one after, as in DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509; and so for gradients.

    Args:
        query: (B, Hq, S / ranks, E): this rank's tokens, in the order of the ranks.
        key: (B, Hkv, S / ranks, E).
        value: (B, Hkv, S / ranks, Ev).
        pads: (B, S), torch.bool, True where the token is padding: of the whole sequence, on every rank.
        mesh: a DeviceMesh of one dimension. Its ranks must divide Hq, and divide Hkv or be a multiple of it:
            then each head of key and value is sent to several ranks.
        kwargs: what `causal_padded_attention` takes. A block mask is that of the whole sequence.

    Returns:
        (B, Hq, S / ranks, Ev): the output for this rank's tokens; with return_lse, theirs too.

    Raises:
        TypeError, ValueError: mesh, length or heads do not fit, or what `causal_padded_attention` says.
    """
    query, key, value = _cast_for_autocast(query, key, value)
    ranks, heads, kv_heads = mesh.size(), query.shape[1], key.shape[1]
    _require(mesh.ndim == 1, "mesh must have one dimension, which shares out the sequence", ndim=mesh.ndim)
    for name, x in (("query", query), ("key", key), ("value", value)):
        rule = f"{name} must be this rank's part, (batch, heads, length of pads / ranks, head size)"
        is_part = x.dim() == 4 and x.shape[2] * ranks == pads.shape[-1]
        _require(is_part, rule, **{name: x}, pads=pads, ranks=ranks)
    fits = heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
    rule = "ranks must divide the heads of query, and divide those of key or be a multiple of them: use fewer"
    _require(fits, rule, ranks=ranks, heads=(heads, kv_heads))
    if ranks == 1:
        return causal_padded_attention(query, key, value, pads, **kwargs)
    copies = max(1, ranks // kv_heads)
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)

    group = mesh.get_group()
    query, key, value = (_Exchange.apply(x, 2, group) for x in (query, key, value))  # (B, H / ranks, S, E)
    result = causal_padded_attention(query, key, value, pads, **kwargs)
    if isinstance(result, tuple):
        return tuple(_Exchange.apply(x, 1, group) for x in result)
    return _Exchange.apply(result, 1, group)


class _Exchange(torch.autograd.Function):
    """Gather dimension `joined`, heads (1) or tokens (2), for a share of the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: int, group: Any) -> Tensor:
        ctx.joined, ctx.group = joined, group
        # (ranks, joined, B, share, E): with what is joined outermost, the parts come in order.
        sent = _copy(x.movedim(joined, 0).unflatten(2, (group.size(), -1)).movedim(2, 0))
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=group)
        return received.flatten(0, 1).movedim(0, joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Exchange.apply(grad, 3 - ctx.joined, ctx.group), None, None


def _copy(x: Tensor) -> Tensor:
    """Contiguous. Torch copies numbers of two bytes at half the speed of memory: take them by fours."""
    if torch.compiler.is_compiling():
        return x.contiguous()
    per, apart = 8 // x.element_size(), (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    wide = x.stride(-1) == 1 and not any(n % per for n in apart)
    return x.view(torch.float64).contiguous().view(x.dtype) if wide else x.contiguous()


def register_transformers() -> None:
    """Let models of transformers that were loaded with attn_implementation="flex_attention" use this file.

    Raises:
        ImportError: transformers is not installed, or older than 5.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionMaskInterface.register("flex_attention", transformers_block_mask)
    AttentionInterface.register("flex_attention", transformers_attention)


def transformers_block_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Any = None, attention_mask: Tensor | None = None, device: Any = "cpu", **kwargs: Any,
) -> BlockMask:  # fmt: skip
    """Build the causal, sliding-window and bidirectional masks of transformers in closed form, no others.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function: as transformers hands them to
            its own function, which gets them where the mask is another.
        attention_mask: (B, up to kv_offset + S), 0 or False where the token is padding; none is when None.
        device, kwargs: likewise.

    Returns:
        A BlockMask of shape (B, 1, L, S). Where causal, padded queries see nothing; in transformers they do.
    """
    from transformers import masking_utils as theirs

    def is_window(make: str) -> bool:
        makes = getattr(theirs, make, None)  # one of them is missing in some versions
        return local is not None and makes is not None and _are_same(mask_function, makes(local))

    local: Any = kwargs.get("local_size")
    window = None
    is_causal = mask_function in (None, theirs.causal_mask_function)
    both_ways = mask_function is theirs.bidirectional_mask_function
    if is_window("sliding_window_causal_mask_function"):
        window, is_causal = local, True
    elif is_window("sliding_window_bidirectional_mask_function") and q_length == kv_length:
        window = local + 1  # transformers counts the tokens on each side
    if not (is_causal or both_ways or window):
        sizes: Any = batch_size, q_length, kv_length, q_offset, kv_offset
        return theirs.flex_attention_mask(*sizes, mask_function, attention_mask, device, **kwargs)  # type: ignore
    if attention_mask is None:
        pads = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        pads = attention_mask[:, kv_offset : kv_offset + kv_length] == 0
        pads = F.pad(pads, (0, kv_length - pads.shape[1]), value=True)  # what a static cache has room for
    if both_ways:  # queries may be other tokens than keys, and which of them are padding is not said
        query_pads = pads.new_zeros(batch_size, q_length)
        return create_causal_padding_block_mask(pads, causal=False, query_pads=query_pads)
    offset = q_offset - kv_offset if kv_offset else q_offset
    offset = offset.reshape(()) if isinstance(offset, Tensor) else offset  # (1,) in some versions
    return create_causal_padding_block_mask(pads, q_length, q_offset=offset, causal=is_causal, window=window)


def _are_same(x: Any, y: Any) -> bool:
    """Whether two functions, or what they capture, are the same code with the same values."""
    if hasattr(x, "__code__") and hasattr(y, "__code__"):
        x, y = ((f.__code__, *(cell.cell_contents for cell in f.__closure__ or ())) for f in (x, y))
    if isinstance(x, tuple) and isinstance(y, tuple):
        return len(x) == len(y) and all(map(_are_same, x, y))
    return x is y or (type(x) is type(y) is int and x == y)


def transformers_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Run the "flex_attention" of transformers with the kernels of `causal_padded_attention`.

    Args:
        module, query, key, value, attention_mask, scaling: what transformers hands to an attention. A mask
            that is dense is added to the scores, or says where they are computed if it is boolean.
        softcap: the scores are bent to at most this.
        s_aux: (Hq,), the attention sinks.
        position_bias: (B or 1, Hq, L, S), added to the scores.
        kwargs: more that transformers hands over, of which only dropout is looked at.

    Returns:
        The output, (B, L, Hq, Ev), and None for the weights.

    Raises:
        ValueError: transformers asks for dropout, which flex does not have.
    """
    dropout, added, block_mask = kwargs.get("dropout"), [position_bias], attention_mask
    _require(not dropout, "flex_attention has no dropout: set attention_dropout to 0", dropout=dropout)
    query, key, value = _cast_for_autocast(query, key, value)
    if isinstance(attention_mask, Tensor):
        block_mask, dense = None, attention_mask[..., : key.shape[2]]
        if dense.dtype == torch.bool:
            dense = torch.zeros_like(dense, dtype=query.dtype).masked_fill(~dense, -torch.inf)
        added.append(dense)
    biases = [x.expand(*query.shape[:3], key.shape[2]) for x in added if x is not None]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        for bias in biases:
            score = score + bias[b, h, q_idx, kv_idx]
        return score

    changes = score_mod if biases or softcap is not None else None
    result = _attend(query, key, value, block_mask, scaling, changes, s_aux is not None)
    if s_aux is not None:  # a sink is one more key, of value zero: it takes its share of the softmax
        share = torch.sigmoid(result[1] - s_aux.float()[:, None])  # (B, Hq, L)
        result = result[0] * share.unsqueeze(-1).to(result[0].dtype)
    return result.transpose(1, 2).contiguous(), None


# ---- 6. The demonstration: python causal_padded_flexattn.py -----------------------------------------------


def _parse(argv: list[str] | None) -> Any:
    import argparse
    import importlib
    import os
    from pathlib import Path

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
        return int(text)

    about = "Causal attention over a padded batch: FlexAttention checked against SDPA, timed, and drawn."
    parser = argparse.ArgumentParser(description=about, usage=argparse.SUPPRESS)  # an error is one line, then
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16; float32 on the CPU")
    add("--batch-size", type=count, metavar="B", help="default: 8; 4 on the CPU")
    add("--heads", type=count, metavar="H", help="of query; default: 16; 4 on the CPU")
    add("--kv-heads", type=count, metavar="H", help="of key and value; default: as many")
    add("--max-seq-len", type=count, metavar="S", help="default: 4096; 512 on the CPU")
    add("--head-dim", type=count, metavar="D", default=64, help="default: 64")
    add("--lengths", type=lambda x: [*map(count, x.split(","))], metavar="N,N,...", help="default: random")
    add("--padding-side", choices=["right", "left"], default="right", help="default: right")
    add("--seed", type=int, default=0, help="of the lengths and the numbers; default: 0")
    add("--output", type=Path, metavar="PATH", help="default: causal_padding_mask.png, or ..._left.png")
    add("--no-figure", action="store_true", help="draw nothing")
    args, fail = parser.parse_args(argv), parser.error

    if args.device == "cuda" and not torch.cuda.is_available():
        fail("torch sees no CUDA device: pass --device cpu, or install a CUDA build of torch")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = ("float32", 4, 4, 512) if args.device == "cpu" else ("bfloat16", 8, 16, 4096)
    args.dtype, args.heads = args.dtype or sizes[0], args.heads or sizes[2]
    args.kv_heads, args.max_seq_len = args.kv_heads or args.heads, args.max_seq_len or sizes[3]
    torch.manual_seed(args.seed)
    drawn = torch.randint(max(1, args.max_seq_len // 8), args.max_seq_len + 1, (args.batch_size or sizes[1],))
    args.lengths = args.lengths or drawn.tolist()
    if args.batch_size not in (None, len(args.lengths)):
        fail(f"--lengths has {len(args.lengths)} sequences: leave --batch-size {args.batch_size} out")
    if args.heads % args.kv_heads:
        fail(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    if max(args.lengths) > args.max_seq_len:
        fail(f"--lengths has {max(args.lengths)} tokens: raise --max-seq-len {args.max_seq_len}")
    if not args.no_figure:
        side = "_left" if args.padding_side == "left" else ""
        args.output = args.output or Path(f"causal_padding_mask{side}.png")
        if args.output.suffix != ".png" or not args.output.parent.is_dir():
            fail(f"--output must be a .png file in a folder that exists; got {args.output}")
        if not os.access(args.output if args.output.exists() else args.output.parent, os.W_OK):
            fail(f"--output {args.output} cannot be written: name another, or pass --no-figure")
        try:
            for package in ("matplotlib", "attn_gym"):
                importlib.import_module(package)
        except Exception as error:  # not only ImportError: a broken installation can raise anything
            why = f"needs attn_gym and matplotlib ({type(error).__name__}: {error})"
            fail(f"the figure {why}: pip install attn-gym matplotlib, or pass --no-figure")
    return args


def _draw_mask(path: Any, padding_side: str) -> None:
    """With attention-gym, the mask of a sequence of 8 tokens, padded to 12."""
    import contextlib
    import io

    import matplotlib

    matplotlib.use("Agg")  # no window, also where a display exists
    from attn_gym import visualize_attention_scores
    from torch.nn.attention.flex_attention import and_masks

    mask_mod = and_masks(causal, create_padding_mask(_pads([8], 12, padding_side)))
    drawn: Any = {"mask_mod": mask_mod, "device": "cpu", "name": "causal_padding_mask", "path": path}
    with contextlib.redirect_stdout(io.StringIO()):  # only the mask of these is drawn: (B, H, S, E)
        visualize_attention_scores(torch.ones(1, 1, 12, 8), torch.ones(1, 1, 12, 8), **drawn)


def _pads(lengths: list[int], max_seq_len: int, padding_side: str, device: str = "cpu") -> Tensor:
    """(B, max_seq_len): True where a sequence of that length, padded on that side, holds padding."""
    places, length = torch.arange(max_seq_len, device=device), torch.tensor(lengths, device=device)[:, None]
    return places >= length if padding_side == "right" else places < max_seq_len - length


def _differentiate(attention: Any, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """The output and, given its gradient, the gradients of the inputs."""
    inputs = [x.detach().requires_grad_(grad is not None) for x in inputs]
    output = attention(*inputs)
    return [output] if grad is None else [output, *torch.autograd.grad(output, inputs, grad)]


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; --help lists its options.

    Args:
        argv: the arguments of the command line; those of the process when None.

    Returns:
        The exit status: 0 when the checks hold, 1 when they do not, 2 for unusable arguments or no compiler,
        130 when interrupted, 141 when nobody reads on.
    """
    import os
    import sys

    args = _parse(argv)
    try:
        return _demonstrate(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes when it ends
        return 141
    except RuntimeError as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        print("torch.compile found no C++ compiler: install g++, or name another in CXX", file=sys.stderr)
        return 2


def _demonstrate(args: Any) -> int:
    import logging
    import os
    import sys
    import time
    import warnings
    from functools import partial

    # On the CPU, one kernel does not repay precompiling C++ headers; torch reads this when it first compiles.
    os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    # Nothing to act on: that a CUDA toolkit is there, but no card; and a default that Triton 3.9 alone can
    # change, of which it speaks here and where it compiles in the background.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
    from torch.nn.attention.flex_attention import and_masks, create_block_mask
    from torch.utils.benchmark import Timer

    def say(label: str, text: str) -> None:
        print(f"{label:<12}{text}", flush=True)

    on_cuda, dtype, grouped = args.device == "cuda", getattr(torch, args.dtype), args.heads != args.kv_heads
    card = torch.cuda.get_device_name() if on_cuda else "CPU: forward only, as FlexAttention has it"
    say("device", f"torch {torch.__version__}, {args.dtype}, {card}")
    batch_size, length = len(args.lengths), args.max_seq_len
    pads = _pads(args.lengths, length, args.padding_side, args.device)  # (B, S)
    *inputs, grad = (
        torch.randn(batch_size, heads, length, args.head_dim, device=args.device, dtype=dtype)
        for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    )
    directions = {"forward": None} | ({"with backward": grad} if on_cuda else {})
    padding = f"{pads.float().mean():.0%} of it padding on the {args.padding_side}"
    heads = f"{args.heads} query and {args.kv_heads} key heads of {args.head_dim}"
    say("batch", f"{batch_size} x {length} tokens, {padding}; {heads}")

    mask_mod = and_masks(causal, create_padding_mask(pads))
    block_mask: Any = create_block_mask(mask_mod, batch_size, None, length, length, device=args.device)
    closed: Any = create_causal_padding_block_mask(pads)
    names = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
    same = all(torch.equal(getattr(closed, name), getattr(block_mask, name)) for name in names)
    wrong = [] if same else ["block masks"]
    full, partly = closed.full_kv_num_blocks.sum(), closed.kv_num_blocks.sum()
    skipped = closed.kv_indices.numel() - full - partly
    say("block mask", f"tiles of 128 x 128: {full} full, {partly} partial, {skipped} skipped")

    say("compile", f"flex_attention, {' and '.join(directions)} ...")
    options = _kernel_options(inputs[0], inputs[1], inputs[2], block_mask)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    flex = partial(compiled, block_mask=block_mask, enable_gqa=grouped, kernel_options=options)
    start, (*_, passes) = time.perf_counter(), directions.values()
    results = [x.cpu() for x in _differentiate(flex, inputs, passes)]
    say("", f"{time.perf_counter() - start:.1f} s")

    say("check", "largest error against SDPA in higher precision, SDPA's own, and the bound:")
    higher = torch.float64 if dtype == torch.float32 else torch.float32
    wide = [x.to(higher).split(1) for x in (*inputs, grad)]
    exact = [  # one sequence at a time, since float64 has no kernel that saves memory
        _differentiate(partial(sdpa_reference, pads=pad), row, row_grad if on_cuda else None)
        for *row, row_grad, pad in zip(*wide, pads.split(1), strict=True)
    ]
    plain = _differentiate(partial(sdpa_reference, pads=pads), inputs, passes)
    quantities = ("output", "query gradient", "key gradient", "value gradient")
    for name, ours, own, *truth in zip(quantities, results, plain, *exact, strict=False):
        error, own_error = ((x.cpu() - torch.cat(truth).cpu()).abs().max().item() for x in (ours, own))
        # FlashAttention's habit: twice plain PyTorch's error, thrice for gradients, and two roundings. And 16
        # of float32, in which a weight is 2 to the power of a difference of numbers of up to 10 or 20.
        rounding = (2 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * own.abs().max().item()
        bound = (2 if name == "output" else 3) * own_error + rounding
        say("", f"{name:<16}{error:.1e}   {own_error:.1e}   {bound:.1e}")
        wrong += [] if error <= bound else [name]

    say("time", "median ms, masks made before, nothing zeroed: flex, and SDPA with the explicit mask")
    mask, _ = _explicit_mask(pads, length, True)
    sdpa = partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=grouped)
    for name, passes in directions.items():
        timed = [{"run": partial(_differentiate, way, inputs, passes)} for way in (flex, sdpa)]
        timers = [Timer("run()", globals=x, num_threads=torch.get_num_threads()) for x in timed]
        ours_ms, own_ms = (timer.blocked_autorange(min_run_time=0.3).median * 1e3 for timer in timers)
        say("", f"{name:<16}{ours_ms:.2f}   {own_ms:.2f}   {own_ms / ours_ms:.1f} x")
    if not args.no_figure:
        _draw_mask(args.output, args.padding_side)
        say("figure", f"{args.output}: the mask of 8 tokens, padded to 12 on the {args.padding_side}")
    if wrong:
        print(f"FlexAttention and what it was checked against differ: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
