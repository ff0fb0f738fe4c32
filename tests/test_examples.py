"""Every example runs alone, as a user runs it, and finds its own result right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(example: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # as if it were installed
    command = [sys.executable, str(example), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path) -> None:
    assert run(example).count("\n") >= 1  # what it showed
    assert f"python examples/{example.name}" in example.read_text()


def test_the_picture_of_the_masks(tmp_path: Path) -> None:
    """What --save draws is what is committed."""
    copy = tmp_path / "masks.py"
    copy.write_text((ROOT / "examples" / "masks.py").read_text())
    run(copy, "--save")
    drawn, committed = (read(folder / "masks.png") for folder in (tmp_path, ROOT / "examples"))
    assert ((drawn - committed).abs() > 60).float().mean() < 0.005  # fonts may differ


def read(path: Path) -> torch.Tensor:
    image = Image.open(path).convert("L").resize((200, 160))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
