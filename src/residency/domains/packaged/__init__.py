"""Domains that `residency assets` provides: one file per reader, data from pinned packages."""

from residency.domains.packaged.attack import AttackTactics
from residency.domains.packaged.cdm import CdmTerms
from residency.domains.packaged.chitchat import ChitChat
from residency.domains.packaged.hpo import HpoTerms
from residency.domains.packaged.icd10 import IcdChapters
from residency.domains.packaged.licences import LicenceClauses
from residency.domains.packaged.stdlib_code import StdlibSignatures
from residency.domains.packaged.us_gaap import GaapSections

__all__ = [
    "AttackTactics",
    "CdmTerms",
    "ChitChat",
    "GaapSections",
    "HpoTerms",
    "IcdChapters",
    "LicenceClauses",
    "StdlibSignatures",
]
