"""Tables of what was measured: python benchmarks/report.py WHICH."""

import statistics
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from attention import LARGE, SMALL
from cases import Case
from common import Row, load, made_with, parser_of
from decode import Step
from models import CACHES, ROUNDS


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Without columns of which nothing was measured."""
    columns = [column for column in zip_longest(header, *rows, fillvalue="") if any(column[1:])]
    header, *rows = map(list, zip(*columns, strict=True))
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def block_mask_table(folder: Path) -> str:
    result = load("block_mask", folder)
    cells: dict[str, dict[str, str]] = {}
    for row in result["results"]:
        size = f"{row['batch_size']} x {spaced(row['kv_len'])}"
        cell = f"{row['ms']:.2f} ms, {row['peak_mib']:.1f} MiB" if "ms" in row else "out of memory"
        cells.setdefault(size, {})[row["way"]] = cell
    ways = list(dict.fromkeys(row["way"] for row in result["results"]))
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


def attention_table(folder: Path) -> str:
    """The first case with TFLOP/s of the allowed pairs, in percent of the matrix products'; then all."""
    result = load("attention", folder)
    rate, measured = result["matmul_tflops"], list(dict.fromkeys(map(Case.of, result["results"])))
    rows, all_cases = [], dict[str, dict[Case, str]]()
    for row in result["results"]:
        done = "forward_ms" in row
        both = " / ".join(f"{row[passes][1]:.2f}" for passes in ("forward_ms", "backward_ms")) if done else ""
        all_cases.setdefault(row["way"], {})[Case.of(row)] = both or row["not_measured"]
        if Case.of(row) != measured[0]:
            continue
        if not done:
            rows.append([row["way"], row["not_measured"], *[""] * 6])
            continue
        cells = [row["way"]]
        for passes, share in (("forward", 1), ("backward", 2.5)):  # two matrix products, and five
            median = row[f"{passes}_ms"][1]
            tflops = share * measured[0].flops() / median / 1e9
            cells += [f"{median:.2f}", f"{tflops:.0f} ({tflops / rate:.0%})"]
        host = f"{row['forward_host_ms']:.2f} / {row['backward_host_ms']:.2f}"
        mask = f"{row['mask_ms'][1]:.2f}" if "mask_ms" in row else ""
        rows.append([*cells, host, f"{row.get('peak_mib', 0):.0f}", mask])
    header = ["", "ms forward", "TFLOP/s", "ms backward", "TFLOP/s", "host ms", "peak MiB", "mask ms"]
    product = f"percent of a bf16 matrix product of 8192 x 8192 x 8192, {rate:.0f} TFLOP/s in the same run"
    lines = [f"{measured[0]}", "", *table(header, rows), ""]
    lines += [f"In brackets: {product}. All cases, ms forward / backward:", ""]
    cells = [[way, *(row.get(case, "") for case in measured)] for way, row in all_cases.items()]
    lines += table(["", *map(str, measured)], cells)
    return "\n".join([*lines, "", made_with(result)])


def scaling_table(folder: Path) -> str:
    """Milliseconds forward and backward together, and GiB at the peak, against the length."""
    result = load("scaling", folder)
    lengths = list(dict.fromkeys(row["kv_len"] for row in result["results"]))
    cells: dict[str, list[str]] = {}
    for row in result["results"]:
        cell = row.get("not_measured")
        if cell is None:
            both = both_ms(row)
            cell = f"{both:.{1 if both < 100 else 0}f} ({row.get('peak_mib', 0) / 1024:.1f})"
        cells.setdefault(row["way"], [row["way"]]).append(cell)
    lines = table(["ms (GiB)", *map(spaced, lengths)], list(cells.values()))
    return "\n".join([*lines, "", made_with(result)])


def same_bits_table(folder: Path) -> str:
    """Each way's milliseconds, of both passes, and how many times the usual way's they are."""
    result, cells = load("same_bits", folder), dict[str, dict[str, float]]()
    for row in result["results"]:
        if "forward_ms" in row:
            both = both_ms(row)
            cells.setdefault(str(Case.of(row)), {})[row["way"]] = both
    rows: list[list[str]] = []
    for case, times in cells.items():
        rows.append([case, f"{times['ours, Triton']:.2f}"])
        for way, usual in SAME_BITS:
            share = "" if way == usual else f" ({times[way] / times[usual]:.2f} x)" if way in times else ""
            rows[-1] += [f"{times[way]:.2f}{share}" if way in times else ""]
    header = ["ms", "ours as usual", "ours, same bits", "the textbook", "torch, one list of tiles"]
    return "\n".join([*table([*header, "torchtitan, tiles of 16"], rows), "", made_with(result)])


SAME_BITS = (
    ("ours, Triton, same bits", "ours, Triton"),
    ("the textbook", "the textbook"),
    ("the textbook, one list of tiles", "the textbook"),
    ("the textbook, torchtitan's tiles of 16", "the textbook"),
)


def decode_same_bits_table(folder: Path) -> str:
    result, rows = load("decode_same_bits", folder), []
    for usual, same in zip(result["results"][::2], result["results"][1::2], strict=True):
        share = f"{same['ms']:.3f} ({same['ms'] / usual['ms']:.2f} x)" if "ms" in same else ""
        rows.append([str(Step.of(usual)), f"{usual['ms']:.3f}", share])
    return "\n".join([*table(["ms", "ours as usual", "ours, same bits"], rows), "", made_with(result)])


def step_table(folder: Path) -> str:
    """A training step: thousands of real tokens a second, and GiB at the peak."""
    result, rows, sizes = load("step", folder), [], list[str]()
    for row in result["results"]:
        sizes = [f"{step['batch_size']} x {spaced(step['length'])}" for step in row["steps"]] or sizes
        cells = [
            f"{step['tokens_per_s'] / 1e3:.0f} ({step.get('peak_mib', 0) / 1024:.1f})"
            for step in row["steps"]
        ]
        rows.append([row["way"], *cells])
    return "\n".join([*table(["thousand tokens a second (GiB)", *sizes], rows), "", made_with(result)])


def readme_step(folder: Path) -> str:
    """The speed of each way at the first and the last size."""
    ways = {"SDPA": "padded, SDPA is_causal", "this file": "padded, ours", "packed rows": "packed, ours"}
    steps = {row["way"]: row["steps"] for row in load("step", folder)["results"]}
    rates = {name: [f"{step['tokens_per_s'] / 1e3:.0f}" for step in steps[way]] for name, way in ways.items()}
    return ", ".join(f"{' / '.join(rate)} ({name})" for name, rate in rates.items())


def transformers_table(folder: Path) -> str:
    """The first round, and the median of the later ones at each length."""
    result = load("transformers", folder)
    factors, rows = list(dict.fromkeys(ROUNDS)), []
    for row in result["results"]:
        name = f"{row['model']}: {row['way']}"
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


def packed_table(folder: Path) -> str:
    """The mask and a training step of the last batch, and all ten batches from a cold start."""
    result, rows = load("packed", folder), []
    for row in result["results"]:
        cells = [f"stopped after {row.get('stopped_after_s', 0):.0f} s"]
        if "total_s" in row:
            last = row["steps"][-1]
            cells = [
                f"{last[f'{what}_ms'][1]:.{digits}f} ms, {last.get(f'{what}_mib', 0):.0f} MiB"
                for what, digits in (("mask", 2), ("step", 0))
            ]
            cells += [f"{row['total_s']:.1f} s", f"{row['compilations']}"]
        rows.append([row["way"], *cells])
    header = ["", "mask", "training step", "ten batches, from cold", "compilations"]
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
        of_step = cells.setdefault(Step.of(row), {"limit": f"{row['limit_ms']:.3f}"})
        of_step[row["way"]] = f"{row['ms']:.3f} ({row['host_ms']:.2f})" if "ms" in row else ""
    measured = dict.fromkeys(row["way"] for row in result["results"])
    ways = ["limit", *(way for way in measured if way != "block mask"), "block mask"]
    rows = [[str(step), *(row.get(way, "") for way in ways)] for step, row in cells.items()]
    header = ["ms (host ms)", *ways[:-1], "our block mask, once for all layers"]
    return "\n".join([*table(header, rows), "", made_with(result)])


def readme_need(folder: Path) -> str:
    """Both passes of each way in four cases. The textbook was timed in another run, beside "ours, auto"."""
    result, other = load("attention", folder), load("need", folder)
    cases = [SMALL, LARGE, replace(SMALL, head_dim=64), replace(SMALL, side="left")]
    rows = []
    for name, way in NEEDED.items():
        run = other if way == "the textbook" else result
        of_way = {Case.of(row): row for row in run["results"] if row["way"] == way}
        cells = [
            "wrong" if "not_measured" in of_way[case] else f"{both_ms(of_way[case]):.2f}" for case in cases
        ]
        rows.append([name, *cells])
    again = {Case.of(row): row for row in other["results"] if row["way"] == "ours, auto"}
    beside = ", ".join(f"{both_ms(again[case]):.2f}" for case in cases)
    header = ["ms", "8 x 4 096", "4 x 16 384", "8 x 4 096, heads of 64", "8 x 4 096, left padding"]
    made = f"{made_with(result)[:-1]}. The textbook is of another run, in which flash-attn-4 took {beside}.)"
    return "\n".join([*table(header, rows), "", made])


def both_ms(row: Row) -> float:
    return row["forward_ms"][1] + row["backward_ms"][1]


NEEDED = {
    "this file, as installed (Triton)": "ours, Triton",
    "this file with flash-attn-4": "ours, auto",
    "the textbook": "the textbook",
    "SDPA, `is_causal`": "SDPA, is_causal, cuDNN, computes the padding",
    "SDPA, explicit mask": "SDPA, explicit mask, cuDNN",
    "FlashAttention-4 varlen, already packed": "FlashAttention-4 varlen, already packed",
    "`cudnn.flex_attention`": "cudnn.flex_attention",
}


def readme_decode(folder: Path) -> str:
    """The first step of the table, on the device and on the host."""
    mask, ours, sdpa = load("decode", folder)["results"][:3]
    text = f"{ours['ms']:.3f} ms, {mask['ms']:.3f} ms for its mask, and {sdpa['ms']:.3f} ms with SDPA"
    host = f"{ours['host_ms']:.2f}, {mask['host_ms']:.2f} and {sdpa['host_ms']:.2f} ms"
    return f"{text}, on the device; on the host {host}"


def readme_mask_figures(folder: Path) -> str:
    """Of 8 x 4096: two ways."""
    rows = {
        (row["batch_size"], row["kv_len"], row["way"]): row for row in load("block_mask", folder)["results"]
    }
    ours, theirs = (rows[8, 4096, way] for way in ("closed form", "create_block_mask"))
    both = [f"{row['ms']:.2f} ms and {row['peak_mib']:.1f} MiB" for row in (ours, theirs)]
    return f"{both[0]}, where `create_block_mask` takes {both[1]}"


def generate_table(folder: Path) -> str:
    """Tokens a second, the median of all rounds but the first, which compiles; and that round's seconds."""
    result, cells = load("generate", folder), dict[str, dict[str, str]]()
    for row in result["results"]:
        cell = f"stopped after {row.get('stopped_after_s', 0):.0f} s"
        if "total_s" in row:
            first, *others = row["steps"]
            rate = statistics.median(step["tokens"] / step["seconds"] for step in others)
            cell = f"{rate:.0f} ({first['seconds']:.0f} s)"
        cells.setdefault(f"{row['model']}: {row['way']}", {})[row["cache"]] = cell
    rows = [[way, *(row.get(cache, "") for cache in CACHES)] for way, row in cells.items()]
    header = ["tokens a second (first round)", *(f"{cache} cache" for cache in CACHES)]
    return "\n".join([*table(header, rows), "", made_with(result)])


def first_step_table(folder: Path) -> str:
    result = load("first_step", folder)
    rows = [[row["way"], f"{row['total_s']:.1f} s"] for row in result["results"]]
    return "\n".join([*table(["of another process", "first training step"], rows), "", made_with(result)])


def small_table(folder: Path) -> str:
    result = load("small", folder)
    modes = list(dict.fromkeys(row["mode"] for row in result["results"]))
    cells: dict[str, list[str]] = {}
    for row in result["results"]:
        cells.setdefault(row["way"], [row["way"]]).append(f"{row['ms'][1]:.2f}")
    return "\n".join([*table(["ms", *modes], list(cells.values())), "", made_with(result)])


TABLES = {
    "decode": decode_table,
    "block-mask": block_mask_table,
    "stream": stream_table,
    "attention": attention_table,
    "scaling": scaling_table,
    "need": lambda folder: window_table(folder, "need"),
    "same-bits": same_bits_table,
    "decode-same-bits": decode_same_bits_table,
    "step": step_table,
    "transformers": transformers_table,
    "packed": packed_table,
    "window": window_table,
    "documents": lambda folder: window_table(folder, "documents"),
    "generate": generate_table,
    "first-step": first_step_table,
    "small": small_table,
    "readme-decode": readme_decode,
    "readme-need": readme_need,
    "readme-step": readme_step,
    "readme-mask-figures": readme_mask_figures,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("which", choices=TABLES)
    args = parser.parse_args()
    print(TABLES[args.which](args.results))


if __name__ == "__main__":
    main()
