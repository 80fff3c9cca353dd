"""How much memory a program has taken."""

from __future__ import annotations

from pathlib import Path

from qhub.events import peak_rss_bytes


def program_peak_bytes() -> int:
    """The largest resident memory of this program; getrusage would also count that of the one that started it."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return peak_rss_bytes()
