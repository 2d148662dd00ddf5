"""The paper's own figures, as its tables print them (percent unless a unit is named).

Source: Jiang et al., "Med-MoE: Mixture of Domain-Specific Experts for Lightweight Medical
Vision-Language Models", 2024. Table 2's LLaVA-Med and the methods of others are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

SETS = ("VQA-RAD", "SLAKE", "PathVQA")
VQA = tuple(f"{name} {kind}" for name in SETS for kind in ("open", "closed"))
METRICS = tuple(f"{name} {kind}" for name in SETS for kind in ("EMS", "R", "BS"))


@dataclass(frozen=True)
class PaperTable:
    """A table: its columns, and its rows by title."""

    columns: tuple[str, ...]
    rows: dict[str, tuple[float | str | None, ...]]
    remark: str = ""


PHI = (58.55, 82.72, 85.06, 85.58, 34.74, 91.98)
STABLELM = (50.08, 80.07, 83.16, 83.41, 33.79, 91.30)

TABLES: dict[str, PaperTable] = {
    "table1": PaperTable(
        VQA,
        {
            "Med-MoE (Phi2), fine-tuned": PHI,
            "Med-MoE (StableLM), fine-tuned": STABLELM,
            "Med-MoE (Phi2), zero-shot": (36.73, 61.75, 43.93, 56.97, 6.94, 66.46),
            "Med-MoE (StableLM), zero-shot": (28.02, 66.91, 40.63, 52.64, 9.40, 69.09),
        },
    ),
    "table2": PaperTable(
        METRICS,
        {
            "Med-MoE (Phi2)": (59.69, 58.55, 52.95, 84.46, 85.06, 83.16, 34.37, 34.74, 32.85),
            "Med-MoE (StableLM)": (52.53, 50.08, 45.67, 82.44, 83.16, 81.53, 33.60, 33.79, 32.67),
        },
        "EMS above recall, as in VQA-RAD, is possible because the official score is a precision.",
    ),
    "table3": PaperTable(
        ("PneumoniaMNIST", "OrganCMNIST"),
        {"Med-MoE (Phi2)": (91.4, 89.9), "Med-MoE (StableLM)": (89.3, 88.6)},
    ),
    "table4": PaperTable(
        VQA,
        {"SFT": (54.83, 81.35, 81.29, 83.29, 31.73, 90.17), "MoE tuning": PHI},
        "The row SFT is LLaVA-Med (Phi2.7B) of Table 1.",
    ),
    "table5": PaperTable(
        VQA,
        {
            "no meta expert": (54.37, 81.42, 81.54, 82.45, 32.12, 90.19),
            "with meta expert": PHI,
        },
    ),
    "table6": PaperTable(
        VQA,
        {"learned router": (56.33, 82.19, 82.75, 84.59, 33.40, 91.19), "router (ours)": PHI},
    ),
    "table7": PaperTable(
        VQA,
        {
            "LoRA (Phi2), rank 256": (58.12, 82.35, 83.58, 84.85, 32.62, 91.18),
            "LoRA (Phi2), rank 128": (57.20, 81.75, 83.95, 84.37, 33.03, 90.83),
            "LoRA (StableLM), rank 256": (47.83, 79.04, 82.12, 82.45, 33.28, 90.80),
            "LoRA (StableLM), rank 128": (45.74, 78.31, 82.27, 83.17, 32.20, 90.62),
        },
        "Some of the printed changes against the models without LoRA do not follow from Table 1.",
    ),
    "table8": PaperTable(
        ("activated", "training memory", "an answer", "load memory"),
        {
            "Med-MoE (Phi2)": ("3.6B", "23 GB", "3 s", "13.4 GB"),
            "Med-MoE (StableLM)": ("2.0B", "12.5 GB", "3 s", "10.5 GB"),
            "LoRA (Phi2)": ("3.6B", "13.5 GB", "3 s", "13.7 GB"),
            "LoRA (StableLM)": ("2.0B", "8 GB", "3 s", "10.8 GB"),
        },
    ),
    "table9": PaperTable(
        (*VQA, "hours"),
        {
            "1 expert": (46.7, 83.4, 82.1, 83.2, 33.9, 90.9, "7 h"),
            "2 experts": (47.2, 83.8, 82.3, 84.9, 34.1, 91.8, "8 h"),
        },
        "No row of Table 1 has these figures.",
    ),
    "table10": PaperTable(
        (*VQA, "hours"),
        {
            "2 experts": (47.03, 77.54, 81.52, 81.45, 32.78, 90.60, "6 h"),
            "4 experts": (47.83, 79.04, 82.12, 82.45, 33.28, 90.80, "8 h"),
            "6 experts": (48.03, 78.84, 82.42, 82.65, 33.58, 91.10, "11 h"),
        },
        "The row of 4 experts is that of LoRA (StableLM), rank 256, in Table 7.",
    ),
    "table11": PaperTable(
        ("PneumoniaMNIST", "OrganCMNIST", "DermaMNIST", "BloodMNIST"),
        {
            "Med-MoE (StableLM)": (89.3, 88.6, None, None),
            "Med-MoE (StableLM), scaled": (91.6, 90.1, 80.4, 95.1),
        },
    ),
    "table14": PaperTable(
        ("experts", "activated experts", "MoE layers", "width", "layers", "activated", "total"),
        {
            "StableLM-1.6B": (None, None, None, 2560, 32, "1.6B", "1.6B"),
            "Med-MoE (StableLM)": (4, 2, 16, 2560, 32, "2.0B", "2.9B"),
            "Phi2-2.7B": (None, None, None, 2560, 32, "2.7B", "2.7B"),
            "Med-MoE (Phi2)": (4, 2, 16, 2560, 32, "3.6B", "5.3B"),
        },
        "StableLM-2-1.6B itself has width 2048 and 24 layers.",
    ),
}
