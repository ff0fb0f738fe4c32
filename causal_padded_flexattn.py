# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "attn-gym>=0.0.3", "matplotlib"]
# ///
"""Causal attention over a padded batch with PyTorch's FlexAttention, https://arxiv.org/abs/2412.05496.

    block_mask = create_causal_padding_block_mask(pads)  # once for a batch: which tiles of scores to compute
    output = causal_padded_attention(query, key, value, pads, block_mask=block_mask)  # in every layer

Import this file, or paste what you need of it: parts 1 and 2 make the mask, part 3 adds the attention, and
none of the three needs more than torch. Run as a script, it checks itself against
`scaled_dot_product_attention`, times both on a GPU, and draws the mask.

Shapes are written as in torch.nn.functional.scaled_dot_product_attention: B batch size, Hq query heads, Hkv
key and value heads, L number of queries, S number of keys (max_seq_len), E head size of query and key, Ev
head size of value.
"""

import importlib.metadata
import inspect
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial, reduce
from operator import add, and_, eq, ge, gt, le, lt, sub
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_mask, flex_attention
from torch.overrides import TorchFunctionMode

_END = 2**29  # a place behind the end of every sequence
_BEYOND = 2**30  # a distance that takes any place up to _END out of reach; int32 holds twice as much
_DECODES = 16  # at most so many queries are left to the kernel for decoding
_MOST_SPLITS = 32  # into which decoding divides the keys
_SEQUENCES = 4  # the batch size that decoding splits the keys for, under deterministic algorithms
_FLASH_FROM = 1e11  # B * Hq * L * S * E from which FlashAttention-4's kernels were measured to be faster
_HAS_FLASH = any(importlib.metadata.distributions(name="flash-attn-4"))  # torch.compile cannot trace this
_KINDS = 64  # at most so many kernels are compiled; torch's own limit is 8
_HAS_BATCH_INVARIANT = torch.__version__ >= "2.13"  # an option of Inductor
_SUMS_VIEWS_ALIKE = torch.__version__ >= "2.15"  # in one order, whatever the batch size
_TILES_SHRINK = torch.__version__ >= "2.14"  # whether backward tiles can be made to divide small blocks

# ---- 1. What may attend to what ---------------------------------------------------------------------------


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """mask_mod: a query sees the keys up to its own position.

    Args:
        b, h, q_idx, kv_idx: integer tensors: the batch element, the head, the position of the query and the
            position of the key.

    Returns:
        A boolean tensor, True where the score is computed.
    """
    return q_idx >= kv_idx


def create_padding_mask(pads: Tensor) -> Callable[..., Tensor]:
    """Make the mask_mod that computes a score only where neither the query nor the key is padding.

    It answers the question about padding in attention-gym's issue 38,
    https://github.com/meta-pytorch/attention-gym/issues/38.

    Args:
        pads: (B, max_seq_len), torch.bool, True where the token is padding. The mask_mod reads it when
            attention runs, so leave it unchanged until then.

    Returns:
        The mask_mod. Combine it with `causal` by `torch.nn.attention.flex_attention.and_masks`.

    Raises:
        TypeError, ValueError: `pads` is not a torch.bool tensor of two dimensions, or it is empty.
    """
    _check_tensors(pads=pads)

    def padding(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~pads[b, q_idx] & ~pads[b, kv_idx]

    return padding


# ---- 2. The block mask ------------------------------------------------------------------------------------


def create_causal_padding_block_mask(
    pads: Tensor, q_len: int | None = None, *, q_offset: int | Tensor | None = None, causal: bool = True,
    window: int | None = None, documents: Tensor | None = None, spans: Tensor | None = None,
    until: Tensor | None = None, query_pads: Tensor | None = None, padding_side: str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:  # fmt: skip
    """Build in closed form the BlockMask that `create_block_mask` finds by evaluating every score.

    Every query sees one run of keys, from `first` to `last`, except those that are padding. The options below
    move these two ends. A tile is a block of queries against a block of keys. The smallest and the largest
    numbers in its two blocks tell what it is:

        some pair is allowed:   max(last) >= min(key)  and  max(key) >= min(first)
        every pair is allowed:  min(last) >= max(key)  and  min(key) >= max(first)

    A tile in which no pair is allowed is skipped. A tile in which every pair is allowed is full: the kernel
    computes it without asking the mask_mod. The rest are partial. Padding needs no rule of its own: a padded
    query has an empty run, and a padded key counts as out of reach.

    For example, five tokens padded to eight, causal, in blocks of two (`first` is 0 throughout):

                     keys  0 1      2 3      4 -      - -
        queries 0 1        partial  skipped  skipped  skipped    last: 0, 1
                2 3        full     partial  skipped  skipped    last: 2, 3
                4 -        partial  partial  partial  skipped    last: 4, none
                - -        skipped  skipped  skipped  skipped    last: none, none

    Build the mask once for a batch, or once for each kind of layer, and share it between layers. Building it
    compiles nothing, does not wait for the device, and needs memory for the tokens and the tiles only.

    Args:
        pads: (B, S), torch.bool, True where the key is padding. In a preallocated cache, what is not written
            yet is padding too. Attention reads `pads` again, so leave it unchanged until the backward pass is
            done.
        q_len: L, the number of queries. None means as many as fit behind q_offset.
        q_offset: the place of the first query on the axis of the keys. None means S - L: the queries are the
            last tokens. A 0-d integer tensor is accepted beside q_len; its value is not checked, because that
            would wait for the device.
        causal: whether a query sees only the keys up to its own place.
        window: how many keys back a query sees, its own included, and without causality as many ahead.
        documents: (B, S), integers that never fall along the real tokens. A token sees only tokens of its own
            document. From position_ids that restart, `(position_ids == 0).cumsum(1)` makes them.
        spans: (B, S), integers that never fall along the real tokens. Tokens with the same number also see
            each other in both directions: a prefix, an image, a chunk. Every other token needs a number of
            its own. Requires causality.
        until: (B, S), integers: the place of the last query that sees the key, at least the key's own. Any
            number from S - 1 on means that all later queries see it. This describes trees, for example
            several answers behind one prompt, stored depth first. Requires causality.
        query_pads: (B, L), torch.bool, True where the query is padding. It says that the queries are other
            tokens than the keys, as in cross-attention. Requires `causal=False` and no other option.
        padding_side: "right" or "left" promises that all padding stands there. Kernels then compare places
            with the length of the sequence instead of looking `pads` up. On the CPU a broken promise is a
            ValueError. On other devices it is not noticed, and the output is wrong. Under deterministic
            algorithms the promise is not used.
        BLOCK_SIZE: the number of tokens in a block, or a pair (queries in a block, keys in a block). With
            Triton's kernels, blocks of 64 train sequences of up to 4096 tokens faster, from torch 2.14 on.

    Returns:
        A BlockMask of shape (B, 1, L, S), which serves any number of heads. For up to 16 queries under
        `torch.no_grad` it holds one list of tiles, with which decoding is faster, and has no backward pass.

    Raises:
        TypeError, ValueError: an argument does not fit. The message says what was expected.
    """
    blocks = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    options: Any = (causal, window, documents, spans, until, query_pads, padding_side)
    q_len, q_offset = _check_mask_options(pads, q_len, q_offset, options, blocks)
    kv_len = pads.shape[1]
    keys = torch.arange(kv_len, dtype=torch.int32, device=pads.device)  # (S,), their places
    # Where the queries stand among the keys, (L,), and which of them are padding, (B, L).
    if query_pads is not None:  # other tokens, which stand nowhere there
        queries = keys[:1].expand(q_len)
    elif isinstance(q_offset, Tensor):
        queries = q_offset.reshape(1) if q_len == 1 else keys[:q_len] + q_offset
        query_pads = pads.index_select(1, queries)
    else:
        queries = keys[q_offset : q_offset + q_len]
        query_pads = pads if q_len == kv_len else pads[:, q_offset : q_offset + q_len]

    first, last = _find_runs(queries, pads, causal, window, documents, spans)
    rules = None
    if torch.are_deterministic_algorithms_enabled():  # such rules would not hold behind the end
        padding_side = None
    if padding_side is not None and q_len == kv_len and documents is None and spans is None:
        rules = _compute_runs(pads, causal, window, padding_side)
    elif padding_side is not None:
        first, last = _leave_out_padding(first, last, pads, padding_side)
    if until is not None:  # counted as the queries that are given, from 0
        until = until.long().clamp(max=_END).int() - queries[:1]
    return _build_from_runs(first, last, until, keys, pads, query_pads, blocks, padding_side, rules)


def _find_runs(queries, pads, causal, window, documents, spans):
    """The first and the last key that each query sees, (L,) or (B, L). A first of None stands for 0."""
    first, last = None, queries if causal else torch.full_like(queries, _END)
    if window is not None:
        reach = min(window, _END) - 1
        first, last = queries - reach, queries if causal else queries + reach
    if spans is not None:  # a span adds to what a query sees
        numbers, own = _number_groups(spans, queries, pads)
        if first is not None:
            first = torch.minimum(first, torch.searchsorted(numbers, own, out_int32=True))
        last = torch.maximum(last, torch.searchsorted(numbers, own, out_int32=True, right=True) - 1)
    if documents is not None:  # a document takes away from it
        numbers, own = _number_groups(documents, queries, pads)
        begin = torch.searchsorted(numbers, own, out_int32=True)
        first = begin if first is None else torch.maximum(first, begin)
        if not causal or spans is not None:
            last = torch.minimum(last, torch.searchsorted(numbers, own, out_int32=True, right=True) - 1)
    return first, last


def _number_groups(numbers, queries, pads):
    """The numbers of all tokens, made to be searched, and those of the queries: (B, S) and (B, L)."""
    # A padded token gets the number of the token before it, so that the numbers never fall.
    numbers = numbers.masked_fill(pads, torch.iinfo(numbers.dtype).min).cummax(1).values
    return numbers, numbers if queries.shape[0] == pads.shape[1] else numbers.index_select(1, queries)


def _build_from_runs(first, last, until, keys, pads, query_pads, blocks, padding_side=None, rules=None):
    """The block mask of queries that see the real keys from first to last.

    Its mask_mod is the conjunction of rules. They look first and last up in tables, unless rules are given
    that compute the same.
    """
    q_len, kv_len = query_pads.shape[1], pads.shape[1]
    # Under deterministic algorithms _fill_blocks adds places behind the end, which the mask must know.
    is_filled = q_len == kv_len and torch.are_deterministic_algorithms_enabled()
    decodes = not (is_filled or torch.is_grad_enabled()) and q_len <= min(_DECODES, blocks[0])
    find_tiles = _opaque_find_tiles if torch.compiler.is_compiling() else _find_tiles
    tables, lists = find_tiles(first, last, until, keys, pads, query_pads, *blocks, decodes)

    is_computed = rules is not None
    # Rules capture tensors, not numbers, which would be compiled in: a new kernel for every decoding step.
    if not is_computed:
        last = tables[0]
        rules = [lambda b, h, q_idx, kv_idx: kv_idx <= last[b, q_idx]]
        if first is not None:
            begin = tables[1]
            rules.append(lambda b, h, q_idx, kv_idx: kv_idx >= begin[b, q_idx])
        if until is None and padding_side is None:  # else the tables know which keys are padding
            pads = _fill(pads, blocks[1], True) if is_filled else pads
            rules.append(lambda b, h, q_idx, kv_idx: ~pads[b, kv_idx])
    if until is not None:
        last_query = tables[-1]
        rules.append(lambda b, h, q_idx, kv_idx: q_idx <= last_query[b, kv_idx])

    def mask_mod(b, h, q_idx, kv_idx):
        allowed = rules[0](b, h, q_idx, kv_idx)
        for rule in rules[1:]:
            allowed = allowed & rule(b, h, q_idx, kv_idx)
        return allowed

    # What safe_padding and the choice of kernels ask for later.
    mask_mod.query_pads, mask_mod.has_first = query_pads, first is not None
    mask_mod.is_computed, mask_mod.is_filled = is_computed, is_filled
    counts, indices, q_counts, q_indices = lists if not decodes else (*lists, [None] * 2, [None] * 2)
    return BlockMask(
        seq_lengths=(q_len, kv_len),
        kv_num_blocks=counts[0],
        kv_indices=indices[0],
        full_kv_num_blocks=None if decodes else counts[1],
        full_kv_indices=None if decodes else indices[1],
        q_num_blocks=q_counts[0],
        q_indices=q_indices[0],
        full_q_num_blocks=q_counts[1],
        full_q_indices=q_indices[1],
        BLOCK_SIZE=blocks,
        mask_mod=mask_mod,
    )


def _compute_runs(pads, is_causal, window, padding_side):
    """Rules that compute first and last, where query i is token i and all padding stands on one side.

    Each compares kv_idx with a number that depends on the query alone, because FlashAttention-4's kernels
    compute such a number once for a row of scores. `q_idx < end[b]`, as a rule of its own, is slower.
    """
    if padding_side == "right":
        end = (~pads).sum(1, dtype=torch.int32)  # (B,)
        if is_causal:
            rules = [lambda b, h, q_idx, kv_idx: kv_idx <= torch.where(q_idx < end[b], q_idx, -1)]
        else:
            rules = [lambda b, h, q_idx, kv_idx: kv_idx < torch.where(q_idx < end[b], end[b], 0)]
    else:
        begin = pads.sum(1, dtype=torch.int32)  # (B,)
        if is_causal:
            rules = [causal, lambda b, h, q_idx, kv_idx: kv_idx >= begin[b]]
        else:
            rules = [lambda b, h, q_idx, kv_idx: kv_idx >= torch.where(q_idx >= begin[b], begin[b], _END)]
    if window is not None:
        reach = torch.full_like(pads[:, 0], min(window, _END) - 1, dtype=torch.int32)  # (B,)
        rules.append(lambda b, h, q_idx, kv_idx: kv_idx >= q_idx - reach[b])
        if not is_causal:
            rules.append(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + reach[b])
    return rules


def _leave_out_padding(first, last, pads, padding_side):
    """The runs without the padding of that side."""
    if padding_side == "right":
        return first, torch.minimum(last, (~pads).sum(1, keepdim=True, dtype=torch.int32) - 1)
    begin = pads.sum(1, keepdim=True, dtype=torch.int32)  # (B, 1)
    return begin.expand(-1, last.shape[-1]) if first is None else torch.maximum(first, begin), last


def _find_tiles(
    first: Tensor | None, last: Tensor, until: Tensor | None, keys: Tensor, pads: Tensor,
    query_pads: Tensor, q_block: int, kv_block: int, decodes: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The tables that the mask_mod looks up, and the lists of tiles.

    Returns:
        Tables: last, then first and until if they are given. They are (B, L) or (B, S), filled up to whole
        blocks. In them padding is out of reach.
        Lists: how many tiles of each row are partial and how many are full, (2, B, 1, rows), and which ones,
        (2, B, 1, rows, columns). Then the same of each column, for the backward pass. If it decodes, there is
        no backward pass and every tile counts as partial: (1, B, 1, rows) and (1, B, 1, rows, columns).
    """
    # Blocks that reach past the end are filled with padding. But kernels that decode read no table further
    # than the last query, so that the queries can stay as they are.
    if decodes and pads.is_cuda and query_pads.shape[1] < pads.shape[1]:
        q_block = query_pads.shape[1]
    q_pads, kv_pads = _fill(query_pads, q_block, True), _fill(pads, kv_block, True)
    queries, keys = keys[: query_pads.shape[1]], _fill(keys, kv_block)  # counted from 0
    # The smallest and the largest number of each block, (B, 1, rows, 1) and (B, 1, 1, columns).
    of_rows = lambda x: _find_ends(x.view(x.shape[0], 1, -1, 1, q_block))
    of_columns = lambda x: _find_ends(x.view(x.shape[0], 1, 1, -1, kv_block))

    # A pair is allowed where high >= low in every comparison. One of the two is a number of the query, the
    # other a number of the key. Padding is moved away, so far that no comparison holds for it.
    last = torch.add(_fill(last, q_block), q_pads, alpha=-_BEYOND)
    tables, comparisons = [last], [(of_rows(last), of_columns(torch.add(keys, kv_pads, alpha=_BEYOND)))]
    if first is not None:
        first = torch.add(_fill(first, q_block), q_pads, alpha=_BEYOND)
        tables.append(first)
        comparisons.append((of_columns(torch.add(keys, kv_pads, alpha=-_BEYOND)), of_rows(first)))
    if until is not None:
        until = torch.add(_fill(until, kv_block), kv_pads, alpha=-_BEYOND)
        query = torch.add(_fill(queries, q_block), q_pads, alpha=_BEYOND)
        tables.append(until)
        comparisons.append((of_columns(until), of_rows(query)))

    # The two rules of the docstring above.
    some = reduce(and_, [high_max >= low_min for (_, high_max), (low_min, _) in comparisons])
    if decodes:
        return tables, [*_list_tiles(some[None])]
    every = reduce(and_, [high_min >= low_max for (high_min, _), (_, low_max) in comparisons])
    tiles = torch.stack((some ^ every, every))  # partial and full, (2, B, 1, rows, columns)
    del some, every  # a large mask needs the memory
    by_query = _list_tiles(tiles)
    tiles = tiles.mT.contiguous()
    return tables, [*by_query, *_list_tiles(tiles)]


def _fill(x, block, value=None):
    missing = -x.shape[-1] % block  # up to whole blocks
    return F.pad(x, (0, missing), value=value) if missing else x


def _find_ends(x):
    """The smallest and the largest along the last dimension."""
    return (x.squeeze(-1),) * 2 if x.shape[-1] == 1 else x.aminmax(dim=-1)


def _list_tiles(tiles):
    """How many tiles of each row are True, (..., rows), and which ones, (..., rows, columns).

    What is left of a row repeats its last tile. Kernels do not read it.
    """
    columns = tiles.shape[-1]
    dtype = torch.int16 if 128 < columns < 2**15 else torch.int32  # half the memory, where it is much
    # Of booleans cumsum makes a copy first. On the CPU torch 2.11 has no such view under vmap.
    rank = (tiles.view(torch.int8) if tiles.is_cuda else tiles).cumsum(-1, dtype=dtype)
    count = rank.select(-1, -1)
    # The k-th tile of a row is where its rank first reaches k.
    wanted = torch.arange(1, columns + 1, dtype=dtype, device=tiles.device).minimum(count.unsqueeze(-1))
    return count.int().contiguous(), torch.searchsorted(rank, wanted, out_int32=True)


# In a caller's graph this is one operator that the compiler does not see into. It would lay the lists out as
# it likes, where the kernels read them as contiguous, and compile anew for each number of blocks.
_opaque_find_tiles = torch.library.custom_op("causal_padded::find_tiles", _find_tiles, mutates_args=())


@_opaque_find_tiles.register_fake
def _(first, last, until, keys, pads, query_pads, q_block, kv_block, decodes):
    """The shapes of the results, in terms that hold for all lengths."""
    (batch_size, kv_len), q_len = pads.shape, query_pads.shape[1]
    rows, columns = (q_len + q_block - 1) // q_block, (kv_len + kv_block - 1) // kv_block
    q_filled = q_len if decodes and pads.is_cuda and q_len < kv_len else rows * q_block
    tables = [x.new_empty(batch_size, q_filled) for x in (last, first) if x is not None]
    tables += [] if until is None else [until.new_empty(batch_size, columns * kv_block)]
    lists, int32 = [], {"dtype": torch.int32}
    for n, m in ((rows, columns), (columns, rows)):
        lists += [
            pads.new_empty(2, batch_size, 1, n, **int32),
            pads.new_empty(2, batch_size, 1, n, m, **int32),
        ]
    return tables, [x[:1].clone() for x in lists[:2]] if decodes else lists


# What does not fit. No check waits for the device: values are read only where they lie on the CPU.


def _check_mask_options(pads, q_len, q_offset, options, blocks):
    """The number of queries and the place of the first one, if the options fit."""
    causal, window, documents, spans, until, query_pads, padding_side = options
    _require(not torch.jit.is_tracing(), "torch.jit.trace is not supported: use torch.export", TypeError)
    tensors = {"documents": documents, "spans": spans, "until": until, "query_pads": query_pads}
    _check_tensors(pads=pads, **{name: x for name, x in tensors.items() if x is not None})
    q_block, kv_block = blocks if len(blocks) == 2 else (0, 0)
    sizes = _is_int(q_block) and _is_int(kv_block) and min(q_block, kv_block) >= 1
    _require(sizes, "BLOCK_SIZE must be an int of at least 1, or a tuple of two", BLOCK_SIZE=blocks)
    _require(causal is True or causal is False, "causal must be True or False", TypeError, causal=causal)
    if window is not None:
        _require(_is_int(window), "window must be an int, or None for all keys", TypeError, window=window)
        _require(window >= 1, "window must be at least 1, which is the query's own key", window=window)
    if padding_side not in (None, "right", "left"):
        _require(False, 'padding_side must be "right", "left" or None', padding_side=padding_side)
    _require(causal or spans is until is None, "spans and until need causal=True", spans=spans, until=until)
    kv_len, got = pads.shape[1], {"q_len": q_len, "q_offset": q_offset, "pads": pads}
    _require(q_len is None or _is_int(q_len), "q_len must be an int", TypeError, **got)
    if query_pads is not None:
        alone = not causal and window is documents is q_offset is padding_side is None
        rule = "query_pads is for queries that are other tokens than the keys: it needs causal=False, and no "
        rule += "window, documents, padding_side, q_offset or other q_len"
        got |= {"causal": causal, "window": window, "documents": documents, "padding_side": padding_side}
        _require(alone and q_len in (None, query_pads.shape[1]), rule, **got, query_pads=query_pads)
        return query_pads.shape[1], 0
    if isinstance(q_offset, Tensor):
        fits = q_offset.shape == () and q_offset.dtype in (torch.int32, torch.int64)
        rule = "q_offset must be an int, or a 0-d tensor of int32 or int64 on the device of pads"
        _require(fits and q_offset.device == pads.device, rule, TypeError, **got)
        _require(q_len is not None, "q_len must be given beside a tensor q_offset, which is not read", **got)
        fits = 1 <= q_len <= kv_len
    else:
        is_int = q_offset is None or _is_int(q_offset)
        _require(is_int, "q_offset must be an int or a 0-d integer tensor", TypeError, **got)
        q_len = kv_len - (q_offset or 0) if q_len is None else q_len
        q_offset = kv_len - q_len if q_offset is None else q_offset
        fits = 0 <= q_offset < q_offset + q_len <= kv_len
    _require(fits, "the queries must lie among the keys; pads covers a preallocated cache whole", **got)
    if pads.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(pads, documents, spans, until, padding_side)
    return q_len, q_offset


def _check_values(pads, documents, spans, until, padding_side):
    places = torch.arange(pads.shape[1], device="cpu")
    for name, numbers in (("documents", documents), ("spans", spans)):
        if numbers is not None:
            rises = (_number_groups(numbers, places, pads)[0] == numbers) | pads
            rule = f"{name} must never fall along the real tokens. From position_ids that restart, "
            _require(_are_true(rises), rule + "write (position_ids == 0).cumsum(1)", **{name: numbers})
    if until is not None:
        rule = "until must be at least the key's own place, since a token sees itself"
        _require(_are_true((until >= places) | pads), rule, until=until)
    if padding_side is not None:
        real = (~pads).sum(1, keepdim=True)
        is_padding = places >= real if padding_side == "right" else places < pads.shape[1] - real
        rule = f"padding_side promises that all padding stands on the {padding_side}, and some does not"
        _require(_are_true(is_padding == pads), rule, padding_side=padding_side, pads=pads)


def _are_true(x):
    try:
        return bool(x.all())
    except RuntimeError:  # there is no value to read: under vmap, of a fake tensor, in a trace
        return True


def _is_of_torch_func(x):
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # no public name tells


def _is_int(x):
    return type(x) is int or isinstance(x, torch.SymInt)


_PADS = (
    "a torch.bool tensor, True where the token is padding: attention_mask == 0 for a mask of ones and zeros, "
    "additive_mask < 0 for one that is added to scores, torch.arange(S) >= lengths[:, None] for lengths"
)
_NUMBERS = "a tensor of integers, one for each token"
_INPUT = "a floating point tensor of the same dtype as query"
_EXPECTED = {
    "pads": (("B", "S"), _PADS),
    "query_pads": (("B", "L"), _PADS),
    **dict.fromkeys(("documents", "spans", "until"), (("B", "S"), _NUMBERS)),
    "query": (("B", "Hq", "L", "E"), _INPUT),
    "key": (("B", "Hkv", "S", "E"), _INPUT),
    "value": (("B", "Hkv", "S", "Ev"), _INPUT),
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_tensors(**tensors: Any) -> None:
    """Their types, and their shapes against each other. Pads are among them."""
    sizes: dict[str, int] = {}
    for name, x in tensors.items():
        letters, kind = _EXPECTED[name]
        if getattr(x, "is_nested", False) or (type(x) is not Tensor and hasattr(x, "to_local")):
            rule = f"{name} must be a plain tensor: {name}.to_padded_tensor(0.0) of a nested tensor, "
            _require(False, rule + f"{name}.to_local() of a DTensor", TypeError, type=type(x))
        is_right = isinstance(x, Tensor)
        if is_right and kind is _INPUT:
            is_right = x.is_floating_point() and x.dtype == tensors["query"].dtype
        elif is_right:
            is_right = x.dtype == torch.bool if kind is _PADS else x.dtype in _INTEGERS
        if not is_right:
            _require(False, f"{name} must be {kind}", TypeError, **tensors)
        shape = x.shape
        fits = len(letters) == len(shape) and 0 not in shape
        for letter, size in zip(letters, shape, strict=False):
            fits = fits and sizes.setdefault(letter, size) == size
        if not fits:
            rule = (
                f"{name} must be of shape ({', '.join(letters)}) and agree with the others; no dimension may "
            )
            _require(False, rule + "be empty", **tensors)
        if x.device != tensors["pads"].device:
            _require(False, f"{name} must be on the device of pads: move it", **tensors)


def _require(holds: bool, rule: str, error: Any = ValueError, /, **got: Any) -> None:
    if not holds:  # only now are values formatted
        show = lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}" if isinstance(x, Tensor) else repr(x)[:80]
        shown = [f"{name} {show(x)}" for name, x in got.items() if x is not None or len(got) == 1]
        raise error(f"{rule}; got {', '.join(shown)}" if shown else rule)


# ---- 3. Attention -----------------------------------------------------------------------------------------


def causal_padded_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *, block_mask: BlockMask | None = None,
    causal: bool | None = None, window: int | None = None, documents: Tensor | None = None,
    spans: Tensor | None = None, until: Tensor | None = None, query_pads: Tensor | None = None,
    padding_side: str | None = None, scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None, return_lse: bool = False, backend: str = "auto",
    safe_padding: bool = False,
) -> Any:  # fmt: skip
    """Attention over a padded batch by FlexAttention: softmax(scale query keyᵀ) value, where allowed.

    Fewer queries than keys are the last tokens, unless the block mask says otherwise. CUDA runs compiled
    kernels. Other devices run plain operators, which need memory for every score.

    Under `torch.use_deterministic_algorithms(True)` a sequence gets the same bits on CUDA, whatever shares
    its batch. This holds for the output, the log-sum-exp, and the gradients of query, key and value. The
    batch may have any size, be padded on the right to any length, and on the left by multiples of the block
    size, which must be 128 or a multiple of it. A decoding step under `torch.no_grad` gets the same bits in a
    batch of any size and in a cache of any capacity, and also if the sequence is moved in its row by a
    multiple of 128. The block mask must be made here, under the same setting and with the same options.
    Lengths that are not multiples of the block size are filled up in a copy, which takes time. Before torch
    2.15 a query that is not contiguous is copied, too. Before torch 2.13 gradients for head sizes above 128
    are excepted. In a graph that the caller compiles, that compilation decides the bits. Prefill and decoding
    run different kernels, whose results differ by about as much as each differs from exact attention.

    Args:
        query: (B, Hq, L, E). A transposed view of (B, L, Hq, E) is not copied; nor are those below.
        key: (B, Hkv, S, E). Query head i reads key head i // (Hq // Hkv).
        value: (B, Hkv, S, Ev).
        pads: (B, S), torch.bool, True where the key is padding.
        block_mask: what `create_causal_padding_block_mask` made of the same `pads`, so that layers share it.
            None builds it here. It says what is seen, so the options of the mask are refused beside it.
        causal, window, documents, spans, until, query_pads, padding_side: the options of the mask, as in
            `create_causal_padding_block_mask`. A causal of None stands for True.
        scale: the factor of the scores before the softmax. None stands for 1 / sqrt(E). Every new scale
            compiles a kernel; one that changes in training belongs into a score_mod, as a tensor.
        score_mod: flex_attention's function of score, b, h, q_idx and kv_idx that returns the score to use.
            q_idx counts the queries given here. What changes or is learned must be captured as a tensor of
            one dimension or more, and looked up: `weight[h]`. On CUDA what is not finite at masked pairs
            makes the gradients of captured tensors NaN: clamp it, as in `log((q_idx - kv_idx).clamp(min=1))`.
            On other devices the five arguments are tensors that broadcast.
        return_lse: whether to return the log-sum-exp of the scores too.
        backend: "triton"; "flash" for FlashAttention-4's kernels, which support neither score_mod nor
            return_lse; or "auto" for "flash" where it can be used and was measured to be faster, which is
            for large inputs, and never under `torch.use_deterministic_algorithms(True)`.
        safe_padding: whether to set padded rows of the inputs to zero first, in a copy. Otherwise NaN or Inf
            in padded rows of `value` reaches the output of real rows (0 * NaN is NaN), and in padded rows of
            all three it reaches gradients.

    Returns:
        (B, Hq, L, Ev). Padded query rows are exact zeros, and so are gradients in padded rows. With
        return_lse also (B, Hq, L), float32: the natural logarithm of the sum of the exponentials of the
        scores, -inf in padded rows.

    Raises:
        TypeError, ValueError: inputs do not fit together. The message says what was expected.
        RuntimeError: more than 64 kinds of input were compiled.
    """
    options: Any = {"causal": causal, "window": window, "documents": documents, "spans": spans}
    options |= {"until": until, "query_pads": query_pads, "padding_side": padding_side}
    query, key, value = _cast_for_autocast(query, key, value)
    _check_attention(query, key, value, pads, block_mask, options, scale, score_mod, return_lse, backend)
    if block_mask is None:
        options["causal"] = True if causal is None else causal
        block_mask = create_causal_padding_block_mask(pads, query.shape[2], **options)
    if safe_padding:
        value = _zero(value, pads)
        if torch.is_grad_enabled():  # padded rows of query and key reach nothing but gradients
            query, key = _zero(query, _find_padded_queries(block_mask, query)), _zero(key, pads)
    scale = None if scale is None else float(scale)
    return _attend(query, key, value, score_mod, block_mask, scale, return_lse, backend)


def _cast_for_autocast(*tensors):
    """To the dtype of autocast, where it is enabled. Like SDPA it leaves float64 alone."""
    device = getattr(tensors[0], "device", torch.device("cpu")).type
    if not _is_cast_by_autocast(device):
        return tensors
    dtype, keep = torch.get_autocast_dtype(device), (None, torch.float64, torch.int64)
    return [x if getattr(x, "dtype", None) in keep else x.to(dtype) for x in tensors]


def _is_cast_by_autocast(device):
    return device != "meta" and torch.is_autocast_enabled(device)


def _zero(x, rows):
    return torch.where(rows[:, None, :, None], 0.0, x)  # in one pass, where masked_fill takes two


def _find_padded_queries(block_mask, query):
    """(B, L): True where the query is padding. With masks that were not made here, where it sees no key."""
    query_pads = getattr(block_mask.mask_mod, "query_pads", None)
    if query_pads is not None:
        return query_pads
    _, heads, q_len, kv_len = block_mask.shape
    sees, rows = [], max(1, 2**26 // (query.shape[0] * heads * kv_len))  # in parts of 64 MiB at most
    for start in range(0, q_len, rows):
        sizes = query.shape[0], heads, min(rows, q_len - start), kv_len
        moved = _move_queries(block_mask.mask_mod, torch.full((), start, device=query.device))
        sees.append(create_mask(moved, *sizes, query.device).any(-1).any(1))
    return ~torch.cat(sees, dim=1)


def _move_queries(mask_mod, start):
    return lambda b, h, q_idx, kv_idx: mask_mod(b, h, q_idx + start, kv_idx)


def _attend(query, key, value, score_mod, block_mask, scale, return_lse, backend="auto"):
    if not query.is_cuda:
        casts = _is_cast_by_autocast(query.device.type)
        with torch.autocast(query.device.type, enabled=False) if casts else nullcontext():
            return _attend_in_plain_operators(query, key, value, score_mod, block_mask, scale, return_lse)
    if backend == "auto":
        is_faster = _is_faster_with_flash(query, key, block_mask)
        usable = is_faster and _can_use_flash(query, key, value, score_mod, return_lse)
        backend = "flash" if usable else "triton"
    q_len = query.shape[2]
    if backend == "triton" and getattr(getattr(block_mask, "mask_mod", None), "is_filled", False):
        query, key, value, score_mod, block_mask = _fill_blocks(query, key, value, score_mod, block_mask)
    options = _kernel_options(query, key, value, block_mask, backend)
    is_traced = torch.compiler.is_compiling()
    run = _flex_attention if is_traced else _run_compiled  # there the caller compiles
    # Autograd hands a compiled function the gradient of its output contiguous, in a copy where it is a view.
    is_view = torch.is_grad_enabled() and not is_traced and _is_view_of_tokens(query)
    query = query.transpose(1, 2) if is_view else query
    result = run(query, key, value, score_mod, block_mask, scale, return_lse, options, is_view)
    output, *lse = result if return_lse else (result,)
    output = output[:, :q_len] if is_view else output[:, :, :q_len]
    output = output.transpose(1, 2) if is_view else output
    return (output, lse[0][:, :, :q_len]) if return_lse else output


def _is_view_of_tokens(x):
    """Whether x, (B, H, L, E), is a view of (B, L, H, E), as in models."""
    batch, head, token, element = x.stride()
    return batch >= token > head >= element


def _fill_blocks(query, key, value, score_mod, block_mask):
    """Fill the inputs up with zeros to whole blocks. The mask lets no token see what is added.

    Kernels for lengths that fill their tiles give other bits than kernels for lengths that do not. After this
    only the former are used, so a sequence gets the same bits in a batch of any length.
    """
    q_len, kv_len = block_mask.shape[2:]
    q_missing, kv_missing = (
        -n % block for n, block in zip((q_len, kv_len), block_mask.BLOCK_SIZE, strict=True)
    )
    # The output and its gradient are laid out like the query. Before torch 2.15 the batch size decides in
    # which order the backward pass adds up their products, unless both are contiguous.
    is_view = _SUMS_VIEWS_ALIKE and _is_view_of_tokens(query)
    if not q_missing and not kv_missing:
        return query if is_view else query.contiguous(), key, value, score_mod, block_mask
    modifies = None
    if score_mod is not None:  # it must not look anything up behind the end
        ends = torch.full_like(block_mask.kv_num_blocks[:, 0, 0], kv_len - 1)  # (B,)

        def modifies(score, b, h, q_idx, kv_idx):
            return score_mod(score, b, h, torch.minimum(q_idx, ends[b]), torch.minimum(kv_idx, ends[b]))

    query = _append(query, q_missing, is_view)
    key, value = (_append(x, kv_missing, _is_view_of_tokens(x)) for x in (key, value))
    filled = BlockMask(
        seq_lengths=(q_len + q_missing, kv_len + kv_missing),
        kv_num_blocks=block_mask.kv_num_blocks,
        kv_indices=block_mask.kv_indices,
        full_kv_num_blocks=block_mask.full_kv_num_blocks,
        full_kv_indices=block_mask.full_kv_indices,
        q_num_blocks=block_mask.q_num_blocks,
        q_indices=block_mask.q_indices,
        full_q_num_blocks=block_mask.full_q_num_blocks,
        full_q_indices=block_mask.full_q_indices,
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=block_mask.mask_mod,
    )
    return query, key, value, modifies, filled


def _append(x, count, as_view):
    """x, (B, H, L, E), and so many rows of zeros behind it: a view of (B, L, H, E), or contiguous."""
    if as_view:
        x = x.transpose(1, 2)
        return torch.cat([x, x.new_zeros(x.shape[0], count, *x.shape[2:])], dim=1).transpose(1, 2)
    return torch.cat([x, x.new_zeros(*x.shape[:2], count, x.shape[3])], dim=2)


def _attend_in_plain_operators(query, key, value, score_mod, block_mask, scale, return_lse):
    """For the CPU, where flex_attention has no gradients and needs a C++ compiler, and for other devices."""
    wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    # Not by repeat_interleave, of which torch 2.11 exports no dynamic length.
    head = torch.arange(query.shape[1], device=query.device) // group
    key, value = (x.to(wide).index_select(1, head) for x in (key, value))
    scores = query.to(wide) @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)  # (B, Hq, L, S)
    mask = None
    if block_mask is not None:
        _, heads, q_len, kv_len = block_mask.shape
        sizes = query.shape[0], heads, q_len, kv_len
        mask = create_mask(block_mask.mask_mod, *sizes, query.device)  # (B, H or 1, L, S)
    if score_mod is not None:
        scores = _modify_scores(scores, mask, score_mod).to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    # A softmax over no key is NaN. Such rows see every key here, and they and their gradients become zero.
    empty = scores.detach().amax(-1, keepdim=True).isneginf()
    scores = scores.masked_fill(empty, 0.0)
    output = (scores.softmax(-1) @ value).masked_fill(empty, 0.0).to(query.dtype)
    if not return_lse:
        return output
    return output, scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf).float()


def _modify_scores(scores, mask, score_mod):
    places = [
        torch.arange(n, device=scores.device).view([-1] + [1] * (3 - i)) for i, n in enumerate(scores.shape)
    ]
    given = [scores, *places]
    if mask is not None:
        # Where masked, evaluate a pair that is allowed: what is not finite there would have NaN for gradient.
        allowed = mask.expand_as(scores).flatten().int().argmax(0, keepdim=True)
        given = [torch.where(mask, x, x.expand_as(scores).flatten()[allowed]) for x in given]
    modified = score_mod(*given)
    rule = "score_mod must return a score for each pair: look up bias[b, h, q_idx, kv_idx], not bias[b][h]"
    _require(modified.shape == scores.shape, rule, scores=modified)
    return modified


def _run_compiled(*inputs):
    try:
        # Compiling flex_attention runs autograd. Were that in the thread of the device, it might wait there
        # for the first backward pass of another thread, which waits for the compiler.
        with torch.autograd.set_multithreading_enabled(False):
            return _compile(torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled())(*inputs)
    except Exception as error:  # in words that help, where torch's do not
        name = type(error).__name__  # some have no public one
        if name == "FailOnRecompileLimitHit":
            rule = (
                f"{_KINDS} kinds of input are compiled, the limit. Use fewer head sizes, dtypes, score_mods "
            )
            raise RuntimeError(rule + "or batch sizes that decode, or call torch.compiler.reset()") from error
        if "out of resource" in str(error):
            rule = "the shared memory of this card is too small for heads of this size: use half precision"
            query = inputs[0].transpose(1, 2) if inputs[-1] else inputs[0]
            _require(False, rule, query=query, key=inputs[1], value=inputs[2])
        captures_number = any(type(x) is float for x in _captured_by(inputs[3]))
        if captures_number and name in ("InductorError", "TorchRuntimeError"):
            raise ValueError(_NO_NUMBERS) from error
        raise


@cache
def _compile(same_bits, with_gradients):
    # With fullgraph torch raises at the limit; else it would run uncompiled, with memory for every score.
    # Left to itself it would also time ways to add up what decoding splits, and at times choose a slow one.
    how: dict[str, Any] = {"fullgraph": True, "options": {"deterministic": True, "max_autotune": False}}
    with _LOCK:
        if _HAS_BATCH_INVARIANT:  # sums in one order, whatever the batch size
            how["options"]["batch_invariant"] = True
        if with_gradients:
            # Sums in one order, however the inputs are laid out. Otherwise, if lengths are variable and the
            # output is a view, the backward pass rounds sums of output times gradient to half precision.
            how["options"]["pick_loop_orders"] = False
        if same_bits:
            # What decoding splits is added up term by term. The order in which Triton reduces depends on what
            # it knows of the strides, which differs between a batch of one and larger ones.
            how["options"]["unroll_reductions_threshold"] = _MOST_SPLITS + 1
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            how["recompile_limit"] = _KINDS
        else:  # torch 2.11
            torch.compiler.config.recompile_limit = max(_KINDS, torch.compiler.config.recompile_limit)
        return torch.compile(_flex_attention, **how)


_LOCK = threading.Lock()  # torch breaks where two threads import what it compiles with


def _flex_attention(query, key, value, score_mod, block_mask, scale, return_lse, options, is_view=False):
    query = query.transpose(1, 2) if is_view else query  # (B, Hq, L, E)
    _make_constant(query.shape[1], key.shape[1])
    # Otherwise Inductor asks whether the two are equal or the second is 1. Torch's cache of compiled graphs
    # joins such conditions without brackets, "a and b or c", and gave out a kernel for another block size.
    _require(query.shape[0] == value.shape[0], "query and value must have one batch size")
    if options["BACKEND"] == "TRITON_DECODE":
        _make_constant(query.shape[0])
    aux = AuxRequest(lse=True) if return_lse else None
    is_grouped = query.shape[1] != key.shape[1]
    result = flex_attention(
        query, key, value, score_mod, block_mask, scale, is_grouped, kernel_options=options, return_aux=aux
    )
    output, *rest = result if return_lse else (result,)
    output = output.transpose(1, 2) if is_view else output
    return (output, rest[0].lse) if return_lse else output


def _make_constant(*sizes):
    """Make these sizes constants of the compiled kernel, which is faster with them.

    A trace can only follow a loop if it knows how often the loop runs, so it takes the size for a constant.
    """
    for size in sizes:
        for _ in range(size):
            pass


# Which kernel. What was measured on H100 and H200 is used on Hopper; elsewhere torch chooses.


def _kernel_options(query, key, value, block_mask, backend="triton"):
    """The kernel_options of flex_attention."""
    if backend == "flash":
        return {"BACKEND": "FLASH"}
    if decoding := _decoding_options(query, key, value, block_mask):
        return decoding
    blocks = (128, 128) if block_mask is None else block_mask.BLOCK_SIZE
    # Whether no tile reaches past the end. Torch 2.11 sees it only in lengths that are compiled in, and
    # wrongly where a block of the mask is larger than 128.
    divisible = not (query.shape[2] % blocks[0] or key.shape[2] % blocks[1])
    # Left to itself torch takes the kernel for decoding for up to 127 queries, and finds no configuration of
    # it from 129 rows on.
    options = {"BACKEND": "TRITON", "IS_DIVISIBLE": divisible}
    on_hopper = _is_on_hopper(query) and query.element_size() == 2
    size, value_size = query.shape[3], value.shape[3]
    is_64, is_128 = on_hopper and size <= 64, on_hopper and max(size, value_size) == 128
    is_short, mask_mod = query.shape[2] < 128, getattr(block_mask, "mask_mod", None)
    has_first = getattr(mask_mod, "has_first", None)  # of masks that were made here
    # Torch compiles loads by descriptor (TMA) also for rows that begin between multiples of 16 bytes, and
    # then reads wrongly; while a caller's graph is traced, where they begin cannot be asked.
    between = any(n % 8 for x in (query, key, value) for n in x.stride()[:3])
    tma = {"fwd_USE_TMA": not (between or torch.compiler.is_compiling())}
    wide = 32 if (size + value_size) * query.element_size() <= 2048 else 16
    q_tile, kv_tile = (math.gcd(block, 128) for block in blocks)
    for holds, measured in (  # where, what; and above it why
        # Half the time of torch's tiles, which are mostly empty.
        (is_128 and is_short, _tiles(64, 64) | {"fwd_num_stages": 3, "fwd_num_warps": 4}),
        # Two programs share a multiprocessor: one multiplies while the other exponentiates.
        (is_128 and not is_short and has_first is False, {"fwd_num_stages": 2, "fwd_num_warps": 4} | tma),
        # But where runs begin late, by a window or documents, tiles are cut at both ends: larger ones gain.
        (is_128 and not is_short and has_first is True, {"fwd_BLOCK_N": 128}),
        # Torch's own tiles spill registers forward, and are slower backward.
        (is_64, {"fwd_BLOCK_N": 64, "bwd_num_warps": 4} | _tiles(64, 64, "bwd")),
        # Torch's own tiles of wide heads do not fit into shared memory.
        (value_size > 256 or size > 512, _tiles(wide, wide) | _tiles(wide, wide, "bwd") | _FEW_LOADS),
        # Smaller tiles have room for loads that run ahead forward, and need fewer warps backward.
        (
            is_128 and min(q_tile, kv_tile) == 64,
            {"fwd_num_stages": 3, "bwd_num_warps": 4, "bwd_num_stages": 2},
        ),
        # Tiles must divide the blocks of the mask.
        (min(q_tile, kv_tile) < 128, _tiles(q_tile, kv_tile) | _tiles(q_tile, kv_tile, "bwd")),
    ):
        options |= measured if holds else {}
    return options


_FEW_LOADS = {"fwd_num_stages": 1, "fwd_num_warps": 4, "bwd_num_stages": 1, "bwd_num_warps": 4}


def _tiles(queries, keys, passes="fwd"):
    """Tiles of so many queries and keys, at most 64, for one of the passes."""
    m, n = min(queries, 64), min(keys, 64)
    if passes == "fwd":
        return {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n}
    return {"bwd_BLOCK_M1": min(m, n), "bwd_BLOCK_N1": n, "bwd_BLOCK_M2": m, "bwd_BLOCK_N2": min(m, n)}


def _decoding_options(query, key, value, block_mask):
    """The options of the kernel for decoding, which splits the keys of few queries over the card.

    None where that kernel does not fit. Torch compiles it for one number of heads and one batch size.
    """
    (batch_size, heads, q_len, size), kv_heads = query.shape, key.shape[1]
    group, blocks = heads // kv_heads, (128, 128) if block_mask is None else block_mask.BLOCK_SIZE
    rows = max(group, 16 if q_len * group <= 16 else 64)  # of a tile: queries times group
    is_whole = q_len <= _DECODES and group & group - 1 == 0 and not (blocks[0] % rows or blocks[1] % 64)
    fits = is_whole and batch_size * kv_heads < 2**16  # the grid of CUDA
    if not fits or not (block_mask is None or block_mask.shape[1] == 1):
        return None
    keeps_bits = torch.are_deterministic_algorithms_enabled()
    options = {"BACKEND": "TRITON_DECODE", "IS_DIVISIBLE": False, "BLOCK_M": rows}
    if keeps_bits or _is_on_hopper(query):
        programs = 1024 if rows <= 16 else 256  # work for the whole card
        # In how many parts the sums over the keys are taken decides the bits.
        sequences = _SEQUENCES if keeps_bits else batch_size
        options["SPLIT_KV"] = min(_MOST_SPLITS, max(1, programs // (sequences * kv_heads)))
    if _is_on_hopper(query):
        width = max(size, value.shape[3]) * query.element_size()  # bytes
        stages = 3 if width <= 256 else 2 if width <= 512 else 1  # loads run ahead as far as they fit
        options |= {"fwd_num_warps": 4, "fwd_num_stages": stages}
        options["fwd_BLOCK_N"] = 64 if width <= 2048 else 32
    return options


def _is_on_hopper(x):
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9


def _can_use_flash(query, key, value, score_mod, return_lse):
    is_here = _HAS_FLASH and _is_on_hopper(query)  # the only kind of card it was tried on
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    sizes_fit = not any(size % 8 or size > 128 for size in (query.shape[3], value.shape[3]))  # its tiles, 128
    is_plain = score_mod is None and not return_lse  # torch 2.11 compiles few score_mods and scales the lse
    return is_here and is_half and sizes_fit and is_plain and query.shape[2] == key.shape[2]


def _is_faster_with_flash(query, key, block_mask):
    # Where the arithmetic outweighs its launch. What the padding leaves of it is known to the device alone.
    if block_mask is None or block_mask.BLOCK_SIZE != (128, 128):
        return False
    keys = key.shape[2]
    if getattr(block_mask.mask_mod, "is_computed", False):  # then they gain in short sequences, too
        keys = (keys + 2048) // 2
    return query.numel() * keys >= _FLASH_FROM and not torch.are_deterministic_algorithms_enabled()


# What does not fit.


def _check_attention(query, key, value, pads, block_mask, options, scale, score_mod, return_lse, backend):
    tensors = {"query": query, "key": key, "value": value, "pads": pads}
    _check_tensors(pads=pads)
    if isinstance(key, Tensor) and key.dim() == 4 and key.shape[2] != pads.shape[1] == key.shape[1]:
        _require(False, "heads must stand before the length: pass x.transpose(1, 2)", **tensors)
    _check_tensors(**tensors)
    rule = "score_mod must be a function of score, b, h, q_idx, kv_idx"
    _require(score_mod is None or callable(score_mod), rule, TypeError, score_mod=score_mod)
    is_number = scale is None or (not isinstance(scale, Tensor) and hasattr(scale, "__float__"))
    _require(is_number, "scale must be a float, such as scale.item()", TypeError, scale=scale)
    is_mask = block_mask is None or isinstance(block_mask, BlockMask)
    _require(is_mask, "block_mask must be a BlockMask", TypeError, block_mask=type(block_mask))
    divides = query.shape[1] % key.shape[1] == 0
    _require(divides, "the heads of query must be a multiple of those of key and value", **tensors)
    if query.is_cuda:
        _check_on_cuda(query, key, value, score_mod, tensors)
    _require(backend in ("auto", "triton", "flash"), _BACKENDS, backend=backend)
    flash = backend != "flash" or _can_use_flash(query, key, value, score_mod, return_lse)
    _require(flash, _FLASH_NEEDS, **tensors)
    if block_mask is None:
        known = options["causal"] is not False or query.shape[2] == key.shape[2]
        rule = "without causality, query_pads or a block_mask must say what the queries are"
        _require(known or options["query_pads"] is not None, rule, **tensors)
    else:
        _check_block_mask(query, key, value, pads, block_mask, options, score_mod)


_BACKENDS = 'backend must be "auto", "triton" or "flash"'
_FLASH_NEEDS = (
    'backend="flash" needs flash-attn-4 (pip install --pre flash-attn-4), a Hopper card, float16 or '
    "bfloat16, head sizes that are multiples of 8 up to 128, as many queries as keys, and neither score_mod "
    'nor return_lse; pass "auto"'
)


def _check_on_cuda(query, key, value, score_mod, tensors):
    rule = "on CUDA, flex_attention has no float64: cast to float32"
    _require(query.dtype != torch.float64, rule, TypeError, **tensors)
    rule = "on CUDA, head sizes must be at least 16: fill up with zeros"
    _require(min(query.shape[3], value.shape[3]) >= 16, rule, **tensors)
    rule = "on CUDA, a batch must be of at most 65535 sequences: make calls for parts of it"
    _require(query.shape[0] < 2**16, rule, **tensors)
    if torch.compiler.is_compiling():
        return
    rule = "compiled flex_attention has no torch.func: use torch.autograd.grad, and a batch for vmap"
    _require(not any(map(_is_of_torch_func, (query, key, value))), rule, TypeError, query=type(query))
    for place, x in enumerate(_captured_by(score_mod)):
        same = type(x) is not float or _CAPTURED.setdefault(place, x) == x
        _require(same, _NO_NUMBERS, captured=x, before=_CAPTURED.get(place))


_CAPTURED: dict[int, float] = {}  # what was captured at that place, of which torch 2.11 compiles a variable
_NO_NUMBERS = (
    "score_mod must not capture a number that changes, since torch computes wrongly or fails with it: write "
    "the number, or capture a tensor of one dimension and look it up, as in weight[h]"
)


def _captured_by(function):
    cells = getattr(function, "__closure__", None) or ()
    return [*(cell.cell_contents for cell in cells), *(getattr(function, "__defaults__", None) or ())]


def _check_block_mask(query, key, value, pads, block_mask, options, score_mod):
    given = [name for name, option in options.items() if option is not None]
    if given:
        rule = f"{' and '.join(given)} must not be given beside a block_mask: make the block_mask with them"
        _require(False, rule, **options)
    shape, device, mask_mod = block_mask.shape, block_mask.kv_num_blocks.device, block_mask.mask_mod
    q_block, kv_block = block_mask.BLOCK_SIZE
    shown = {"block_mask": (*shape, str(device)), "query": query, "key": key, "pads": pads}
    is_sliced = getattr(mask_mod, "__name__", "") == "_sliced_mask_mod_error"  # torch's own mark
    rule = "block_mask is a slice, which has no mask_mod: make a block_mask of a slice of pads"
    _require(not is_sliced, rule, **shown)
    heads = query.shape[1] if shape[1] > 1 else 1
    fits = shape == (query.shape[0], heads, query.shape[2], key.shape[2]) and device == pads.device
    rule = "block_mask must fit: make it with create_causal_padding_block_mask(pads, query.shape[2])"
    _require(fits, rule, **shown)
    if torch.is_grad_enabled():
        differentiated = [query, key, value]
        if block_mask.q_num_blocks is None and not torch.compiler.is_compiling():
            differentiated += [x for x in _captured_by(score_mod) if isinstance(x, Tensor)]
        wants_grad = any(x.requires_grad for x in differentiated)
        rule = "block_mask was made under torch.no_grad: make it where gradients are wanted"
        _require(block_mask.q_num_blocks is not None or not wants_grad, rule, **shown)
        trains = wants_grad and query.is_cuda and query.element_size() == 2 and not _TILES_SHRINK
        rule = "before torch 2.14 gradients in half precision need a BLOCK_SIZE of multiples of 128"
        _require(not (trains and (q_block % 128 or kv_block % 128)), rule, BLOCK_SIZE=(q_block, kv_block))
    rule = "on CUDA, BLOCK_SIZE must be a multiple of 16"
    _require(not (query.is_cuda and (q_block % 16 or kv_block % 16)), rule, BLOCK_SIZE=(q_block, kv_block))


# ---- all above is one piece to paste: it needs torch alone ------------------------------------------------


# ---- 4. The reference -------------------------------------------------------------------------------------


def sdpa_reference(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *, causal: bool = True,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The same attention by `scaled_dot_product_attention` with the explicit mask, of B L S flags.

    Args:
        query: (B, Hq, L, E), the last L tokens of the sequence.
        key: (B, Hkv, S, E). Hq must be a multiple of Hkv.
        value: (B, Hkv, S, Ev).
        pads: (B, S), torch.bool, True where the token is padding.
        causal: whether a query sees only the keys up to its own place.
        scale: the factor of the scores before the softmax. None stands for 1 / sqrt(E).

    Returns:
        (B, Hq, L, Ev). Padded query rows are exact zeros, and receive and give exact zero gradients.

    Raises:
        TypeError, ValueError: `pads` is not a torch.bool tensor of two dimensions, or it is empty.
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


def _explicit_mask(pads, q_len, causal):
    """What the last q_len tokens see, (B, 1, L, S), and which of them see nothing, (B, 1, L, 1)."""
    _check_tensors(pads=pads)
    start = pads.shape[1] - q_len
    mask = ~pads[:, None, start:, None] & ~pads[:, None, None, :]
    mask = mask.tril(start) if causal else mask
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty  # those see everything: a softmax over no key is NaN in some kernels


# ---- 5. Adapters ------------------------------------------------------------------------------------------


def sequence_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, mesh: Any, **kwargs: Any
) -> Any:
    """Run `causal_padded_attention` on sequences that are sharded over the ranks of a mesh.

    Each rank gives its tokens, receives all tokens of some of the heads, attends, and gives the output back:
    one all-to-all before and one after attention, and the same for gradients, as in DeepSpeed-Ulysses,
    https://arxiv.org/abs/2309.14509.

    Args:
        query: (B, Hq, S / ranks, E), the tokens of this rank. Ranks hold the sequence in their order.
        key: (B, Hkv, S / ranks, E).
        value: (B, Hkv, S / ranks, Ev).
        pads: (B, S), torch.bool, True where the token is padding: of the whole sequence, on every rank.
        mesh: a DeviceMesh of one dimension. Its size must divide Hq, and divide Hkv or be a multiple of it.
        kwargs: the options of `causal_padded_attention`. Tensors among them, and a block mask, are of the
            whole sequence, on every rank.

    Returns:
        (B, Hq, S / ranks, Ev), the output for the tokens of this rank. With return_lse, also theirs.

    Raises:
        TypeError, ValueError: the mesh, the length or the heads do not fit, or what
            `causal_padded_attention` says.
    """
    query, key, value = _cast_for_autocast(query, key, value)
    ranks, heads, kv_heads = mesh.size(), query.shape[1], key.shape[1]
    _require(
        mesh.ndim == 1, "mesh must have one dimension, over which the sequence is sharded", ndim=mesh.ndim
    )
    for name, x in (("query", query), ("key", key), ("value", value)):
        rule = f"{name} must be this rank's part, of shape (B, heads, length of pads / ranks, head size)"
        is_part = x.dim() == 4 and x.shape[2] * ranks == pads.shape[-1]
        _require(is_part, rule, **{name: x}, pads=pads, ranks=ranks)
    fits = heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
    rule = "ranks must divide the heads of query, and divide those of key or be a multiple of them: use fewer"
    _require(fits, rule, ranks=ranks, heads=(heads, kv_heads))
    if ranks == 1:
        return causal_padded_attention(query, key, value, pads, **kwargs)
    copies, group = ranks // kv_heads, mesh.get_group()
    if copies > 1:  # each head of key and value goes to several ranks
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    query, key, value = (_Exchange.apply(x, 2, group) for x in (query, key, value))  # (B, H / ranks, S, E)
    result = causal_padded_attention(query, key, value, pads, **kwargs)
    if isinstance(result, tuple):
        return tuple(_Exchange.apply(x, 1, group) for x in result)
    return _Exchange.apply(result, 1, group)


class _Exchange(torch.autograd.Function):
    """Gather the heads (dimension 1) or the tokens (dimension 2), and share out the other dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathered: int, group: Any) -> Tensor:
        ctx.gathered, ctx.group = gathered, group
        # (ranks, gathered, B, share, E): with the gathered dimension outermost the parts come in order.
        sent = x.movedim(gathered, 0).unflatten(2, (group.size(), -1)).movedim(2, 0).contiguous()
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=group)
        return received.flatten(0, 1).movedim(0, gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Exchange.apply(grad, 3 - ctx.gathered, ctx.group), None, None


def register_transformers() -> None:
    """Make transformers models with attn_implementation="flex_attention" use the masks and kernels here.

    Raises:
        ImportError: transformers is not installed, or it is older than version 5.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionMaskInterface.register("flex_attention", transformers_block_mask)
    AttentionInterface.register("flex_attention", transformers_attention)


def transformers_block_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Any = None, attention_mask: Tensor | None = None, device: Any = "cpu", **kwargs: Any,
) -> BlockMask:  # fmt: skip
    """Build the masks of transformers in closed form.

    The mask function is called once, with stand-ins for its arguments that work out the run of keys of each
    query. A mask in which some query sees more than one run, or whose function does something that the
    stand-ins do not support, is left to the function of transformers that this one replaces. Whether the
    numbers of packed sequences or of images make runs is read from the device. In a compiled model it is
    asserted on the device instead.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function: what transformers passes to its
            own function.
        attention_mask: (B, up to kv_offset + S), 0 or False where the token is padding. None means that there
            is no padding.
        device, kwargs: what transformers passes to its own function.

    Returns:
        A BlockMask of shape (B, 1, L, S). Padded queries of a causal mask see nothing here; in transformers
        they see the keys before them.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
    from transformers.masking_utils import flex_attention_mask as theirs  # as it is now: it may be replaced

    if attention_mask is None:
        pads = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        pads = attention_mask[:, kv_offset : kv_offset + kv_length] == 0
        pads = F.pad(pads, (0, kv_length - pads.shape[1]), value=True)  # what a static cache has room for
    offset = q_offset - kv_offset if kv_offset else q_offset
    offset = offset.reshape(()) if isinstance(offset, Tensor) else offset  # (1,) in some versions
    # A decoder makes this one at every step, so it goes the shortest way.
    if mask_function in (None, causal_mask_function):
        return create_causal_padding_block_mask(pads, q_length, q_offset=offset)
    keys = torch.arange(kv_length, dtype=torch.int32, device=device)
    if isinstance(offset, Tensor) and q_length == 1:
        queries = offset.reshape(1).int()  # (L,), their places among the keys
    else:
        queries = torch.arange(q_length, dtype=torch.int32, device=device) + offset
    if mask_function is bidirectional_mask_function or "allow_is_bidirectional_skip" in kwargs:
        # They may be other tokens than the keys, and nothing says which of them are padding.
        query_pads = pads.new_zeros(batch_size, q_length)
    else:
        query_pads = pads.index_select(1, queries)
    try:
        own_pads = None if attention_mask is None else pads
        first, last, is_run = _find_runs_of(mask_function, batch_size, keys, queries, kv_offset, own_pads)
        is_run = is_run if is_run is True else torch.all(is_run | query_pads)
        if is_run is not True and torch.compiler.is_compiling():
            # It has no public name.
            torch._assert_async(is_run, "a query does not see one run of keys: use sdpa")
        elif not is_run:
            raise TypeError
    except Exception:  # what a mask function does to a stand-in may fail in any way
        if isinstance(q_offset, Tensor):
            q_offset = q_offset.clone()  # a static cache moves it before attention asks this mask
        sizes: Any = batch_size, q_length, kv_length, q_offset, kv_offset
        return theirs(*sizes, mask_function, attention_mask, device, **kwargs)  # type: ignore
    return _build_from_runs(first, last, None, keys, pads, query_pads, (128, 128))


def _find_runs_of(mask_function, batch_size, keys, queries, kv_offset, pads):
    """The first and the last key that each query sees, and whether it sees all real keys between them.

    Each is (B or 1, L). A first of None stands for 0. A plain True stands for all queries.
    """
    batch = torch.arange(batch_size, dtype=torch.int32, device=keys.device)[:, None]
    query, key = (_Numbers(side, x[None], kv_offset) for side, x in (("query", queries), ("key", keys)))
    key.is_place = True
    with _LookUp(queries, pads):
        run = _as_run(mask_function(_Numbers("batch", batch), _StandIn(), query, key))
    last = run.last if isinstance(run.last, Tensor) else queries.new_full((1, 1), run.last)
    as_table = lambda x: (x if x.dtype == torch.int32 else x.clamp(-1, _END).int()).expand(
        -1, queries.shape[0]
    )
    return as_table(run.first) if isinstance(run.first, Tensor) else None, as_table(last), run.high == _END


class _StandIn:
    """Stands for an argument of a mask function, or for what is computed of it. The rest is a TypeError."""

    device = None

    def __eq__(self, other):
        raise TypeError

    def __bool__(self):
        raise TypeError


class _Numbers(_StandIn):
    """Numbers of the batch, (B, 1), of the queries, (B or 1, L), or of the keys, (B or 1, S): base + more.

    Numbers of keys that were looked up in a table may fall. `table` is then the places of the queries, and
    the pads.
    """

    def __init__(self, side, base, more=0, table=None):
        self.side, self.base, self.more, self.table = side, base, more, table
        self.is_place = False  # of the keys: whether base is their places

    @property
    def values(self):
        return self.base + self.more if self.more else self.base

    def _with(self, operation, other):
        if isinstance(other, _Numbers) and other.side == "batch":
            return _Numbers(self.side, operation(self.values, other.values), 0, self.table)
        if not _is_int(other) or not -_END < other < _END:  # so that 32 bits hold what comes of it
            raise TypeError
        result = _Numbers(self.side, self.base, operation(self.more, other), self.table)
        result.is_place = self.is_place
        return result

    def __sub__(self, other):
        is_difference = self.side == "query" and isinstance(other, _Numbers) and other.side == "key"
        return _Difference(self, other) if is_difference else self._with(sub, other)

    def __floordiv__(self, size):
        if not (_is_int(size) and size > 0):
            raise TypeError
        return _Numbers(self.side, self.values // size, 0, self.table)

    __add__ = lambda self, other: self._with(add, other)
    __lt__ = lambda self, other: _compare(self, lt, other)
    __le__ = lambda self, other: _compare(self, le, other)
    __gt__ = lambda self, other: _compare(self, gt, other)
    __ge__ = lambda self, other: _compare(self, ge, other)
    __eq__ = lambda self, other: _compare(self, eq, other)
    new_ones = lambda self, *args, **kwargs: _Run()
    new_zeros = lambda self, *args, **kwargs: _Nothing()


class _Difference(_StandIn):
    def __init__(self, query, key):
        self.query, self.key = query, key

    __abs__ = lambda self: _Distance(self.query, self.key)


class _Distance(_Difference):
    __le__ = lambda self, most: (self.key >= self.query - most) & (self.key <= self.query + most)
    __lt__ = lambda self, limit: self <= limit - 1


class _Nothing(_StandIn):
    __or__ = lambda self, run: _as_run(run)  # it is what a union begins with


class _Run(_StandIn):
    """The keys from first to last, (B or 1, L or 1), or a number where there is no limit.

    This is known for the keys from low to high only, or for all keys where high is _END.
    """

    def __init__(self, first=0, last=_END, low=0, high=_END):
        self.first, self.last, self.low, self.high = first, last, low, high

    to = lambda self, device: self

    def __and__(self, other):
        other = _as_run(other)
        first, last = (
            _pick(torch.maximum, self.first, other.first),
            _pick(torch.minimum, self.last, other.last),
        )
        low, high = _pick(torch.maximum, self.low, other.low), _pick(torch.minimum, self.high, other.high)
        for x, y in ((self, other), (other, self)):
            if isinstance(x.high, Tensor):
                # What x does not know does not matter where y, which must be known, allows nothing.
                settled = (y.first > y.last) | (x.low <= y.first) & (y.last <= x.high)
                settled = settled & (y.high == _END)
                low, high = torch.where(settled, 0, low), torch.where(settled, _END, high)
        return _Run(first, last, low, high)

    def __or__(self, other):
        other, ends = _as_run(other), []
        for run in (self, other):
            if not isinstance(run.first, Tensor) and not isinstance(run.last, Tensor):
                return run  # all keys
            is_empty = (run.last < run.first) | (run.last < 0)
            ends.append((torch.where(is_empty, _END, run.first), torch.where(is_empty, -1, run.last)))
        (first, last), (begin, end) = ends
        # It is one run if the two overlap or touch, or if one of them is empty.
        is_one = (first <= end + 1) & (begin <= last + 1) | (last < 0) | (end < 0)
        low, high = _pick(torch.maximum, self.low, other.low), _pick(torch.minimum, self.high, other.high)
        high = torch.where(is_one, high, -1)
        return _Run(torch.minimum(first, begin), torch.maximum(last, end), low, high)


def _pick(choose, x, y):
    return x if not isinstance(y, Tensor) else y if not isinstance(x, Tensor) else choose(x, y)


def _as_run(x):
    if isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.bool:  # one answer for all pairs
        is_known = x.device.type == "cpu" and not torch.compiler.is_compiling()
        x = _Run() if is_known and x else None
    if not isinstance(x, _Run):
        raise TypeError
    return x


def _compare(x, how, y):
    """The keys for which numbers of the queries, or of the batch, compare so with numbers of the keys."""
    if isinstance(y, _Numbers) and y.side == "key":
        x, how, y = y, {lt: gt, le: ge, gt: lt, ge: le, eq: eq}[how], x
    if _is_int(y):
        y = _Numbers("batch", torch.full_like(x.values[:1, :1], y))
    if not isinstance(y, _Numbers) or y.side == "key":
        raise TypeError
    if x.side != "key":  # all keys, or none
        return _Run(0, torch.where(how(x.values, y.values), _END, -1))
    low, high = 0, _END
    if x.is_place:
        if y.base.dtype != torch.int32:
            y = _Numbers(y.side, y.values.clamp(-_END, _END))
        far = y.more - x.more
        at = lambda more: y.base + more if more else y.base
        first = at(far) if how in (ge, eq) else at(far + 1) if how is gt else 0
        return _Run(first, at(far) if how in (le, eq) else at(far - 1) if how is lt else _END)
    if x.table is not None:
        find = _opaque_find_in_pieces if torch.compiler.is_compiling() else _find_in_pieces
        begin, end, low, high = find(x.values, y.values, *x.table, how is eq)
    else:
        begin, end = _search(x.values, y.values)
    first = begin if how in (ge, eq) else end + 1 if how is gt else 0
    last = end if how in (le, eq) else begin - 1 if how is lt else _END
    return _Run(first, last, low, high)


def _search(keys, wanted):
    """Where in each row of keys, which do not fall, the wanted numbers begin and end, or would."""
    rows = max(keys.shape[0], wanted.shape[0])
    # Torch 2.11 cannot compile an expand that changes nothing.
    keys, wanted = (x.long() if x.shape[0] == rows else x.long().expand(rows, -1) for x in (keys, wanted))
    search = partial(torch.searchsorted, keys.contiguous(), wanted.contiguous(), out_int32=True)
    return search(), search(right=True) - 1


def _find_in_pieces(
    keys: Tensor, wanted: Tensor, queries: Tensor, pads: Tensor | None, is_equal: bool
) -> list[Tensor]:
    """Where in each row of keys, which may fall, the wanted numbers begin and end, as far as is known.

    Where the numbers fall a piece begins. A query looks in the piece that it stands in.

    Returns:
        begin, end, low, high: (B, L). The first two are right for the keys from low to high.
    """
    if pads is not None:  # padding may have any number: it gets that of the real token before it
        places = torch.arange(pads.shape[1], device=pads.device)
        real = torch.where(pads, -1, places).cummax(1).values
        keys = keys.expand_as(pads).gather(1, real.clamp(min=0)).masked_fill(real < 0, -1)
    keys = keys.expand(max(keys.shape[0], wanted.shape[0]), -1)
    own = queries.long().clamp(0, keys.shape[1] - 1).expand(keys.shape[0], -1)
    steps = keys.diff()
    pieces = F.pad((steps < 0).cumsum(1), (1, 0))
    piece = pieces.gather(1, own)
    low, high = _search(pieces, piece)
    if is_equal:
        # Each number that is not negative has one place, if it is larger than all before where it begins.
        again = (steps != 0) & (keys[:, 1:] >= 0) & (keys[:, 1:] <= keys.cummax(1).values[:, :-1])
        once = (wanted >= 0) & (keys.gather(1, own) == wanted) & ~again.any(1, keepdim=True)
        low, high = torch.where(once, 0, low), torch.where(once, _END, high)
    high = torch.where((keys == keys.int()).all(), high, -1)  # the piece takes the bits above
    wanted = wanted.clamp(-(2**31) - 1, 2**31)
    begin, end = _search(keys + (pieces << 33), wanted + (piece << 33))
    return [begin, end, low, high]


# This is an operator of its own, because torch 2.11 fails to compile some uses of cummax and searchsorted.
_opaque_find_in_pieces = torch.library.custom_op(
    "causal_padded::find_in_pieces", _find_in_pieces, mutates_args=()
)


@_opaque_find_in_pieces.register_fake
def _(keys, wanted, queries, pads, is_equal):
    rows = max(keys.shape[0], wanted.shape[0]) if pads is None else pads.shape[0]
    return [keys.new_empty(rows, queries.shape[0], dtype=torch.int32) for _ in range(4)]


class _LookUp(TorchFunctionMode):
    """Inside of this mode a tensor can be indexed by stand-ins, as in table[batch, key]."""

    def __init__(self, queries, pads):
        super().__init__()
        self.queries, self.pads = queries, pads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        index = args[1] if len(args) == 2 and isinstance(args[1], tuple) else args[1:2]
        stand_ins = [x for x in index if isinstance(x, _StandIn)]
        if function is not torch.Tensor.__getitem__ or not stand_ins:
            return function(*args, **(kwargs or {}))
        numbers = args[0][tuple(x.values if isinstance(x, _StandIn) else x for x in index)]
        sides = {x.side for x in stand_ins} - {"batch"}
        if numbers.dim() != 2 or numbers.dtype not in _INTEGERS or len(sides) > 1:
            raise TypeError
        (side,) = sides or {"batch"}
        return _Numbers(side, numbers.long(), 0, (self.queries, self.pads) if side == "key" else None)


def transformers_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Run the "flex_attention" of transformers with the kernels of `causal_padded_attention`.

    Args:
        module, query, key, value, attention_mask, scaling: what transformers passes to an attention function.
            A dense mask is added to the scores, or says where they are computed if it is boolean.
        softcap: the bound that scores are softly limited to.
        s_aux: (Hq,), the attention sinks.
        position_bias: (B or 1, Hq, L, S), added to the scores.
        kwargs: what else transformers passes. Only dropout is looked at.

    Returns:
        The output, (B, L, Hq, Ev), and None in the place of the weights.

    Raises:
        ValueError: transformers asks for dropout, which flex_attention does not support.
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
    # A number would be compiled in, and torch fails where it changes: another model may have another one.
    cap = (
        None if softcap is None else torch.full_like(query[0, :, 0, 0], softcap, dtype=torch.float32)
    )  # (Hq,)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if cap is not None:
            score = cap[h] * torch.tanh(score / cap[h])
        for bias in biases:
            score = score + bias[b, h, q_idx, kv_idx]
        return score

    modifies = score_mod if biases or cap is not None else None
    result = _attend(query, key, value, modifies, block_mask, scaling, s_aux is not None)
    if s_aux is not None:  # a sink is one more key, with a value of zero, that takes its share of the softmax
        share = torch.sigmoid(result[1] - s_aux.float()[:, None])  # (B, Hq, L)
        result = result[0] * share.unsqueeze(-1).to(result[0].dtype)
    return result.transpose(1, 2).contiguous(), None


# ---- 6. The demonstration: python causal_padded_flexattn.py -----------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration. --help lists its options.

    Args:
        argv: the arguments of the command line. None stands for those of the process.

    Returns:
        The exit status: 0 if every check holds, 1 if one does not, 2 if arguments do not fit or there is no
        C++ compiler.
    """
    import logging
    import os
    import sys
    import warnings

    args = _parse(argv)
    # Nobody can act on these warnings: flex_attention is left uncompiled on purpose, a CUDA toolkit may be
    # here without a card, and Triton 3.9 speaks of a default of its own, in background processes too.
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile|TRITON_DEFAULT_FP_FUSION")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
    # A single kernel on the CPU does not repay precompiled headers. Torch reads this when it first compiles.
    os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    try:
        wrong = _demonstrate(args)
    except (TypeError, ValueError) as error:
        print(f"causal_padded_flexattn.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        print("torch.compile found no C++ compiler: install g++, or name another in CXX", file=sys.stderr)
        return 2
    if wrong:
        print(f"These results are wrong: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def _parse(argv):
    import argparse
    import importlib
    from pathlib import Path

    def count(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
        return int(text)

    about = "Causal attention over a padded batch: FlexAttention checked against SDPA, timed, and drawn."
    parser = argparse.ArgumentParser(description=about, usage=argparse.SUPPRESS)  # an error is one line, then
    add, fail = parser.add_argument, parser.error
    add("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16; float32 on the CPU")
    add("--heads", type=count, metavar="H", help="query heads; default: 16; 4 on the CPU")
    add("--kv-heads", type=count, metavar="H", help="key and value heads; default: as many as query heads")
    add("--head-dim", type=count, metavar="D", default=64, help="size of a head; default: 64")
    add(
        "--max-seq-len", type=count, metavar="S", help="tokens of a padded row; default: 4096; 512 on the CPU"
    )
    add("--lengths", type=lambda x: [*map(count, x.split(","))], metavar="N,N,...", help="default: random")
    add("--padding-side", choices=["right", "left"], default="right", help="default: right")
    add("--compile", action="store_true", help="check the compiled flex_attention on the CPU too")
    add("--output", type=Path, metavar="PATH", help="default: causal_padding_mask.png, or ..._left.png")
    add("--no-figure", action="store_true", help="draw nothing")
    args = parser.parse_args(argv)

    if args.device == "cuda" and not torch.cuda.is_available():
        fail("torch sees no CUDA device: pass --device cpu, or install a CUDA build of torch")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = ("float32", 4, 4, 512) if args.device == "cpu" else ("bfloat16", 8, 16, 4096)
    args.dtype, args.heads = args.dtype or sizes[0], args.heads or sizes[2]
    args.kv_heads, args.max_seq_len = args.kv_heads or args.heads, args.max_seq_len or sizes[3]
    torch.manual_seed(0)
    drawn = torch.randint(max(1, args.max_seq_len // 8), args.max_seq_len + 1, (sizes[1],))
    args.lengths = args.lengths or drawn.tolist()
    if max(args.lengths) > args.max_seq_len:
        fail(f"--lengths has {max(args.lengths)} tokens: raise --max-seq-len {args.max_seq_len}")
    if not args.no_figure:
        side = "_left" if args.padding_side == "left" else ""
        args.output = args.output or Path(f"causal_padding_mask{side}.png")
        if args.output.suffix != ".png" or not args.output.parent.is_dir():
            fail(f"--output must be a .png file in a folder that exists; got {args.output}")
        try:
            for package in ("matplotlib", "attn_gym"):
                importlib.import_module(package)
        except Exception as error:  # not only ImportError: a broken installation can raise anything
            why = f"needs attn_gym and matplotlib ({type(error).__name__}: {error})"
            fail(f"the figure {why}: pip install attn-gym matplotlib, or pass --no-figure")
    return args


def _demonstrate(args):
    """Print the report, draw the figure, and return the names of what is wrong."""
    from functools import partial

    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    on_cuda, batch_size, length = args.device == "cuda", len(args.lengths), args.max_seq_len
    pads = _pads(args.lengths, length, args.padding_side, args.device)  # (B, S)
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    *inputs, grad = (torch.randn(batch_size, n, length, args.head_dim, **like) for n in heads)
    card = torch.cuda.get_device_name() if on_cuda else "CPU"
    padding = f"{pads.float().mean():.0%} of them padding on the {args.padding_side}"
    shape = f"{args.heads} query and {args.kv_heads} key heads of size {args.head_dim}"
    _say("device", f"torch {torch.__version__}, {args.dtype}, {card}")
    _say("batch", f"{batch_size} x {length} tokens, {padding}; {shape}")

    # The mask of the textbook, and the same in closed form.
    mask_mod = and_masks(causal, create_padding_mask(pads))
    make_textbook = partial(create_block_mask, mask_mod, batch_size, None, length, length, args.device)
    textbook, ours = make_textbook(), create_causal_padding_block_mask(pads)
    names = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
    same = all(torch.equal(getattr(ours, name), getattr(textbook, name)) for name in names)
    same = same and torch.equal(ours.to_dense(), textbook.to_dense())
    full, partly = ours.full_kv_num_blocks.sum(), ours.kv_num_blocks.sum()
    tiles = f"{full} full, {partly} partial, {ours.kv_indices.numel() - full - partly} skipped"
    _say("mask", f"tiles of 128 x 128 scores: {tiles}; as create_block_mask finds them: {_verdict(same)}")
    wrong = [] if same else ["the tiles of the mask"]

    attend = partial(causal_padded_attention, pads=pads, block_mask=ours)
    # First, since its checks say what does not fit.
    results = {"causal_padded_attention": _differentiate(attend, inputs, grad)}
    flex = partial(flex_attention, block_mask=textbook, enable_gqa=args.heads != args.kv_heads)
    compiled = partial(torch.compile(flex_attention), **flex.keywords)
    if not on_cuda:  # where flex_attention has no gradients
        results["flex_attention"] = _differentiate(flex, inputs, None)
    if on_cuda or args.compile:
        results["compiled flex_attention"] = _differentiate(compiled, inputs, grad if on_cuda else None)
    _say("check", "the largest error, beside that of SDPA with an explicit mask in the same precision")
    exact, own = _references(inputs, grad, pads)
    for way, tensors in results.items():
        _say("", way)
        wrong += [f"{name} of {way}" for name in _find_wrong(tensors, exact, own)]
    if on_cuda:
        _print_times(inputs, grad, pads, make_textbook, compiled.func)
    else:
        _say("speed", "run this on a CUDA GPU to see it: the CPU computes every score, padding or not")
    if not args.no_figure:
        _draw_mask(args.output, args.padding_side)
    return wrong


def _say(label, text):
    print(f"{label:<8}{text}", flush=True)


def _verdict(holds):
    return "ok" if holds else "WRONG"


def _pads(lengths, max_seq_len, padding_side, device="cpu"):
    """(B, max_seq_len): True where a sequence of that length, padded on that side, holds padding."""
    places, length = torch.arange(max_seq_len, device=device), torch.tensor(lengths, device=device)[:, None]
    return places >= length if padding_side == "right" else places < max_seq_len - length


def _differentiate(attention, inputs, grad):
    """The output and, given its gradient, the gradients of the inputs."""
    inputs = [x.detach().requires_grad_(grad is not None) for x in inputs]
    output = attention(*inputs)
    return [output] if grad is None else [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def _references(inputs, grad, pads):
    """The output and the gradients of SDPA with the explicit mask, in higher precision and in the same."""
    higher, exact = torch.float64 if inputs[0].dtype == torch.float32 else torch.float32, []
    for i in range(pads.shape[0]):  # one sequence at a time, as float64 has no kernel that saves memory
        *row, row_grad = (x[i : i + 1].to(higher) for x in (*inputs, grad))
        exact.append(_differentiate(lambda *x, i=i: sdpa_reference(*x, pads[i : i + 1]), row, row_grad))
    own = _differentiate(lambda *x: sdpa_reference(*x, pads), inputs, grad)
    return [torch.cat(parts) for parts in zip(*exact, strict=True)], own


def _find_wrong(results, exact, own):
    """Print the errors, and return the names of the results whose error is too large."""
    wrong, names = [], ("output", "query gradient", "key gradient", "value gradient")
    for name, result, truth, plain in zip(names, results, exact, own, strict=False):
        error, own_error = ((x - truth).abs().max().item() for x in (result, plain))
        # As FlashAttention tests: twice the error of plain PyTorch, thrice for gradients, and two roundings.
        # And 16 roundings of float32, in which kernels compute a weight as a power of 2.
        eps = 2 * torch.finfo(result.dtype).eps + 16 * torch.finfo(torch.float32).eps
        allowed = (2 if name == "output" else 3) * own_error + eps * truth.abs().max().item()
        text = f"{error:.1e} (SDPA's own {own_error:.1e}, allowed {allowed:.1e})"
        _say("", f"  {name:<16}{text} {_verdict(error <= allowed)}")
        wrong += [] if error <= allowed else [name]
    return wrong


def _print_times(inputs, grad, pads, make_textbook, flex):
    from torch.utils.benchmark import Timer

    grouped = {"enable_gqa": inputs[0].shape[1] != inputs[1].shape[1]}
    sdpa = lambda *x, **how: F.scaled_dot_product_attention(*x, **how, **grouped)
    ways = {  # how to make the mask, and how to attend with it
        "create_block_mask, flex_attention": (
            make_textbook,
            lambda *x, mask: flex(*x, block_mask=mask, **grouped),
        ),
        "causal_padded_attention": (
            lambda: create_causal_padding_block_mask(pads),
            lambda *x, mask: causal_padded_attention(*x, pads, block_mask=mask),
        ),
        "SDPA, explicit mask": (
            lambda: _explicit_mask(pads, pads.shape[1], True)[0],
            lambda *x, mask: sdpa(*x, attn_mask=mask),
        ),
    }
    if not pads[:, 0].any():  # real tokens on the left: causality keeps them from seeing the padding
        ways["SDPA, is_causal=True, with the padding"] = (
            lambda: None,
            lambda *x, mask: sdpa(*x, is_causal=True),
        )
    _say("times", f"{'median milliseconds':<40}forward   + backward   + making the mask")
    for name, (make, attend) in ways.items():
        mask, times = make(), []
        for once, passes in ((lambda mask=mask: mask, None), (lambda mask=mask: mask, grad), (make, grad)):
            way = lambda *x, attend=attend, once=once: attend(*x, mask=once())
            names = {"run": _differentiate, "way": way, "inputs": inputs, "grad": passes}
            timer = Timer("run(way, inputs, grad)", globals=names, num_threads=torch.get_num_threads())
            times.append(timer.blocked_autorange(min_run_time=0.3).median * 1e3)
        _say("", f"{name:<40}{times[0]:7.2f}   {times[1]:10.2f}   {times[2]:17.2f}")


def _draw_mask(path, padding_side):
    """With attention-gym, the mask of a sequence of 8 tokens, padded to 12."""
    import contextlib
    import io

    import matplotlib

    matplotlib.use("Agg")  # no window, also where a display exists
    from attn_gym import visualize_attention_scores
    from torch.nn.attention.flex_attention import and_masks

    example = f"8 tokens, padded to 12 on the {padding_side}"
    mask_mod = and_masks(causal, create_padding_mask(_pads([8], 12, padding_side)))
    drawn = {"mask_mod": mask_mod, "device": "cpu", "name": f"causal padding mask: {example}", "path": path}
    with contextlib.redirect_stdout(io.StringIO()):  # only the shape of these inputs is drawn, (B, H, S, E)
        visualize_attention_scores(torch.ones(1, 1, 12, 8), torch.ones(1, 1, 12, 8), **drawn)
    _say("figure", f"{path} shows the mask of a small example: {example}")


if __name__ == "__main__":
    raise SystemExit(main())
