"""What the benchmark runs on, as every stored row names it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ISA_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
}
PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class Machine:
    """One run's surroundings.

    Attributes:
        commit: of the checkout; "-dirty" with changes beyond it.
        load: how many processes wanted a CPU in the minute before; with many, timings on several threads mean little.
    """

    date: str
    commit: str
    device: str
    device_type: str
    isa: str
    threads: int
    load: float
    versions: dict[str, str]
    driver: str


def find_machine(device_type: str) -> Machine:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    driver = ""
    if device_type == "cuda":
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        driver = _output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv")
    return Machine(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=os.environ.get("COMMIT") or _commit() or "unknown",
        device=torch.cuda.get_device_name()
        if device_type == "cuda"
        else _cpu_field("model name") or platform.machine(),
        device_type=device_type,
        isa=_isa(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2),
        versions=versions,
        driver=driver,
    )


def _isa() -> str:
    flags = _cpu_field("flags").split()
    found = [name for flag, name in ISA_FLAGS.items() if flag in flags]
    return ", ".join(found) or torch.backends.cpu.get_cpu_capability()


def _cpu_field(name: str) -> str:
    """The first processor's entry in Linux's list; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        field, _, value = line.partition(":")
        if field.strip() == name:
            return value.strip()
    return ""


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and _output("git", "status", "--porcelain", "--untracked-files=no") else commit


def _output(*command: str) -> str:
    """What a program prints; empty where there is none such, or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def default_folder(machine: Machine, suffix: str = "") -> Path:
    """``benchmarks/results/local/<date>-<device>``, which git ignores."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", machine.device).strip("-")
    return ROOT / "benchmarks" / "results" / "local" / f"{machine.date[:10]}-{device}{suffix}"
