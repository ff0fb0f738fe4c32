"""What does not fit is refused in words that say what would: one case a rule."""

import pytest
import torch
from helpers import make_inputs, make_pads
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import causal_padded_flexattn as cpf
from causal_padded_flexattn import (
    causal,
    causal_padded_attention,
    create_block_mask_from_runs,
    create_padding_mask,
)
from causal_padded_flexattn import create_causal_padding_block_mask as make_mask
from causal_padded_integrations import transformers as adapter


def _bad(change: dict) -> dict:
    (query, key, value), _ = make_inputs("cpu", lengths=(8, 8), sizes=(16, 16))  # B3 Hq4 Hkv2 L8 S8 E16
    return {"query": query, "key": key, "value": value, "pads": make_pads("right", 8, "cpu"), **change}


def _zeros(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(shape, **kwargs)


PADS = _zeros(3, 8, dtype=torch.bool)
SWAPPED = {name: _zeros(3, 8, heads, 16) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
SAME, OF_KEY = (
    "must be a floating point tensor of the same dtype as query",
    r"key must be of shape \(B, Hkv, S",
)
OF_VALUE, NO_FIT = (
    r"value must be of shape \(B, Hkv, S, Ev\), but",
    "block_mask must fit: make it.*block_mask ",
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pads": None},
            TypeError,
            r"pads must be a torch.bool tensor.*torch.arange\(S\) >= .*got pads None",
        ),
        ({"pads": PADS.long()}, TypeError, "pads must be a torch.bool tensor.*attention_mask == 0.*int64"),
        ({"pads": PADS[0]}, ValueError, r"pads must be of shape \(B, S\).*got pads \(8,\) "),
        ({"pads": PADS[:2]}, ValueError, r"\(B, S\), but B is 2 in it and 3 in query.*pads \(2, 8\) "),
        ({"pads": PADS[:, :7]}, ValueError, r"\(B, S\), but S is 7 in it and 8 in key.*pads \(3, 7\) "),
        ({"pads": PADS.to("meta")}, ValueError, "pads must be on the device of query: move it.*cpu.*meta"),
        ({"pads": PADS[:0]}, ValueError, "pads must be.*no dimension may be empty"),
        ({"query": _zeros(2, 4, 8, 16)}, ValueError, rf"{OF_KEY}.*B is 3 in it and 2 in query"),
        ({"key": _zeros(3, 2, 8, 16).half()}, TypeError, f"key {SAME}.*float16"),
        ({"value": _zeros(3, 2, 8, 16).double()}, TypeError, f"value {SAME}.*float64"),
        ({"value": _zeros(3, 2, 8, 16, device="meta")}, ValueError, "value must be on the device of query"),
        ({"key": _zeros(3, 2, 8, 32)}, ValueError, rf"{OF_KEY}, E\), but E is 32 in it"),
        ({"value": _zeros(3, 2, 9, 16)}, ValueError, f"{OF_VALUE} S is 9"),
        ({"value": _zeros(3, 4, 8, 16)}, ValueError, f"{OF_VALUE} Hkv is 4"),
        ({"query": _zeros(3, 5, 8, 16)}, ValueError, r"heads of query must be a multiple.*\(3, 5, 8, 16\) "),
        ({"query": _zeros(3, 8, 16)}, ValueError, r"query must be of shape \(B, Hq, L, E\).*\(3, 8, 16\) "),
        ({"key": _zeros(3, 8, 16)}, ValueError, OF_KEY),
        ({"query": _zeros(3, 4, 0, 16)}, ValueError, "query must be.*no dimension may be empty"),
        (SWAPPED, ValueError, r"heads must stand before the length: pass x.transpose\(1, 2\)"),
        ({"query": _zeros(3, 4, 9, 16)}, ValueError, "the queries must lie among the keys.*q_len 9"),
        ({"query": _zeros(3, 4, 8, 16).int()}, TypeError, "query must be a floating point tensor.*int32"),
        ({"query": [[1.0]]}, TypeError, r"query must be a floating point tensor.*query \[\[1.0\]\]"),
        ({"block_mask": make_mask(PADS, 4)}, ValueError, rf"{NO_FIT}\(3, 1, 4, 8, "),
        ({"block_mask": make_mask(_zeros(3, 9, dtype=torch.bool))}, ValueError, rf"{NO_FIT}\(3, 1, 9, 9, "),
        ({"block_mask": make_mask(PADS[:1])}, ValueError, rf"{NO_FIT}\(1, 1, 8, 8, "),
        (
            {"block_mask": create_block_mask(causal, 3, 3, 8, 8, "cpu")},
            ValueError,
            rf"{NO_FIT}\(3, 3, 8, 8, ",
        ),
        ({"block_mask": make_mask(PADS).to("meta")}, ValueError, f"{NO_FIT}.*'meta'"),
        ({"block_mask": PADS}, TypeError, "block_mask must be a BlockMask, such as.*got.*Tensor"),
        ({"documents": PADS.int()}, TypeError, "unexpected keyword argument 'documents'"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale must be a float"),
        ({"scale": "0.5"}, TypeError, "scale must be a float.*'0.5'"),
        ({"score_mod": 3.0}, TypeError, "score_mod must be a function.*got score_mod 3.0"),
        (
            {"score_mod": lambda s, *_: s.sum(-1, keepdim=True)},
            ValueError,
            "score_mod must return a score for",
        ),
        (
            {"backend": "cuda"},
            ValueError,
            'backend must be "auto", "triton" or "flash"; got backend \'cuda\'',
        ),
    ],
)
def test_inputs_that_do_not_fit(change: dict, error: type[Exception], message: str) -> None:
    given = _bad(change)
    if "block_mask" in given:
        del given["pads"]
    attention = cpf.attend if "block_mask" in given else causal_padded_attention
    with pytest.raises(error, match=message):
        attention(**given)


@pytest.mark.cuda
def test_blocks_that_no_kernel_divides() -> None:
    block_mask = make_mask(make_pads("left", 300, "cuda"), BLOCK_SIZE=(128, 8))
    message = r"on CUDA, BLOCK_SIZE must be a multiple of 16; got BLOCK_SIZE \(128, 8\)"
    with pytest.raises(ValueError, match=message):
        cpf.attend(*make_inputs("cuda", lengths=(300, 300))[0], block_mask)


ROWS, KEYS = torch.zeros(2, 100, dtype=torch.bool), torch.arange(100).expand(2, -1)
AMONG, OFFSET = "among the keys.*", "q_offset must be an int, or a 0-d tensor.*"
WHOLE, BLOCKS = (
    "window must be an int.*got window ",
    "BLOCK_SIZE must be an int of at least 1, .*got BLOCK_SIZE ",
)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pads": [5, 3]}, TypeError, r"torch.arange\(S\) >= lengths\[:, None\] for .*; got pads \[5, 3\]"),
        ({"pads": ROWS.float()}, TypeError, "additive_mask < 0 for one that is added to scores.*float32"),
        ({"q_len": 0}, ValueError, f"{AMONG}q_len 0"),
        ({"q_len": 101}, ValueError, f"{AMONG}q_len 101"),
        ({"q_offset": -1}, ValueError, f"{AMONG}q_offset -1"),
        ({"q_offset": 100}, ValueError, f"{AMONG}q_offset 100"),
        ({"q_len": 10, "q_offset": 91}, ValueError, f"{AMONG}q_len 10, q_offset 91"),
        ({"q_offset": torch.tensor(5)}, ValueError, "q_len must be given beside a tensor q_offset"),
        ({"q_len": 9, "q_offset": torch.zeros(2, dtype=int)}, TypeError, rf"{OFFSET}\(2,\)"),
        ({"q_len": 9, "q_offset": torch.tensor(1.0)}, TypeError, f"{OFFSET}float32"),
        ({"q_len": 9, "q_offset": torch.tensor(1, device="meta")}, TypeError, f"{OFFSET}meta"),
        ({"q_len": 101, "q_offset": torch.tensor(1)}, ValueError, f"{AMONG}q_len 101"),
        ({"q_offset": 4.0}, TypeError, f"{OFFSET}4.0"),
        ({"q_len": 4.0}, TypeError, "q_len must be an int; got q_len 4.0"),
        ({"causal": False}, TypeError, "unexpected keyword argument 'causal'"),
        ({"BLOCK_SIZE": 0}, ValueError, f"{BLOCKS}0"),
        ({"BLOCK_SIZE": (128, -1)}, ValueError, rf"{BLOCKS}\(128, -1\)"),
        ({"BLOCK_SIZE": [128, 128]}, ValueError, r"a tuple of two; got BLOCK_SIZE \[128, 128\]"),
        ({"window": 0}, ValueError, "window must be at least 1.*got window 0"),
        ({"window": 2.0}, TypeError, f"{WHOLE}2.0"),
        ({"window": True}, TypeError, f"{WHOLE}True"),
        ({"padding_side": "both"}, ValueError, 'padding_side must be "right", "left" or None; got .*both'),
        ({"padding_side": "right", "pads": KEYS < 3}, ValueError, "stands on the right, and some does not"),
        ({"padding_side": "left", "pads": KEYS > 3}, ValueError, "stands on the left, and some does not"),
        ({"padding_side": "left", "pads": KEYS == 3}, ValueError, "stands on the left, and some does not"),
    ],
)
def test_options_of_the_mask(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_mask(**{"pads": ROWS, **arguments})


TOKENS, ENDS = torch.zeros(3, 200, dtype=torch.bool), torch.arange(200)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"first": 0}, TypeError, "first must be a tensor of integers.*got pads.*first 0"),
        ({"last": ENDS.float()}, TypeError, "last must be a tensor of integers.*float32"),
        ({"last": torch.tensor(3)}, ValueError, r"last must be of shape \(B, L\)"),
        ({"last": ENDS[:9]}, ValueError, r"query_pads must say .* pads\[:, -L:\] if .*got last \(9,\)"),
        ({"first": ENDS, "last": ENDS[:9]}, ValueError, "last must be.*but L is 9 in it and 200 in"),
        ({"last": ENDS.expand(2, -1)}, ValueError, "last must be .*but B is 2 in it and 3 in pads"),
        ({"query_pads": TOKENS.int()}, TypeError, "query_pads must be a torch.bool tensor"),
        ({"query_pads": TOKENS[:, :50]}, ValueError, "last must .*but L is 200 in it and 50 in query_pads"),
        ({"until": ENDS}, ValueError, r"until must be of shape \(B, S\)"),
        ({"until": ENDS.expand(3, -1) > 3}, TypeError, "until must be a tensor of integers"),
        ({"BLOCK_SIZE": 1.5}, ValueError, "BLOCK_SIZE must be an int of at least 1"),
    ],
)
def test_runs(change: dict, error: type[Exception], message: str) -> None:
    given = {"first": None, "last": ENDS, **change}
    with pytest.raises(error, match=message):
        create_block_mask_from_runs(given.pop("first"), given.pop("last"), TOKENS, **given)


def test_the_textbook_checks_its_pads() -> None:
    with pytest.raises(TypeError, match=r"pads must be a torch.bool tensor.*attention_mask == 0.*int64"):
        create_padding_mask(PADS.long())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_autocast_casts_no_integers(dtype: torch.dtype) -> None:
    given, message = _bad({"query": _zeros(3, 4, 8, 16).to(dtype)}), "query must be a floating point tensor.*"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"{message}{dtype}"):
        causal_padded_attention(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": _zeros(3, 4, 9, 16)}, "the queries must lie among the keys; got query"),
        ({"query": _zeros(3, 3, 8, 16)}, "the heads of query must be a multiple of those of key and value"),
        ({"pads": PADS[:, :7]}, "pads must be of shape .*but S is 7 in it and 8 in key"),
    ],
)
def test_the_reference(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpf.sdpa_reference(**_bad(change))


def test_dropout_is_refused() -> None:
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"flex_attention has no dropout: set .* to 0; got dropout 0\.1"):
        adapter.attention(torch.nn.Module(), query, query, query, None, dropout=0.1)
