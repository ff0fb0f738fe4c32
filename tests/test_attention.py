"""attend and causal_padded_attention: values and gradients against float64."""

import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    DEVICES,
    assert_as_exact,
    block_mask_of,
    exact_attention,
    explicit_mask,
    view_of_tokens,
    with_gradients,
    written_out,
)
from helpers import (
    OPTIONS,
    PADDING,
    check,
    make_alibi,
    make_documents,
    make_inputs,
    make_pads,
    make_until,
    soft_cap,
    views_of_pads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

import causal_padded_flexattn as cpf
from causal_padded_flexattn import causal_padded_attention, create_block_mask_from_runs

SEEN: dict[str, Callable[[Tensor], dict]] = {
    "causal": lambda pads: {},
    "window": lambda pads: {"window": 70},
    "window of one": lambda pads: {"window": 1},
    "documents": lambda pads: {"documents": make_documents(pads)},
    "window, documents": lambda pads: {"window": 100, "documents": make_documents(pads)},
    "encoder": lambda pads: {"causal": False},
    "local encoder": lambda pads: {"causal": False, "window": 40},
    "encoder of documents": lambda pads: {"causal": False, "documents": make_documents(pads)},
    **OPTIONS,
}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_call(data: st.DataObject) -> None:
    """On the CPU: any padding, lengths, heads, sizes, dtype, scale, layout, score_mod and mask."""
    draw, choose = data.draw, lambda *of: data.draw(st.sampled_from(of))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    padding, kv_len, seen = choose(*PADDING), draw(st.integers(1, 300)), choose(*SEEN, "promise", "cross")
    q_len = kv_len if draw(st.booleans()) else draw(st.integers(1, kv_len))
    pads = make_pads(padding, kv_len, "cpu")
    if seen == "cross":
        q_len = draw(st.integers(1, 300))
        options = {"causal": False, "query_pads": make_pads(choose(*PADDING), q_len, "cpu")}
    elif seen == "promise":
        side = choose("right", "left")
        pads = make_pads(choose("none", side, "empty"), kv_len, "cpu")
        options = {"padding_side": side, "window": choose(None, 1, 70)}
    else:
        options = SEEN[seen](pads)
    inputs, grad = make_inputs(
        "cpu",
        choose(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        heads=choose((1, 1), (4, 4), (4, 1), (6, 2)),
        lengths=(q_len, kv_len),
        sizes=choose((64, 64), (16, 16), (24, 40), (1, 3), (128, 32)),
    )
    if draw(st.booleans()):
        inputs, grad = [view_of_tokens(x) for x in inputs], view_of_tokens(grad)
    if draw(st.booleans()):
        pads = pads.T.contiguous().T
    # What is compared with writes masked scores as -1e30, which float16 does not hold.
    score_mod = choose(None, soft_cap) if inputs[0].dtype != torch.float16 else None
    more = {"scale": choose(None, 0.3), "score_mod": score_mod}
    check(inputs, grad, pads, seen=options, inference=draw(st.booleans()), **more)


def rows(*names: str, **more: object) -> list[tuple]:
    """The same kind of inputs with each of these masks."""
    return [(name, more) for name in names]


ENCODERS, WINDOWS = ("encoder", "local encoder"), ("window", "window of one", "window, documents")
LOOKED_UP = ("spans", "spans, window", "until", "until, documents, window")
HALF = {"dtype": torch.bfloat16}
TABLE = [
    *rows("causal", "encoder", paddings=PADDING, inference=True),
    *(row for n in (1, 64, 127, 128, 129) for row in rows("causal", paddings=PADDING, lengths=(n, n))),
    *(row for n in (256, 257, 500) for row in rows("causal", paddings=PADDING, lengths=(n, n))),
    *(row for n in (1, 5, 70, 130) for row in rows("causal", paddings=PADDING, lengths=(n, 200))),
    *rows("causal", dtype=torch.float16, lengths=(300, 300), inference=True),
    *rows("causal", **HALF, lengths=(300, 300), inference=True),
    *(row for n in (32, 64, 128, 256) for row in rows("causal", **HALF, sizes=(n, n))),
    *(row for n in (64, 128) for row in rows("window", **HALF, sizes=(n, n))),
    *(row for sizes in ((64, 32), (32, 64)) for row in rows("causal", **HALF, sizes=sizes)),
    *(row for heads in ((1, 1), (4, 4), (4, 1)) for row in rows("causal", heads=heads)),
    *(row for scale in (0.3, 0.1, 0.05) for row in rows("causal", scale=scale)),  # one after the other
    *rows(*WINDOWS, *ENCODERS, lengths=(300, 300)),
    *(row for n in (1, 5, 130) for row in rows("window, documents", lengths=(n, 300), inference=True)),
    # Kernels look up the ends of runs, and until; what those stand for test_any_call has.
    *rows(*LOOKED_UP, paddings=("none", "right", "left", "holes"), lengths=(300, 300), inference=True),
    *rows(*LOOKED_UP, paddings=("left",), **HALF, lengths=(384, 384), sizes=(128, 128)),
    *rows("causal", "window, documents", score_mod="soft cap", inference=True),
    *rows("causal", "encoder", score_mod="alibi", inference=True),
    *rows("window, documents", score_mod="alibi", **HALF, inference=True),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "more"), TABLE, ids=str)
def test_on_cuda(name: str, more: dict) -> None:
    more = dict(more)
    paddings, inference = more.pop("paddings", ("right", "left", "holes")), more.pop("inference", False)
    score_mod = {"soft cap": soft_cap, "alibi": make_alibi("cuda"), None: None}[more.pop("score_mod", None)]
    scale = more.pop("scale", None)
    for padding in paddings:
        inputs, grad = make_inputs("cuda", **more)
        pads = make_pads(padding, inputs[1].shape[2], "cuda")
        options = {"scale": scale, "score_mod": score_mod, "inference": inference}
        check(inputs, grad, pads, seen=SEEN[name](pads), **options)


@pytest.mark.cuda
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_promise_of_the_padding_side(side: str) -> None:
    pads = make_pads(side, 300, "cuda")
    for lengths, more in (((300, 300), {}), ((300, 300), {"window": 70}), ((70, 300), {"window": 90})):
        inputs = make_inputs("cuda", torch.bfloat16, lengths=lengths)
        check(*inputs, pads, seen={"padding_side": side, **more})


@pytest.mark.cuda
def test_cross_attention() -> None:
    for lengths in ((300, 200), (70, 200), (1, 130)):
        pads, query_pads = make_pads("right", lengths[1], "cuda"), make_pads("holes", lengths[0], "cuda")
        seen = {"causal": False, "query_pads": query_pads}
        check(*make_inputs("cuda", lengths=lengths), pads, seen=seen, inference=True)


@pytest.mark.cuda
def test_layouts() -> None:
    inputs, grad_output = make_inputs("cuda")
    views = [view_of_tokens(x) for x in inputs]
    assert not any(x.is_contiguous() for x in views)
    check(views, view_of_tokens(grad_output), make_pads("left", 200, "cuda"))
    for pads in views_of_pads("cuda"):
        check(*make_inputs("cuda", lengths=(300, 300)), pads, inference=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("BLOCK_SIZE", "is_causal"), [(256, True), ((128, 384), False)])
def test_blocks_that_reach_past_the_end(
    BLOCK_SIZE: int | tuple[int, int], is_causal: bool, device: str
) -> None:
    """384 is a multiple of the kernel's tiles, not of the blocks; what lies behind must not be read."""
    inputs, grad_output = make_inputs(device, lengths=(512, 512))
    pads = make_pads("right", 512, device)
    for x in (*inputs, grad_output):
        x[:, :, 384:] = 1e4
    pads[:, 384:] = False
    block_mask = block_mask_of(pads[:, :384], causal=is_causal, BLOCK_SIZE=BLOCK_SIZE)
    shorter = [x[:, :, :384] for x in inputs]
    seen = {"causal": is_causal}
    check(shorter, grad_output[:, :, :384], pads[:, :384], seen=seen, block_mask=block_mask)


@pytest.mark.parametrize("device", DEVICES)
def test_a_learned_bias_gets_its_gradient(device: str) -> None:
    pads, (inputs, grad_output) = make_pads("right", 200, device), make_inputs(device)
    table = torch.randn(4, 32, device=device)
    mask = explicit_mask(pads, window=60)

    def attend(way, query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        def score_mod(score, b, h, q_idx, kv_idx):
            return score + table[h, (q_idx - kv_idx).clamp(0, 31)]

        return way(query, key, value, score_mod=score_mod)

    exact = partial(attend, lambda *x, **mod: exact_attention(*x, mask, **mod))
    plain = partial(attend, lambda *x, **mod: written_out(*x, mask, **mod)[0])
    ours = partial(attend, lambda *x, **mod: causal_padded_attention(*x, pads, window=60, **mod))
    inputs = [*inputs, table]
    truth = with_gradients(exact, [x.double() for x in inputs], grad_output.double())
    assert_as_exact(
        with_gradients(ours, inputs, grad_output), with_gradients(plain, inputs, grad_output), truth
    )


def times(weight: float) -> Callable:
    return lambda score, b, h, q_idx, kv_idx: score * weight


def times_by_default(weight: float) -> Callable:
    return lambda score, b, h, q_idx, kv_idx, weight=weight: score * weight


def times_by_keyword(weight: float) -> Callable:
    return partial(lambda score, b, h, q_idx, kv_idx, weight: score * weight, weight=weight)


class Times:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def modify(self, score, b, h, q_idx, kv_idx):
        return score * self.weight

    def __call__(self, *given):
        return self.modify(*given)


def times_inside(weight: float) -> Callable:
    inner = times(weight)
    return lambda score, b, h, q_idx, kv_idx: inner(score, b, h, q_idx, kv_idx)


def plus(weight: float) -> Callable:
    return lambda score, b, h, q_idx, kv_idx: score + weight * (q_idx - kv_idx)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_that_a_score_mod_captures(device: str) -> None:
    """Each is right wherever it is captured, after any other. Torch left to itself would use an old one."""
    pads, (inputs, grad_output) = make_pads("right", 200, device), make_inputs(device)

    def by_head(weight: float) -> Callable:
        weights = torch.full((4,), weight, device=device)
        return lambda score, b, h, q_idx, kv_idx: score * weights[h]

    method = lambda weight: Times(weight).modify
    for make in (times, plus, times_by_default, times_by_keyword, Times, method, times_inside, by_head):
        trains = make in (times, by_head)  # a backward pass compiles the same function
        for weight in (3.0, 0.5, 2.0) if make is times else (0.25, 0.75):
            check(inputs, grad_output if trains else None, pads, score_mod=make(weight))
    assert not torch._dynamo.config.specialize_float  # as it was


def distance(score, b, h, q_idx, kv_idx):
    return (kv_idx - q_idx).float()


@pytest.mark.parametrize("device", DEVICES)
def test_score_mods_that_ignore_some_of_their_arguments(device: str) -> None:
    inputs, grad_output = make_inputs(device)
    for score_mod in (
        lambda score, *_: score * 0.5,
        lambda score, b, h, q_idx, kv_idx: score + (b == 1) * 0.3 * kv_idx,
    ):
        check(inputs, grad_output, make_pads("left", 200, device), score_mod=score_mod)


@pytest.mark.cuda
@pytest.mark.parametrize("train", [False, True])
def test_score_mods_that_ignore_the_score_are_refused_or_right(train: bool) -> None:
    inputs, grad_output = make_inputs("cuda")
    pads, table = make_pads("left", 200, "cuda"), torch.randn(4).cuda()
    mask = explicit_mask(pads)
    for score_mod in (
        lambda *_: 0.5,
        distance,
        lambda score, b, h, q_idx, kv_idx: table[h],
        lambda score, b, h, q_idx, kv_idx: 0.1 * (kv_idx - q_idx),
    ):
        attend = partial(causal_padded_attention, pads=pads, score_mod=score_mod)
        try:
            results = with_gradients(attend, inputs, grad_output if train else None)
        except RuntimeError as error:
            words = "torch could not compile score_mod, which must return a float"
            if train and cpf._TORCH < (2, 12):  # compiles the backward pass when that runs
                words += "|joint_subgraph_buffer is None"
            assert re.search(words, str(error))
            continue
        kept = lambda score, *places, f=score_mod: f(score, *places) + score * 0  # so that it has gradients
        way = lambda *x, f=kept: written_out(*x, mask, score_mod=f)[0]
        plain = with_gradients(way, inputs, grad_output if train else None)
        for result, expected in zip(results, plain, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


def test_score_mods_that_ignore_the_score() -> None:
    """On the CPU they are right. On CUDA torch compiles few of them, and that is said."""
    (inputs, _), pads, table = make_inputs("cpu"), make_pads("left", 200, "cpu"), torch.randn(4)
    for score_mod in (distance, lambda score, b, h, q_idx, kv_idx: table[h]):
        mask = explicit_mask(pads)
        result = causal_padded_attention(*inputs, pads, score_mod=score_mod)
        torch.testing.assert_close(result, written_out(*inputs, mask, None, score_mod)[0])
    for constant in (0.5, torch.tensor(0.5)):
        with pytest.raises(
            ValueError, match=r"score_mod must return a score for each pair: .*; got returned"
        ):
            causal_padded_attention(*inputs, pads, score_mod=lambda *_, x=constant: x)


@pytest.mark.parametrize("device", DEVICES)
def test_views_with_a_sign(device: str) -> None:
    """The imaginary part of a conjugate is the other's with a flag that says minus."""
    pads = make_pads("right", 200, device)
    inputs = [torch.randn(3, n, 200, 64, dtype=torch.complex64, device=device).conj().imag for n in (4, 2, 2)]
    assert all(x.is_neg() for x in inputs)
    ours = causal_padded_attention(*inputs, pads)
    exact = exact_attention(*(x.resolve_neg().double() for x in inputs), explicit_mask(pads))
    torch.testing.assert_close(ours, exact.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_mode(device: str) -> None:
    """By dual numbers: right on the CPU, refused on CUDA, where torch 2.11 would lose the tangent."""
    pads, (inputs, _) = make_pads("right", 200, device), make_inputs(device)
    tangents = [torch.randn_like(x) for x in inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tangent) for x, tangent in zip(inputs, tangents, strict=True)]
        if device == "cuda":
            with pytest.raises(ValueError, match=r"there is no forward mode: use torch\.autograd\.grad"):
                causal_padded_attention(*inputs[:2], duals[2], pads)
            return
        tangent = forward_ad.unpack_dual(causal_padded_attention(*duals, pads)).tangent
    exact = lambda *x: exact_attention(*x, explicit_mask(pads))
    doubles = [tuple(x.double() for x in given) for given in (inputs, tangents)]
    torch.testing.assert_close(tangent, torch.func.jvp(exact, *doubles)[1].float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_parameter_alone_wants_a_gradient(device: str) -> None:
    pads, (inputs, _) = make_pads("right", 200, device), make_inputs(device, lengths=(4, 200))
    weight = torch.ones(4, device=device, requires_grad=True)
    score_mod = lambda score, b, h, q_idx, kv_idx: score * weight[h]
    attend = partial(causal_padded_attention, *inputs, pads, score_mod=score_mod)
    (gradient,) = torch.autograd.grad(attend().sum(), weight)
    exact = written_out(*(x.double() for x in inputs), explicit_mask(pads, 4), None, score_mod)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), weight)[0], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        block_mask = block_mask_of(pads, 4)
        cpf.attend(*inputs, block_mask, score_mod=score_mod)
    with pytest.raises(ValueError, match=r"block_mask was made under torch\.no_grad"):
        cpf.attend(*inputs, block_mask, score_mod=score_mod)


def test_a_variable_that_is_not_there_yet() -> None:
    """A function may capture one that is assigned after the call."""
    pads, (inputs, _) = make_pads("right", 200, "cpu"), make_inputs("cpu", lengths=(4, 200))
    score_mod = lambda score, *_: score if score.numel() else later
    with torch.no_grad():
        block_mask = block_mask_of(pads, 4)
    expected = cpf.attend(*inputs, block_mask)
    torch.testing.assert_close(cpf.attend(*inputs, block_mask, score_mod=score_mod), expected)
    later = None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "q_len"), [(torch.float32, 200), (torch.bfloat16, 3)])
def test_log_sum_exp(device: str, dtype: torch.dtype, q_len: int) -> None:
    check_log_sum_exp(device, dtype, q_len)


@pytest.mark.cuda
@pytest.mark.skipif(cpf._TORCH < (2, 15), reason="torch 2.15 is the first that was tried")
@pytest.mark.parametrize("q_len", [200, 130])
def test_log_sum_exp_with_flash(q_len: int) -> None:
    pytest.importorskip("flash_attn.cute")
    check_log_sum_exp("cuda", torch.bfloat16, q_len, backend="flash")


def check_log_sum_exp(device: str, dtype: torch.dtype, q_len: int, **how: str) -> None:
    """Values, and gradients of a loss of both results."""
    pads = make_pads("right", 200, device)
    pads[:, -3:] = pads[0, -3:]  # the last queries are padding in no row, or in all
    (inputs, grad_output), grad_lse = (
        make_inputs(device, dtype, lengths=(q_len, 200)),
        torch.randn(3, 4, q_len),
    )
    mask = explicit_mask(pads, q_len, window=90)
    grad_lse = grad_lse.to(device).masked_fill(~mask.any(-1)[:, None], 0.0)

    def both(attention, *inputs: Tensor) -> Tensor:
        output, lse = attention(*inputs)
        return torch.cat(
            [output, lse.unsqueeze(-1).masked_fill(lse.unsqueeze(-1).isneginf(), 0).to(output.dtype)], -1
        )

    def ours(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = causal_padded_attention(*inputs, pads, window=90, return_lse=True, **how)
        assert lse.shape == (3, 4, q_len) and lse.dtype == torch.float32
        assert torch.equal(lse.isneginf(), ~mask.any(-1)[:, None].expand_as(lse))
        torch.testing.assert_close(output, causal_padded_attention(*inputs, pads, window=90, **how))
        return output, lse

    grad = torch.cat([grad_output, grad_lse.unsqueeze(-1).to(dtype)], -1) if q_len > 3 else None
    results = with_gradients(partial(both, ours), inputs, grad)
    plain = with_gradients(partial(both, lambda *x: written_out(*x, mask)), inputs, grad)
    wide = [x.double() for x in inputs]
    exact = with_gradients(
        partial(both, lambda *x: written_out(*x, mask)), wide, None if grad is None else grad.double()
    )
    assert_as_exact(results, plain, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_of_padding_only_value_reaches_the_output(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, _ = make_inputs(device)
    expected = causal_padded_attention(*inputs, pads)
    for which, name in enumerate(("query", "key", "value")):
        poisoned = list(inputs)
        poisoned[which] = inputs[which].masked_fill(pads[:, None, :, None], torch.nan)
        output = causal_padded_attention(*poisoned, pads)
        leaked = output.transpose(1, 2)[~pads].isnan().any()
        assert leaked == (name == "value"), name
        if name != "value":
            assert torch.equal(output.transpose(1, 2)[~pads], expected.transpose(1, 2)[~pads])


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, grad_output = make_inputs(device)
    halves = [x.bfloat16() for x in inputs]
    expected = with_gradients(lambda *x: causal_padded_attention(*x, pads), halves, grad_output.bfloat16())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return causal_padded_attention(
                query, key, value.bfloat16(), pads
            )  # mixed, as after rotary embeddings

    results = with_gradients(attend, inputs, grad_output.bfloat16())
    assert results[0].dtype == torch.bfloat16 and results[1].dtype == torch.float32
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth.to(result.dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, grad_output = make_inputs(device)
    attend = partial(causal_padded_attention, pads=pads)
    expected = with_gradients(attend, inputs, grad_output)
    results = with_gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), inputs, grad_output)
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_without_gradients(device: str) -> None:
    pads = make_pads("right", 200, device)
    inputs, _ = make_inputs(device)
    expected = causal_padded_attention(*inputs, pads)
    with torch.no_grad():
        result = causal_padded_attention(*(x.requires_grad_() for x in inputs), pads)
    torch.testing.assert_close(result, expected)
    assert not result.requires_grad


@pytest.mark.parametrize("q_len", [200, 40])
def test_a_score_mod_that_is_not_finite_where_masked(q_len: int) -> None:
    """Of masked pairs nothing reaches the gradients: their places are at or below 0 here."""
    pads = make_pads("right", 200, "cpu")
    inputs, grad_output = make_inputs("cpu", lengths=(q_len, 200))
    weight = torch.ones(4)

    def attend(way, query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        def score_mod(score, b, h, q_idx, kv_idx):
            away = q_idx + 200 - q_len - kv_idx + 1
            away = away if way is ours else away.clamp(min=1)  # what is allowed is the same
            return score / away - weight[h] * torch.log(away)

        return way(query, key, value, score_mod=score_mod)

    mask = explicit_mask(pads, q_len)
    ours = partial(causal_padded_attention, pads=pads)
    plain = partial(attend, lambda *x, **mod: written_out(*x, mask, **mod)[0])
    results = with_gradients(partial(attend, ours), [*inputs, weight], grad_output)
    expected = with_gradients(plain, [*inputs, weight], grad_output)
    exact = with_gradients(plain, [x.double() for x in (*inputs, weight)], grad_output.double())
    assert_as_exact(results, expected, exact)


def test_other_devices_run_plain_operators() -> None:
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    output = causal_padded_attention(*(x.to("meta") for x in inputs), pads.to("meta"), score_mod=soft_cap)
    assert output.shape == (3, 4, 200, 64) and output.device.type == "meta"


def test_autocast_leaves_float64_alone() -> None:
    inputs, pads = [x.double() for x in make_inputs("cpu")[0]], make_pads("right", 200, "cpu")
    expected = causal_padded_attention(*inputs, pads)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_padded_attention(*inputs, pads), expected)


def test_another_default_device_changes_nothing() -> None:
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    options = {"score_mod": soft_cap, "window": 50, "padding_side": "right"}
    mask = create_block_mask_from_runs(None, torch.arange(200), pads, until=make_until(pads))
    expected = causal_padded_attention(*inputs, pads, **options)
    by_runs = cpf.attend(*inputs, block_mask=mask)
    last, until = torch.arange(200), make_until(pads)
    with torch.device("meta"):
        assert torch.equal(causal_padded_attention(*inputs, pads, **options), expected)
        mask = create_block_mask_from_runs(None, last, pads, until=until)
        assert torch.equal(cpf.attend(*inputs, block_mask=mask), by_runs)


@pytest.mark.parametrize("scale", [1, 0.5, np.float64(0.5), np.float32(0.5), np.int64(1)], ids=repr)
def test_scales_of_all_kinds(scale) -> None:
    inputs, pads = make_inputs("cpu")[0], make_pads("right", 200, "cpu")
    expected = causal_padded_attention(*inputs, pads, scale=float(scale))
    assert torch.equal(causal_padded_attention(*inputs, pads, scale=scale), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_mask_that_was_not_made_here(device: str) -> None:
    """It may have tiles for each head, and its lists may leave out pairs that its mask_mod allows."""
    inputs, grad = make_inputs(device, lengths=(256, 256))
    allowed = torch.tensor([[1, 0], [1, 1]], device=device, dtype=torch.int32).expand(3, 4, 2, 2)
    counts, indices = allowed.sum(-1, dtype=torch.int32), torch.tensor([0, 1], device=device).int()
    block_mask = BlockMask.from_kv_blocks(counts, indices.expand(3, 4, 2, 2).contiguous(), BLOCK_SIZE=128)
    mask = allowed[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1).expand(3, -1, -1)
    check(
        inputs, grad, torch.zeros(3, 256, dtype=torch.bool, device=device), mask=mask, block_mask=block_mask
    )
