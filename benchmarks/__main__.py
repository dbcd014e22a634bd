"""The benchmarks that need neither a GPU nor a model directory, one after the other; results go to `results/`.

python -m benchmarks
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT, log

PROGRAMS = ("decode_cost", "prefill")


def main() -> int:
    for name in PROGRAMS:
        log(f"benchmarks.{name} ...")
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", f"results/{name}.json"]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
