"""`residency fit | validate | test | predict`: a LightningCLI whose fit is a whole stream."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# Imported for their names: a class that is imported can be given by its short name on the command line.
from residency import adapters, backbones, domains, mitigations, objectives
from residency.console import ConsoleView, show_predictions, show_scores
from residency.data import StreamData
from residency.domains import packaged
from residency.errors import UserError
from residency.evaluation import EvaluationSettings
from residency.module import ContinualModule
from residency.record import RunFolder
from residency.saved import predict_saved, score_saved
from residency.strict_swap import install
from residency.stream import StreamSettings, train_stream
from residency.trackers import Tracker
from residency.tracking import WandbSettings
from residency.trainers import Trainers
from residency.types import Split
from residency.views import View

__all__ = ["ResidencyCLI", "parse"]

_SHORT_NAMES = (adapters, backbones, domains, mitigations, objectives, packaged)

_TRAINER_DEFAULTS = {
    "logger": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "log_every_n_steps": 1,
    "gradient_clip_val": 1.0,
}

_NAMED_PART = re.compile(r"--(model\.mitigations|data\.domains|data\.probes)\.[^.=]+")

_DESCRIPTIONS = {
    "fit": "Train a stream of domains; after every stage score every domain. The same command goes on after a kill.",
    "validate": "Score a saved stage on the validation rows of every domain.",
    "test": "Score a saved stage on the test rows of every domain.",
    "predict": "Let a saved stage write completions for the test rows of a domain.",
}


class ResidencyParser(LightningArgumentParser):
    """Says what is wrong in one message instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by jsonargparse for everything that does not parse.

        Raises:
            UserError: Always.
        """
        text = "\n  ".join(line.strip() for line in str(message).strip().splitlines())
        raise UserError(
            text,
            why="the config file or the command line has a key or a value that does not fit",
            fix=f"`{self.prog} --help` lists the keys, `--print_config` shows a complete config, "
            "`--model.adapter.help CLASS` explains one class",
        ) from ex


class ResidencyCLI(LightningCLI):
    """Parts are named, not positional: `model.adapter`, `model.mitigations.<name>`, `data.domains.<name>`.

    Args:
        args: Command line without the program's name.
        run: Whether the subcommand is carried out, or only parsed and instantiated.
    """

    def __init__(self, args: list[str] | None = None, *, run: bool = True) -> None:
        install()
        self._carry_out = run
        super().__init__(
            ContinualModule,
            StreamData,
            save_config_callback=None,
            trainer_defaults=dict(_TRAINER_DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "residency"}
            | {name: {"description": text} for name, text in _DESCRIPTIONS.items()},
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
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed: an integer, never drawn."""
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of everything random in the run.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run is apart from model and data."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run; its folder is runs/<name>.")
        parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run instead of runs/<name>.")
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int,
            default=50,
            help="Optimizer steps between two checkpoints inside a stage; 0 = only whole stages are saved.",
        )
        parser.add_argument(
            "--store", type=str | None, default=None, help="Folder where runs share the scores of the untrained model."
        )
        parser.add_argument("--axes", type=dict[str, Any], default={}, help="Place in a study (set by `sweep`).")
        parser.add_class_arguments(EvaluationSettings, "evaluation")
        parser.add_class_arguments(WandbSettings, "wandb")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.add_argument(
                "--stage", type=int | None, default=None, help="Which saved stage: 0 = base, 1, 2, ...; default the last."
            )
        if subcommand == "predict":
            parser.add_argument("--domain", type=str | None, default=None, help="Which domain; default the first.")
            parser.add_argument("--limit", type=int, default=8, help="How many rows.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; `--model.mitigations.<name> FILE` and its like take a preset file."""
        words = sys.argv[1:] if args is None else args
        self.config = parser.parse_args(expand_presets(words))

    def _parse_ckpt_path(self) -> None:
        """Runs resume from their own folder; Lightning's way would let a checkpoint override the command line."""

    def _set_seed(self) -> None:
        """Nothing draws from a global generator, so there is none to seed."""

    def instantiate_classes(self) -> None:
        """Build module and data; Trainers are made stage by stage."""
        with warnings.catch_warnings():
            # LoraConfig warns about its own default once jsonargparse spells it out.
            warnings.filterwarnings("ignore", message=".*loftq_config.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self._get(self.config_init, "model")
        self.datamodule = self._get(self.config_init, "data")
        self.trainers = Trainers(self._trainer_options)

    def _trainer_options(self) -> dict[str, Any]:
        """Trainer arguments with callbacks and loggers of their own at every call."""
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(Trainer, "trainer")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            built = parser.instantiate_classes(Namespace(trainer=copy.deepcopy(self._get(self.config, "trainer"))))
        return dict(vars(built["trainer"]))

    def _run_subcommand(self, subcommand: str) -> None:
        self.result: Any = None
        if self._carry_out:
            logging.getLogger("transformers").setLevel(logging.ERROR)
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            self.result = getattr(self, subcommand)()

    # -- verbs --------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train the stream."""
        return train_stream(
            module=self.model,
            data=self.datamodule,
            trainers=self.trainers,
            folder=self.folder,
            settings=self.settings,
            config=self.resolved,
            views=self._views(),
        )

    def validate(self) -> dict[str, Any]:
        """Score a saved stage on validation rows."""
        return self._score("validation")

    def test(self) -> dict[str, Any]:
        """Score a saved stage on test rows."""
        return self._score("test")

    def _score(self, split: Split) -> dict[str, Any]:
        parts = {"module": self.model, "data": self.datamodule, "folder": self.folder, "settings": self.settings}
        found = score_saved(**parts, stage=self.option("stage"), split=split, device=self.trainers.root_device)
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
            device=self.trainers.root_device,
        )
        show_predictions(written)
        return written

    # -- parts --------------------------------------------------------------------------------------------------

    def option(self, name: str) -> Any:
        """An option of the subcommand."""
        return self._get(self.config_init, name)

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.option("run_dir") or Path("runs") / self.option("name")))

    @property
    def settings(self) -> StreamSettings:
        """The run's settings."""
        every = self.option("checkpoint_every_n_steps")
        if every < 0:
            raise UserError(
                f"--checkpoint_every_n_steps={every}",
                why="it counts optimizer steps between two checkpoints",
                fix="give 0 (no checkpoint inside a stage) or a positive number",
            )
        evaluation = self.option("evaluation")
        store = self.option("store")
        return StreamSettings(
            cell=self.option("name"),
            seed=self.option("seed_everything"),
            axes=dict(self.option("axes")),
            checkpoint_every_n_steps=every,
            evaluation=EvaluationSettings(**_plain(evaluation)),
            store=Path(store) if store else None,
        )

    @property
    def resolved(self) -> dict[str, Any]:
        """The full config as plain values; where the run lies is not part of what it is."""
        self._dump_config()
        return {key: value for key, value in self.config_dump.items() if key not in ("config", "run_dir", "subcommand")}

    def _views(self) -> list[View]:
        settings = WandbSettings(**_plain(self.option("wandb")))
        tracker = Tracker(settings=settings, folder=self.folder.path, config=self.resolved)
        return [ConsoleView(folder=self.folder.path), tracker]


def expand_presets(words: Sequence[str]) -> list[str]:
    """Put the content of preset files where a named part is given as a file.

    jsonargparse reads files for plain arguments (`--model.adapter FILE`) but not for entries of a dict.

    Raises:
        UserError: The file is missing or is not YAML.
    """
    joined: list[str] = []
    for word in words:
        if joined and _NAMED_PART.fullmatch(joined[-1]) and not word.startswith("-"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [_expanded(word) for word in joined]


def _expanded(word: str) -> str:
    key, _, value = word.partition("=")
    if not (_NAMED_PART.fullmatch(key) and value.endswith((".yaml", ".yml", ".json"))):
        return word
    try:
        content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{key}: cannot read {value}: {error}",
            why="it looks like a preset file",
            fix="give an existing YAML file with class_path and init_args, or a class name",
        ) from error
    return f"{key}={json.dumps(content)}"


def _plain(value: Any) -> dict[str, Any]:
    return value.as_dict() if isinstance(value, Namespace) else dict(vars(value))


def parse(args: list[str]) -> ResidencyCLI:
    """Parse and instantiate without carrying anything out; for studies and tests."""
    return ResidencyCLI(args, run=False)
