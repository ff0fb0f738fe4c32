"""Packing: several sequences in one row, in place of padding.

    python examples/packing.py

`pack` fills rows with whole sequences, the longest first, each into the first row that has room for it. A
token sees its own sequence only, which begins at `place - position_ids` if position_ids restart at 0. Padded
or packed, the loss is the same, and so are the gradients. What changes is how much of a batch is padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_padded_flexattn import attend, create_block_mask_from_runs, create_causal_padding_block_mask

VOCABULARY, WIDTH, HEADS, LENGTH = 50, 64, 4, 256
device = "cuda" if torch.cuda.is_available() else "cpu"


def pad(sequences: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, position_ids and pads, (sequences, LENGTH): a row for each sequence."""
    return collate([[sequence] for sequence in sequences])


def pack(sequences: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, position_ids and pads, (rows, LENGTH): first fit, the longest first."""
    rows: list[list[Tensor]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        room = (row for row in rows if sum(map(len, row)) + len(sequence) <= LENGTH)
        row = next(room, None)
        if row is None:
            rows.append(row := [])
        row.append(sequence)
    return collate(rows)


def collate(rows: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, position_ids = torch.zeros(2, len(rows), LENGTH, dtype=torch.int64)
    pads = torch.ones(len(rows), LENGTH, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = sum(map(len, row))
        tokens[i, :length] = torch.cat(row)
        position_ids[i, :length] = torch.cat([torch.arange(len(sequence)) for sequence in row])
        pads[i, :length] = False
    return tokens.to(device), position_ids.to(device), pads.to(device)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, position_ids: Tensor, block_mask) -> Tensor:
        x = self.tokens(tokens) + self.positions(position_ids)
        heads = self.qkv(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        return self.head(x + attend(*heads, block_mask).transpose(1, 2).flatten(2))


def loss_of(model: Model, tokens: Tensor, position_ids: Tensor, pads: Tensor, block_mask) -> Tensor:
    """The mean over all tokens that have a successor in their own sequence."""
    logits = model(tokens, position_ids, block_mask)[:, :-1]
    begins_another = (position_ids[:, 1:] == 0) | pads[:, 1:]
    target = tokens[:, 1:].masked_fill(begins_another, -100)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)


if __name__ == "__main__":
    torch.manual_seed(0)
    lengths = torch.randint(10, LENGTH + 1, (24,)).tolist()
    sequences = [torch.randint(VOCABULARY, (length,)) for length in lengths]
    model = Model().to(device)

    padded = pad(sequences)
    mask_of_padded = create_causal_padding_block_mask(padded[2])
    packed, place = pack(sequences), torch.arange(LENGTH, device=device)
    mask_of_packed = create_block_mask_from_runs(place - packed[1], place, packed[2])

    losses = [loss_of(model, *padded, mask_of_padded), loss_of(model, *packed, mask_of_packed)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    share, packed_share = (100 * pads.float().mean().item() for *_, pads in (padded, packed))
    print(f"{len(lengths)} sequences of up to {LENGTH} tokens; the loss is {losses[0]:.4f} both ways")
    print(f"padded: {len(padded[0])} rows, {share:.0f} % of them padding")
    print(f"packed: {len(packed[0])} rows, {packed_share:.0f} % of them padding")
