"""The stream's data: named domains, named probes, order and batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

from lightning.pytorch import LightningDataModule

from residency.core.errors import UserError
from residency.core.types import Example, Split, Stage
from residency.domains.augmentation.base import BaseModel, is_child
from residency.domains.base import Domain
from residency.domains.narrowed import augmenting, limited, share_scored, under_root
from residency.domains.sampler import StageExamples
from residency.domains.shots import encode_with_shots, pick_shots
from residency.domains.token_counts import TokenCounts, check_readable, count_tokens
from residency.domains.training_tokens import TrainingTokens, is_large, training_tokens

__all__ = ["StreamData"]


Classes = Literal["own", "seen", "all"]

_LARGEST_BATCH = 65_536
"""Examples per optimizer step that are taken for meant even where a domain has fewer rows."""

_TRAINED: WeakKeyDictionary[Domain, tuple[tuple[Any, ...], TrainingTokens]] = WeakKeyDictionary()
"""{domain: (what was looked at, what becomes of its training rows)}."""


class StreamData(LightningDataModule):
    """Domains to learn one after another, and probes that are only evaluated.

    Args:
        domains: The domains by name. Without `order` they are learned in the order given here.
        probes: Data sets that are scored after every stage and never trained on (general ability).
        order: Names of the domains in the order of learning; may leave some out.
        batch_size: Examples per optimizer step, over all devices and accumulated micro-batches.
        micro_batch_size: Examples per forward pass on one device; `null` = as many as fit the batch size. Must divide
            batch size / devices; gradients are accumulated over the rest. Changes no gradient beyond rounding, except
            where a model has dropout: its masks are drawn per micro-batch, seeded by step and number: another cut has
            other masks, and a rerun has the same again. A run says so before its first step.
        root: Folder that relative paths of domains and probes begin at: your copy of a stream.
        max_train: Most training rows of every domain, whatever its own limit; null = its own limit alone.
        max_validation: The same of validation rows.
        max_test: The same of test rows.
        classes: Labels that compete for the accuracy of a domain: `own` = its own (which one it is, is told: task
            incremental); `seen` = those of all domains learned so far as well (class incremental); `all` = those of the
            whole stream at every stage, which leaves the rows of the matrix comparable. One label alone is no choice:
            there is no accuracy then.
        shots: Training rows that stand, with their answers, before every prompt that is scored.
        num_workers: Processes that tokenise ahead of the model; 0 = none. Does not change the data.
    """

    def __init__(
        self,
        *,
        domains: dict[str, Domain],
        probes: dict[str, Domain] | None = None,
        order: list[str] | None = None,
        batch_size: int = 8,
        micro_batch_size: int | None = None,
        num_workers: int = 0,
        root: str | None = None,
        max_train: int | None = None,
        max_validation: int | None = None,
        max_test: int | None = None,
        classes: Classes = "own",
        shots: int = 0,
    ) -> None:
        super().__init__()
        most: dict[Split, int | None] = {"train": max_train, "validation": max_validation, "test": max_test}
        self.domains = limited(under_root(root, domains), most)
        self.probes = limited(under_root(root, probes or {}), most)
        share_scored(self.domains, self.probes)
        self.order = list(order) if order is not None else list(self.domains)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.num_workers = num_workers
        self.classes: Classes = classes
        self.shots = shots
        self._tokenised: dict[tuple[Any, ...], tuple[tuple[Any, ...], tuple[Example, ...]]] = {}
        self._check_names()

    def _check_names(self) -> None:
        unknown = [name for name in self.order if name not in self.domains]
        if not self.order or unknown or len({*self.order}) < len(self.order):
            raise UserError(
                f"data.order is {self.order}, data.domains has {sorted(self.domains)}",
                why="the order names every domain at most once, at least one, and only known ones",
                fix="correct data.order, or leave it out to learn the domains as they are listed",
            )
        both = sorted({*self.order} & {*self.probes})
        if both:
            raise UserError(
                f"{both} are domains and probes at once",
                why="a probe is never trained on",
                fix="rename one of them, or leave it out of data.probes",
            )
        if self.batch_size < 1 or self.num_workers < 0 or self.shots < 0 or (self.micro_batch_size or 1) < 1:
            raise UserError(
                f"data.batch_size={self.batch_size}, data.micro_batch_size={self.micro_batch_size}, "
                f"data.num_workers={self.num_workers}, data.shots={self.shots}",
                why="sizes are at least 1, workers and shots at least 0",
                fix="correct these values",
            )

    @property
    def columns(self) -> dict[str, Domain]:
        """Everything that is scored: the domains in learning order, then the probes."""
        return {name: self.domains[name] for name in self.order} | self.probes

    def use_base(self, base: BaseModel) -> None:
        """Tell domains whose `augment` needs it which pretrained model a run begins with; before rows are read."""
        for _, domain in augmenting(self.domains):
            domain.base = domain.base or base

    def augmented(self) -> dict[str, list[dict[str, Any]]]:
        """{domain: what each method of its `augment` made (`Made`)}; only where there is one."""
        read = {name: self.domains[name] for name in self.order if self.domains[name].rows("train")}
        return {name: domain.augmented for name, domain in read.items() if domain.augmented}

    def micro_batch(self, *, devices: int, batch: int | None = None) -> int:
        """Examples per forward pass on one device.

        Args:
            devices: How many.
            batch: Examples per optimizer step; the run's by default.

        Raises:
            UserError: The batch size cannot be divided evenly.
        """
        batch = batch or self.batch_size
        size = self.micro_batch_size or max(1, batch // devices)
        if batch % (size * devices):
            raise UserError(
                f"data.batch_size={batch} on {devices} devices with micro-batches of {size}",
                why="the global batch must be a multiple of devices x micro-batch",
                fix="change data.batch_size or data.micro_batch_size so that it divides evenly",
            )
        return size

    def examples(self, stage: Stage, tokenizer: Any) -> StageExamples:
        """The training examples of a stage by position, without rows that are left out: mapped from the file of a
        large domain, tokenised when read of others."""
        name, domain = stage.domain, self.domains[stage.domain]
        rows, tokens = domain.rows("train"), self._training_tokens(stage.domain, tokenizer)
        kept, packed = tokens.kept, tokens.packed

        @cache
        def encode(index: int) -> Example:
            return domain.template.encode(tokenizer, domain=name, row=rows[kept[index]])

        def unpack(index: int) -> Example:
            assert packed is not None
            return packed.at(index, domain=name, row=rows[kept[index]])

        read = encode if packed is None else unpack
        return StageExamples(rows=len(kept), encode=read, stage=stage, names=lambda index: rows[kept[index]].id)

    def _training_tokens(self, name: str, tokenizer: Any) -> TrainingTokens:
        """What becomes of the training rows of a domain; looked at once, for all streams that it is in."""
        domain = self.domains[name]
        source = tokenizer, domain.template, domain.rows("train")
        known, found = _TRAINED.get(domain, ((), None))
        if found is None or any(old is not new for old, new in zip(known, source, strict=True)):
            _TRAINED[domain] = source, (found := training_tokens(name, domain, tokenizer))
        return found

    def longest_of_many(self, name: str, tokenizer: Any) -> int | None:
        """Tokens of the longest training row that is used; `None` if the rows are few: then nobody has looked yet."""
        return self._training_tokens(name, tokenizer).counts.longest if is_large(self.domains[name]) else None

    def count_tokens(self, tokenizer: Any, split: Split) -> dict[str, dict[str, TokenCounts]]:
        """{column: {split: counts}} of what is trained on and of what is scored.

        Args:
            tokenizer: Of the backbone.
            split: Which rows are scored.

        Raises:
            UserError: Rows cannot be read by the model, or are too long without a policy that allows it.
        """
        found: dict[str, dict[str, TokenCounts]] = {name: {} for name in self.columns}
        for name in self.order:
            found[name]["train"] = self._training_tokens(name, tokenizer).counts
        for name, domain in self.columns.items():
            if domain.scorers:
                examples = self.evaluation_examples(name, split, tokenizer)
                pairs = zip(examples, domain.rows(split), strict=True)
                found[name][split] = count_tokens(pairs, tokenizer)
        for name, parts in found.items():
            for part, counts in parts.items():
                check_readable(counts, tokenizer, where=f"{part} rows of {name}")
        return found

    def check(self, *, batch_sizes: Iterable[int] = ()) -> None:
        """Read every file now, so that a bad row stops the command before anything is trained.

        Args:
            batch_sizes: Of stages that have their own.

        Raises:
            UserError: A row, or the name of a domain, cannot be used.
        """
        rows = max(len(self.domains[name].rows("train")) for name in self.order)
        size = max([self.batch_size, *batch_sizes])
        if size > max(_LARGEST_BATCH, rows):
            raise UserError(
                f"a batch_size of {size:,}, and the largest domain has {rows:,} training rows",
                why="one optimizer step would see every row many times, and have no end",
                fix="give the examples per optimizer step, for example 8",
            )
        for name in self.columns:
            # Names become columns of tables, fields of charts and lines on a terminal.
            if not name.strip() or not name.isprintable():
                raise UserError(
                    f"a domain or probe is called {name!r}",
                    why="a name with control characters or without any other cannot be shown",
                    fix="give it a name of letters, digits, blanks and punctuation",
                )
        for domain in self.columns.values():
            domain.rows("train")

    def labels(self, name: str, learned: int) -> tuple[str, ...]:
        """Labels that compete for a row of a domain.

        Args:
            name: Domain or probe.
            learned: After how many stages.
        """
        own = self.columns[name].labels()
        if self.classes == "own" or not own:
            return own
        domains = self.order if self.classes == "all" else self.order[:learned]
        seen = (label for domain in domains for label in self.domains[domain].labels())
        return tuple(sorted({*own, *seen}))

    def evaluation_examples(
        self, name: str, split: Split, tokenizer: Any, *, competing: int | None = None, learned: int = 0
    ) -> list[Example]:
        """The rows of one split as tokens; tokenised once, however many states are scored.

        Args:
            name: Domain or probe.
            split: Which rows.
            tokenizer: Of the backbone.
            competing: How many rows get all other labels as alternatives, where a scorer reads them; `None` = all.
            learned: After how many stages.
        """
        domain = self.columns[name]
        labels = self.labels(name, learned) if any(s.labels != "none" for s in domain.scorers.values()) else ()
        rows = domain.rows(split)
        key = name, split, competing, labels
        # By identity: a tokenizer or rows that were replaced since are other ones, whatever they are equal to.
        source = tokenizer, domain.template, rows
        known, examples = self._tokenised.get(key, ((), ()))
        if not known or any(old is not new for old, new in zip(known, source, strict=True)):
            count = len(rows) if competing is None else competing
            encode = partial(domain.template.encode, tokenizer, domain=name, split=split)
            if self.shots:
                shown = pick_shots([row for row in domain.rows("train") if not is_child(row)], self.shots)
                encode = partial(encode_with_shots, encode, domain.template, shown)
            examples = tuple(encode(row=row, labels=labels if i < count else ()) for i, row in enumerate(rows))
            self._tokenised[key] = source, examples
        return list(examples)

    def fingerprints(self) -> Mapping[str, str]:
        """Content hash of every domain and probe."""
        return {name: domain.fingerprint() for name, domain in self.columns.items()}
