"""Parts 1 to 3 of the file are one piece to paste, and parts 1 and 2; they need torch alone."""

import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parent.parent / "causal_padded_flexattn.py"
USE = """
import sys
for package in ("attn_gym", "matplotlib", "transformers"):
    assert package not in sys.modules
device = "cuda" if torch.cuda.is_available() else "cpu"
pads = torch.arange(200, device=device) >= torch.tensor([[200], [70]], device=device)
inputs = [torch.randn(2, heads, 200, 32, device=device, requires_grad=True) for heads in (4, 2, 2)]
model = lambda *inputs: causal_padded_attention(*inputs, pads, window=50) * 2
for attention in (model, torch.compile(model, fullgraph=True)):
    output = attention(*inputs)
    gradients = torch.autograd.grad(output.square().sum(), inputs)
    assert output[1, :, 70:].count_nonzero() == 0 and output[1, :, :70].isfinite().all()
    print(*(round(x.norm().item(), 2) for x in (output, *gradients)))
"""


MASK = """
import sys
for package in ("attn_gym", "matplotlib", "transformers"):
    assert package not in sys.modules
pads = torch.arange(200) >= torch.tensor([[200], [70]])
block_mask = create_causal_padding_block_mask(pads, window=50)
print(*block_mask.kv_num_blocks.flatten().tolist())
"""


def run_alone(up_to: str, code: str, folder: Path) -> str:
    """What the code prints behind the part of the file before that marker, pasted together."""
    piece, marker, _ = FILE.read_text().partition(up_to)
    assert marker
    pasted = folder / "pasted.py"
    pasted.write_text(piece + code)
    done = subprocess.run(
        [sys.executable, str(pasted)], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_parts_1_and_2_alone(tmp_path: Path) -> None:
    assert run_alone("# ---- 3. ", MASK, tmp_path) == "1 2 1 0\n"


def test_parts_1_to_3_alone(tmp_path: Path) -> None:
    eager, compiled = run_alone("# ---- all above is one piece to paste", USE, tmp_path).splitlines()
    assert len(eager.split()) == 4
    for x, y in zip(eager.split(), compiled.split(), strict=True):
        assert abs(float(x) - float(y)) <= 0.02 * float(x)
