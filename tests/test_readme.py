"""What the READMEs show runs, and is what was measured."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attention
import block_mask
import decode
import models
import pytest
import sequence_parallel
import torch
from common import show
from conftest import DEVICES, with_gradients
from test_mask import assert_same_block_mask
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

import causal_padded_flexattn
from causal_padded_integrations import transformers

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
        textbook, _, module, to_pads, _, model, parallel = shown
        for output in (outputs[i] for i in (0, 1, 2, 4)):
            assert output.shape == (2, 4, 300, 64)
            assert output[1, :, 120:].count_nonzero() == 0 and output[1, :, :120].count_nonzero() > 0
        assert re.search(r"^torch.Size\(\[2, 4, 300, 64\]\) \d\d % of the scores skipped$", textbook.strip())
        assert module.count("0.0000") == 2 and to_pads == "True tensor([298, 299,   0,   1])\n"
        assert model == "torch.Size([2, 3, 32000])\n" and parallel == "torch.Size([2, 8, 300, 64])\n"
        assert AttentionMaskInterface()["flex_attention"] is transformers.block_mask
        assert AttentionInterface()["flex_attention"] is transformers.attention


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
    assert show("need", attention.need_table, RESULTS) in README
    for script in (block_mask, decode, models):
        assert script.readme_figures(RESULTS) in " ".join(README.split())


@pytest.mark.cuda
def test_the_recipe_of_cudnn() -> None:
    pytest.importorskip("cudnn.flex_attention")
    torch.manual_seed(0)
    pads = torch.arange(300, device="cuda") >= torch.tensor([[300], [120]], device="cuda")
    inputs = torch.randn(3, 2, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    names = dict(zip(("query", "key", "value"), inputs, strict=True), pads=pads, torch=torch)
    exec(compile(re.search(r"^```py\n(.*?)^```", TABLES, re.M | re.S).group(1), "README.md", "exec"), names)
    expected = causal_padded_flexattn.sdpa_reference(*inputs, pads)
    torch.testing.assert_close(names["output"], expected, rtol=2e-2, atol=2e-2)


def test_the_tables_are_those_of_a_run() -> None:
    """Each with the card and the versions, if they are not those that the top of the page names."""
    usual = re.search(r"^\(NVIDIA .*\)$", TABLES, re.M).group()
    shown = [(models, "generate", RESULTS / "static")]
    scripts = attention, block_mask, decode, models, sequence_parallel
    shown += [(script, name, RESULTS) for script in scripts for name in script.TABLES]
    for script, name, folder in shown:
        assert show(name, script.TABLES[name], folder).removesuffix(f"\n\n{usual}") + "\n\n" in TABLES


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
