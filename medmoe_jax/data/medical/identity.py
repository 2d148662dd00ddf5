"""DICOM tags that say who a patient is: which of them a file has, never what they hold."""

from __future__ import annotations

from pathlib import Path

from medmoe_jax.data.medical import dicom

TAGS = (
    "PatientName",
    "PatientID",
    "OtherPatientIDs",
    "OtherPatientNames",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientBirthName",
    "PatientMotherBirthName",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "MedicalRecordLocator",
    "AccessionNumber",
    "PatientComments",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "OperatorsName",
    "InstitutionName",
    "InstitutionAddress",
)
BURNT = "BurnedInAnnotation"
NOBODY = ("", "anonymous", "anonymized", "anonymised", "anon", "none", "unknown", "removed")


def identifying(path: Path) -> tuple[str, ...]:
    """Keywords of the tags that name or describe a person, and 'BurnedInAnnotation' where the file
    says that text is part of its pixels.

    Values that anonymisation leaves (NOBODY) do not count; no value leaves this function.

    Raises:
      DataError: no DICOM file, or pydicom is not installed.
    """
    with dicom.quiet():
        ds = dicom.header(path, [*TAGS, BURNT])
        found = [tag for tag in TAGS if dicom.text(ds, tag).strip("^= ").lower() not in NOBODY]
        return (*found, BURNT) if dicom.text(ds, BURNT) == "YES" else tuple(found)
