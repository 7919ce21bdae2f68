"""The page: what it says, that it needs nothing else, and what a real browser draws of it."""

import functools
import html.parser
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dmlbench
from dmlbench.board.report import Run, page
from dmlbench.board.report.pictures import data_uri, magnified
from dmlbench.results import Evaluation, save
from dmlbench.run.closeup import closeup, names_of
from dmlbench.run.subject import prepare

MODELS = ("digits-smallcnn-triplet-none", "digits-smallcnn-triplet-hm-lga-ics")


@pytest.fixture(scope="module")
def evaluations() -> list[Evaluation]:
    """Two real runs of a few queries."""
    return [dmlbench.evaluate(name, limit=24, device="cpu") for name in MODELS]


@pytest.fixture(scope="module")
def folders(evaluations: list[Evaluation], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [save(e, root / name) for name, e in zip(("plain", "hardened"), evaluations, strict=True)]


class Reader(html.parser.HTMLParser):
    """Cells of tables by id, addresses, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.frames: list[bool] = []
        self._table, self._cell = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.addresses += [
            v for k, v in attrs if k in ("src", "href", "action", "data", "poster", "srcset") and v and v[0] != "#"
        ]
        if tag == "img" and "title" in given:
            self.frames.append(given.get("class") == "right")
        if tag == "table":
            self._table = given.get("id") or ""
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, text: str) -> None:
        if self._cell:
            self.tables[self._table][-1][-1] += text


def read(content: str) -> Reader:
    reader = Reader()
    reader.feed(content)
    return reader


def test_the_tables_hold_the_record(evaluations: list[Evaluation]) -> None:
    e = evaluations[1]
    found = read(page([Run("hardened", e)]))
    rows = found.tables["parts"][1:]
    assert [row[0] for row in rows] == [m.component for m in e.measurements]
    for row, m in zip(rows, e.measurements, strict=True):
        assert row[3] == f"{m.score:.1f}" and row[5] == str(m.n)
        assert row[4] == f"{m.interval[0]:.1f} – {m.interval[1]:.1f}"
    assert found.tables["benign"][1][1] == f"{e.benign['recall_at_1']:.1f}"
    assert f"ERS {e.ers:.1f}" in page([Run("hardened", e)])
    assert "--limit 24" in page([Run("hardened", e)])


def test_the_page_needs_nothing_else(evaluations: list[Evaluation]) -> None:
    content = page([Run(str(i), e) for i, e in enumerate(evaluations)])
    found = read(content)
    assert found.addresses and all(a.startswith("data:image/png;base64,") for a in found.addresses)
    assert not {"script", "link", "iframe", "object"} & found.tags
    assert (
        not re.search(r"url\((?!#)", content)
        and "@import" not in content
        and "http" not in re.sub("http-equiv", "", content)
    )


def test_names_are_escaped(evaluations: list[Evaluation]) -> None:
    e = evaluations[0]
    harmful = e.model_copy(update={"model": e.model.model_copy(update={"id": "<script>alert(1)</script>"})})
    content = page([Run("<b>run</b>", harmful.with_arrays(e.arrays, e.sample)), Run("&", e)])
    assert "<script" not in content and "<b>run" not in content and "&lt;b&gt;run&lt;/b&gt;" in content


def test_several_runs(evaluations: list[Evaluation]) -> None:
    runs = [Run("plain", evaluations[0]), Run("hardened", evaluations[1])]
    found = read(page(runs))
    assert [row[0] for row in found.tables["runs"][1:]] == ["plain", "hardened"]
    assert [row[3] for row in found.tables["runs"][1:]] == [f"{e.ers:.1f}" for e in evaluations]
    assert runs[0].eps == pytest.approx(40 / 255, abs=1e-5)
    assert "ERS, against eps" not in page(runs)
    halved = Evaluation.model_validate(evaluations[0].model_dump())
    halved = halved.with_arrays({k: v / 2 if k.endswith("/norm") else v for k, v in evaluations[0].arrays.items()})
    content = page([runs[0], Run("half", halved)])
    assert "ERS, against eps" in content and ">20/255<" in content and ">40/255<" in content
    assert content.count('class="plot eps"') == 1


def test_runs_stand_side_by_side(evaluations: list[Evaluation]) -> None:
    content = page([Run("plain", evaluations[0]), Run("hardened", evaluations[1])])
    head, *rows = read(content).tables["sides"]
    assert head == ["side by side", "plain", "hardened"]
    scores = {row[0]: [cell.split()[0] for cell in row[1:]] for row in rows}
    for m, n in zip(evaluations[0].measurements, evaluations[1].measurements, strict=True):
        assert scores[m.component] == [f"{m.score:.1f}", f"{n.score:.1f}"]
    assert scores["ERS"] == [f"{e.ers:.1f}" for e in evaluations] and "<b>" in content
    assert content.count('id="parts-') >= 1 and content.count('class="plot parts"') == 1
    other = evaluations[1].model_copy(
        update={"protocol": evaluations[1].protocol.model_copy(update={"name": "ers-28", "sha256": "0" * 64})}
    )
    content = page(
        [Run("plain", evaluations[0]), Run("other", other.with_arrays(evaluations[1].arrays, evaluations[1].sample))]
    )
    assert "sides" not in read(content).tables and "cannot be set side by side" in content


def test_a_run_without_images(evaluations: list[Evaluation]) -> None:
    bare = Evaluation.model_validate(evaluations[0].model_dump() | {"ers": None, "ers_interval": None})
    content = page([Run("bare", bare)])
    assert "keeps no images" in content and "ERS –" in content and not read(content).addresses


def test_frames_are_what_the_oracle_says(evaluations: list[Evaluation]) -> None:
    """Top five before and after, recomputed one query at a time with plain distances."""
    e = evaluations[1]
    embedder, dataset = dmlbench.load_model(MODELS[1]), dmlbench.load_dataset("digits")
    with torch.no_grad():
        gallery = embedder(dataset.images[np.arange(len(dataset))])
    expected: list[bool] = []
    for index, name in enumerate(names_of(e.sample)[0]):
        for k, place in enumerate(e.sample["closeup/place"][:4]):
            row = int(e.sample["rows"][place])
            assert e.sample["closeup/query_label"][k] == dataset.labels[row]
            for column, image in (
                (0, dataset.images[np.array([row])]),
                (1 + index, torch.from_numpy(e.sample[str(name)][place])[None]),
            ):
                with torch.no_grad():
                    d = (gallery - embedder(image)).norm(dim=1)
                d[row] = torch.inf
                nearest = d.topk(5, largest=False).indices.tolist()
                assert e.sample["closeup/top"][column, k].tolist() == nearest
                expected += [bool(dataset.labels[n] == dataset.labels[row]) for n in nearest]
    assert read(page([Run("hardened", e)])).frames == expected


def test_pictures_of_a_network_that_takes_blue_first_have_red_first(evaluations: list[Evaluation]) -> None:
    def coloured(order: str) -> str:
        sample = {}
        for name, images in evaluations[0].sample.items():
            if images.ndim == 4:
                images = np.concatenate(
                    [images, images // 2 if images.dtype == np.uint8 else images / 2, 0 * images], 1
                )
                images = images[:, ::-1] if order == "bgr" else images
            sample[name] = images
        said = json.loads(sample["closeup/names"].tobytes()) | {"order": order}
        sample["closeup/names"] = np.frombuffer(json.dumps(said).encode(), np.uint8)
        return page([Run("run", evaluations[0].model_copy().with_arrays(evaluations[0].arrays, sample))])

    rgb, bgr = (re.findall(r"data:image/png;base64,[^\"]+", coloured(order)) for order in ("rgb", "bgr"))
    assert rgb == bgr and len(set(rgb)) > 20


def test_the_projection_is_the_principal_one() -> None:
    subject = prepare(dmlbench.load_model(MODELS[0]), dmlbench.load_dataset("digits"), limit=20, device="cpu")
    images = subject.images(0, 20).numpy()
    found = closeup(subject, {"rows": subject.rows, "nothing": images})
    np.testing.assert_allclose(found["closeup/plane"][0], found["closeup/plane"][1], atol=1e-5)
    from sklearn.decomposition import PCA

    gallery = subject.scene.gallery.embeddings.numpy()
    theirs = PCA(2).fit(gallery).transform(subject.scene.clean.numpy())
    np.testing.assert_allclose(np.abs(found["closeup/plane"][0]), np.abs(theirs), atol=1e-3)
    np.testing.assert_array_equal(found["closeup/top"][0], found["closeup/top"][1])
    assert names_of(found) == (["nothing"], {label: str(label) for label in range(5, 10)}, "rgb")
    assert all(array.dtype.kind in "fiu" for array in found.values())  # what a submission may hold
    assert set(found["closeup/query_label"]) == set(subject.dataset.labels[subject.rows])


def test_pictures() -> None:
    import base64
    import io

    image = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    with Image.open(io.BytesIO(base64.b64decode(data_uri(image).partition(",")[2]))) as shown:
        assert shown.size == (96, 96)
        np.testing.assert_array_equal(np.asarray(shown)[6::12, 6::12], (image * 255).round().transpose(1, 2, 0))
    shifted, factor = magnified(np.array([[[-0.1, 0.0, 0.05]]], dtype=np.float32))
    np.testing.assert_allclose(shifted, [[[0.0, 0.5, 0.75]]], atol=1e-6)
    assert factor == pytest.approx(5.0)
    assert magnified(np.zeros((1, 2, 2), dtype=np.float32))[1] == 1.0


def test_figures_take_the_colours_of_the_page_and_nothing_else(evaluations: list[Evaluation]) -> None:
    """No style, no fixed colour, no id twice: of every drawing of a page."""
    content = page([Run("plain", evaluations[0]), Run("hardened", evaluations[1])])
    drawings = re.findall(r"<svg.*?</svg>", content, re.DOTALL)
    assert len(drawings) == 1 + len(evaluations[0].measurements)
    for drawing in drawings:
        assert not re.search(r'style=|<style|(?:fill|stroke)="#|xmlns|<metadata', drawing)
        assert "var(--s1)" in drawing
    ids = re.findall(r' id="([^"]*)"', "".join(drawings))
    assert len(ids) == len(set(ids)) > len(drawings)
    assert all(used in ids for used in re.findall(r'(?:href="#|url\(#)([^")]*)', "".join(drawings)))
    assert content == page([Run("plain", evaluations[0]), Run("hardened", evaluations[1])])


def test_as_typed(folders: list[Path], run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run("report", folders[0], folders[1], "--out", tmp_path / "page.html")
    assert done.out.strip() == str(tmp_path / "page.html") and "hardened" in (tmp_path / "page.html").read_text()
    assert "is not a readable run folder" in run("report", tmp_path, code=4).err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation.json").write_text("{}")  # as in a bundle
    assert f"did you mean {tmp_path / 'run'}?" in run("report", tmp_path, code=4).err.replace("\n", " ")


def chromium() -> str:
    """The browser, or skip with the reason."""
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    return found


class _Counting(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_CONNECT = do_POST = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.mark.slow
def test_a_real_browser_draws_it_and_asks_for_nothing(evaluations: list[Evaluation], tmp_path: Path) -> None:
    browser = chromium()
    path, shot, asked = tmp_path / "page.html", tmp_path / "page.png", []  # type: ignore[var-annotated]
    path.write_text(page([Run("hardened", evaluations[1]), Run("plain", evaluations[0])]), encoding="utf-8")
    handler = functools.partial(type("Handler", (_Counting,), {"asked": asked}))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
        thread.start()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        flags += "--disable-component-update --disable-sync --hide-scrollbars --window-size=1100,3600 "
        flags += f"--force-prefers-color-scheme=light --proxy-server=127.0.0.1:{proxy.server_port} "
        flags += f"--user-data-dir={tmp_path / 'profile'} --screenshot={shot}"
        subprocess.run([browser, *flags.split(), path.as_uri()], check=True, capture_output=True, timeout=240)
        proxy.shutdown()
        thread.join()
    assert not [a for a in asked if "page" in a or "data" in a]
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for colour in ((0x0B, 0x57, 0xA4), (0x2E, 0x7D, 0x4F), (0xC0, 0x39, 0x2B)):  # bars, right and wrong frames
        near = (np.abs(pixels - np.array(colour)).max(2) <= 2).sum()
        assert near > 300, f"#{bytes(colour).hex()} covers {near} pixels"
