"""`flashmem train`: shards become a Memory Indexer; no backbone is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json
from .output import answer, answer_json, log


def add_command(app: typer.Typer) -> None:
    app.command("train")(run)


def run(
    shards: Annotated[list[Path], typer.Argument(help="Directories written by flashmem capture.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML with training settings.", show_default="our losses, native start")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One setting; wins over the file; may be given often."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Start from the settings 'ours' or 'published'.")] = "ours",
    start: Annotated[
        Path | None, typer.Option(help="Memory Indexer to start from.", show_default="native, in the shards")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the checkpoint that is there.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there is a GPU.")] = False,
    json: Json = False,
) -> None:
    """Train a Memory Indexer from shards, and write it to OUTPUT/indexer.

    Several processes: `accelerate launch -m flashmem train ...`. Settings: docs/guides/train.md.

    Example: `flashmem train shards -o run --set observe=16 --set epochs=10`
    """
    import yaml

    from ..capture.format import ShardReader  # seconds of torch: after the arguments are parsed
    from ..indexer import MemoryIndexer
    from ..training.config import TrainConfig
    from ..training.loop import INDEXER, LOG, Trainer

    changes: dict[str, Any] = {}
    for text in set_ or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"a setting is given as name=value, got {text!r}")
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}={value} is not YAML") from error
    if recipe not in ("ours", "published"):
        raise ValueError(f"recipe must be 'ours' or 'published', got {recipe!r}")
    base = TrainConfig.published().to_mapping() if recipe == "published" else {}
    made = TrainConfig.from_mapping(base | ({} if config is None else TrainConfig.read(config)) | changes)
    reader = ShardReader(*shards)
    begin = MemoryIndexer.from_pretrained(reader.directory / "native" if start is None else start)
    trainer = Trainer(reader, begin, made, output, cpu=cpu)
    if resume:
        trainer.resume()
        if trainer.accelerator.is_main_process:
            log(f"resumed at step {trainer.step} of {trainer.total_steps}")
    elif (output / LOG).exists():
        raise ValueError(f"{output} holds a run already; resume it with --resume or choose another directory")
    last: dict[str, Any] = {}

    def tell(row: Mapping[str, Any]) -> None:
        last.update(row)
        pace = f"{row['seconds_per_step']:.2f} s a step"
        log(f"step {row['step']} of {trainer.total_steps}: loss {row['loss']:.4f}, {pace}")

    trainer.train(on_row=tell)
    if not trainer.accelerator.is_main_process:
        return
    result = {"indexer": str(output / INDEXER), "steps": trainer.step, "loss": last.get("loss"),
              "fingerprint": trainer.indexer.fingerprint()}  # fmt: skip
    if json:
        answer_json(result)
    else:
        answer(f"{result['indexer']}  {trainer.step} steps")


__all__ = ["add_command"]
