"""The mask_mods against masks written out by hand."""

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_mask

from causal_padded_flexattn import causal, create_padding_mask

# # is a padded token of the sequence, 1 in a row below it a score that is computed.
CASES = {
    "no padding": ("....", "1... 11.. 111. 1111"),
    "right": ("..##", "1... 11.. .... ...."),
    "left": ("##..", ".... .... ..1. ..11"),
    "both sides": ("#..#", ".... .1.. .11. ...."),
    "hole": (".#..", "1... .... 1.1. 1.11"),
    "empty sequence": ("####", ".... .... .... ...."),
    "length one": (".###", "1... .... .... ...."),
}


def _bits(text: str, one: str) -> torch.Tensor:
    return torch.tensor([[c == one for c in row] for row in text.split()])


@pytest.mark.parametrize("name", CASES)
def test_causal_and_padding(name: str) -> None:
    pads, expected = CASES[name]
    mask = create_mask(and_masks(causal, create_padding_mask(_bits(pads, "#"))), 1, 1, 4, 4, "cpu")
    assert torch.equal(mask[0, 0], _bits(expected, "1"))


def test_padding_alone_looks_both_ways() -> None:
    mask = create_mask(create_padding_mask(_bits(".#..", "#")), 1, 1, 4, 4, "cpu")
    assert torch.equal(mask[0, 0], _bits("1.11 .... 1.11 1.11", "1"))


def test_causal_alone() -> None:
    mask = create_mask(causal, 1, 1, 3, 5, "cpu")
    assert torch.equal(mask[0, 0], _bits("1.... 11... 111..", "1"))


def test_each_sequence_has_its_own_padding() -> None:
    pads = torch.cat([_bits(pads, "#") for pads, _ in CASES.values()])
    mask = create_mask(and_masks(causal, create_padding_mask(pads)), len(CASES), 1, 4, 4, "cpu")
    assert torch.equal(mask[:, 0], torch.stack([_bits(expected, "1") for _, expected in CASES.values()]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_pads_must_be_bool(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"pads must be a torch.bool tensor.*attention_mask == 0.*{dtype}"):
        create_padding_mask(torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(4,), (2, 1, 4), (0, 4), (2, 0)])
def test_pads_must_be_two_dimensional_and_not_empty(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pads must be of shape \(B, S\).*no dimension may be empty"):
        create_padding_mask(torch.zeros(shape, dtype=torch.bool))
