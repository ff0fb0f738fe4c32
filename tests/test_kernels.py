"""Which kernel runs and how: options, layouts, FLASH, what is compiled, limits, threads."""

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from time import sleep

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_as_exact,
    block_mask_of,
    exact_attention,
    explicit_mask,
    view_of_tokens,
    with_gradients,
)
from helpers import (
    OPTIONS,
    PADDING,
    capture,
    check,
    make_documents,
    make_inputs,
    make_pads,
    soft_cap,
    views_of_pads,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

import causal_padded_flexattn as cpf
from causal_padded_flexattn import (
    _can_use_flash,
    _compile,
    _is_faster_with_flash,
    _kernel_options,
    causal_padded_attention,
    sdpa_reference,
)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("dtype", "BLOCK_SIZE"),
    [  # test_block_sizes_one_after_the_other has the rest of float32
        *((torch.bfloat16, size) for size in (16, 64, 256, (16, 64), (128, 32), (48, 96))),
        *((torch.float32, size) for size in (16, 256)),
    ],
    ids=str,
)
def test_blocks_of_other_sizes(dtype: torch.dtype, BLOCK_SIZE: int | tuple[int, int]) -> None:
    """Prefill, decoding, and where torch can, training."""
    sizes = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    can_train = torch.__version__ >= "2.14" or dtype == torch.float32 or not any(n % 128 for n in sizes)
    for head_size, options in ((64, "spans"), (128, "until"))[: 1 if dtype == torch.float32 else 2]:
        for q_len in (300, 16, 1):
            pads = make_pads("left", 300, "cuda")
            seen = OPTIONS[options](pads)
            inputs, _ = make_inputs("cuda", dtype, lengths=(q_len, 300), sizes=(head_size, head_size))
            with torch.no_grad():
                block_mask = block_mask_of(pads, q_len, BLOCK_SIZE=BLOCK_SIZE, **seen)
            check(inputs, None, pads, seen=seen, block_mask=block_mask)
        training = make_inputs("cuda", dtype, lengths=(300, 300), sizes=(head_size, head_size))
        block_mask = block_mask_of(pads, BLOCK_SIZE=BLOCK_SIZE, **seen)
        if can_train:
            check(*training, pads, seen=seen, block_mask=block_mask)
        else:
            with pytest.raises(ValueError, match="gradients in half precision need blocks of 128 before"):
                check(*training, pads, seen=seen, block_mask=block_mask)


@pytest.mark.cuda
def test_block_sizes_one_after_the_other() -> None:
    """Each gets its own kernel, also from torch's cache, when all sizes are variables of a graph."""
    torch.compiler.reset()
    for dtype, size, length, blocks in (
        *((torch.float32, *other) for other in ((16, 150, 128), (64, 300, (128, 32)), (64, 300, (48, 96)))),
        *((torch.bfloat16, 64, 300, block) for block in (16, 64, 256, 32)),
    ):
        for q_len in (length, 16, 1):
            pads = make_pads("left", length, "cuda", batch_size=4 if size == 16 else 3)
            shapes = {"lengths": (q_len, length), "sizes": (size, size), "batch_size": len(pads)}
            inputs, grad = make_inputs("cuda", dtype, **shapes)
            seen = {"spans": (torch.arange(length, device="cuda") // 70).expand(len(pads), -1)}
            block_mask = block_mask_of(pads, q_len, BLOCK_SIZE=blocks, **seen)
            trains = dtype == torch.float32 and q_len == length
            check(inputs, grad if trains else None, pads, seen=seen, block_mask=block_mask)


def test_batch_sizes_are_one_variable() -> None:
    """Otherwise a condition of Inductor's voids those before it in torch's cache of compiled graphs."""
    found = list[set[str]]()

    def record(graph: torch.fx.GraphModule, _: object) -> Callable:
        (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
        found.append({str(x.meta["example_value"].shape[0]) for x in node.args[:3]})
        return graph.forward

    compiled = torch.compile(cpf._flex_attention, backend=record, fullgraph=True)
    for batch_size in (2, 3, 5):
        inputs, _ = make_inputs("cpu", batch_size=batch_size)
        block_mask = block_mask_of(make_pads("left", 200, "cpu", batch_size))
        compiled(*inputs, None, block_mask, None, False, _kernel_options(*inputs, block_mask))
    assert found[0] == {"2"} and len(found) == 2
    (name,) = found[1]
    assert not name.isdecimal()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        *((sizes, torch.bfloat16) for sizes in ((128, 512), (512, 128), (512, 512), (576, 512))),
        *((sizes, torch.float32) for sizes in ((512, 128), (576, 512))),
    ],
    ids=str,
)
def test_wide_heads(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """576 and 512 are those of multi-head latent attention."""
    pads = make_pads("left", 200, "cuda")
    for lengths in ((1, 200), (200, 200)):
        inputs, grad_output = make_inputs("cuda", dtype, lengths=lengths, sizes=sizes)
        with torch.no_grad():  # a single query decodes
            check(inputs, None, pads)
    check(inputs, grad_output, pads)


def test_tiles_of_heads_of_128_follow_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, where they were measured: the block mask says whether runs begin late."""
    monkeypatch.setattr(cpf, "_is_on_hopper", lambda x: True)
    inputs, _ = make_inputs("cpu", torch.bfloat16, sizes=(128, 128))
    pads = make_pads("right", 200, "cpu")
    textbook = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 200, 200, "cpu")
    for mask, is_large in (
        (block_mask_of(pads), False),
        (block_mask_of(pads, window=50), True),
        (block_mask_of(pads, padding_side="right"), False),
        (block_mask_of(pads, padding_side="right", window=50), True),
    ):
        options = _kernel_options(*inputs, mask)
        assert (options.get("fwd_BLOCK_N") == 128) == is_large
        assert options.get("fwd_USE_TMA", False) != is_large
    for mask in (textbook, None):
        assert not [name for name in _kernel_options(*inputs, mask) if name.startswith("fwd")]
    for width in (130, 132):
        apart = [x.new_zeros(*x.shape[:3], width)[..., :128] for x in inputs]
        assert _kernel_options(*apart, block_mask_of(pads))["fwd_USE_TMA"] is False


@pytest.mark.parametrize("size", [16, 40, 64, 80, 128, 256, 600])
@pytest.mark.parametrize("BLOCK_SIZE", [128, 64, 256, (128, 48), (32, 128)], ids=str)
def test_steps_that_kernels_can_make(
    size: int, BLOCK_SIZE: int | tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They divide the blocks of the mask. Heads of 64 have steps of their own."""
    monkeypatch.setattr(cpf, "_is_on_hopper", lambda x: True)
    inputs, _ = make_inputs("cpu", torch.bfloat16, sizes=(size, size))
    pads = make_pads("right", 200, "cpu")
    options = _kernel_options(*inputs, block_mask_of(pads, BLOCK_SIZE=BLOCK_SIZE))
    q_block, kv_block = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    for name, value in options.items():
        if "BLOCK_" in name:
            block = q_block if name[-2:] in ("_M", "M1") or name.endswith("M2") else kv_block
            assert 16 <= value <= 128 and block % value == 0
        elif "warps" in name or "stages" in name:
            assert value in ((4, 8) if "warps" in name else (1, 2, 3))


@pytest.mark.cuda
def test_heads_of_128_wherever_their_rows_begin() -> None:
    """They are loaded by descriptors, which want multiples of 16 bytes, also where strides are dynamic."""
    pads = make_pads("right", 300, "cuda")
    for width, first in ((128, 0), (136, 0), (144, 8), (130, 0), (132, 0), (129, 1), (136, 1), (192, 64)):
        inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(300, 300), sizes=(128, 128))
        inputs = [F.pad(x, (first, width - 128 - first)).narrow(3, first, 128) for x in inputs]
        assert {x.stride(2) for x in inputs} == {width} and inputs[0].storage_offset() == first
        check(inputs, grad_output, pads, backend="triton", inference=True)


@pytest.mark.cuda
def test_gradients_of_views_are_not_copied() -> None:
    """Of views of tokens, as models have them, at a constant length and at a variable one."""
    for length in (256, 384, 500):
        inputs, grad = make_inputs("cuda", torch.bfloat16, lengths=(length, length))
        *inputs, grad = (view_of_tokens(x) for x in (*inputs, grad))
        pads = make_pads("left", length, "cuda")
        check(inputs, grad, pads)
        inputs = [x.requires_grad_() for x in inputs]
        output = causal_padded_attention(*inputs, pads)
        assert output.transpose(1, 2).is_contiguous()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            torch.autograd.grad(output, inputs, grad)
        assert not {"aten::contiguous", "aten::clone", "aten::copy_"} & {x.key for x in found.key_averages()}


@pytest.mark.cuda
def test_gradients_that_cancel_are_zero() -> None:
    """A token that sees itself alone has them. Inductor may round what cancels, if lengths are variable."""
    for length in (256, 384, 500):
        inputs, grad = make_inputs("cuda", torch.bfloat16, lengths=(length, length))
        *inputs, grad = (view_of_tokens(x) for x in (*inputs, grad))
        inputs, pads = [x.requires_grad_() for x in inputs], make_pads("none", length, "cuda")
        output = causal_padded_attention(*inputs, pads, window=1, backend="triton")
        query_grad, key_grad, _ = torch.autograd.grad(output, inputs, grad)
        assert max(query_grad.abs().max(), key_grad.abs().max()) < 1e-4


@pytest.mark.cuda
def test_training_in_a_cuda_graph() -> None:
    """The mask, both passes, heads of 128: at each replay, what pads then holds."""
    pads = make_pads("right", 300, "cuda")
    inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(300, 300), sizes=(128, 128))

    def step() -> list[Tensor]:
        block_mask = block_mask_of(pads)
        attend = partial(cpf.attend, block_mask=block_mask, backend="triton")
        return with_gradients(attend, inputs, grad_output)

    graph, results = capture(step)
    for padding in ("left", "holes", "empty"):
        pads.copy_(make_pads(padding, 300, "cuda"))
        graph.replay()
        for result, expected in zip(results, step(), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4096, 2, 128, 64), torch.float32),
        ((65_535, 1, 17, 16), torch.float32),  # all that a grid of CUDA's holds
        ((1024, 96, 16, 16), torch.float32),  # too many heads for the kernel that decodes
        ((17, 32, 32768, 128), torch.bfloat16),  # more than 2 ** 31 numbers
    ],
    ids=str,
)
def test_large_batches(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch_size, _, length, _ = shape
    lengths = torch.linspace(min(length, 300), 1, batch_size, device="cuda").round()
    pads = torch.arange(length, device="cuda") >= lengths[:, None]
    query = torch.randn(shape, device="cuda", dtype=dtype)
    with torch.no_grad():
        output = causal_padded_attention(query, query, query, pads)
    for i in (0, 1, batch_size // 2, batch_size - 2, batch_size - 1):
        real = int(lengths[i])
        part = query[i : i + 1, :, :real]
        exact = exact_attention(part, part, part, explicit_mask(pads[i : i + 1, :real]))
        plain = sdpa_reference(part, part, part, pads[i : i + 1, :real])
        assert_as_exact([output[i : i + 1, :, :real]], [plain], [exact])
        assert output[i, :, real:].count_nonzero() == 0


@pytest.mark.cuda
def test_it_does_not_wait_for_the_device() -> None:
    pads = make_pads("right", 200, "cuda")
    inputs, grad_output = make_inputs("cuda", torch.bfloat16)
    attend = partial(causal_padded_attention, pads=pads)
    with_gradients(attend, inputs, grad_output)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(attend, inputs, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_stream_of_shapes_compiles_three_times_at_most(compilations: Callable[[], int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(24):
        batch_size = int(torch.randint(1, 9, (), generator=generator))
        length = int(torch.randint(100, 4097, (), generator=generator))
        inputs, grad_output = make_inputs("cuda", torch.bfloat16, batch_size, lengths=(length, length))
        pads = make_pads("right", length, "cuda", batch_size)
        with_gradients(partial(causal_padded_attention, pads=pads), inputs, grad_output)
    assert 1 <= compilations() <= 3


@pytest.mark.cuda
def test_more_kinds_of_input_than_torch_compiles_left_to_itself(compilations: Callable[[], int]) -> None:
    for size in range(16, 16 + 12 * 8, 8):
        inputs, _ = make_inputs("cuda", torch.bfloat16, 2, lengths=(8, 8), sizes=(size, size))
        with torch.no_grad():
            causal_padded_attention(*inputs, make_pads("right", 8, "cuda", 2))
    assert compilations() == 12


@pytest.mark.cuda
def test_after_a_call_that_fails_the_next_one_is_compiled() -> None:
    """Uncompiled, it would take memory for every score."""
    (query, key, value), _ = make_inputs("cuda", torch.bfloat16, lengths=(4096, 4096))
    pads = make_pads("right", 4096, "cuda")

    def unusable(score, b, h, q_idx, kv_idx):
        return score if score > 0 else -score  # which no compiler can follow

    attend = partial(causal_padded_attention, pads=pads)
    for fail, message in [
        (lambda: torch.func.grad(lambda q: attend(q, key, value).float().sum())(query), ""),
        (lambda: torch.func.vmap(lambda q: attend(q, key, value))(query[None]), ""),
        (lambda: attend(query, key, value, score_mod=unusable), ""),  # what these say is torch's
        (lambda: attend(query, key, value, score_mod=lambda score, b, h, q_idx, kv_idx: 1 / 0), ""),
    ]:
        with pytest.raises(Exception, match=message):
            fail()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            output = causal_padded_attention(query, key, value, pads)
        taken = torch.cuda.max_memory_allocated() - before
        assert taken < 4 * query.numel() * query.element_size() + 2**24  # the scores: 3 * 4 * 4096 ** 2
        torch.testing.assert_close(
            output[2], sdpa_reference(query, key, value, pads)[2], rtol=2e-2, atol=2e-2
        )


def test_threads_that_ask_first_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def slow(function: Callable, **_) -> Callable:
        made.append(function)
        sleep(0.2)
        return function

    monkeypatch.setattr("torch.compile", slow)
    inputs, barrier = torch.randn(3, 1, 2, 8, 16), threading.Barrier(3)

    def ask() -> None:
        barrier.wait()
        with torch.no_grad():
            cpf._run_kernel(*inputs, None, None, None, False, "triton")

    _compile.cache_clear()
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _compile.cache_clear()
    assert made.count(cpf._flex_attention) == 1


def test_at_the_limit_it_raises_until_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is compiled, but for a limit of 2 and a compiler that is fast."""
    torch.compiler.reset()  # torch counts all that was compiled of a function
    compile_ = torch.compile
    limit = {"recompile_limit": 2} if "recompile_limit" in signature(compile_).parameters else {}
    with_less = partial(compile_, backend="eager", **limit)
    monkeypatch.setattr(
        "torch.compile", lambda function, fullgraph, **_: with_less(function, fullgraph=fullgraph)
    )
    compiled = _compile.__wrapped__(same_bits=False)
    monkeypatch.setattr(cpf, "_compile", lambda *kind: compiled)
    monkeypatch.setattr(torch.compiler.config, "recompile_limit", 2)  # torch 2.11

    def attend(size: int) -> None:
        inputs = torch.randn(3, 1, 2, 8, size)
        with torch.no_grad():
            cpf._run_kernel(*inputs, None, None, None, False, "triton")

    attend(16)
    attend(24)
    with pytest.raises(
        RuntimeError, match=r"64 kinds of input are compiled, the limit\. .*call torch\.compiler\.reset\(\)$"
    ):
        attend(32)
    torch.compiler.reset()
    attend(32)


@pytest.mark.cuda
def test_what_is_compiled_first_within_a_backward_pass() -> None:
    """Such checkpoints run again there, where autograd has a thread for the device."""
    torch._dynamo.reset()
    pads = make_pads("right", 200, "cuda")
    inputs, grad_output = make_inputs("cuda")
    attend = partial(causal_padded_attention, pads=pads)
    inputs = [x.requires_grad_() for x in inputs]
    output = checkpoint(attend, *inputs, use_reentrant=True)
    output.backward(grad_output)
    expected = with_gradients(attend, inputs, grad_output)
    for result, truth in zip((output, *(x.grad for x in inputs)), expected, strict=True):
        assert torch.equal(result, truth)


ROOT = Path(__file__).parent.parent


LIMIT = """
import threading
import torch
from causal_padded_flexattn import causal_padded_attention

pads = torch.zeros(1, 32, dtype=torch.bool, device="cuda")

def kinds(sizes):  # more than torch compiles left to itself
    with torch.no_grad():
        for size in sizes:
            causal_padded_attention(*torch.randn(3, 1, 2, 32, size, device="cuda"), pads)

kinds([16])
errors = []
threading.excepthook = errors.append
thread = threading.Thread(target=kinds, args=(range(24, 24 + 9 * 8, 8),))
thread.start()
thread.join()
assert not errors, errors
"""


@pytest.mark.cuda
def test_another_thread_than_the_first_has_the_limit_too() -> None:
    subprocess.run([sys.executable, "-c", LIMIT], cwd=ROOT, check=True, timeout=300)


THREADS = """
import threading
import time
import torch
from causal_padded_flexattn import (
    attend, causal_padded_attention, create_causal_padding_block_mask, sdpa_reference
)

shared = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
shared[0, 200:] = True
block_mask = create_causal_padding_block_mask(shared)

def train(length):
    pads, mask = shared, block_mask
    if length != 300:
        pads, mask = torch.arange(length, device="cuda").expand(2, length) >= length - 50, None
    inputs = [torch.randn(2, 2, length, 64, device="cuda", requires_grad=True) for _ in range(3)]
    for _ in range(2):
        output = attend(*inputs, mask) if length == 300 else causal_padded_attention(*inputs, pads)
        grads = torch.autograd.grad(output.square().sum(), inputs)
    exact = torch.autograd.grad(sdpa_reference(*inputs, pads).square().sum(), inputs)
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

errors = []
threading.excepthook = errors.append
threads = [threading.Thread(target=train, args=(length,), daemon=True) for length in (300, 300, 512, 1000)]
for thread in threads:
    thread.start()
    time.sleep(0.05)
for thread in threads:
    thread.join(240)
assert not errors, errors
assert not any(thread.is_alive() for thread in threads), "hangs"
"""


@pytest.mark.cuda
def test_threads_that_begin_to_train_at_once() -> None:
    """Each compiles its forward pass, which runs autograd, while others compile backward ones."""
    subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, check=True, timeout=300)


@pytest.fixture
def _flash_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flash_attn.cute")
    monkeypatch.setattr(cpf, "_FLASH_FROM", 0)


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
@pytest.mark.parametrize(("backend", "sizes"), [("auto", (64, 64)), ("flash", (128, 128))])
def test_flash(sizes: tuple[int, int], backend: str, compilations: Callable[[], int]) -> None:
    for length in (300, 384, 1000, 77):
        for padding in PADDING:
            inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(length, length), sizes=sizes)
            check(inputs, grad_output, make_pads(padding, length, "cuda"), backend=backend)
    assert 1 <= compilations() <= 4  # the fourth for a single block, a size that torch compiles in


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
@pytest.mark.skipif(cpf._TORCH < (2, 15), reason="torch 2.15 is the first that was tried")
@pytest.mark.parametrize(("backend", "sizes"), [("auto", (64, 64)), ("flash", (128, 128))])
def test_flash_with_fewer_queries(backend: str, sizes: tuple[int, int]) -> None:
    for lengths in ((256, 1000), (130, 300), (128, 384)):
        for padding in PADDING:
            for seen in ({}, {"window": 150}):
                inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=lengths, sizes=sizes)
                pads = make_pads(padding, lengths[1], "cuda")
                check(inputs, grad_output, pads, backend=backend, seen=seen)
    inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(300, 200), sizes=sizes)  # more of them
    pads, query_pads = make_pads("right", 200, "cuda"), make_pads("left", 300, "cuda")
    check(inputs, grad_output, pads, backend=backend, seen={"causal": False, "query_pads": query_pads})


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
@pytest.mark.parametrize("length", [300, 384])
def test_flash_with_other_masks(length: int) -> None:
    for padding in ("right", "left", "holes"):
        pads = make_pads(padding, length, "cuda")
        table = [
            {"window": 100},
            {"documents": make_documents(pads), "window": 150, "causal": False},
            *(options(pads) for options in OPTIONS.values()),
        ]
        if padding != "holes":
            table += [{"padding_side": padding}, {"padding_side": padding, "window": 70}]
        for seen in table:
            inputs = make_inputs("cuda", torch.bfloat16, lengths=(length, length))
            check(*inputs, pads, backend="flash", seen=seen)
    for pads in views_of_pads("cuda") if length == 300 else ():
        check(*make_inputs("cuda", torch.bfloat16, lengths=(300, 300)), pads, backend="flash")


@pytest.mark.cuda
@pytest.mark.usefixtures("_flash_for_all_sizes")
def test_flash_in_a_compiled_model() -> None:
    inputs, grad_output = make_inputs("cuda", torch.bfloat16, lengths=(300, 300))
    pads = make_pads("right", 300, "cuda")

    def model(*inputs: Tensor) -> Tensor:
        return causal_padded_attention(*(x * 2 for x in inputs), pads) + 1

    def last_with_sinks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, lse = causal_padded_attention(query[:, :, -130:], key, value, pads, return_lse=True)
        return F.pad(output * torch.sigmoid(lse).unsqueeze(-1).to(output.dtype), (0, 0, 170, 0))

    for way in (model, last_with_sinks):
        results = [with_gradients(x, inputs, grad_output) for x in (torch.compile(way, fullgraph=True), way)]
        for result, expected in zip(*results, strict=True):
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "flash"),
    [
        ({}, True),
        ({"lengths": (511, 511)}, False),
        ({"lengths": (300, 300), "side": "right"}, True),
        ({"lengths": (150, 150), "side": "right"}, False),
        ({"lengths": (256, 1024)}, cpf._TORCH >= (2, 15)),
        ({"lengths": (127, 8192)}, False),
        ({"dtype": torch.float32}, False),
        ({"sizes": (64, 256)}, False),
        ({"BLOCK_SIZE": 256}, False),
        ({"deterministic": True}, False),
        ({"installed": False}, False),
        ({"mod": soft_cap}, False),
        ({"lse": True}, cpf._TORCH >= (2, 15)),
    ],
)
def test_when_auto_takes_flash(change: dict, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, deterministic = change.pop("installed", True), change.pop("deterministic", False)
    BLOCK_SIZE, mod, lse = change.pop("BLOCK_SIZE", 128), change.pop("mod", None), change.pop("lse", False)
    options = {"BLOCK_SIZE": BLOCK_SIZE, "padding_side": change.pop("side", None)}
    monkeypatch.setattr(cpf, "_FLASH_FROM", 3 * 4 * 512 * 512 * 64)
    monkeypatch.setattr(cpf, "_HAS_FLASH", installed)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: deterministic)
    (query, key, value), _ = make_inputs("cpu", **{"dtype": torch.bfloat16, "lengths": (512, 512), **change})
    pads = torch.zeros(3, key.shape[2], dtype=torch.bool)
    block_mask = block_mask_of(pads, query.shape[2], **options)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    faster = _is_faster_with_flash(query, key, block_mask)
    assert (faster and _can_use_flash(query, key, value, mod, lse)) == flash


@pytest.mark.parametrize(
    "change",
    [
        {"installed": False},
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"hip": "7.0"},
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"sizes": (36, 64)},
        {"sizes": (64, 192)},
        {"lengths": (4, 8)},
        {"mods": {"score_mod": soft_cap}},
        {"mods": {"return_lse": True}},
        {},
    ],
)
def test_what_flash_needs(change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, change = not change, dict(change)
    monkeypatch.setattr(cpf, "_HAS_FLASH", change.pop("installed", True))
    monkeypatch.setattr(torch.version, "hip", change.pop("hip", None))
    capability = change.pop("capability", (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    on_cuda, mods = change.pop("device", "cuda") == "cuda", change.pop("mods", {})
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: on_cuda))
    inputs, _ = make_inputs("cpu", **{"dtype": torch.bfloat16, "lengths": (8, 8), **change})
    if fits:
        assert _can_use_flash(*inputs, None, False)
    else:
        message = 'backend="flash" needs flash-attn-4 .*, a Hopper card, .*; pass "auto"; got query'
        with pytest.raises(ValueError, match=message):
            causal_padded_attention(*inputs, torch.zeros(3, 8, dtype=torch.bool), backend="flash", **mods)


@pytest.mark.parametrize("installed", [True, False])
def test_a_compiled_model_may_ask_what_flash_needs(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpf, "_HAS_FLASH", installed)
    inputs, _ = make_inputs("cpu", lengths=(8, 8))
    ask = torch.compile(
        lambda *x: (x[0] + 1, _can_use_flash(*x, None, False)), fullgraph=True, backend="eager"
    )
    assert ask(*inputs)[1] == _can_use_flash(*inputs, None, False)
