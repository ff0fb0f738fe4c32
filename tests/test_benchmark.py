"""The benchmark's own arithmetic, and a run of it at a tiny size."""

import json
import re
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest
import sequence_parallel
import torch
from conftest import exact_attention, explicit_mask, with_gradients


def run(*arguments: str, folder: Path) -> str:
    command = [sys.executable, benchmark.__file__, *arguments, "--results", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


CASES = benchmark.cases(["3x40", "1x40"], [16], ["4/4", "4/2"], [0, 40, 75], ["right", "left"])


def test_every_combination_is_a_case_and_no_padding_has_no_side() -> None:
    assert len(CASES) == len(set(CASES)) == 2 * 2 * (1 + 2 * 2)
    assert str(CASES[0]) == "B3 S40 H4 D16, no padding"
    assert str(CASES[-1]) == "B1 S40 H4/2 D16, 75 % left padding"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case(case: benchmark.Case) -> None:
    batch = benchmark.Batch(case, "cpu")
    assert batch.pads.float().mean().item() == pytest.approx(case.padding / 100, abs=0.01)
    assert (~batch.pads).sum(1).tolist() == case.lengths()
    assert batch.cumulative.diff().tolist() == case.lengths()
    scores = explicit_mask(batch.pads).sum().item()  # of each head
    assert case.flops() == scores * case.heads * 2 * 2 * case.head_dim  # products with key and value, multiply and add


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pack_and_unpack_undo_each_other(case: benchmark.Case) -> None:
    batch = benchmark.Batch(case, "cpu")
    x = batch.inputs[0].double().requires_grad_()
    packed = batch.pack(x)
    assert torch.equal(packed, x.transpose(1, 2)[~batch.pads])
    assert torch.equal(batch.unpack(packed), x.masked_fill(batch.pads[:, None, :, None], 0.0))
    assert torch.autograd.gradcheck(batch.pack, x, fast_mode=True)
    assert torch.autograd.gradcheck(batch.unpack, packed.detach().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_ways_are_checked_against_is_exact(case: benchmark.Case) -> None:
    batch = benchmark.Batch(case, "cpu")
    mask = explicit_mask(batch.pads)
    exact = with_gradients(lambda *inputs: exact_attention(*inputs, mask), batch.inputs, batch.grad_output)
    for ours, truth in zip(batch.reference(torch.float64), exact, strict=True):
        torch.testing.assert_close(ours, batch.pack(truth).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ("another", benchmark.NotMeasuredError, r"^wrong, error \d\.\de[+-]\d\d$"),
        ("ours", ValueError, r"ours is wrong in B3 S40 H4 D16, 40 % right padding: error"),  # which ends the run
    ],
)
def test_a_wrong_way_is_not_timed(
    way: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = benchmark.Batch(CASES[1], "cpu")

    def without_mask(batch: benchmark.Batch) -> benchmark.Attention:
        return lambda query, key, value: torch.nn.functional.scaled_dot_product_attention(query, key, value)

    monkeypatch.setitem(benchmark.WAYS, way, (without_mask, False, False))
    with pytest.raises(error, match=message):
        benchmark.measure(way, batch, batch.reference(torch.float64), batch.reference(torch.float32))


def test_a_run_of_a_model(tmp_path: Path) -> None:
    run("transformers", "--device", "cpu", "--of", "sdpa", folder=tmp_path)
    (row,) = json.loads((tmp_path / "transformers.json").read_text())["results"]
    steps = row["steps"]
    assert [step["round"] for step in steps] == [i // 5 for i in range(50)]
    assert steps[0]["loss"] == steps[5]["loss"] and steps[0]["length"] != steps[1]["length"]
    assert [steps[i]["length"] for i in (20, 35)] == [2 * steps[0]["length"], 4 * steps[0]["length"]]
    rounds = [sum(step["seconds"] for step in steps if step["round"] == i) for i in range(10)]
    assert row["total_s"] == pytest.approx(sum(rounds))
    table = benchmark.transformers_table(tmp_path)
    medians = " | ".join(f"{sorted(some)[1] * 1e3:.0f} ms" for some in (rounds[1:4], rounds[4:7], rounds[7:]))
    assert f"| sdpa | {rounds[0]:.0f} s | {medians} | 0 |" in table


def test_a_run(tmp_path: Path) -> None:
    sizes = ["--sizes", "2x40", "--head-dims", "16", "--heads", "4/2", "--padding", "40", "--sides", "right"]
    run("attention", "--device", "cpu", *sizes, folder=tmp_path)
    result = json.loads((tmp_path / "attention.json").read_text())
    assert [row["way"] for row in result["results"]] == list(benchmark.WAYS)
    measured = [row for row in result["results"] if "not_measured" not in row]
    assert [row["way"] for row in measured] == ["ours, auto", "ours, Triton", "ours, Triton, safe_padding"]
    table = run("table", "--table", "attention", folder=tmp_path)
    case = benchmark.cases(["2x40"], [16], ["4/2"], [40], ["right"])[0]
    assert table.startswith(str(case)) and result["torch"] in table
    for row in measured:
        low, median, high = row["forward_ms"]
        assert 0 < low <= median <= high
        assert f"| {row['way']} | {median:.2f} |" in table
    assert "| SDPA, explicit mask, cuDNN | needs CUDA |" in table
    run("plot", folder=tmp_path)
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_the_table_of_attention(tmp_path: Path) -> None:
    sizes = {"batch_size": 1, "kv_len": 1000, "head_dim": 50, "heads": 2, "kv_heads": 1, "padding": 0, "side": "right"}
    # 500 500 pairs, 4 * 2 * 50 operations for each: 0.2002 TFLOP in a second
    row = {**sizes, "way": "a way", "forward_ms": [0, 0.1, 1], "backward_ms": [0, 1.0, 2], "peak_mib": 7.4}
    row |= {"forward_host_ms": 0.333, "backward_host_ms": 0.5}
    left = {**sizes, "padding": 40, "side": "left", "way": "a way", "not_measured": "why"}
    versions = {"card": "a card", "torch": "2.0", "date": "2000-01-01", "matmul_tflops": 10.0}
    (tmp_path / "attention.json").write_text(json.dumps({**versions, "results": [row, left]}))
    first, all_cases = benchmark.attention_table(tmp_path).split(" 10 TFLOP/s in the same run. ")
    assert first.startswith("B1 S1000 H2/1 D50, no padding\n")
    assert "| a way | 0.10 | 2 (20%) | 1.00 | 1 (5%) | 0.33 / 0.50 | 7 |" in first and "why" not in first
    assert "| | B1 S1000 H2/1 D50, no padding | B1 S1000 H2/1 D50, 40 % left padding |\n" in all_cases
    assert all_cases.endswith("| a way | 0.10 / 1.00 | why |\n\n(a card, torch 2.0, 2000-01-01)")


def test_sequence_parallel(tmp_path: Path) -> None:
    script = str(Path(benchmark.__file__).parent / "sequence_parallel.py")
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", script]
        command += ["--device", "cpu", "--lengths", "64", "--heads", "4/2", "--head-dim", "16", "--times", "3"]
        command += ["--layers", "2", "--layers-lengths", "32"]
        subprocess.run([*command, "--results", str(tmp_path)], check=True, capture_output=True)
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
    sequence_parallel.plot(tmp_path)
    assert (tmp_path / "sequence_parallel.png").stat().st_size > 10_000


def test_the_table_of_scaling(tmp_path: Path) -> None:
    def row(kv_len: int, way: str, **more: object) -> dict:
        return {"kv_len": kv_len, "way": way, **more}

    short, long = ({"forward_ms": [0, n, 9], "backward_ms": [0, 2.0 * n, 9], "peak_mib": 512} for n in (1.25, 100.0))
    rows = [row(1024, "a", **short), row(1024, "b", not_measured="why"), row(2048, "a", **long), row(2048, "b", **long)]
    versions = {"card": "a card", "torch": "2.0", "date": "2000-01-01"}
    (tmp_path / "scaling.json").write_text(json.dumps({**versions, "results": rows}))
    table = benchmark.scaling_table(tmp_path).splitlines()
    assert table[0] == "| ms (GiB) | 1 024 | 2 048 |"
    assert table[2:4] == ["| a | 3.8 (0.5) | 300 (0.5) |", "| b | why | 300 (0.5) |"]


def test_the_table_of_sequence_parallel(tmp_path: Path) -> None:
    def row(ranks: int, both: float, bits: int) -> dict:
        times = {"forward_ms": 1.0, "both_ms": both, "exchange_ms": 2.0, "peak_mib": 512.0}
        return {"ranks": ranks, "length": 2048, "checksums": [[bits]], **times}

    rows = [row(4, 5.0, 1), row(2, 8.0, 0), {"ranks": 1, "length": 2048, "out_of_memory": True}]
    sizes = {"batch_size": 1, "heads": 32, "kv_heads": 8, "head_dim": 128}
    versions = {"card": "a card", "torch": "2.0", "date": "2000-01-01"}
    (tmp_path / "sequence_parallel.json").write_text(json.dumps({**versions, **sizes, "results": rows}))
    table = sequence_parallel.table(tmp_path)
    assert table.startswith("B1 H32/8 D128, 40 % right padding\n")
    assert "| 2 048 | 1 | out of memory |" in table
    assert "| 2 048 | 2 | 1.0 | 8.0 | 2.0 (25%) | 0.5 | 100% |  |" in table
    assert "| 2 048 | 4 | 1.0 | 5.0 | 2.0 (40%) | 0.5 | 80% | no |" in table
    assert "Computed" not in table  # without one GPU


def test_the_estimate_of_sequence_parallel() -> None:
    rows = [
        {"ranks": 1, "length": 1000, "both_ms": 1.0, "exchange_ms": 7.0},
        {"ranks": 1, "length": 2000, "both_ms": 8000.0, "exchange_ms": 7.0},
        {"ranks": 2, "length": 2000, "both_ms": 1.0, "exchange_ms": 100.0, "peak_mib": 2048},
    ]
    (line, _) = sequence_parallel.estimate(rows, ranks=4, length=8000)
    # 16 times the arithmetic on 4 GPUs; 1500 tokens sent, which was 500; twice as many of its own tokens
    assert line.endswith(
        "4 GPUs and 8 000 tokens, forward and backward: 32.00 s of arithmetic, 300 ms of exchange, 4 GiB a GPU."
    )
    assert not sequence_parallel.estimate([*rows, rows[2] | {"ranks": 4, "length": 8000}], ranks=4, length=8000)
