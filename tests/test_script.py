"""The command line, run as a user runs it."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import DEVICES
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = [
    "--lengths",
    "200,130,7",
    "--max-seq-len",
    "200",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--head-dim",
    "32",
]


def run(
    *arguments: str, cwd: Path, code: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([str(ROOT / "causal_padded_flexattn.py")] if code is None else ["-c", code])]
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def read_mask(path: Path) -> list[str]:
    """The 12 x 12 cells of the figure, from its pixels: 1 for a score that is computed, . for the others."""
    image = Image.open(path).convert("RGB")
    assert 3000 < image.width < 3700 and 2700 < image.height < 3100  # 12 x 10 inches at 300 dpi, margins cut
    pixels = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .int()
    )
    ends = {"1": (253, 231, 55), ".": (0, 34, 77)}  # the two ends of the colour map, cividis
    cell = {c: (pixels - torch.tensor(colour)).abs().amax(-1) <= 2 for c, colour in ends.items()}
    inside = cell["1"] | cell["."]
    columns = (
        (inside.float().mean(0) > 0.5).nonzero().flatten()
    )  # the colour bar holds few pixels of its ends
    rows = (inside.float().mean(1) > 0.5).nonzero().flatten()
    (left, right), (top, bottom) = (columns[[0, -1]].tolist(), rows[[0, -1]].tolist())

    def centre(low: int, high: int, i: int) -> int:
        return round(low + (high - low) * (i + 0.5) / 12)

    return [
        "".join(
            next(c for c in cell if cell[c][centre(top, bottom, i), centre(left, right, j)])
            for j in range(12)
        )
        for i in range(12)
    ]


RIGHT = ["1" * (i + 1) + "." * (11 - i) if i < 8 else "." * 12 for i in range(12)]
LEFT = ["." * 12 if i < 4 else "...." + "1" * (i - 3) + "." * (11 - i) for i in range(12)]


@pytest.mark.parametrize("device", DEVICES)
def test_report_and_figure(device: str, tmp_path: Path) -> None:
    done = run("--device", device, *SMALL, "--padding-side", "left", "--output", "mask.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = done.stdout
    assert f"torch {torch.__version__}, {'float32' if device == 'cpu' else 'bfloat16'}, " in report
    assert "3 x 200 tokens, 44% of it padding on the left; 4 query and 2 key heads of 32" in report
    assert "tiles of 128 x 128: 0 full, 7 partial, 5 skipped" in report
    results = (
        ["output"] if device == "cpu" else ["output", "query gradient", "key gradient", "value gradient"]
    )
    for result in results:
        error, own, bound = map(float, re.search(rf"{result} +(\S+) +(\S+) +(\S+)", report).groups())
        assert 0 < error <= bound and 0 < own < bound
    for passes in ("forward", "with backward")[: len(results)]:
        ours, sdpa, ratio = map(
            float, re.search(rf"{passes} +([\d.]+) +([\d.]+) +([\d.]+) x", report).groups()
        )
        least, most = (sdpa - 0.005) / (ours + 0.005), (sdpa + 0.005) / max(1e-9, ours - 0.005)  # as rounded
        assert least - 0.051 <= ratio <= most + 0.051
    assert ("with backward" in report) == (device == "cuda")
    assert ("forward only" in report) == (device == "cpu")
    assert "mask.png: the mask of 8 tokens, padded to 12 on the left" in report
    assert read_mask(tmp_path / "mask.png") == LEFT


@pytest.mark.parametrize(("side", "name"), [("right", ""), ("left", "_left")])
def test_each_side_has_a_figure_of_its_own(side: str, name: str, tmp_path: Path) -> None:
    done = run("--device", "cpu", *SMALL, "--padding-side", side, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"causal_padding_mask{name}.png"]


def test_both_masks_are_made_before_the_clock_starts(tmp_path: Path) -> None:
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, torch.utils.benchmark as benchmark, causal_padded_flexattn as m
from torch.nn.attention import flex_attention as flex
make, timed = benchmark.Timer, []
def forbidden(*args, **kwargs):
    raise AssertionError("while the clock runs")
def timer(*args, **kwargs):
    # The timed calls may make no mask, and zero nothing.
    flex.create_block_mask = m._explicit_mask = m.create_causal_padding_block_mask = forbidden
    torch.Tensor.masked_fill = forbidden
    timed.append(1)
    return make(*args, **kwargs)
benchmark.Timer = timer
assert m.main() == 0
print(len(timed), "timed")
"""
    done = run("--device", "cpu", *SMALL, "--no-figure", cwd=tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("2 timed\n")


def test_the_committed_figure_is_the_one_the_script_draws() -> None:
    assert read_mask(ROOT / "causal_padding_mask.png") == RIGHT


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        ("causal = lambda b, h, q, k: q > k", "output"),
        ("create_padding_mask = lambda pads: m.causal", "block masks, output"),
        ("_list_tiles = lambda r, c, n, t, f=m._list_tiles: f([r[0] - 1], c, n, t)", "block masks"),
    ],
)
def test_a_wrong_mask_ends_with_status_one(broken: str, wrong: str, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import causal_padded_flexattn as m; m.{broken}; "
    code += "sys.exit(m.main())"
    done = run("--device", "cpu", *SMALL, "--no-figure", cwd=tmp_path, code=code)
    assert done.returncode == 1
    assert done.stderr == f"FlexAttention and what it was checked against differ: {wrong}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "0,5"], "--lengths: expected a whole number of at least 1, got '0'"),
        (["--lengths", ""], "--lengths: expected a whole number of at least 1, got ''"),
        (["--lengths", "5,x"], "--lengths: expected a whole number of at least 1, got 'x'"),
        (["--lengths", "600"], "--lengths has 600 tokens: raise --max-seq-len 512"),
        (["--lengths", "5,6", "--batch-size", "3"], "--lengths has 2 sequences: leave --batch-size 3 out"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 must be a multiple of --kv-heads 4"),
        (["--heads", "0"], "--heads: expected a whole number of at least 1, got '0'"),
        (["--dtype", "int8"], "--dtype: invalid choice"),
        (["--output", "mask.jpg"], "--output must be a .png file in a folder that exists; got mask.jpg"),
        (["--output", "nowhere/mask.png"], "--output must be a .png file in a folder that exists"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_unusable_arguments_end_with_status_two(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = run("--device", "cpu", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("package", ["attn_gym", "matplotlib"])
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("sys.modules[{!r}] = None", "import of {} halted; None in sys.modules"),  # as if not installed
        ("sys.path.insert(0, '.')", "NameError: name 'half' is not defined"),
    ],
)
def test_without_what_the_figure_needs(package: str, state: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("half")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import causal_padded_flexattn as m; "
    done = run("--device", "cpu", cwd=tmp_path, code=code + state.format(package) + "; m.main()")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert reason.format(package) in done.stderr
    assert "the figure needs attn_gym and matplotlib (" in done.stderr
    assert "): pip install attn-gym matplotlib, or pass --no-figure" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_where_the_figure_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    done = run("--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "causal_padding_mask.png cannot be written: name another, or pass --no-figure" in done.stderr


def test_an_interrupted_run_ends_quietly(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "causal_padded_flexattn.py"), "--device", "cpu", *SMALL]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs inherit that it is ignored
    with subprocess.Popen(command, cwd=tmp_path, preexec_fn=heed, **pipes) as process:
        while not process.stdout.readline().startswith("compile"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 130


def test_without_a_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = run("--device", "cpu", *SMALL, "--no-figure", cwd=tmp_path, environment=environment)
    assert done.returncode == 2
    assert done.stderr == "torch.compile found no C++ compiler: install g++, or name another in CXX\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA")
def test_cuda_without_cuda(tmp_path: Path) -> None:
    done = run("--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert "pass --device cpu" in done.stderr and done.stderr.count("\n") == 1


def test_import_runs_nothing_and_needs_torch_alone(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["matplotlib"] = sys.modules["attn_gym"] = None  # an import of them fails
import torch
import causal_padded_flexattn
assert not torch.cuda.is_initialized()
assert "torch._inductor" not in sys.modules, "something was compiled"
"""
    done = run(cwd=tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_nothing_drawn_needs_no_place_for_it(tmp_path: Path) -> None:
    done = run("--device", "cpu", *SMALL, "--no-figure", "--output", "nowhere/mask.jpg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """As `| head -1` does: no traceback, and not the status of checks that fail."""
    command = [
        sys.executable,
        str(ROOT / "causal_padded_flexattn.py"),
        "--device",
        "cpu",
        *SMALL,
        "--no-figure",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_every_option_has_a_word_of_help() -> None:
    done = run("--help", cwd=ROOT)
    assert done.returncode == 0
    options = re.findall(r"^  (--[\w-]+)(.*(?:\n {8,}.*)*)", done.stdout, re.MULTILINE)
    assert len(options) >= 12
    for name, text in options:
        assert re.search(r"[a-z]{3}", re.sub(r"\{.*?\}|[A-Z,.]+", "", text)), name
