"""A small GPT on padded batches: it trains as on SDPA, and generates from prompts that are padded left.

    python examples/train_gpt.py

The block mask is made once for a batch and handed to all layers. The loss ignores the padding. Then prompts
of different lengths, padded on the left, are continued together, with a cache. Each of them gets the tokens
that it gets alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_padded_flexattn import attend, create_causal_padding_block_mask, sdpa_reference

VOCABULARY, WIDTH, HEADS, LAYERS, ROOM = 16, 64, 4, 2, 64
device = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        hidden = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), *hidden)

    def forward(self, x: Tensor, attention, cache=None, place=None) -> Tensor:  # x: (B, L, WIDTH)
        heads = self.qkv(self.norm(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)  # (B, HEADS, L, WIDTH / HEADS)
        if cache is not None:  # (2, B, HEADS, ROOM, WIDTH / HEADS): write at this place, read all
            cache.index_copy_(3, place, torch.stack((key, value)))
            key, value = cache
        x = x + self.out(attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(ROOM, WIDTH)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, position_ids: Tensor, attention, caches=(None, None), place=None):
        x = self.tokens(tokens) + self.positions(position_ids)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, attention, cache, place)
        return self.head(x)


def count_real(pads: Tensor) -> Tensor:
    """position_ids, (B, S), which count the real tokens of a row on whichever side its padding is."""
    return ((~pads).cumsum(1) - 1).clamp(min=0)


def batch(step: int, side: str) -> tuple[Tensor, Tensor]:
    """Sequences that count up from a random number, of 20 to 48 tokens."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(20, 49, (8, 1), generator=generator)
    places = torch.arange(48)
    pads = places >= lengths if side == "right" else places < 48 - lengths
    tokens = (torch.randint(VOCABULARY, (8, 1), generator=generator) + count_real(pads)) % VOCABULARY
    return tokens.to(device), pads.to(device)


def train(how: str, side: str) -> tuple[GPT, list[float]]:
    torch.manual_seed(0)
    model = GPT().to(device)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(40):
        tokens, pads = batch(step, side)
        if how == "attend":
            block_mask = create_causal_padding_block_mask(pads)  # once, for all layers
            attention = lambda *x, mask=block_mask: attend(*x, mask)
        else:
            attention = lambda *x, pads=pads: sdpa_reference(*x, pads)
        logits = model(tokens, count_real(pads), attention)[:, :-1]
        target = tokens[:, 1:].masked_fill(pads[:, 1:] | pads[:, :-1], -100)  # the loss ignores the padding
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Continue prompts together: they are padded on the left to one length, and share a cache."""
    length, rows = max(map(len, prompts)), len(prompts)
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    pads = torch.ones(rows, ROOM, dtype=torch.bool, device=device)  # what is not written yet is padding
    for row, prompt in enumerate(prompts):
        pads[row, length - len(prompt) : length] = False
    caches = torch.zeros(LAYERS, 2, rows, HEADS, ROOM, WIDTH // HEADS, device=device)
    place, found = torch.arange(length, device=device), []
    for _ in range(count):
        block_mask = create_causal_padding_block_mask(pads, len(place), q_offset=place[0])
        attention = lambda *x, mask=block_mask: attend(*x, mask)
        position_ids = count_real(pads)[:, place]
        tokens = model(tokens, position_ids, attention, caches, place)[:, -1:].argmax(-1)  # (rows, 1)
        found.append(tokens)
        place = place[-1:] + 1
        pads.index_fill_(1, place, False)
    return torch.cat(found, dim=1).tolist()


if __name__ == "__main__":
    for side in ("right", "left"):
        (model, ours), (_, theirs) = train("attend", side), train("sdpa", side)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        print(f"padding on the {side}: the loss falls from {ours[0]:.2f} to {ours[-1]:.4f}, as with SDPA")
    prompts = [[3, 4, 5], [9, 10, 11, 12, 13, 14, 15, 0, 1], [7]]
    together, alone = generate(model, prompts, 8), [generate(model, [prompt], 8)[0] for prompt in prompts]
    assert together == alone, (together, alone)
    assert together[0] == [6, 7, 8, 9, 10, 11, 12, 13], together[0]
    print(f"prompts of 3, 9 and 1 tokens, continued together and alone: {together}")
