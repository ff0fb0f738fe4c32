"""The references that the tests compare with, written without the module."""

import os
from collections.abc import Callable, Iterator

import pytest

# The tests are small, and pytest -n auto runs one for each core. Torch reads these when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from torch import Tensor
from torch._dynamo.utils import counters

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
PAIRS_OF_DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, _TWO_GPUS])]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return min(12, len(os.sched_getaffinity(0)))  # with CUDA each takes memory of the card and of the host


@pytest.fixture(autouse=True)
def _below_the_limit() -> Iterator[None]:
    """As a user would, a reset before the product's own limit of 64 compiled kernels."""
    yield
    if counters["stats"]["unique_graphs"] > 24:
        torch.compiler.reset()
        counters.clear()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compilations() -> Callable[[], int]:
    """Counts the compilations from here on, starting with none made."""
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture
def stock_afterwards() -> Iterator[None]:
    """Gives transformers its own flex_attention back."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.masking_utils import flex_attention_mask

    yield
    AttentionMaskInterface.register("flex_attention", flex_attention_mask)
    AttentionInterface.register("flex_attention", flex_attention_forward)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def view_of_tokens(x: Tensor) -> Tensor:
    """x, (..., H, L, E), as models have it: a transposed view of (..., L, H, E)."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def explicit_mask(
    pads: Tensor,
    q_len: int | None = None,
    q_offset: int | None = None,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    query_pads: Tensor | None = None,
    spans: Tensor | None = None,
    until: Tensor | None = None,
    padding_side: str | None = None,  # which changes nothing
) -> Tensor:
    """(B, L, S): True where query q_offset + i may see key j; the last L positions by default."""
    kv_len = pads.shape[1]
    if query_pads is not None:
        return ~query_pads[:, :, None] & ~pads[:, None, :]
    q_len = kv_len if q_len is None else q_len
    q_offset = kv_len - q_len if q_offset is None else q_offset
    rows = torch.arange(q_offset, q_offset + q_len, device=pads.device)
    distance = rows[:, None] - torch.arange(kv_len, device=pads.device)
    reached = (distance >= 0) | torch.tensor(not causal, device=pads.device)
    if window is not None:
        reached = reached & (distance.abs() < window)
    seen = ~pads[:, rows][:, :, None] & ~pads[:, None, :]
    if spans is not None:
        reached = reached | (spans[:, rows][:, :, None] == spans[:, None, :])
    if documents is not None:
        seen &= documents[:, rows][:, :, None] == documents[:, None, :]
    if until is not None:
        seen &= rows[:, None] <= until[:, None, :]
    return seen & reached


OPTIONS_OF_THE_MASK = {"window", "padding_side"}


def block_mask_of(
    pads: Tensor, q_len=None, q_offset=None, BLOCK_SIZE=128, query_pads=None, until=None, **seen
):
    """The module's: by its options where there are such, and else by the runs that the mask has."""
    from causal_padded_flexattn import create_block_mask_from_runs, create_causal_padding_block_mask

    seen = {name: x for name, x in seen.items() if x is not None and (name, x) != ("causal", True)}
    if seen.keys() <= OPTIONS_OF_THE_MASK and query_pads is until is None:
        options = {**seen, "q_offset": q_offset, "BLOCK_SIZE": BLOCK_SIZE}
        return create_causal_padding_block_mask(pads, q_len, **options)
    place = None if q_offset is None else int(q_offset)
    mask = explicit_mask(pads, q_len, place, query_pads=query_pads, **seen)
    first, last = mask.int().argmax(-1), mask.shape[2] - 1 - mask.flip(-1).int().argmax(-1)
    last = torch.where(mask.any(-1), last, -1)
    first = first if seen.keys() & {"window", "documents"} else None
    if query_pads is None:
        place = pads.shape[1] - mask.shape[1] if place is None else place
        query_pads = pads[:, place : place + mask.shape[1]]
        until = None if until is None else until.long() - place
    more = {"query_pads": query_pads, "until": until, "BLOCK_SIZE": BLOCK_SIZE}
    return create_block_mask_from_runs(first, last, pads, **more)


def written_out(
    query, key, value, mask: Tensor, scale: float | None = None, score_mod=None
) -> tuple[Tensor, Tensor]:
    """Softmax attention in the precision of its inputs, and the logarithms of its sums; differentiable.

    Rows of the mask (B, L, S) that allow nothing give zeros, and -inf.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = mask[:, None]
    scores = torch.einsum("bhle,bhse->bhls", query, key) * scale
    if score_mod is not None:
        b, h, q_idx, kv_idx = (
            torch.arange(n, device=query.device).view([n if i == j else 1 for j in range(4)])
            for i, n in enumerate(scores.shape)
        )
        scores = score_mod(scores, b, h, q_idx, kv_idx).to(query.dtype)
    scores = scores.masked_fill(~mask, -1e30)
    weights = scores.softmax(-1) * mask  # a row of nothing: uniform, then zero
    lse = scores.logsumexp(-1).masked_fill(~mask.any(-1), -torch.inf)
    return torch.einsum("bhls,bhsv->bhlv", weights, value), lse


def exact_attention(query, key, value, mask: Tensor, scale: float | None = None, score_mod=None) -> Tensor:
    """The same in float64."""
    return written_out(query.double(), key.double(), value.double(), mask, scale, score_mod)[0]


def with_gradients(attention, inputs, grad_output: Tensor | None) -> list[Tensor]:
    """The output and, given its gradient, the gradients of the inputs."""
    inputs = [x.detach().requires_grad_(grad_output is not None) for x in inputs]
    output = attention(*inputs)
    return [output] if grad_output is None else [output, *torch.autograd.grad(output, inputs, grad_output)]


def assert_as_exact(results: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """FlashAttention's habit: at most twice plain PyTorch's error (thrice for gradients), and two roundings.

    And since flash kernels compute a weight as 2 to the power of a float32 difference of numbers of up to
    10 or 20, sixteen roundings of float32, which matter in float32 alone.
    """
    for i, (ours, own, truth) in enumerate(zip(results, plain, exact, strict=True)):
        error = (ours.double() - truth.double()).abs().max().item()
        plain_error = (own.double() - truth.double()).abs().max().item()
        rounding = (
            2 * torch.finfo(ours.dtype).eps + 16 * torch.finfo(torch.float32).eps
        ) * truth.abs().max().item()
        bound = (3 if i else 2) * plain_error + rounding
        name = ["output", "query gradient", "key gradient", "value gradient", "bias gradient"][i]
        assert error <= bound, (
            f"{name}: error {error:.2e}, plain PyTorch's {plain_error:.2e}, bound {bound:.2e}"
        )
