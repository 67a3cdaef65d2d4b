"""The training rows of a domain as tokens: which are used, their counts and, of large domains, all of them in a file.

Encoding a million short rows takes minutes, and their examples as Python objects a gigabyte in every process. So the
first process that needs them encodes them once, into the assets cache, under a key of everything that decides a token;
everybody else maps that file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from residency.core.assets.cache import cache_folder
from residency.core.errors import UserError
from residency.core.types import Example, Row
from residency.domains.base import Domain
from residency.domains.chat import Chat
from residency.domains.kept_files import delete_unused, held, reading_code
from residency.domains.packed_examples import ExamplePacker, PackedExamples, open_examples, write_examples
from residency.domains.template import Template
from residency.domains.token_counts import TokenCounts, TrainingRows, count_tokens

__all__ = ["TrainingTokens", "is_large", "tokens_key", "training_tokens"]

MANY = 20_000
"""Rows from which on a domain's tokens are kept in a file; fewer take seconds."""


@dataclass(frozen=True, kw_only=True)
class TrainingTokens:
    """What becomes of the training rows of a domain.

    Args:
        kept: Places of the rows that are used, in order.
        counts: Their counts.
        packed: Their examples; `None` = each is encoded when it is read.
    """

    kept: Sequence[int]
    counts: TokenCounts
    packed: PackedExamples | None = None


def is_large(domain: Domain) -> bool:
    """Whether the tokens of a domain are kept in a file."""
    return len(domain.rows("train")) >= MANY


def training_tokens(name: str, domain: Domain, tokenizer: Any) -> TrainingTokens:
    """Read what lies in the file of the domain, or encode its rows and, if they are many, write them there.

    Args:
        name: Of the domain.
        domain: The domain.
        tokenizer: Of the backbone.

    Raises:
        UserError: Too many rows are too long.
    """
    rows = domain.rows("train")
    key = tokens_key(name, domain, tokenizer) if is_large(domain) else None
    if key is None:
        return _encoded(name, domain, tokenizer, None)
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    if (found := _read(path, key, len(rows))) is not None:
        return found
    # Where nothing can be written, every process has its own arrays: a tenth of what objects take.
    with held(path, path.is_file):
        if (found := _read(path, key, len(rows))) is not None:
            return found
        packer = ExamplePacker()
        found = _encoded(name, domain, tokenizer, packer)
        arrays = packer.arrays()
        delete_unused(path.parent, "*.safetensors")
        about = {"counts": asdict(found.counts), "kept": _written(found.kept, len(rows)), "rows": len(rows)}
        with suppress(UserError, OSError):
            write_examples(path, arrays, key=key, about=about)
    return _read(path, key, len(rows)) or replace(found, packed=PackedExamples(arrays))


def _encoded(name: str, domain: Domain, tokenizer: Any, packer: ExamplePacker | None) -> TrainingTokens:
    rows, look = domain.rows("train"), TrainingRows(policy=domain.template.too_long)
    pairs = ((domain.template.encode(tokenizer, domain=name, row=row), row) for row in rows)
    used = look.used(pairs)
    counts = count_tokens(used if packer is None else _packing(used, packer), tokenizer)
    look.check(where=name)
    kept: Sequence[int] = range(len(rows)) if len(look.kept) == len(rows) else tuple(look.kept)
    return TrainingTokens(kept=kept, counts=replace(counts, left_out=len(rows) - len(kept)))


def _packing(pairs: Iterable[tuple[Example, Row]], packer: ExamplePacker) -> Iterator[tuple[Example, Row]]:
    for example, row in pairs:
        packer.add(example)
        yield example, row


def tokens_key(name: str, domain: Domain, tokenizer: Any) -> str | None:
    """SHA-256 of everything that decides the tokens of a domain; `None` where nobody can say what that is.

    That is its rows and its template (`Domain.fingerprint`), the text of a chat template, the tokenizer, our code and
    the versions of the libraries. Templates of others, tokenizers without a description and those of classifiers, whose
    labels depend on the stream, have no key.
    """
    template, backend = domain.template, getattr(tokenizer, "backend_tokenizer", None)
    if type(template) not in (Template, Chat) or backend is None or hasattr(tokenizer, "label_token"):
        return None
    chat = [template.source(tokenizer, tools=tools) for tools in (False, True)] if isinstance(template, Chat) else None
    ours = ("model_max_length", "split_special_tokens", "clean_up_tokenization_spaces", "add_bos_token", "bos_token_id")
    described = [type(tokenizer).__name__, *(str(getattr(tokenizer, one, None)) for one in ours)]
    special = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    parts = [name, domain.fingerprint(), chat, backend.to_str(), described, special, _code()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _code() -> list[str]:
    """Our code that makes tokens, and the versions of what it calls."""
    return [reading_code(), *(version(name) for name in ("transformers", "tokenizers", "jinja2"))]


def _read(path: Path, key: str, rows: int) -> TrainingTokens | None:
    """What the file holds, if it is whole and of these rows."""
    if (found := open_examples(path, key=key)) is None:
        return None
    try:
        arrays, about = found
        counts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["counts"].items()}
        kept: Sequence[int] = range(rows) if about["kept"] is None else about["kept"]
        packed = PackedExamples(arrays)
        if about["rows"] != rows or len(packed) != len(kept):
            return None
        with suppress(OSError):
            path.touch()
        return TrainingTokens(kept=kept, counts=TokenCounts(**counts), packed=packed)
    except (KeyError, ValueError, TypeError, IndexError):
        return None


def _written(kept: Sequence[int], rows: int) -> list[int] | None:
    return None if len(kept) == rows else [*kept]
