"""The cases that the benchmarks share, and their tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import Row, differentiate
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from causal_padded_flexattn import create_block_mask_from_runs, create_causal_padding_block_mask


def padded(lengths: Sequence[int], kv_len: int, side: str, device: str) -> Tensor:
    """(B, S): True where a sequence of that length, padded on that side, holds padding."""
    positions = torch.arange(kv_len, device=device)
    length = torch.tensor(lengths, device=device)[:, None]
    return positions >= length if side == "right" else positions < kv_len - length


def right_padding(
    batch_size: int, kv_len: int, generator: torch.Generator | None = None, device: str = "cuda"
) -> Tensor:
    """(B, S): lengths between an eighth of kv_len and all of it, about 44 % padding."""
    lengths = torch.randint(kv_len // 8, kv_len + 1, (batch_size,), generator=generator)
    return padded(lengths.tolist(), kv_len, "right", device)


def block_mask_of(
    pads: Tensor, window: int | None = None, documents: Tensor | None = None, **options: Any
) -> BlockMask:
    """Causal; with the numbers of documents, (B, S), a token sees those of its own document only."""
    if documents is None:
        return create_causal_padding_block_mask(pads, window=window, **options)
    place = torch.arange(pads.shape[1], device=pads.device)
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    first = torch.where(begins, place, 0).cummax(1).values  # (B, S), where the document of each token begins
    first = first if window is None else torch.maximum(first, place - window + 1)
    return create_block_mask_from_runs(first, place, pads, **options)


@dataclass(frozen=True)
class Case:
    batch_size: int
    kv_len: int
    head_dim: int
    heads: int
    kv_heads: int
    padding: int  # percent of the tokens
    side: str
    window: int | None = None
    documents: int = 1  # in a row, equally long

    def lengths(self) -> list[int]:
        """Evenly spread about their mean, which leaves that much padding; up to the whole length at 40 %."""
        real = 1 - self.padding / 100
        spread = min(1 - real, 0.9 * real) if self.batch_size > 1 else 0.0
        shares = torch.linspace(real - spread, real + spread, self.batch_size).tolist()
        return [max(1, round(self.kv_len * share)) for share in shares]

    def pieces(self) -> list[int]:
        """The lengths of what is attended to on its own: the documents, of which each row has its share."""
        n = self.documents
        return [(i + 1) * length // n - i * length // n for length in self.lengths() for i in range(n)]

    def pairs(self) -> int:
        """What the mask allows in each head."""
        reach = [(length, min(length, self.window or length)) for length in self.pieces()]
        return sum(wide * (wide + 1) // 2 + (length - wide) * wide for length, wide in reach)

    def flops(self) -> int:
        """Of the forward pass: two matrix products, for the pairs that the mask allows."""
        return 4 * self.heads * self.head_dim * self.pairs()

    @classmethod
    def of(cls, row: Row) -> "Case":
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        padding = f"{self.padding} % {self.side} padding" if self.padding else "no padding"
        seen = f", window {self.window}" if self.window else ""
        seen += f", {self.documents} documents a row" if self.documents > 1 else ""
        return f"B{self.batch_size} S{self.kv_len} {heads} D{self.head_dim}, {padding}{seen}"


class _Pack(torch.autograd.Function):
    """index_select whose backward pass writes, as FlashAttention's does, where torch's own adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.length, *grad.shape[1:]).index_copy_(0, rows, grad), None


class Batch:
    """The tensors of a case: (B, H, S, D) views of (B, S, H, D), as models have them; packed, (T, H, D)."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.pads = padded(case.lengths(), case.kv_len, case.side, device)  # (B, S)
        self.real = (~self.pads).flatten().nonzero().squeeze(1)  # (T,)
        pieces = torch.tensor(case.pieces(), device=device)
        self.cumulative = F.pad(pieces.cumsum(0), (1, 0)).int()  # (pieces + 1,)
        names = torch.arange(len(pieces), device=device).repeat_interleave(pieces)  # (T,)
        self.places = self.real % case.kv_len  # (T,): in its row
        self.first = self.places - torch.arange(len(names), device=device) + self.cumulative[names]  # seen
        filled = torch.zeros(self.pads.numel(), dtype=names.dtype, device=device)
        self.documents = filled.index_copy(0, self.real, names).view_as(self.pads)  # (B, S)

        def tensor(heads: int) -> Tensor:
            shape = (case.batch_size, case.kv_len, heads, case.head_dim)
            return torch.randn(shape, device=device, dtype=self.dtype, generator=generator).transpose(1, 2)

        self.inputs = [tensor(case.heads), tensor(case.kv_heads), tensor(case.kv_heads)]
        self.grad_output = tensor(case.heads).masked_fill_(self.pads[:, None, :, None], 0.0)  # lies as they

    def pack(self, x: Tensor) -> Tensor:
        """(B, H, S, D) to (T, H, D): the real tokens alone."""
        return _Pack.apply(x.transpose(1, 2).flatten(0, 1), self.real)

    def unpack(self, x: Tensor) -> Tensor:
        """(T, H, D) to (B, H, S, D): zeros where padding is."""
        rows = x.new_zeros(self.pads.numel(), *x.shape[1:]).index_copy(0, self.real, x)
        return rows.unflatten(0, self.pads.shape).transpose(1, 2)

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        """The output and the gradients, packed: each piece alone, in that dtype."""
        packed = [self.pack(x).to(dtype) for x in (*self.inputs, self.grad_output)]
        group, window = self.case.heads // self.case.kv_heads, self.case.window

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
            views = (x.transpose(0, 1)[None] for x in (query, key, value))
            mask = None
            if window:
                mask = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device)
                mask = mask.tril().triu(1 - window)
            output = F.scaled_dot_product_attention(*views, mask, is_causal=mask is None)
            return output[0].transpose(0, 1)

        pieces = zip(*(x.split(self.case.pieces()) for x in packed), strict=True)
        results = [differentiate(attention, inputs, grad) for *inputs, grad in pieces]
        return [torch.cat(x) for x in zip(*results, strict=True)]
