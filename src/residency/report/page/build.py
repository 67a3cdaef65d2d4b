"""Folders of records in, one page with its files out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from residency.core.text import printable
from residency.report.advice.advice import Advice, advise
from residency.report.advice.case import called
from residency.report.charts.figures import figures_of
from residency.report.charts.theme import Figure, config
from residency.report.evidence.findings import Findings
from residency.report.evidence.of_records import findings_of
from residency.report.page.files import (
    as_json,
    claim_report,
    data_address,
    draw,
    place,
    save_figure,
    save_table,
    viewer_code,
)
from residency.report.page.glossary import WORDS
from residency.report.page.matrix_viewer import viewer_data
from residency.report.page.paper import paper_table, write_paper
from residency.report.records.arms import Arm, arms_of
from residency.report.records.records import Records, read_records
from residency.report.tables.first_grids import benchmarks_grid, first_grid
from residency.report.tables.frames import Frames, frames_of
from residency.report.tables.html_tables import (
    Grid,
    comparisons_grid,
    domains_grid,
    flips_grid,
    methods_grid,
)
from residency.report.tables.provenance import configs, missing, provenance
from residency.report.tables.published import Published, published

__all__ = ["Report", "build", "write_report"]

_MARKS = {"shown": "●", "indicated": "◐", "open": "○", "none": "○"}
_PAGE = Path(__file__).parent
# Rows of a table that the page carries; the files have all.
_ROWS = 1200


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report says, before it is drawn."""

    records: Records
    arms: Sequence[Arm]
    findings: Findings
    frames: Frames
    advice: Advice
    figures: Sequence[Figure]

    @classmethod
    def of(cls, records: Records) -> Report:
        """Compute it."""
        arms = arms_of(records)
        findings = findings_of(records, arms)
        frames = frames_of(records, arms, findings)
        advice = advise(records, arms, findings)
        figures = figures_of(records, arms, frames, advice)
        return cls(records=records, arms=arms, findings=findings, frames=frames, advice=advice, figures=figures)


def build(
    paths: Sequence[str | Path] | str | Path,
    *,
    output: str | Path | None = None,
    references: Iterable[str] = (),
    scorer: str | None = None,
    baseline: str | None = None,
    wandb_project: str | None = None,
    paper: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write a report: `index.html`, self-contained, with `tables/` and `figures/` beside it.

    Args:
        paths: Folders of runs, or of studies.
        output: Folder to write into; `report` in the first of the paths by default.
        references: Names of published tables to print beside, never as a pass mark.
        scorer: What the comparison is about; the study's by default.
        baseline: What methods are compared with; the study's by default.
        wandb_project: Make one W&B run of the report in this project; `None` = none.
        paper: Metrics of `paper/table.tex`, see `paper_table`; none = no such table.
        overwrite: Write into a folder that holds something else, too.

    Returns:
        The page.

    Raises:
        UserError: A folder holds no records, or a name is unknown; nothing has been written then.
    """
    several = [paths] if isinstance(paths, str | Path) else list(paths)
    records = read_records(several, scorer=scorer, baseline=baseline)
    beside = published(references)
    report = Report.of(records)
    folder = Path(output) if output is not None else records.home
    table = paper_table(records, report.arms, report.findings, paper) if paper else None
    page = write_report(report, folder, beside=beside, overwrite=overwrite)
    if table is not None:
        write_paper(table, records, folder)
    if wandb_project is not None:
        from residency.report.page.wandb_report import track_report
        from residency.runs.views.wandb_settings import WandbSettings

        settings = WandbSettings(project=wandb_project)
        track_report(page, records, report.advice, report.frames.items(), settings=settings)
    return page


def write_report(report: Report, folder: Path, *, beside: Sequence[Published] = (), overwrite: bool = False) -> Path:
    """Write the page with its tables and figures.

    Args:
        report: What it says.
        folder: Folder to write into.
        beside: Published tables to print beside.
        overwrite: Write into a folder that holds something else, too.

    Returns:
        The page.
    """
    claim_report(folder, overwrite=overwrite)
    drawn = {figure.id: draw(figure) for figure in report.figures if figure.chart is not None}
    for figure in report.figures:
        if figure.id in drawn:
            save_figure(folder / "figures", figure, drawn[figure.id])
    tables = {name: save_table(folder / "tables", name, frame) for name, frame in report.frames.items().items()}
    # The page last: whoever sees it sees the files that it links.
    page = folder / "index.html"
    place(page, _page(report, drawn, beside, tables))
    return page


def _page(
    report: Report, drawn: dict[str, str], beside: Sequence[Published], tables: Mapping[str, Sequence[str]]
) -> str:
    records, advice, frames = report.records, report.advice, report.frames
    first, *rest = [_shown(figure, drawn.get(figure.id)) for figure in report.figures]
    rows = frames.methods.to_dicts() if frames.methods.height else []
    trained = next((arm for arm in report.arms if arm.done), None)
    higher = trained.higher_is_better if trained else True
    entry = trained.done[0].record["scores"][records.scorer] if trained else {}
    unit = printable(entry.get("unit") or "unknown unit")
    chosen = next((a.name for a in report.arms if a.value == advice.choice), None)
    vega, script = viewer_code(), _text("report.js")
    explorer, note = viewer_data(report.arms, records.scorer, first=advice.leader)
    context = {
        "title": records.title,
        "setting": _setting(report),
        "version": _version(),
        "question": _question(report),
        "advice": advice,
        "mark": _MARKS[advice.strength],
        "first": first,
        "figures": rest,
        "drawn": [figure for figure in report.figures if figure.id in drawn],
        "methods": _with_json(methods_grid(rows, chosen=chosen, less=not higher, unit=unit)),
        "methods_note": _methods_note(report, unit, higher),
        "scores": _with_json(_first(report)),
        "comparisons": _with_json(comparisons_grid(frames.comparisons.to_dicts())),
        "benchmarks": _with_json(benchmarks_grid(frames.benchmarks.to_dicts())),
        "flips": _with_json(flips_grid(frames.flips.to_dicts())),
        "domains": _with_json(domains_grid(frames.domains.to_dicts())),
        "missing": _with_json(missing(records)),
        "count": len(records.entries),
        "published": [{**vars(one), "grid": _with_json(one.grid)} for one in beside],
        "provenance": [_with_json(grid) for grid in provenance(records, report.arms)],
        "tables": tables,
        "explorer": explorer and Markup(as_json(explorer)),
        "explorer_note": note,
        "words": WORDS,
        "themes": Markup(as_json({"light": config(), "dark": config(dark=True)})),
        "css": Markup(_text("report.css")),
        "js": Markup(script),
        "vega": Markup(vega),
        # Only these two scripts run, whatever a name from data may contain.
        "hashes": Markup(" ".join(f"'sha256-{_hash(text)}'" for text in (vega, script))),
        "parts": _parts(report, beside),
    }
    shown, left = configs(report.arms)
    context |= {"configs": shown, "configs_left": left}
    return _template().render(context)


def _first(report: Report) -> Grid:
    rows, records = report.frames.first.to_dicts(), report.records
    base = called(records, records.baseline)
    leader = base if report.advice.leader is None else called(records, report.advice.leader)
    return first_grid(rows, leader=leader, baseline=base)


def _with_json(grid: Grid) -> dict[str, Any]:
    left, kept = len(grid.rows) - _ROWS, replace(grid, rows=grid.rows[:_ROWS])
    data = Markup(as_json(kept.data())) if len(kept.rows) > grid.shown else ""
    return {**vars(kept), "json": data, "left": max(0, left)}


def _shown(figure: Figure, svg: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"id": figure.id, "title": figure.title, "caption": figure.caption, "absent": figure.absent}
    if svg is None:
        return found | {"svg": None}
    address, width, height = data_address(svg)
    return found | {"svg": address, "width": width, "height": height, "json": Markup(as_json(figure.spec))}


def _text(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(_PAGE)
    # Everything is escaped but what is wrapped in Markup here: our own script and style, and escaped JSON.
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html.j2")


def _version() -> str:
    try:
        return version("residency")
    except PackageNotFoundError:
        return ""


def _question(report: Report) -> str:
    axis = report.records.subject
    values = {arm.value for arm in report.arms}
    if len(values) < 2:
        return "What was learnt, and what was forgotten?"
    orders = {tuple(map(printable, e.record["domains"])) for e in report.records.done if e.reference is None}
    domains = list(next(iter(orders))) if len(orders) == 1 else []
    told = 1 < len(domains) <= 5 and all(len(name) <= 24 for name in domains)
    stream = f"{', then '.join(domains)}" if told else "one domain after another"
    return f"A model learns {stream}, and each may overwrite the one before. Which {printable(axis)} should I take?"


def _setting(report: Report) -> str:
    done = [entry for entry in report.records.done if entry.reference is None]
    if not done:
        return f"{len(report.records.entries)} cells, none complete"
    orders = {tuple(entry.record["domains"]) for entry in done}
    domains = " → ".join(printable(name, 30) for name in next(iter(orders)))
    stream = f"learns {domains}" if len(orders) == 1 else f"{len(orders)} orders of domains"
    backbone = done[0].record.get("provenance", {}).get("backbone") or {}
    name = next((str(backbone[k]) for k in ("name", "path", "model") if backbone.get(k)), "one model")
    trained = report.arms
    seeds = max(len(arm.done) for arm in trained) if trained else 0
    methods = f"{len(trained)} method{'s' * (len(trained) != 1)}"
    stem = printable(Path(name).name, 50)
    return f"{stem} {stream} · {methods} · {seeds} seed{'s' * (seeds != 1)}"


def _methods_note(report: Report, unit: str, higher: bool) -> str:
    kinds = (
        set(report.frames.methods["interval"].drop_nulls()) if "interval" in report.frames.methods.columns else set()
    )
    over = {"seeds": "over seeds (on these test rows)", "rows": "over test rows only, not over seeds"}
    over["seeds and rows"] = "over seeds and test rows"
    intervals = f" Intervals are 95 %, {' or '.join(over[k] for k in sorted(kinds))}." if kinds else ""
    scorer = printable(report.records.scorer)
    direction = "higher" if higher else "lower"
    base = called(report.records, report.records.baseline)
    return (
        f"Scored by {scorer} in {unit}: {direction} is better. Forgetting above 0 is bad. Compared with {base}."
        f"{intervals} Point at a heading for its definition, press it to sort."
    )


def _parts(report: Report, beside: Sequence[Published]) -> list[tuple[str, str]]:
    wanted = [("summary", "Summary"), ("methods", "Table"), ("plane", "Trade-off"), ("forest", "Differences")]
    wanted += [("published", "Published")] * bool(beside)
    wanted += [("stream", "Stream"), ("domains", "Domains"), ("matrices", "Matrices"), ("costs", "Costs")]
    wanted += [("missing", "Missing"), ("provenance", "Provenance"), ("files", "Files"), ("words", "Words")]
    ids = {figure.id for figure in report.figures} | {
        "summary", "methods", "published", "missing", "provenance", "files", "words",
    }  # fmt: skip
    return [(id, name) for id, name in wanted if id in ids]
