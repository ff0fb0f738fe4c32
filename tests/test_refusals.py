"""What does not fit is refused in words that say what would."""

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
    create_causal_padding_block_mask,
    create_padding_mask,
)
from causal_padded_integrations import transformers as adapter


def _bad(change: dict) -> dict:
    (query, key, value), _ = make_inputs("cpu", lengths=(8, 8), sizes=(16, 16))  # B3 Hq4 Hkv2 L8 S8 E16
    return {"query": query, "key": key, "value": value, "pads": make_pads("right", 8, "cpu"), **change}


def _zeros(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(shape, **kwargs)


_mask = create_causal_padding_block_mask


PADS = _zeros(3, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pads": None},
            TypeError,
            r"pads must be a torch.bool tensor.*torch.arange\(S\) >= lengths.*got pads None",
        ),
        (
            {"pads": _zeros(3, 8, dtype=torch.int64)},
            TypeError,
            "pads must be a torch.bool tensor.*attention_mask == 0.*int64",
        ),
        (
            {"pads": _zeros(8, dtype=torch.bool)},
            ValueError,
            r"pads must be of shape \(B, S\).*got pads \(8,\) ",
        ),
        (
            {"pads": PADS[:2]},
            ValueError,
            r"pads must be of shape \(B, S\), but B is 2 in it and 3 in query.*pads \(2, 8\) ",
        ),
        (
            {"pads": _zeros(3, 9, dtype=torch.bool)},
            ValueError,
            r"pads must be of shape \(B, S\), but S is 9 in it and 8 in key.*pads \(3, 9\) ",
        ),
        ({"pads": PADS.to("meta")}, ValueError, "pads must be on the device of query: move it.*cpu.*meta"),
        ({"pads": PADS[:0]}, ValueError, "pads must be.*no dimension may be empty"),
        (
            {"key": _zeros(2, 2, 8, 16)},
            ValueError,
            r"key must be of shape \(B, Hkv, S, E\).*key \(2, 2, 8, 16\) ",
        ),
        ({"query": _zeros(2, 4, 8, 16)}, ValueError, r"key must be.*B is 3 in it and 2 in query"),
        (
            {"key": _zeros(3, 2, 8, 16).half()},
            TypeError,
            "key must be a floating point tensor of the same dtype as query.*float16",
        ),
        (
            {"value": _zeros(3, 2, 8, 16).double()},
            TypeError,
            "value must be a floating point tensor of the same dtype.*float64",
        ),
        ({"value": _zeros(3, 2, 8, 16, device="meta")}, ValueError, "value must be on the device of query"),
        (
            {"key": _zeros(3, 2, 8, 32)},
            ValueError,
            r"key must be of shape \(B, Hkv, S, E\), but E is 32 in it",
        ),
        ({"value": _zeros(3, 2, 9, 16)}, ValueError, r"value must be of shape \(B, Hkv, S, Ev\), but S is 9"),
        (
            {"value": _zeros(3, 4, 8, 16)},
            ValueError,
            r"value must be of shape \(B, Hkv, S, Ev\), but Hkv is 4",
        ),
        (
            {"query": _zeros(3, 5, 8, 16)},
            ValueError,
            r"heads of query must be a multiple.*query \(3, 5, 8, 16\) ",
        ),
        (
            {"query": _zeros(3, 8, 16)},
            ValueError,
            r"query must be of shape \(B, Hq, L, E\).*query \(3, 8, 16\) ",
        ),
        ({"key": _zeros(3, 8, 16)}, ValueError, r"key must be of shape \(B, Hkv, S, E\)"),
        ({"query": _zeros(3, 4, 0, 16)}, ValueError, "query must be.*no dimension may be empty"),
        ({"query": _zeros(0, 4, 8, 16)}, ValueError, "query must be.*no dimension may be empty"),
        (
            {name: _zeros(3, 8, heads, 16) for name, heads in (("query", 4), ("key", 2), ("value", 2))},
            ValueError,
            r"heads must stand before the length: pass x.transpose\(1, 2\)",
        ),
        ({"query": _zeros(3, 4, 9, 16)}, ValueError, "the queries must lie among the keys.*q_len 9"),
        ({"q_len": 8}, TypeError, "multiple values for argument 'q_len'"),
        (
            {"block_mask": _mask(_zeros(3, 9, dtype=torch.bool))},
            ValueError,
            r"block_mask must fit.*\(3, 1, 9, 9, ",
        ),
        (
            {"block_mask": _mask(PADS, 4)},
            ValueError,
            r"block_mask must fit: make it.*block_mask \(3, 1, 4, 8, ",
        ),
        (
            {"block_mask": _mask(PADS[:2])},
            ValueError,
            r"block_mask must fit: make it.*block_mask \(2, 1, 8, 8, ",
        ),
        (
            {"block_mask": _mask(PADS[:1])},
            ValueError,
            r"block_mask must fit: make it.*block_mask \(1, 1, 8, 8, ",
        ),
        (
            {"block_mask": create_block_mask(causal, 3, 3, 8, 8, "cpu")},
            ValueError,
            r"block_mask must fit.*\(3, 3, 8, 8, ",
        ),
        ({"block_mask": _mask(PADS).to("meta")}, ValueError, "block_mask must fit.*'meta'"),
        (
            {"block_mask": _zeros(3, 1, 8, 8)},
            TypeError,
            "block_mask must be a BlockMask, such as.*got.*Tensor",
        ),
        ({"block_mask": None}, TypeError, "block_mask must be a BlockMask, such as.*got.*NoneType"),
        ({"query": _zeros(3, 4, 8, 16).int()}, TypeError, "query must be a floating point tensor.*int32"),
        ({"query": [[1.0]]}, TypeError, r"query must be a floating point tensor.*query \[\[1.0\]\]"),
        ({"causal": False}, TypeError, "unexpected keyword argument 'causal'"),
        ({"documents": PADS.int()}, TypeError, "unexpected keyword argument 'documents'"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale must be a float"),
        ({"scale": "0.5"}, TypeError, "scale must be a float.*'0.5'"),
        ({"score_mod": 3.0}, TypeError, "score_mod must be a function.*got score_mod 3.0"),
        (
            {"score_mod": lambda s, b, h, q, k: s.sum(-1, keepdim=True)},
            ValueError,
            "score_mod must return a score for each pair",
        ),
        (
            {"backend": "cuda"},
            ValueError,
            'backend must be "auto", "triton" or "flash"; got backend \'cuda\'',
        ),
        ({"window": 0}, ValueError, "window must be at least 1"),
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
    pads = make_pads("left", 300, "cuda")
    block_mask = create_causal_padding_block_mask(pads, BLOCK_SIZE=(128, 8))
    with pytest.raises(
        ValueError, match=r"on CUDA, BLOCK_SIZE must be a multiple of 16; got BLOCK_SIZE \(128, 8\)"
    ):
        cpf.attend(*make_inputs("cuda", lengths=(300, 300))[0], block_mask)


ROWS = torch.zeros(2, 100, dtype=torch.bool)
KEYS = torch.arange(100).expand(2, -1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pads": ROWS.int()}, TypeError, r"pads must be a torch.bool tensor.*attention_mask == 0"),
        ({"pads": None}, TypeError, "pads must be a torch.bool tensor.*got pads None"),
        (
            {"pads": [5, 3]},
            TypeError,
            r"torch.arange\(S\) >= lengths\[:, None\] for lengths.*; got pads \[5, 3\]",
        ),
        (
            {"pads": torch.tensor([5, 3])},
            TypeError,
            r">= lengths\[:, None\] for lengths.*; got pads \(2,\) torch.int64",
        ),
        ({"pads": ROWS.float()}, TypeError, "additive_mask < 0 for one that is added to scores.*float32"),
        ({"pads": ROWS[0]}, ValueError, r"pads must be of shape \(B, S\).*got pads \(100,\) "),
        ({"pads": ROWS[:, :0]}, ValueError, r"pads must be.*no dimension may be empty.*\(2, 0\) "),
        ({"q_len": 0}, ValueError, "among the keys.*q_len 0"),
        ({"q_len": -1}, ValueError, "among the keys.*q_len -1"),
        ({"q_len": 101}, ValueError, "among the keys.*q_len 101"),
        ({"q_offset": -1}, ValueError, "among the keys.*q_offset -1"),
        ({"q_offset": 100}, ValueError, "among the keys.*q_offset 100"),
        ({"q_len": 10, "q_offset": 91}, ValueError, "among the keys.*q_len 10, q_offset 91"),
        ({"q_offset": torch.tensor(5)}, ValueError, "q_len must be given beside a tensor q_offset"),
        *(
            (
                {"q_len": 10, "q_offset": offset},
                TypeError,
                f"q_offset must be an int, or a 0-d tensor.*{shown}",
            )
            for offset, shown in (
                (torch.zeros(2, dtype=int), r"\(2,\)"),
                (torch.tensor(1.0), "float32"),
                (torch.tensor(1, dtype=torch.int8), "int8"),
                (torch.tensor(1, device="meta"), "meta"),
            )
        ),
        ({"q_offset": 4.0}, TypeError, "q_offset must be an int, or a 0-d tensor.*4.0"),
        ({"q_len": 4.0}, TypeError, "q_len must be an int; got q_len 4.0"),
        ({"causal": False}, TypeError, "unexpected keyword argument 'causal'"),
        ({"BLOCK_SIZE": 0}, ValueError, "BLOCK_SIZE must be an int of at least 1, .*; got BLOCK_SIZE 0"),
        ({"BLOCK_SIZE": (128, -1)}, ValueError, r"BLOCK_SIZE must be.*got BLOCK_SIZE \(128, -1\)"),
        ({"BLOCK_SIZE": [128, 128]}, ValueError, "BLOCK_SIZE must be.*a tuple of two"),
        ({"window": 0}, ValueError, "window must be at least 1.*got window 0"),
        ({"window": -3}, ValueError, "window must be at least 1.*got window -3"),
        ({"window": 2.0}, TypeError, "window must be an int.*got window 2.0"),
        ({"window": True}, TypeError, "window must be an int.*got window True"),
        ({"documents": ROWS.int()}, TypeError, "unexpected keyword argument 'documents'"),
        ({"padding_side": "both"}, ValueError, 'padding_side must be "right", "left" or None; got .*both'),
        *(
            (
                {"padding_side": side, "pads": pads},
                ValueError,
                f"all padding stands on the {side}, and some does not",
            )
            for side, pads in (("right", KEYS < 3), ("left", KEYS > 3), ("left", KEYS == 3))
        ),
    ],
)
def test_options_of_the_mask(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_causal_padding_block_mask(**{"pads": ROWS, **arguments})


TOKENS, ENDS = torch.zeros(3, 200, dtype=torch.bool), torch.arange(200)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pads": None}, TypeError, "pads must be a torch.bool tensor.*for no padding; got pads None"),
        ({"first": 0}, TypeError, "first must be a tensor of integers.*got pads.*first 0"),
        ({"last": ENDS.float()}, TypeError, "last must be a tensor of integers.*float32"),
        ({"last": torch.tensor(3)}, ValueError, r"last must be of shape \(B, L\)"),
        ({"first": ENDS[:100]}, ValueError, r"query_pads must say .* pads\[:, -L:\] if .*got first \(100,\)"),
        ({"last": ENDS[:100]}, ValueError, r"query_pads must say which queries are padding"),
        ({"first": ENDS[:100], "last": ENDS}, ValueError, "query_pads must say which"),
        ({"first": ENDS, "last": ENDS[:100]}, ValueError, "last must be.*but L is 100 in it and 200 in"),
        ({"last": ENDS.expand(2, -1)}, ValueError, "last must be .*but B is 2 in it and 3 in pads"),
        ({"query_pads": TOKENS.int()}, TypeError, "query_pads must be a torch.bool tensor"),
        (
            {"query_pads": TOKENS[:, :50]},
            ValueError,
            "last must be .*but L is 200 in it and 50 in query_pads",
        ),
        ({"until": ENDS}, ValueError, r"until must be of shape \(B, S\)"),
        ({"until": ENDS.expand(3, -1) > 3}, TypeError, "until must be a tensor of integers"),
        ({"BLOCK_SIZE": 1.5}, ValueError, "BLOCK_SIZE must be an int of at least 1"),
    ],
)
def test_runs(change: dict, error: type[Exception], message: str) -> None:
    given_ = {"first": None, "last": ENDS, "pads": TOKENS, **change}
    with pytest.raises(error, match=message):
        create_block_mask_from_runs(given_.pop("first"), given_.pop("last"), given_.pop("pads"), **given_)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_pads_must_be_bool(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"pads must be a torch.bool tensor.*attention_mask == 0.*{dtype}"):
        create_padding_mask(torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(4,), (2, 1, 4), (0, 4), (2, 0)])
def test_pads_must_be_two_dimensional_and_not_empty(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pads must be of shape \(B, S\)"):
        create_padding_mask(torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_autocast_casts_no_integers(dtype: torch.dtype) -> None:
    given = _bad({"query": _zeros(3, 4, 8, 16).to(dtype)})
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=f"query must be a floating point tensor.*{dtype}"),
    ):
        causal_padded_attention(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": _zeros(3, 4, 9, 16)}, "the queries must lie among the keys; got query"),
        ({"query": _zeros(3, 3, 8, 16)}, "the heads of query must be a multiple of those of key and value"),
        (
            {"pads": torch.zeros(3, 9, dtype=torch.bool)},
            "pads must be of shape .*but S is 9 in it and 8 in key",
        ),
    ],
)
def test_the_reference(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpf.sdpa_reference(**_bad(change))


def test_dropout_is_refused() -> None:
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(
        ValueError, match=r"flex_attention has no dropout: set attention_dropout to 0; got dropout 0\.1"
    ):
        adapter.attention(torch.nn.Module(), query, query, query, None, dropout=0.1)
