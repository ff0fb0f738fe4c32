"""Kinds of masks, each described by the first and the last key that a query sees.

    python examples/masks.py            checks each mask against create_block_mask
    python examples/masks.py --save     also draws them all into examples/masks.png

A kind is two lines: the runs of keys, which `create_block_mask_from_runs` takes, and the same as a mask_mod,
as FlexAttention's documentation would write it. Neither needs to know of the padding.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask

from causal_padded_flexattn import causal, create_block_mask_from_runs, create_padding_mask

LENGTH, N = 200, 48  # of a sequence, and of what a kind of mask is about: a window, a prefix, a chunk


def kinds(pads: torch.Tensor, length: int = LENGTH, n: int = N) -> dict:
    """For each kind first, last and until (the last query that sees each key), and its mask_mod."""
    place, more = torch.arange(length), n // 4
    chunk, begin = place // n, pads.int().argmin(1, keepdim=True)  # (S,); (B, 1), the first real token
    # Packed rows: several sequences in one, as position_ids or numbers of documents tell.
    position_ids = place % (n + n // 4)
    document = (place >= n).int() + (place >= 3 * n)
    starts = document.diff(prepend=document[:1] - 1) != 0
    # Images that see themselves, and the text between them. A run ends where the next text begins.
    is_image = (place // (n // 2)) % 2 == 1
    image = torch.where(is_image, place // (n // 2), -1)
    next_text = torch.where(is_image, length, place).flip(0).cummin(0).values.flip(0)
    # A prompt and two answers behind it, which do not see each other.
    part = (place >= n).int() + (place >= 2 * n)
    until = torch.tensor([length - 1, 2 * n - 1, length - 1])[part].expand(pads.shape[0], -1)

    same = lambda table: lambda b, h, q, k: table[q] == table[k]
    return {
        "causal": (None, place, None, causal),
        "window": (place - n + 1, place, None, lambda b, h, q, k: (q >= k) & (q - k < n)),
        "uneven window": (place - n, place + more, None, lambda b, h, q, k: (q - k <= n) & (k - q <= more)),
        "packed, position_ids": (
            *(place - position_ids, place, None),
            lambda b, h, q, k: (q >= k) & (q - k <= position_ids[q]),
        ),
        "packed, documents": (
            *(torch.where(starts, place, 0).cummax(0).values, place, None),
            and_masks(causal, same(document)),
        ),
        "prefix": (
            *(None, place.clamp(min=begin + n - 1), None),  # of n real tokens, padded on either side
            lambda b, h, q, k: (q >= k) | (k < begin[b, 0] + n),
        ),
        "images": (
            *(None, place.maximum(next_text - 1), None),
            lambda b, h, q, k: (q >= k) | (image[q] >= 0) & (image[q] == image[k]),
        ),
        "chunks": (chunk * n, chunk * n + n - 1, None, same(chunk)),
        "chunks, left context": (
            *((chunk - 2) * n, chunk * n + n - 1, None),
            lambda b, h, q, k: (chunk[k] <= chunk[q]) & (chunk[k] >= chunk[q] - 2),
        ),
        "encoder": (None, None, None, lambda b, h, q, k: q == q),
        "local encoder": (place - n, place + n, None, lambda b, h, q, k: (q - k).abs() <= n),
        "tree": (None, place, until, lambda b, h, q, k: (q >= k) & ((part[k] == 0) | (part[q] == part[k]))),
    }


def check_tiles(ours, theirs) -> None:
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def check(pads: torch.Tensor) -> None:
    for name, (first, last, until, mask_mod) in kinds(pads).items():
        ours = create_block_mask_from_runs(first, last, pads, until=until, BLOCK_SIZE=16)
        textbook = and_masks(mask_mod, create_padding_mask(pads))
        sizes = (*pads.shape[:1], None, LENGTH, LENGTH, "cpu")
        check_tiles(ours, create_block_mask(textbook, *sizes, BLOCK_SIZE=16))
        assert torch.equal(create_mask(ours.mask_mod, *sizes), create_mask(textbook, *sizes)), name
    # Cross-attention: the queries are other tokens, with padding of their own.
    query_pads = torch.arange(90) >= torch.tensor([[90], [20]])
    ours = create_block_mask_from_runs(None, None, pads, query_pads=query_pads, BLOCK_SIZE=16)
    across = lambda b, h, q, k: ~query_pads[b, q] & ~pads[b, k]
    check_tiles(ours, create_block_mask(across, 2, None, 90, LENGTH, "cpu", BLOCK_SIZE=16))


def save(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from attn_gym.utils import create_score_mod
    from matplotlib import pyplot

    length, pads = 32, torch.arange(32)[None] >= 28
    _, axes = pyplot.subplots(3, 4, figsize=(10, 8))
    for axis, (name, (*_, mask_mod)) in zip(axes.flat, kinds(pads, length, n=8).items(), strict=True):
        padded = and_masks(mask_mod, create_padding_mask(pads))
        scores = create_score_mod(*torch.ones(2, length, 8), score_mod=None, mask_mod=padded, device="cpu")
        axis.imshow(scores[0, 0], cmap="cividis")
        axis.set(title=name, xticks=[], yticks=[])
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--save", action="store_true", help="draw the masks into examples/masks.png")
    lengths, places = torch.tensor([[LENGTH], [LENGTH - 70]]), torch.arange(LENGTH)
    for pads in (places >= lengths, places < LENGTH - lengths):
        check(pads)
    print(
        f"{len(kinds(pads)) + 1} kinds of masks, padded right and left: tiles as create_block_mask finds them"
    )
    if parser.parse_args().save:
        save(Path(__file__).with_name("masks.png"))
