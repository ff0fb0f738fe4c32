"""The command line, run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = ["--lengths", "200,130,7", "--max-seq-len", "200", "--head-dim", "32"]


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


RESULTS = ["output", "query gradient", "key gradient", "value gradient"]


def read_checks(report: str) -> dict[str, list[str]]:
    """The results that the report checks of each way, after a look at every line."""
    checks: dict[str, list[str]] = {}
    for line in report.partition("check ")[2].splitlines()[1:]:
        if not line.startswith(" "):
            break
        found = re.fullmatch(
            r" {10}(\w+(?: \w+)?) +(\S+) \(SDPA's own (\S+), allowed (\S+)\) (ok|WRONG)", line
        )
        if found is None:
            checks[line.strip()] = []
            continue
        name, *numbers, verdict = found.groups()
        error, own, allowed = map(float, numbers)
        assert 0 <= own < allowed and (error <= allowed) == (verdict == "ok")
        checks[list(checks)[-1]].append(name)
    return checks


@pytest.mark.parametrize(
    ("device", "side"),
    [("cpu", "right"), ("cpu", "left"), pytest.param("cuda", "right", marks=pytest.mark.cuda)],
)
def test_report_and_figure(device: str, side: str, tmp_path: Path) -> None:
    done = run("--device", device, *SMALL, "--padding-side", side, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = done.stdout
    assert f"torch {torch.__version__}, " in report
    dtype = "torch.float32" if device == "cpu" else "torch.bfloat16"
    heads = 4 if device == "cpu" else 16
    assert f"3 x 200 tokens, 44% of them padding on the {side}; {heads} heads of size 32, {dtype}" in report
    tiles = "0 full, 7 partial, 5 skipped"
    assert f"tiles of 128 x 128 scores: {tiles}; as create_block_mask finds them: ok" in report
    assert "WRONG" not in report
    if device == "cpu":
        assert read_checks(report) == {"attend": RESULTS, "textbook_attention": RESULTS[:1]}
        assert "times" not in report
    else:
        ways = "attend", "textbook_attention"
        assert read_checks(report) == dict.fromkeys(ways, RESULTS)
        ways = re.findall(r"^ {8}(\S.*?) +([\d.]+) +([\d.]+) +([\d.]+)$", report, re.MULTILINE)
        assert len(ways) == 4 and ways[-1][0] == "SDPA, is_causal=True, with the padding"
        assert all(float(x) > 0 for _, *times in ways for x in times)
    figure = "causal_padding_mask.png" if side == "right" else "causal_padding_mask_left.png"
    assert f"Visualization saved as {figure}" in report
    assert read_mask(tmp_path / figure) == (RIGHT if side == "right" else LEFT)


def test_the_committed_figure_is_the_one_the_script_draws() -> None:
    assert read_mask(ROOT / "causal_padding_mask.png") == RIGHT


BREAK = {
    "the textbook's mask": ("causal = lambda b, h, q, k: q > k", "output of textbook_attention"),
    "the tiles": ("_list_tiles = lambda tiles, f=m._list_tiles: f(tiles.flip(-1))", "the tiles of the mask"),
    "the module's mask": (
        "_build_block_mask = lambda a, b, *x, f=m._build_block_mask: f(a, b + 1, *x)",
        ", ".join(["the tiles of the mask", *(f"{result} of attend" for result in RESULTS)]),
    ),
    "a digit": (
        "attend = lambda *x, f=m.attend, **more: f(*x, **more) * (1 + 1e-4)",
        ", ".join(f"{result} of attend" for result in RESULTS),
    ),
}


@pytest.mark.parametrize("what", BREAK)
def test_what_is_wrong_ends_with_status_one(what: str, tmp_path: Path) -> None:
    broken, wrong = BREAK[what]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import causal_padded_flexattn as m; m.{broken}; "
    code += "sys.exit(m.main())"
    done = run("--device", "cpu", *SMALL, "--padding-side", "left", "--no-figure", cwd=tmp_path, code=code)
    assert done.returncode == 1, done.stderr
    assert done.stderr == f"These results are wrong: {wrong}\n"
    assert "WRONG" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "5,x"], "--lengths: expected a whole number of at least 1, got 'x'"),
        (["--head-dim", "0"], "--head-dim: expected a whole number of at least 1, got '0'"),
        (["--no-figure", "--max-seq-len", "9999999999"], "can't allocate memory"),
        (["--max-seq-len", "9", "--lengths", "10"], "--lengths has 10 tokens: raise --max-seq-len 9"),
        (["--output", "mask.pdf"], "--output must be a .png file; got mask.pdf"),
        (["--output", "missing/mask.png"], "No such file or directory: 'missing/mask.png'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_unusable_arguments_end_with_status_two(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = run("--device", "cpu", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_the_compiled_textbook_and_where_the_figure_goes(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, causal_padded_flexattn as m; "
    code += "assert not m.main(); print(torch._dynamo.utils.counters['aot_autograd']['total'])"
    for more, compiled in ((["--output", "mask.png"], 0), (["--compile", "--no-figure"], 1)):
        done = run("--device", "cpu", *SMALL, *more, cwd=tmp_path, code=code)
        assert done.returncode == 0, done.stderr
        assert read_checks(done.stdout) == {"attend": RESULTS, "textbook_attention": RESULTS[:1]}
        assert int(done.stdout.split()[-1]) == compiled
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]


@pytest.mark.parametrize(
    ("package", "state", "reason"),
    [  # as if not installed, and broken
        ("attn_gym", "sys.modules[{!r}] = None", "import of {} halted; None in sys.modules"),
        ("matplotlib", "sys.path.insert(0, '.')", "NameError: name 'half' is not defined"),
    ],
)
def test_without_what_the_figure_needs(package: str, state: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("half")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import causal_padded_flexattn as m; "
    done = run("--device", "cpu", cwd=tmp_path, code=code + state.format(package) + "; sys.exit(m.main())")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert reason.format(package) in done.stderr
    assert "the figure needs attn_gym and matplotlib (" in done.stderr
    assert "): pip install attn-gym matplotlib, or pass --no-figure" in done.stderr


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


def test_every_option_has_a_word_of_help() -> None:
    done = run("--help", cwd=ROOT)
    assert done.returncode == 0
    options = re.findall(r"^  (--[\w-]+)(.*(?:\n {8,}.*)*)", done.stdout, re.MULTILINE)
    assert len(options) >= 8
    for name, text in options:
        assert re.search(r"[a-z]{3}", re.sub(r"\{.*?\}|[A-Z,.]+", "", text)), name
