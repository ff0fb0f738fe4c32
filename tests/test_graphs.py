"""In graphs that a caller compiles, exports or traces."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import assert_as_exact, block_mask_of, explicit_mask, with_gradients
from helpers import make_inputs, make_pads, make_spans, make_until, masked_sdpa
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import causal_padded_flexattn as cpf
from causal_padded_flexattn import causal_padded_attention, create_block_mask_from_runs, sdpa_reference


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(128, 256), torch.nn.Linear(128, 128)

    def forward(self, x: Tensor, pads: Tensor, block_mask=None) -> Tensor:  # (B, S, 128)
        query, key, value = self.qkv(x).split([128, 64, 64], dim=-1)
        query, key, value = (y.unflatten(-1, (-1, 32)).transpose(1, 2) for y in (query, key, value))
        if block_mask is None:
            y = causal_padded_attention(query, key, value, pads)
        else:
            y = cpf.attend(query, key, value, block_mask)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("given_mask", "training", "device"),
    [(True, True, "cpu"), (False, False, "cpu"), pytest.param(True, True, "cuda", marks=pytest.mark.cuda)],
)
def test_in_a_compiled_model(given_mask: bool, training: bool, device: str) -> None:
    torch.compiler.reset()  # torch counts compilations by the code, so those of all these tests together
    layer = Layer().to(device)
    # On the CPU, one compilation for all lengths. The C++ that torch 2.11 and 2.12 write for a lookup in a
    # tensor of dynamic length does not build.
    dynamic = torch.__version__ >= "2.13" if device == "cpu" else None
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for length in (200, 260, 300):
        pads = make_pads("left", length, device)
        block_mask = block_mask_of(pads) if given_mask else None
        x = torch.randn(3, length, 128, device=device, requires_grad=training)
        with torch.set_grad_enabled(training):
            expected, result = layer(x, pads, block_mask), compiled(x, pads, block_mask)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        if training:
            for ours, theirs in zip(
                *(torch.autograd.grad(y.square().sum(), x) for y in (result, expected)), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("training", [True, False])
def test_in_a_model_compiled_for_cuda_graphs(training: bool) -> None:
    layer = Layer().cuda()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for i in range(4):
        pads = make_pads(["left", "right", "holes", "none"][i], 256, "cuda")
        x = torch.randn(3, 256, 128, device="cuda", requires_grad=training)
        with torch.set_grad_enabled(training):
            expected, result = layer(x, pads), compiled(x, pads).clone()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        if training:
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (result, expected)]
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def attend_with(*options: str, **more) -> Callable[..., Tensor]:
    """Attention that makes its mask, for what a caller compiles; numbers of tokens come last."""

    def model(query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *numbers: Tensor) -> Tensor:
        seen = dict(zip(options, numbers, strict=True)) | more
        return causal_padded_attention(query * 2, key, value, pads, **seen)

    return model


def two_layers(query: Tensor, key: Tensor, value: Tensor, pads: Tensor) -> Tensor:
    block_mask = block_mask_of(pads)
    attend = partial(cpf.attend, block_mask=block_mask)
    return attend(attend(query * 2, key, value), key, value)


def into_a_cache(query: Tensor, key: Tensor, value: Tensor, pads: Tensor) -> Tensor:
    last = pads.new_full((), pads.shape[1] - 1, dtype=torch.int64)
    block_mask = block_mask_of(pads, 1, q_offset=last)
    return cpf.attend(query * 2, key, value, block_mask=block_mask)


def query_of_all(length: int) -> int:
    return length


def attend_by_runs(*names: str) -> Callable[..., Tensor]:
    """Attention whose mask is made of runs, of which tensors come last."""

    def model(query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *numbers: Tensor) -> Tensor:
        given = {"first": None, "last": None} | dict(zip(names, numbers, strict=True))
        block_mask = create_block_mask_from_runs(given.pop("first"), given.pop("last"), pads, **given)
        return cpf.attend(query * 2, key, value, block_mask=block_mask)

    return model


def local_encoder(query: Tensor, key: Tensor, value: Tensor, pads: Tensor) -> Tensor:
    places = torch.arange(pads.shape[1], device=pads.device)
    block_mask = create_block_mask_from_runs(places - 30, places + 10, pads)
    return cpf.attend(query * 2, key, value, block_mask=block_mask)


def packed(query: Tensor, key: Tensor, value: Tensor, pads: Tensor, position_ids: Tensor) -> Tensor:
    places = torch.arange(pads.shape[1], device=pads.device)
    block_mask = create_block_mask_from_runs(places - position_ids, places, pads)
    return cpf.attend(query * 2, key, value, block_mask)


def make_position_ids(documents: Tensor) -> Tensor:
    """(B, S): they restart where the number of the document changes."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
    return places - torch.where(begins, places, 0).cummax(1).values


MODELS: dict[str, tuple[Callable[..., Tensor], Callable[[int], int]]] = {
    "causal": (attend_with(), query_of_all),
    "window": (attend_with(window=50), query_of_all),
    "packed": (packed, query_of_all),
    "spans and until": (attend_by_runs("last", "until"), query_of_all),
    "padding_side": (attend_with(padding_side="left", window=70), query_of_all),
    "encoder": (attend_by_runs(), query_of_all),
    "local encoder": (local_encoder, query_of_all),
    "cross-attention": (attend_by_runs("query_pads"), lambda length: length // 2 + 3),
    "two layers, one mask": (two_layers, query_of_all),
    "growing cache": (attend_with(), lambda length: 1),
    "offset": (into_a_cache, lambda length: 1),
}


# On CUDA a window has what packed rows and local encoders have, and two layers are causal ones.
ON_CUDA = ["window", "spans and until", "padding_side", "cross-attention", "two layers, one mask"]
ON_CUDA += ["growing cache", "offset"]
TRACED = [(name, "cpu") for name in MODELS]
TRACED += [pytest.param(name, "cuda", marks=pytest.mark.cuda) for name in ON_CUDA]


@pytest.mark.parametrize(("name", "device"), TRACED)
def test_lengths_in_a_callers_graph(name: str, device: str, compilations: Callable[[], int]) -> None:
    """Few graphs for all lengths, with torch's own limit of eight, as the mask is made in the graph."""
    model, queries_of = MODELS[name]
    training = name not in ("growing cache", "offset")
    # On the CPU it is the trace that counts: what it is compiled to is torch's.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for length in (200, 260, 384, 129, 513, 100, 1000, 256, 40):
        (query, key, value), grad_output = make_inputs(device, lengths=(queries_of(length), length))
        pads = make_pads("left", length, device)
        spans, until = make_spans(pads), make_until(pads)
        documents = torch.randint(0, 2, pads.shape, device=device).cumsum(1) // 50
        ends = explicit_mask(pads, spans=spans)
        numbers = {
            "packed": [make_position_ids(documents)],
            "spans and until": [length - 1 - ends.flip(-1).int().argmax(-1), until],
            "cross-attention": [make_pads("right", queries_of(length), device)],
        }.get(name, [])
        seen = {
            "window": {"window": 50},
            "packed": {"documents": documents},
            "spans and until": {"spans": spans, "until": until},
            "padding_side": {"window": 70},
            "encoder": {"causal": False},
            "cross-attention": {"causal": False, "query_pads": (numbers or [None])[0]},
        }.get(name, {})
        mask = explicit_mask(pads, queries_of(length), **seen)
        if name == "local encoder":
            places = torch.arange(length, device=device)
            ahead = places - places[:, None]
            mask = explicit_mask(pads, causal=False) & (ahead >= -30) & (ahead <= 10)

        def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor = mask) -> Tensor:
            output = masked_sdpa(query * 2, key, value, mask, None)
            return masked_sdpa(output, key, value, mask, None) if name == "two layers, one mask" else output

        grad = grad_output if training else None
        with torch.set_grad_enabled(training):
            results = with_gradients(lambda *x: compiled(*x, pads, *numbers), [query, key, value], grad)  # noqa: B023
            expected = with_gradients(plain, [query, key, value], grad)
        for result, truth in zip(results, expected, strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-3, atol=1e-4)
    assert 1 <= compilations() <= 4


@pytest.mark.parametrize(
    ("name", "example", "strict"),
    [
        *(("causal", 40, True), ("causal", 300, False), ("window", 40, False), ("packed", 300, True)),
        *(("padding_side", 40, False), ("encoder", 40, True), ("local encoder", 300, False)),
    ],
)
def test_exported_with_a_length_that_is_dynamic(name: str, example: int, strict: bool) -> None:
    """One program serves one block of tokens and several, and can be saved."""

    class Model(torch.nn.Module):
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, pads: Tensor, *numbers: Tensor
        ) -> Tensor:
            return MODELS[name][0](query, key, value, pads, *numbers)

    def inputs_of(length: int) -> tuple:
        pads = make_pads("left", length, "cpu")
        more = [make_position_ids(torch.arange(length).expand(3, -1) // 70)] if name == "packed" else []
        return (*make_inputs("cpu", lengths=(length, length))[0], pads, *more)

    length = torch.export.Dim("length", min=3, max=4096)
    sizes = [{2: length}, {2: length}, {2: length}, {1: length}]
    sizes += [({1: length},)] if name == "packed" else []
    exported = torch.export.export(Model(), inputs_of(example), dynamic_shapes=tuple(sizes), strict=strict)
    file = BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    programs = exported.module(), torch.export.load(file).module()
    for n in (3, 40, 128, 129, 200, 256, 1000):
        inputs = inputs_of(n)
        for program in programs:
            torch.testing.assert_close(program(*inputs), Model()(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_over_pads(compiled: bool) -> None:
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    both, places = torch.stack([pads, pads.flip(0)]), torch.arange(200)

    def by_runs(pads: Tensor) -> Tensor:
        lengths = (~pads).sum(1, keepdim=True)
        block_mask = create_block_mask_from_runs(places - lengths, None, pads, until=places + lengths)
        return cpf.attend(*inputs, block_mask)

    for attend in (partial(causal_padded_attention, *inputs, window=50), by_runs):
        mapped = torch.vmap(attend)
        mapped = torch.compile(mapped, fullgraph=True, backend="aot_eager") if compiled else mapped
        torch.testing.assert_close(mapped(both), torch.stack([attend(x) for x in both]))


def test_other_tracers() -> None:
    """vmap over pads, make_fx and fake tensors are right; torch.jit.trace is refused."""
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    both = torch.stack([pads, pads.flip(0)])

    def attend(pads: Tensor) -> Tensor:
        return causal_padded_attention(*inputs, pads, window=50, padding_side="right")

    expected = torch.stack([attend(x) for x in both])
    torch.testing.assert_close(torch.vmap(attend)(both), expected)
    torch.testing.assert_close(make_fx(attend)(pads)(both[1]), expected[1])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (*inputs, pads)]
        assert causal_padded_attention(*fakes, window=50).shape == (3, 4, 200, 64)
    with pytest.raises(TypeError, match=r"torch.jit.trace is not supported: use torch.export"):
        torch.jit.trace(attend, pads)


@pytest.mark.cuda
def test_heads_of_128_in_a_compiled_model() -> None:
    """They begin wherever the model's own products do, which no one copies to where descriptors may begin."""

    def model(x: Tensor, weight: Tensor, pads: Tensor, attend=causal_padded_attention) -> Tensor:
        return attend(*(x @ weight).narrow(4, 1, 128), pads)

    compiled = torch.compile(model, fullgraph=True)
    for length in (300, 200, 260):
        pads = make_pads("right", length, "cuda")
        x = torch.randn(3, 3, 4, length, 136, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(136, 136, device="cuda", dtype=torch.bfloat16) / 136**0.5
        grad_output = torch.randn(3, 4, length, 128, device="cuda", dtype=torch.bfloat16)
        plain = partial(model, pads=pads, attend=sdpa_reference)
        assert_as_exact(
            with_gradients(partial(compiled, pads=pads), [x, weight], grad_output),
            with_gradients(plain, [x, weight], grad_output),
            with_gradients(plain, [x.double(), weight.double()], grad_output.double()),
        )


def load_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as a module of another name, as who vendors it has it."""
    spec = importlib.util.spec_from_file_location(name, cpf.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copy)
    spec.loader.exec_module(copy)
    return copy


def test_copies_of_the_file_do_not_share_their_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise graphs of the first run the code of the second."""
    first, second = (load_copy(name, monkeypatch) for name in ("first_copy", "second_copy"))
    pads = make_pads("left", 200, "cpu")
    expected = first.create_causal_padding_block_mask(pads).kv_num_blocks
    second._list_tiles = lambda tiles: 1 / 0
    make = lambda pads: first.create_causal_padding_block_mask(pads).kv_num_blocks + 0
    assert torch.equal(torch.compile(make, fullgraph=True, backend="aot_eager")(pads), expected)


def test_a_release_that_is_not_final_counts_as_that_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.15.0a0+nv26.1")
    assert load_copy("of_a_container", monkeypatch)._TORCH == (2, 15)


@pytest.mark.parametrize("package", ["whole", "FlashAttention 2", "broken"])
def test_flash_is_there_if_its_module_is(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 2 has the same package, and records of pip may outlive what they record."""
    code = "raise ImportError('undefined symbol')" if package == "broken" else ""
    folder = tmp_path / "flash_attn" / ("" if package == "FlashAttention 2" else "cute")
    folder.mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    has = load_copy("asked_again", monkeypatch)._HAS_FLASH
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    assert has == (package == "whole")
