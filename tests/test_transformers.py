"""Models of transformers on this module's masks and kernels give what they give with sdpa, or eager."""

import inspect
from collections.abc import Callable
from random import Random

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import DEVICES, explicit_mask
from helpers import looks_up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import masking_utils

from causal_padded_integrations import transformers as adapter

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "pad_token_id": 0,
}
PLAIN = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8, "vocab_size": 97}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4} | ENDS
SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 97}
SEQ2SEQ |= {"pad_token_id": 0, "decoder_start_token_id": 1}
DECODERS = ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3", "llama4"]
IMAGES = ["gemma3_images", "paligemma"]
ENCODERS = ["bert", "modernbert"]
BOTH = ["bart", "t5", "whisper"]  # an encoder and a decoder


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch, stock_afterwards: None) -> list[dict]:
    """Registers this module, and lists the masks that it leaves to the function of transformers."""
    calls: list[dict] = []
    theirs = masking_utils.flex_attention_mask

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(masking_utils, "flex_attention_mask", counted)
    adapter.register()
    assert transformers.AttentionMaskInterface()["flex_attention"] is adapter.block_mask
    return calls


@pytest.fixture
def only_listed(handed_over: list[dict], monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The same, and does not make them, which would compile."""
    monkeypatch.setattr(masking_utils, "flex_attention_mask", lambda *_, **kwargs: handed_over.append(kwargs))
    return handed_over


def make_model(kind: str, device: str, way: str, window: int = 24) -> torch.nn.Module:
    torch.manual_seed(1)
    text = {**SIZES, **LAYERS, "query_pre_attn_scalar": 16, "sliding_window": window}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    name, config = {
        "llama": ("Llama", SIZES),
        "qwen3": ("Qwen3", SIZES),
        "mistral": ("Mistral", {**SIZES, "sliding_window": window}),
        "gemma2": ("Gemma2", {**text, "attn_logit_softcapping": 5.0}),
        "gemma3": ("Gemma3Text", text),
        "gemma3_images": ("Gemma3", {"text_config": text, "vision_config": VISION, "mm_tokens_per_image": 4}),
        "paligemma": ("PaliGemma", {"text_config": SIZES, "vision_config": VISION, "image_token_index": 96}),
        "gpt_oss": ("GptOss", {**SIZES, **LAYERS, **experts, "sliding_window": window}),
        "llama4": (
            "Llama4Text",
            {**SIZES, **experts, "intermediate_size_mlp": 96, "attention_chunk_size": window},
        ),
        "bert": ("Bert", PLAIN),
        "modernbert": (
            "ModernBert",
            {**PLAIN, **ENDS, "cls_token_id": 1, "sep_token_id": 2}
            | {"local_attention": window, "global_attn_every_n_layers": 2},
        ),
        "bart": ("Bart", {**SEQ2SEQ, "max_position_embeddings": 512}),
        "whisper": ("Whisper", {**SEQ2SEQ, "max_source_positions": 60, "num_mel_bins": 8}),
        "t5": (
            "T5",
            {**ENDS, "vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
            | {"pad_token_id": 0, "decoder_start_token_id": 1},
        ),
    }[kind]
    head = "ForMaskedLM" if kind in ENCODERS else "ForCausalLM"
    if kind in [*IMAGES, *BOTH]:
        head = "ForConditionalGeneration"
    make = getattr(transformers, name.removesuffix("Text") + head)
    model = make(getattr(transformers, f"{name}Config")(**config))
    model.set_attn_implementation(way)
    if kind == "gpt_oss":  # which they leave unset
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=1.0 if "sinks" in name else 0.05)
    return model.eval().to(device)


def make_batch(side: str, device: str, length: int = 150) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([[length], [length - 29], [3]])
    place = torch.arange(length)
    attention_mask = place < lengths if side == "right" else place >= length - lengths
    return torch.randint(3, 96, (3, length)).to(device), attention_mask.long().to(device)


def make_images(attention_mask: Tensor, kind: str) -> Tensor:
    """token_type_ids: three images in each row, or a prefix of zeros."""
    places = attention_mask.cumsum(1) - 1
    if kind == "paligemma":
        return ((places >= 40) & (attention_mask == 1)).long()
    images = (
        ((places >= 2) & (places < 12)) | ((places >= 20) & (places < 80)) | (places >= 85) & (places < 90)
    )
    return (images & (attention_mask == 1)).long()


def inputs_of(kind: str, padding: str, device: str, length: int = 150) -> tuple[dict, Tensor]:
    """What a model is called with, and which of its logits count."""
    input_ids, attention_mask = make_batch("left" if padding == "left" else "right", device, length)
    real, given = attention_mask.bool(), {"input_ids": input_ids, "attention_mask": attention_mask}
    if padding == "packed":
        real, given = torch.ones_like(real), {"input_ids": input_ids}
        lengths = torch.tensor([[29], [41], [1000]], device=device)  # of the documents of each row
        given["position_ids"] = torch.arange(length, device=device) % lengths
    if kind in IMAGES:
        given["token_type_ids"] = make_images(real.long(), kind)
    if kind == "paligemma":
        given["labels"] = input_ids  # in training alone its prefix is seen both ways
    if kind == "whisper":  # the padding is the decoder's
        given = {
            "input_features": torch.randn(3, 8, 120).to(device),
            "decoder_attention_mask": given["attention_mask"],
        }
    if kind in BOTH:
        given["decoder_input_ids"] = torch.randint(3, 96, (3, length)).to(device)
        real = real if kind == "whisper" else torch.ones_like(real)
    return given, real


def is_theirs_alone(kind: str, padding: str) -> bool:
    """transformers looks packed images up at the places that tokens have in their own documents."""
    remaps = hasattr(masking_utils, "remap_positions_for_packed_sequence")
    return remaps and (kind, padding) == ("gemma3_images", "packed")


def other_way(kind: str) -> str:
    return "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"  # which knows no soft cap, and no sinks


ALL = [*DECODERS, *IMAGES, *ENCODERS, *BOTH]
PADDED = [(kind, padding, 24, "cpu") for kind in ALL for padding in ("right", "left")]
PADDED += [(kind, "packed", 24, "cpu") for kind in [*DECODERS, *IMAGES]]
# On CUDA the padding is data of the same kernels, so each kind has it on one side.
PADDED += [(kind, ("right", "left")[i % 2], 24, "cuda") for i, kind in enumerate(ALL)]
PADDED += [(kind, "packed", 24, "cuda") for kind in ("mistral", "gemma2", "llama4", "gemma3_images")]
WITHOUT_WINDOW = ["llama", "qwen3", "paligemma", "bert", *BOTH]
PADDED += [(kind, "left", 1000, "cpu") for kind in ALL if kind not in WITHOUT_WINDOW]
CASES = [pytest.param(*case, marks=[pytest.mark.cuda] * (case[3] == "cuda")) for case in PADDED]


@pytest.mark.parametrize(("kind", "padding", "window", "device"), CASES)
def test_logits_and_gradients(kind: str, padding: str, window: int, device: str, handed_over: list) -> None:
    models = [make_model(kind, device, way, window) for way in ("flex_attention", other_way(kind))]
    # Torch 2.11, left to itself, has no kernel for the second. Each length may compile, as theirs do.
    for length in (40, 100, 150)[2 if is_theirs_alone(kind, padding) else device == "cuda" :]:
        given, real = inputs_of(kind, padding, device, length)
        # Of padded queries transformers lets see what is before them.
        logits, expected = (model(**given).logits[real] for model in models)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    losses, gradients = [], []
    for model, result in zip(models, (logits, expected), strict=True):  # not .train(), for dropout
        losses.append((result * torch.linspace(-1, 1, result.shape[-1], device=device)).exp().mean())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(losses[-1], trained, allow_unused=True))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert not handed_over or is_theirs_alone(kind, padding)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_five_steps_on_what_trl_collates(kind: str, device: str, handed_over: list) -> None:
    """Its packing "bfd" and its padding_free both hand over one row, and no attention_mask."""
    batches = []
    for _ in range(5):
        lengths = torch.randint(5, 90, (6,)).tolist()
        input_ids = torch.randint(3, 96, (1, sum(lengths)))
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        seq_idx = (position_ids == 0).cumsum(1).int() - 1
        batches.append({"input_ids": input_ids, "labels": input_ids.masked_fill(position_ids == 0, -100)})
        batches[-1] |= {"position_ids": position_ids, "seq_idx": seq_idx, **longest}
        batches[-1] |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    losses: list[list[float]] = []
    for way in ("flex_attention", "sdpa"):
        model = make_model(kind, device, way).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for batch in batches:
            moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
            loss = model(**moved, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][1]
    assert not handed_over


GENERATES = [(kind, cache, "cpu") for kind in [*DECODERS, *IMAGES, *BOTH] for cache in ("dynamic", "static")]
# Kernels for decoding know nothing of the cache: one of each kind on CUDA.
ON_CUDA = [(kind, cache, "cuda") for i, (kind, cache, _) in enumerate(GENERATES) if i % 4 in (0, 3)]


@pytest.mark.parametrize(
    ("kind", "cache", "device"), [*GENERATES, *(pytest.param(*x, marks=pytest.mark.cuda) for x in ON_CUDA)]
)
def test_generate(kind: str, cache: str, device: str, handed_over: list) -> None:
    chunked = inspect.signature(masking_utils.create_chunked_causal_mask).parameters
    if (kind, cache) == ("llama4", "static") and "block_sequence_ids" not in chunked:
        pytest.skip("this version of transformers fails on it, whatever the attention")
    given, _ = inputs_of(kind, "left", device, length=40)
    for name in ("labels", "decoder_input_ids", "decoder_attention_mask"):
        given.pop(name, None)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"disable_compile": True, "cache_implementation": cache} if cache == "static" else {}
    tokens, expected = (
        make_model(kind, device, way).generate(**given, **options)
        for way in ("flex_attention", other_way(kind))
    )
    assert torch.equal(tokens, expected)
    assert not handed_over


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_reaches_the_kernels(
    device: str, handed_over: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = set()
    attend = adapter._attend

    def watched(query: Tensor, key: Tensor, value: Tensor, *args):
        dtypes.update(x.dtype for x in (query, key, value))
        return attend(query, key, value, *args)

    monkeypatch.setattr(adapter, "_attend", watched)
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
def test_a_dense_mask(device: str, handed_over: list) -> None:
    """One of four dimensions, which transformers hands on as it is."""
    input_ids, attention_mask = make_batch("right", device)
    dense = explicit_mask(attention_mask == 0)[:, None] | torch.eye(150, dtype=torch.bool, device=device)
    added = torch.zeros(dense.shape, device=device).masked_fill(~dense, torch.finfo(torch.float32).min)
    real = attention_mask.bool()
    with torch.no_grad():
        expected = make_model("llama", device, "sdpa")(input_ids, attention_mask=attention_mask).logits
        for given in (dense, added):
            logits = make_model("llama", device, "flex_attention")(input_ids, attention_mask=given).logits
            torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not handed_over


@pytest.mark.parametrize("device", DEVICES)
def test_models_with_another_soft_cap_in_one_process(device: str, handed_over: list) -> None:
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_tensor", [None, (), (1,)])
def test_offsets(device: str, as_tensor: tuple | None) -> None:
    for q_length, kv_length, q_offset, kv_offset, seen in (
        *((50, 50, 0, 0, 50), (1, 50, 49, 0, 50), (1, 60, 30, 0, 31)),
        *((7, 60, 20, 0, 27), (5, 30, 35, 20, 40), (10, 30, 5, 0, None)),
    ):
        offset = q_offset if as_tensor is None else torch.tensor(q_offset, device=device).reshape(as_tensor)
        pads = torch.ones(3, kv_offset + kv_length, dtype=torch.bool, device=device)
        attention_mask = None if seen is None else torch.rand(3, seen, device=device) > 0.3
        pads[:, :seen] = False if seen is None else ~attention_mask  # without one nothing is padding
        sizes = (3, q_length, kv_length, offset, kv_offset)
        block_mask = adapter.block_mask(*sizes, None, attention_mask, device)
        mask = create_mask(block_mask.mask_mod, 3, 1, q_length, kv_length, device)[:, 0]
        assert torch.equal(mask, explicit_mask(pads[:, kv_offset:], q_length, q_offset - kv_offset))


def every_pair(mask_function: Callable, pads: Tensor, q_length: int, q_offset: int, kv_offset: int) -> Tensor:
    """(B, 1, L, S): a mask function at each pair, less what is padding."""
    batch_size, total = pads.shape
    queries, keys = torch.arange(q_offset, q_offset + q_length), torch.arange(kv_offset, total)
    axes = torch.arange(batch_size)[:, None, None, None], torch.tensor(0), queries[:, None], keys
    allowed = mask_function(*axes).expand(batch_size, 1, q_length, total - kv_offset)
    return allowed & ~pads[:, None, None, kv_offset:] & ~pads[:, None, queries, None]


def custom_functions(random: Random, batch_size: int, total: int) -> list[Callable]:
    """What a user may write: with numbers of the tokens, of the sequence, and without."""
    places = torch.tensor([[random.randrange(total) for _ in range(total)] for _ in range(batch_size)])
    few = torch.tensor([[random.randrange(-2, 3) for _ in range(total)] for _ in range(batch_size)])
    begin, flags, rising = few[:, 0] * 3, few > 0, places.cummax(1).values
    large = torch.where(flags, 2**63 - 1, places * 2**31 - 2**33)
    small, bytes_ = large.to(torch.int32), (places * 37).to(torch.uint8)
    signed = bytes_.to(torch.int8)
    islands = torch.where(places % 3 > 0, rising, -1)
    return [
        lambda b, h, q, k: k <= places[b, q],
        lambda b, h, q, k: q >= places[b, k],
        lambda b, h, q, k: few[b, q] == few[b, k],
        lambda b, h, q, k: few[b, q] + 1 == few[b, k],
        lambda b, h, q, k: few[b, k] >= 0,
        lambda b, h, q, k: few[b, k - 1] == few[b, q],
        lambda b, h, q, k: (q - begin[b]) // 3 >= (k - begin[b]) // 3,
        lambda b, h, q, k: abs(q - k) < 5,
        lambda b, h, q, k: q - k <= 4,
        lambda b, h, q, k: q == k,
        lambda b, h, q, k: q != k,
        lambda b, h, q, k: k > 5,
        lambda b, h, q, k: k % 2 == 0,
        lambda b, h, q, k: b == 1,
        lambda b, h, q, k: ~(q >= k),
        lambda b, h, q, k: (q >= k) ^ (k > 3),
        lambda b, h, q, k: torch.where(q > k, q > 2, k > 2),
        lambda b, h, q, k: flags[b, k],
        lambda b, h, q, k: rising[b, q] + 1 == rising[b, k],
        lambda b, h, q, k: rising[b, q] >= rising[b, k] + 2,
        lambda b, h, q, k: islands[b, q] == islands[b, k],
        lambda b, h, q, k: islands[b, q] + 1 == islands[b, k],
        lambda b, h, q, k: large[b, q] >= large[b, k],
        lambda b, h, q, k: (large[b, q] >= few[b, k]) & (q == k),
        lambda b, h, q, k: (k <= q - 10) & (k > q - 15),
        lambda b, h, q, k: bytes_[b, q] - 1 <= bytes_[b, k],
        lambda b, h, q, k: signed[b, q] + 100 >= signed[b, k] - 100,
        lambda b, h, q, k: (q - signed[b, 0]) // 2 >= k - bytes_[b, 0],
        lambda b, h, q, k: (bytes_[b, q] - bytes_[b, 1]) // 2 == (k - 200) // 2 + 101,
        lambda b, h, q, k: (bytes_[b, q] >= -1) & (signed[b, k] < 300) & (q >= 2**40),
        lambda b, h, q, k: small[b, q] - 5 <= k - 2**28,
        lambda b, h, q, k: q + small[b, 0] - 5 <= k - b,
        lambda b, h, q, k: abs(bytes_[b, q] - bytes_[b, k]) < 9,
        lambda b, h, q, k: abs(q - signed[b, k]) <= 120,
        lambda b, h, q, k: q.clamp(min=5) >= k,
        lambda b, h, q, k: k - 5 <= 2**31 - 1,
        lambda *_: torch.tensor(True),
    ]


def theirs(random: Random, batch_size: int, total: int) -> list[Callable]:
    """Masks of the library's own making, none of which may be handed over."""
    window, chunk, begin = random.randint(1, 20), random.randint(1, 12), []
    positions, images = [], []
    for _ in range(batch_size):
        begin.append(random.randrange(total))
        row, image, numbers = [], -1, []
        for _ in range(total):
            jump = random.choices([0, 1, random.randint(2, 5)], [8, 88, 4])[0]
            row.append(0 if not jump or not row else row[-1] + jump)
            image = random.choices([image, -1, max([-1, *numbers]) + 1], [80, 10, 10])[0]
            images_end = bool(numbers) and numbers[-1] != image and image in numbers
            numbers.append(-1 if images_end else image)
        positions.append(row)
        images.append(numbers)
    position_ids, block_ids = torch.tensor(positions), torch.tensor(images)
    packed = (F.pad(position_ids.diff(), (1, 0), value=1) != 1).cumsum(1)
    documents = masking_utils.packed_sequence_mask_function(packed)
    both, either = masking_utils.and_masks, masking_utils.or_masks
    sliding = masking_utils.sliding_window_causal_mask_function(window)
    chunked = masking_utils.chunked_causal_mask_function(chunk, torch.tensor(begin))
    remap = getattr(
        masking_utils, "remap_positions_for_packed_sequence", lambda function, positions: function
    )
    own_images = masking_utils.blockwise_overlay(block_ids)
    made = [sliding, masking_utils.sliding_window_bidirectional_mask_function(window)]
    for function in (masking_utils.causal_mask_function, sliding, chunked):
        inside = remap(function, position_ids)
        made += [both(inside, documents), both(either(inside, own_images), documents)]
        made += [either(function, own_images), either(both(function, documents), own_images), function]
    overlay = masking_utils.sliding_window_overlay(window)
    return [*made, both(either(masking_utils.causal_mask_function, own_images), overlay)]


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["theirs", "custom", "nested", "nested"]))
def test_a_mask_function_at_every_pair(seed: int, kind: str, only_listed: list) -> None:
    random = Random(seed)
    batch_size, kv_length = random.randint(1, 3), random.randint(2, 50)
    kv_offset, q_length = random.choice([0, 0, 7]), random.choice([kv_length, random.randint(1, kv_length)])
    total = kv_offset + kv_length
    functions = [*theirs(random, batch_size, total)]
    if kind != "theirs":
        functions = [random.choice(functions), *custom_functions(random, batch_size, total)]
    function = random.choice(functions)
    if kind == "nested":
        join = random.choice([masking_utils.and_masks, masking_utils.or_masks])
        function = join(function, random.choice(functions))
    place = torch.arange(total)
    pads = {
        "none": torch.zeros(batch_size, total, dtype=torch.bool),
        "right": place >= torch.tensor([[random.randint(1, total)] for _ in range(batch_size)]),
        "left": place < torch.tensor([[random.randrange(total)] for _ in range(batch_size)]),
        "holes": torch.tensor([[random.random() < 0.3 for _ in range(total)] for _ in range(batch_size)]),
    }[random.choice(["none", "right", "left", "holes"])]
    q_offset = total - q_length
    only_listed.clear()
    offset = random.choice([q_offset, torch.tensor(q_offset), torch.tensor([q_offset])])
    block_mask = adapter.block_mask(batch_size, q_length, kv_length, offset, kv_offset, function, ~pads)
    if only_listed:
        assert kind != "theirs"
        return
    mask = create_mask(block_mask.mask_mod, batch_size, 1, q_length, kv_length, "cpu")
    assert torch.equal(mask, every_pair(function, pads, q_length, q_offset, kv_offset))
    tiles = create_block_mask(block_mask.mask_mod, batch_size, None, q_length, kv_length, "cpu")
    listed = block_mask.kv_num_blocks + block_mask.full_kv_num_blocks
    assert (tiles.kv_num_blocks + tiles.full_kv_num_blocks <= listed).all()


def test_two_runs_that_leave_out_one_key(only_listed: list) -> None:
    for gap, is_theirs in ((1, True), (0, False)):
        before = lambda b, h, q, k, gap=gap: k <= q - 3 - gap
        behind = lambda b, h, q, k: (k >= q - 2) & (k <= q)
        for functions in ((before, behind), (behind, before)):
            only_listed.clear()
            adapter.block_mask(1, 20, 20, mask_function=masking_utils.or_masks(*functions))
            assert bool(only_listed) == is_theirs


COMES_BACK = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 2]])
IN_ONE_PLACE = torch.tensor([[0, 0, 0, 1, 1, 4, 4, 2]])


def test_a_number_that_comes_back_is_no_run(only_listed: list) -> None:
    for numbers, is_theirs in (
        (COMES_BACK, True),
        (IN_ONE_PLACE, True),
        (IN_ONE_PLACE.cummax(1).values, False),
    ):
        only_listed.clear()
        function = masking_utils.packed_sequence_mask_function(numbers)
        adapter.block_mask(1, 8, 8, mask_function=function)
        assert bool(only_listed) == is_theirs
    # Nor is an image behind text that comes back, though its number is larger than the one before it.
    only_listed.clear()
    comes_back = torch.tensor([[1, 1, -1, 1, -1, -1, -1, -1]])
    adapter.block_mask(1, 8, 8, mask_function=masking_utils.blockwise_overlay(comes_back))
    assert only_listed
    # Not among images, that are not seen from each other's place, nor where only padding has it.
    only_listed.clear()
    adapter.block_mask(
        1, 8, 8, 0, 0, masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, 1, 1, -1, -1]]))
    )
    function = masking_utils.packed_sequence_mask_function(COMES_BACK)
    adapter.block_mask(1, 8, 8, 0, 0, function, torch.arange(8)[None] < 5)
    adapter.block_mask(1, 8, 8, 0, 0, function, torch.arange(8)[None] >= 5)
    assert not only_listed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("padded", "is_equal"), [(False, True), (True, False)])
def test_the_operator_that_hides_the_pieces(device: str, padded: bool, is_equal: bool) -> None:
    numbers = torch.randint(-1, 5, (3, 40), device=device)
    pads = torch.rand(3, 40, device=device) < 0.3 if padded else None
    queries = torch.arange(30, 40, dtype=torch.int32, device=device)
    for keys, wanted in (
        (numbers, numbers[:, 30:]),
        (numbers, numbers[:1, :1]),
        (numbers[:1], numbers[:, :1]),
    ):
        arguments = (keys, wanted, queries, pads, is_equal)
        torch.library.opcheck(
            torch.ops.causal_padded_integrations_transformers.find_in_pieces.default, arguments
        )


def test_in_a_graph_a_number_that_comes_back_is_an_error(handed_over: list) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def build(numbers: Tensor) -> Tensor:
        function = masking_utils.packed_sequence_mask_function(numbers)
        return adapter.block_mask(1, 8, 8, mask_function=function).kv_num_blocks

    build(IN_ONE_PLACE.cummax(1).values)
    with pytest.raises(RuntimeError, match="a query does not see one run of keys: use sdpa"):
        build(COMES_BACK)
    assert not handed_over


@pytest.mark.parametrize(
    ("kind", "padding"),
    [
        *((kind, padding) for kind in ("gemma3", "llama4") for padding in ("right", "packed")),
        ("modernbert", "right"),
    ],
)
def test_compiled_whole(kind: str, padding: str, handed_over: list) -> None:
    """With layers of each kind: windows or chunks, and none."""
    torch.compiler.reset()
    counter = CompileCounter()
    model, stock = (make_model(kind, "cpu", way) for way in ("flex_attention", "sdpa"))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (129, 150, 256, 300):
        given, real = inputs_of(kind, padding, "cpu", length)
        given |= {} if kind in ENCODERS else {"use_cache": False}
        with torch.no_grad():
            logits, expected = (way(**given).logits for way in (compiled, stock))
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 4 and not handed_over


@pytest.mark.cuda
def test_compiled_whole_it_trains(handed_over: list) -> None:
    """Packed: padding in a graph that trains, test_graphs has."""
    torch.compiler.reset()
    model, stock = (make_model("gemma3", "cuda", way) for way in ("flex_attention", "sdpa"))
    compiled = torch.compile(model, fullgraph=True)
    for length in (130, 200, 300):
        given, real = inputs_of("gemma3", "packed", "cuda", length)
        gradients = []
        for way in (compiled, stock):
            loss = way(**given, use_cache=False).logits[real].square().mean()
            gradients.append(
                torch.autograd.grad(loss, list((model if way is compiled else stock).parameters()))
            )
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert not handed_over


@pytest.mark.usefixtures("stock_afterwards")
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_promise_of_the_padding_side(side: str) -> None:
    """It is handed on where a batch is trained or prefilled, not into a cache."""
    adapter.register(padding_side=side)
    make = transformers.AttentionMaskInterface()["flex_attention"]
    kept = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    kept = kept if side == "right" else kept.flip(1)
    block_mask = make(2, 4, 4, 0, 0, masking_utils.causal_mask_function, kept, "cpu")
    assert not looks_up(block_mask)
    mask = create_mask(block_mask.mask_mod, 2, 1, 4, 4, "cpu")[:, 0]
    assert torch.equal(mask, explicit_mask(kept == 0))
    for window in (1, 3, 9):
        function = masking_utils.sliding_window_causal_mask_function(window)
        block_mask = make(2, 4, 4, 0, 0, function, kept, "cpu")
        assert not looks_up(block_mask)
        mask = create_mask(block_mask.mask_mod, 2, 1, 4, 4, "cpu")[:, 0]
        assert torch.equal(mask, explicit_mask(kept == 0, window=window))
    with pytest.raises(ValueError, match=f"padding_side promises that all padding stands on the {side}"):
        make(2, 4, 4, 0, 0, masking_utils.causal_mask_function, kept.flip(1), "cpu")
    block_mask = make(2, 1, 9, 4, 0, masking_utils.causal_mask_function, kept, "cpu")
    assert looks_up(block_mask)
    with pytest.raises(ValueError, match='padding_side must be "right", "left" or None; got \'both\''):
        adapter.register(padding_side="both")


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
    offset = torch.tensor(12)
    result = adapter.block_mask(2, 4, 16, offset, 1, window, attention_mask, "cpu", **more)
    offset += 1  # as a static cache does, before attention asks the mask
    assert result == "theirs"
    sizes = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset")
    assert [given[name] for name in sizes] == [2, 4, 16, 12, 1]
    assert given["mask_function"] is window and given["attention_mask"] is attention_mask
    assert given["device"] == "cpu" and given["kwargs"] == more


def test_a_window_of_none_is_empty() -> None:
    """Some configurations have one of 0, which no layer uses."""
    function = masking_utils.sliding_window_causal_mask_function(0)
    block_mask = adapter.block_mask(1, 9, 9, mask_function=function)
    assert not create_mask(block_mask.mask_mod, 1, 1, 9, 9, "cpu").any()


def test_cross_attention_of_equal_lengths_masks_no_query() -> None:
    pads = torch.zeros(2, 40, dtype=torch.bool)
    pads[0, 25:] = True
    for q_length in (40, 7):
        both_ways = masking_utils.bidirectional_mask_function
        block_mask = adapter.block_mask(2, q_length, 40, 0, 0, both_ways, ~pads)
        mask = create_mask(block_mask.mask_mod, 2, 1, q_length, 40, "cpu")[:, 0]
        assert torch.equal(mask, (~pads)[:, None].expand(-1, q_length, -1))


@pytest.mark.parametrize("error", [NameError, torch.OutOfMemoryError, RuntimeError])
def test_faults_of_our_own_are_not_hidden(
    error: type[Exception], handed_over: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args):
        raise error("planted")

    monkeypatch.setattr(adapter, "_find_in_pieces", broken)
    with pytest.raises(error, match="planted"):
        adapter.block_mask(1, 8, 8, mask_function=masking_utils.packed_sequence_mask_function(IN_ONE_PLACE))
    assert not handed_over


def test_an_encoder_with_a_window_masks_no_query() -> None:
    """Nothing says which of its queries are padding, as they may be other tokens than the keys."""
    pads = torch.zeros(1, 40, dtype=torch.bool)
    pads[0, 25:] = True
    window = masking_utils.sliding_window_bidirectional_mask_function(30)
    for more, sees in (({"allow_is_bidirectional_skip": True}, 40), ({}, 25)):
        block_mask = adapter.block_mask(1, 40, 40, 0, 0, window, ~pads, **more)
        mask = create_mask(block_mask.mask_mod, 1, 1, 40, 40, "cpu")
        assert mask.any(-1).sum() == sees and not mask[..., 25:].any()
