"""What the READMEs show runs, and is what was measured."""

import re
from pathlib import Path

import pytest
import report
import sequence_parallel
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask

import causal_padded_flexattn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TABLES = (ROOT / "benchmarks" / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_the_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    for name, text in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, text)  # as torchrun does
    names: dict = {}
    outputs = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        outputs.append(names.pop("output", None))
    torch.distributed.destroy_process_group()
    textbook, training, _, window, decoding, _, parallel = outputs
    assert AttentionMaskInterface()["flex_attention"] is causal_padded_flexattn.transformers_block_mask
    assert AttentionInterface()["flex_attention"] is causal_padded_flexattn.transformers_attention
    AttentionMaskInterface.register("flex_attention", flex_attention_mask)
    AttentionInterface.register("flex_attention", flex_attention_forward)
    assert textbook.shape == (2, 4, 300, 64)
    assert training.shape == window.shape == parallel.shape == (2, 8, 300, 64)
    for output in (textbook, training, window, parallel):
        assert output[1, :, 120:].count_nonzero() == 0 and output[1, :, :120].count_nonzero() > 0
    assert not torch.allclose(training, window) and torch.allclose(
        training[:, :, :75], window[:, :, :75], atol=0.1
    )
    assert names["lse"].shape == (2, 8, 300)
    assert decoding.shape == (2, 8, 1, 64) and decoding.isfinite().all() and decoding.count_nonzero() > 0


def test_the_textbook_mask_is_that_of_the_module() -> None:
    names: dict = {}
    block = re.search(r"^```python\n(.*?)^query", README, re.MULTILINE | re.DOTALL).group(1)
    exec(compile(block, "README.md", "exec"), names)
    ours = causal_padded_flexattn.create_causal_padding_block_mask(names["pads"])
    theirs = names["block_mask"]
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_q_num_blocks, theirs.full_q_num_blocks)


def test_the_figures_are_those_of_a_run() -> None:
    assert (RESULTS / "report.txt").read_text().rstrip() in README
    masks = report.load("block_mask", RESULTS)
    assert report.made_with(masks) in README
    for row in masks["results"]:
        if row["way"] in ("closed form", "create_block_mask", "closed form, window and documents"):
            shown = f"{row['ms']:.2f} ms, {row['peak_mib']:.1f} MiB" if "ms" in row else "out of memory"
            line = re.search(
                rf"^\| {row['batch_size']} x {report.spaced(row['kv_len'])} \|.*$", README, re.MULTILINE
            )
            assert shown in line.group()
    for name in (
        "block-mask",
        "stream",
        "attention",
        "scaling",
        "transformers",
        "window",
        "documents",
        "decode",
    ):
        assert report.TABLES[name](RESULTS) in TABLES
    for name in ("block-mask", "window", "documents", "decode"):
        assert report.TABLES[name](RESULTS / "torch-2.11") in TABLES
    assert sequence_parallel.table(RESULTS) in TABLES


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "benchmarks" / "README.md"], ids=str)
def test_the_links_are_well_formed(page: Path) -> None:
    links = re.findall(r"\[[^]]*\]\(([^)]*)\)", page.read_text())
    assert len(links) >= 2
    for link in links:
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./#-]*)?", link), link
        else:
            assert (page.parent / link).exists(), link
