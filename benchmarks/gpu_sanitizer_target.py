"""What compute-sanitizer looks at: the page store alone, then a very small engine that decodes.

`store` writes, commits, evicts, reads history, prefetches late, flips, saves and opens, with a few hundred launches and
without transformers. `decode` runs a model of one CSA layer for a few tokens, through windows whose pages are swapped;
`fused` does so on the fused kernels. Each line says how many seconds have passed, so that a run which is cut tells
where its time went. The program ends with an error if anything is wrong. `benchmarks.gpu_checks` runs every part under
both tools; by hand:

compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.gpu_sanitizer_target store
compute-sanitizer --tool racecheck --error-exitcode 9 python -m benchmarks.gpu_sanitizer_target decode
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch

from flashmem.config import KVFormat, ModelGeometry, RopeConfig
from flashmem.memory import open_memory, save_memory
from flashmem.store import PageStore, RecordLayout, SessionPages

PAGE = 4
LATE_CYCLES = 5_000_000  # a few milliseconds
STARTED = time.monotonic()


def tell(what: str) -> None:
    """One line of progress, out at once."""
    print(f"{time.monotonic() - STARTED:7.2f} s  {what}", flush=True)


# ---- the store alone


def run_store(device: str, kv_format: KVFormat) -> int:
    """Returns the pages that were copied to the device."""
    layout = RecordLayout(
        _geometry(), page_chunks=PAGE, kv_format=kv_format, target_layers=(1,),
        device_of_layer=dict.fromkeys(range(2), torch.device(device)),
    )  # fmt: skip
    store = PageStore(
        layout, dtype=torch.float32, device_budget_bytes=12 * layout.record_bytes, host_budget_bytes=None,
        disk_path=None, disk_budget_bytes=None,
    )  # fmt: skip
    session = store.open_session()
    generator = torch.Generator().manual_seed(0)
    for chunks in (5 * PAGE, 2 * PAGE + 3):
        _write(session, chunks, generator)
    tell(f"{kv_format}: {session.num_pages} pages written, full ones copied home")
    session.evict([0, 7])
    for layer in layout.csa_layers:
        history = session.history(layer, session.num_chunks)
        ids = torch.arange(session.num_chunks, device=device)
        assert bool(torch.isfinite(history.kv(ids)).all())
        assert bool(torch.isfinite(history.keys(3, session.num_chunks)).all())
    tell(f"{kv_format}: history read through both tiers")
    for wanted in ([0, 3, 4, 7], [1, 2, 4, 6, 7]):
        with store.pool.side_stream(0):
            if torch.device(device).type == "cuda":
                torch.cuda._sleep(LATE_CYCLES)  # the copies start late
        session.prefetch(wanted)
        _read(session)
        session.flip()
        _read(session)
    tell(f"{kv_format}: late copies, two windows")
    session.prefetch([0, 7])
    session.cancel_prefetch()
    _write(session, 2, generator)  # takes a slot which the cancelled copy may still write
    store.check()
    tell(f"{kv_format}: a cancelled prefetch, the store checked")
    _save_and_open(store, session)
    store.check()
    moved = session.traffic.pages_to_device
    store.close()
    tell(f"{kv_format}: saved, opened, closed")
    return moved


def _geometry() -> ModelGeometry:
    return ModelGeometry(
        layer_kinds=("csa", "csa"), hidden_size=32, vocab_size=64, num_heads=2, head_dim=70, q_lora_rank=16,
        o_groups=1, o_lora_rank=16, sliding_window=8, csa_ratio=4, hca_ratio=128, index_heads=2, index_head_dim=12,
        index_topk=8, compress_rope=RopeConfig(theta=1e4, dim=4), rms_norm_eps=1e-6, hc_mult=1,
        moe_intermediate_size=16, num_experts=2, num_experts_per_token=1, num_shared_experts=1, max_positions=1 << 20,
    )  # fmt: skip


def _write(session: SessionPages, chunks: int, generator: torch.Generator) -> None:
    """Random entries of every layer, as a prefill forward writes them."""
    layout = session.store.layout
    session.reserve(chunks)
    for layer in layout.csa_layers:
        kv = torch.randn(chunks, layout.kv_spec.head_dim, generator=generator)
        keys = torch.randn(chunks, layout.index_head_dim, generator=generator)
        session.write(layer, kv.to(layout.device_of(layer)), keys.to(layout.device_of(layer)))
    session.commit(chunks)


def _read(session: SessionPages) -> None:
    """As a decode step reads: keys of the resident pages, and entries by flat indices."""
    batch = session.store.batch([session])
    batch.begin([session.num_chunks])
    for layer in session.store.layout.csa_layers:
        there = batch.chunk_ids(layer)[0] >= 0
        picks = there.nonzero().T
        assert bool(torch.isfinite(batch.kv(layer, picks)).all())
        assert bool(torch.isfinite(batch.keys(layer)[0].flatten(0, 1)[there]).all())


def _save_and_open(store: PageStore, session: SessionPages) -> None:
    layout = store.layout
    rows = {layer: session.index_rows(layer).cpu() for layer in layout.target_layers}
    values = {"position": 4 * session.num_chunks, "num_chunks": session.num_chunks, "policy": "recency"}
    values |= {"settings": {}, "cycle": {}}
    with tempfile.TemporaryDirectory() as directory:
        records = (record for _, record in session.export_pages())
        save_memory(Path(directory) / "a.mem", values, {}, records, session.num_pages, layout.record_bytes)
        opened = store.open_session()
        opened.import_saved(open_memory(Path(directory) / "a.mem").records, session.num_chunks, rows)
        opened.prefetch([0, 2, opened.num_pages - 1])
        opened.flip()
        _read(opened)
        opened.close()


# ---- a very small engine


def run_decode(device: str, kv_format: KVFormat, steps: int, kernels: Literal["reference", "fused"]) -> int:
    """Decode `steps` tokens in a batch of two; returns the pages that were copied to the device."""
    from flashmem import Engine, LSAConfig  # transformers is behind these: not in the other part
    from flashmem.backbone import random_model

    model = random_model(
        "C", seed=1, vocab_size=64, hidden_size=32, num_attention_heads=2, o_groups=1, hc_mult=1, hc_sinkhorn_iters=1,
        n_routed_experts=2, num_experts_per_tok=1, index_n_heads=4, sliding_window=8, bos_token_id=None,
        eos_token_id=None,
    ).to(device)  # fmt: skip
    tell(f"{kv_format}: model of one CSA layer")
    config = LSAConfig(
        policy="random", keep=0.4, sink_pages=0, recency_pages=1, page_chunks=PAGE, tau=4, lead=2,
        kv_format="fp8" if kv_format == "fp8" else "auto", device_budget_bytes=1 << 20, max_sessions=2,
        kernels=kernels,
    )  # fmt: skip
    engine = Engine(model, config=config)
    sessions = [engine.session(), engine.session()]
    generator = torch.Generator().manual_seed(0)
    for session, length in zip(sessions, (130, 70), strict=True):
        session.append(torch.randint(0, 64, (length,), generator=generator).tolist())
    tell(f"{kv_format}: two prompts read")
    for step in range(steps):
        logits = engine.decode(sessions, [step, step + 1])
        assert bool(torch.isfinite(logits).all())
        tell(f"{kv_format}: step {step + 1} of {steps}")
    engine.check()
    moved = sum(session.pages.traffic.pages_to_device for session in sessions)
    engine.close()
    tell(f"{kv_format}: checked and closed")
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("store", "decode", "fused"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=9, help="of decode; a window is four")
    parser.add_argument("--kv-formats", nargs="+", choices=("fp32", "fp8"), help="store: both, else fp8")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tell("imported")
    torch.zeros(1, device=args.device)
    tell(f"{args.device} is up")
    for kv_format in args.kv_formats or (("fp32", "fp8") if args.part == "store" else ("fp8",)):
        if args.part == "store":
            moved = run_store(args.device, kv_format)
        else:
            kernels: Literal["reference", "fused"] = "fused" if args.part == "fused" else "reference"
            moved = run_decode(args.device, kv_format, args.steps, kernels)
        assert moved > 0, "nothing was swapped"
        tell(f"{kv_format}: {moved} pages copied to the device")


if __name__ == "__main__":
    main()
