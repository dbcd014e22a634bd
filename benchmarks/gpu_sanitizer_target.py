"""A small end-to-end decode with pages swapped at every window, for compute-sanitizer.

Two sessions of different lengths read, decode in one batch through several windows whose copies overlap with decoding,
and save and reopen; then the store is checked. Exits with an error if anything is wrong. `benchmarks.gpu_checks` runs
it under both tools; by hand:

compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.gpu_sanitizer_target
compute-sanitizer --tool racecheck --error-exitcode 9 python -m benchmarks.gpu_sanitizer_target
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from flashmem import Engine, LSAConfig
from flashmem.backbone import random_model


def run(device: str, kv_format: str, steps: int) -> int:
    """Decode `steps` tokens; returns the pages that were copied to the device."""
    model = random_model("WCHC", seed=1).to(device)
    config = LSAConfig(
        policy="random", keep=0.3, page_chunks=4, tau=6, lead=3, kv_format=kv_format, prefill_chunk=100,
        device_budget_bytes=1 << 20, max_sessions=2,
    )  # fmt: skip
    engine = Engine(model, config=config)
    sessions = [engine.session(), engine.session()]
    generator = torch.Generator().manual_seed(0)
    for session, length in zip(sessions, (300, 130), strict=True):
        session.append(torch.randint(0, 256, (length,), generator=generator).tolist())
    for _ in range(steps):
        logits = engine.decode(sessions, [int(session.next_logits.argmax()) for session in sessions])
        assert bool(torch.isfinite(logits).all())
    engine.check()
    moved = sum(session.pages.traffic.pages_to_device for session in sessions)
    with tempfile.TemporaryDirectory() as directory:
        sessions[0].save(Path(directory) / "a.mem")
        sessions[0].close()
        with engine.open(Path(directory) / "a.mem") as reopened:
            reopened.generate(max_new_tokens=4)
            engine.check()
    engine.close()
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kv-formats", nargs="+", choices=("auto", "fp8"), default=["auto", "fp8"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kv_format in args.kv_formats:
        moved = run(args.device, kv_format, args.steps)
        assert moved > 0, "nothing was swapped"
        print(f"{kv_format}: {moved} pages copied to the device")


if __name__ == "__main__":
    main()
