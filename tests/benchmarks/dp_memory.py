"""Peak memory of one variant's training step above what its process held before it, in MB; one process a variant.

``python -m tests.benchmarks.dp_memory "all, private"``: started by dp_step.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.benchmarks.dp_variants import Size, build

STEPS = 3


def main(name: str) -> None:
    """Measure and print."""
    torch.set_num_threads(2)
    step = build(name, Size())
    # Makes VmHWM start again from what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    for _ in range(STEPS):
        step()
    print((_resident("VmHWM") - before) / 1024)


def _resident(entry: str) -> int:
    """In KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


if __name__ == "__main__":
    main(sys.argv[1])
