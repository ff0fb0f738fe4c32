"""Tables and plots of what was measured.

python benchmarks/report.py table NAME        attention, scaling, window, documents, block-mask, stream, ...
python benchmarks/report.py plot | tiles      into benchmarks/results
"""

import argparse
import statistics
from pathlib import Path

import torch
from common import RESULTS, Case, load, made_with
from decode import WAYS, Step
from models import ROUNDS
from torch.nn.attention.flex_attention import BlockMask

from causal_padded_flexattn import create_causal_padding_block_mask


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(row)} |" for row in lines]


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def block_mask_table(folder: Path) -> str:
    result = load("block_mask", folder)
    ways = list(dict.fromkeys(row["way"] for row in result["results"]))
    cells: dict[str, dict[str, str]] = {}
    for row in result["results"]:
        size = f"{row['batch_size']} x {spaced(row['kv_len'])}"
        cell = f"{row['ms']:.2f} ms, {row['peak_mib']:.1f} MiB" if "ms" in row else "out of memory"
        cells.setdefault(size, {})[row["way"]] = cell
    rows = [[size, *(row.get(way, "") for way in ways)] for size, row in cells.items()]
    return "\n".join([*table(["batch x length", *ways], rows), "", made_with(result)])


def stream_table(folder: Path) -> str:
    result, rows = load("stream", folder), []
    for row in result["results"]:
        cells = [f"stopped after {row.get('stopped_after_s', 0):.0f} s", f"{row['batches']} steps", ""]
        if "total_s" in row:
            cells = [f"{row[name]:.0f} s" for name in ("total_s", "worst_step_s")] + [
                f"{row['compilations']}"
            ]
        rows.append([row["way"], *cells])
    header = ["block mask", "all 24 steps", "slowest step", "compilations"]
    return "\n".join([*table(header, rows), "", made_with(result)])


def attention_table(folder: Path, name: str = "attention") -> str:
    """The first case with TFLOP/s of the allowed pairs, in percent of the matrix products'; then all."""
    result = load(name, folder)
    rate, measured = result["matmul_tflops"], list(dict.fromkeys(map(Case.of, result["results"])))
    rows, all_cases = [], {}
    for row in result["results"]:
        done = "forward_ms" in row
        both = " / ".join(f"{row[passes][1]:.2f}" for passes in ("forward_ms", "backward_ms")) if done else ""
        all_cases.setdefault(row["way"], [row["way"]]).append(both or row["not_measured"])
        if Case.of(row) != measured[0]:
            continue
        if not done:
            rows.append([row["way"], row["not_measured"], *[""] * 5])
            continue
        cells = [row["way"]]
        for passes, share in (
            ("forward", 1),
            ("backward", 2.5),
        ):  # five matrix products backward, two forward
            median = row[f"{passes}_ms"][1]
            tflops = share * measured[0].flops() / median / 1e9
            cells += [f"{median:.2f}", f"{tflops:.0f} ({tflops / rate:.0%})"]
        host = f"{row['forward_host_ms']:.2f} / {row['backward_host_ms']:.2f}"
        rows.append([*cells, host, f"{row.get('peak_mib', 0):.0f}"])
    header = ["", "ms forward", "TFLOP/s", "ms backward", "TFLOP/s", "host ms", "peak MiB"]
    product = f"percent of a bf16 matrix product of 8192 x 8192 x 8192, {rate:.0f} TFLOP/s in the same run"
    lines = [f"{measured[0]}", "", *table(header, rows), ""]
    lines += [f"In brackets: {product}. All cases, ms forward / backward:", ""]
    lines += table(["", *map(str, measured)], list(all_cases.values()))
    return "\n".join([*lines, "", made_with(result)])


def scaling_table(folder: Path) -> str:
    """Milliseconds forward and backward together, and GiB at the peak, against the length."""
    result = load("scaling", folder)
    lengths = list(dict.fromkeys(row["kv_len"] for row in result["results"]))
    cells: dict[str, list[str]] = {}
    for row in result["results"]:
        cell = row.get("not_measured")
        if cell is None:
            both = row["forward_ms"][1] + row["backward_ms"][1]
            cell = f"{both:.{1 if both < 100 else 0}f} ({row.get('peak_mib', 0) / 1024:.1f})"
        cells.setdefault(row["way"], [row["way"]]).append(cell)
    lines = table(["ms (GiB)", *map(spaced, lengths)], list(cells.values()))
    return "\n".join([*lines, "", made_with(result)])


def transformers_table(folder: Path) -> str:
    """The first round, and the median of the later ones at each length."""
    result = load("transformers", folder)
    factors, rows = list(dict.fromkeys(ROUNDS)), []
    for row in result["results"]:
        name = f"{row['model']}: {row['way']}" if row.get("model") else row["way"]
        if "total_s" not in row:
            rows.append([name, f"stopped after {row['stopped_after_s']:.0f} s", *[""] * (len(factors) + 1)])
            continue
        rounds = [0.0] * len(ROUNDS)
        for step in row["steps"]:
            rounds[step["round"]] += step["seconds"]
        cells = [f"{rounds[0]:.0f} s"]
        for factor in factors:
            warm = [seconds for i, seconds in enumerate(rounds) if ROUNDS[i] == factor and i and seconds]
            cells.append(f"{statistics.median(warm) * 1e3:.0f} ms" if warm else "")
        rows.append([name, *cells, str(row["compilations"])])
    header = ["", "from cold", "warm", *(f"{n} x as long" for n in factors[1:]), "compilations"]
    return "\n".join([*table(header, rows), "", made_with(result)])


def window_table(folder: Path, name: str = "window") -> str:
    """The cases beside each other, and nanoseconds for a million allowed pairs, forward and backward."""
    result = load(name, folder)
    measured = list(dict.fromkeys(map(Case.of, result["results"])))
    cells: dict[str, dict[Case, str]] = {}
    for row in result["results"]:
        case, cell = Case.of(row), row.get("not_measured")
        if cell is None:
            forward, backward = row["forward_ms"][1], row["backward_ms"][1]
            share = (forward + backward) * 1e12 / (case.pairs() * case.heads)
            cell = f"{forward:.2f} / {backward:.2f} ({share:.0f})"
        cells.setdefault(row["way"], {})[case] = cell
    rows = [[way, *(row.get(case, "") for case in measured)] for way, row in cells.items()]
    lines = table(["", *map(str, measured)], rows)
    per_pair = "In brackets: ns for a million allowed pairs, both passes."
    return "\n".join([*lines, "", per_pair, "", made_with(result)])


def decode_table(folder: Path) -> str:
    """A step's milliseconds and its host's, and the limit: the bytes of the real keys and values, copied."""
    result = load("decode", folder)
    cells: dict[Step, dict[str, str]] = {}
    for row in result["results"]:
        step = Step(**{name: row[name] for name in Step.__dataclass_fields__})
        of_step = cells.setdefault(step, {"limit": f"{row['limit_ms']:.3f}"})
        of_step[row["way"]] = f"{row['ms']:.3f} ({row['host_ms']:.2f})" if "ms" in row else ""
    ways = ["limit", "ours", *list(WAYS)[1:], "block mask"]
    rows = [[str(step), *(row[way] for way in ways)] for step, row in cells.items()]
    header = ["ms (host ms)", *ways[:-1], "our block mask, once for all layers"]
    return "\n".join([*table(header, rows), "", made_with(result)])


TABLES = {
    "decode": decode_table,
    "block-mask": block_mask_table,
    "stream": stream_table,
    "attention": attention_table,
    "scaling": scaling_table,
    "transformers": transformers_table,
    "window": window_table,
    "documents": lambda folder: window_table(folder, "documents"),
}


def plot(folder: Path) -> None:
    """Bars of the first case of the attention, and times against length; told apart without colour."""
    from matplotlib.figure import Figure

    result = load("attention", folder)
    measured = [row for row in result["results"] if "forward_ms" in row]
    case = Case.of(measured[0])
    first = [row for row in measured if Case.of(row) == case][::-1]
    figure = Figure(figsize=(9, 0.45 * len(first) + 1.2), layout="constrained")
    axes = figure.subplots()
    for passes, shift, hatch, shade in (
        ("forward_ms", 0.2, "", "0.35"),
        ("backward_ms", -0.2, "////", "0.85"),
    ):
        style = {"height": 0.4, "hatch": hatch, "color": shade, "edgecolor": "0.2"}
        medians, at = [row[passes][1] for row in first], [place + shift for place in range(len(first))]
        bars = axes.barh(at, medians, label=passes.removesuffix("_ms"), **style)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set(xscale="log", xlabel="ms, on a log axis")
    figure.suptitle(f"{case}\n{made_with(result)}", fontsize=9)
    axes.set_yticks(range(len(first)), [row["way"] for row in first])
    axes.legend(loc="lower right")
    axes.margins(x=0.15)
    figure.savefig(folder / "attention.png", dpi=120)

    result = load("scaling", folder)
    figure = Figure(figsize=(14, 5), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    ways = list(dict.fromkeys(row["way"] for row in result["results"]))
    for axes, passes in zip(both, ("forward_ms", "backward_ms"), strict=True):
        for i, way in enumerate(ways):
            rows = [row for row in result["results"] if row["way"] == way and passes in row]
            style = {"marker": "osv^Dx*+P<>hpd"[i % 14], "linewidth": 3 if i == 0 else 1.5}  # ours thick
            style |= {"linestyle": ["-", "--", ":"][i % 3], "color": str(0.15 * (i % 4)), "label": way}
            axes.plot([row["kv_len"] for row in rows], [row[passes][1] for row in rows], **style)
        axes.set(yscale="log", xlabel="max_seq_len", title=passes.removesuffix("_ms"))
        axes.set_xscale("log", base=2)
    both[0].set_ylabel("ms")
    figure.legend(*both[1].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.suptitle(f"131 072 tokens a batch, H16 D128, 40 % right padding\n{made_with(result)}", fontsize=9)
    figure.savefig(folder / "scaling.png", dpi=120)


def tiles(folder: Path) -> None:
    """What a BlockMask makes of right padding, of left padding, of holes, of a window and of documents."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names, shades = ["skipped", "partial: asks the mask_mod", "full"], ["white", "#fdae61", "#2c5985"]
    figure = Figure(figsize=(16, 4), layout="constrained")
    kinds = kinds_of_tiles()
    for axes, (name, (pads, more)) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        block_mask = create_causal_padding_block_mask(pads[None], **more)
        counts, indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        assert counts is not None and indices is not None
        shown = (
            block_mask.to_dense() + BlockMask.from_kv_blocks(counts, indices).to_dense()
        )  # full ones count twice
        axes.pcolormesh(
            shown[0, 0], cmap=ListedColormap(shades), vmin=0, vmax=2, edgecolor="0.7", linewidth=0.5
        )
        ticks = range(0, 17, 4)
        axes.set(
            title=name, xlabel="key block", ylabel="query block", aspect="equal", xticks=ticks, yticks=ticks
        )
        axes.invert_yaxis()
    patches = [
        Patch(facecolor=shade, edgecolor="0.7", label=name) for name, shade in zip(names, shades, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)
    figure.savefig(folder / "tiles.png", dpi=120)


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["table", "plot", "tiles"])
    parser.add_argument("which", nargs="?", choices=TABLES, default="attention", help="which table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    args = parser.parse_args()
    show = {"plot": plot, "tiles": tiles, "table": lambda folder: print(TABLES[args.which](folder))}
    show[args.what](args.results)


if __name__ == "__main__":
    main()
