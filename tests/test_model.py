"""The README's CausalSelfAttention in a small decoder, trained on padded sequences."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES
from torch import Tensor, nn

from causal_padded_flexattn import causal_padded_attention, create_causal_padding_block_mask, sdpa_reference

README = (Path(__file__).parent.parent / "README.md").read_text()
VOCABULARY = 16


def attention_of_the_readme() -> type[nn.Module]:
    (source,) = re.findall(r"^class CausalSelfAttention.*?(?=^```)", README, re.MULTILINE | re.DOTALL)
    names = {"nn": nn, "causal_padded_attention": causal_padded_attention}
    exec(source, names)
    return names["CausalSelfAttention"]


class OnSDPA(attention_of_the_readme()):
    def forward(self, x: Tensor, pads: Tensor, block_mask: object) -> Tensor:
        heads = self.c_attn(x).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2)
        return self.c_proj(sdpa_reference(*heads.chunk(3, dim=1), pads).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCABULARY, 64), nn.Embedding(200, 64)
        self.attention = nn.ModuleList(attention(64, 4) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            for _ in range(2)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.head = nn.Linear(64, VOCABULARY)

    def forward(self, tokens: Tensor, pads: Tensor) -> Tensor:
        block_mask = create_causal_padding_block_mask(pads)  # once, for all layers
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for norm, attention, mlp in zip(self.norm, self.attention, self.mlp, strict=True):
            x = x + attention(norm(x), pads, block_mask)
            x = x + mlp(x)
        return self.head(x)

    def loss(self, tokens: Tensor, pads: Tensor) -> Tensor:
        """Of telling each token's predecessor, which a causal model can look up."""
        target = tokens.roll(1, dims=1).masked_fill(pads | pads.roll(1, dims=1), -100)
        target[:, 0] = -100
        return F.cross_entropy(self(tokens, pads).flatten(0, 1), target.flatten(), ignore_index=-100)


def batch(side: str, device: str, seed: int, length: int = 150) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[length], [length - 40], [17], [5]])
    places = torch.arange(length)
    pads = places >= lengths if side == "right" else places < length - lengths
    return torch.randint(VOCABULARY, (4, length), generator=generator).to(device), pads.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_it_trains_as_on_sdpa(side: str, device: str) -> None:
    losses = []
    for attention in (attention_of_the_readme(), OnSDPA):
        model = Decoder(attention).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
        losses.append([])
        for step in range(50):
            loss = model.loss(*batch(side, device, step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    ours, reference = losses
    assert ours == pytest.approx(reference, rel=1e-3)
    assert sum(ours[-5:]) / 5 < math.log(VOCABULARY) - 0.3  # what no model reaches that attends to nothing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_in_the_padding_changes_nothing(side: str, device: str) -> None:
    model = Decoder(attention_of_the_readme()).to(device)
    tokens, pads = batch(side, device, seed=0)
    others = torch.where(pads, (tokens + 1 + tokens % 3) % VOCABULARY, tokens)
    assert not torch.equal(tokens, others)
    with torch.no_grad():
        logits, others_logits = model(tokens, pads), model(others, pads)
    assert torch.equal(logits[~pads], others_logits[~pads])
    gradients, others_gradients = (
        torch.autograd.grad(model.loss(x, pads), list(model.parameters())) for x in (tokens, others)
    )
    for ours, theirs in zip(gradients, others_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
