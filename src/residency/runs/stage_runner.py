"""The runner on which the stages of one run are made: it knows in which state the module is, and how to bring it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from residency.core.environment import count_parameters
from residency.core.ranks import gather_facts, lockstep, ranks, tree_from_first
from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.divergence import check_scores
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.row_scores import Evaluation
from residency.engine.serving import serving
from residency.engine.sharding import LEFT_OUT, base_in_parts, held_bytes
from residency.engine.stage import finish_stage, restore_stage, take_trained_stage, train_stage
from residency.engine.stage_overrides import describe_stages
from residency.engine.trainers import Trainers
from residency.engine.training_mode import cut_noise, trained_noise
from residency.inspection.inspection import Inspection
from residency.runs.rank_steps import RankSteps
from residency.runs.settings import StreamSettings
from residency.runs.views.base import RunInfo, View

__all__ = ["StageRunner"]

Line = Mapping[str, Any]


class StageRunner:
    """A module and where it stands.

    Args:
        module: Not yet built; that happens when something has to be computed.
        data: Domains and probes.
        trainers: Makes the Trainer of each stage.
        settings: Seed, evaluation, checkpoints.
        stages: What is to be trained.
        views: What shows it.
        ranks: Other processes that carry out what this one does.
    """

    def __init__(
        self,
        *,
        module: ContinualModule,
        data: StreamData,
        trainers: Trainers,
        settings: StreamSettings,
        stages: Sequence[Stage],
        views: Sequence[View],
        ranks: RankSteps | None = None,
    ) -> None:
        self._ranks = ranks or RankSteps()
        self.steps: Mapping[str, Callable[..., Any]] = {
            "restore": self._restore,
            "train": self._in_parts(self._train),
            "take_trained": self._in_parts(self._take_trained),
            "finish": self._in_parts(self._finish),
            "evaluate": self._in_parts(self._evaluate),
        }
        self.module = module
        # Asked for in the middle of a step, where all ranks are: the first one has the states.
        self.module.weights_after = lambda stage: tree_from_first(None)
        self.data = data
        self.trainers = trainers
        self.settings = settings
        self.stages = stages
        self.views = views
        self.inspection = Inspection()
        """What looks inside the model; nobody by default."""
        self.at = 0
        """Whose state the module has: 0 = before training, k = after the k-th stage is finished; -1 = in between."""
        self.trained = 0
        """The stage that the module has trained, or taken over, and not finished; 0 = none."""
        self.trained_here = 0
        """The last stage that was trained by this runner."""
        self._untouched = {name: dict(m.state_dict()) for name, m in module.mitigations.items()}

    def build(self) -> None:
        """Load the model, once."""
        self.module.build(seed=self.settings.seed)

    def _in_parts(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step with the base in parts, where the Trainer says so."""

        def carry_out(**arguments: Any) -> Any:
            if not self.trainers.shards:
                return step(**arguments)
            self.build()
            module, device = self.module, self.trainers.root_device
            with lockstep(), base_in_parts(module.model, device, adapter=module.adapter):
                return step(**arguments)

        return carry_out

    def model_facts(self) -> dict[str, Any]:
        """Size and layout of the built model."""
        self.build()
        trainable, total = count_parameters(self.module.model)
        layout = {"layout": self.module.layout, "layout_reason": self.module.layout_reason}
        objectives = self.module.stage_settings.objectives(self.module.objective)
        noise = trained_noise(objectives, self.module.model)
        return {"trainable": trainable, "total": total, **layout, "noise": noise}

    def info(self, facts: Mapping[str, Any], *, resumed: int) -> RunInfo:
        """What views want to know."""
        growth = {name: m.grows_by(facts["trainable"]) for name, m in self.module.mitigations.items()}
        return RunInfo(
            cell=self.settings.cell,
            seed=self.settings.seed,
            axes=self.settings.axes,
            domains=self.data.order,
            probes=list(self.data.probes),
            layout=f"{facts['layout']}: {facts['layout_reason']}" + (f"; {LEFT_OUT}" if self.trainers.shards else ""),
            trainable=facts["trainable"],
            total=facts["total"],
            resumed=resumed,
            split=self.settings.split,
            data=self.data.count_tokens(self.module.backbone.tokenizer, self.settings.split),
            stages=describe_stages(self.stages, self.settings.stages),
            growth={name: size for name, size in growth.items() if size},
            notices=[told] if (told := self._told_of_noise(facts.get("noise", []))) else [],
        )

    def _told_of_noise(self, noise: Sequence[str]) -> str:
        sizes = {stage.batch_size for stage in self.stages}
        return cut_noise(noise, parts=max(b // self.data.micro_batch(devices=ranks(), batch=b) for b in sizes))

    # -- states -------------------------------------------------------------------------------------------------

    def restore(self, k: int, load: Callable[[int], Mapping[str, Any]]) -> None:
        """Bring the module to the state after stage k.

        Args:
            k: 0 = before training.
            load: Gives the stored state after a stage.
        """
        self.module.weights_after = lambda stage: tree_from_first(load(stage)["weights"])
        if self.at == k and hasattr(self.module, "model"):
            return
        tree = load(k) if k else None
        if k and self.at == k:
            # Loading made it: the module is there already.
            return
        self._ranks.run(self, "restore", k=k, tree=tree)

    def _restore(self, k: int, tree: Mapping[str, Any] | None) -> None:
        if tree is None:
            self._start_over()
        else:
            self.build()
            restore_stage(self.module, tree)
        self.at, self.trained = k, 0

    def _start_over(self) -> None:
        if self.at != 0:
            del self.module.model
            self.module.served = {}
            for name, state in self._untouched.items():
                self.module.mitigations[name].load_state_dict(dict(state))
        self.build()

    def train(self, k: int, *, work: Path, write: Callable[[Line], None], info: RunInfo) -> dict[str, Any]:
        """Train the k-th stage from the state after the one before; its facts.

        Args:
            k: From 1.
            work: Where its checkpoint lies.
            write: Called with every line of the history.
            info: For the views.
        """
        facts: dict[str, Any] = self._ranks.run(self, "train", k=k, work=str(work), here={"write": write, "info": info})
        return facts

    def _train(
        self, k: int, work: str, write: Callable[[Line], None] = lambda line: None, info: RunInfo | None = None
    ) -> dict[str, Any]:
        stage = self.stages[k - 1]
        self.at = -1

        def tell(line: Line) -> None:
            write(line)
            for view in self.views:
                view.step(line)

        facts = train_stage(
            module=self.module,
            data=self.data,
            trainers=self.trainers,
            stage=stage,
            folder=Path(work),
            history=History(
                stage=stage,
                every_n_steps=self.trainers.log_every_n_steps,
                offset=self.offset(k),
                write=tell,
            ),
            observers=[
                *(callback for view in self.views if info for callback in view.callbacks(info, stage)),
                *self.inspection.callbacks(stage, self.data),
            ],
            checkpoint_every_n_steps=self.settings.checkpoint_every_n_steps,
        )
        self.trained = self.trained_here = k
        held = gather_facts(held_bytes(self.module.model)) if self.trainers.shards else [{}]
        return facts | {name: [own[name] for own in held] for name in held[0]} | self.inspection.during()

    def offset(self, k: int) -> int:
        """Optimizer steps of the stream before the k-th stage."""
        return sum(stage.steps for stage in self.stages[: k - 1])

    def take_trained(self, k: int, tree: Mapping[str, Any]) -> None:
        """Take over what another run has trained as its k-th stage."""
        self._ranks.run(self, "take_trained", k=k, tree=tree)

    def _take_trained(self, k: int, tree: Mapping[str, Any]) -> None:
        self.at = -1
        take_trained_stage(self.module, self.data, self.stages[k - 1], tree, device=self.trainers.root_device)
        self.trained = k

    def finish(self, k: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What follows the training of the k-th stage; what is to be stored."""
        tree: dict[str, Any] = self._ranks.run(self, "finish", k=k, facts=dict(facts))
        return tree

    def _finish(self, k: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        last = k == len(self.stages)
        tree = finish_stage(self.module, facts, device=self.trainers.root_device, remember=not last)
        self.at, self.trained = k, 0
        return tree

    # -- scores -------------------------------------------------------------------------------------------------

    def evaluate(self, columns: Sequence[str] | None = None) -> tuple[Evaluation, dict[str, Any]]:
        """Score the state in which the module is; (scores, what they cost)."""
        start = time.perf_counter()
        scores, tokens, flops = self._ranks.run(self, "evaluate", columns=list(columns or self.data.columns))
        seconds = time.perf_counter() - start
        return scores, {"evaluation_seconds": seconds, "evaluation_tokens": tokens, "evaluation_flops": flops}

    def _evaluate(self, columns: Sequence[str]) -> tuple[Evaluation, int, int]:
        work = self.module.backbone.work
        work.take()
        work.renew()
        chosen = {name: self.data.columns[name] for name in columns}
        total = sum(len(domain.rows(self.settings.split)) for domain in chosen.values())
        title = f"after {self.stages[self.at - 1].domain}" if self.at else "before training"
        self.module.to(self.trainers.root_device)
        with ExitStack() as stack:
            stack.enter_context(serving(self.module))
            if self.at == 0 and "reference" in self.module.adapter.provides:
                stack.enter_context(self.module.adapter.reference(self.module.model))
            advances = [stack.enter_context(view.evaluating(title, total)) for view in self.views]

            def advance(column: str, rows: int) -> None:
                for one in advances:
                    one(column, rows)

            scores = evaluate(
                self.module,
                self.data,
                split=self.settings.split,
                settings=self.settings.evaluation,
                columns=list(chosen),
                learned=self.at,
                advance=advance,
            )
        check_scores(scores, after=title, steps=self.offset(self.at + 1))
        tokens, flops = (sum(spent) for spent in zip(*gather_facts(work.take()), strict=True))
        return scores, tokens, flops
