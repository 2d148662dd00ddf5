"""Miniature sources for tests: the files of every data set as they are distributed, field by field,
with the defects that the real ones have. Pictures are random."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from medmoe_jax.data.prepare.__main__ import main


def prepare(name: str, source: Path | list[Path], out: Path, *more: str) -> int:
    """Runs the command, with two workers; returns its exit status."""
    paths = [str(path) for path in (source if isinstance(source, list) else [source])]
    return main([name, "--source", *paths, "--out", str(out), "--workers", "2", *more])


def lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (24, 18)) -> bytes:
    """A random picture in a format of Pillow's."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def put(path: Path, data: bytes) -> Path:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def save_json(path: Path, content: Any) -> Path:
    """Writes JSON as the originals have it."""
    return put(path, json.dumps(content, ensure_ascii=False).encode())


def save_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a parquet file as the Hugging Face hub has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def embedded(seed: int, kind: str = "JPEG", name: str | None = None) -> dict[str, Any]:
    """The image column of such a file."""
    return {"bytes": picture(seed, kind), "path": name}


def rad_row(qid: Any, image: str, question: str, answer: Any, **other: Any) -> dict[str, Any]:
    """A row of VQA-RAD with all its fields."""
    return {
        "qid": qid,
        "phrase_type": "freeform",
        "qid_linked_id": f"link-{qid}",
        "image_case_url": f"https://medpix.nlm.nih.gov/case?id={qid}",
        "image_name": image,
        "image_organ": "HEAD",
        "evaluation": "evaluated",
        "question": question,
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": "PRES",
        "answer": answer,
        "answer_type": "CLOSED",
    } | other


def vqa_rad(folder: Path) -> Path:
    """VQA-RAD as released: 8 rows, 4 pictures, no bad row."""
    for n in range(4):
        put(folder / "VQA_RAD Image Folder" / f"synpic{n}.jpg", picture(n))
    rows = [
        rad_row(1, "synpic0.jpg", "Is there a bleed?", "Yes"),
        rad_row(2, "synpic0.jpg", "What modality is this?", "MR - FLAIR", answer_type="OPEN",
                question_type="MODALITY", phrase_type="para"),
        rad_row("3", "synpic1.jpg", "How many lesions are\tthere?", 2, answer_type="OPEN ",
                image_organ="CHEST", question_type="COUNT"),
        rad_row(4, "synpic1.jpg", "Is the heart enlarged?", "\tNo ", answer_type=" CLOSED ",
                image_organ="CHEST ", question_type="SIZE, pres"),
        rad_row(5, "synpic2.jpg", "Which side?", "left", answer_type="open", image_organ="ABD",
                phrase_type="test_freeform"),
        rad_row(6, "synpic3.jpg", "Is this normal?", "no", phrase_type="test_para", answer_type=""),
        rad_row(7, "synpic3.jpg", "Is this a CT?", "no", phrase_type="test_freeform",
                answer_type="wrong", question_type="MODALITY"),
        rad_row(1, "synpic0.jpg", "Is there a bleed?", "Yes"),
    ]  # fmt: skip
    save_json(folder / "VQA_RAD Dataset Public.json", rows)
    return folder


def vqa_rad_mirror(folder: Path) -> Path:
    """VQA-RAD as parquet: 3 + 2 rows."""
    train = [
        {"image": embedded(0), "question": "is there a bleed?", "answer": "yes"},
        {"image": embedded(0), "question": "what is the modality?", "answer": "ct with contrast"},
        {"image": embedded(1, "PNG"), "question": "which side?", "answer": "left"},
    ]
    test = [
        {"image": embedded(0), "question": "is it large?", "answer": "no"},
        {"image": embedded(2), "question": "where is it?", "answer": "in the lung"},
    ]
    save_parquet(folder / "data" / "train-00000-of-00001-eb8844602202be60.parquet", train)
    save_parquet(folder / "data" / "test-00000-of-00001-e5bc3d208bb4deeb.parquet", test)
    return folder


def zipped(folder: Path, archive: Path) -> Path:
    """Packs a folder, its name included, and returns the archive."""
    with zipfile.ZipFile(archive, "w") as stream:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                stream.write(file, file.relative_to(folder.parent).as_posix())
    return archive


def slake_row(qid: int, image: str, question: str, answer: Any, **other: Any) -> dict[str, Any]:
    """A row of SLAKE with all its fields."""
    return {
        "img_id": int("".join(c for c in image if c.isdigit()) or 0),
        "img_name": image,
        "question": question,
        "answer": answer,
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "CT",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Modality",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
    } | other


def slake_rows() -> dict[str, list[dict[str, Any]]]:
    """English: 3 + 1 + 2 usable rows and the empty one; Chinese: 2 + 0 + 1."""
    one, two, three, four = (f"xmlab{n}/source.jpg" for n in (1, 2, 3, 4))
    return {
        "train": [
            slake_row(0, one, "What modality is used?", "CT"),
            slake_row(1, one, "Is it\tnormal? ", "Yes ", answer_type="CLOSED"),
            slake_row(2, two, "图像使用了什么成像模态?", "MRI", q_lang="zh", modality="MRI"),
            slake_row(3, two, "How many kidneys?", 2, modality="MRI", content_type="Quantity"),
            slake_row(4, two, "是否正常?", "是", q_lang="zh", modality="MRI",
                      answer_type="CLOSED"),
            slake_row(1622, one, "Where is the liver?", "", content_type="Position"),
        ],
        "validation": [slake_row(10, three, "Which organ?", "Lung", modality="X-Ray")],
        "test": [
            slake_row(20, four, "Is it an X-ray?", "yes", answer_type="closed", modality="X-Ray"),
            slake_row(21, four, "图中有什么?", "肺", q_lang="zh", modality="X-Ray"),
            slake_row(22, four, "Where?", "Chest", q_lang="EN", modality="X-Ray"),
        ],
    }  # fmt: skip


def slake(folder: Path, zipped_images: bool = False) -> Path:
    """SLAKE as released: three JSON files and imgs/, or imgs.zip."""
    for name, rows in slake_rows().items():
        save_json(folder / f"{name}.json", rows)
    for n in (1, 2, 3, 4):
        put(folder / "imgs" / f"xmlab{n}" / "source.jpg", picture(n))
        put(folder / "imgs" / f"xmlab{n}" / "mask.png", picture(n + 50, "PNG"))
        save_json(folder / "imgs" / f"xmlab{n}" / "detection.json", [])
    if zipped_images:
        zipped(folder / "imgs", folder / "imgs.zip")
        shutil.rmtree(folder / "imgs")
    return folder


def pvqa_row(number: int, image: str, question: str, answer: Any, kind: str) -> dict[str, Any]:
    """A row of PathVQA's VQA pickles with all its fields."""
    return {
        "answer_type": kind,
        "img_id": image,
        "label": {answer: 1},
        "question_id": number,
        "question_type": question.split()[0].lower(),
        "sent": question,
    }


def path_vqa(folder: Path, protocol: int = 2) -> Path:
    """PathVQA as released: pickles of both kinds, other pickles beside them, images by split."""
    rows = {
        "train": [
            pvqa_row(100000, "train_0000", "Where are the cells?", "in the canals", "other"),
            pvqa_row(100001, "train_0000", "Is it benign?", "no", "yes/no"),
            pvqa_row(100002, "train_0001", "How many nodules?", 2, "number"),
        ],
        "val": [pvqa_row(200000, "val_0000", "What is present?", "vessel\tgastric ", "other")],
        "test": [pvqa_row(300000, "test_0000", "Is it na\u00efve?", "yes", "yes/no")],
    }
    for split, content in rows.items():
        put(folder / "qas" / f"{split}_vqa.pkl", pickle.dumps(content, protocol))
        plain = [
            {"image": r["img_id"], "question": r["sent"], "answer": next(iter(r["label"]))}
            for r in content
        ]
        put(folder / "qas" / split / f"{split}_qa.pkl", pickle.dumps(plain, protocol))
    put(folder / "qas" / "trainval_label2ans.pkl", pickle.dumps(["yes", "no"], protocol))
    for n, name in enumerate(("train_0000", "train_0001", "val_0000", "test_0000")):
        put(folder / "images" / name.split("_")[0] / f"{name}.jpg", picture(n))
    return folder


def talk(question: str, answer: Any) -> list[dict[str, Any]]:
    """A conversation of one question."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def med_moe(folder: Path) -> Path:
    """Med-MoE's files, with both spellings of the conversation."""
    train = [
        {"id": 1, "image": "synpic0.jpg", "answer_type": "close",
         "conversations": talk("<image>\nIs there a bleed?", "Yes")},
        {"id": 1, "image": "xmlab1/source.jpg", "answer_type": "OPEN",
         "conversatons": talk("How many?\n<image>", 2)},
        {"id": "train_0001", "image": "train/train_0001.jpg", "answer_type": "other",
         "conversations": talk("What is it?", " a cell ")},
    ]  # fmt: skip
    test = [
        {"id": 9, "image": "test/test_0001.jpg", "answer_type": "yes/no",
         "conversations": talk("<image>\nIs it benign?", "no")},
    ]  # fmt: skip
    save_json(folder / "train_all.json", train)
    save_json(folder / "test_pvqa.json", test)
    names = ("synpic0.jpg", "xmlab1/source.jpg", "train/train_0001.jpg", "test/test_0001.jpg")
    for n, name in enumerate(names):
        put(folder / "images" / name, picture(n))
    return folder
