"""How the benchmarks measure: in turn, by medians, memory in fresh processes; and where they keep
what they saw."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results of the benchmarks

Ratios are medians over rounds in which the rivals take turns, with their range.
"""


def seconds(rivals: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each rival in each round: A B C, A B C, …, so that a machine's moods meet all
    alike."""
    for run in rivals.values():
        run()  # warm-up
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            synchronise()
            started = time.perf_counter()
            run()
            synchronise()
            taken[name].append(time.perf_counter() - started)
    return taken


def ratio(taken: dict[str, list[float]], of: str, to: str) -> str:
    """Median over rounds of the ratio within a round, and its range."""
    ratios = [a / b for a, b in zip(taken[of], taken[to])]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib() -> float:
    """The largest resident size so far of this process; what `getrusage` tells counts its parent's,
    too."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def in_fresh_process(module: str, *arguments: str) -> str:
    """The last line that `python -m module arguments` prints."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    printed = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    return printed.strip().splitlines()[-1]


def machine() -> str:
    """Processor, threads, device and torch."""
    model = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model} ({capability}), {torch.get_num_threads()} threads, {device}, torch {torch.__version__}"


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keep(name: str, command: str, body: str) -> None:
    """Print a section and put it into RESULTS.md, in place of an earlier one of this name."""
    facts = f"`{command}`, commit {commit()}, {datetime.date.today()}, {machine()}."
    section = f"## {name}\n\n{facts}\n\n{body.strip()}\n"
    print(section)
    text = RESULTS.read_text() if RESULTS.exists() else HEAD
    pattern = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = pattern.sub("", text).rstrip() + "\n\n" + section
    RESULTS.write_text(text)


def run_parts(parts: Mapping[str, Callable[[], None]], asked: Sequence[str]) -> None:
    """Run the parts asked for, or all. Exits with one line where one is unknown."""
    unknown = [name for name in asked if name not in parts]
    if unknown:
        sys.exit(f"error: {unknown[0]}: the parts are {', '.join(parts)}")
    for name in asked or parts:
        parts[name]()
