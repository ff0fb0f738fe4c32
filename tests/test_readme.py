"""What the README shows runs, and is what was measured."""

import re
from pathlib import Path

import benchmark
import pytest
import sequence_parallel
import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    for name, text in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, text)  # as torchrun does
    names: dict = {}
    outputs = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        outputs.append(names.pop("output", None))
    torch.distributed.destroy_process_group()
    training, _, decoding, _, _, parallel, textbook = outputs
    registered = names["AttentionMaskInterface"]
    assert registered()["flex_attention"] is names["transformers_block_mask"]
    registered.register("flex_attention", flex_attention_mask)
    kernels = names["AttentionInterface"]
    assert kernels()["flex_attention"] is names["transformers_attention"]
    kernels.register("flex_attention", flex_attention_forward)
    assert textbook.shape == (2, 4, 300, 64)
    assert training.shape == parallel.shape == (2, 8, 300, 64)
    for output in (textbook, training, parallel):
        assert output[1, :, 120:].count_nonzero() == 0 and output[1, :, :120].count_nonzero() > 0
    assert decoding.shape == (2, 8, 1, 64) and decoding.isfinite().all() and decoding.count_nonzero() > 0


def test_the_textbook_mask_is_that_of_the_module() -> None:
    from causal_padded_flexattn import create_causal_padding_block_mask

    names: dict = {"torch": torch, "and_masks": and_masks, "create_block_mask": create_block_mask}
    block = re.search(r"(^def causal\(.*?)^query", README, re.MULTILINE | re.DOTALL).group(1)
    exec(compile(block, "README.md", "exec"), names)
    ours, theirs = create_causal_padding_block_mask(names["pads"]), names["block_mask"]
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_q_num_blocks, theirs.full_q_num_blocks)


def test_the_figures_are_those_of_a_run() -> None:
    results = ROOT / "benchmarks" / "results"
    assert (results / "report.txt").read_text().rstrip() in README
    for name in ("block-mask", "stream", "attention", "scaling", "transformers"):
        assert benchmark.TABLES[name](results) in README
    assert sequence_parallel.table(results) in README


def test_the_links_are_well_formed() -> None:
    links = re.findall(r"\[[^]]*\]\(([^)]*)\)", README)
    assert len(links) > 10
    for link in links:
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./#-]*)?", link), link
        else:
            assert (ROOT / link).exists(), link
