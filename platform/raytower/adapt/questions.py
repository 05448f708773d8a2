"""Queries for passages, written by a causal language model: InPars (Bonifacio et al. 2022) without its filter.

A batch draws by a seed of its own, made of the seed and its prompts, so the same call on the same machine writes the
same queries wherever the batch stands in the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytower.adapt.config import GenerateConfig
from raytower.adapt.rules import is_mostly_han
from raytower.errors import InputError
from raytower.models.device import default_device
from raytower.models.directory import read_json_object, resolve_model

PROMPT_ZH = "请根据下面的内容，写出一个用户会搜索的问题。只写问题。\n\n内容：{text}\n\n问题："
PROMPT_EN = (
    "Write one question that a user would search for and that this passage answers. Write the question alone.\n\n"
    "Passage: {text}\n\nQuestion:"
)
# What models put around a question.
_AROUND = " \t\"'“”「」*`"
_LABELS = ("问题：", "问题:", "Query:", "Question:", "query:", "question:")


class Asker:
    """Writes queries with one model, which is loaded once."""

    def __init__(self, config: GenerateConfig, seed: int) -> None:
        """Raises InputError where the directory holds no causal language model, or no tokenizer."""
        self._config = config
        self._seed = seed
        path = resolve_model(config.model)
        kinds = read_json_object(path / "config.json").get("architectures") or []
        # transformers would put an untrained head onto an encoder.
        if not any(str(kind).endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
            raise InputError(
                f"generate.model {config.model!r} is no causal language model, config.json says {kinds}; name a "
                "directory of one, such as Qwen/Qwen3-0.6B"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, config.dtype), local_files_only=True, use_safetensors=True
            )
        except (ValueError, OSError) as error:
            raise InputError(
                f"generate.model {config.model!r} cannot be loaded: {error}; name a directory with safetensors and a "
                "tokenizer"
            ) from error
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._tokenizer.padding_side = "left"  # what is written goes on where a prompt ends
        self._model = model.to(default_device()).eval()

    def __call__(self, passages: Sequence[str]) -> list[list[str]]:
        """Up to `num_queries` distinct queries of each passage; none where the model wrote nothing."""
        prompts = [self.prompt(passage) for passage in passages]
        config = self._config
        # A chat template writes the special tokens itself.
        tokens = self._tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            add_special_tokens=not self._tokenizer.chat_template,
            return_token_type_ids=False,
        ).to(self._model.device)
        draws = (
            {"do_sample": True, "temperature": config.temperature, "top_k": 0}
            if config.temperature
            else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        )
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(self._batch_seed(prompts))
            written = self._model.generate(
                **tokens,
                **draws,
                max_new_tokens=config.max_new_tokens,
                num_return_sequences=config.num_queries,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        answers = self._tokenizer.batch_decode(
            written[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True
        )
        queries = [first_line(answer) for answer in answers]
        num = config.num_queries
        return [
            [query for query in dict.fromkeys(queries[start : start + num]) if query]
            for start in range(0, len(queries), num)
        ]

    def prompt(self, passage: str) -> str:
        """The prompt of a passage by its script, as the model's chat template has it; the passage is cut to fit."""
        config = self._config
        template = config.prompt_zh or PROMPT_ZH if is_mostly_han(passage) else config.prompt_en or PROMPT_EN
        room = config.max_length - len(self._tokenizer(template.replace("{text}", ""))["input_ids"])
        ids = self._tokenizer(passage, add_special_tokens=False)["input_ids"]
        if len(ids) > max(room, 0):
            passage = self._tokenizer.decode(ids[: max(room, 0)], skip_special_tokens=True)
        asked = template.replace("{text}", passage)
        if not self._tokenizer.chat_template:
            return asked
        messages = [{"role": "user", "content": asked}]
        # Models that think aloud (Qwen3) are told not to; other templates do not read it.
        prompt: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return prompt

    def _batch_seed(self, prompts: Sequence[str]) -> int:
        content = "\0".join([str(self._seed), *prompts]).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")


def first_line(answer: str) -> str:
    """The query of what a model has written: its first line that says something, without quotes and labels."""
    for line in answer.splitlines():
        text = line.strip(_AROUND)
        for label in _LABELS:
            text = text.removeprefix(label).strip(_AROUND)
        if any(char.isalnum() for char in text):
            return text
    return ""
