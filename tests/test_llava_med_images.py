"""LLaVA-Med's images from a bucket with the layout of PubMed Central's, on this machine."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bucket import TinyBucket, send, serve

from medmoe_jax.data.prepare import pmc
from medmoe_jax.data.prepare.__main__ import main
from medmoe_jax.data.prepare.llava_med_images import Figure, Missing, download, parse_line, plan
from medmoe_jax.data.problems import DataError

TAR = "https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/83/41/{}.tar.gz"


def picture(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def line(article: str, file: str, pair: str) -> dict[str, str]:
    return {
        "pmc_tar_url": TAR.format(article),
        "image_file_path": f"{article}/{file}",
        "pair_id": pair,
    }


def write_list(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(x) if x != 'cut' else '{'}\n" for x in lines))
    return path


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyBucket]:
    monkeypatch.setattr(pmc, "FIRST_WAIT", 0.005)
    monkeypatch.setattr(pmc, "TRIES", 3)
    files = {
        "PMC12.1/PMC12.1.xml": b"<article/>",
        "PMC12.1/a.jpg": picture(1),
        "PMC12.1/b.jpg": picture(2),
        "PMC12.2/a.jpg": picture(3),
        "PMC12.2/A.JPG": picture(4),
        "PMC12.10/b.gif": picture(5, "GIF"),
        "PMC123.1/a.jpg": picture(6),
        "PMC7.1/fig 1+2.jpg": picture(7, "PNG"),
        "PMC7.1/text.jpg": b"<html>no image</html>",
        "PMC7.1/half.jpg": picture(8)[:400],
        "metadata/PMC12.1.json": b"{}",
    }
    with serve(files) as served:
        yield served


def fetch(bucket: TinyBucket, out: Path, figures: list[Figure], **options: Any) -> list[Missing]:
    return download(figures, (), out, pmc.Bucket(bucket.url, rate=1000, contact="a@b"), **options)


def test_lines_of_the_list() -> None:
    assert parse_line(line("PMC12", "x/g1.jpg", "33_F1")) == Figure("33_F1", "PMC12", "g1.jpg")
    only_url = {"pmc_tar_url": TAR.format("PMC5"), "image_file_path": "g.jpg", "pair_id": "p"}
    assert parse_line(only_url) == Figure("p", "PMC5", "g.jpg")
    assert parse_line(only_url | {"pmc_tar_url": "", "image_file_path": "PMC6/g.jpg"}).article == (
        "PMC6"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pair_id": "../evil"}, "is no file name"),
        ({"pair_id": "a/b"}, "is no file name"),
        ({"pair_id": ".hidden"}, "is no file name"),
        ({"pair_id": None}, "is no file name"),
        ({"image_file_path": ""}, "names no file"),
        ({"image_file_path": "PMC1/.."}, "names no file"),
        ({"image_file_path": "PMC2/g.jpg"}, "different articles"),
        ({"pmc_tar_url": "https://x/y.tar.gz", "image_file_path": "g.jpg"}, "no article"),
    ],
)
def test_lines_that_cannot_be_used(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_line(line("PMC1", "g.jpg", "p") | change)


def test_only_wanted_images_are_planned(tmp_path: Path) -> None:
    source = write_list(
        tmp_path / "urls.jsonl",
        [line("PMC1", "a.jpg", "p1"), "cut", line("PMC2", "b.jpg", "p2"), line("PMC3", "", "p3")],
    )
    figures, missing = plan(source)
    assert figures == [Figure("p1", "PMC1", "a.jpg"), Figure("p2", "PMC2", "b.jpg")]
    assert [(m.pair_id, m.kind) for m in missing] == [("urls.jsonl:1", "row"), ("p3", "row")]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"image": "p2.jpg"}, {"image": "p9.jpg"}, {"image": "p2.jpg"}]))
    figures, missing = plan(source, [rows])
    assert figures == [Figure("p2", "PMC2", "b.jpg")]
    assert [(m.pair_id, m.reason) for m in missing] == [("p9", "not in urls.jsonl")]
    write_list(source, [line("PMC1", "a.jpg", "p1"), line("PMC1", "c.jpg", "p1")])
    with pytest.raises(DataError, match=r"row 1: pair_id 'p1' was .*a\.jpg.* is .*c\.jpg"):
        plan(source)


def test_the_newest_version_that_has_the_file(bucket: TinyBucket, tmp_path: Path) -> None:
    """Versions are numbers (10 is after 2), other articles are kept out, long lists have pages."""
    figures = [
        Figure("p1", "PMC12", "a.jpg"),
        Figure("p2", "PMC12", "B.jpg"),
        Figure("p3", "PMC12", "b.gif"),
        Figure("p4", "PMC7", "fig 1+2.jpg"),
    ]
    assert fetch(bucket, tmp_path, figures) == []
    wanted = {"p1": "PMC12.2/a.jpg", "p2": "PMC12.1/b.jpg"}
    wanted |= {"p3": "PMC12.10/b.gif", "p4": "PMC7.1/fig 1+2.jpg"}
    for pair, key in wanted.items():
        assert (tmp_path / f"{pair}.jpg").read_bytes() == bucket.files[key]
    assert bucket.asked["PMC12."] == 2 and bucket.asked["PMC7."] == 1
    assert {f.name for f in tmp_path.iterdir()} == {f"{p}.jpg" for p in wanted} | {"missing.jsonl"}
    assert bucket.agents == {f"medmoe_jax/{pmc.medmoe_jax.__version__} (a@b)"}


def test_what_is_not_there_is_listed_and_tried_again_when_asked(
    bucket: TinyBucket, tmp_path: Path
) -> None:
    figures = [
        Figure("p1", "PMC12", "c.jpg"),
        Figure("p2", "PMC99", "a.jpg"),
        Figure("p3", "PMC7", "text.jpg"),
        Figure("p4", "PMC7", "half.jpg"),
        Figure("p5", "PMC12", "a.jpg"),
        Figure("p6", "PMC123", "a.jpg"),
    ]
    bucket.moods["PMC123."] = lambda request, number: send(request, 500, b"") is None
    found = {m.pair_id: m for m in fetch(bucket, tmp_path, figures)}
    assert {pair: m.kind for pair, m in found.items()} == {
        "p1": "absent",
        "p2": "absent",
        "p3": "damaged",
        "p4": "damaged",
        "p6": "failed",
    }
    assert found["p1"].reason == "PMC12 has no 'c.jpg' in the bucket"
    assert found["p2"].reason == "no PMC99 in the bucket"
    assert found["p6"].reason == "the server answers 500"
    assert bucket.asked["PMC123."] == 3
    logged = [json.loads(x) for x in (tmp_path / "missing.jsonl").read_text().splitlines()]
    assert {x["pair_id"]: Missing(**x) for x in logged} == found
    assert not list(tmp_path.glob("*.partial"))

    del bucket.moods["PMC123."]
    bucket.asked.clear()
    bucket.files["PMC12.3/c.jpg"] = picture(9)
    again = fetch(bucket, tmp_path, figures)
    assert sorted(m.pair_id for m in again) == ["p1", "p2", "p3", "p4"]
    assert set(bucket.asked) == {"PMC123.", "PMC123.1/a.jpg"}
    again = fetch(bucket, tmp_path, figures, retry_missing=True)
    assert sorted(m.pair_id for m in again) == ["p2", "p3", "p4"]
    assert (tmp_path / "p1.jpg").read_bytes() == picture(9)


def short_then_whole(content: bytes) -> Any:
    def mood(request: BaseHTTPRequestHandler, number: int) -> bool:
        if number == 1:  # the connection breaks off
            send(request, 200, content[:300], length=len(content))
        elif number == 2:  # a proxy cut it and says so
            send(request, 200, content[:300])
        return number < 3

    return mood


def test_a_server_in_trouble(bucket: TinyBucket, tmp_path: Path) -> None:
    """Errors, answers cut short and requests for rest: everything comes in the end."""
    began = time.monotonic()
    bucket.moods["PMC12."] = lambda request, number: (
        number == 1 and send(request, 503, b"", Retry_After="1") is None
    )
    bucket.moods["PMC12.2/a.jpg"] = short_then_whole(bucket.files["PMC12.2/a.jpg"])
    figures = [Figure("p1", "PMC12", "a.jpg"), Figure("p2", "PMC123", "a.jpg")]
    assert fetch(bucket, tmp_path, figures, workers=2) == []
    assert (tmp_path / "p1.jpg").read_bytes() == picture(3)
    assert bucket.asked["PMC12.2/a.jpg"] == 3
    assert time.monotonic() - began >= 1.0


def test_retry_after() -> None:
    assert pmc._retry_after("17") == 17
    assert pmc._retry_after("soon") == pmc._retry_after("") == 0
    assert 25 < pmc._retry_after(formatdate(time.time() + 30, usegmt=True)) <= 31
    assert pmc._retry_after(formatdate(time.time() - 30, usegmt=True)) == 0


def test_a_slow_server_and_one_that_wants_too_much_rest(
    bucket: TinyBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pmc, "READ_SECONDS", 0.1)
    bucket.moods["PMC12.2/a.jpg"] = lambda request, number: number == 1 and bool(time.sleep(0.3))
    bucket.moods["PMC7."] = lambda request, number: (
        send(request, 429, b"", Retry_After="86400") is None
    )
    figures = [Figure("p1", "PMC12", "a.jpg"), Figure("p2", "PMC7", "a.jpg")]
    missing = fetch(bucket, tmp_path, figures)
    assert [(m.pair_id, m.kind, m.reason) for m in missing] == [
        ("p2", "failed", "the server answers 429")
    ]
    assert bucket.asked["PMC12.2/a.jpg"] == 2 and bucket.asked["PMC7."] == 1


def test_it_is_polite(bucket: TinyBucket, tmp_path: Path) -> None:
    """Neither more requests a second nor more connections than allowed."""
    bucket.files |= {f"PMC{i}.1/a.jpg": picture(i) for i in range(200, 210)}
    figures = [Figure(f"p{i}", f"PMC{i}", "a.jpg") for i in range(200, 210)]
    assert download(figures, (), tmp_path, pmc.Bucket(bucket.url, rate=40), workers=3) == []
    assert len(bucket.times) == 20
    assert bucket.times[-1] - bucket.times[0] >= 19 / 40 - 0.05
    assert bucket.most <= 3


def test_a_dead_server_ends_the_run(bucket: TinyBucket, tmp_path: Path) -> None:
    """What came is kept; a wrong address is not taken for absent articles."""
    figures = [Figure("p0", "PMC12", "a.jpg")]
    figures += [Figure(f"p{i}", f"PMC{i}", "a.jpg") for i in range(1000, 1100)]
    bucket.moods |= {
        f"PMC{i}.": (lambda r, n: send(r, 404, b"") is None) for i in range(1000, 1100)
    }
    with pytest.raises(DataError, match=r"20 articles failed .* the server answers 404"):
        fetch(bucket, tmp_path, figures, workers=1)
    assert (tmp_path / "p0.jpg").is_file()
    assert sum(bucket.asked.values()) < 40


def test_listings_that_are_none() -> None:
    for content in (b"", b"<html/>", b"not xml"):
        with pytest.raises(ValueError, match=r"XML|listing"):
            pmc.parse_listing(content, "PMC1")


def test_goes_on_after_a_kill(bucket: TinyBucket, tmp_path: Path) -> None:
    """Killed without warning while files are under way; the next run fetches only the rest."""
    bucket.files |= {f"PMC{i}.1/a.jpg": picture(i) for i in range(200, 230)}
    source = write_list(
        tmp_path / "urls.jsonl", [line(f"PMC{i}", "a.jpg", f"p{i}") for i in range(200, 230)]
    )
    out = tmp_path / "images"
    code = """
import sys
from pathlib import Path
from medmoe_jax.data.prepare import llava_med_images as images, pmc
figures, known = images.plan(Path(sys.argv[1]))
images.download(figures, known, Path(sys.argv[2]), pmc.Bucket(sys.argv[3], rate=20))
"""
    with subprocess.Popen([sys.executable, "-c", code, source, out, bucket.url]) as process:
        while len(list(out.glob("*.jpg"))) < 5:
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    (out / "p229.jpg.partial").write_bytes(b"half")
    with (out / "missing.jsonl").open("a") as log:
        log.write('{"pair_id": "p2')
    had = {file.name for file in out.glob("*.jpg")}
    assert 5 <= len(had) < 30
    bucket.asked.clear()
    assert fetch(bucket, out, plan(source)[0]) == []
    assert not {f"PMC{name[1:4]}.1/a.jpg" for name in had} & set(bucket.asked)
    assert len(list(out.glob("*.jpg"))) == 30 and not list(out.glob("*.partial"))
    for i in range(200, 230):
        assert (out / f"p{i}.jpg").read_bytes() == picture(i)


def test_another_file_of_that_name_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "missing.jsonl").write_text('{"some": "thing"}\n')
    with pytest.raises(DataError, match="is no list of this command"):
        download([Figure("p", "PMC1", "a.jpg")], (), tmp_path, pmc.Bucket("http://127.0.0.1:9"))


def test_command(bucket: TinyBucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_list(
        tmp_path / "urls.jsonl",
        [line("PMC12", "a.jpg", "p1"), line("PMC123", "a.jpg", "p2"), line("PMC7", "x.jpg", "p3")],
    )
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"image": "p1.jpg"}, {"image": "p3.jpg"}]))
    command = ["llava_med_images", "--source", str(source), "--out", str(tmp_path / "images")]
    command += ["--base-url", bucket.url, "--rate", "1000"]
    assert main([*command, "--rows", str(rows)]) == 1
    printed = capsys.readouterr()
    assert "1 images in" in printed.out and "1  absent" in printed.out
    assert "1 missing" in printed.err and not (tmp_path / "images" / "p2.jpg").exists()
    bucket.files["PMC7.2/x.jpg"] = picture(20)
    assert main([*command, "--retry-missing"]) == 0
    assert {f.name for f in (tmp_path / "images").glob("*.jpg")} == {"p1.jpg", "p2.jpg", "p3.jpg"}
    assert main([*command, "--rate", "0"]) == 1
    assert "must be positive" in capsys.readouterr().err
