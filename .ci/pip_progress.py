"""Progress of ``pip install``, read from its output: packages of the total, time elapsed and time left.

Usage: pip install ... | pip_progress.py TOTAL. Lines of errors are passed on.
"""

import sys
import time


def main(total: int) -> None:
    """Count the packages that pip names on standard input."""
    began_s, seen = time.monotonic(), set()
    for line in sys.stdin:
        words = line.split()
        if words[:1] == ["Collecting"] or words[:2] == ["Requirement", "already"]:
            seen.add(words[1 if words[0] == "Collecting" else 3].split("==")[0].split(";")[0].lower())
            elapsed_s = time.monotonic() - began_s
            # A package beyond those of the constraints is one more, not more than all.
            share = min(len(seen) / max(total, len(seen)), 1.0)
            left_s = elapsed_s / share - elapsed_s
            show(f"{len(seen)} of {max(total, len(seen))} packages, {elapsed_s:.0f} s, about {left_s:.0f} s left")
        elif words[:1] in (["Downloading"], ["Building"], ["Installing"]):
            show(f"{words[0]} {' '.join(words[1:])[:60]}, {time.monotonic() - began_s:.0f} s")
        elif words[:1] and words[0] in ("ERROR:", "error:"):
            print(f"\n{line}", end="")
    print(f"\rInstalled in {time.monotonic() - began_s:.0f} s.{'':60}")


def show(text: str) -> None:
    """One line that is overwritten on a terminal; nothing elsewhere, where each would be one more line of a log."""
    if sys.stdout.isatty():
        print(f"\r{text:<79}", end="", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
