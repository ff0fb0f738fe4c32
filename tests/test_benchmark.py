"""The benchmarks' own arithmetic, and runs of them at tiny sizes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import attention
import block_mask
import cases
import common
import decode
import models
import plots
import pytest
import report
import sequence_parallel
import torch
from conftest import exact_attention, explicit_mask, with_gradients
from PIL import Image
from torch._dynamo.utils import counters


def run(script: object, *arguments: str, folder: Path) -> None:
    run_python(script.__file__, *arguments, "--results", str(folder))


def run_python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RIGHT = cases.Case(3, 40, 16, 4, 4, 40, "right")
CASES = [
    RIGHT,
    replace(RIGHT, padding=0),
    replace(RIGHT, kv_heads=2, padding=75, side="left"),
    replace(RIGHT, batch_size=1),
    replace(RIGHT, window=7),
    replace(RIGHT, kv_heads=1, documents=3),
    replace(RIGHT, side="left", window=9, documents=2),
]


def seen_by(batch: cases.Batch) -> torch.Tensor:
    documents = batch.documents if batch.case.documents > 1 else None
    return explicit_mask(batch.pads, window=batch.case.window, documents=documents)


def test_a_case_says_what_it_is() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(CASES)
    assert names[0] == "B3 S40 H4 D16, 40 % right padding"
    assert names[2] == "B3 S40 H4/2 D16, 75 % left padding"
    assert names[6] == "B3 S40 H4 D16, 40 % left padding, window 9, 2 documents a row"
    old = {
        "batch_size": 3,
        "kv_len": 40,
        "head_dim": 16,
        "heads": 4,
        "kv_heads": 4,
        "padding": 40,
        "side": "right",
    }
    assert cases.Case.of(old) == RIGHT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case(case: cases.Case) -> None:
    batch = cases.Batch(case, "cpu")
    assert batch.pads.float().mean().item() == pytest.approx(case.padding / 100, abs=0.01)
    assert (~batch.pads).sum(1).tolist() == case.lengths()
    assert batch.cumulative.diff().tolist() == case.pieces() and sum(case.pieces()) == sum(case.lengths())
    assert len(case.pieces()) == case.batch_size * case.documents
    seen = seen_by(batch)
    pairs = seen.sum().item()  # of each head
    assert case.pairs() == pairs
    assert case.flops() == pairs * case.heads * 2 * 2 * case.head_dim  # two products, multiply and add
    first = seen.int().argmax(-1)[~batch.pads]
    assert torch.equal(torch.maximum(batch.first, batch.places - (case.window or 40) + 1), first)
    assert torch.equal(seen.sum(-1)[~batch.pads], batch.places - first + 1)  # one run of keys


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pack_and_unpack_undo_each_other(case: cases.Case) -> None:
    batch = cases.Batch(case, "cpu")
    x = batch.inputs[0].double().requires_grad_()
    packed = batch.pack(x)
    assert torch.equal(packed, x.transpose(1, 2)[~batch.pads])
    assert torch.equal(batch.unpack(packed), x.masked_fill(batch.pads[:, None, :, None], 0.0))
    assert torch.autograd.gradcheck(batch.pack, x, fast_mode=True)
    assert torch.autograd.gradcheck(batch.unpack, packed.detach().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_ways_are_checked_against_is_exact(case: cases.Case) -> None:
    batch = cases.Batch(case, "cpu")
    mask = seen_by(batch)
    exact = with_gradients(lambda *inputs: exact_attention(*inputs, mask), batch.inputs, batch.grad_output)
    assert batch.grad_output.stride() == batch.inputs[0].stride()  # as in a model: else flex copies it
    for ours, truth in zip(batch.reference(torch.float64), exact, strict=True):
        torch.testing.assert_close(ours, batch.pack(truth).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ("another", attention.NotMeasuredError, r"^wrong, error \d\.\de[+-]\d\d$"),
        (
            "ours",
            ValueError,
            r"ours is wrong in B3 S40 H4 D16, 40 % right padding: error",
        ),  # which ends the run
    ],
)
def test_a_wrong_way_is_not_timed(
    way: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = cases.Batch(RIGHT, "cpu")

    def without_mask(batch: cases.Batch) -> common.Attention:
        return lambda query, key, value: torch.nn.functional.scaled_dot_product_attention(query, key, value)

    monkeypatch.setitem(attention.WAYS, way, (without_mask, False, False))
    with pytest.raises(error, match=message):
        attention.measure(way, batch, batch.reference(torch.float64), batch.reference(torch.float32))


def test_a_run_of_a_model(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--of", "sdpa", "ours", "--models", "llama"]
    run(models, "transformers", *arguments, folder=tmp_path)
    sdpa, ours = (row["steps"] for row in common.load("transformers", tmp_path)["results"])
    for steps in (sdpa, ours):
        assert [step["round"] for step in steps] == [i // 5 for i in range(50)]
        assert steps[0]["length"] != steps[1]["length"]
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in sdpa], rel=1e-3)
    seconds = [sum(step["seconds"] for step in sdpa if step["round"] == i) for i in range(10)]
    table = report.transformers_table(tmp_path)
    assert f"| llama: sdpa | {seconds[0]:.0f} s | " in table
    assert [sdpa[i]["length"] for i in (20, 35)] == [2 * sdpa[0]["length"], 4 * sdpa[0]["length"]]
    medians = (sorted(some)[1] * 1e3 for some in (seconds[1:4], seconds[4:7], seconds[7:]))
    assert f"s | {' | '.join(f'{median:.0f} ms' for median in medians)} | 0 |" in table


@pytest.mark.usefixtures("stock_afterwards")
@pytest.mark.parametrize("kind", models.KINDS)
def test_the_same_losses_and_tokens(kind: str, capsys: pytest.CaptureFixture) -> None:
    steps = []
    for way in ("sdpa", "ours"):
        models.transformers_of(way, kind, "cpu", 2)
        models.generate_of(way, kind, "dynamic", "cpu", 2)
        steps.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for sdpa, ours in zip(*steps, strict=True):
        if "loss" in sdpa:
            assert ours["loss"] == pytest.approx(sdpa["loss"], rel=1e-3)
        else:
            assert ours["sum"] == sdpa["sum"] and ours["tokens"] == 8 * 4
    assert steps[0][0]["loss"] == steps[0][5]["loss"]


@pytest.mark.usefixtures("stock_afterwards")
def test_a_run_of_packed_batches(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--of", "sdpa", "ours"]
    run(models, "packed", *arguments, folder=tmp_path)
    sdpa, ours = (row["steps"] for row in common.load("packed", tmp_path)["results"])
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in sdpa], rel=1e-3)
    table, last = report.packed_table(tmp_path), sdpa[-1]
    assert f"| sdpa | {last['mask_ms'][1]:.2f} ms, 0 MiB | {last['step_ms'][1]:.0f} ms, 0 MiB |" in table


def test_the_table_of_generate(tmp_path: Path) -> None:
    steps = [{"tokens": 100, "seconds": seconds} for seconds in (50.0, 1.0, 4.0, 2.0)]
    row = {"model": "a", "way": "b", "cache": "static", "total_s": 57.0, "steps": steps}
    versions = {"card": "a card", "torch": "2.0", "date": "2000-01-01"}
    stopped = {"model": "a", "way": "b", "cache": "dynamic", "stopped_after_s": 70.0}
    (tmp_path / "generate.json").write_text(json.dumps({**versions, "results": [stopped, row]}))
    assert "| a: b | stopped after 70 s | 50 (50 s) |" in report.generate_table(tmp_path)


def test_first_fit() -> None:
    assert models.first_fit([2, 7, 3, 8, 5], 10) == [[8, 2], [7, 3], [5]]


def test_a_step_of_each_way_is_over_the_same_sequences(tmp_path: Path) -> None:
    run(models, "step", "--device", "cpu", folder=tmp_path)
    rows = [row["steps"] for row in common.load("step", tmp_path)["results"]]
    for steps in zip(*rows, strict=True):
        assert len({step["real"] for step in steps}) == 1
        assert [step["loss"] for step in steps] == pytest.approx([steps[0]["loss"]] * 3, rel=1e-4)
        assert steps[2]["rows"] < steps[0]["rows"] or steps[0]["rows"] == 2
    first = rows[1][0]["tokens_per_s"] / 1e3
    assert f"| padded, SDPA is_causal | {first:.0f} (0.0) |" in report.step_table(tmp_path)


def test_what_same_bits_cost(tmp_path: Path) -> None:
    run(attention, "same-bits", "--device", "cpu", "--cases", "1", folder=tmp_path)
    run(decode, "--same-bits", "--device", "cpu", folder=tmp_path)
    table = report.same_bits_table(tmp_path)
    a, b = (row["ms"] for row in common.load("decode_same_bits", tmp_path)["results"][-2:])
    assert f" | {a:.3f} | {b:.3f} ({b / a:.2f} x) |" in table
    assert not torch.are_deterministic_algorithms_enabled()


def test_small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODES", {"eager": None, "torch.compile": "default"})
    rows = models.measure_small_steps("cpu")
    assert [row["norm"] for row in rows] == pytest.approx([rows[0]["norm"]] * 4, rel=1e-5)
    common.save("small", rows, tmp_path, "cpu")
    table = report.TABLES["small"](tmp_path)
    medians = [f"{row['ms'][1]:.2f}" for row in rows]
    assert f"| ours | {' | '.join(medians[:2])} |" in table
    assert f"| SDPA, explicit mask | {' | '.join(medians[2:])} |" in table


def test_first_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    counters.clear()
    for _ in range(2):
        models.first_step(tmp_path / "artifacts", "cpu")
    assert [json.loads(line)["compilations"] for line in capsys.readouterr().out.splitlines()] == [0, 0]


@pytest.mark.parametrize("name", [name for name in attention.CASES if name != "same-bits"])
def test_a_run(name: str, tmp_path: Path) -> None:
    run(attention, name, "--device", "cpu", "--ways", "ours", "cuDNN", folder=tmp_path)
    result = json.loads((tmp_path / f"{name}.json").read_text())
    rows = result["results"]
    assert len({row["way"] for row in rows}) == 11 and len(rows) == 11 * len(attention.CASES[name])
    measured = [row for row in rows if "not_measured" not in row]
    ours = {way for way in attention.WAYS if way.startswith("ours")}
    on_cuda = {"ours, FLASH", "ours, Triton compiled for changing shapes"}
    assert {row["way"] for row in measured} == ours - on_cuda
    table = report.TABLES[name](tmp_path)
    assert result["torch"] in table
    for row in measured:
        low, median, high = row["forward_ms"]
        assert 0 < low <= median <= high
        assert name in ("scaling", "need") or f"{median:.2f}" in table
    assert "| SDPA, explicit mask, cuDNN | needs CUDA |" in table


@pytest.mark.cuda
def test_a_run_of_the_block_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_mask, "SIZES", [(2, 300), (1, 500)])
    monkeypatch.setattr("sys.argv", ["block_mask.py", "--results", str(tmp_path)])
    block_mask.main()
    table = report.block_mask_table(tmp_path)
    assert "| 2 x 300 | " in table and "closed form, window and documents" in table


@pytest.mark.parametrize("name", ["attention", "scaling", "decode"])
def test_the_plots(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.json").write_text((common.RESULTS / f"{name}.json").read_text())
    run(plots, name, folder=tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_picture_of_the_tiles(tmp_path: Path) -> None:
    run(plots, "tiles", folder=tmp_path)
    assert plots.kinds_of_tiles().keys() >= {"holes", "right, window of 300", "right, three documents"}
    expected = torch.zeros(2)  # full and partial tiles, by their definition
    for pads, more in plots.kinds_of_tiles().values():
        allowed = explicit_mask(pads[None], **more)[0].view(16, 128, 16, 128).float().mean((1, 3))
        expected += torch.stack(((allowed == 1).sum(), ((allowed > 0) & (allowed < 1)).sum()))
    for path in (tmp_path / "tiles.png", common.RESULTS / "tiles.png"):
        image = Image.open(path).convert("RGB")
        colours: dict = {colour: count for count, colour in image.getcolors(maxcolors=2**16)}
        assert colours[(44, 89, 133)] / colours[(253, 174, 97)] == pytest.approx(
            (expected[0] / expected[1]).item(), rel=0.03
        )


def test_the_table_of_attention(tmp_path: Path) -> None:
    sizes = {
        "batch_size": 1,
        "kv_len": 1000,
        "head_dim": 50,
        "heads": 2,
        "kv_heads": 1,
        "padding": 0,
        "side": "right",
    }
    # 500 500 pairs, 4 * 2 * 50 operations for each: 0.2002 TFLOP in a second
    row = {**sizes, "way": "a way", "forward_ms": [0, 0.1, 1], "backward_ms": [0, 1.0, 2], "peak_mib": 7.4}
    row |= {"forward_host_ms": 0.333, "backward_host_ms": 0.5}
    left = {**sizes, "padding": 40, "side": "left", "way": "a way", "not_measured": "why"}
    versions = {"card": "a card", "torch": "2.0", "date": "2000-01-01", "matmul_tflops": 10.0}
    (tmp_path / "attention.json").write_text(json.dumps({**versions, "results": [row, left]}))
    first, all_cases = report.attention_table(tmp_path).split(" 10 TFLOP/s in the same run. ")
    assert first.startswith("B1 S1000 H2/1 D50, no padding\n")
    assert "| a way | 0.10 | 2 (20%) | 1.00 | 1 (5%) | 0.33 / 0.50 | 7 |" in first and "why" not in first
    assert "|  | B1 S1000 H2/1 D50, no padding | B1 S1000 H2/1 D50, 40 % left padding |\n" in all_cases
    assert all_cases.endswith("| a way | 0.10 / 1.00 | why |\n\n(a card, torch 2.0, 2000-01-01)")


def test_sequence_parallel(tmp_path: Path) -> None:
    small = "--device cpu --lengths 64 --heads 4/2 --head-dim 16 --times 3 --layers 2 --layers-lengths 32"
    for ranks in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        run_python(*torchrun, sequence_parallel.__file__, *small.split(), "--results", str(tmp_path))
    rows = json.loads((tmp_path / "sequence_parallel.json").read_text())["results"]
    assert [(row["ranks"], row["length"], row.get("layers")) for row in rows] == [
        *((1, 64, None), (1, 32, 2)),
        *((2, 64, None), (2, 32, 2)),
    ]
    layers = [row["both_ms"] for row in rows[1::2]]
    rows = rows[::2]
    assert rows[0]["checksums"] == rows[1]["checksums"]
    assert len(rows[0]["checksums"]) == 4
    for sums in rows[0]["checksums"]:  # of 16 chunks: 38 of 64 tokens are real, and padding is zero
        assert len(set(sums)) == 11 and set(sums[10:]) == {0}
    table = sequence_parallel.table(tmp_path)
    efficiency = rows[0]["both_ms"] / rows[1]["both_ms"] / 2
    assert re.search(rf"\| 64 \| 2 \| .* \| {efficiency:.0%} \| yes \|\n", table)
    assert f"| 32, 2 layers | 2 |  | {layers[1]:.1f} |  |  | {layers[0] / layers[1] / 2:.0%} |  |" in table


def test_the_table_of_scaling(tmp_path: Path) -> None:
    def row(kv_len: int, way: str, **more: object) -> dict:
        return {"kv_len": kv_len, "way": way, **more}

    short, long = (
        {"forward_ms": [0, n, 9], "backward_ms": [0, 2.0 * n, 9], "peak_mib": 512} for n in (1.25, 100.0)
    )
    rows = [
        row(1024, "a", **short),
        row(1024, "b", not_measured="why"),
        row(2048, "a", **long),
        row(2048, "b", **long),
    ]
    versions = {"card": "a card", "torch": "2.0", "date": "2000-01-01"}
    (tmp_path / "scaling.json").write_text(json.dumps({**versions, "results": rows}))
    table = report.scaling_table(tmp_path).splitlines()
    assert table[0] == "| ms (GiB) | 1 024 | 2 048 |"
    assert table[2:4] == ["| a | 3.8 (0.5) | 300 (0.5) |", "| b | why | 300 (0.5) |"]


def test_the_table_of_sequence_parallel(tmp_path: Path) -> None:
    def row(ranks: int, both: float, bits: int) -> dict:
        times = {"forward_ms": 1.0, "both_ms": both, "exchange_ms": 2.0, "wire_ms": 1.5, "peak_mib": 512.0}
        return {"ranks": ranks, "length": 2048, "checksums": [[bits]], **times}

    rows = [row(4, 5.0, 1), row(2, 8.0, 0), {"ranks": 1, "length": 2048, "out_of_memory": True}]
    sizes = {"batch_size": 1, "heads": 32, "kv_heads": 8, "head_dim": 128}
    versions = {"card": "a card", "torch": "2.0", "date": "2000-01-01"}
    (tmp_path / "sequence_parallel.json").write_text(json.dumps({**versions, **sizes, "results": rows}))
    table = sequence_parallel.table(tmp_path)
    assert table.startswith("B1 H32/8 D128, 40 % right padding\n")
    assert "| 2 048 | 1 | out of memory |" in table
    assert "| 2 048 | 2 | 1.0 | 8.0 | 2.0 (1.5) | 0.5 | 100% |  |" in table
    assert "| 2 048 | 4 | 1.0 | 5.0 | 2.0 (1.5) | 0.5 | 80% | no |" in table


def test_decode_at_tiny_sizes(tmp_path: Path) -> None:
    run(decode, "--device", "cpu", folder=tmp_path)
    result = common.load("decode", tmp_path)
    first, *others = (row for row in result["results"] if row["way"] == "ours")
    assert len(others) == len(decode.STEPS) - 1 and all("ms" in row for row in (first, *others))
    cache = decode.Cache(decode.Step(3, 4, 2, 1, 64, 16), "cpu")  # an eighth of 64 is not written: 56 are
    assert (~cache.pads).sum(1).tolist() == [14, 35, 56] == cache.lengths.tolist()
    bytes_read = 105 * 2 * 2 * 16 * 4  # of key and value: two heads of 16 in float32
    assert first["limit_ms"] == pytest.approx(bytes_read / result["copy_bytes_per_s"] * 1e3)
