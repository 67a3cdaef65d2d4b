"""One adapter per domain on a frozen base, and who answers when a domain is scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, get_peft_model_state_dict
from torch import Tensor, nn

from residency.adapters.base import Adapter, Observe, PromptNLL, Served, missing_capability
from residency.adapters.blocks import (
    block_name,
    block_state,
    load_blocks,
    merged,
    open_block,
    switched,
    use_blocks,
    write_adapter,
)
from residency.adapters.learnt import LEARNT, learn, learnt, relearn
from residency.adapters.peft import wrap
from residency.adapters.tuners import capabilities, check_config
from residency.errors import UserError
from residency.storage import write_json
from residency.types import Capability, Example, Stage

__all__ = ["PerDomain", "lowest"]


class PerDomain(Adapter):
    """A fresh adapter for every domain. Nothing is forgotten, by construction: what is hard is to know whom to ask.

    The record of a run holds, under `routing`, the score of every adapter on every domain, how often the likelihood of
    a prompt names the wrong adapter, and the score without the task id beside the one with it (`residency.routing`).

    There are no fixed coordinates and no common space: EWC and WeightMixing are refused.

    Args:
        config: Of every adapter: a PEFT tuner that changes weights and leaves the base as it is.
        routing: Who answers a row. `oracle`: the adapter of the row's domain, which uses the task id at test time; the
            pretrained model where that is not learnt yet, probes included. `nll`: the adapter under which the prompt
            is most likely; no task id, one pass over the prompts per adapter. `last`: always the newest.

    Raises:
        UserError: With the adapter off, the model would not be the base any more.
    """

    def __init__(self, *, config: PeftConfig, routing: Literal["oracle", "nll", "last"] = "oracle") -> None:
        check_config(config)
        if not {"reference", "mergeable"} <= capabilities(config):
            raise UserError(
                f"model.adapter PerDomain with {type(config).__name__}",
                why="every adapter needs the same frozen base, and this one changes it or is no change of weights",
                fix="use a LoRA with init_lora_weights true and bias none as in configs/adapter/per_domain.yaml; "
                "configs/adapter/progressive_prompts.yaml keeps a prompt per domain",
            )
        self.config = config
        self.routing = routing
        self.task_id_at_test = routing == "oracle"
        provides: set[Capability] = {"reference", "exportable"}
        self.provides = frozenset(provides | {"mergeable"} if routing == "last" else provides)

    def attach(self, model: nn.Module) -> nn.Module:
        """Add the adapter of the first domain.

        Raises:
            UserError: PEFT refuses the model.
        """
        return wrap(model, self.config, name=block_name(0))

    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """A fresh adapter, alone in the forward pass."""
        name = open_block(model, stage.index)
        use_blocks(model, [name], trains=name)
        learn(model, stage.index, stage.domain)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """All adapters, and which domain each of them has learnt."""
        return block_state(model) | {n: b for n, b in model.named_buffers(recurse=False) if LEARNT.match(n)}

    def load_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Rebuild the adapters of a state; the newest takes part and is trainable.

        Raises:
            UserError: Names or shapes differ.
        """
        blocks = {name: tensor for name, tensor in state.items() if not LEARNT.match(name)}
        names = load_blocks(model, blocks, owner=type(self).__name__)
        relearn(model, state)
        use_blocks(model, names[-1:], trains=names[-1])

    def serve(
        self, model: nn.Module, column: str, examples: Sequence[Example], prompt_nll: PromptNLL
    ) -> Iterable[Served]:
        """Group the rows of a column by the adapter that answers them."""
        known = learnt(model)
        if self.routing == "last":
            yield from super().serve(model, column, examples, prompt_nll)
        elif self.routing == "oracle" or not known:
            yield switched(model, [block_name(known[column])] if column in known else []), examples
        else:
            found = []
            for index in known.values():
                with switched(model, [block_name(index)]):
                    found.append(prompt_nll(examples))
            choice = lowest(torch.stack(found)).tolist()
            for place, index in enumerate(known.values()):
                if chosen := [e for e, c in zip(examples, choice, strict=True) if c == place]:
                    yield switched(model, [block_name(index)]), chosen

    def routes(self, model: nn.Module) -> Mapping[str, AbstractContextManager[Any]]:
        """Each adapter alone, by its domain."""
        return {domain: switched(model, [block_name(index)]) for domain, index in learnt(model).items()}

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """All adapters off: bit for bit the pretrained (or the quantised) model."""
        return switched(model, [])

    def merge(self, model: nn.Module) -> nn.Module:
        """With `routing: last`, the newest adapter folded in; `model` is used up. Otherwise no single model exists."""
        if "mergeable" not in self.provides:
            raise missing_capability(self, "mergeable")
        return merged(model, *_stored(model, max(model.peft_config)))  # type: ignore[arg-type]

    def export(self, model: nn.Module, path: Path) -> None:
        """A plain PEFT folder with the newest adapter, and one per domain: `domains/<k>`, named in domains.json."""
        write_adapter(path, *_stored(model, max(model.peft_config)))  # type: ignore[arg-type]
        folders = {domain: f"domains/{index + 1}" for domain, index in learnt(model).items()}
        for domain, index in learnt(model).items():
            write_adapter(path / folders[domain], *_stored(model, block_name(index)))
        write_json(path / "domains.json", folders)


def lowest(nll: Tensor) -> Tensor:
    """(A, B) nats per prompt token of every adapter -> (B,) the adapter that finds each prompt most likely; the older
    one where two are equal.
    """
    return nll.argmin(0)


def _stored(model: Any, name: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of one adapter, as PEFT stores them."""
    return model.peft_config[name], get_peft_model_state_dict(model, adapter_name=name)
