"""`residency fit | validate | test | predict | export`: a LightningCLI whose fit is a whole stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from residency.core.ranks import rank
from residency.core.tensor_files import write_lines
from residency.core.types import Split
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.trainers import Trainers
from residency.inspection import Inspection
from residency.runs.augmentation import use_base
from residency.runs.config.class_names import part_names
from residency.runs.config.explain import ParseFailure, explain
from residency.runs.config.imports import tell_outside
from residency.runs.config.instantiate import TRAINER_DEFAULTS, Verbs, build_classes, build_trainer_options
from residency.runs.config.jsonargparse_patch import install
from residency.runs.config.options import (
    add_export_options,
    add_predict_options,
    add_run_options,
    add_stage_option,
    run_folder,
    run_settings,
    wandb_settings,
)
from residency.runs.config.parse_once import one_parse
from residency.runs.config.parser import ResidencyParser, plain_values
from residency.runs.config.preset_words import expand_presets
from residency.runs.config.short_help import DESCRIPTIONS
from residency.runs.config.sources import check_configs
from residency.runs.estimate import show_estimate
from residency.runs.estimate_words import Asked
from residency.runs.export.export import export_saved
from residency.runs.folder import RunFolder
from residency.runs.saved_stage import predict_saved, score_saved
from residency.runs.stream import StreamSettings, train_stream
from residency.runs.views.base import View
from residency.runs.views.console import ConsoleView, show_complete, show_export, show_predictions, show_scores
from residency.runs.views.lightning_loggers import LoggerView
from residency.runs.views.trackers import Tracker
from residency.runs.whole_run import written_at

__all__ = ["ResidencyCLI", "parse"]

# Words of one call: where the run lies, and what may be written over.
_NOT_THE_RUN = ("config", "run_dir", "subcommand", "overwrite")
_made: dict[str, dict[str, Any]] = {}  # verb -> what making its parser leaves behind in a LightningCLI
_OF_A_PARSER = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")


class ResidencyCLI(LightningCLI):
    """Parts are named, not positional: `model.adapter`, `model.mitigations.<name>`, `data.domains.<name>`.

    Args:
        args: Command line without the program's name: the verb, then its options.
        run: Whether the verb is carried out, or only parsed and instantiated.
        build: Whether objects are built; if not, only `config` and `resolved` exist.
        launches: Whether this process was started by these very words, so that other ranks can be.
        estimate: What to tell of the run instead of training it.
    """

    def __init__(
        self,
        args: list[str],
        *,
        run: bool = True,
        build: bool = True,
        launches: bool = False,
        estimate: Asked | None = None,
    ) -> None:
        install()
        self._verb, self._carry_out, self._build = args[0], run, build
        self._launches, self._estimate = launches, estimate
        super().__init__(
            ContinualModule,
            StreamData,
            save_config_callback=None,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "residency", self._verb: {"description": DESCRIPTIONS[self._verb]}},
            parser_class=ResidencyParser,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs, and the arguments of the Trainer's methods that they do not take."""
        loaders = {"model", "datamodule", "ckpt_path", "weights_only"}
        return {
            "fit": {*loaders, "train_dataloaders", "val_dataloaders"},
            "validate": {*loaders, "dataloaders", "verbose"},
            "test": {*loaders, "dataloaders", "verbose"},
            "predict": {*loaders, "dataloaders", "return_predictions"},
            "export": set(),
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed: an integer, never drawn."""
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of everything random in the run.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run is apart from model and data."""
        add_run_options(parser)

    def setup_parser(self, *args: Any) -> None:
        """Make the parser, which all command lines of a verb share."""
        if self._verb not in _made:
            super().setup_parser(*args)
            _made[self._verb] = {name: vars(self)[name] for name in _OF_A_PARSER}
        vars(self).update(_made[self._verb])

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Only the parser that is needed: each takes a tenth of a second to make.
        klass = Verbs if self._verb == "export" else Trainer
        subparser = self._prepare_subcommand_parser(klass, self._verb, **kwargs[self._verb])
        # The generated line names every key there is and fills a screen.
        subparser.usage = f"residency {self._verb} [RUN] [--config FILE ...] [--KEY=VALUE ...]"
        self._subcommand_parsers = {self._verb: subparser}
        parser.add_subcommands().add_subcommand(self._verb, subparser)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            add_stage_option(parser)
        if subcommand == "predict":
            add_predict_options(parser)
        if subcommand == "export":
            add_export_options(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; `--model.mitigations.<name> FILE` and its like take a preset file."""
        words = expand_presets(args)
        check_configs(words)
        try:
            with one_parse(parser):
                self.config = parser.parse_args(words)
        except ParseFailure as refusal:
            raise explain(refusal, words, part_names()) from refusal
        except SystemExit:
            tell_outside()  # --print_config ends the process here
            raise

    def _parse_ckpt_path(self) -> None:
        """Runs resume from their own folder; Lightning's way would let a checkpoint override the command line."""

    def _set_seed(self) -> None:
        """Nothing draws from a global generator, so there is none to seed."""

    # -- objects ------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build module and data; Trainers are made stage by stage."""
        if not self._build:
            return
        own = self.config.get(self.subcommand, self.config) if self.subcommand else self.config
        self.config_init = build_classes(self.parser, self.config, of=own)
        tell_outside()
        self.model, self.datamodule = (self._get(self.config_init, part) for part in ("model", "data"))
        self.trainers = use_base(self.model, self.datamodule, Trainers(self._trainer_options))

    def _trainer_options(self) -> dict[str, Any]:
        return build_trainer_options(self._get(self.config, "trainer"))

    def _run_subcommand(self, subcommand: str) -> None:
        self.result: Any = None
        if self._carry_out:
            logging.getLogger("transformers").setLevel(logging.ERROR)
            self.trainers.check()
            self.result = getattr(self, subcommand)()

    # -- verbs --------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train the stream, on as many processes as the Trainer's options say; or tell what that would take."""
        if self._estimate is not None:
            return show_estimate(self.model, self.datamodule, self.trainers, self.settings, self._estimate)
        return self.trainers.launch(self._fit) if self._launches else self._fit()

    def _fit(self) -> dict[str, Any]:
        before = written_at(self.folder.path / "results.json")
        record = train_stream(
            module=self.model,
            data=self.datamodule,
            trainers=self.trainers,
            folder=self.folder,
            settings=self.settings,
            config=self.resolved,
            views=self._views(),
            inspection=Inspection(self.option("inspection")),
        )
        if rank() == 0 and before is not None and before == written_at(self.folder.path / "results.json"):
            show_complete(self.folder.path)
        return record

    def validate(self) -> dict[str, Any]:
        """Score a saved stage on validation rows."""
        return self._score("validation")

    def test(self) -> dict[str, Any]:
        """Score a saved stage on test rows."""
        return self._score("test")

    def _score(self, split: Split) -> dict[str, Any]:
        found = score_saved(
            module=self.model,
            data=self.datamodule,
            folder=self.folder,
            settings=self.settings,
            stage=self.option("stage"),
            split=split,
            device=self.trainers.root_device,
        )
        show_scores(found)
        return found

    def predict(self) -> list[Mapping[str, str]]:
        """Generate from a saved stage."""
        written = predict_saved(
            module=self.model,
            data=self.datamodule,
            folder=self.folder,
            stage=self.option("stage"),
            seed=self.option("seed_everything"),
            domain=self.option("domain"),
            limit=self.option("limit"),
            prompts=self.option("prompts"),
            device=self.trainers.root_device,
        )
        if (output := self.option("output")) is None:
            show_predictions(written)
        else:
            write_lines(Path(output), written)
            print(f"{len(written)} completions: {output}")
        return written

    def export(self) -> dict[str, Any]:
        """Write a saved stage for other programs."""
        output = self.option("output")
        found = export_saved(
            module=self.model,
            data=self.datamodule,
            folder=self.folder,
            settings=self.settings,
            stage=self.option("stage"),
            merge=self.option("merge"),
            dtype=self.option("dtype"),
            output=Path(output) if output else None,
            overwrite=self.option("overwrite"),
            device=self.trainers.root_device,
        )
        show_export(found)
        return found

    # -- parts --------------------------------------------------------------------------------------------------

    def option(self, name: str) -> Any:
        """An option of the subcommand."""
        return self._get(self.config_init, name)

    @cached_property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return run_folder(self.option)

    @property
    def settings(self) -> StreamSettings:
        """The run's settings."""
        return run_settings(self.option)

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The full config as plain values; where the run lies is not part of what it is."""
        plain = plain_values(self.parser, self.config)[self._verb]
        return {key: value for key, value in plain.items() if key not in _NOT_THE_RUN}

    def _views(self) -> list[View]:
        return [ConsoleView(folder=self.folder.path), self.tracker(), LoggerView()]

    def tracker(self) -> Tracker:
        """The run on W&B."""
        parts: dict[str, Any] = {"config": self.resolved, "module": self.model, "data": self.datamodule}
        return Tracker(settings=wandb_settings(self.option), folder=self.folder.path, **parts)


def parse(args: list[str]) -> ResidencyCLI:
    """Parse and instantiate only; for studies and tests."""
    return ResidencyCLI(args, run=False)
