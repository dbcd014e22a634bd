"""Compile every variant of the fused kernels for Hopper without a GPU, and read what the compiler says of each.

Registers and stack bytes come from the machine code's resource table, spills and matrix instructions from its
disassembly. The kernels are compiled by the code that launches them, on tensors without memory.

python -m benchmarks.kernel_resources --out results/kernel_resources.json
"""

from __future__ import annotations

import sys

import triton

from benchmarks import common
from flashmem.bench.kernel_resources import CompileOnly, compiled_kernels, resources, variants


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="only variants that contain one of these"
    )
    args = parser.parse_args()
    started = common.machine()
    triton.runtime.driver.set_active(CompileOnly())
    rows = []
    for name, launch in variants():
        if any(text in name for text in args.only):
            for kernel, compiled in compiled_kernels(launch):
                rows.append({"variant": name, "kernel": kernel, **resources(compiled)})
                row = rows[-1]
                common.log(
                    f"{name:60} {kernel:16} registers {row['registers']:3} stack {row['stack_bytes']:4} "
                    f"shared {row['shared_bytes']:6} programs {row['programs_per_multiprocessor']}"
                )
    common.write_result(
        args.out, "kernel_resources", {"triton": triton.__version__, "target": "sm_90", "rows": rows}, started
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
