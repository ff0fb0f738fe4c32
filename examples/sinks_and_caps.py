"""What changes the scores and the softmax: soft caps, ALiBi, learned biases, sinks, and a shared prompt.

    python examples/sinks_and_caps.py

A score_mod changes single scores. It captures tensors and looks numbers up in them, as in `slopes[h]`,
because a Python number would be compiled in. The log-sum-exp (`return_lse`) says how much the keys of a query
weigh together. With it a sink takes its share afterwards, and two outputs over different keys are joined.
"""

import torch
from torch import Tensor

from causal_padded_flexattn import attend, create_block_mask_from_runs, create_causal_padding_block_mask

BATCH, HEADS, KV_HEADS, LENGTH, SIZE = 3, 8, 2, 200, 32
device = "cuda" if torch.cuda.is_available() else "cpu"


def soft_cap(cap: float):
    """Scores are softly limited to -cap ... cap, as in Gemma 2. The cap is a tensor of one number a head."""
    caps = torch.full((HEADS,), cap, device=device)
    return lambda score, b, h, q_idx, kv_idx: caps[h] * torch.tanh(score / caps[h])


def alibi():
    """Scores fall with the distance, in each head with another slope (https://arxiv.org/abs/2108.12409)."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=device)
    return lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)


def relative_bias(table: Tensor):
    """Scores get a learned number for each head and distance. table: (HEADS, distances)."""
    most = table.shape[1] - 1
    return lambda score, b, h, q_idx, kv_idx: score + table[h, (q_idx - kv_idx).clamp(0, most)]


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """A sink, as in gpt-oss, is one more key of each head, with a value of zero. It takes its share.

    output: (B, H, L, E), lse: (B, H, L), sinks: (H,), the scores of the sinks.
    """
    share = torch.sigmoid(lse - sinks[:, None])  # what is left to the keys
    return output * share.unsqueeze(-1).to(output.dtype)


def join(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One attention of outputs over different keys, each weighted with the exponential of its log-sum-exp."""
    outputs, lses = (
        torch.stack(x) for x in zip(*parts, strict=True)
    )  # (parts, B, H, L, E); (parts, B, H, L)
    weights = lses.softmax(0).nan_to_num()  # a query that sees no key in any part has weights of NaN
    return (outputs * weights.unsqueeze(-1).to(outputs.dtype)).sum(0)


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, score_mod=None, sinks=None) -> Tensor:
    """The same, written out in float64."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1).double() for x in (key, value))
    scores = query.double() @ key.mT * query.shape[3] ** -0.5
    b, h, q_idx, kv_idx = (
        torch.arange(n, device=device).view(-1, *[1] * (3 - i)) for i, n in enumerate(scores.shape)
    )
    scores = scores if score_mod is None else score_mod(scores, b, h, q_idx, kv_idx)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), dim=3)
    return scores.softmax(3)[..., : key.shape[2]].nan_to_num() @ value


def check(result: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(result.double(), expected.double(), rtol=1e-3, atol=1e-4)
    print(f"{what}: as written out in float64, the largest error {(result - expected).abs().max():.0e}")


if __name__ == "__main__":
    torch.manual_seed(0)
    query = torch.randn(BATCH, HEADS, LENGTH, SIZE, device=device)
    key, value = torch.randn(2, BATCH, KV_HEADS, LENGTH, SIZE, device=device)
    place = torch.arange(LENGTH, device=device)
    pads = place >= torch.tensor([[LENGTH], [90], [17]], device=device)
    mask = (place[:, None] >= place) & ~pads[:, None, :, None] & ~pads[:, None, None, :]
    block_mask = create_causal_padding_block_mask(pads)

    for name, score_mod in (("a soft cap of 5", soft_cap(5.0)), ("of 2", soft_cap(2.0)), ("ALiBi", alibi())):
        output = attend(query, key, value, block_mask, score_mod=score_mod)
        check(output, reference(query, key, value, mask, score_mod), name)

    table = torch.randn(HEADS, 32, device=device, requires_grad=True)
    outputs = [
        attend(query, key, value, block_mask, score_mod=relative_bias(table)),
        reference(query, key, value, mask, relative_bias(table)),
    ]
    gradients = [torch.autograd.grad(output.square().sum(), table)[0] for output in outputs]
    check(*gradients, "the gradient of a learned bias")

    output, lse = attend(query, key, value, block_mask, return_lse=True)
    sinks = torch.randn(HEADS, device=device)
    check(with_sinks(output, lse, sinks), reference(query, key, value, mask, sinks=sinks), "sinks")

    # One prompt for many rows: its keys are stored once, as a batch of one, and not copied for each row. All
    # queries see all of it, so they may stand in one row. The row's own tokens are a second, causal call.
    prompt_key, prompt_value = torch.randn(2, 1, KV_HEADS, 60, SIZE, device=device)
    one_row = query.transpose(0, 1).flatten(1, 2)[None]  # (1, HEADS, BATCH * LENGTH, SIZE)
    no_pads = torch.zeros(1, 60, dtype=torch.bool, device=device)
    whole = create_block_mask_from_runs(None, None, no_pads, query_pads=pads.flatten()[None])
    output, lse = attend(one_row, prompt_key, prompt_value, whole, return_lse=True)
    of_prompt = [x.unflatten(2, (BATCH, LENGTH))[0].transpose(0, 1) for x in (output, lse)]
    of_own = attend(query, key, value, block_mask, return_lse=True)
    keys, values = (
        torch.cat((x.expand(BATCH, -1, -1, -1), y), 2) for x, y in ((prompt_key, key), (prompt_value, value))
    )
    sees_prompt = ~pads[:, None, :, None].expand(-1, -1, -1, 60)
    expected = reference(query, keys, values, torch.cat((sees_prompt, mask), dim=3))
    check(join([tuple(of_prompt), of_own]), expected, "one prompt for three rows, by two calls")
