"""Progressive Prompts (Razdaibiedina et al. 2023): a new soft prompt in front of the older ones for every domain."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig
from torch import Tensor, nn

from residency.adapters.base import Adapter, Observe, PromptNLL, Served, copy_state
from residency.adapters.blocks import write_adapter
from residency.adapters.learnt import LEARNT, learn, learnt, relearn
from residency.adapters.prompted import Prompted
from residency.errors import UserError
from residency.types import Example, Stage, Tensors

__all__ = ["ProgressivePrompts"]

_PROMPT = re.compile(r"^prompts\.(\d{3})$")


class ProgressivePrompts(Adapter):
    """Input [P_t; ...; P_1; E(x)] on a frozen model; only P_t trains, and is frozen after its domain.

    Domain j is scored with P_1 ... P_j, which needs its name: the run is marked as using the task id at test time. A
    domain that is not learnt yet, and a probe, is scored with the pretrained model. Nothing is forgotten, by
    construction. Input grows by `length` vectors per domain. Every prompt trains for all steps of its stage: there is
    no early stopping on validation data, and no reparametrisation by an MLP.

    There are no fixed coordinates and no weights to average: EWC and WeightMixing are refused.

    Args:
        length: Vectors per prompt.

    Raises:
        UserError: `length` is below 1.
    """

    provides = frozenset({"reference", "exportable"})
    task_id_at_test = True

    def __init__(self, *, length: int = 10) -> None:
        if length < 1:
            raise UserError(
                f"model.adapter.length {length}",
                why="a prompt is at least one vector",
                fix="choose 1 or more; 10 is the paper's",
            )
        self.length = length

    def attach(self, model: nn.Module) -> nn.Module:
        """Wrap the model; the first prompt is there, and not in front of anything before its stage begins.

        Raises:
            UserError: The model has no input embedding to put vectors beside.
        """
        if isinstance(model, Prompted):
            return model
        wrapped = Prompted(model)
        _add(wrapped, 0, self.length)
        return wrapped

    def begin_stage(self, model: Any, stage: Stage, observe: Observe) -> None:
        """A new prompt, drawn from the vocabulary's embeddings, in front of the older ones, which freeze."""
        _add(model, stage.index, self.length)
        learn(model, stage.index, stage.domain)
        _use_all(model)

    def state(self, model: Any) -> dict[str, Tensor]:
        """All prompts, and which domains they have learnt."""
        names = {n: b for n, b in model.named_buffers(recurse=False) if LEARNT.match(n)}
        return {f"prompts.{name}": p.detach() for name, p in model.prompts.items()} | names

    def load_state(self, model: Any, state: Tensors) -> None:
        """Rebuild the prompts of a state.

        Raises:
            UserError: Names or shapes differ.
        """
        count = 1 + max((int(found[1]) for name in state if (found := _PROMPT.match(name))), default=0)
        for index in range(count):
            _add(model, index, self.length)
        for name in [name for name in model.prompts if int(name) >= count]:
            del model.prompts[name]
        live = {f"prompts.{name}": p for name, p in model.prompts.items()}
        prompts = {name: tensor for name, tensor in state.items() if not LEARNT.match(name)}
        copy_state(live, prompts, owner=type(self).__name__)
        relearn(model, state)
        _use_all(model)

    def serve(
        self, model: nn.Module, column: str, examples: Sequence[Example], prompt_nll: PromptNLL
    ) -> Iterable[Served]:
        """P_1 ... P_j for domain j, none for what is not learnt."""
        return [(_depth(model, learnt(model).get(column, -1) + 1), examples)]

    def routes(self, model: nn.Module) -> Mapping[str, AbstractContextManager[Any]]:
        """P_1 ... P_j by domain j."""
        return {domain: _depth(model, index + 1) for domain, index in learnt(model).items()}

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """No prompts: bit for bit the pretrained (or the quantised) model."""
        return _depth(model, 0)

    def export(self, model: Any, path: Path) -> None:
        """All prompts as ONE plain prompt tuning of PEFT, newest first; its logits begin with those of the prompts."""
        prompt = torch.cat([model.prompts[name] for name in sorted(model.prompts, reverse=True)])
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=len(prompt),
            token_dim=prompt.shape[1],
            base_model_name_or_path=getattr(model.config, "_name_or_path", None),
        )
        write_adapter(path, config, {"prompt_embeddings": prompt})


def _add(model: Prompted, index: int, length: int) -> None:
    """A prompt at this position of the stream, if there is none; drawn from the global generator."""
    if (name := f"{index:03d}") in model.prompts:
        return
    embedding = model.model.get_input_embeddings()
    weight = embedding.weight
    drawn = torch.randint(embedding.num_embeddings, (length,)).to(weight.device)
    # In float32 whatever the model is: a step of 1e-4 would be lost in bfloat16.
    model.prompts[name] = nn.Parameter(weight[drawn].detach().float().clone())


def _use_all(model: Prompted) -> None:
    model.depth = len(learnt(model))
    newest = max(model.prompts)
    for name, prompt in model.prompts.items():
        prompt.requires_grad_(name == newest)


@contextmanager
def _depth(model: Any, depth: int) -> Iterator[None]:
    """Inside the context the first `depth` prompts are in use, unless none is allowed to be."""
    before = model.depth
    model.depth = min(depth, before)
    try:
        yield
    finally:
        model.depth = before
