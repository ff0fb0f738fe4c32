"""Attention over a sequence that is divided between the ranks of a mesh, with keys and values gathered.

Each rank keeps some of the tokens, in an order that gives all ranks the same work, and gathers the keys and
values of the others. Any number of heads will do. `sequence_parallel_attention` needs numbers of heads that
the ranks divide. There it sends less if key and value have many heads, and its results have the bits of one
GPU. This one is for the other numbers, and for few heads of key and value, which are cheap to gather.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.attention.flex_attention import BlockMask

from causal_padded_flexattn import attend, create_block_mask_from_runs, create_causal_padding_block_mask

__all__ = ["balanced_places", "context_parallel_attention", "context_parallel_block_mask"]


def balanced_places(pads: Tensor, ranks: int, block: int = 128) -> Tensor:
    """Find an order of the tokens in which every rank has as much to compute.

    Blocks of queries are sorted by the number of tiles that they have in the causal block mask, and dealt out
    back and forth, which also balances masks with a window. Nothing waits for the device. Rank r keeps the
    tokens in the r-th part of the result:

        places = balanced_places(pads, ranks)  # the same on every rank
        own = tokens.gather(1, places.chunk(ranks, dim=1)[rank])  # tokens: (B, S)

    Args:
        pads: (B, S), torch.bool, True where the token is padding. S must be a multiple of ranks * block.
        ranks: the number of ranks.
        block: how many tokens stay together, the block size of the mask.

    Returns:
        (B, S), int64: for each token in the new order its place in the sequence.

    Raises:
        TypeError, ValueError: the length does not fit, or what `create_causal_padding_block_mask` raises.
    """
    block_mask = create_causal_padding_block_mask(pads, BLOCK_SIZE=block)
    if pads.shape[1] % (ranks * block):
        rule = "the length must be a multiple of ranks * block: pad the sequences, or take smaller blocks"
        raise ValueError(f"{rule}; got {pads.shape[1]} tokens, {ranks} ranks and blocks of {block}")
    tiles: Any = block_mask.kv_num_blocks[:, 0]  # (B, blocks)
    tiles = tiles if block_mask.full_kv_num_blocks is None else tiles + block_mask.full_kv_num_blocks[:, 0]
    rounds = tiles.argsort(dim=1, descending=True, stable=True).unflatten(1, (-1, ranks))
    rounds[:, 1::2] = rounds[:, 1::2].flip(2)
    blocks = rounds.mT.sort(dim=2).values.flatten(1)  # (B, blocks), those of the first rank first
    return (blocks[:, :, None] * block + torch.arange(block, device=pads.device)).flatten(1)


def context_parallel_block_mask(
    pads: Tensor, places: Tensor, mesh: Any, *, window: int | None = None, block: int = 128
) -> BlockMask:
    """Build this rank's block mask of causal attention over a padded batch: its queries against all keys.

    Args:
        pads: (B, S), torch.bool, True where the token is padding, in the order of the sequence.
        places: (B, S), the order in which ranks keep the tokens, such as `balanced_places` returns it.
        mesh: a DeviceMesh of one dimension.
        window: how many places back a query sees, its own included. None means all.
        block: the number of tokens in a block.

    Returns:
        A BlockMask of shape (B, 1, S / ranks, S).

    Raises:
        TypeError, ValueError: the window is below 1, or what `create_block_mask_from_runs` raises.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, which is the query's own key; got {window}")
    stored = pads.gather(1, places)
    own, own_pads = (x.chunk(mesh.size(), dim=1)[mesh.get_local_rank()] for x in (places, stored))
    first = None if window is None else own - (window - 1)
    options: Any = {"query_pads": own_pads, "key_places": places, "BLOCK_SIZE": block}
    return create_block_mask_from_runs(first, own, stored, **options)


def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, mesh: Any, *,
    places: Tensor | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Run `attend` on this rank's queries and on the keys and values of all ranks.

    They are gathered by `DTensor.redistribute`, whose backward pass adds the gradients up and scatters them.

    Args:
        query: (B, Hq, S / ranks, E), the tokens of this rank.
        key: (B, Hkv, S / ranks, E).
        value: (B, Hkv, S / ranks, Ev).
        block_mask: (B, 1, S / ranks, S), of this rank's queries against all keys in the order of the ranks.
        mesh: a DeviceMesh of one dimension.
        places: (B, S), the order in which ranks keep the tokens. A score_mod needs it: its q_idx and kv_idx
            are places in the sequence.
        options: those of `attend`.

    Returns:
        (B, Hq, S / ranks, Ev), the output for the tokens of this rank. With return_lse, also theirs.

    Raises:
        TypeError, ValueError: the mesh or the mask does not fit, a score_mod comes without places, or what
            `attend` says.
    """
    ranks, shape = mesh.size(), block_mask.shape if isinstance(block_mask, BlockMask) else ()
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, over which the tokens are divided; got {mesh.ndim}")
    if len(shape) != 4 or shape[3] != ranks * shape[2]:
        rule = "block_mask must be a BlockMask of this rank's queries against all keys, (B, 1, S / ranks, S)"
        raise ValueError(f"{rule}; got {shape or type(block_mask)} and {ranks} ranks")
    if (score_mod := options.get("score_mod")) is not None:
        if places is None:
            raise ValueError("a score_mod needs places: pass those that the tokens were divided by")
        own = places.chunk(ranks, dim=1)[mesh.get_local_rank()]
        options["score_mod"] = lambda score, b, h, q_idx, kv_idx: score_mod(
            score, b, h, own[b, q_idx], places[b, kv_idx]
        )
    key, value = (_gather(x, mesh) for x in (key, value))
    return attend(query, key, value, block_mask, **options)


def _gather(x, mesh):
    """(B, H, S / ranks, E) to (B, H, S, E)."""
    sharded = DTensor.from_local(x, mesh, [Shard(2)], run_check=False)
    return sharded.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
