"""Options that several commands share, and the one place where they become an engine.

`with_options` gives a command the fields of `EngineOptions` or `GenerateOptions` as command-line options, so that each
option is written once. A field that is None was not given; the default is then the model's (`ModelDefaults`), or the
dataclass's that it ends in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

import flashmem

from ..accounting.models import DEMO, shipped_model
from ..config import LSAConfig, ModelDefaults, check_sampling
from .output import log
from .sizes import parse_bytes

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Raw = Annotated[bool, typer.Option("--raw", help="Pass the text as it is, not in the model's form of asking.")]

_BASE = LSAConfig()
_LSA = "Lookahead Sparse Attention (a model's flashmem.json may have other defaults)"
_IDENTITY = ("page_chunks", "kv_format", "observation_window")  # what an engine must share with a memory


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _lsa(default: Any, text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_LSA, show_default=str(default), **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How a command loads its model."""

    model: Annotated[str, typer.Option(help="Model directory, hub name or flashmem-demo.")] = DEMO
    indexer: Annotated[
        str | None,
        typer.Option(help="Memory Indexer: a directory, .safetensors or .pt.", show_default="the model's own"),
    ] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="cuda if there is one")] = (
        None
    )
    device_map: Annotated[
        str | None, typer.Option(help="'auto' spreads the layers over all GPUs.", show_default="one device")
    ] = None
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(help="Type of the weights.")] = "auto"
    policy: Annotated[
        str | None, _lsa(_BASE.policy, "What stays on the device: lsa, all, recency, random, carry-over or native.")
    ] = None
    keep: Annotated[float | None, _lsa("threshold rule", "Fixed budget: share of all pages on the device.")] = None
    threshold: Annotated[float | None, _lsa(_BASE.threshold, "A chunk is wanted above this probability.")] = None
    page_chunks: Annotated[int | None, _lsa(_BASE.page_chunks, "Chunks of 4 tokens per page, a power of two.")] = None
    sink_pages: Annotated[int | None, _lsa(_BASE.sink_pages, "First pages, always kept.")] = None
    recency_pages: Annotated[int | None, _lsa(_BASE.recency_pages, "Last pages, always kept.")] = None
    tau: Annotated[int | None, _lsa(_BASE.tau, "Decode steps per cycle.")] = None
    observation_window: Annotated[int | None, _lsa("the indexer's", "Last tokens that level 1 reads.")] = None
    ensemble: Annotated[
        Literal["max", "mean"] | None, _lsa("the indexer's", "How logits of layers and observed tokens combine.")
    ] = None
    rescue: Annotated[
        bool, typer.Option("--rescue", help="Widen a selection seen to be too small.", rich_help_panel=_LSA)
    ] = False
    kv_format: Annotated[
        Literal["auto", "fp32", "bf16", "fp8"] | None, _lsa(_BASE.kv_format, "Format of the records; auto is exact.")
    ] = None
    prefill_chunk: Annotated[int | None, _lsa(_BASE.prefill_chunk, "Tokens per prefill forward.")] = None
    kernels: Annotated[
        Literal["reference", "fused"] | None,
        _lsa(_BASE.kernels, "What decoding runs on: PyTorch, or Triton on pages in place (needs CUDA)."),
    ] = None
    prefill_kernels: Annotated[
        Literal["reference", "fused"] | None,
        _lsa(_BASE.prefill_kernels, "What prefill runs on: PyTorch, or Triton on rows in place (needs CUDA)."),
    ] = None
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay captured decode steps.", rich_help_panel=_LSA)
    ] = False
    device_budget: Annotated[
        int | None, _lsa("as needed", "Bytes of the device pool, e.g. 8GiB.", parser=_bytes, metavar="BYTES")
    ] = None
    host_budget: Annotated[
        int | None, _lsa("as needed", "Bytes of the host mirror, e.g. 64GiB.", parser=_bytes, metavar="BYTES")
    ] = None
    disk_budget: Annotated[int | None, _lsa("none", "Bytes of the disk tier.", parser=_bytes, metavar="BYTES")] = None
    disk_path: Annotated[str | None, _lsa("no disk tier", "Directory of the disk tier.")] = None
    history_budget: Annotated[
        int | None,
        _lsa(
            "half of what is free",
            "Bytes of the device that hold the history in a prefill.",
            parser=_bytes,
            metavar="BYTES",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of sampling and of the random policy.")] = 0

    def config(self, memory: Mapping[str, Any] | None = None) -> LSAConfig:
        """The settings; what is not given comes from a memory's manifest, where one must fit, or from the model."""
        given = {
            "policy": self.policy,
            "keep": self.keep,
            "threshold": self.threshold,
            "page_chunks": self.page_chunks,
            "sink_pages": self.sink_pages,
            "recency_pages": self.recency_pages,
            "tau": self.tau,
            "observation_window": self.observation_window,
            "ensemble": self.ensemble,
            "rescue": self.rescue or None,
            "kv_format": self.kv_format,
            "prefill_chunk": self.prefill_chunk,
            "kernels": self.kernels,
            "prefill_kernels": self.prefill_kernels,
            "cuda_graphs": self.cuda_graphs or None,
            "device_budget_bytes": self.device_budget,
            "host_budget_bytes": self.host_budget,
            "disk_budget_bytes": self.disk_budget,
            "disk_path": self.disk_path,
            "history_budget_bytes": self.history_budget,
            "seed": self.seed,
        }
        saved = {name: memory.get(name) for name in _IDENTITY} if memory is not None else {}
        return self.defaults().config(**saved | {name: value for name, value in given.items() if value is not None})

    def defaults(self) -> ModelDefaults:
        """What the model says about its own use."""
        return ModelDefaults.of(self.directory)

    @property
    def directory(self) -> str:
        return str(shipped_model()) if self.model == DEMO else self.model

    def engine(self, memory: Mapping[str, Any] | None = None) -> flashmem.Engine:
        """Load the model. Raises ValueError, OSError or BudgetError for what cannot be."""
        config = self.config(memory)
        dtype: Any = memory.get("dtype") if memory is not None and self.dtype == "auto" else self.dtype
        log(f"loading {self.model}")
        return flashmem.Engine.from_pretrained(
            self.directory,
            indexer=self.indexer,
            config=config,
            device=self.device,
            device_map=self.device_map,
            dtype=dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """How a command decodes."""

    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this probability.")] = 1.0

    def __post_init__(self) -> None:
        check_sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)

    def sampling(self, seed: int) -> dict[str, Any]:
        """Arguments of `Session.generate`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed,
        }


Command = TypeVar("Command", bound=Callable[..., None])


def with_options(run: Command) -> Command:
    """Replace every parameter of an options class by one command-line option per field."""
    hints = get_type_hints(run, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in (EngineOptions, GenerateOptions)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        if name in groups:
            parameters += _field_parameters(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def command(**values: Any) -> None:
        made = {
            name: group(**{item.name: values.pop(item.name) for item in fields(group)})
            for name, group in groups.items()
        }
        run(**made, **values)

    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command  # type: ignore[return-value]


def _field_parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    assert all(get_origin(hint) is Annotated and get_args(hint) for hint in hints.values())
    return [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=hints[item.name])
        for item in fields(group)
    ]


def read_text(source: str) -> str:
    """A file's text; '-' is stdin. Raises OSError, or ValueError for what is not UTF-8."""
    if source == "-":
        return typer.get_text_stream("stdin").read()
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from error


__all__ = ["EngineOptions", "GenerateOptions", "Json", "Raw", "read_text", "with_options"]
