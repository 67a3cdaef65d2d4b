"""What W&B gets of a finished run: figures of its summary, tables, and its weights and data as artifacts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from residency.runs.views.wandb_settings import WandbSettings, mode
from residency.runs.views.wandb_values import safe

__all__ = ["Tables", "final_summary", "final_tables", "log_artifacts"]

Tables = Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]]


def final_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """`final/<scorer>/<metric>`, `final/general/<scorer>/<benchmark>` with mean and minimum, `final/cost/<part>`."""
    found = {
        f"final/{safe(scorer)}/{safe(name)}": value
        for scorer, metrics in (record.get("summary") or {}).items()
        for name, value in metrics.items()
    }
    for scorer, general in (record.get("general") or {}).items():
        place = f"final/general/{safe(scorer)}"
        found |= {f"{place}/{safe(benchmark)}": delta for benchmark, delta in general["deltas"].items()}
        found |= {f"{place}/{safe(benchmark)}_stderr": error for benchmark, error in general.get("stderr", {}).items()}
        found |= {f"{place}/{part}": general[part] for part in ("mean", "minimum")}
    return found | {f"final/cost/{part}": value for part, value in (record.get("cost") or {}).items()}


def final_tables(record: Mapping[str, Any]) -> dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]]:
    """The score matrices, what mitigations hold, and the benchmarks of lm-eval, as far as there are any."""
    found: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = {
        "R": (["row", "after", "domain", "scorer", "score"], list(_cells(record)))
    }
    if held := (record.get("cost") or {}).get("mitigation_state_bytes"):
        found["state_bytes"] = (["mitigation", "bytes"], [[name, size] for name, size in held.items()])
    if benchmarks := list(_benchmarks(record)):
        found["general"] = (["row", "after", "benchmark", "metric", "value", "stderr", "part_of"], benchmarks)
    return found


def _cells(record: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The score matrices as rows of a table; a missing score stays empty."""
    columns = [*record["domains"], *(record.get("probes") or [])]
    after = ["base", *record["domains"]]
    for scorer, entry in (record.get("scores") or {}).items():
        for row, values in enumerate(entry["R"]):
            for name, value in zip(columns, values, strict=False):
                yield [row, after[row], name, scorer, value]


def _benchmarks(record: Mapping[str, Any]) -> Iterator[list[Any]]:
    after = ["base", *record["domains"]]
    for row, observers in enumerate(record.get("inside") or []):
        for findings in observers.values():
            for name, found in findings.get("benchmarks", {}).items():
                measured = [found["metric"], found["value"], found.get("stderr"), found.get("part_of")]
                yield [row, after[row], name, *measured]


# -- artifacts ----------------------------------------------------------------------------------------------------


def log_artifacts(run: Any, record: Mapping[str, Any], folder: Path, settings: WandbSettings) -> None:
    """Data as what the run has read, weights after every stage as what it has made.

    Of data, a card with counts and the digest of the rows; the rows themselves stay on this machine. Of weights, the
    file of every stage that is not larger than `settings.artifact_mb`, as versions of one artifact.

    Args:
        run: The live W&B run.
        record: As in results.json.
        folder: Of the run.
        settings: Limit and names.
    """
    if not settings.artifact_mb:
        return
    place = settings.place(record["cell"])
    for name in (*record["domains"], *(record.get("probes") or [])):
        _use(run, _data_card(record, name, place.project))
    for k, domain in enumerate(record["domains"], start=1):
        artifact = _weights(record, k, domain, folder, settings)
        if artifact is not None:
            run.log_artifact(artifact, aliases=["latest", f"stage-{k}"])


def _data_card(record: Mapping[str, Any], name: str, project: str) -> Any:
    import wandb

    provenance = record.get("provenance") or {}
    card = {
        "name": name,
        "fingerprint": (provenance.get("fingerprints") or {}).get("data", {}).get(name),
        "licence": (provenance.get("licences") or {}).get(name),
        "splits": ((record.get("data") or {}).get("domains") or {}).get(name),
    }
    artifact = wandb.Artifact(_artifact_name(f"{project}-data-{name}"), "dataset", metadata={**card, "splits": None})
    with artifact.new_file("data.json") as file:
        file.write(json.dumps(card, sort_keys=True, indent=1))
    return artifact


def _weights(record: Mapping[str, Any], k: int, domain: str, folder: Path, settings: WandbSettings) -> Any:
    import wandb

    stage = next(iter((folder / "stages").glob(f"{k}-*")), None)
    state = None if stage is None else stage / "state.safetensors"
    if stage is None or state is None or not state.is_file() or state.stat().st_size > settings.artifact_mb * 1e6:
        return None
    facts = {"cell": record["cell"], "stage": k, "domain": domain, "seed": record.get("seed")}
    name = _artifact_name(f"{settings.study or settings.place(record['cell']).project}-{record['cell']}")
    artifact = wandb.Artifact(name, "adapter", metadata=facts | {"axes": record.get("axes") or {}})
    for file in (state, stage / "stage.json"):
        if file.is_file():
            # Never written again: W&B reads it where it lies instead of copying it.
            artifact.add_file(str(file), name=file.name, policy="immutable")
    return artifact


def _use(run: Any, artifact: Any) -> None:
    """An artifact as input of the run."""
    if mode() == "offline":
        # `use_artifact` refuses to work offline, where it need not: this is what it does with a new artifact.
        run._log_artifact(artifact, aliases=["latest"], is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _artifact_name(text: str) -> str:
    """W&B takes letters, digits, dashes, dots and underscores, at most 128."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:128].strip("_.-") or "unnamed"
