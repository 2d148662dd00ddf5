"""All experiments by name, in the order of the report."""

from __future__ import annotations

from medmoe_jax.experiments import costs
from medmoe_jax.experiments.compare import Comparison, Pair, Row, both
from medmoe_jax.experiments.config import LLMS, StudyConfig
from medmoe_jax.experiments.figures import FIGURES
from medmoe_jax.experiments.result import Experiment

ZERO_SHOT = (
    "Zero-shot is the model of phase 2. In the phantom study it has met the kinds of questions of "
    "Findings in phase 2, but no rule of Signs: there its answers are guesses.",
)
IDLE = (
    "The router knows four modalities. Two experts share them (CT and X-ray, MRI and pathology); "
    "of six, two have no modality, so the router hardly calls them.",
)

COMPARISONS: dict[str, Comparison] = {
    "table1": Comparison(
        "Table 1: zero-shot (phase 2) and fine-tuned (phase 3)",
        (
            *both(lambda llm, name: Row(f"{name}, fine-tuned", llm)),
            *both(lambda llm, name: Row(f"{name}, zero-shot", llm, "stage2")),
        ),
        (
            *both(
                lambda llm, name: Pair(
                    f"{name}, fine-tuned",
                    f"{name}, zero-shot",
                    f"{name}: phase 3 improves on phase 2",
                )
            ),
            Pair("Phi-2, fine-tuned", "StableLM-2, fine-tuned", "Phi-2 is better than StableLM-2"),
        ),
        notes=ZERO_SHOT,
    ),
    "table2": Comparison(
        "Table 2: exact match, recall and BLEU of open answers",
        both(lambda llm, name: Row(name, llm)),
        (Pair("Phi-2", "StableLM-2", "Phi-2 is better than StableLM-2 on open questions"),),
        figures=("EMS", "open", "BLEU"),
        notes=("EMS, recall (open) and BLEU-1 as the official script computes them.",),
    ),
    "table3": Comparison(
        "Table 3: classification",
        both(lambda llm, name: Row(name, llm, "classify")),
        (Pair("Phi-2", "StableLM-2", "Phi-2 classifies better than StableLM-2"),),
        role="classify_tests",
        figures=(),
        notes=("Phase 3 on questions and on the first two tasks; the others were not trained.",),
    ),
    "table4": Comparison(
        "Table 4: dense fine-tuning against MoE tuning",
        (
            Row("SFT", variant="dense"),
            Row("SFT, FFNs only", variant="dense_ffn"),
            Row("MoE tuning"),
        ),
        (
            Pair("MoE tuning", "SFT", "MoE tuning is better than dense fine-tuning"),
            Pair("MoE tuning", "SFT, FFNs only", "MoE tuning is better than tuning dense FFNs"),
        ),
        notes=(
            "SFT trains projector and language model as phase 2 does (the paper's row is that of "
            "LLaVA-Med with Phi-2), the second row the FFNs of all layers. All start from the "
            "model of phase 2 and see the same batches.",
        ),
    ),
    "table5": Comparison(
        "Table 5: with and without the meta expert",
        (Row("no meta expert", variant="no_meta"), Row("with meta expert")),
        (Pair("with meta expert", "no meta expert", "the meta expert helps"),),
    ),
    "table6": Comparison(
        "Table 6: pretrained, frozen router against one learned in phase 3",
        (Row("learned router", variant="learned"), Row("pretrained router")),
        (
            Pair(
                "pretrained router",
                "learned router",
                "a router pretrained on modalities is better than a learned one",
            ),
        ),
        notes=("The learned router starts at random, with the load-balancing loss (aux_coef).",),
    ),
    "table9": Comparison(
        "Table 9: number of activated experts",
        (Row("1 expert", variant="top1"), Row("2 experts", variant="top2")),
        (Pair("2 experts", "1 expert", "two activated experts are better than one"),),
        hours=True,
    ),
    "table10": Comparison(
        "Table 10: number of experts (two activated)",
        tuple(Row(f"{n} experts", variant=f"experts{n}") for n in (2, 4, 6)),
        (
            Pair("4 experts", "2 experts", "four experts are better than two"),
            Pair("6 experts", "4 experts", "six experts are slightly better than four"),
        ),
        notes=IDLE,
        hours=True,
    ),
    "table11": Comparison(
        "Table 11: more classification data",
        (
            Row("StableLM-2", "stablelm", "classify"),
            Row("StableLM-2, scaled", "stablelm", "classify_more"),
        ),
        (Pair("StableLM-2, scaled", "StableLM-2", "more classification data help"),),
        role="classify_tests",
        figures=(),
        notes=(
            "Scaling adds training data of two tasks. The mean is over all tasks, the new ones "
            "included; the columns of the first two say whether these gain.",
        ),
    ),
    "upcycling": Comparison(
        "Start of the experts: the paper's against a function-preserving one",
        (Row("the paper's start"), Row("function-preserving start", variant="preserving")),
        (
            Pair(
                "function-preserving start",
                "the paper's start",
                "starting from the function of phase 2 is better",
                of_paper=False,
            ),
        ),
        notes=(
            "The paper's start copies the FFN into experts and meta expert, so that a layer first "
            "gives about twice what phase 2 learned.",
        ),
    ),
    "routing_null": Comparison(
        "What the modality router buys: random and uniform routing with the same parameters",
        (
            Row("modality router"),
            Row("random routing", variant="random"),
            Row("uniform routing", variant="uniform"),
        ),
        (
            Pair(
                "modality router",
                "random routing",
                "routing by modality is better than random routing",
                of_paper=False,
            ),
            Pair(
                "modality router",
                "uniform routing",
                "routing by modality is better than all experts at once",
                of_paper=False,
            ),
        ),
        notes=(
            "Random and uniform routing are used in training and in answering; the routed part has "
            "the same weight. Uniform routing computes all experts, four times the arithmetic.",
        ),
    ),
    "image_null": Comparison(
        "What the answers owe to the image",
        (
            Row("image"),
            *(Row(f"{name} image", control=name) for name in ("blank", "noise", "shuffled")),
        ),
        tuple(
            Pair("image", f"{name} image", f"the image helps, against a {name} one", False)
            for name in ("blank", "noise", "shuffled")
        ),
    ),
}


def table7(cfg: StudyConfig) -> Comparison:
    """LoRA of the ranks that the config names."""
    rows, pairs = [], []
    for llm, name in LLMS.items():
        full = Row(f"{name}, full", llm)
        rows.append(full)
        for rank in cfg.lora_ranks:
            row = Row(f"{name}, rank {rank}", llm, f"lora{rank}")
            rows.append(row)
            pairs.append(Pair(full.title, row.title, f"{name}: LoRA of rank {rank} costs accuracy"))
        high, low = (f"{name}, rank {rank}" for rank in (max(cfg.lora_ranks), min(cfg.lora_ranks)))
        pairs.append(Pair(high, low, f"{name}: the higher rank is better"))
    return Comparison(
        TITLE7,
        tuple(rows),
        tuple(pairs),
        notes=(
            "Adapters on the experts and the meta expert. The tiny study's ranks stand to its "
            "width about as the paper's 256 and 128 to 2560. That LLaVA-Med loses more by LoRA is "
            "not tested here.",
        ),
    )


TITLE7 = "Table 7: LoRA on the experts"
TABLE7 = Experiment(
    TITLE7,
    lambda study: table7(study.cfg).cells(study),
    lambda name, study, store, folder: table7(study.cfg).result(name, study, store, folder),
)
# In the order of the report: the paper's tables and figures, then the controls.
EXPERIMENTS: dict[str, Experiment] = {
    name: COMPARISONS[name].experiment()
    for name in ("table1", "table2", "table3", "table4", "table5", "table6")
}
EXPERIMENTS |= {"table7": TABLE7, "table8": costs.TABLE8}
EXPERIMENTS |= {n: COMPARISONS[n].experiment() for n in ("table9", "table10", "table11")}
EXPERIMENTS |= {"table14": costs.TABLE14} | FIGURES
EXPERIMENTS |= {n: c.experiment() for n, c in COMPARISONS.items() if n not in EXPERIMENTS}
