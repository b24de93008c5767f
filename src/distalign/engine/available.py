"""Memory that is free on a device, as far as the system tells; and how much more than asked for a process takes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

# glibc keeps blocks below 32 MB in a heap with gaps. A micro-batch took 1.1 to 2.5 times what torch asked for in it.
_GAPS = 1.5
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def spread(device: torch.device) -> float:
    """How many bytes a process takes for a byte of a micro-batch: 1.5 in glibc's heap as it comes, else 1."""
    heap = device.type == "cpu" and platform.libc_ver()[0] == "glibc" and not any(map(os.environ.get, _SETTINGS))
    return _GAPS if heap else 1.0


def available(device: torch.device, *, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on `device`; None where that is not known.

    An accelerator's free memory and what torch's cache holds unused; on a CPU what the kernel calls available, or what
    the control group leaves of its limit (versions 1 and 2) if that is less. `root` is where /proc and /sys are.
    """
    if device.type == "cpu":
        limits = [_machine(root), *_groups(root)]
        return min((limit for limit in limits if limit is not None), default=None)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def _machine(root: Path) -> int | None:
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _groups(root: Path) -> list[int]:
    """What every control group that this process is in, and every one above, leaves of its limit."""
    own = root / "proc/self/cgroup"
    if not own.is_file():
        return []
    found: list[int] = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            left = _left(base.joinpath(*parts[:depth]), *names)
            found += [] if left is None else [left]
    return found


def _left(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """Limit − usage, file cache that can be dropped not counted; None where there is no limit."""
    # Inside a container the path of the host is not there; its own limit is at the top.
    if not (group / limit).is_file() or not (group / usage).is_file():
        return None
    most = (group / limit).read_text().strip()
    # Version 1 writes "no limit" as a number close to 2^63.
    if most == "max" or int(most) >= 2**62:
        return None
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(most) - int((group / usage).read_text()) + int(stat.get(cache, 0))
