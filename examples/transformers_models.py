"""Models of transformers with the masks and kernels of this file: a training step, packed rows, generation.

    pip install -e '.[transformers]' && python examples/transformers_models.py

Two lines are enough: `register()`, and `attn_implementation="flex_attention"`. The model here is a small
Llama with random weights, which gives what it gives with sdpa. Packed rows need no attention_mask, because
position_ids that restart say where the sequences begin.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from causal_padded_integrations.transformers import register

SIZES = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
device = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(way: str) -> LlamaForCausalLM:
    """A model of one's own: `from_pretrained(..., attn_implementation=way)` instead."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.set_attn_implementation(way)
    return model.to(device)


def collate(sequences: list[Tensor], side: str) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, padded on one side; the loss ignores a label of -100."""
    longest = max(map(len, sequences))
    rows = []
    for sequence in sequences:
        missing = longest - len(sequence)
        rows.append(F.pad(sequence, (0, missing) if side == "right" else (missing, 0)))
    input_ids = torch.stack(rows)
    attention_mask = (input_ids != 0).long()
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # else transformers counts padding on the left
    # Nothing before the first token of a sequence predicts it: on the left only padding stands there.
    labels = input_ids.masked_fill((attention_mask == 0) | (position_ids == 0), -100)
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    given |= {"position_ids": position_ids, "labels": labels}
    return {name: x.to(device) for name, x in given.items()}


def pack(sequences: list[Tensor]) -> dict[str, Tensor]:
    """All sequences in one row, without padding."""
    input_ids = torch.cat(sequences)[None]
    position_ids = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    labels = input_ids.masked_fill(position_ids == 0, -100)
    given = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    return {name: x.to(device) for name, x in given.items()}


def step(way: str, given: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of one training step."""
    model = make_model(way).train()
    loss = model(**given, use_cache=False).loss
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def compare(given: dict[str, Tensor], what: str) -> float:
    (loss, gradients), (their_loss, theirs) = step("flex_attention", given), step("sdpa", given)
    assert abs(loss - their_loss) < 1e-4, (loss, their_loss)
    for ours, expected in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    print(f"{what}: a loss of {loss:.4f}, and gradients as with sdpa")
    return loss


if __name__ == "__main__":
    register()
    torch.manual_seed(0)
    sequences = [torch.randint(1, 100, (length,)) for length in (40, 12, 25, 3)]
    losses = [compare(collate(sequences, side), f"padded on the {side}") for side in ("right", "left")]
    losses.append(compare(pack(sequences), "packed into one row"))
    assert max(losses) - min(losses) < 1e-4

    prompts = collate([x[:10] for x in sequences], "left")
    given = {"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens, expected = (
        make_model(way).eval().generate(**given, **options) for way in ("flex_attention", "sdpa")
    )
    assert torch.equal(tokens, expected)
    print(f"generated from left-padded prompts, as with sdpa: {tokens[-1, -8:].tolist()}")
