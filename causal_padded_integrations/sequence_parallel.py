"""Attention over sequences that are divided between the ranks of a mesh, with causal_padded_flexattn."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from causal_padded_flexattn import _cast_for_autocast, attend

__all__ = ["sequence_parallel_attention"]


def sequence_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, mesh: Any, **options: Any
) -> Any:
    """Run `attend` on sequences that are sharded over the ranks of a mesh.

    Each rank gives its tokens, receives all tokens of some of the heads, attends, and gives the output back:
    one all-to-all before and one after attention, and the same for gradients, as in DeepSpeed-Ulysses,
    https://arxiv.org/abs/2309.14509.

    Args:
        query: (B, Hq, S / ranks, E), the tokens of this rank. Ranks hold the sequence in their order.
        key: (B, Hkv, S / ranks, E).
        value: (B, Hkv, S / ranks, Ev).
        block_mask: (B, 1, S, S), of the whole sequence, on every rank.
        mesh: a DeviceMesh of one dimension. Its size must divide Hq, and divide Hkv or be a multiple of it.
        options: those of `attend`. In a score_mod, h counts the heads of the whole model, and q_idx and
            kv_idx the tokens of the whole sequence.

    Returns:
        (B, Hq, S / ranks, Ev), the output for the tokens of this rank. With return_lse, also theirs.

    Raises:
        TypeError, ValueError: the mesh, the length or the heads do not fit, or what `attend` says.
    """
    query, key, value = _cast_for_autocast(query, key, value)
    _check({"query": query, "key": key, "value": value}, block_mask, mesh)
    ranks, heads, kv_heads = mesh.size(), query.shape[1], key.shape[1]
    if ranks == 1:
        return attend(query, key, value, block_mask, **options)
    copies, group = ranks // kv_heads, mesh.get_group()
    if copies > 1:  # each head of key and value goes to several ranks
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    query, key, value = (_Exchange.apply(x, 2, group) for x in (query, key, value))  # (B, H / ranks, S, E)
    if options.get("score_mod") is not None:
        first_head = mesh.get_local_rank() * (heads // ranks)
        options["score_mod"] = _count_heads_from(first_head, options["score_mod"], query)
    result = attend(query, key, value, block_mask, **options)
    if isinstance(result, tuple):
        return tuple(_Exchange.apply(x, 1, group) for x in result)
    return _Exchange.apply(result, 1, group)


def _check(tensors, block_mask, mesh):
    ranks = mesh.size()
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, over which the sequence is sharded; got {mesh.ndim}")
    shape = block_mask.shape if isinstance(block_mask, BlockMask) else None
    if shape is None or shape[1] != 1 or shape[2] != shape[3]:
        rule = "block_mask must be a BlockMask of the whole sequence that serves all heads, (B, 1, S, S)"
        raise ValueError(f"{rule}; got {shape or type(block_mask)}")
    for name, x in tensors.items():
        if x.dim() != 4 or x.shape[2] * ranks != shape[3]:
            rule = f"{name} must be this rank's part, of shape (B, heads, S / ranks, head size)"
            raise ValueError(f"{rule}; got {tuple(x.shape)}, S {shape[3]} and {ranks} ranks")
    heads, kv_heads = tensors["query"].shape[1], tensors["key"].shape[1]
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        rule = "ranks must divide the heads of query, and divide those of key or be a multiple of them"
        raise ValueError(f"{rule}: use fewer; got {ranks} ranks, {heads} and {kv_heads} heads")


def _count_heads_from(first, score_mod, query):
    """The score_mod of a rank that has the heads from first on."""
    # Looked up, since torch compiles a kernel for each number that a score_mod captures.
    first_head = torch.full_like(query[:, 0, 0, 0], first, dtype=torch.int32)  # (B,)
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h + first_head[b], q_idx, kv_idx)


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
