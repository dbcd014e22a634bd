"""How long `flashmem demo` takes here, from the start of reading, and what it answers.

python -m benchmarks.demo_time --threads 1 --out results/demo.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

LIMIT_SECONDS = 180
"""From the start of reading to the last answer, on two cores."""


def measure(threads: int, context: str) -> dict[str, Any]:
    """Run the command once in a process of its own."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        command = ["demo", "--context", context, "--picture", str(Path(directory) / "demo.png"), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "flashmem", *command], capture_output=True, text=True, check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    told = json.loads(done.stdout)
    kept = ("context_tokens", "seed", "keep", "page_chunks", "read_seconds", "ask_seconds", "right", "exactness")
    seconds = told["read_seconds"] + told["ask_seconds"]
    return {name: told[name] for name in kept} | {
        "questions": len(told["questions"]),
        "seconds_from_reading": round(seconds, 1),
        "seconds_of_the_command": round(time.perf_counter() - started, 1),
        "limit_seconds": LIMIT_SECONDS,
        "within_limit": seconds <= LIMIT_SECONDS,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--context", default="16K")
    args = parser.parse_args()
    started = common.machine()
    common.write_result(args.out, "demo_time", measure(args.threads, args.context), started)


if __name__ == "__main__":
    main()
