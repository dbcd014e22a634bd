"""lm_eval's tasks on an `Engine`: the model `flashmem`, for tasks that generate.

lm_eval finds models that were imported, and has no entry points for others. So either import this module before
`lm_eval.simple_evaluate(model="flashmem", ...)`, or run lm_eval's command line through it:

    python -m flashmem.evaluation.lm_eval run --model flashmem --model_args pretrained=DIR,keep=0.1 --tasks ...

`model_args`: pretrained, indexer, device, dtype, and every field of `LSAConfig`. Needs `pip install flashmem[eval]`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ..accounting.models import DEMO, shipped_model
from ..config import LSAConfig, ModelDefaults
from ..engine import Engine

DEFAULT_NEW_TOKENS = 256


@register_model("flashmem")
class FlashmemLM(LM):
    """Greedy generation by sessions of an engine, one request after another."""

    def __init__(
        self,
        pretrained: str | Path = DEMO,
        *,
        indexer: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        engine: Engine | None = None,
        **settings: Any,
    ) -> None:
        """Load a model, or take an engine; `settings` are fields of `LSAConfig`. Raises ValueError for others."""
        super().__init__()
        known = {item.name for item in fields(LSAConfig)}
        if unknown := sorted(settings.keys() - known - {"tokenizer"}):  # lm_eval's RULER reads the tokenizer's name
            raise ValueError(f"unknown model_args: {', '.join(unknown)}")
        settings.pop("tokenizer", None)
        directory = shipped_model() if str(pretrained) == DEMO else pretrained
        config = ModelDefaults.of(directory).config(**settings)
        self.engine = engine or Engine.from_pretrained(
            directory, indexer=indexer, device=device, dtype=dtype, config=config
        )  # fmt: skip
        self.stats: list[dict[str, Any]] = []
        """What each request's session held at its end."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers of (prompt, generation arguments); sampling is refused."""
        answers = []
        for request in requests:
            prompt, arguments = request.args
            limit, until = _greedy(dict(arguments))
            answers.append(self._answer(prompt, limit, until))
        return answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Not offered: it would score a prefill, which reads the whole history under every policy."""
        raise NotImplementedError("flashmem runs tasks that generate; a likelihood would measure prefill, not LSA")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Not offered, as `loglikelihood`; `flashmem eval gen perplexity` measures decoding."""
        return self.loglikelihood(requests)

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.backbone.model.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.engine.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self.engine.tokenizer.chat_template) if chat_template else None

    def _answer(self, prompt: str, limit: int, until: list[str]) -> str:
        tokenizer, ids = self.engine.tokenizer, list[int]()
        with self.engine.session() as session:
            for token in session.stream(prompt, max_new_tokens=limit):
                ids.append(token)
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                if any(stop in text for stop in until):
                    break
            self.stats.append(session.stats())
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        for stop in until:
            text = text.split(stop)[0]
        return text


def _greedy(arguments: dict[str, Any]) -> tuple[int, list[str]]:
    """Tokens at most, and strings to stop at. Raises ValueError where sampling is asked for."""
    if arguments.get("do_sample") and arguments.get("temperature", 0):
        raise ValueError("the model 'flashmem' decodes greedily; set do_sample=False")
    until = arguments.get("until") or []
    limit = arguments.get("max_gen_toks") or arguments.get("max_new_tokens") or DEFAULT_NEW_TOKENS
    return int(limit), [until] if isinstance(until, str) else [stop for stop in until if stop]


if __name__ == "__main__":
    cli_evaluate()
