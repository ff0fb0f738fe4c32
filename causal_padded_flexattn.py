# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "attn-gym>=0.0.3", "matplotlib"]
# ///
"""Causal attention over a padded batch with PyTorch's FlexAttention, https://arxiv.org/abs/2412.05496.

    block_mask = create_causal_padding_block_mask(pads)  # once for a batch: which tiles of scores to compute
    output = attend(query, key, value, block_mask)  # in every layer

A mask_mod says which pairs of a query and a key are allowed. A block mask lists the tiles, blocks of scores,
that hold such pairs. Part 1 is the textbook: attention as FlexAttention's documentation has it. Part 2 finds
the block mask without asking about every pair. Part 3 is the attention to use, part 4 a reference. Part 5 is
the demonstration: run as a script, this file compares itself with SDPA, is timed on a GPU, and draws the
mask. Part 6 checks arguments, part 7 chooses kernels, and part 8 says when results are the same to the bit.
To vendor the file, copy all of it, or leave out parts 4 and 5 and the last two lines. All but the figure
needs torch alone.

Shapes are written as in torch.nn.functional.scaled_dot_product_attention: B batch size, Hq query heads, Hkv
key and value heads, L number of queries, S number of keys (max_seq_len), E head size of query and key, Ev
head size of value. In `pads`, (B, S), True marks padding.
"""

import inspect
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache, partial, reduce
from importlib.util import find_spec
from operator import and_
from types import CellType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
)

__all__ = ["attend", "causal", "causal_padded_attention", "create_block_mask_from_runs"]
__all__ += ["create_causal_padding_block_mask", "create_padding_mask", "textbook_attention"]

# ---- 1. The textbook --------------------------------------------------------------------------------------


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """mask_mod: a query sees the keys up to its own position.

    Args:
        b, h, q_idx, kv_idx: integer tensors: the batch element, the head, the position of the query and the
            position of the key.

    Returns:
        A boolean tensor, True where the query sees the key.
    """
    return q_idx >= kv_idx


def create_padding_mask(pads: Tensor) -> Callable[..., Tensor]:
    """Make the mask_mod that allows a pair only where neither the query nor the key is padding.

    This is what attention-gym's issue 38 asks for, https://github.com/meta-pytorch/attention-gym/issues/38.

    Args:
        pads: (B, max_seq_len), torch.bool, True where the token is padding. The mask_mod reads it when
            attention runs, so leave it unchanged until the backward pass is done.

    Returns:
        The mask_mod. Combine it with `causal` by `torch.nn.attention.flex_attention.and_masks`.

    Raises:
        TypeError, ValueError: `pads` is not a torch.bool tensor of two dimensions, or it is empty.
    """
    _check_tensors(pads=pads)  # part 6

    def padding(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~pads[b, q_idx] & ~pads[b, kv_idx]

    return padding


def textbook_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, block_mask: BlockMask | None = None
) -> Tensor:
    """Causal attention over a padded batch, as the documentation of FlexAttention has it.

    `attend` computes the same, with less time and memory for the mask. It also accepts fewer queries than
    keys, and has gradients on the CPU, where this function has none. After eight recompilations torch only
    warns, and runs flex_attention uncompiled, with memory for every score. `attend` allows 64, and then
    raises an error. On torch 2.11 it raises the limit of the whole process for this.

    Args:
        query: (B, Hq, S, E).
        key: (B, Hkv, S, E).
        value: (B, Hkv, S, Ev).
        pads: (B, S), torch.bool, True where the token is padding.
        block_mask: a mask of these pads, for layers that share it. None makes one. Beside a block_mask,
            `pads` is not read.

    Returns:
        (B, Hq, S, Ev). Rows of padding are zeros.

    Raises:
        TypeError, ValueError: what `create_padding_mask` or torch raises.
    """
    block_mask = _textbook_block_mask(pads) if block_mask is None else block_mask
    flex = torch.compile(flex_attention) if query.is_cuda else flex_attention  # later calls reuse it
    return flex(query, key, value, block_mask=block_mask, enable_gqa=query.shape[1] != key.shape[1])


def _textbook_block_mask(pads):
    mask_mod, (batch_size, length) = and_masks(causal, create_padding_mask(pads)), pads.shape
    return create_block_mask(mask_mod, batch_size, None, length, length, device=pads.device)


# ---- 2. The block mask ------------------------------------------------------------------------------------


def create_causal_padding_block_mask(
    pads: Tensor, q_len: int | None = None, *, q_offset: int | Tensor | None = None,
    window: int | None = None, padding_side: str | None = None, BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:  # fmt: skip
    """Build the BlockMask of causal attention over a padded batch in closed form.

    `create_block_mask` asks the mask_mod about every pair of a query and a key. Here the smallest and the
    largest place in each block tell which tiles to compute, as `create_block_mask_from_runs` explains. Build
    the mask once for a batch, or once for each kind of layer, and share it between layers. Building it
    compiles nothing, does not wait for the device, and needs memory for the tokens and the tiles only.

    Args:
        pads: (B, S), torch.bool, True where the key is padding. What is not written yet of a preallocated
            cache is padding, too. With such a cache give q_offset: by default the queries stand at its end,
            where they are padding and give zeros. Attention reads `pads` again, so leave it unchanged until
            the backward pass is done.
        q_len: L, the number of queries. None means as many as fit from q_offset on.
        q_offset: the place of the first query on the axis of the keys. None means S - L: the queries are the
            last tokens. A 0-d integer tensor is accepted if q_len is given. Its value is not checked here,
            because that would wait for the device.
        window: how many places back a query sees, its own included. None means all.
        padding_side: "right" or "left" promises that all padding stands there. Where L = S, kernels then
            compare places instead of reading `pads`, which is faster. Elsewhere it is only checked. A broken
            promise is a ValueError on the CPU. In graphs, and on CUDA, where the process must be started
            again, it is a failed assertion, and vmap is not supported. Other devices do not check it.
        BLOCK_SIZE: the number of tokens in a block, or a pair (queries in a block, keys in a block). From
            torch 2.14 on, Triton's kernels train sequences of up to 4096 tokens faster in blocks of 64.

    Returns:
        A BlockMask of shape (B, 1, L, S), which serves any number of heads. Made under `torch.no_grad` for up
        to 16 queries, it holds one list of tiles, with which decoding is faster and nothing can be trained.

    Raises:
        TypeError, ValueError: an argument does not fit. The message says what was expected.
    """
    q_len, q_offset, blocks = _check_mask_options(pads, q_len, q_offset, window, padding_side, BLOCK_SIZE)
    keys = torch.arange(pads.shape[1], dtype=torch.int32, device=pads.device)  # (S,), their places
    # The places of the queries, (L,), each the last key that its query sees, and their padding, (B, L).
    if isinstance(q_offset, Tensor):
        queries = q_offset.reshape(1) if q_len == 1 else keys[:q_len] + q_offset
        query_pads = pads.index_select(1, queries)
    else:
        queries = keys[q_offset : q_offset + q_len]
        query_pads = pads if q_len == pads.shape[1] else pads[:, q_offset : q_offset + q_len]
    first = None if window is None else queries - (min(window, _END) - 1)
    computes = padding_side is not None and q_len == pads.shape[1]
    rules = _make_rules(pads, window, padding_side) if computes else None  # None looks the runs up
    return _build_block_mask(first, queries, None, keys, pads, query_pads, blocks, rules)


def create_block_mask_from_runs(
    first: Tensor | None, last: Tensor | None, pads: Tensor, *, query_pads: Tensor | None = None,
    until: Tensor | None = None, key_places: Tensor | None = None, BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:  # fmt: skip
    """Build in closed form the BlockMask of queries that each see one run of keys, less the padding.

    Each query sees the keys from its `first` to its `last`. A tile is a block of queries against a block of
    keys. The smallest and the largest of these places in its two blocks tell what a tile is:

        some pair may be allowed:   max(last) >= min(key)  and  max(key) >= min(first)
        every pair is allowed:      min(last) >= max(key)  and  min(key) >= max(first)

    A tile in which no pair may be allowed is skipped. One in which every pair is allowed is full: the kernel
    computes it without asking the mask_mod. The rest are partial. Padding needs no rule of its own: a padded
    query has an empty run, and a padded key counts as out of reach. `until` adds one more comparison.

    For example, five tokens padded to eight, causal, in blocks of two (`first` is 0 throughout):

                     keys  0 1      2 3      4 -      - -
        queries 0 1        partial  skipped  skipped  skipped    last: 0, 1
                2 3        full     partial  skipped  skipped    last: 2, 3
                4 -        partial  partial  partial  skipped    last: 4, none
                - -        skipped  skipped  skipped  skipped    last: none, none

    Some masks, with `place = torch.arange(S)` for queries and keys alike, as `first, last`:

        causal                                None, place
        every token sees every token          None, None
        a window of `left` and `right` keys   place - left, place + right
        packed, position_ids that restart     place - position_ids, place
        a prefix of n tokens, right padding   None, place.clamp(min=n - 1)
        chunks of n, and the chunk before     (place // n - 1) * n, place // n * n + n - 1

    For these masks, where queries and keys are the same tokens, the tiles are those of `create_block_mask`.
    For other runs, which may stand in any order, and with `until`, a tile in which no pair is allowed may be
    computed too. That takes time and changes no result.

    Args:
        first, last: (L,) or (B, L), integers of any size: the places of the first and of the last key that
            each query sees. None means 0 for `first`, and the last key for `last`. What stands at padded
            queries does not matter.
        pads: (B, S), torch.bool, True where the key is padding. Attention reads it again, so leave it
            unchanged until the backward pass is done.
        query_pads: (B, L), torch.bool, True where the query is padding. None means `pads`: queries and keys
            are the same tokens.
        until: (B, S), integers of any size: the last query that sees the key, counted from 0 among the
            queries given. L - 1 or more means no limit. In a tree stored depth first it is the last
            descendant of the key, and `last` is `place`. What stands at padded keys does not matter.
        key_places: (S,) or (B, S), integers of any size: the places of the keys, where they are not stored in
            the order of their places. `pads` and `until` follow the order in which they are stored.
        BLOCK_SIZE: the number of tokens in a block, or a pair (queries in a block, keys in a block).

    Returns:
        A BlockMask of shape (B, 1, L, S), as `create_causal_padding_block_mask` returns it.

    Raises:
        TypeError, ValueError: an argument does not fit. The message says what was expected.
    """
    query_pads, blocks = _check_runs(first, last, pads, query_pads, until, key_places, BLOCK_SIZE)
    # Clamped, so that int32 also holds a place plus or minus _FAR. Widened first, since bytes hold no -1.
    near = lambda x: (x if x.dtype == torch.int64 else x.int()).clamp(-1, _END).int()
    first, last, until, places = (None if x is None else near(x) for x in (first, last, until, key_places))
    keys = torch.arange(pads.shape[1], dtype=torch.int32, device=pads.device) if places is None else places
    last = keys.new_full((query_pads.shape[1],), _END) if last is None else last
    return _build_block_mask(first, last, until, keys, pads, query_pads, blocks, places=places)


_END = 2**29  # a place past the end of every sequence
_FAR = 2**30  # a distance that takes any place up to _END out of reach; int32 holds both together


class _Origin(NamedTuple):
    """Notes on a mask_mod that was made here. `BlockMask.to` keeps them, and and_masks drops them."""

    is_ours: bool = False
    has_first: bool = False  # whether runs may begin after the first key
    is_computed: bool = False  # whether the mask_mod compares places, instead of looking runs up


def _origin_of(block_mask):
    return getattr(getattr(block_mask, "mask_mod", None), "origin", _Origin())


def _build_block_mask(first, last, until, keys, pads, query_pads, blocks, rules=None, places=None):
    """The lists of tiles and a mask_mod: the conjunction of rules, or else of look-ups in the runs."""
    q_len, (q_block, kv_block) = query_pads.shape[1], blocks
    decodes = not torch.is_grad_enabled() and q_len <= min(_MOST_DECODING_QUERIES, q_block)  # part 7
    # A compiled graph is specialized to a size of 1. With at least two blocks one graph serves all lengths.
    find_tiles, least = (_find_tiles_operator, 2) if torch.compiler.is_compiling() else (_find_tiles, 1)
    tables, lists = find_tiles(first, last, until, keys, pads, query_pads, q_block, kv_block, least, decodes)
    origin = _Origin(True, first is not None, rules is not None)
    # Rules capture tensors. A number that they capture would be compiled in: a kernel for each value.
    if rules is None:
        last_key = tables[0]  # below every key where the query is padding
        table = None if places is None else places.expand_as(pads).contiguous()  # (B, S)
        place = lambda b, kv_idx: kv_idx if table is None else table[b, kv_idx]
        rules = [lambda b, h, q_idx, kv_idx: place(b, kv_idx) <= last_key[b, q_idx]]
        if first is not None:
            first_key = tables[1]
            rules.append(lambda b, h, q_idx, kv_idx: place(b, kv_idx) >= first_key[b, q_idx])
        if until is None:
            rules.append(lambda b, h, q_idx, kv_idx: ~pads[b, kv_idx])
        else:
            last_query = tables[-1]  # below every query where the key is padding
            rules.append(lambda b, h, q_idx, kv_idx: q_idx <= last_query[b, kv_idx])

    def mask_mod(b, h, q_idx, kv_idx):
        return reduce(and_, [rule(b, h, q_idx, kv_idx) for rule in rules])

    mask_mod.origin = origin  # type: ignore[attr-defined]
    if decodes:
        parts = [x[0] for x in lists] + [None] * 6  # no full tiles, and nothing for a backward pass
    else:
        counts, indices, q_counts, q_indices = lists
        parts = [counts[0], indices[0], counts[1], indices[1]]  # of each block of queries: partial, full
        parts += [q_counts[0], q_indices[0], q_counts[1], q_indices[1]]  # of each block of keys
    return BlockMask((q_len, pads.shape[1]), *parts, blocks, mask_mod)  # type: ignore


def _make_rules(pads, window, padding_side):
    """mask_mods that compute the runs, where query i is token i and all padding stands on one side."""
    if padding_side == "right":  # one rule: as two, FlashAttention-4's kernels are slower
        end = (~pads).sum(1, dtype=torch.int32)  # (B,)
        rules = [lambda b, h, q_idx, kv_idx: kv_idx <= torch.where(q_idx < end[b], q_idx, -1)]
    else:
        begin = pads.sum(1, dtype=torch.int32)  # (B,)
        rules = [causal, lambda b, h, q_idx, kv_idx: kv_idx >= begin[b]]
    if window is not None:
        reach = torch.full_like(pads[:, 0], min(window, _END) - 1, dtype=torch.int32)  # (B,)
        rules.append(lambda b, h, q_idx, kv_idx: kv_idx >= q_idx - reach[b])
    return rules


def _find_tiles(
    first: Tensor | None, last: Tensor, until: Tensor | None, keys: Tensor, pads: Tensor,
    query_pads: Tensor, q_block: int, kv_block: int, least: int, decodes: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The tables that the mask_mod looks up, and the lists of tiles.

    Returns:
        Tables: last, then first and until if they are given. They are (B, L) or (B, S), filled up to whole
        blocks. In them padding is out of reach.
        Lists: how many tiles of each row are partial and how many are full, (2, B, 1, rows), and which ones,
        (2, B, 1, rows, columns). Then the same of each column, for the backward pass. If it decodes, there is
        no backward pass and every tile counts as partial: (1, B, 1, rows) and (1, B, 1, rows, columns).
    """
    # Blocks that reach past the end are filled with padding. The queries of a decoding step are not, which
    # would take time: its kernel reads no table past the last query.
    if decodes and pads.is_cuda and query_pads.shape[1] < pads.shape[1]:
        q_block = query_pads.shape[1]
    fill_queries = partial(_fill_up, block=q_block, least=1 if decodes else least)
    fill_keys = partial(_fill_up, block=kv_block, least=least)
    q_pads, kv_pads, keys = fill_queries(query_pads, value=True), fill_keys(pads, value=True), fill_keys(keys)
    # The smallest and the largest number of each block, .min and .max: (B, 1, rows, 1), (B, 1, 1, columns).
    one = lambda x: torch.return_types.aminmax((x.squeeze(-1),) * 2)  # of one number, without a kernel
    ends = lambda x: x.aminmax(dim=-1) if x.shape[-1] > 1 else one(x)
    of_rows = lambda x: ends(x.view(x.shape[0], 1, -1, 1, q_block))
    of_columns = lambda x: ends(x.view(x.shape[0], 1, 1, -1, kv_block))
    # Padding is moved so far away that no comparison below holds for it. A sum keeps the strides of pads that
    # are a transposed view, and the operator of part 7 promises contiguous tables.
    move = lambda x, padding, far: torch.add(x, padding, alpha=far).contiguous()

    # A pair is allowed if x >= y in every comparison (x, y): one is of the query, the other of the key.
    last = move(fill_queries(last), q_pads, -_FAR)
    tables, comparisons = [last], [(of_rows(last), of_columns(move(keys, kv_pads, _FAR)))]
    if first is not None:
        first = move(fill_queries(first), q_pads, _FAR)
        tables.append(first)
        comparisons.append((of_columns(move(keys, kv_pads, -_FAR)), of_rows(first)))
    if until is not None:
        until = move(fill_keys(until), kv_pads, -_FAR)
        tables.append(until)
        queries = torch.arange(q_pads.shape[1], dtype=torch.int32, device=pads.device)
        comparisons.append((of_columns(until), of_rows(move(queries, q_pads, _FAR))))

    some = reduce(and_, [x.max >= y.min for x, y in comparisons])
    if decodes:
        return tables, [*_list_tiles(some[None])]
    every = reduce(and_, [x.min >= y.max for x, y in comparisons])
    tiles = torch.stack((some ^ every, every))  # partial and full, (2, B, 1, rows, columns)
    del some, every  # a large mask needs the memory
    by_query = _list_tiles(tiles)
    tiles = tiles.mT.contiguous()
    return tables, [*by_query, *_list_tiles(tiles)]


def _fill_up(x, block, least, value=None):
    missing = max(-x.shape[-1] % block, least * block - x.shape[-1])  # up to whole blocks, so many at least
    return F.pad(x, (0, missing), value=value) if missing else x


def _list_tiles(tiles):
    """How many tiles of each row are True, (..., rows), and which ones, (..., rows, columns).

    Places of a row that are not used repeat its last tile, or are 0. Kernels do not read them.
    """
    columns = tiles.shape[-1]
    dtype = torch.int16 if 128 < columns < 2**15 else torch.int32  # half the memory of long rows
    # cumsum copies booleans first, so bytes are better. On the CPU torch 2.11 has no such view under vmap.
    rank = (tiles.view(torch.int8) if tiles.is_cuda else tiles).cumsum(-1, dtype=dtype)
    count = rank.select(-1, -1)
    # The k-th tile of a row is where its rank first reaches k.
    wanted = torch.arange(1, columns + 1, dtype=dtype, device=tiles.device).minimum(count.unsqueeze(-1))
    return count.int().contiguous(), torch.searchsorted(rank, wanted, out_int32=True)


# ---- 3. Attention -----------------------------------------------------------------------------------------


def causal_padded_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *, scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None, return_lse: bool = False, backend: str = "auto",
    **mask_options: Any,
) -> Any:  # fmt: skip
    """Causal attention over a padded batch: `attend` with a block mask that is made for this call.

    Layers that share a batch should share its block mask: make it once, and call `attend`.

    Args:
        query: (B, Hq, L, E). Fewer queries than keys are the last tokens, unless q_offset says otherwise.
        key: (B, Hkv, S, E).
        value: (B, Hkv, S, Ev).
        pads: (B, S), torch.bool, True where the key is padding.
        scale, score_mod, return_lse, backend: as in `attend`.
        mask_options: those of `create_causal_padding_block_mask`: q_offset, window, padding_side, BLOCK_SIZE.

    Returns:
        (B, Hq, L, Ev), and with return_lse (B, Hq, L) too, as `attend` returns them.

    Raises:
        TypeError, ValueError, RuntimeError: as in `attend` and `create_causal_padding_block_mask`.
    """
    query, key, value = _cast_for_autocast(query, key, value)  # before their dtypes are compared
    _check_tensors(pads=pads)
    _check_inputs(query, key, value, pads.shape[1], pads=pads)
    block_mask = create_causal_padding_block_mask(pads, query.shape[2], **mask_options)
    options: Any = {"scale": scale, "score_mod": score_mod, "return_lse": return_lse, "backend": backend}
    return attend(query, key, value, block_mask, **options)


def attend(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, *, scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None, return_lse: bool = False, backend: str = "auto",
) -> Any:  # fmt: skip
    """Attention by FlexAttention: softmax(scale query keyᵀ) value, where the block mask allows it.

    CUDA runs compiled kernels. Other devices run plain operators, which need memory for every score. Part 8
    of this file says when a sequence gets the same bits whatever shares its batch.

    What changes, differs between layers or is learned must be captured by a score_mod as a tensor of one
    dimension or more, and looked up: `weight[h]`. A number is compiled into a kernel. Torch 2.11 overlooks
    changed default arguments of functions that score_mod calls. On CUDA a score that is not finite at masked
    pairs makes the gradients of captured tensors NaN: clamp, as in `log((q_idx - kv_idx).clamp(min=1))`.

    Args:
        query: (B, Hq, L, E). Kernels read a transposed view of (B, L, Hq, E) as it is, also of key and value.
        key: (B, Hkv, S, E). Query head i reads key head i // (Hq // Hkv).
        value: (B, Hkv, S, Ev).
        block_mask: what one of the functions above made, or any other BlockMask of shape (B, 1 or Hq, L, S).
        scale: the factor of the scores before the softmax. None stands for 1 / sqrt(E). Every new scale
            compiles a kernel. For one that changes in training pass 1.0, and multiply in a score_mod.
        score_mod: flex_attention's function of score, b, h, q_idx and kv_idx that returns the score to use, a
            floating point number that it computes from `score`. q_idx is 0 for the first query given,
            whatever q_offset is. Other devices than CUDA call it once, with tensors of all pairs.
        return_lse: whether to return the log-sum-exp of the scores too.
        backend: which kernels CUDA runs. "flash" means FlashAttention-4's. It needs the package flash-attn-4,
            Hopper, half precision, heads of up to 128 and no score_mod. For return_lse, or where L is not S,
            it also needs torch 2.15 and at least 128 queries. "auto" is "flash" where this was measured to be
            faster, for large inputs, and "triton" elsewhere. `torch.use_deterministic_algorithms(True)` rules
            "flash" out.

    Returns:
        (B, Hq, L, Ev). Rows of queries that see no key, such as padding, are exact zeros, and give exact zero
        gradients. With return_lse also (B, Hq, L), float32: the natural logarithm of the sum of the
        exponentials of the scores, -inf in such rows.
        NaN or Inf in padded rows of `value` reaches the output of real rows, because 0 * NaN is NaN, and in
        padded rows of all three it reaches gradients. Set them to zero where they may occur.

    Raises:
        TypeError, ValueError: inputs do not fit together. The message says what was expected.
        RuntimeError: more than 64 kinds of input were compiled, or score_mod cannot be compiled.
    """
    query, key, value = _cast_for_autocast(query, key, value)
    _check_attention(query, key, value, block_mask, scale, score_mod, return_lse, backend)
    scale = None if scale is None else float(scale)
    output, lse = _attend(query, key, value, score_mod, block_mask, scale, return_lse, backend)
    return (output, lse) if return_lse else output


def _attend(query, key, value, score_mod, block_mask, scale, return_lse, backend="auto"):
    """The output, and the log-sum-exp or None. A block_mask of None, for integrations, allows all pairs."""
    if not query.is_cuda:
        return _attend_in_plain_operators(query, key, value, score_mod, block_mask, scale, return_lse)
    if backend == "auto":
        is_faster = _is_faster_with_flash(query, key, block_mask)
        flash = is_faster and _can_use_flash(query, key, value, score_mod, return_lse)
        backend = "flash" if flash else "triton"
    return _run_kernel(query, key, value, score_mod, block_mask, scale, return_lse, backend)  # part 7


def _attend_in_plain_operators(query, key, value, score_mod, block_mask, scale, return_lse):
    """For the CPU, where flex_attention has no gradients and needs a C++ compiler, and for other devices."""
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which would round the float32 below
        with torch.autocast(device, enabled=False):
            return _attend_in_plain_operators(query, key, value, score_mod, block_mask, scale, return_lse)
    wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    # Torch 2.11 cannot export repeat_interleave beside a dynamic length.
    head = torch.arange(query.shape[1], device=query.device) // group
    key, value = (x.to(wide).index_select(1, head) for x in (key, value))
    scores = query.to(wide) @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)  # (B, Hq, L, S)
    b, h, q_idx, kv_idx = (torch.arange(n, device=query.device) for n in scores.shape)
    places = b.view(-1, 1, 1, 1), h.view(-1, 1, 1), q_idx.view(-1, 1), kv_idx
    mask = None
    if _origin_of(block_mask).is_ours:
        mask = block_mask.mask_mod(*places)  # (B or 1, 1, L, S)
    elif block_mask is not None:  # it was not made here: kernels skip tiles that are not listed
        _, heads, q_len, kv_len = block_mask.shape
        mask = create_mask(block_mask.mask_mod, query.shape[0], heads, q_len, kv_len, query.device)
        q_block, kv_block = block_mask.BLOCK_SIZE
        tiles = block_mask.to_dense().bool().repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3)
        mask = mask & tiles[:, :, :q_len, :kv_len]  # (B, 1 or Hq, L, S)
    if score_mod is not None:
        scores = _modify_scores(scores, places, mask, score_mod).to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    # A softmax over no key is NaN. Such rows see every key here, and they and their gradients become zero.
    empty = scores.detach().amax(-1, keepdim=True).isneginf()
    scores = scores.masked_fill(empty, 0.0)
    output = (scores.softmax(-1) @ value).masked_fill(empty, 0.0).to(query.dtype)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf).float() if return_lse else None
    return output, lse


def _modify_scores(scores, places, mask, score_mod):
    given = [x.expand_as(scores) for x in (scores, *places)]
    if mask is not None:
        # Masked pairs get the inputs of an allowed one: what is not finite there would make gradients NaN.
        allowed = mask.expand_as(scores).flatten().int().argmax(0, keepdim=True)
        given = [torch.where(mask, x, x.flatten()[allowed]) for x in given]
    modified = score_mod(*given)
    rule = "score_mod must return a score for each pair: look up bias[b, h, q_idx, kv_idx], not bias[b][h]"
    _require(getattr(modified, "shape", None) == scores.shape, rule, returned=modified)
    return modified


def _cast_for_autocast(*tensors):
    """Floating point tensors to the dtype of autocast, where it is enabled. Like SDPA it keeps float64."""
    device = getattr(tensors[0], "device", torch.device("cpu")).type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    casts = lambda x: isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return [x.to(dtype) if casts(x) else x for x in tensors]


# ---- 4. The reference -------------------------------------------------------------------------------------
__all__ += ["sdpa_reference"]


def sdpa_reference(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *, causal: bool = True,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The same attention by `scaled_dot_product_attention` with an explicit mask of B * L * S booleans.

    Args:
        query: (B, Hq, L, E), the last L tokens of the sequence.
        key: (B, Hkv, S, E). Hq must be a multiple of Hkv.
        value: (B, Hkv, S, Ev).
        pads: (B, S), torch.bool, True where the token is padding.
        causal: whether a query sees only the keys up to its own place.
        scale: the factor of the scores before the softmax. None stands for 1 / sqrt(E).

    Returns:
        (B, Hq, L, Ev). Padded query rows are exact zeros, and give exact zero gradients.

    Raises:
        TypeError, ValueError: `pads` is not a torch.bool tensor of two dimensions, or shapes do not fit.
    """
    _check_inputs(query, key, value, None, pads=pads)
    _require(query.shape[2] <= pads.shape[1], "the queries must lie among the keys", query=query, pads=pads)
    # Before torch 2.12 a kernel misreads larger masks, https://github.com/pytorch/pytorch/issues/187227.
    fits = query.shape[2] * pads.shape[1] <= 2**32 or _TORCH >= (2, 12)
    _require(fits, "torch 2.11 has masks of at most 2**32 scores: pass fewer queries", query=query, pads=pads)
    mask, empty = _explicit_mask(pads, query.shape[2], causal)
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return output.masked_fill(empty, 0.0)


def _explicit_mask(pads, q_len=None, causal=True):
    """What the last q_len tokens see, (B, 1, L, S), and which of them see nothing, (B, 1, L, 1)."""
    start = 0 if q_len is None else pads.shape[1] - q_len
    mask = ~pads[:, None, start:, None] & ~pads[:, None, None, :]
    mask = mask.tril(start) if causal else mask
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty  # those see everything: a softmax over no key is NaN in some kernels


# ---- 5. The demonstration: python causal_padded_flexattn.py -----------------------------------------------
__all__ += ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration. --help lists its options.

    Args:
        argv: the arguments of the command line. None stands for those of the process.

    Returns:
        The exit status: 0 if every check holds, 1 if one does not, 2 if an input does not fit.
    """
    import os
    import sys
    import warnings

    args = _parse(argv)
    # Nobody can act on these warnings: on the CPU the textbook is left uncompiled on purpose, and Triton 3.9
    # speaks of a default of its own, in background processes too.
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile|TRITON_DEFAULT_FP_FUSION")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
    try:
        if not args.no_figure:
            _draw_mask(args.output, args.padding_side)
        wrong = _demonstrate(args)
    except (FileNotFoundError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"causal_padded_flexattn.py: error: {error}", file=sys.stderr)
        return 2
    if wrong:
        print(f"These results are wrong: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def _parse(argv):
    import argparse
    from pathlib import Path

    def count(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
        return int(text)

    about = "Causal attention over a padded batch: FlexAttention checked against SDPA, timed, and drawn."
    parser = argparse.ArgumentParser(description=about, usage=argparse.SUPPRESS)  # makes an error one line
    add, fail, device = parser.add_argument, parser.error, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cuda", "cpu"], default=device, help="default: cuda if there is one")
    add("--lengths", type=lambda x: [*map(count, x.split(","))], metavar="N,N,...", help="default: random")
    add("--max-seq-len", type=count, metavar="S", help="tokens of a row; default: 4096; 512 on the CPU")
    add("--padding-side", choices=["right", "left"], default="right", help="default: right")
    add("--head-dim", type=count, metavar="D", default=64, help="size of a head; default: 64")
    add("--compile", action="store_true", help="compile the textbook on the CPU too, which needs g++")
    add("--output", type=Path, metavar="PATH", help="default: causal_padding_mask.png, or ..._left.png")
    add("--no-figure", action="store_true", help="draw nothing")
    args = parser.parse_args(argv)
    if args.device == "cuda" and device == "cpu":
        fail("torch sees no CUDA device: pass --device cpu, or install a CUDA build of torch")
    batch_size, length = (8, 4096) if args.device == "cuda" else (4, 512)
    length = args.max_seq_len = args.max_seq_len or length
    torch.manual_seed(0)
    args.lengths = args.lengths or torch.randint(max(1, length // 8), length + 1, (batch_size,)).tolist()
    if max(args.lengths) > length:
        fail(f"--lengths has {max(args.lengths)} tokens: raise --max-seq-len {length}")
    args.output = args.output or Path(f"causal_padding_mask{'_left' * (args.padding_side == 'left')}.png")
    if args.output.suffix != ".png":
        fail(f"--output must be a .png file; got {args.output}")
    return args


def _demonstrate(args):
    """Print the report, and return the names of what is wrong."""
    on_cuda, batch_size, length = args.device == "cuda", len(args.lengths), args.max_seq_len
    pads = _make_pads(args.lengths, length, args.padding_side, args.device)  # (B, S)
    heads, dtype = (16, torch.bfloat16) if on_cuda else (4, torch.float32)
    shape = (batch_size, heads, length, args.head_dim)
    *inputs, grad = torch.randn(4, *shape, device=args.device, dtype=dtype)
    print(f"device  torch {torch.__version__}, {torch.cuda.get_device_name() if on_cuda else 'CPU'}")
    padding = f"{pads.float().mean():.0%} of them padding on the {args.padding_side}"
    print(f"batch   {batch_size} x {length} tokens, {padding}; {heads} heads of size {shape[3]}, {dtype}")

    ours: Any = create_causal_padding_block_mask(pads)
    textbook, full, partly = _textbook_block_mask(pads), ours.full_kv_num_blocks, ours.kv_num_blocks
    same = torch.equal(ours.to_dense(), textbook.to_dense())
    same &= torch.equal(full, textbook.full_kv_num_blocks)
    skipped = ours.kv_indices.numel() - full.sum() - partly.sum()
    tiles = f"tiles of 128 x 128 scores: {full.sum()} full, {partly.sum()} partial, {skipped} skipped"
    print(f"mask    {tiles}; as create_block_mask finds them: {'ok' if same else 'WRONG'}")

    print("check   the largest error, beside that of SDPA with an explicit mask in the same precision")
    baseline, higher = partial(sdpa_reference, pads=pads), torch.float32 if on_cuda else torch.float64
    exact = _differentiate(baseline, [x.to(higher) for x in inputs], grad.to(higher))
    own = _differentiate(baseline, inputs, grad)
    flex = torch.compile(textbook_attention) if args.compile and not on_cuda else textbook_attention
    its_grad = grad if on_cuda else None  # the CPU has no gradients of flex_attention
    wrong = [] if same else ["the tiles of the mask"]
    flex = partial(flex, pads=pads, block_mask=textbook)
    for name, results in (
        ("attend", _differentiate(partial(attend, block_mask=ours), inputs, grad)),
        ("textbook_attention", _differentiate(flex, inputs, its_grad)),
    ):
        print(f"        {name}")
        wrong += [f"{result} of {name}" for result in _find_wrong(results, exact, own)]
    if on_cuda:
        _print_times(inputs, grad, pads)
    return wrong


def _make_pads(lengths, max_seq_len, padding_side, device="cpu"):
    """(B, max_seq_len): True where a sequence of that length, padded on that side, holds padding."""
    places, length = torch.arange(max_seq_len, device=device), torch.tensor(lengths, device=device)[:, None]
    return places >= length if padding_side == "right" else places < max_seq_len - length


def _differentiate(attention, inputs, grad):
    """The output and, given its gradient, the gradients of the inputs."""
    inputs = [x.detach().requires_grad_(grad is not None) for x in inputs]
    output = attention(*inputs)
    return [output] if grad is None else [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def _find_wrong(results, exact, own):
    """Print the errors, and return the names of the results whose error is too large."""
    wrong, names = [], ("output", "query gradient", "key gradient", "value gradient")
    for name, result, truth, plain in zip(names, results, exact, own, strict=False):
        error, own_error = ((x - truth).abs().max().item() for x in (result, plain))
        # FlashAttention's tests allow twice plain PyTorch's error, thrice for gradients, and two roundings.
        # Here also 16 roundings of float32, in which kernels compute a weight as a power of 2.
        eps = 2 * torch.finfo(result.dtype).eps + 16 * torch.finfo(torch.float32).eps
        allowed = (2 if name == "output" else 3) * own_error + eps * truth.abs().max().item()
        verdict = "ok" if error <= allowed else "WRONG"
        errors = f"{error:.1e} (SDPA's own {own_error:.1e}, allowed {allowed:.1e})"
        print(f"{' ' * 10}{name:<16}{errors} {verdict}")
        wrong += [] if verdict == "ok" else [name]
    return wrong


def _print_times(inputs, grad, pads):
    from torch.utils.benchmark import Timer

    ways = {  # how to attend, and how to make the mask
        "textbook_attention": ("textbook_attention(q, k, v, pads, mask)", "_textbook_block_mask(pads)"),
        "attend": ("attend(q, k, v, mask)", "create_causal_padding_block_mask(pads)"),
        "SDPA, explicit mask": ("sdpa(q, k, v, mask)", "_explicit_mask(pads)[0]"),
    }
    if not pads[:, 0].any():  # real tokens on the left: causality keeps them from seeing the padding
        ways["SDPA, is_causal=True, with the padding"] = ("sdpa(q, k, v, is_causal=True)", "None")
    print(f"times   {'median milliseconds':<40}forward   + backward   + making the mask")
    known = globals() | {"pads": pads, "inputs": inputs, "grad": grad, "sdpa": F.scaled_dot_product_attention}
    for name, (call, make) in ways.items():
        forward, both = (f"_differentiate(lambda q, k, v: {call}, inputs, {x})" for x in ("None", "grad"))
        times = []
        for statement in (forward, both, f"mask = {make}; {both}"):
            timer = Timer(statement, f"mask = {make}", globals=known, num_threads=torch.get_num_threads())
            times.append(timer.blocked_autorange(min_run_time=0.3).median * 1e3)
        print(f"        {name:<40}{times[0]:7.2f}   {times[1]:10.2f}   {times[2]:17.2f}")


def _draw_mask(path, padding_side):
    """With attention-gym, the mask of a sequence of 8 tokens, padded to 12."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # no window, also where a display exists
        from attn_gym import visualize_attention_scores
    except Exception as error:  # not only ImportError: a broken installation can raise anything
        why = f"the figure needs attn_gym and matplotlib ({type(error).__name__}: {error})"
        raise ValueError(f"{why}: pip install attn-gym matplotlib, or pass --no-figure") from error
    name = f"causal padding mask: 8 tokens, padded to 12 on the {padding_side}"
    mask_mod = and_masks(causal, create_padding_mask(_make_pads([8], 12, padding_side)))
    scores = torch.ones(2, 1, 1, 12, 8)  # of query and key, (B, H, S, E), only the shape is drawn
    visualize_attention_scores(*scores, mask_mod=mask_mod, device="cpu", name=name, path=path)


# ---- Nothing below changes a result: a reader can stop here -----------------------------------------------
# It checks arguments, and chooses kernels that agree up to rounding.

# ---- 6. What does not fit ---------------------------------------------------------------------------------
# No check waits for the device: values are read only where they lie on the CPU.


def _check_mask_options(pads, q_len, q_offset, window, padding_side, BLOCK_SIZE):
    """The number of queries, the place of the first one and the two block sizes, if everything fits."""
    _check_tensors(pads=pads)
    if window is not None:
        _require(_is_int(window), "window must be an int, or None for all keys", TypeError, window=window)
        _require(window >= 1, "window must be at least 1, which is the query's own key", window=window)
    kv_len, got = pads.shape[1], {"q_len": q_len, "q_offset": q_offset, "pads": pads}
    _require(q_len is None or _is_int(q_len), "q_len must be an int", TypeError, **got)
    rule = "q_offset must be an int, or a 0-d tensor of int32 or int64 on the device of pads"
    if isinstance(q_offset, Tensor):
        fits = q_offset.shape == () and q_offset.dtype in (torch.int32, torch.int64)
        _require(fits and q_offset.device == pads.device, rule, TypeError, **got)
        _require(q_len is not None, "q_len must be given beside a tensor q_offset, which is not read", **got)
        fits = 1 <= q_len <= kv_len
    else:
        _require(q_offset is None or _is_int(q_offset), rule, TypeError, **got)
        q_len = kv_len - (q_offset or 0) if q_len is None else q_len
        q_offset = kv_len - q_len if q_offset is None else q_offset
        fits = 0 <= q_offset < q_offset + q_len <= kv_len
    _require(fits, "the queries must lie among the keys; pads covers a preallocated cache whole", **got)
    if padding_side is not None:
        _check_padding_side(pads, padding_side)
    return q_len, q_offset, _check_blocks(BLOCK_SIZE)


def _check_padding_side(pads, side):
    _require(side in ("right", "left"), 'padding_side must be "right", "left" or None', padding_side=side)
    before, after = (pads[:, :-1], pads[:, 1:])[:: 1 if side == "right" else -1]
    holds = (before <= after).all()
    rule = f"padding_side promises that all padding stands on the {side}, and some does not"
    # No assertion has a public name. Compilers drop _functional_assert_async, and vmap lacks _assert_async.
    if pads.device.type == "cpu" and not torch.compiler.is_compiling():
        with suppress(RuntimeError):  # there is no value to read: under vmap, of a fake tensor, in a trace
            return _require(bool(holds), rule, padding_side=side, pads=pads)
        torch.ops.aten._functional_assert_async.msg(holds, rule, pads[:0])
    elif pads.device.type in ("cpu", "cuda"):
        torch._assert_async(holds, rule)


def _check_runs(first, last, pads, query_pads, until, key_places, BLOCK_SIZE):
    """query_pads and the two block sizes, if everything fits."""
    given = {"first": first, "last": last, "until": until, "key_places": key_places}
    given = {name: x for name, x in given.items() if x is not None}
    if query_pads is None:
        _check_tensors(pads=pads)
        q_len = next((x.shape[-1] for x in (first, last) if isinstance(x, Tensor) and x.dim()), pads.shape[1])
        rule = "query_pads must say which queries are padding, where they are not the keys: pads[:, -L:] if "
        rule += "they are the last tokens, torch.zeros(B, L, dtype=torch.bool) if none of them is"
        _require(q_len == pads.shape[1], rule, **given, pads=pads)
        query_pads = pads
    _check_tensors(pads=pads, query_pads=query_pads, **given)
    return query_pads, _check_blocks(BLOCK_SIZE)


def _check_blocks(BLOCK_SIZE):
    blocks = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    fits = len(blocks) == 2 and all(_is_int(block) and block >= 1 for block in blocks)
    _require(fits, "BLOCK_SIZE must be an int of at least 1, or a tuple of two", BLOCK_SIZE=BLOCK_SIZE)
    return blocks


def _check_attention(query, key, value, block_mask, scale, score_mod, return_lse, backend):
    rule = "block_mask must be a BlockMask, such as create_causal_padding_block_mask(pads) returns"
    _require(isinstance(block_mask, BlockMask), rule, TypeError, block_mask=type(block_mask))
    tensors = _check_inputs(query, key, value, block_mask.shape[3])
    rule = "score_mod must be a function of score, b, h, q_idx, kv_idx"
    _require(score_mod is None or callable(score_mod), rule, TypeError, score_mod=score_mod)
    is_number = scale is None or (not isinstance(scale, Tensor) and hasattr(scale, "__float__"))
    _require(is_number, "scale must be a float, such as scale.item()", TypeError, scale=scale)
    if query.is_cuda:
        _check_on_cuda(tensors, block_mask)
    rule = 'backend must be "auto", "triton" or "flash"'
    _require(backend in ("auto", "triton", "flash"), rule, backend=backend)
    if backend == "flash":
        rule = 'backend="flash" needs flash-attn-4 (pip install --pre flash-attn-4), a Hopper card, float16 '
        rule += "or bfloat16, head sizes that are multiples of 8 up to 128, no score_mod, and for return_lse "
        rule += 'or where queries are not the keys torch 2.15 and at least 128 queries; pass "auto"'
        _require(_can_use_flash(query, key, value, score_mod, return_lse), rule, **tensors)
        rule = 'backend="flash" adds gradients up in any order: under deterministic algorithms pass "auto"'
        _require(not torch.are_deterministic_algorithms_enabled(), rule)
    shape, device = block_mask.shape, block_mask.kv_num_blocks.device
    heads = query.shape[1] if shape[1] > 1 else 1
    fits = shape == (query.shape[0], heads, query.shape[2], key.shape[2]) and device == query.device
    rule = "block_mask must fit: make it with create_causal_padding_block_mask(pads, query.shape[2])"
    _require(fits, rule, block_mask=(*shape, str(device)), **tensors)
    if torch.is_grad_enabled() and block_mask.q_num_blocks is None:
        trains = any(x.requires_grad for x in [query, key, value, *_tensors_captured_by(score_mod)])
        rule = "block_mask was made under torch.no_grad: make it where gradients are wanted"
        _require(not trains, rule, block_mask=shape, **tensors)


def _check_inputs(query, key, value, kv_len, **more):
    """The tensors by their names, if they fit together."""
    tensors = {"query": query, "key": key, "value": value, **more}
    is_swapped = isinstance(key, Tensor) and key.dim() == 4 and key.shape[2] != kv_len == key.shape[1]
    _require(not is_swapped, "heads must stand before the length: pass x.transpose(1, 2)", **tensors)
    _check_tensors(**tensors)
    divides = query.shape[1] % key.shape[1] == 0
    _require(divides, "the heads of query must be a multiple of those of key and value", **tensors)
    return tensors


def _check_on_cuda(tensors, block_mask):
    """What torch refuses in words that do not help, or accepts and gets wrong."""
    query, blocks = tensors["query"], block_mask.BLOCK_SIZE
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    blocks_train = _TORCH >= (2, 14) or query.element_size() > 2 or not any(block % 128 for block in blocks)
    tangents = [torch.autograd.forward_ad.unpack_dual(x).tangent for x in tensors.values()]
    for holds, rule in (
        (query.dtype != torch.float64, "there is no float64: cast to float32"),
        (tangents == [None] * 3, "there is no forward mode: use torch.autograd.grad"),
        (query.shape[0] < 2**16, "a batch must be of at most 65535 sequences: make calls for parts of it"),
        (not any(block % 16 for block in blocks), "BLOCK_SIZE must be a multiple of 16"),
        (blocks_train or not trains, "gradients in half precision need blocks of 128 before torch 2.14"),
    ):
        _require(holds, "on CUDA, " + rule, BLOCK_SIZE=blocks, **tensors)


def _tensors_captured_by(function):
    if torch.compiler.is_compiling():  # functions that are made there do not say
        return []
    cells = [cell for cell in getattr(function, "__closure__", None) or () if cell != CellType()]  # not empty
    captured = [*(cell.cell_contents for cell in cells), *(getattr(function, "__defaults__", None) or ())]
    return [x for x in captured if isinstance(x, Tensor)]


def _is_int(x):
    return type(x) is int or isinstance(x, torch.SymInt)


_PADS = (
    "a torch.bool tensor, True where the token is padding: attention_mask == 0 for a mask of ones and zeros, "
    "additive_mask < 0 for one that is added to scores, torch.arange(S) >= lengths[:, None] for lengths, "
    "torch.zeros(B, S, dtype=torch.bool) for no padding"
)
_INPUT = "a floating point tensor of the same dtype as query"
_RUNS = "a tensor of integers, one for each query"
_EXPECTED = {
    "pads": (("B", "S"), _PADS),
    "query_pads": (("B", "L"), _PADS),
    **dict.fromkeys(("first", "last"), (("B", "L"), _RUNS)),
    **dict.fromkeys(("until", "key_places"), (("B", "S"), "a tensor of integers, one for each key")),
    "query": (("B", "Hq", "L", "E"), _INPUT),
    "key": (("B", "Hkv", "S", "E"), _INPUT),
    "value": (("B", "Hkv", "S", "Ev"), _INPUT),
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_tensors(**tensors: Any) -> None:
    """Their types, and their shapes and devices against each other."""
    _require(not torch.jit.is_tracing(), "torch.jit.trace is not supported: use torch.export", TypeError)
    device, sizes = None, {}  # type: ignore
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
        if (kind is _RUNS or name == "key_places") and x.dim() == 1:  # one for all sequences
            letters = letters[1:]
        rule = f"{name} must be of shape ({', '.join(letters)})"
        if len(letters) != x.dim():
            _require(False, rule, **tensors)
        for letter, size in zip(letters, x.shape, strict=True):
            known, of = sizes.setdefault(letter, (size, name))
            if size != known:
                _require(False, f"{rule}, but {letter} is {size} in it and {known} in {of}", **tensors)
            if size == 0:
                _require(False, f"{rule}, and no dimension may be empty", **tensors)
        device = x.device if device is None else device
        if x.device != device:
            _require(False, f"{name} must be on the device of {next(iter(tensors))}: move it", **tensors)


def _require(holds: bool, rule: str, error: Any = ValueError, /, **got: Any) -> None:
    if not holds:  # only now are values formatted
        show = lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}" if isinstance(x, Tensor) else repr(x)[:80]
        shown = [f"{name} {show(x)}" for name, x in got.items() if x is not None or len(got) == 1]
        raise error(f"{rule}; got {', '.join(shown)}" if shown else rule)


# ---- 7. Kernels -------------------------------------------------------------------------------------------

_TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])  # also of 2.15.0a0+nv


def _run_kernel(query, key, value, score_mod, block_mask, scale, return_lse, backend):
    query, key, value = (x.resolve_neg() for x in (query, key, value))  # kernels would ignore the sign
    options = _kernel_options(query, key, value, block_mask, backend)
    if torch.compiler.is_compiling():
        return _flex_attention(query, key, value, score_mod, block_mask, scale, return_lse, options)
    batch, head, token, element = query.stride()
    is_view = batch >= token > head >= element  # of (B, L, Hq, E), as in models
    query = query if is_view or not _keeps_bits() else query.contiguous()
    # Autograd hands a compiled function the gradient of its output contiguous, in a copy where it is a view.
    # So a view of tokens goes in as (B, L, Hq, E), and its output comes out so.
    as_tokens = is_view and torch.is_grad_enabled()
    query = query.transpose(1, 2) if as_tokens else query
    if _TORCH < (2, 12) and getattr(score_mod, "__defaults__", None):  # which does not see other defaults
        given = inspect.signature(score_mod).parameters.values()
        score_mod = partial(score_mod, **{x.name: x.default for x in given if x.default is not x.empty})
    inputs = key, value, score_mod, block_mask, scale, return_lse, options
    # A second value of a number that score_mod captures would become a variable: torch would then fail, or on
    # 2.11 use the first value. The setting has no public name. No public report was found.
    is_ours = score_mod is None and _origin_of(block_mask).is_ours
    numbers = nullcontext() if is_ours else torch._dynamo.config.patch(specialize_float=True)
    try:
        with _LOCK:  # torch breaks where two threads import what it compiles with
            flex = _compile(_keeps_bits())
        # Compiling flex_attention runs autograd. Were that in the thread of the device, it might wait there
        # for the first backward pass of another thread, which waits for the compiler.
        with numbers, torch.autograd.set_multithreading_enabled(False):
            output, lse = flex(query, *inputs, as_tokens)
    except Exception as error:  # none of these has a public name
        if type(error).__name__ == "FailOnRecompileLimitHit":
            rule = f"{_MOST_KERNELS} kinds of input are compiled, the limit. Use fewer head sizes, dtypes, "
            rule += "score_mods or batch sizes that decode, or call torch.compiler.reset()"
        elif score_mod is not None and type(error).__module__.startswith("torch._"):
            rule = "torch could not compile score_mod, which must return a float that it computes from score"
        else:
            raise
        raise RuntimeError(rule) from error
    return output.transpose(1, 2) if as_tokens else output, lse


_MOST_KERNELS = 64  # torch's own limit is 8
_LOCK = threading.Lock()


@cache
def _compile(same_bits):
    options: dict[str, Any] = {
        # Left to itself torch would time ways to add up what decoding splits, and at times choose a slow one.
        "deterministic": True,
        "max_autotune": False,
        # Sums in one order, however the inputs are laid out. Otherwise, if lengths are variable and the
        # output is a view, the backward pass rounds sums of output times gradient to half precision.
        "pick_loop_orders": False,
    }
    options |= {"batch_invariant": True} if _TORCH >= (2, 13) else {}  # and whatever the batch size
    if same_bits:  # Add up term by term what decoding splits. The order in which Triton reduces depends on
        # what it knows of the strides, which differs between a batch of one and larger ones.
        options["unroll_reductions_threshold"] = _MOST_SPLITS + 1
    # With fullgraph torch raises at the limit; else it would run uncompiled, with memory for every score.
    how: dict[str, Any] = {"fullgraph": True, "options": options, "recompile_limit": _MOST_KERNELS}
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:  # torch 2.11: one for all
        least = how.pop("recompile_limit")
        torch.compiler.config.recompile_limit = max(least, torch.compiler.config.recompile_limit)
    return torch.compile(_flex_attention, **how)


def _flex_attention(query, key, value, score_mod, block_mask, scale, return_lse, options, as_tokens=False):
    query = query.transpose(1, 2) if as_tokens else query  # (B, Hq, L, E)
    batch_size, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
    # A trace can only follow a loop whose length it knows, so these sizes become constants of the kernel,
    # which is faster for it. The kernel for decoding needs the batch size, too.
    for size in (heads, kv_heads, batch_size)[: 3 if options["BACKEND"] == "TRITON_DECODE" else 2]:
        for _ in range(size):
            pass
    # Otherwise Inductor guards on these two: "equal, or the second is 1". Torch's cache of compiled graphs
    # joins guards without brackets, "a and b or c", and gave out a kernel for another block size. No public
    # report was found.
    _require(batch_size == value.shape[0], "query and value must have one batch size")
    aux = AuxRequest(lse=return_lse)
    how = {"enable_gqa": heads != kv_heads, "kernel_options": options, "return_aux": aux}
    output, aux = flex_attention(query, key, value, score_mod, block_mask, scale, **how)
    return output.transpose(1, 2) if as_tokens else output, aux.lse


def _kernel_options(query, key, value, block_mask, backend="triton"):
    """The kernel_options of flex_attention: which kernel, and how.

    A kernel goes through a tile of the mask in steps, each of so many queries (BLOCK_M) and keys (BLOCK_N).
    What was measured on H100 and H200 is used on Hopper; elsewhere torch chooses.
    """
    if backend == "flash":
        return {"BACKEND": "FLASH"}
    if decoding := _decoding_options(query, key, value, block_mask):
        return decoding
    blocks = getattr(block_mask, "BLOCK_SIZE", (128, 128))
    # Whether no step reaches past the end. Torch 2.11 sees it only in lengths that are compiled in, and
    # wrongly where a block of the mask is larger than 128.
    divisible = not (query.shape[2] % blocks[0] or key.shape[2] % blocks[1])
    # Left to itself torch takes the kernel for decoding for up to 127 queries, and finds no configuration of
    # it from 129 rows on.
    options = {"BACKEND": "TRITON", "IS_DIVISIBLE": divisible}
    on_hopper = _is_on_hopper(query) and query.element_size() == 2
    size, value_size = query.shape[3], value.shape[3]
    is_64, is_128 = on_hopper and size <= 64, on_hopper and max(size, value_size) == 128
    is_short, origin = is_128 and query.shape[2] < 128, _origin_of(block_mask)
    is_long = is_128 and not is_short and origin.is_ours
    # Torch compiles loads by descriptor (TMA) also for rows that begin between multiples of 16 bytes, and
    # then reads wrongly; while a caller's graph is traced, where they begin cannot be asked.
    strides = [n for x in (query, key, value) for n in x.stride()[:3]]
    tma = {"fwd_USE_TMA": not (torch.compiler.is_compiling() or any(n % 8 for n in strides))}
    is_wide = value_size > 256 or size > 512
    wide = 32 if (size + value_size) * query.element_size() <= 2048 else 16
    q_step, kv_step = (math.gcd(block, 128) for block in blocks)
    least = min(q_step, kv_step)
    for holds, measured in (  # where, and with which options; above it why; later rows win
        # Half the time of torch's steps, which are mostly empty.
        (is_short, _steps(64, 64) | {"fwd_num_stages": 3, "fwd_num_warps": 4}),
        # Two programs share a multiprocessor: one multiplies while the other exponentiates.
        (is_long and not origin.has_first, {"fwd_num_stages": 2, "fwd_num_warps": 4} | tma),
        # But where a window or packed rows cut tiles at both ends, larger steps gain.
        (is_long and origin.has_first, {"fwd_BLOCK_N": 128}),
        # Torch's own steps spill registers forward, and are slower backward.
        (is_64, {"fwd_BLOCK_N": 64, "bwd_num_warps": 4} | _steps(64, 64, "bwd")),
        # Torch's own steps of wide heads do not fit into shared memory, and few loads of them do.
        (is_wide, _steps(wide, wide) | {"fwd_num_stages": 1, "fwd_num_warps": 4}),
        (is_wide, _steps(wide, wide, "bwd") | {"bwd_num_stages": 1, "bwd_num_warps": 4}),
        # Smaller steps have room for loads that run ahead forward, and need fewer warps backward.
        (is_128 and least == 64, {"fwd_num_stages": 3, "bwd_num_warps": 4, "bwd_num_stages": 2}),
        # Steps must divide the blocks of the mask.
        (least < 128, _steps(q_step, kv_step) | _steps(q_step, kv_step, "bwd")),
    ):
        options |= measured if holds else {}
    return options


def _steps(queries, keys, passes="fwd"):
    """Steps of so many queries and keys, at most 64, for one of the passes."""
    m, n = min(queries, 64), min(keys, 64)
    if passes == "fwd":
        return {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n}
    return {"bwd_BLOCK_M1": min(m, n), "bwd_BLOCK_N1": n, "bwd_BLOCK_M2": m, "bwd_BLOCK_N2": min(m, n)}


_MOST_DECODING_QUERIES = 16  # that are left to the kernel for decoding
_MOST_SPLITS = 32  # into which decoding divides the keys


def _decoding_options(query, key, value, block_mask):
    """The options of the kernel for decoding, which splits the keys of few queries over the card.

    None where that kernel does not fit. Torch compiles it for one number of heads and one batch size.
    """
    (batch_size, heads, q_len, size), kv_heads = query.shape, key.shape[1]
    group, blocks = heads // kv_heads, getattr(block_mask, "BLOCK_SIZE", (128, 128))
    rows = max(group, 16 if q_len * group <= 16 else 64)  # of a step: queries times group
    is_whole = group & group - 1 == 0 and not (blocks[0] % rows or blocks[1] % 64)
    fits = q_len <= _MOST_DECODING_QUERIES and batch_size * kv_heads < 2**16  # the grid of CUDA
    if not (is_whole and fits and (block_mask is None or block_mask.shape[1] == 1)):
        return None
    options = {"BACKEND": "TRITON_DECODE", "IS_DIVISIBLE": False, "BLOCK_M": rows}
    if _keeps_bits() or _is_on_hopper(query):
        programs = 1024 if rows <= 16 else 256  # work for the whole card, as measured
        sequences = _SPLIT_AS_FOR if _keeps_bits() else batch_size
        options["SPLIT_KV"] = min(_MOST_SPLITS, max(1, programs // (sequences * kv_heads)))
    if _is_on_hopper(query):
        width = max(size, value.shape[3]) * query.element_size()  # bytes
        stages = 3 if width <= 256 else 2 if width <= 512 else 1  # loads run ahead as far as they fit
        options |= {"fwd_num_warps": 4, "fwd_num_stages": stages, "fwd_BLOCK_N": 64 if width <= 2048 else 32}
    return options


def _is_on_hopper(x):
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9


_FLASH_FROM = 1e11  # B * Hq * S * S * E from which FlashAttention-4's kernels were measured to be faster
_HAS_FLASH = False
with suppress(ImportError):  # asked once, because torch.compile cannot trace it
    _HAS_FLASH = find_spec("flash_attn.cute") is not None


def _can_use_flash(query, key, value, score_mod, return_lse):
    is_here = _HAS_FLASH and _is_on_hopper(query)  # the only kind of card it was tried on
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    sizes_fit = not any(size % 8 or size > 128 for size in (query.shape[3], value.shape[3]))
    is_plain = query.shape[2] == key.shape[2] and not return_lse
    fits = is_plain or (_TORCH >= (2, 15) and query.shape[2] >= 128)  # torch 2.11 cannot; fewer: not tried
    return is_here and is_half and sizes_fit and score_mod is None and fits  # score_mods are slower in some


def _is_faster_with_flash(query, key, block_mask):
    # Where the gain outweighs the cost of launching, as measured. How much is padding only the device knows.
    is_usual = block_mask is not None and block_mask.BLOCK_SIZE == (128, 128)
    keys = 2 * key.shape[2] - query.shape[2]  # twice what the last queries see, on average
    keys = (keys + 2048) // 2 if _origin_of(block_mask).is_computed else keys
    is_large = query.numel() * keys >= _FLASH_FROM
    return is_usual and is_large and not torch.are_deterministic_algorithms_enabled()


# In a caller's graph this is one operator that the compiler does not see into. It would lay the lists out as
# it likes, where the kernels read them as contiguous, and compile anew for each number of blocks. It carries
# the name of this module: copies of the file in one process would share it otherwise.
_OPERATOR = f"{__name__.replace('.', '_')}::find_tiles"
_find_tiles_operator = torch.library.custom_op(_OPERATOR, _find_tiles, mutates_args=())


@_find_tiles_operator.register_fake
def _(first, last, until, keys, pads, query_pads, q_block, kv_block, least, decodes):
    """The shapes of the results, in terms that hold for all lengths."""
    (batch_size, kv_len), q_len = pads.shape, query_pads.shape[1]
    rows = 1 if decodes else torch.sym_max(least, (q_len + q_block - 1) // q_block)
    columns = torch.sym_max(least, (kv_len + kv_block - 1) // kv_block)
    q_filled = q_len if decodes and pads.is_cuda and q_len < kv_len else rows * q_block
    tables = [x.new_empty(batch_size, q_filled) for x in (last, first) if x is not None]
    tables += [] if until is None else [until.new_empty(batch_size, columns * kv_block)]
    of = lambda *sizes: pads.new_empty(1 if decodes else 2, batch_size, 1, *sizes, dtype=torch.int32)
    lists = [of(rows), of(rows, columns)]
    return tables, lists if decodes else [*lists, of(columns), of(columns, rows)]


@_find_tiles_operator.register_vmap
def _(info, in_dims, *args):
    at = lambda i: [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]
    results = zip(*(_find_tiles_operator(*at(i)) for i in range(info.batch_size)), strict=True)
    stacked = tuple([torch.stack(x) for x in zip(*result, strict=True)] for result in results)
    return stacked, tuple([0] * len(result) for result in stacked)


# ---- 8. The same bits -------------------------------------------------------------------------------------
# Under torch.use_deterministic_algorithms(True), from torch 2.15 on, a sequence gets the same bits on CUDA,
# whatever shares its batch: the output, the log-sum-exp, and the gradients of query, key and value. The
# lengths must be multiples of 128, and so must BLOCK_SIZE: collate with pad_to_multiple_of=128. The batch may
# have any size, be padded on the right to any such length, and on the left by multiples of 128. A decoding
# step under torch.no_grad gets the same bits in a batch of any size and in a cache of any capacity, and also
# if the sequence is moved in its row by a multiple of 128. The block mask must be made here, under the same
# setting and with the same options. In a graph that the caller compiles, that compilation decides the bits.
# With backend="triton" chunks of whole blocks have the bits of the whole pass. Decoding has others, so
# examples/same_bits.py samples by blocks. Before torch 2.15 the setting only leaves out FlashAttention-4's
# kernels, which add up gradients in any order.

_SPLIT_AS_FOR = 4  # the batch size that decoding splits the keys for: into how many parts decides the bits


def _keeps_bits():
    return _TORCH >= (2, 15) and torch.are_deterministic_algorithms_enabled()  # before, batch sizes matter


if __name__ == "__main__":
    raise SystemExit(main())
