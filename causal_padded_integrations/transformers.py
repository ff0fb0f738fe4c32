"""The masks and kernels of causal_padded_flexattn in models of transformers, version 5 or later.

    from causal_padded_integrations.transformers import register

    register()
    model.set_attn_implementation("flex_attention")

This is all that most people call. It makes the masks in closed form, where it can, and runs the kernels of
causal_padded_flexattn. How it finds out what a mask of transformers allows is told before the stand-ins.
"""

from functools import partial
from operator import add, eq, ge, gt, le, lt, sub
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from causal_padded_flexattn import (
    _attend,
    _build_block_mask,
    _cast_for_autocast,
    create_causal_padding_block_mask,
)

__all__ = ["attention", "block_mask", "register"]

_END = 2**29  # a place behind the end of every sequence


def register(padding_side: str | None = None) -> None:
    """Make transformers models with attn_implementation="flex_attention" use the masks and kernels here.

    Args:
        padding_side: "right" or "left" promises that all padding stands there, in every batch that is not
            decoded. Causal masks, with a window or without, are then faster to attend with. What happens if
            the promise is broken is told in `create_causal_padding_block_mask`.

    Raises:
        ValueError: the padding_side is another word.
    """
    if padding_side not in (None, "right", "left"):
        raise ValueError(f'padding_side must be "right", "left" or None; got {padding_side!r}')
    promised = block_mask if padding_side is None else partial(block_mask, padding_side=padding_side)
    AttentionMaskInterface.register("flex_attention", promised)
    AttentionInterface.register("flex_attention", attention)


def block_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Any = None, attention_mask: Tensor | None = None, device: Any = "cpu",
    padding_side: str | None = None, **kwargs: Any,
) -> BlockMask:  # fmt: skip
    """Build the masks of transformers in closed form.

    A mask in which some query sees more than one run of keys, or whose function does something that the
    stand-ins below do not support, is left to the function of transformers that this one replaces. Whether
    the numbers of packed sequences or of images make runs is read from the device. In a compiled model it is
    asserted on the device instead.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function: what transformers passes to its
            own function.
        attention_mask: (B, up to kv_offset + S), 0 or False where the token is padding. None means that there
            is no padding.
        device: what transformers passes to its own function.
        padding_side: the promise that was made to `register`.
        kwargs: what else transformers passes. All of it goes to the function that is replaced.

    Returns:
        A BlockMask of shape (B, 1, L, S). Padded queries of a causal mask see nothing here; in transformers
        they see the keys before them.
    """
    if attention_mask is None:
        pads = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        pads = attention_mask[:, kv_offset : kv_offset + kv_length] == 0
        pads = F.pad(pads, (0, kv_length - pads.shape[1]), value=True)  # what a static cache has room for
    offset = q_offset - kv_offset if kv_offset else q_offset
    offset = offset.reshape(()) if isinstance(offset, Tensor) else offset  # (1,) in some versions
    side = padding_side if q_length == kv_length else None  # a cache has room for what comes
    causal = partial(create_causal_padding_block_mask, pads, q_length, q_offset=offset, padding_side=side)
    # A decoder makes this one at every step, so it goes the shortest way.
    if mask_function in (None, masking_utils.causal_mask_function):
        return causal()
    keys = torch.arange(kv_length, dtype=torch.int32, device=device)
    if isinstance(offset, Tensor) and q_length == 1:
        queries = offset.reshape(1).int()  # (L,), their places among the keys
    else:
        queries = torch.arange(q_length, dtype=torch.int32, device=device) + offset
    if mask_function is masking_utils.bidirectional_mask_function or "allow_is_bidirectional_skip" in kwargs:
        # They may be other tokens than the keys, and nothing says which of them are padding.
        query_pads = pads.new_zeros(batch_size, q_length)
    else:
        query_pads = pads.index_select(1, queries)
    try:
        own_pads = None if attention_mask is None else pads
        run = _find_run_of(mask_function, batch_size, keys, queries, kv_offset, own_pads)
        back, ahead = run.reach
        if side is not None and back is not None and back <= 0 and ahead == 0:  # a window
            return causal(window=1 - back)
        first, last, is_run = _tables_of(run, queries)
        is_run = is_run if is_run is True else torch.all(is_run | query_pads)
        if is_run is not True and torch.compiler.is_compiling():
            # It has no public name.
            torch._assert_async(is_run, "a query does not see one run of keys: use sdpa")
        elif not is_run:
            raise TypeError
    except (AttributeError, TypeError):  # what stand-ins do not have, or do not support; the rest is raised
        if isinstance(q_offset, Tensor):
            q_offset = q_offset.clone()  # a static cache moves it before attention asks this mask
        sizes: Any = batch_size, q_length, kv_length, q_offset, kv_offset
        theirs: Any = masking_utils.flex_attention_mask  # as it is now: it may be replaced
        return theirs(*sizes, mask_function, attention_mask, device, **kwargs)
    # Not by create_block_mask_from_runs, whose checks every decoding step would pay for.
    return _build_block_mask(first, last, None, keys, pads, query_pads, (128, 128))


# ---- The stand-ins ----------------------------------------------------------------------------------------
# transformers describes a mask by a function of four numbers, the places of a batch element, a head, a query
# and a key, that says whether this pair is allowed. The runs of keys are found without asking it for every
# pair: it is called once, with stand-ins for the four numbers, which compute runs in place of answers. This
# is known as abstract interpretation.
#
# - The stand-in for the query holds the places of all queries, and the one for the key those of all keys.
#   They can be added to, subtracted from, divided, and used to look numbers up in a table.
# - A comparison of the two gives a _Run: for each query, the first and the last key for which it holds.
# - `&` of two runs begins where the later one begins, and ends where the earlier one ends.
# - `|` of two runs is a run if they overlap, if they touch, or if one of them is empty.
#
# For example, a window of two keys, `(kv_idx > q_idx - 2) & (kv_idx <= q_idx)`, for four queries:
#
#     q_idx - 2                                      -2       -1       0        1
#     kv_idx > q_idx - 2      a run from ... on      -1       0        1        2
#     kv_idx <= q_idx         a run up to ...        0        1        2        3
#     the two together        a run from ... to      -1 to 0  0 to 1   1 to 2   2 to 3
#
# What a stand-in cannot do is a TypeError, and then the mask is left to transformers. Numbers of a table are
# calculated in its own type, as transformers does, so that bytes wrap around in the same way.


def _find_run_of(mask_function, batch_size, keys, queries, kv_offset, pads):
    """The _Run of keys that each query sees."""
    batch = torch.arange(batch_size, dtype=torch.int32, device=keys.device)[:, None]
    query, key = (_Numbers(side, x[None], kv_offset) for side, x in (("query", queries), ("key", keys)))
    with _LookUp(queries, pads):
        return _as_run(mask_function(_Numbers("batch", batch), _StandIn(), query, key))


def _tables_of(run, queries):
    """The first and the last key that each query sees, and whether it sees all real keys between them.

    The first two are (B or 1, L). A first of None stands for 0. A plain True stands for all queries.
    """
    last = run.last if isinstance(run.last, Tensor) else queries.new_full((1, 1), run.last)
    near = lambda x: x if x.dtype == torch.int32 else x.clamp(-1, _END).int()
    as_table = lambda x: near(x).expand(-1, queries.shape[0])
    is_known = run.known_to == _END
    return as_table(run.first) if isinstance(run.first, Tensor) else None, as_table(last), is_known


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _is_int(x):
    return type(x) is int or isinstance(x, torch.SymInt)


def _fits(number, dtype):
    return torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max


class _StandIn:
    """Stands for an argument of a mask function, or for what is computed of it. The rest is a TypeError."""

    device = None  # mask functions ask for it, to move tables there

    def __eq__(self, other):
        raise TypeError

    def __bool__(self):
        raise TypeError


class _Numbers(_StandIn):
    """Numbers of the batch, (B, 1), of the queries, (B or 1, L), or of the keys, (B or 1, S): base + shift.

    The shift is a plain number, so that `q_idx - 2 + 1` launches one kernel and not two. What kind they are:
        "place": their places. int32 holds them here, where transformers has int64.
        "quotient": such places divided, of which several may be one number.
        "table": numbers of any size in their own type, looked up. Those of keys may fall.
    `pieces`, the places of the queries and the pads, are what numbers that may fall are searched with.
    """

    def __init__(self, side, base, shift=0, kind="place", pieces=None):
        self.side, self.base, self.shift, self.kind, self.pieces = side, base, shift, kind, pieces

    @property
    def values(self):
        return self.base + self.shift if self.shift else self.base

    @property
    def values_as_theirs(self):
        return self.values if self.kind == "table" else self.values.long()

    def _with(self, operation, other):
        if isinstance(other, _Numbers) and other.side == "batch":
            values = operation(self.values_as_theirs, other.values_as_theirs)
            return _Numbers(self.side, values, 0, "table", self.pieces)
        shift = operation(self.shift, other) if _is_int(other) else _END
        if not -_END < shift < _END:  # so that 32 bits hold what comes of it
            raise TypeError
        return _Numbers(self.side, self.base, shift, self.kind, self.pieces)

    def __add__(self, other):
        return self._with(add, other)

    def __sub__(self, other):
        if self.side == "query" and isinstance(other, _Numbers) and other.side == "key":
            return _Difference(self, other)
        return self._with(sub, other)

    def __floordiv__(self, size):
        if not (_is_int(size) and size > 0):
            raise TypeError
        kind = "quotient" if self.kind == "place" else self.kind
        return _Numbers(self.side, self.values // size, 0, kind, self.pieces)

    def __lt__(self, other):
        return _compare(self, lt, other)

    def __le__(self, other):
        return _compare(self, le, other)

    def __gt__(self, other):
        return _compare(self, gt, other)

    def __ge__(self, other):
        return _compare(self, ge, other)

    def __eq__(self, other):
        return _compare(self, eq, other)

    def new_ones(self, *args, **kwargs):  # what an intersection begins with
        return _Run()

    def new_zeros(self, *args, **kwargs):  # what a union begins with
        return _Nothing()


class _Difference(_StandIn):
    """q_idx - kv_idx. Only its distance, abs(q_idx - kv_idx), can be compared, with a number."""

    def __init__(self, query, key):
        if "table" in (query.kind, key.kind):  # the difference might wrap around
            raise TypeError
        self.query, self.key = query, key

    def __abs__(self):
        return _Distance(self.query, self.key)


class _Distance(_Difference):
    def __le__(self, most):
        return (self.key >= self.query - most) & (self.key <= self.query + most)

    def __lt__(self, limit):
        return self <= limit - 1


class _Nothing(_StandIn):
    def __or__(self, run):
        return _as_run(run)


class _Run(_StandIn):
    """For each query the keys from first to last: (B or 1, L or 1), or a plain number for no limit.

    A table whose numbers fall is searched piece by piece, so that the answer may be known for some keys only:
    those from known_from to known_to. A known_to of _END says that it is known for all keys.

    Where the first or the last is the query's own place plus a plain number, `reach` has this number, so that
    a window is known as such. Otherwise it has None.
    """

    def __init__(self, first=0, last=_END, known_from=0, known_to=_END, reach=(None, None)):
        self.first, self.last, self.known_from, self.known_to = first, last, known_from, known_to
        self.reach = reach

    def to(self, device):
        return self

    def __and__(self, other):
        other = _as_run(other)
        known_from, known_to = _known_to_both(self, other)
        for one, limit in ((self, other), (other, self)):
            if isinstance(one.known_to, Tensor):
                # What one of them does not know does not matter, if the other, which is known for all keys,
                # allows none of those keys.
                is_empty = limit.first > limit.last
                is_inside = (one.known_from <= limit.first) & (limit.last <= one.known_to)
                is_settled = (is_empty | is_inside) & (limit.known_to == _END)
                known_from = torch.where(is_settled, 0, known_from)
                known_to = torch.where(is_settled, _END, known_to)
        first = _choose(torch.maximum, self.first, other.first)
        last = _choose(torch.minimum, self.last, other.last)
        limits = zip((self.first, self.last), (other.first, other.last), self.reach, other.reach, strict=True)
        reach = [
            theirs if not isinstance(x, Tensor) else None if isinstance(y, Tensor) else mine
            for x, y, mine, theirs in limits
        ]
        return _Run(first, last, known_from, known_to, reach)

    def __or__(self, other):
        other, ends = _as_run(other), []
        for run in (self, other):
            if not isinstance(run.first, Tensor) and not isinstance(run.last, Tensor):
                return run  # all keys
            is_empty = (run.last < run.first) | (run.last < 0)
            ends.append((torch.where(is_empty, _END, run.first), torch.where(is_empty, -1, run.last)))
        (first, last), (other_first, other_last) = ends
        overlap_or_touch = (first <= other_last + 1) & (other_first <= last + 1)
        is_run = overlap_or_touch | (last < 0) | (other_last < 0)  # or one of them is empty
        known_from, known_to = _known_to_both(self, other)
        known_to = torch.where(is_run, known_to, -1)  # what is no run is known nowhere
        return _Run(torch.minimum(first, other_first), torch.maximum(last, other_last), known_from, known_to)


def _known_to_both(x, y):
    known_from = _choose(torch.maximum, x.known_from, y.known_from)
    return known_from, _choose(torch.minimum, x.known_to, y.known_to)


def _choose(larger_or_smaller, x, y):
    """Of two limits, of which a plain number is none."""
    return x if not isinstance(y, Tensor) else y if not isinstance(x, Tensor) else larger_or_smaller(x, y)


def _as_run(x):
    if isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.bool:  # one answer for all pairs
        can_be_read = x.device.type == "cpu" and not torch.compiler.is_compiling()
        x = _Run() if can_be_read and x else None
    if not isinstance(x, _Run):
        raise TypeError
    return x


def _compare(x, how, y):
    """The keys for which numbers of the queries, or of the batch, compare so with numbers of the keys."""
    if isinstance(y, _Numbers) and y.side == "key":
        x, how, y = y, {lt: gt, le: ge, gt: lt, ge: le, eq: eq}[how], x
    if _is_int(y):
        # Torch converts it to the type of the table, where it may not fit.
        if x.kind == "table" and not _fits(y, x.base.dtype):
            raise TypeError
        is_near = -_END < y < _END
        dtype, kind = (torch.int32, "place") if is_near else (torch.int64, "table")
        y = _Numbers("batch", torch.full_like(x.base[:1, :1], y, dtype=dtype), 0, kind)
    if not isinstance(y, _Numbers) or y.side == "key":
        raise TypeError
    if x.side != "key":  # all keys, or none
        return _Run(0, torch.where(how(x.values, y.values), _END, -1))
    known_from, known_to, reach = 0, _END, None
    if x.kind == "place":  # each number is one place
        reach = y.shift - x.shift if (y.side, y.kind) == ("query", "place") else None
        if y.kind == "table":
            y = _Numbers(y.side, y.values.long().clamp(-_END, _END))
        begin = end = _Numbers(y.side, y.base, y.shift - x.shift)
    else:
        keys, wanted = x.values.long(), y.values.long()
        if x.pieces is None:
            begin, end = _search(keys, wanted)
        else:
            find: Any = _find_in_pieces_operator if torch.compiler.is_compiling() else _find_in_pieces
            begin, end, known_from, known_to = find(keys, wanted, *x.pieces, how is eq)
        begin, end = _Numbers("query", begin), _Numbers("query", end)
    first = begin.values if how in (ge, eq) else (end + 1).values if how is gt else 0
    last = end.values if how in (le, eq) else (begin - 1).values if how is lt else _END
    more = {gt: 1, lt: -1}.get(how, 0)
    reaches = [reach + more if reach is not None and isinstance(x, Tensor) else None for x in (first, last)]
    return _Run(first, last, known_from, known_to, reaches)


def _search(keys, wanted):
    """Where in each row of keys, which do not fall, the wanted numbers begin and end, or would."""
    rows = max(keys.shape[0], wanted.shape[0])
    # Torch 2.11 cannot compile an expand that changes nothing.
    keys, wanted = (x if x.shape[0] == rows else x.expand(rows, -1) for x in (keys, wanted))
    search = partial(torch.searchsorted, keys.contiguous(), wanted.contiguous(), out_int32=True)
    return search(), search(right=True) - 1


def _find_in_pieces(
    keys: Tensor, wanted: Tensor, queries: Tensor, pads: Tensor | None, is_equal: bool
) -> list[Tensor]:
    """Where in each row of keys, which may fall, the wanted numbers begin and end, as far as is known.

    Where the numbers fall a piece begins. A query looks in the piece that it stands in.

    Returns:
        begin, end, known_from, known_to: (B, L). The first two are right for the keys from known_from to
        known_to.
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
    known_from, known_to = _search(pieces, piece)
    if is_equal:
        # Each number that is not negative has one place, if it is larger than all before where it begins.
        again = (steps != 0) & (keys[:, 1:] >= 0) & (keys[:, 1:] <= keys.cummax(1).values[:, :-1])
        once = (wanted >= 0) & (keys.gather(1, own) == wanted) & ~again.any(1, keepdim=True)
        known_from, known_to = torch.where(once, 0, known_from), torch.where(once, _END, known_to)
    known_to = torch.where((keys == keys.int()).all(), known_to, -1)  # the piece takes the bits above
    wanted = wanted.clamp(-(2**31) - 1, 2**31)
    begin, end = _search(keys + (pieces << 33), wanted + (piece << 33))
    return [begin, end, known_from, known_to]


# This is an operator of its own, because torch 2.11 fails to compile some uses of cummax and searchsorted.
_find_in_pieces_operator = torch.library.custom_op(
    f"{__name__.replace('.', '_')}::find_in_pieces", _find_in_pieces, mutates_args=()
)


@_find_in_pieces_operator.register_fake
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
        stand_ins: list[Any] = [x for x in index if isinstance(x, _StandIn)]
        if function is not torch.Tensor.__getitem__ or not stand_ins:
            return function(*args, **(kwargs or {}))
        sides = {x.side for x in stand_ins} - {"batch"}  # a head has none
        if len(sides) > 1:
            raise TypeError
        (side,) = sides or {"batch"}
        numbers = args[0][tuple(x.values if isinstance(x, _Numbers) else x for x in index)]
        if numbers.dim() != 2 or numbers.dtype not in _INTEGERS:
            raise TypeError
        return _Numbers(side, numbers, 0, "table", (self.queries, self.pads) if side == "key" else None)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Run the "flex_attention" of transformers with the kernels of `attend`.

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
    if dropout:
        raise ValueError(f"flex_attention has no dropout: set attention_dropout to 0; got dropout {dropout}")
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
    # Not by attend, whose checks every layer of every decoding step would pay for, and which needs a mask.
    output, lse = _attend(query, key, value, modifies, block_mask, scaling, s_aux is not None)
    if s_aux is not None:  # a sink is one more key, with a value of zero, that takes its share of the softmax
        share = torch.sigmoid(lse - s_aux.float()[:, None])  # (B, Hq, L)
        output = output * share.unsqueeze(-1).to(output.dtype)
    return output.transpose(1, 2).contiguous(), None
