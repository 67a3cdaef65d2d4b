"""What the parts of a model are, asked of the model itself: blocks, embeddings, quantised weights, matching names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from residency.core.errors import UserError

__all__ = ["blocks", "embeddings", "matching", "names_of", "refuse_quantised"]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks from the bottom to the top, by module name.

    The list of modules that holds most parameters is the stack, whatever the architecture calls it; of an
    encoder-decoder there are two, the encoder's first.

    Raises:
        UserError: The model has no list of blocks.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        halves: Any = model
        return {
            f"{name}.{path}": block
            for half in (halves.get_encoder(), halves.get_decoder())
            for name in (next(n for n, m in model.named_modules() if m is half),)
            for path, block in _largest_stack(half).items()
        }
    return _largest_stack(model)


def _largest_stack(model: nn.Module) -> dict[str, nn.Module]:
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not stacks:
        raise UserError(
            f"no stack of blocks in {type(model).__name__}",
            why="the adapter acts on the blocks of a transformer, which are kept in a list",
            fix="use an adapter that goes by parameters, for example configs/adapter/lora.yaml or full.yaml",
        )
    name, stack = max(stacks.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{name}.{i}": block for i, block in enumerate(stack)}


def names_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter's name as the optimizer knows it -> all names of that tensor (tied weights have several)."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in found.values()}


def embeddings(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of all embedding tables: tokens, positions, and a head that is tied to them."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return frozenset(name for name, p in model.named_parameters() if id(p) in tables)


def matching(patterns: Sequence[str], names: Mapping[str, Iterable[str]], *, option: str) -> frozenset[str]:
    """The keys of which a name contains a match of a pattern.

    Args:
        patterns: Regular expressions, searched anywhere in a name.
        names: Key -> the names it goes by.
        option: Where the patterns were written, for the message.

    Raises:
        UserError: A pattern is no regular expression, or matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            search = re.compile(pattern).search
        except re.error as error:
            raise UserError(
                f"{option}: {pattern!r} is no regular expression ({error})",
                why="names are chosen by Python's regular expressions",
                fix="correct it; a dot, a bracket or a plus that is meant literally needs a backslash",
            ) from error
        hits = {key for key, aliases in names.items() if any(search(alias) for alias in aliases)}
        if not hits:
            some = ", ".join(list(names)[:3] + list(names)[-2:])
            raise UserError(
                f"{option}: {pattern!r} matches none of {len(names)} names",
                why=f"then it would silently do nothing; names are, for example, {some}",
                fix="write a regular expression that occurs in a name, for example 'mlp' or 'layers\\.0\\.'",
            )
        found |= hits
    return frozenset(found)


def refuse_quantised(model: nn.Module, names: Iterable[str], *, what: str) -> None:
    """Quantised weights are integers and cannot be trained.

    Raises:
        UserError: One of the named parameters is quantised.
    """
    parameters = dict(model.named_parameters())
    quantised = [name for name in names if not parameters[name].is_floating_point()]
    if quantised:
        raise UserError(
            f"{what} of a quantised backbone ({len(quantised)} tensors, first {quantised[0]!r})",
            why="4-bit and 8-bit weights are integers and have no gradient",
            fix="set model.backbone.quantisation to null, or use configs/adapter/lora.yaml on the quantised base",
        )
