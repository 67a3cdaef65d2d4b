"""`residency push FOLDER --repo OWNER/NAME`: an exported stage goes to a model hub, after its card has been checked."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from residency.core.errors import EXIT_DONE, UserError

__all__ = ["check_card", "push", "push_command"]

MARKER = "residency.json"
_REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def push_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency push`.
    """
    parser = argparse.ArgumentParser(prog="residency push", description=__doc__)
    parser.add_argument("folder", type=Path, help="what `residency export` has written")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the model repository; made if it is new")
    parser.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    parser.add_argument("--dry-run", action="store_true", help="only check the card and list the files")
    options = parser.parse_args(words)
    found = push(options.folder, repo=options.repo, public=options.public, dry_run=options.dry_run)
    for name, size in found["files"].items():
        print(f"{size:>13,}  {name}")
    total = f"{len(found['files'])} files, {sum(found['files'].values()) / 2**20:.1f} MiB"
    print(f"{total} {'would go' if options.dry_run else 'went'} to {found['url'] or options.repo}")
    return EXIT_DONE


def push(folder: str | Path, *, repo: str, public: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Upload an exported stage.

    Args:
        folder: As `export` has written it.
        repo: `owner/name`.
        public: Whether a new repository can be seen by everybody.
        dry_run: Check and list, without a network.

    Returns:
        {"files": {name: bytes}, "url": of the commit, empty in a dry run}.

    Raises:
        UserError: The folder is no export, its card is not valid, or the hub refuses.
    """
    path = Path(folder)
    if not (path / MARKER).is_file():
        raise UserError(
            f"{folder} is no export (no {MARKER})",
            why="only what `residency export` has written has a card and a licence",
            fix="`residency export RUN --stage K` first; it names the folder",
        )
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > 96:
        raise UserError(f"--repo {repo}", why="a model repository is called owner/name", fix="for example me/legal")
    check_card(path / "README.md")
    files = {
        file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()
    }
    return {"files": files, "url": "" if dry_run else _upload(path, repo, public)}


def check_card(path: Path) -> Any:
    """Parse a model card as a hub does, and check what it needs.

    Returns:
        Its `huggingface_hub.ModelCard`.

    Raises:
        UserError: It is not there, its front matter is not what a hub reads, or names a path of this machine.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: {' '.join(str(error).split())}",
            why="the front matter of a model card is YAML that a hub reads",
            fix="export the stage again (--overwrite)",
        ) from error
    lacking = [key for key in ("license", "library_name", "pipeline_tag", "tags") if not getattr(card.data, key, None)]
    base = getattr(card.data, "base_model", None)
    if lacking or (base is not None and not _REPO.fullmatch(str(base))):
        raise UserError(
            f"{path} lacks {', '.join(lacking)}" if lacking else f"{path}: base_model is {base!r}",
            why="a hub links a model with its base by an id, and shows it by licence and library",
            fix="export the stage again (--overwrite)",
        )
    return card


def _upload(folder: Path, repo: str, public: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        return str(
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"residency export {folder.name}")
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{repo}: {' '.join(str(error).split())[:300]}",
            why="the hub did not take it",
            fix="log in with `hf auth login` (a token that may write), check the name and the network",
        ) from error
