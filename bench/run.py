"""Run the benchmarks: `python bench/run.py --suite attention|triplet|evaluation|loader|step|gallery|all|peers`.

Prints one table per suite. --record keeps the numbers beside the digest of the sources they belong to, --report shows
all that were kept and which of them are stale.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.machine import ROOT, machine
from bench.timing import Case, Measurement, Settings, Work, WrongResultError, measure

SUITES = ("attention", "triplet", "evaluation", "loader", "step", "gallery")
PEERS = "peers"  # runs other tools, which are not ours to install: not one of all
RESULTS = ROOT / "bench/results"
SECONDS_PER_CASE = 8.0
H200 = Ceilings(bytes_per_s=4.3e12, operations_per_s=790e12)
Row = dict[str, Any]

COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "shape": lambda row: row["shape"],
    "provider": lambda row: row["provider"],
    "median ms": lambda row: _number(row["median_ms"]),
    "20 % ms": lambda row: _number(row["fast_ms"]),
    "80 % ms": lambda row: _number(row["slow_ms"]),
    "95 % ms": lambda row: _number(row.get("p95_ms")),
    "warm ms": lambda row: _number(row["warm_ms"]),
    "items/s": lambda row: _number(row.get("items") and 1e3 * row["items"] / row["median_ms"]),
    "cores": lambda row: _number(row.get("cores")),
    "GB/s": lambda row: _number(row["bytes"] and row["bytes"] / row["median_ms"] * 1e-6),
    "GFLOP/s": lambda row: _number(row["operations"] and row["operations"] / row["median_ms"] * 1e-6),
    "of limit": lambda row: "" if row["limit_ms"] is None else f"{row['limit_ms'] / row['median_ms']:.0%}",
    "speed": lambda row: f"{row['speed']:.2f}x",
    "peak GiB": lambda row: _number(row["peak_gib"]),
    "mAP %": lambda row: _number(row.get("mAP") and 100 * row["mAP"]),
}
BUILD_COLUMNS: dict[str, Callable[[Row], str]] = {
    "launch": lambda row: row["launch"],
    "kernel": lambda row: row["kernel"],
    "GPU": lambda row: f"sm_{row['capability']}",
    "warps": lambda row: str(row["warps"]),
    "registers": lambda row: str(row["registers"]),
    "spilled": lambda row: f"{row['stack_bytes'] + row['local_bytes']} B",
    "shared": lambda row: f"{row['shared_bytes'] / 1024:.1f} KiB",
    "programs": lambda row: str(row["programs"]),
    "products": lambda row: ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items()),
    "ahead": lambda row: "" if row["wait_depth"] is None else str(row["wait_depth"]),
    "MB": lambda row: _number(row["bytes"] * 1e-6),
    "GFLOP": lambda row: _number(row["operations"] * 1e-9),
    "limit us": lambda row: _number(1e3 * (H200.limit_ms(row["bytes"], row["operations"]) or 0)),
    "predicted us": lambda row: "" if row["predicted_s"] is None else _number(1e6 * row["predicted_s"]),
}
BUILD_LEGEND = (
    "As compiled, not run. Programs: that fit a multiprocessor at once. Limit: of an ideal implementation at the real "
    "size on an H200, 4.3 TB/s in a copy and 790 TFLOP/s in a bf16 product. Ahead: copies that a loop leaves under way "
    "where it waits for one. Predicted: of the code, on an A100, H200 and B200, by bench/predict.py; never measured."
)
LEGEND = (
    "speed: against the fastest alternative. GB/s and GFLOP/s: bytes and operations of an ideal implementation over "
    "the measured time. Of limit: the time in which this machine copies those bytes or does those operations in one "
    "large product, of bf16 on a GPU and fp32 on a CPU, whichever is longer, over the measured time. 95 % ms: of a "
    "hundred calls or more. Warm ms: with a warm L2, of CUDA graphs only. Peak GiB: memory beyond the inputs, on a CPU "
    "by the resident set. Items: images; cores: kept busy, workers included."
)


def main(argv: Sequence[str] | None = None, results: Path = RESULTS) -> int:
    """Measure, record or report, as the arguments say."""
    parser = argparse.ArgumentParser(description="Time our ops against every honest alternative, in one process.")
    parser.add_argument("--suite", choices=(*SUITES, "all", PEERS))
    parser.add_argument("--record", action="store_true", help="append the numbers to bench/results")
    parser.add_argument("--report", action="store_true", help="show all recorded numbers as a markdown table")
    parser.add_argument("--compile", action="store_true", help="on a CPU too, also time compiled plain alternatives")
    parser.add_argument("--cpu", action="store_true", help="time the CPU paths although there is a GPU")
    parser.add_argument("--peers", type=Path, help="folder of the other tools' sources, of the suite peers")
    parser.add_argument("--data", type=Path, help="folder that holds Market-1501, for the suite peers")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--full", dest="size", action="store_const", const="full", help="real sizes: for a GPU")
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="tiny, to see that all works")
    args = parser.parse_args(argv)
    if not args.suite and not args.report:
        parser.error("one of --suite and --report is needed")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    gpu = device.type == "cuda"
    settings = Settings(args.size or ("full" if gpu else "default"), device, args.compile or gpu, args.peers, args.data)
    suites = SUITES if args.suite == "all" else tuple(filter(None, [args.suite]))
    ceilings = measure_ceilings(settings) if suites else Ceilings(0, 0)
    failed = False
    for suite in suites:
        rows, errors = run_suite(suite, settings, ceilings)
        for error in errors:
            failed = True
            print(f"{suite}: {error}", file=sys.stderr)
        if not rows:
            continue
        print(f"\n{suite} on {rows[0]['device']}, {rows[0]['threads']} threads\n{table(rows, COLUMNS)}", flush=True)
        if args.record:
            record(rows, results)
        if not gpu and args.size != "quick" and (built := builds(suite)):
            print(f"\n{table(built, BUILD_COLUMNS)}\n\n{BUILD_LEGEND}", flush=True)
    if args.suite:
        print(f"\n{LEGEND}")
    if args.report:
        print(report(results))
    return int(failed)


def run_suite(suite: str, settings: Settings, ceilings: Ceilings) -> tuple[list[Row], list[Exception]]:
    """Measure all cases of a suite; return the rows, and the errors of cases that failed, which stop no other."""
    module = import_module(f"bench.suite_{suite}")
    cases: list[Case] = module.cases(settings)
    stamp = {
        "suite": suite,
        "size": settings.size,
        **machine(settings.device),
        "digest": digest(suite),
        **vars(ceilings),
    }
    rows: list[Row] = []
    errors: list[Exception] = []
    for case in cases:
        try:
            work, measured = getattr(module, "measure", measure)(case, settings, SECONDS_PER_CASE)
        except (WrongResultError, torch.OutOfMemoryError) as error:
            errors.append(error)
            continue
        limit_ms = ceilings.limit_ms(work.bytes_moved, work.operations)
        rows += _rows(stamp | {"limit_ms": limit_ms}, case, work, measured)
    return rows, errors


def _rows(stamp: Row, case: Case, work: Work, measured: Sequence[Measurement]) -> list[Row]:
    best = min(m.median_ms for m in measured[1:])  # the first is ours
    about = {
        "case": case.name,
        "shape": case.shape,
        "bytes": work.bytes_moved,
        "operations": work.operations,
        "items": work.items,
    }
    return [{**stamp, **about, **vars(m), "speed": best / m.median_ms} for m in measured]


def builds(suite: str) -> list[Row]:
    """Compile the suite's kernels, in a process of its own, whatever this one does with Triton."""
    if not hasattr(import_module(f"bench.suite_{suite}"), "launches"):
        return []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench/builds.py"), suite]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def digest(suite: str) -> str:
    """Digest the sources under test and the suite, where their alternatives are written."""
    content = blake2b(digest_size=8)
    for pattern in patterns(suite):
        files = sorted(ROOT.glob(pattern))
        if not files:
            raise FileNotFoundError(f"suite {suite}: its sources {pattern} are no files under {ROOT}")
        for file in files:
            content.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return content.hexdigest()


def patterns(suite: str) -> tuple[str, ...]:
    """Return the patterns of the suite's source files."""
    return (
        *import_module(f"bench.suite_{suite}").SOURCES,
        f"bench/suite_{suite}.py",
        "bench/timing.py",
        "bench/peak_memory.py",
    )


def record(rows: Sequence[Row], results: Path) -> None:
    """Append rows to the records of their device."""
    folder = results / re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{rows[0]['suite']}.jsonl", "a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def report(results: Path) -> str:
    """Render all records, device by device; a record is stale once a source of its suite has changed."""
    current = {suite: digest(suite) for suite in (*SUITES, PEERS)}
    columns = COLUMNS | {
        "torch": lambda row: row["torch"],
        "commit": lambda row: row["commit"],
        "date": lambda row: row["date"],
        "state": lambda row: "current" if row["digest"] == current.get(row["suite"]) else "**stale**",
    }
    parts = []
    for path in sorted(results.glob("*/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        parts.append(f"## {path.stem} on {rows[0]['device']}\n\n{table(rows, columns)}")
    return "\n\n".join([*parts, LEGEND]) if parts else f"nothing is recorded in {results}"


def table(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    """Render rows in Markdown, aligned to be read as it is."""
    cells = [list(columns), *([column(row) for column in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
