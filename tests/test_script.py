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
from conftest import DEVICES, PAIRS_OF_DEVICES, explicit_mask
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = ["--lengths", "200,130,7", "--max-seq-len", "200", "--heads", "4", "--kv-heads", "2", "--head-dim", "32"]


def run(
    *arguments: str, cwd: Path, code: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([str(ROOT / "causal_padded_flexattn.py")] if code is None else ["-c", code])]
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def read_mask(path: Path) -> list[str]:
    """The 12 x 12 cells of the figure, from its pixels: 1 for a score that is computed, . for one that is not."""
    image = Image.open(path).convert("RGB")
    assert 3000 < image.width < 3700 and 2700 < image.height < 3100  # 12 x 10 inches at 300 dpi, margins cut
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).int()
    ends = {"1": (253, 231, 55), ".": (0, 34, 77)}  # the two ends of the colour map, cividis
    cell = {c: (pixels - torch.tensor(colour)).abs().amax(-1) <= 2 for c, colour in ends.items()}
    inside = cell["1"] | cell["."]
    columns = (inside.float().mean(0) > 0.5).nonzero().flatten()  # the colour bar holds few pixels of its ends
    rows = (inside.float().mean(1) > 0.5).nonzero().flatten()
    (left, right), (top, bottom) = (columns[[0, -1]].tolist(), rows[[0, -1]].tolist())

    def centre(low: int, high: int, i: int) -> int:
        return round(low + (high - low) * (i + 0.5) / 12)

    return [
        "".join(next(c for c in cell if cell[c][centre(top, bottom, i), centre(left, right, j)]) for j in range(12))
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
    assert f"torch {torch.__version__}" in report
    assert ("float32" if device == "cpu" else "bfloat16") in report
    assert "3 x 200 tokens, 44% of it padding on the left; 4 query and 2 key heads of 32" in report
    assert "12 tiles of 128 x 128: 0 full, 7 partial, 5 skipped" in report
    memory = r"" if device == "cpu" else r", [\d.]+ MiB at its peak"
    assert re.search(rf"create_block_mask +[\d.]+ ms{memory}\n +closed form +[\d.]+ ms{memory}\n", report)
    assert "the same, both ways" in report
    results = ["output"] if device == "cpu" else ["output", "query gradient", "key gradient", "value gradient"]
    for result in results:
        error, own, bound = map(float, re.search(rf"{result} +(\S+) +(\S+) +(\S+)", report).groups())
        assert 0 < error <= bound and 0 < own < bound
    assert re.search(r"forward +flex [\d.]+ ms, SDPA with the explicit mask [\d.]+ ms: [\d.]+ x", report)
    assert ("with backward" in report) == (device == "cuda")
    assert ("no backward on the CPU" in report) == (device == "cpu")
    assert re.search(r"figure +mask.png", report)
    assert read_mask(tmp_path / "mask.png") == LEFT


def test_the_committed_figure_is_the_one_the_script_draws() -> None:
    assert read_mask(ROOT / "causal_padding_mask.png") == RIGHT


def test_the_figure_of_the_tiles(tmp_path: Path) -> None:
    done = run("--device", "cpu", *SMALL, "--figure", "tiles", "--output", "tiles.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "tiles.png", ROOT / "benchmarks" / "results" / "tiles.png"):
        image = Image.open(path).convert("RGB")
        colours: dict = {colour: count for count, colour in image.getcolors(maxcolors=2**16)}
        full, partly = colours[(44, 89, 133)], colours[(253, 174, 97)]
        tiles = []  # full and partial, of the same paddings by their definition
        place = torch.arange(2048)
        for pads in (place >= 1358, place < 690, (place % 700 > 400) & (place < 1800)):
            allowed = explicit_mask(pads[None])[0].view(16, 128, 16, 128).float().mean((1, 3))
            tiles.append(torch.stack(((allowed == 1).sum(), ((allowed > 0) & (allowed < 1)).sum())))
        expected = torch.stack(tiles).sum(0)
        assert full / partly == pytest.approx((expected[0] / expected[1]).item(), rel=0.03)


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        ("causal = lambda b, h, q, k: q > k", "output"),
        ("create_padding_mask = lambda pads: m.causal", "the block masks, output"),
        ("_list_tiles = lambda r, c, n, t, f=m._list_tiles: f(r - 1, c, n, t)", "the block masks"),
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
        (["--lengths", "0,5"], "--lengths: expected a whole number of at least 1, got 0"),
        (["--lengths", "5,x"], "--lengths: expected a whole number of at least 1, got x"),
        (["--lengths", "600"], "--lengths has 600 tokens: raise --max-seq-len 512"),
        (["--lengths", "5,6", "--batch-size", "3"], "--lengths has 2 sequences: leave --batch-size 3 out"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 must be a multiple of --kv-heads 4"),
        (["--heads", "0"], "--heads: expected a whole number of at least 1, got 0"),
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
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored
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


def torchrun(script: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    command += ["--sequence-parallel", "--max-seq-len", "200", "--head-dim", "32", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("device", PAIRS_OF_DEVICES)
def test_sequence_parallel(device: str) -> None:
    done = torchrun(ROOT / "causal_padded_flexattn.py", "--device", device)
    assert done.returncode == 0, done.stderr
    for name in ("output", "query gradient", "key gradient", "value gradient"):
        assert len(re.findall(rf"{name} +[\d.e+-]+   [\d.e+-]+\n", done.stdout)) == 1  # one rank speaks
    assert re.search(r"2 ranks +[\d.]+ ms.*\n +one rank +[\d.]+ ms", done.stdout)


def test_a_wrong_rank_ends_with_status_one(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    wrong = (
        "lambda q, k, v, pads, mesh, f=m.sequence_parallel_attention: f(q, k, v, pads, mesh) * (1 + mesh.get_rank())"
    )
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import causal_padded_flexattn as m\nm.sequence_parallel_attention = {wrong}\nsys.exit(m.main())\n"
    )
    done = torchrun(script, "--device", "cpu")
    assert done.returncode == 1
    assert "exitcode  : 1" in done.stderr and "Error" not in done.stdout


def test_sequence_parallel_that_cannot_be() -> None:
    alone = run("--sequence-parallel", "--device", "cpu", cwd=ROOT)
    assert alone.returncode == 2
    assert alone.stderr == "causal_padded_flexattn.py: run --sequence-parallel under torchrun --nproc-per-node N\n"
    done = torchrun(ROOT / "causal_padded_flexattn.py", "--device", "cpu", "--heads", "4", "--kv-heads", "1")
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr  # torchrun's own is always 1
    assert "2 ranks must divide --max-seq-len, --heads and --kv-heads: use fewer" in done.stderr
