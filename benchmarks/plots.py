"""Plots of what was measured, into benchmarks/results.

python benchmarks/plots.py scaling | decode | tiles
"""

from pathlib import Path
from typing import Any

import torch
from cases import block_mask_of
from common import load, made_with, parser_of
from decode import Step
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch.nn.attention.flex_attention import BlockMask

OURS, OTHERS = "#c1440e", "0.45"
# Six of the ways; the tables have all.
WAYS = {
    "ours, auto": "ours, auto",
    "FlashAttention-4 with lengths, padded rows zeroed": "FA4 with lengths",
    "cudnn.flex_attention": "cudnn.flex_attention",
    "SDPA, is_causal, cuDNN, computes the padding": "SDPA, is_causal",
    "FlashAttention-2 varlen (torch), padded to padded": "FA2, pack and pad",
    "SDPA, explicit mask, cuDNN": "SDPA, explicit mask",
}


def label_ends(axes: Any, ends: dict[str, float], x: float, least: float) -> None:
    """At the end of each line its name, in its colour, a factor apart from the next on the log axis."""
    y = 0.0
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        y = max(end, y * least)
        ours = name.startswith("ours")
        style = {"color": OURS if ours else "0.25", "fontweight": "bold" if ours else "normal"}
        axes.annotate(name, (x, end), (x * 1.15, y), va="center", fontsize=9, **style)


def scaling(folder: Path) -> Figure:
    result = load("scaling", folder)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, ends = figure.subplots(), {}
    ways = {**WAYS, "ours, auto, padding_side": "ours, padding_side"}
    for (way, name), marker in zip(ways.items(), "osv^DxP", strict=True):
        rows = [row for row in result["results"] if row["way"] == way and "forward_ms" in row]
        if not rows:
            continue
        times = [row["forward_ms"][1] + row["backward_ms"][1] for row in rows]
        ours = way.startswith("ours")
        style = {"linewidth": 3.5 if ours else 1.3, "color": OURS if ours else OTHERS, "marker": marker}
        axes.plot([row["kv_len"] for row in rows], times, markersize=7 if ours else 4, **style)
        ends[name] = times[-1]
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="max_seq_len", ylabel="ms forward and backward")
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, ends, max(row["kv_len"] for row in result["results"]), 1.28)
    axes.set_xlim(right=2**20)
    axes.set_xticks([2**n for n in range(9, 18)])
    figure.suptitle(f"131 072 tokens a batch, H16 D128, 40 % right padding\n{made_with(result)}", fontsize=9)
    return figure


def decode(folder: Path) -> Figure:
    """A step's time, and the time in which its keys and values can be read."""
    result = load("decode", folder)
    steps: dict[str, dict[str, float]] = {}
    for row in result["results"]:
        times = steps.setdefault(str(Step.of(row)), {"limit": row["limit_ms"]})
        times |= {row["way"]: row["ms"]} if "ms" in row and row["way"] != "block mask" else {}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, places = figure.subplots(), range(len(steps))[::-1]
    least, most = ([some(times.values()) for times in steps.values()] for some in (min, max))
    axes.hlines(places, least, most, color="0.85")
    ways = dict.fromkeys(way for times in steps.values() for way in times)
    for way, marker in zip(ways, "|os^vxD", strict=False):
        style = {"color": OURS if way == "ours" else "black" if way == "limit" else OTHERS, "marker": marker}
        style |= {"s": 90 if way in ("ours", "limit") else 40, "label": way, "zorder": 3}
        axes.scatter([times.get(way, float("nan")) for times in steps.values()], places, **style)
    axes.set_yticks(places, list(steps), fontsize=8)
    axes.set(xscale="log", xlabel="ms of a step's attention; limit: real keys and values, copied")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=6, fontsize=8, frameon=False)
    figure.suptitle(made_with(result), fontsize=8)
    return figure


def tiles(folder: Path) -> Figure:
    """What a BlockMask makes of right padding, of left padding, of holes, of a window and of documents."""
    names, shades = ["skipped", "partial: asks the mask_mod", "full"], ["white", "#fdae61", "#2c5985"]
    figure = Figure(figsize=(16, 4), layout="constrained")
    kinds = kinds_of_tiles()
    ticks = range(0, 17, 4)
    for axes, (name, (pads, more)) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        block_mask = block_mask_of(pads[None], **more)
        counts, indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        assert counts is not None and indices is not None
        full = BlockMask.from_kv_blocks(counts, indices).to_dense()
        shown = (block_mask.to_dense() + full)[0, 0]  # full ones count twice
        style: dict = {"vmin": 0, "vmax": 2, "edgecolor": "0.7", "linewidth": 0.5}
        axes.pcolormesh(shown, cmap=ListedColormap(shades), **style)
        axes.set(title=name, xlabel="key block", ylabel="query block", aspect="equal")
        axes.set(xticks=ticks, yticks=ticks)
        axes.invert_yaxis()
    patches = [
        Patch(facecolor=shade, edgecolor="0.7", label=name) for name, shade in zip(names, shades, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)
    return figure


def kinds_of_tiles() -> dict:
    """Of 16 x 128 tokens: pads, and what else the mask is made of."""
    place = torch.arange(2048)
    right = place >= 1358
    return {
        "right padding": (right, {}),
        "left padding": (place < 690, {}),
        "holes": ((place % 700 > 400) & (place < 1800), {}),
        "right, window of 300": (right, {"window": 300}),
        "right, three documents": (right, {"documents": (place // 500)[None]}),
    }


PLOTS = {"scaling": scaling, "decode": decode, "tiles": tiles}


def main() -> None:
    parser = parser_of(__doc__, measures=False)
    parser.add_argument("which", choices=PLOTS)
    args = parser.parse_args()
    PLOTS[args.which](args.results).savefig(args.results / f"{args.which}.png", dpi=120)


if __name__ == "__main__":
    main()
