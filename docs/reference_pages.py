"""Pages that nobody writes: one per adapter, mitigation, objective and scorer, and one per preset (a hook of mkdocs).

What a page says comes from the docstring of the class, the comment of the preset and the table of
experiments/adapters; a new file in `configs` or `src` is a new page at the next build.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
KINDS = {
    "adapter": ("Adapters", "--model.adapter {name}", "which coordinates move, and how they step"),
    "mitigation": ("Mitigations", "--model.mitigations.{name} {name}", "what protects earlier knowledge"),
    "objective": ("Objectives", "--model.objective {name}", "what is minimised on one batch"),
    "inspection": ("Inspection", "--inspection.{name} {name}", "what looks inside the model after every stage"),
    "logger": ("Loggers", "--trainer.logger {name}", "where curves are shown"),
}
FACTS = ("requires", "provides", "holds", "reads", "first_domain", "uses_validation", "task_id_at_test")
"""Class attributes that say what a class composes with."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    classes = dict(_classes())
    pages = {"reference/presets.md": _all_presets()}
    for kind, (title, _, sentence) in KINDS.items():
        pages[f"reference/{kind}.md"] = _overview(kind, title, sentence, classes)
        for preset in _presets(kind):
            pages[f"reference/{kind}/{preset.stem}.md"] = _preset_page(kind, preset)
    pages["reference/scorer.md"] = _scorers(classes)
    for path, node in classes.items():
        pages[f"reference/classes/{path}.md"] = _class_page(path, node)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _presets(kind: str) -> Sequence[Path]:
    return sorted((ROOT / "configs" / kind).glob("*.yaml"))


def _comment(preset: Path) -> str:
    lines = [line.lstrip("# ") for line in preset.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return " ".join(line for line in lines if not line.startswith("residency "))


def _class_path(preset: Path) -> str:
    """Where the class of a preset is written, for the link: packages re-export."""
    match = re.search(r"^class_path: (\S+)", preset.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else ""


def _preset_page(kind: str, preset: Path) -> str:
    _, option, _ = KINDS[kind]
    named = _class_path(preset)
    body = [line for line in preset.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    composes = _composition().get(preset.stem) if kind == "adapter" else None
    cls = _home(named)
    return "\n\n".join(
        part
        for part in (
            f"# {preset.stem}",
            _comment(preset),
            f"    residency fit --config quickstart {option.format(name=preset.stem)} --name {preset.stem}",
            f"Class: [`{named}`](../classes/{cls}.md)." if cls else f"Class: `{named}`.",
            _composes(composes) if composes else "",
            "## The preset",
            "```yaml\n" + "\n".join(body) + "\n```",
        )
        if part
    )


def _composition() -> Mapping[str, Mapping[str, object]]:
    file = ROOT / "experiments/adapters/composition.json"
    found: Mapping[str, Mapping[str, object]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _composes(row: Mapping[str, object]) -> str:
    said = {True: "yes", False: "no"}
    cells = [
        f"| {name} | {said.get(value, value) if isinstance(value, bool) else value} |" for name, value in row.items()
    ]
    return "\n".join(["| composes with | |", "|---|---|", *cells])


def _overview(kind: str, title: str, sentence: str, classes: Mapping[str, ast.ClassDef]) -> str:
    presets = [f"| [{p.stem}]({kind}/{p.stem}.md) | {_comment(p)} |" for p in _presets(kind)]
    room = {"adapter": "adapters", "mitigation": "mitigations", "objective": "objectives"}.get(kind, kind)
    own = [path for path in classes if path.split(".")[1] == room]
    listed = [f"* [`{path.rpartition('.')[2]}`](classes/{path}.md): {_first(classes[path])}" for path in own]
    lines = [f"# {title}", f"{sentence[0].upper()}{sentence[1:]}. By name: `residency presets {kind}`."]
    lines += ["\n".join(["| preset | |", "|---|---|", *presets])] if presets else []
    return "\n\n".join([*lines, *(["## Classes", "\n".join(listed)] if listed else [])])


def _all_presets() -> str:
    lines = [f"* [{title}]({kind}.md): {len(_presets(kind))} presets" for kind, (title, _, _) in KINDS.items()]
    files = [
        f"| `{path.relative_to(ROOT / 'configs').with_suffix('')}` | {_comment(path)} |"
        for folder in ("", "backbone", "stream", "trainer", "studies")
        for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))
    ]
    text = (
        "A preset is a YAML file that is given by its name. `residency presets` lists all of them. Your own lie in "
        "`configs/<kind>/` where the command runs, or in the folders that `RESIDENCY_PRESETS` names; they count more "
        "than the packaged ones."
    )
    table = "\n".join(["| for `--config` and `sweep` | |", "|---|---|", *files])
    return "\n\n".join(["# Presets", text, "\n".join(lines), table])


def _scorers(classes: Mapping[str, ast.ClassDef]) -> str:
    own = [path for path in classes if path.startswith("residency.scorers.")]
    listed = [f"* [`{path.rpartition('.')[2]}`](classes/{path}.md): {_first(classes[path])}" for path in own]
    return "\n\n".join(["# Scorers", "How one answer is judged; any number per domain.", "\n".join(listed)])


def _class_page(path: str, node: ast.ClassDef) -> str:
    module = path.rpartition(".")[0]
    tree = ast.parse((SOURCE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    facts = [f"| `{name}` | `{value}` |" for name, value in _facts(node)]
    table = "\n".join(["| what it composes with | |", "|---|---|", *facts]) if facts else ""
    background = (ast.get_docstring(tree) or "").strip()
    # Indented lines of a module's docstring are its equations.
    return "\n\n".join(part for part in (f"# {node.name}", background, table, f"::: {path}") if part)


def _facts(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and field.value is not None and ast.unparse(field.target) in FACTS:
            yield ast.unparse(field.target), ast.unparse(field.value)


def _classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Public classes of the rooms that have pages: those in a module's `__all__` that can be built by a config."""
    for room in ("adapters", "mitigations", "objectives", "scorers", "inspection"):
        for file in sorted((SOURCE / "residency" / room).rglob("*.py")):
            if file.name == "__init__.py":
                continue
            module = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
            tree = ast.parse(file.read_text(encoding="utf-8"))
            public = _public(tree)
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name in public and node.bases:
                    yield f"{module}.{node.name}", node


def _public(tree: ast.Module) -> Sequence[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: Sequence[str] = ast.literal_eval(node.value)
            return names
    return ()


def _home(named: str) -> str:
    """The path of a re-exported class as it is written."""
    room, _, name = named.rpartition(".")
    return next((path for path, node in _classes() if node.name == name and path.startswith(room)), "")


def _first(node: ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
