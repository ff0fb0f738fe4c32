"""Models of transformers on this module's masks and kernels give what they give with sdpa, or eager."""

from collections.abc import Callable

import pytest
import torch
import transformers
from conftest import DEVICES, explicit_mask
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers import masking_utils

import causal_padded_flexattn
from causal_padded_flexattn import register_transformers, transformers_attention, transformers_block_mask

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, stock_afterwards: None) -> list[dict]:
    """Registers this module, and lists how each block mask was made in closed form; no other may be made."""
    calls: list[dict] = []
    build = causal_padded_flexattn.create_causal_padding_block_mask

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return build(*args, **kwargs)

    monkeypatch.setattr(causal_padded_flexattn, "create_causal_padding_block_mask", counted)
    register_transformers()
    return calls


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_model(kind: str, device: str, way: str, window: int = 24) -> torch.nn.Module:
    torch.manual_seed(1)
    if kind == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=window))
    elif kind == "gemma2":
        softcapped = {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
        config = transformers.Gemma2Config(**SIZES, **LAYERS, **softcapped, sliding_window=window)
        model = transformers.Gemma2ForCausalLM(config)
    elif kind == "gemma3":
        config = transformers.Gemma3TextConfig(
            **SIZES, **LAYERS, query_pre_attn_scalar=16, sliding_window=window
        )
        model = transformers.Gemma3ForCausalLM(config)
    elif kind == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        config = transformers.GptOssConfig(**SIZES, **LAYERS, **experts, sliding_window=window)
        model = transformers.GptOssForCausalLM(config)
    elif kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))
    elif kind == "bert":
        sizes = {key: size for key, size in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.set_attn_implementation(way)
    if kind == "gpt_oss":  # which they leave unset
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=1.0 if "sinks" in name else 0.05)
    return model.eval().to(device)


def make_batch(side: str, device: str, length: int = 150) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([[length], [length - 29], [3]])
    place = torch.arange(length)
    attention_mask = place < lengths if side == "right" else place >= length - lengths
    return torch.randint(3, 97, (3, length)).to(device), attention_mask.long().to(device)


def other_way(kind: str) -> str:
    return "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"  # which knows no soft cap, and no sinks


def windows(calls: list[dict]) -> list[int | None]:
    return [call.get("window") for call in calls]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("window", [24, 1000])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "bert"])
def test_logits(kind: str, window: int, side: str, device: str, built: list) -> None:
    if kind in ("llama", "bert") and window != 24:
        pytest.skip("has no window")
    for length in (40, 100, 150):  # torch 2.11, left to itself, has no kernel for the second
        built.clear()
        input_ids, attention_mask = make_batch(side, device, length)
        with torch.no_grad():
            logits, expected = (
                make_model(kind, device, way, window)(input_ids, attention_mask=attention_mask).logits
                for way in ("flex_attention", other_way(kind))
            )
        real = attention_mask.bool()
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-5)
        if kind == "mistral":
            assert windows(built) == [window]
        elif kind in ("llama", "bert"):
            assert windows(built) == [None]
            assert ("query_pads" in built[0]) == (kind == "bert")
        else:
            assert sorted(windows(built), key=str) == [window, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_loss_and_gradients(kind: str, side: str, device: str, built: list) -> None:
    input_ids, attention_mask = make_batch(side, device)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, 1:][attention_mask[:, :-1] == 0] = -100  # told by a padded query, which transformers lets see
    losses, gradients = [], []
    for way in ("flex_attention", other_way(kind)):
        model = make_model(kind, device, way).train()
        losses.append(model(input_ids, attention_mask=attention_mask, labels=labels).loss)
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert len(built) == (1 if kind in ("llama", "mistral") else 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_generate(kind: str, device: str, cache: str, built: list) -> None:
    input_ids, attention_mask = make_batch("left", device, length=40)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"disable_compile": True, "cache_implementation": cache} if cache == "static" else {}
    tokens, expected = (
        make_model(kind, device, way).generate(input_ids, attention_mask=attention_mask, **options)
        for way in ("flex_attention", other_way(kind))
    )
    assert torch.equal(tokens, expected)
    assert len(built) == 12 * (1 if kind in ("llama", "mistral") else 2)
    assert windows(built).count(24) == (0 if kind == "llama" else 12)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_reaches_the_kernels(device: str, built: list, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = set()
    attend = causal_padded_flexattn._attend

    def watched(query: Tensor, key: Tensor, value: Tensor, *args):
        dtypes.update(x.dtype for x in (query, key, value))
        return attend(query, key, value, *args)

    monkeypatch.setattr(causal_padded_flexattn, "_attend", watched)
    input_ids, attention_mask = make_batch("left", device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        logits, expected = (
            make_model("qwen3", device, way)(input_ids, attention_mask=attention_mask).logits
            for way in ("flex_attention", "sdpa")
        )
    assert dtypes == {torch.bfloat16}
    real = attention_mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boolean", [True, False])
def test_a_dense_mask(device: str, boolean: bool, built: list) -> None:
    """One of four dimensions, which transformers hands on as it is."""
    input_ids, attention_mask = make_batch("right", device)
    dense = explicit_mask(attention_mask == 0)[:, None] | torch.eye(150, dtype=torch.bool, device=device)
    added = torch.zeros(dense.shape, device=device).masked_fill(~dense, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = make_model("llama", device, "flex_attention")(
            input_ids, attention_mask=dense if boolean else added
        )
        expected = make_model("llama", device, "sdpa")(input_ids, attention_mask=attention_mask)
    real = attention_mask.bool()
    torch.testing.assert_close(logits.logits[real], expected.logits[real], rtol=1e-4, atol=1e-5)
    assert not built


@pytest.mark.parametrize("device", DEVICES)
def test_models_with_another_soft_cap_in_one_process(device: str, built: list) -> None:
    input_ids, attention_mask = make_batch("left", device)
    for cap in (5.0, 2.0, 9.0):
        models = [make_model("gemma2", device, way) for way in ("flex_attention", "eager")]
        for model in models:
            for layer in model.model.layers:
                layer.self_attn.attn_logit_softcapping = cap
        with torch.no_grad():
            logits, expected = (model(input_ids, attention_mask=attention_mask).logits for model in models)
        real = attention_mask.bool()
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-5)


def test_dropout_is_refused() -> None:
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(
        ValueError, match=r"flex_attention has no dropout: set attention_dropout to 0; got dropout 0\.1"
    ):
        transformers_attention(torch.nn.Module(), query, query, query, None, dropout=0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset", "seen"),
    [(50, 50, 0, 0, 50), (1, 50, 49, 0, 50), (1, 60, 30, 0, 31), (7, 60, 20, 0, 27), (5, 30, 35, 20, 40)],
)
@pytest.mark.parametrize("as_tensor", [None, (), (1,)])
def test_offsets(
    device: str,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    seen: int,
    as_tensor: tuple | None,
) -> None:
    attention_mask = torch.rand(3, seen, device=device) > 0.3
    offset = q_offset if as_tensor is None else torch.tensor(q_offset, device=device).reshape(as_tensor)
    block_mask = transformers_block_mask(
        3, q_length, kv_length, offset, kv_offset, None, attention_mask, device
    )
    pads = torch.ones(3, kv_offset + kv_length, dtype=torch.bool, device=device)
    pads[:, :seen] = ~attention_mask
    mask = create_mask(block_mask.mask_mod, 3, 1, q_length, kv_length, device)[:, 0]
    assert torch.equal(mask, explicit_mask(pads[:, kv_offset:], q_length, q_offset - kv_offset))


def test_without_attention_mask_nothing_is_padding() -> None:
    block_mask = transformers_block_mask(2, 10, 30, q_offset=5)
    mask = create_mask(block_mask.mask_mod, 2, 1, 10, 30, "cpu")[:, 0]
    assert torch.equal(mask, explicit_mask(torch.zeros(2, 30, dtype=torch.bool), 10, 5))


def test_other_masks_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def stand_in(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, **kwargs
    ):
        given.update(locals())
        return "theirs"

    monkeypatch.setattr("transformers.masking_utils.flex_attention_mask", stand_in)
    window: Callable = masking_utils.sliding_window_causal_mask_function(8)
    window = masking_utils.and_masks(window, lambda *place: place[3] % 2 == 0)
    attention_mask, more = torch.ones(2, 16), {"allow_is_causal_skip": False, "local_size": 8}
    result = transformers_block_mask(2, 4, 16, 12, 1, window, attention_mask, "cpu", **more)
    assert result == "theirs"
    sizes = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset")
    assert [given[name] for name in sizes] == [2, 4, 16, 12, 1]
    assert given["mask_function"] is window and given["attention_mask"] is attention_mask
    assert given["device"] == "cpu" and given["kwargs"] == more


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_a_window_is_the_one_of_local_size(kind: str) -> None:
    make = getattr(masking_utils, f"sliding_window_{kind}_mask_function", None)
    if make is None:
        pytest.skip("this version has none")
    pads = torch.zeros(2, 40, dtype=torch.bool)
    pads[0, 25:] = True
    block_mask = transformers_block_mask(2, 40, 40, 0, 0, make(8), ~pads, local_size=8)
    seen = explicit_mask(pads, causal=kind == "causal", window=8 if kind == "causal" else 9)
    assert torch.equal(create_mask(block_mask.mask_mod, 2, 1, 40, 40, "cpu")[:, 0], seen)
    theirs = create_mask(
        masking_utils.and_masks(make(8), masking_utils.padding_mask_function(~pads)), 2, 1, 40, 40, "cpu"
    )
    assert torch.equal(theirs[:, 0][~pads], seen[~pads])
    assert not causal_padded_flexattn._are_same(make(8), make(9))


def test_cross_attention_of_equal_lengths_masks_no_query() -> None:
    pads = torch.zeros(2, 40, dtype=torch.bool)
    pads[0, 25:] = True
    for q_length in (40, 7):
        both_ways = masking_utils.bidirectional_mask_function
        block_mask = transformers_block_mask(2, q_length, 40, 0, 0, both_ways, ~pads)
        mask = create_mask(block_mask.mask_mod, 2, 1, q_length, 40, "cpu")[:, 0]
        assert torch.equal(mask, (~pads)[:, None].expand(-1, q_length, -1))
