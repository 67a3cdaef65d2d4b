"""What a report leaves beside the page: tables as CSV, Parquet and LaTeX, figures as SVG, PDF and PNG."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl

from residency.core.errors import UserError
from residency.core.markers import FolderKind, claim, is_marker
from residency.report.charts.theme import Figure, config
from residency.runs.views.tables import finite, printable

__all__ = [
    "REPORT",
    "Drawn",
    "as_json",
    "claim_report",
    "data_address",
    "draw",
    "latex",
    "place",
    "save_figure",
    "save_table",
    "tex",
    "viewer_code",
]

GRAMMAR = alt.SCHEMA_VERSION.rpartition(".")[0]
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {char: f"\\{char}" for char in "&%$#_{}"}
_TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "→": r"$\rightarrow$", "±": r"$\pm$"}
Drawn = str
_PRINTED = 400  # rows of a table in LaTeX


def _made_before_markers(path: Path) -> bool:
    """Whether a folder holds a page of `residency report`, or only the heat maps that a study puts beside it."""
    page = path / "index.html"
    if page.is_file():
        with page.open("rb") as handle:
            return b'<meta name="generator" content="residency' in handle.read(4000)
    others = [child for child in path.iterdir() if not is_marker(child.name, REPORT)]
    return all(child.suffix in (".png", ".svg") and child.is_file() for child in others)


REPORT = FolderKind(name="report", option="--output", proof=_made_before_markers)


def claim_report(folder: Path, *, overwrite: bool) -> None:
    """Make the folder of a report, or see that it is one.

    Raises:
        UserError: Something else lies there, or it cannot be written.
    """
    try:
        claim(folder, REPORT, overwrite=overwrite)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}",
            why="the report and its files are written there",
            fix="choose another folder with --output",
        ) from error


def place(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all. A view may be lost in a power cut, so nothing is synced to the disk.

    Raises:
        UserError: The folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}",
            why="the report and its files are written there",
            fix="free some space, or choose another folder with --output",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def draw(figure: Figure) -> Drawn:
    """The SVG of a figure on white, without a network."""
    import vl_convert

    # As a picture it has one text for screen readers, its caption; one per mark would double its size.
    spec = figure.spec | {"config": config(background="white") | {"aria": False}}
    # No address is allowed: what a chart shows is in the chart.
    svg: str = vl_convert.vegalite_to_svg(spec, vl_version=GRAMMAR, allowed_base_urls=[])
    # Gradients are numbered by a counter of the process; the same records must give the same bytes.
    order: dict[str, str] = {}
    return re.sub(r"\bgradient_\d+\b", lambda m: order.setdefault(m.group(), f"shade_{len(order)}"), svg)


@lru_cache(maxsize=1)
def viewer_code() -> str:
    """Vega, Vega-Lite and vega-embed as vl-convert ships them, in a scope of their own; takes seconds once."""
    import vl_convert

    bundle = vl_convert.javascript_bundle(vl_version=GRAMMAR)  # type: ignore[call-arg]
    return f"(() => {{\n{bundle}\n}})();".replace("</script", "<\\/script").replace("<!--", "<\\!--")


def data_address(svg: Drawn) -> tuple[str, int, int]:
    """(data: address for <img>, width, height). As an image an SVG can run nothing and its ids are its own."""
    head = svg[:2000]
    width, height = (re.search(rf'\b{side}="([\d.]+)"', head) for side in ("width", "height"))
    sizes = [round(float(found.group(1))) if found else 0 for found in (width, height)]
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}", sizes[0], sizes[1]


def save_figure(folder: Path, figure: Figure, svg: Drawn) -> None:
    """`<id>.svg`, `.pdf`, `.png` (twice the size) and `.vl.json`, the definition."""
    import vl_convert

    place(folder / f"{figure.id}.svg", svg)
    place(folder / f"{figure.id}.pdf", vl_convert.svg_to_pdf(svg))
    place(folder / f"{figure.id}.png", vl_convert.svg_to_png(svg, scale=2))
    definition = figure.spec | {"config": config(background="white")}
    place(folder / f"{figure.id}.vl.json", json.dumps(definition, ensure_ascii=False))


def save_table(folder: Path, name: str, frame: pl.DataFrame) -> tuple[str, ...]:
    """`<name>.csv`, `.parquet` and, of what fits into a paper, `.tex`; the endings that were written."""
    from io import BytesIO

    parquet = BytesIO()
    frame.write_parquet(parquet)
    place(folder / f"{name}.parquet", parquet.getvalue())
    place(folder / f"{name}.csv", _csv(frame))
    if frame.height > _PRINTED:
        return "csv", "parquet"
    place(folder / f"{name}.tex", latex(frame, name=name))
    return "csv", "parquet", "tex"


def _csv(frame: pl.DataFrame) -> str:
    """CSV whose text cells no spreadsheet takes for a formula."""
    text = [pl.col(c) for c, kind in frame.schema.items() if kind == pl.String]
    guarded = frame.with_columns(
        pl.when(column.str.contains(r"^[=+\-@\t\r]"))
        .then(pl.concat_str(pl.lit("'"), column))
        .otherwise(column)
        .name.keep()
        for column in text
    )
    return guarded.write_csv()


def latex(frame: pl.DataFrame, *, name: str, digits: int = 3) -> str:
    r"""A table with `\usepackage{booktabs}`; columns without any value are left out, names are escaped."""
    kept = [c for c in frame.columns if frame[c].null_count() < frame.height]
    numeric = [frame.schema[c].is_numeric() for c in kept]
    lines = [
        f"% {name}; needs \\usepackage{{booktabs}}",
        rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numeric)}}}",
        r"\toprule",
        " & ".join(map(tex, kept)) + r" \\",
        r"\midrule",
        *(" & ".join(_tex_cell(row[c], digits) for c in kept) + r" \\" for row in frame.iter_rows(named=True)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _tex_cell(value: Any, digits: int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    number = finite(value)
    if number is None:
        return "--" if value is None or isinstance(value, float) else tex(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", r"\,")
    return f"${number:.{digits}f}$" if abs(number) < 1e5 else f"{number:,.0f}".replace(",", r"\,")


def tex(text: object) -> str:
    return "".join(_TEX.get(char, char) for char in printable(text, 400))


def as_json(value: Mapping[str, Any] | list[Any]) -> str:
    """JSON for the inside of a script element: no character of it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
