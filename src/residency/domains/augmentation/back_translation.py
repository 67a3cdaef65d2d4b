"""Prompts translated into another language and back (Sennrich, Haddow and Birch 2016), by two local models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from residency.core.digests import digest_file
from residency.core.errors import UserError
from residency.core.randomness import seed_of
from residency.domains.augmentation.base import Asked, Attempt, Augmentation, Material
from residency.domains.augmentation.filters import failed_filter

__all__ = ["BackTranslation", "Translator"]


class Translator:
    """A sequence-to-sequence model in a folder, for one direction.

    Args:
        folder: As `save_pretrained` writes it: config, safetensors, tokenizer. Nothing is downloaded or unpickled, and
            no code of the folder runs.
        option: Which option named it, for messages.
        prefix: Stands before every text, as the T5 family expects ("translate English to German: ").

    Raises:
        UserError: There is no such folder; on loading, it holds no such model.
    """

    def __init__(self, *, folder: str, option: str, prefix: str = "") -> None:
        self.path, self.option, self.prefix = Path(folder).expanduser(), option, prefix
        self.tokens = 0
        if not (self.path / "config.json").is_file():
            raise UserError(
                f"{option}: {folder} has no config.json",
                why="no translation model is packaged, and none is downloaded",
                fix="give the folder of a sequence-to-sequence model on this machine, with safetensors and tokenizer",
            )

    def identity(self) -> dict[str, Any]:
        """Digests of all files that decide what it writes."""
        names = sorted(file.name for kind in ("*.json", "*.safetensors", "*.model", "*.txt", "*.spm")
                       for file in self.path.glob(kind))  # fmt: skip
        return {"prefix": self.prefix, **{name: digest_file(self.path / name)["sha256"] for name in names}}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, **options)
            model = AutoModelForSeq2SeqLM.from_pretrained(self.path, use_safetensors=True, **options)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"{self.option}: {self.path} cannot be loaded: {' '.join(str(error).split())[:300]}",
                why="it is no folder of a sequence-to-sequence model with safetensors and a tokenizer",
                fix="save one there with save_pretrained (model and tokenizer)",
            ) from error
        return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.no_grad()
    def translate(self, text: str, *, beams: int, temperature: float, seed: int) -> str | None:
        """One text.

        Args:
            text: In the language that it reads.
            beams: Of the search; 0 = draw.
            temperature: Of draws.
            seed: Of draws.

        Returns:
            The translation; `None` if the text is too long for the model, or the translation did not end.
        """
        tokenizer, model = self._loaded
        read = tokenizer(self.prefix + text, return_tensors="pt").to(model.device)
        length = read["input_ids"].shape[1]
        if length > min(int(tokenizer.model_max_length), 10**6):
            return None
        most = 2 * length + 16
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_beams": 1}
        search = drawn if beams == 0 else {"do_sample": False, "num_beams": beams}
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            (written,) = model.generate(**read, max_new_tokens=most, **search)
        self.tokens += length + len(written)
        if model.generation_config.eos_token_id not in written.tolist():
            return None
        return str(tokenizer.decode(written, skip_special_tokens=True)).strip()

    def release(self) -> None:
        """Give its memory back."""
        self.__dict__.pop("_loaded", None)


class BackTranslation(Augmentation):
    """Prompts translated there and back by two models of the user's; the completion stays.

    Kept are texts in the same script, with the same numbers and quotations, of half to twice the length and a chrF of
    0.3 to 0.95 with the prompt.

    Args:
        forward: Folder of the model that translates prompts.
        backward: Folder of the model that translates them back.
        forward_prefix: Stands before every text that `forward` reads.
        backward_prefix: The same of `backward`.
        beams: Of the search; 0 draws instead, so that several children of a row differ.
        temperature: Of draws.

    Raises:
        UserError: A folder is missing, or several children of a row are asked for that a search makes equal.
    """

    name: ClassVar[str] = "back_translation"
    kept_in_cache: ClassVar[bool] = True

    def __init__(
        self,
        *,
        forward: str,
        backward: str,
        forward_prefix: str = "",
        backward_prefix: str = "",
        beams: int = 4,
        temperature: float = 0.7,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if beams < 0 or not temperature > 0 or (beams and self.per_row > 1):
            raise UserError(
                f"augment: BackTranslation with beams={beams}, temperature={temperature}, per_row={self.per_row}",
                why="a search finds one translation of a text; several are drawn, at a temperature above 0",
                fix="give beams: 4 and per_row: 1, or beams: 0 and temperature: 0.7",
            )
        self.beams, self.temperature = beams, temperature
        self.forward = Translator(folder=forward, option="forward", prefix=forward_prefix)
        self.backward = Translator(folder=backward, option="backward", prefix=backward_prefix)

    def attempts(self, asked: Sequence[Asked], material: Material) -> Iterator[Attempt]:
        """Dropped as `unfinished`, or by a filter of rewordings (`failed_filter`)."""
        try:
            for one in asked:
                new = self._there_and_back(one)
                reason = "unfinished" if new is None else failed_filter(new, one.parent.prompt)
                yield Attempt(prompt=new or "", dropped=reason)
        finally:
            self.tokens += self.forward.tokens + self.backward.tokens
            self.forward.tokens = self.backward.tokens = 0
            self.forward.release()
            self.backward.release()

    def _there_and_back(self, asked: Asked) -> str | None:
        text: str | None = asked.parent.prompt
        for model in (self.forward, self.backward):
            if text is not None:
                seed = seed_of(self.seed, self.name, model.option, asked.parent.id, asked.number)
                text = model.translate(text, beams=self.beams, temperature=self.temperature, seed=seed)
        return text

    def identity(self) -> dict[str, Any]:
        """Options, and the content of both folders."""
        drawn = {} if self.beams else {"seed": self.seed, "temperature": self.temperature}
        return {"beams": self.beams, **drawn, "models": [self.forward.identity(), self.backward.identity()]}
