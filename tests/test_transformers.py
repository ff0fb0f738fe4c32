"""Models of transformers with the block mask in closed form give what they give with sdpa."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import transformers
from conftest import DEVICES, explicit_mask
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention, flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flex_attention_mask

import causal_padded_flexattn
from causal_padded_flexattn import transformers_attention, transformers_block_mask

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def closed_forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """Registers transformers_block_mask, and lists the masks that it built in closed form."""
    built: list = []
    build = causal_padded_flexattn.create_causal_padding_block_mask

    def counted(*args, **kwargs):
        built.append(build(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(causal_padded_flexattn, "create_causal_padding_block_mask", counted)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flex_attention", transformers_block_mask)
    yield built
    ALL_MASK_ATTENTION_FUNCTIONS.register("flex_attention", flex_attention_mask)


@pytest.fixture(autouse=True)
def _no_compiler_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers compiles fails to build on the CPU at some shapes: run plain operators there."""
    torch.manual_seed(0)
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr(WrappedFlexAttention, "_instance", None)  # a test on CUDA may have made one that compiles
        monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda self, training: None)
        plain = torch.compile(flex_attention, backend="eager")
        monkeypatch.setattr(WrappedFlexAttention, "_compiled_flex_attention", staticmethod(plain))


def make_model(kind: str, device: str, attn_implementation: str) -> torch.nn.Module:
    torch.manual_seed(1)
    if kind == "mistral":
        config = transformers.MistralConfig(**SIZES, sliding_window=24)
        model = transformers.MistralForCausalLM(config)
    elif kind == "bert":
        sizes = {key: size for key, size in SIZES.items() if key != "num_key_value_heads"}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.set_attn_implementation(attn_implementation)
    return model.eval().to(device)


def make_batch(side: str, device: str, length: int = 150) -> tuple[Tensor, Tensor]:
    # From 128 tokens on torch takes its usual kernel, also for transformers, which leaves it the choice.
    lengths = torch.tensor([[length], [length - 29], [3]])
    place = torch.arange(length)
    attention_mask = place < lengths if side == "right" else place >= length - lengths
    return torch.randint(3, 97, (3, length)).to(device), attention_mask.long().to(device)


def assert_logits_of_sdpa(kind: str, device: str, input_ids: Tensor, attention_mask: Tensor) -> None:
    with torch.no_grad():
        logits, expected = (
            make_model(kind, device, way)(input_ids, attention_mask=attention_mask).logits
            for way in ("flex_attention", "sdpa")
        )
    real = attention_mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("kind", "masks"), [("llama", 1), ("mistral", 0), ("bert", 0)])
def test_logits(kind: str, masks: int, side: str, device: str, closed_forms: list) -> None:
    assert_logits_of_sdpa(kind, device, *make_batch(side, device))
    assert len(closed_forms) == masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "bert"])
def test_logits_with_chosen_kernels(
    kind: str, device: str, closed_forms: list, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    chosen = []
    choose = causal_padded_flexattn._kernel_options
    monkeypatch.setattr(
        causal_padded_flexattn, "_kernel_options", lambda *args: chosen.append(choose(*args)) or chosen[-1]
    )
    restore = partial(transformers.AttentionInterface.register, "flex_attention", flex_attention_forward)
    request.addfinalizer(restore)
    transformers.AttentionInterface.register("flex_attention", transformers_attention)
    for length in (100, 150, 256):  # 200 rows for a key head: left to itself, torch 2.11 has no kernel for the first
        assert_logits_of_sdpa(kind, device, *make_batch("left", device, length))
    assert len(chosen) == 3 * SIZES["num_hidden_layers"]
    assert all((options is None) == (device == "cpu") for options in chosen)


@pytest.mark.cuda
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradients(side: str, closed_forms: list) -> None:
    input_ids, attention_mask = make_batch(side, "cuda")
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    losses, gradients = [], []
    for way in ("flex_attention", "sdpa"):
        model = make_model("llama", "cuda", way)
        losses.append(model(input_ids, attention_mask=attention_mask, labels=labels).loss)
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert len(closed_forms) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(device: str, cache: str, closed_forms: list) -> None:
    input_ids, attention_mask = make_batch("left", device, length=40)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"disable_compile": True, "cache_implementation": cache} if cache == "static" else {}
    tokens, expected = (
        make_model("llama", device, way).generate(input_ids, attention_mask=attention_mask, **options)
        for way in ("flex_attention", "sdpa")
    )
    assert torch.equal(tokens, expected)
    assert len(closed_forms) == 12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset", "seen"),
    [(50, 50, 0, 0, 50), (1, 50, 49, 0, 50), (1, 60, 30, 0, 31), (7, 60, 20, 0, 27), (5, 30, 35, 20, 40)],
)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_offsets(
    device: str, q_length: int, kv_length: int, q_offset: int, kv_offset: int, seen: int, as_tensor: bool
) -> None:
    attention_mask = torch.rand(3, seen, device=device) > 0.3
    offset = torch.tensor(q_offset, device=device) if as_tensor else q_offset
    block_mask = transformers_block_mask(3, q_length, kv_length, offset, kv_offset, None, attention_mask, device)
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

    def stand_in(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, **kwargs):
        given.update(locals())
        return "theirs"

    monkeypatch.setattr("transformers.masking_utils.flex_attention_mask", stand_in)
    window: Callable = transformers.masking_utils.sliding_window_causal_mask_function(8)
    attention_mask = torch.ones(2, 16)
    result = transformers_block_mask(2, 4, 16, 12, 1, window, attention_mask, "cpu", allow_is_causal_skip=False)
    assert result == "theirs"
    sizes = (given["batch_size"], given["q_length"], given["kv_length"], given["q_offset"], given["kv_offset"])
    assert sizes == (2, 4, 16, 12, 1)
    assert given["mask_function"] is window and given["attention_mask"] is attention_mask
    assert given["device"] == "cpu" and given["kwargs"] == {"allow_is_causal_skip": False}
