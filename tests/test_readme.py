"""What the READMEs show runs, and is what was measured."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import report
import sequence_parallel
import torch
from conftest import DEVICES, with_gradients
from test_block_mask import assert_same_block_mask
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

import causal_padded_flexattn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TABLES = (ROOT / "benchmarks" / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


BLOCKS = re.findall(r"^```python\n(.*?)^```", README + TABLES, re.MULTILINE | re.DOTALL)
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@pytest.mark.usefixtures("stock_afterwards")
def test_each_block_runs_alone_and_after_the_others(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in TORCHRUN.items():
        monkeypatch.setenv(name, text)
    together: dict = {}
    for names in ([{} for _ in BLOCKS], [together] * len(BLOCKS)):
        shown, outputs = [], []
        for block, some in zip(BLOCKS, names, strict=True):
            exec(compile(block, "README.md", "exec"), some)
            shown.append(capsys.readouterr().out)
            outputs.append(some.pop("output", None))
        textbook, closed, call, training, window, tree, decoding, model, parallel = shown
        for i, heads in ((0, 4), (1, 4), (2, 4), (4, 8), (5, 8)):
            output = outputs[i]
            assert output.shape == (2, heads, 300, 64)
            assert output[1, :, 120:].count_nonzero() == 0 and output[1, :, :120].count_nonzero() > 0
        assert outputs[3].shape == (2, 300, 64)
        assert outputs[6].shape == (2, 8, 1, 64) and outputs[6].isfinite().all() and outputs[6].any()
        assert closed == "torch.Size([2, 4, 300, 64])\n" and call.count("0.0000") >= 2
        assert re.search(r"^torch.Size\(\[2, 4, 300, 64\]\) \d\d % of the scores skipped$", textbook.strip())
        gradients = [float(x) for x in re.findall(r"-?\d+\.\d*", training)]
        assert all(gradients[:2]) and gradients[2:] == [0, 0]
        assert re.search(r"\d, +\d.*-inf, +-inf\]", window)
        differences = [float(x) for x in re.findall(r"\d+\.\d*(?:e-?\d+)?", tree)]
        assert differences[0] > 0.01 and differences[1] < 1e-5 and differences[2] < 1e-5
        assert "tensor([9, 6]" in decoding
        assert torch.tensor(eval(model, {"tensor": list})).shape == (2, 7)
        assert parallel == "torch.Size([2, 8, 300, 64])\n"
        assert AttentionMaskInterface()["flex_attention"] is causal_padded_flexattn.transformers_block_mask
        assert AttentionInterface()["flex_attention"] is causal_padded_flexattn.transformers_attention


def test_the_textbook_mask_is_that_of_the_module() -> None:
    names: dict = {}
    block = re.search(r"^```python\n(.*?)^query", README, re.MULTILINE | re.DOTALL).group(1)
    exec(compile(block, "README.md", "exec"), names)
    ours = causal_padded_flexattn.create_causal_padding_block_mask(names["pads"])
    theirs = names["block_mask"]
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_q_num_blocks, theirs.full_q_num_blocks)


def function_of_the_readme(name: str) -> Callable:
    block = next(block for block in BLOCKS if f"def {name}(" in block)
    names: dict = {}
    exec(compile(block.partition("\n\ndevice =")[0], "README.md", "exec"), names)
    return names[name]


def test_the_closed_form_is_short() -> None:
    block = next(block for block in BLOCKS if "def causal_padding_block_mask(" in block)
    lines = block.partition("\n\ndevice =")[0].splitlines()
    assert len([line for line in lines if line.strip()]) <= 25


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("length", "block"), [(300, 128), (256, 128), (1, 128), (700, 64)])
def test_the_closed_form_makes_the_same_tiles(device: str, padding: float, length: int, block: int) -> None:
    pads = torch.rand(3, length, device=device) < padding
    pads[1, length // 2 :] = True
    ours = function_of_the_readme("causal_padding_block_mask")(pads, block)
    module = causal_padded_flexattn.create_causal_padding_block_mask(pads, BLOCK_SIZE=block)
    mask_mod = and_masks(causal_padded_flexattn.causal, causal_padded_flexattn.create_padding_mask(pads))
    textbook = create_block_mask(mask_mod, 3, None, length, length, device, BLOCK_SIZE=block)
    for other in (module, textbook):
        assert_same_block_mask(other, ours)


@pytest.mark.cuda
def test_the_closed_form_trains() -> None:
    pads = torch.arange(300, device="cuda") >= torch.tensor([[300], [120]], device="cuda")
    block_mask = function_of_the_readme("causal_padding_block_mask")(pads)
    inputs = list(torch.randn(3, 2, 4, 300, 64, device="cuda"))
    attend = partial(torch.compile(flex_attention), block_mask=block_mask)
    reference = partial(causal_padded_flexattn.sdpa_reference, pads=pads)
    grad = torch.randn(2, 4, 300, 64, device="cuda")
    results, expected = (with_gradients(way, inputs, grad) for way in (attend, reference))
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-2, atol=1e-2)


def test_the_figures_are_those_of_a_run() -> None:
    run = (RESULTS / "report.txt").read_text()
    assert re.search(r"^device .* NVIDIA H200$", run, re.MULTILINE) and "WRONG" not in run
    assert "8 x 4096 tokens, 40% of them padding on the right; 16 query and 16 key heads of size 64" in run
    rows = re.findall(r"^ {8}(\S.*?) +([\d.]+) +([\d.]+) +([\d.]+)$", run, re.MULTILINE)
    times = {name: numbers for name, *numbers in rows}
    textbook, ours, explicit, is_causal = (
        times[name]
        for name in (
            "create_block_mask, flex_attention",
            "causal_padded_attention",
            "SDPA, explicit mask",
            "SDPA, is_causal=True, with the padding",
        )
    )
    text = " ".join(README.split())
    assert (
        f"on an H200, it takes {textbook[0]} ms forward and {textbook[1]} ms with the backward pass" in text
    )
    assert f"SDPA takes {explicit[0]} and {explicit[1]} ms with the explicit mask" in text
    assert f"and {is_causal[0]} and {is_causal[1]} ms with `is_causal=True`" in text
    assert f"this file takes {ours[0]} and {ours[1]} ms, and {ours[2]} ms with making the mask" in text
    assert f"where the textbook takes {textbook[2]} ms" in text
    for name in ("readme-speed", "readme-masks"):
        assert report.TABLES[name](RESULTS) in README


@pytest.mark.cuda
def test_the_recipe_of_cudnn() -> None:
    pytest.importorskip("cudnn.flex_attention")
    torch.manual_seed(0)
    pads = torch.arange(300, device="cuda") >= torch.tensor([[300], [120]], device="cuda")
    inputs = torch.randn(3, 2, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    names = dict(zip(("query", "key", "value"), inputs, strict=True), pads=pads, torch=torch)
    exec(compile(re.search(r"^```py\n(.*?)^```", README, re.M | re.S).group(1), "README.md", "exec"), names)
    expected = causal_padded_flexattn.sdpa_reference(*inputs, pads)
    torch.testing.assert_close(names["output"], expected, rtol=2e-2, atol=2e-2)


def test_the_tables_are_those_of_a_run() -> None:
    both = ["block-mask", "stream", "attention", "transformers", "window", "documents", "decode"]
    for name in [*both, "packed", "scaling", "generate", "first-step", "small"]:
        assert report.TABLES[name](RESULTS) in TABLES
    assert report.TABLES["generate"](RESULTS / "static") in TABLES
    for name in both:
        assert report.TABLES[name](RESULTS / "torch-2.11") in TABLES
    assert sequence_parallel.table(RESULTS) in TABLES


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "benchmarks" / "README.md"], ids=str)
def test_the_links_are_well_formed(page: Path) -> None:
    links = re.findall(r"\[[^]]*\]\(([^)]*)\)|<img src=\"([^\"]*)", page.read_text())
    links = [one or other for one, other in links]
    assert len(links) >= 2
    for link in links:
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./#-]*)?", link), link
        else:
            assert (page.parent / link.partition("#")[0]).exists(), link
