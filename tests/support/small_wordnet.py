"""A folder of WordNet's database files with a few synsets, in the format of wndb(5WN)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["SYNSETS", "write_wordnet"]

SYNSETS: Mapping[str, Sequence[Sequence[str]]] = {
    "noun": [
        ["physician", "doctor", "doc"],
        ["car", "auto", "automobile", "motor_vehicle"],
        ["run"],
        ["kitchen", "galley"],
        ["apple", "pome"],
        ["arsenic", "As"],
    ],
    "verb": [["run", "operate"], ["purchase", "buy"], ["reject", "spurn"]],
    "adj": [["big(a)", "large(a)"], ["rejected", "spurned"], ["happy"]],
    "adv": [["quickly", "rapidly", "Speedily"]],
}
_LICENCE = "  1 This software and database is being provided to you, the LICENSEE\n"


def write_wordnet(folder: Path, synsets: Mapping[str, Sequence[Sequence[str]]] = SYNSETS) -> Path:
    """The eight files; the first synset that a word is in is its most frequent sense."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, sets in synsets.items():
        data, senses = _LICENCE, dict[str, list[int]]()
        for words in sets:
            offset = len(data.encode())
            listed = " ".join(f"{word} 0" for word in words)
            data += f"{offset:08d} 03 {part[0]} {len(words):02x} {listed} 001 @ 00000000 n 0000 | a gloss; of words\n"
            for word in words:
                senses.setdefault(word.partition("(")[0].lower(), []).append(offset)
        index = _LICENCE + "".join(
            f"{lemma} {part[0]} {len(offsets)} 2 @ ~ {len(offsets)} 1 {' '.join(f'{o:08d}' for o in offsets)}  \n"
            for lemma, offsets in sorted(senses.items())
        )
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(index)
    return folder
