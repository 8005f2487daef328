"""`python -m tests.fuzz --n 20000 --seed 0 --jobs 2`: a long run over random networks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import multiprocessing

from fuzz.run import Summary, some

_CHUNK = 40


def main() -> int:
    """Run, print, and give the exit code: 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="networks")
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others follow it")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--onnx-every", type=int, default=30, help="networks for each that is exported")
    parser.add_argument("--shrink", type=float, default=90.0, help="seconds to make a failing program small")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="folder of failing programs")
    chosen = parser.parse_args()
    last = chosen.seed + chosen.n
    print(f"seeds {chosen.seed} to {last - 1}", flush=True)
    total = Summary()
    chunks = [
        (range(first, min(last, first + _CHUNK)), chosen.onnx_every, chosen.shrink)
        for first in range(chosen.seed, last, _CHUNK)
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(chosen.jobs, maxtasksperchild=5) as pool:  # torch keeps memory of what it exported
        for seeds, found in pool.imap_unordered(some, chunks):
            total.add(found)
            for seed, text in found.failures.items():
                chosen.out.mkdir(parents=True, exist_ok=True)
                path = chosen.out / f"seed_{seed}.py"
                path.write_text(text)
                print(f"seed {seed} fails, see {path}: {text.splitlines()[1][2:]}", flush=True)
            counts = total.counts
            print(
                f"seeds {seeds.start} to {seeds.stop - 1}: {counts['networks']} of {chosen.n} networks, "
                f"{counts['failed']} failed, {counts['not captured']} not captured",
                flush=True,
            )
    print(f"seeds {chosen.seed} to {last - 1}: {total}")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
