"""Submissions: a valid bundle passes every level; one that lies is refused with the level, the field and the reason."""

import dataclasses
import io
import json
import os
import pickle
import stat
import zipfile

import numpy as np
import pytest
import torch
from bundles import (
    EST,
    MODEL,
    NONE,
    arrays_of,
    card,
    edit_arrays,
    edit_json,
    edit_yaml,
    model,
    put,
    sealed,
    valid,
    weights_of,
    zipped,
)
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import dmlbench
from dmlbench import protocols
from dmlbench.checkpoints import checkpoints
from dmlbench.cli.schema import schemas
from dmlbench.compact import npz_bytes
from dmlbench.datasets import DATASETS
from dmlbench.errors import UsageError
from dmlbench.intervals import VERSION
from dmlbench.protocol import score_intervals
from dmlbench.protocols import load_protocol
from dmlbench.results import Evaluation, Flag, load, save
from dmlbench.run.subject import query_order
from dmlbench.submission import replay, rerun
from dmlbench.submission.bundle import LIMITS, Refused, read_arrays
from dmlbench.submission.pack import draft, pack, write_folder
from dmlbench.submission.static import check_static
from dmlbench.submission.validate import validate

RUN, QUERIES, SAMPLE = "run/evaluation.json", "run/per_query.npz", "run/adversarial_sample.npz"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(files of a valid bundle, the folder with its run)."""
    folder = tmp_path_factory.mktemp("valid")
    return valid(folder), folder


@pytest.fixture
def files(made):
    return dict(made[0])


@pytest.fixture
def check(tmp_path):
    """Validate altered files, as a zip."""

    def run(files, level=2, **options):
        return validate(zipped(files, tmp_path / "bundle.zip"), level, device="cpu", **options)

    return run


def refused(report, level, field, reason):
    assert report.status == "refused" and report.problems
    said = [(p.level, p.field, p.reason) for p in report.problems]
    assert any(lv == level and field in f and reason in r for lv, f, r in said), said


def test_a_valid_bundle_is_accepted(check, files):
    report = check(files, 3, seed=0)
    assert report.status == "accepted" and report.passed == (0, 1, 2, 3) and not report.problems


def test_intervals_of_today_come_out_again_and_those_of_an_earlier_method_hold_their_score(made, files, check):
    """A result from before is as valid as it was, with whatever ends its own method gave."""
    run = load(made[1] / "run")
    today = score_intervals(load_protocol("ers-digits").components, run.arrays)

    def stated(version, by=(0.0, 0.0)):
        """The bundle with the intervals of today, the ends of GTT moved."""

        def change(content):
            content["interval_version"] = version
            content["ers_interval"] = today.mean
            for m, (low, high) in zip(content["measurements"], today.columns, strict=True):
                m["interval"] = [low + by[0], high + by[1]] if m["component"] == "GTT" else [low, high]

        return check(edit_json(files, RUN, change), 0)

    assert stated(VERSION).status == stated(1).status == stated(1, (-1.4, 3.3)).status == "accepted"
    for version, by in ((VERSION, (-1.4, 3.3)), (1, (50.0, 50.0))):
        refused(stated(version, by), 0, "measurements.GTT.interval", "outcomes give")


def test_a_bundle_keeps_the_images_of_32_queries_or_as_many_as_asked_for(made, check, tmp_path):
    run = load(made[1] / "run")
    rows = np.sort(run.arrays["query"][query_order(len(run.arrays["query"]))[:64]])
    images = {name: np.repeat(x[:1], 64, 0) for name, x in run.sample.items() if name != "rows"}
    save(run.model_copy().with_arrays(run.arrays, {"rows": rows, **images}), tmp_path / "run")
    options = [tmp_path / "run", made[1] / "submission.yaml", made[1] / "weights.safetensors"]
    by_itself, more = (arrays_of(pack(*options, **n)[SAMPLE], tmp_path) for n in ({}, {"sample": 40}))
    assert np.array_equal(by_itself["rows"], run.sample["rows"]) and len(by_itself["rows"]) == 32
    assert len(more["rows"]) == len(more["LTM"]) == 40 and np.isin(run.sample["rows"], more["rows"]).all()
    with pytest.raises(UsageError, match="at least 32"):
        pack(*options, sample=31)

    assert check(made[0], 2).status == "accepted"
    cut = {name: values[:31] for name, values in run.sample.items()}
    refused(
        check(edit_arrays(made[0], SAMPLE, tmp_path, lambda a: a.update(cut)), 2), 2, "rows", "not the fixed sample"
    )


def test_a_folder_is_as_good_as_a_zip(files, tmp_path):
    write_folder(files, tmp_path / "b")
    assert validate(tmp_path / "b", 2, device="cpu").status == "accepted"


# --- what a liar may do to archives ------------------------------------------------------------------


def info(name, mode=stat.S_IFREG | 0o644):
    out = zipfile.ZipInfo(name)
    out.external_attr = mode << 16
    return out


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ((info("../evil.txt"), b"x"), "leaves the bundle"),
        ((info("run/../../evil"), b"x"), "leaves the bundle"),
        ((info("/etc/cron.d/evil"), b"x"), "absolute path"),
        ((info("C:/evil.txt"), b"x"), "absolute path"),
        ((info("run\\evil.txt"), b"x"), "another system|not a file of a bundle"),
        ((info("setup.py"), b"import os"), "is not a file of a bundle"),
        ((info("weights.safetensors", stat.S_IFLNK | 0o777), b"/etc/passwd"), "is a link"),
        ((info("weights.safetensors", stat.S_IFIFO | 0o644), b""), "special file"),
    ],
)
def test_archives_that_reach_out_are_refused(files, tmp_path, entry, reason):
    kept = {n: c for n, c in files.items() if n != entry[0].filename}
    report = validate(zipped(kept, tmp_path / "b.zip", [entry]), 0)
    assert any(any(r in p.reason for r in reason.split("|")) for p in report.problems), report.problems
    assert {p.level for p in report.problems} == {0}


def test_a_file_twice_is_refused(files, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(files, tmp_path / "b.zip", [(info("submission.yaml"), b"id: other")])
    refused(validate(path, 0), 0, "submission.yaml", "twice")


def test_ten_gigabytes_in_a_small_archive(files, tmp_path):
    """The header claims 10 GB; not a byte of it is read."""
    path = zipped(files, tmp_path / "b.zip")
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"PK\x01\x02")  # the last entry of the central directory
    raw[at + 24 : at + 28] = (0xFFFFFFFE).to_bytes(4, "little")  # uncompressed size: 4 GiB, all that 32 bits hold
    path.write_bytes(raw)
    refused(validate(path, 0), 0, "", "claims 4294967294 bytes")


def test_more_bytes_than_are_allowed(files, check):
    report = check({**files, "submission.yaml": b"#" * (LIMITS["submission.yaml"] + 1)}, 0)
    refused(report, 0, "submission.yaml", "at most 262144 are allowed")


def test_a_bomb_of_arrays(files, check):
    """A few bytes of npz that claim an array of 10 GB."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1_250_000_000,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("query.npy", member.getvalue())
    report = check(sealed({**files, QUERIES: buffer.getvalue()}), 0)
    refused(report, 0, "per_query.npz query", "claims shape (1250000000,) (10000000000 bytes) and has 0 bytes")


def test_arrays_of_pickled_objects(files, check):
    buffer = io.BytesIO()
    np.savez(buffer, query=np.array([print, {}], dtype=object))
    refused(check(sealed({**files, QUERIES: buffer.getvalue()}), 0), 0, "per_query.npz query", "nothing is unpickled")


def test_links_in_a_folder(files, tmp_path):
    write_folder(files, tmp_path / "b")
    (tmp_path / "b" / "weights.safetensors").unlink()
    (tmp_path / "b" / "weights.safetensors").symlink_to("/etc/passwd")
    refused(validate(tmp_path / "b", 0), 0, "weights.safetensors", "is a link")
    (tmp_path / "b" / "weights.safetensors").unlink()
    os.mkfifo(tmp_path / "b" / "weights.safetensors")  # reading it would wait for a writer
    refused(validate(tmp_path / "b", 0), 0, "weights.safetensors", "special file")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    refused(validate(tmp_path / "link", 0), 0, "link", "is a link")


def test_what_is_no_bundle(tmp_path):
    refused(validate(tmp_path / "nowhere.zip", 0), 0, "nowhere.zip", "does not exist")
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 nothing")
    refused(validate(tmp_path / "b.zip", 0), 0, "b.zip", "not a readable zip file")
    (tmp_path / "empty").mkdir()
    refused(validate(tmp_path / "empty", 0), 0, "submission.yaml", "is missing")


def test_a_truncated_archive(files, tmp_path):
    path = zipped(files, tmp_path / "b.zip")
    path.write_bytes(path.read_bytes()[:-200])
    refused(validate(path, 0), 0, "b.zip", "not a readable zip file")


# --- edits that the hashes catch ---------------------------------------------------------------------


def test_an_edit_that_keeps_the_manifest(files, check):
    changed = files[RUN].replace(b'"ers": 2', b'"ers": 9', 1)
    assert changed != files[RUN]
    refused(check({**files, RUN: changed}, 0), 0, RUN, "where the manifest says")
    refused(check({**files, RUN: files[RUN] + b"\n"}, 0), 0, RUN, "bytes where the manifest says")


def test_a_file_beside_the_manifest(files, check):
    del files["weights.safetensors"]
    refused(check(files, 0), 0, "manifest.json", "'weights.safetensors', which is not in the bundle")


def test_an_inner_manifest_of_another_run(files, check):
    inner = json.loads(files["run/manifest.json"])
    inner["files"]["evaluation.json"]["sha256"] = "0" * 64
    changed = {**files, "run/manifest.json": json.dumps(inner).encode()}
    outer = json.loads(files["manifest.json"])
    outer["files"]["run/manifest.json"] = {
        "bytes": len(changed["run/manifest.json"]),
        "sha256": __import__("hashlib").sha256(changed["run/manifest.json"]).hexdigest(),
    }
    changed["manifest.json"] = json.dumps(outer).encode()
    refused(check(changed, 0), 0, "run/manifest.json evaluation.json", "differs")


def test_a_manifest_that_is_none(files, check):
    refused(check({**files, "manifest.json": b"[]"}, 0), 0, "manifest.json", "schema_version")


# --- edits by a liar who makes the manifests anew ------------------------------------------------------


RUN_EDITS = [
    (put(["ers"], 99.0), "ers", "outcomes give"),
    (put(["ers"], None), "ers", ""),
    (put(["ers_interval"], [98.0, 99.0]), "ers_interval", "outcomes give"),
    (put(["measurements", 0, "score"], 90.0), "measurements.CA+.score", "outcomes give"),
    (put(["measurements", 7, "value"], 90.0), "measurements.LTM.value", "outcomes give"),
    (put(["measurements", 7, "interval"], [60.0, 70.0]), "measurements.LTM.interval", "outcomes give"),
    (put(["measurements", 7, "n"], 5), "measurements.LTM.n", "895|896"),
    (put(["measurements", 7, "attack"], "ES"), "measurements.LTM", "is not the protocol's"),
    (put(["measurements", 7, "better"], "lower"), "measurements.LTM", "is not the protocol's"),
    (lambda c: c["measurements"].pop(), "measurements", "the protocol has"),
    (put(["benign", "recall_at_1"], 99.9), "benign.recall_at_1", "outcomes give"),
    (put(["benign", "nmi"], 140.0), "benign.nmi", "less than or equal to 100.001"),
    (lambda c: c["benign"].pop("map"), "benign", "map is missing"),
    (put(["benign", "accuracy"], 50.0), "benign", "accuracy is none of the clean metrics"),
    (put(["protocol", "name"], "ers-digts"), "protocol.name", "did you mean 'ers-digits'"),
    (put(["protocol", "sha256"], "0" * 64), "protocol.sha256", "is not the content of protocol"),
    (put(["protocol", "seed"], 7), "protocol.seed", "the protocol's is 0"),
    (put(["protocol", "version"], "1"), "protocol.version", "here it is '2'"),
    (put(["partial"], ["--limit 64"]), "partial", "no place on the board"),
    (put(["dataset", "n_queries_full"], 5000), "dataset.n_queries", "896 of 5000"),
    (put(["dataset", "split"], "train"), "dataset.split", "'test'"),
    (put(["dataset", "name"], "digitz"), "dataset.name", "did you mean 'digits'"),
    (put(["dataset", "sha256"], "0" * 64), "dataset.sha256", "here is"),
    (put(["environment", "device"], "=cmd()"), "device", "spreadsheet"),
    (put(["environment", "torch"], "<b>2</b>"), "torch", "HTML"),
    (put(["model", "id"], "-1+1"), "model.id", "match pattern"),
    (put(["model", "weights_sha256"], "0" * 64), "stated.weights_sha256", "the run"),
    (put(["date"], "2026\n2027"), "date", "match pattern"),
    (put(["date"], "2026-13-40T00:00:00Z"), "date", "month"),
    (put(["dataset", "n_gallery"], 1), "dataset.n_gallery", "has 896"),
    (put(["dataset", "n_gallery"], 10**12), "dataset.n_gallery", "less than"),
    (put(["dataset", "n_gallery"], "896"), "dataset.n_gallery", "valid integer"),
    (put(["dataset", "n_classes"], -1), "dataset.n_classes", "greater than"),
    (put(["seconds"], -1.0), "seconds", "greater than"),
    (lambda c: c["benign"].pop("ami"), "benign", "ami is missing"),
    (put(["schema_version"], 2), "schema_version", ""),
    (put(["invented"], 1), "invented", "Extra"),
]


@pytest.mark.parametrize(("change", "field", "reason"), RUN_EDITS, ids=[f"{i}-{e[1]}" for i, e in enumerate(RUN_EDITS)])
def test_an_edited_run(files, check, change, field, reason):
    report = check(edit_json(files, RUN, change), 2)
    assert report.passed == () and {p.level for p in report.problems} == {0}
    assert any(field in p.field and any(r in p.reason for r in reason.split("|")) for p in report.problems), (
        report.problems
    )


def test_nan_in_json(files, check):
    report = check(edit_json(files, RUN, put(["ers"], float("nan"))), 0)
    refused(report, 0, RUN, "NaN")


YAML_EDITS = [
    (put(["title"], "=HYPERLINK(1)"), "title", "spreadsheet"),
    (put(["title"], "<script>alert(1)</script>"), "title", "HTML"),
    (put(["authors"], ["@evil"]), "authors.0", "spreadsheet"),
    (put(["authors"], []), "authors", "at least 1"),
    (put(["authors"], ["FILL-IN"]), "authors.0", "filled in"),
    (put(["id"], "../up"), "id", "pattern"),
    (put(["id"], "A B"), "id", "pattern"),
    (put(["code_url"], "javascript:alert(1)"), "code_url", "https"),
    (put(["checkpoint", "license"], "Mine-1.0"), "checkpoint.license", "accepted SPDX"),
    (put(["checkpoint", "license"], "apache-2"), "checkpoint.license", "did you mean 'Apache-2.0'"),
    (put(["checkpoint", "paper"], {"title": "t", "url": "http://x.org"}), "checkpoint.paper.url", "https"),
    (put(["checkpoint", "paper"], {"title": "-1", "url": None}), "checkpoint.paper.title", "spreadsheet"),
    (put(["checkpoint", "defense", "name"], "+SUM(A1)"), "checkpoint.defense.name", "spreadsheet"),
    (put(["checkpoint", "arch", "embed_dim"], 999), "checkpoint.arch.embed_dim", "the run 64"),
    (put(["checkpoint", "files", 0, "sha256"], "0" * 64), "checkpoint.files", "the run was made with"),
    (put(["checkpoint", "probe"], None), "checkpoint.probe", "4 or more values"),
    (put(["checkpoint", "probe", "atol"], 5.0), "checkpoint.probe.atol", "at most"),
    (put(["checkpoint", "invented"], 1), "checkpoint.invented", "Extra"),
    (put(["stated", "ers"], 99.0), "stated.ers", "the run 2"),
    (put(["stated", "recall_at_1"], 99.0), "stated.recall_at_1", "the run"),
    (put(["stated", "recall_at_1"], 101.0), "stated.recall_at_1", "100"),
    (put(["stated", "protocol"], "ers-28"), "stated.protocol", "the run 'ers-digits'"),
    (put(["stated", "dataset"], "mnist"), "stated.dataset", "the run 'digits'"),
    (put(["schema_version"], 9), "schema_version", ""),
]


@pytest.mark.parametrize(
    ("change", "field", "reason"), YAML_EDITS, ids=[f"{i}-{e[1]}" for i, e in enumerate(YAML_EDITS)]
)
def test_an_edited_submission(files, check, change, field, reason):
    refused(check(edit_yaml(files, change), 2), 0, field, reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!!python/object/apply:os.system ['true']", "is not allowed"),
        ("a: &x [1]\nb: *x\n", "aliases are not allowed"),
        ("id: a\nid: b\n", "key 'id' is there twice"),
        ("- a list\n", "not a mapping"),
        ("id: [unclosed", "not plain YAML"),
        ("\x00\x01", "not plain YAML"),
        ("[" * 5000, "not plain YAML"),
    ],
)
def test_yaml_that_is_not_plain(files, check, text, reason):
    refused(check(sealed({**files, "submission.yaml": text.encode()}), 0), 0, "submission.yaml", reason)


ARRAY_EDITS = [
    (QUERIES, lambda a: a.pop("query"), "query", "is not one integer"),
    (QUERIES, lambda a: a.update(query=np.roll(a["query"], 1) * 0), "query", "a row twice"),
    (QUERIES, lambda a: a.update(query=a["query"] + 5000), "query", "are not the queries"),
    (QUERIES, lambda a: a.update(label=(a["label"] + 1)), "label", "are not the classes"),
    (QUERIES, lambda a: a.pop("LTM/value"), "LTM/value", "is not one number"),
    (QUERIES, lambda a: a.update({"LTM/value": a["LTM/value"][:10]}), "LTM/value", "is not one number"),
    (QUERIES, lambda a: a["LTM/value"].fill(70.0), "LTM/value", "other than 0 and 100"),
    (QUERIES, lambda a: a["CA+/value"].fill(np.nan), "CA+/value", "outcomes are missing"),
    (QUERIES, lambda a: a["ES:R/value"].put(np.flatnonzero(a["ES:R/value"] == 0)[:50], np.nan), "ES:R/value", "50 outcomes are missing"),
    (QUERIES, lambda a: a["CA-/value"].fill(-20.0), "CA-/value", "outside 0 to 100"),
    (QUERIES, lambda a: a["TMA/value"].fill(-3.0), "TMA/value", "outside -1"),
    (QUERIES, lambda a: a["TMA/norm"].fill(0.9), "TMA/norm", "outside the linf ball of 40/255"),
    (QUERIES, lambda a: a["TMA/norm"].fill(np.nan), "TMA/norm", "outside the linf ball"),
    (QUERIES, lambda a: a["LTM/value"].fill(100.0), "measurements.LTM.value", "outcomes give 100"),
    (SAMPLE, lambda a: a.pop("rows"), "rows", "are not rows of queries"),
    (SAMPLE, lambda a: a.update(rows=a["rows"] + 9000), "rows", "are not rows of queries"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "field", "reason"), ARRAY_EDITS, ids=[f"{i}-{e[2]}" for i, e in enumerate(ARRAY_EDITS)]
)
def test_edited_outcomes(files, check, tmp_path, name, change, field, reason):
    refused(check(edit_arrays(files, name, tmp_path, change), 2), 0, field, reason)


def consistent(files, folder, change):
    """Outcomes changed, and every stated number made to fit them: only looking again can tell."""
    rules = load_protocol("ers-digits")
    found = {}

    def alter(arrays):
        change(arrays)
        found["intervals"] = score_intervals(rules.components, arrays)
        found["means"] = [float(np.nanmean(arrays[f"{c.name}/value"].astype(float))) for c in rules.components]
        found["scores"] = [float(c.rescale(m)) for c, m in zip(rules.components, found["means"], strict=True)]
        found["benign"] = {
            k.removeprefix("benign/"): float(np.nanmean(v.astype(float)))
            for k, v in arrays.items()
            if k.startswith("benign/") and v.ndim == 1
        }

    files = edit_arrays(files, QUERIES, folder, alter)

    def state(content):
        for m, value, score, ends in zip(
            content["measurements"], found["means"], found["scores"], found["intervals"].columns, strict=True
        ):
            m.update(value=value, score=score, interval=ends)
        content.update(ers=float(np.mean(found["scores"])), ers_interval=found["intervals"].mean)
        content["interval_version"] = VERSION
        content["benign"].update(found["benign"])
        clean = found["benign"]["recall_at_1"]
        for m in content["measurements"]:
            if m["component"] in content["extras"]["retention"]:
                content["extras"]["retention"][m["component"]] = 100.0 * m["value"] / clean

    files = edit_json(files, RUN, state)

    def submit(content):
        content["stated"].update(ers=float(np.mean(found["scores"])), recall_at_1=found["benign"]["recall_at_1"])

    return edit_yaml(files, submit)


def test_robust_recall_above_the_clean_one(files, check, tmp_path):
    def change(a):
        for k in ("benign/recall_at_1", "benign/recall_at_2", "benign/recall_at_4", "benign/recall_at_8"):
            a[k][:] = 0.0
            a[k][:200] = 100.0
        a["LTM/value"].fill(100.0)

    refused(check(consistent(files, tmp_path, change), 2), 0, "measurements.LTM.value", "above the clean")


def test_recall_at_1_above_recall_at_2(files, check, tmp_path):
    def change(a):
        a["benign/recall_at_2"].fill(0.0)

    refused(check(consistent(files, tmp_path, change), 2), 0, "benign.recall_at_1", "above recall_at_2")


def test_invented_outcomes_fall_at_the_replay(files, check, tmp_path):
    def change(a):
        a["CA+/value"][:] = np.clip(a["CA+/value"] + 20, 0, 100)

    changed = consistent(files, tmp_path, change)
    report = check(changed, 2)
    assert report.passed == (0, 1)
    refused(report, 2, "CA+/value", "32 of 32 stored images score otherwise")


def test_invented_clean_outcomes_fall_at_the_replay(files, check, tmp_path):
    def change(a):
        for k in ("recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8"):
            a[f"benign/{k}"].fill(100.0)

    report = check(consistent(files, tmp_path, change), 2)
    refused(report, 2, "benign/recall_at_1", "another clean outcome")


def test_a_few_clean_outcomes_that_are_all_too_good_fall_at_the_replay(files, check, tmp_path):
    def change(a):
        value = a["benign/map"]
        value[np.argsort(value)[:17]] = 100.0

    refused(check(consistent(files, tmp_path, change), 2), 2, "benign/map", "from what is measured here")


@pytest.mark.parametrize(
    ("change", "level", "field"),
    [
        (put(["model", "space"], "E"), 1, "model.space"),
        (put(["model", "loss"], "another"), 1, "model.loss"),
        (put(["dataset", "n_without_positive"], 500), 2, "dataset.n_without_positive"),
        (put(["protocol", "eps"], ["8/255"]), 0, "protocol.eps"),
        (lambda e: e["warnings"].append({"flag": "verified", "message": "by us"}), 0, "warnings.verified"),
    ],
)
def test_words_and_counts_of_another_run(files, check, change, level, field):
    refused(check(edit_json(files, RUN, change), 2), level, field, "")


def test_classes_of_other_pictures_fall_where_they_are_at_hand(files, check, tmp_path, monkeypatch):
    """Of a data set that is not in the package nobody knows the classes before level 2; every interval is made of them."""
    digits = DATASETS["digits"]
    monkeypatch.setitem(DATASETS._entries, "digits", dataclasses.replace(digits, packaged=False))

    def change(a):
        a["label"] = np.arange(len(a["label"]), dtype=a["label"].dtype)

    report = check(consistent(files, tmp_path, change), 2)
    assert report.passed == (0, 1)
    refused(report, 2, "label", "classes")


def test_a_doubt_of_the_clean_embeddings_is_not_left_out(files, check, monkeypatch):
    doubt = Flag(flag="small-spread", message="near one another")
    monkeypatch.setattr(replay, "doubts_about", lambda *_: iter([doubt]))
    refused(check(files, 2), 2, "warnings.small-spread", "near one another")


def test_a_registered_model_is_what_the_registry_says(files, check):
    entry = checkpoints()[NONE]
    files = edit_json(files, RUN, put(["model", "id"], NONE))
    own = {"title": entry.title, "license": entry.license}
    assert check(edit_yaml(files, lambda y: y["checkpoint"].update(own)), 0).status == "accepted"
    lie = edit_yaml(files, lambda y: y["checkpoint"].update(own, defense={"name": "unbreakable"}))
    refused(check(lie, 0), 0, "checkpoint.defense", "registry")


def test_clean_outcomes_that_are_left_out_fall_at_the_replay(files, check, tmp_path):
    """A few queries more or less differ by rounding; whether one has a positive does not."""

    def change(a):
        clean = [name for name in a if name.startswith("benign/") and a[name].dtype.kind == "f"]
        for name in [*clean, "ES:R/value", "LTM/value", "GTM/value"]:
            a[name][-5:] = np.nan

    def count(content):
        for m in content["measurements"]:
            m["n"] -= 5 * (m["component"] in ("ES:R", "LTM", "GTM"))

    report = check(edit_json(consistent(files, tmp_path, change), RUN, count), 2)
    refused(report, 2, "benign/recall_at_1", "another clean outcome")


def test_an_invented_nmi_falls_at_the_replay(files, check):
    report = check(edit_json(files, RUN, put(["benign", "nmi"], 99.0)), 2)
    refused(report, 2, "benign.nmi", "k-means here gives")


def test_outcomes_invented_where_no_image_is_kept_fall_at_the_rerun(files, check, tmp_path, made):
    """A careful liar leaves the fixed sample alone and lies about the other 640 queries."""
    sample = np.load(io.BytesIO(files[SAMPLE]))["rows"]

    def change(a):
        other = ~np.isin(a["query"], sample)
        for name in ("LTM", "GTT", "ES:R"):
            a[f"{name}/value"][other] = a["benign/recall_at_1"][other] if name != "GTT" else 100.0

    changed = consistent(files, tmp_path, change)
    assert check(changed, 2).status == "accepted"
    report = check(changed, 3, seed=5)
    assert report.passed == (0, 1, 2)
    refused(report, 3, "ers", "attacking 64 queries again")
    assert report.notes == ("level 3 attacked 64 queries again, chosen by --seed 5",)


def moved(step):
    def change(a):
        a["ES:D"][...] = step(a["ES:D"])
        a["ES:R"][...] = step(a["ES:R"])

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (moved(lambda x: x + 0.5), "outside [0, 1]"),
        (moved(lambda x: x - 0.5), "outside [0, 1]"),
        (moved(lambda x: np.where(x > 0.5, 0.0, 1.0)), "outside the linf ball of 40/255"),
        (moved(lambda x: x * np.nan), "NaN or infinite"),
        (moved(lambda x: x[::-1]), "outside the linf ball"),
        (lambda a: a.update({"ES:D": a["ES:D"].astype(np.float64)}), "is not float32 images"),
        (lambda a: a.update({"ES:D": a["ES:D"][:3]}), "is not float32 images"),
        (lambda a: a.pop("ES:D"), "is not float32 images"),
        (lambda a: a.update(rows=a["rows"][::-1].copy()), "are not the fixed sample"),
        (lambda a: a.update({k: v[:2] for k, v in a.items()}), "are not the fixed sample"),
    ],
)
def test_adversarial_images_that_lie(files, check, tmp_path, change, reason):
    report = check(edit_arrays(files, SAMPLE, tmp_path, change), 2)
    assert report.passed == (0, 1)
    refused(report, 2, "adversarial_sample.npz", reason)


def test_clean_images_for_adversarial_ones(files, check, tmp_path):
    rows = np.load(io.BytesIO(files[SAMPLE]))["rows"]
    clean = dmlbench.load_dataset("digits").images[rows].numpy()
    report = check(edit_arrays(files, SAMPLE, tmp_path, lambda a: a.update({"TMA": clean})), 2)
    refused(report, 2, "TMA/value", "score otherwise")


def swap_weights(files, raw, keep_hash=False):
    import hashlib

    changed = sealed({**files, "weights.safetensors": raw})
    if keep_hash:
        return changed
    sha256 = hashlib.sha256(raw).hexdigest()
    changed = edit_json(changed, RUN, put(["model", "weights_sha256"], sha256))

    def state(content):
        content["stated"]["weights_sha256"] = content["checkpoint"]["files"][0]["sha256"] = sha256

    return edit_yaml(changed, state)


def test_weights_of_another_model(files, check):
    other = weights_of(EST)
    refused(check(swap_weights(files, other, keep_hash=True)), 1, "weights.safetensors", "the run was made with")
    refused(check(swap_weights(files, other)), 1, "checkpoint.probe", "another embedding for the probe input")


def test_weights_of_another_model_with_its_own_probe(files, check):
    other = swap_weights(files, weights_of(EST))
    other = edit_yaml(other, put(["checkpoint", "probe"], checkpoints()[EST].probe.model_dump(mode="json")))
    report = check(other)
    assert report.passed == (0, 1)
    refused(report, 2, "benign/map", "another clean outcome")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (pickle.dumps({"w": 1}, protocol=4), "is a pickle"),
        (b"PK\x03\x04" + b"0" * 100, "is a zip file"),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
)
def test_weights_that_are_none(files, check, raw, reason):
    refused(check(swap_weights(files, raw)), 0, "weights.safetensors", reason)


def test_a_real_torch_file_as_weights(files, check):
    buffer = io.BytesIO()
    torch.save(load_tensors(files["weights.safetensors"]), buffer)
    refused(check(swap_weights(files, buffer.getvalue())), 0, "weights.safetensors", "is a zip file (as torch.save")


def test_weights_of_another_architecture(files, check):
    tensors = load_tensors(files["weights.safetensors"])
    more = save_tensors({**tensors, "extra": torch.zeros(3)})
    refused(check(swap_weights(files, more)), 1, "weights.safetensors", "unexpected extra")
    fewer = save_tensors(dict(list(tensors.items())[1:]))
    refused(check(swap_weights(files, fewer)), 1, "weights.safetensors", "missing")
    cut = files["weights.safetensors"][:-40]
    refused(check(swap_weights(files, cut)), 1, "weights.safetensors", "not a readable safetensors file")


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        (put(["checkpoint", "arch", "builder"], "smalcnn"), "checkpoint.arch", "smallcnn"),
        (put(["checkpoint", "arch", "builder"], "os.system"), "checkpoint.arch", "unknown architecture"),
        (put(["checkpoint", "arch", "kwargs"], {"depth": 3}), "checkpoint.arch", "argument 'depth'"),
        (put(["checkpoint", "arch", "kwargs", "width"], 100000), "checkpoint.arch", "at most 2000000000"),
        (put(["checkpoint", "arch", "kwargs", "width"], 8), "n_params", "the network has"),
        (put(["checkpoint", "arch", "kwargs", "width"], -1), "checkpoint.arch", "negative dimension"),
        (put(["checkpoint", "probe", "embedding"], [0.0] * 1000), "checkpoint.probe", "its embeddings have 64"),
        (put(["checkpoint", "input", "size"], 1000000), "checkpoint.input", "at most 4096"),
        (put(["checkpoint", "input", "size"], 16), "checkpoint.input", "says 1x16x16, the run's images are 1x8x8"),
        (put(["checkpoint", "input", "channels"], 3), "checkpoint.input", "says 3x8x8, the run's images are 1x8x8"),
        (put(["checkpoint", "input", "crop"], 3), "checkpoint.input", "says 1x3x3, the run's images are 1x8x8"),
        (put(["checkpoint", "normalize"], {"mean": [0.1, 0.2, 0.3]}), "normalize.mean", "3 values for images of 1"),
        (put(["checkpoint", "normalize"], {"mean": [0.5], "std": [0.1]}), "checkpoint.probe", "another embedding"),
    ],
)
def test_an_architecture_that_does_not_fit(files, check, change, field, reason):
    report = check(edit_yaml(files, change), 1)
    assert report.passed == (0,)
    refused(report, 1, field, reason)


@pytest.mark.parametrize(
    ("builder", "kwargs", "field", "reason"),
    [
        ("ensemble", {"members": 10**9}, "arch", "1 to 100 members"),
        ("ensemble", {"member": "ensemble"}, "arch", "no ensembles as members"),
        ("torchvision:resnet18", {"num_classes": 10**13}, "arch", "'num_classes' holds a number above 1000000"),
        ("torchvision:alexnet", {"num_classes": 10**6}, "arch", "at most 2000000000"),
        ("torchvision:resnet18", {"zero_init_residual": True}, "probe", "1x8x8"),
        ("timm:resnet18", {"checkpoint_path": "/etc/passwd"}, "arch", "is not given 'checkpoint_path'"),
        ("timm:resnet18", {"pretrained_cfg": {"file": "/etc/passwd"}}, "arch", "is not given 'pretrained_cfg'"),
        ("timm:resnet18", {"cache_dir": "/tmp"}, "arch", "is not given 'cache_dir'"),
        ("timm:resnet18", {"block": "x"}, "arch", "no attribute 'expansion'"),
        ("timm:resnet18", {"act_layer": "x"}, "arch", "KeyError: 'x'"),
        ("timm:hf-hub:someone/something", {}, "arch.builder", "would be fetched"),
        ("hf-hub:someone/something", {}, "arch.builder", "would be fetched"),
    ],
)
def test_builders_that_would_fetch_read_or_fill_the_memory(files, check, monkeypatch, builder, kwargs, field, reason):
    monkeypatch.setattr(rerun, "fill", lambda *a: None)  # as if the weights fitted
    arch = {"builder": builder, "kwargs": kwargs, "embed_dim": 64}
    refused(check(edit_yaml(files, put(["checkpoint", "arch"], arch)), 1), 1, f"checkpoint.{field}", reason)


def test_weights_may_lie_elsewhere_and_are_named(files, check, made):
    del files["weights.safetensors"]
    bare = sealed(files)
    refused(check(bare, 1), 1, "weights.safetensors", "name the file with --weights")
    assert check(bare, 1, weights=made[1] / "weights.safetensors").status == "accepted"
    outside = edit_yaml(bare, put(["checkpoint", "files", 0, "path"], "../../../../etc/passwd"))
    refused(check(outside, 1), 1, "checkpoint.files", "leaves the package")


def test_weights_are_fetched_only_when_asked_and_of_the_stated_size(files, check, made, tmp_path, monkeypatch):
    weights = files.pop("weights.safetensors")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "w.safetensors").write_bytes(weights)
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", str(tmp_path / "there"))
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    named = edit_yaml(sealed(files), put(["checkpoint", "files", 0, "url"], "{base}/w.safetensors"))
    refused(check(named, 1, fetch=True), 1, "checkpoint.files.0.bytes", "say how many")
    sized = edit_yaml(named, put(["checkpoint", "files", 0, "bytes"], len(weights)))
    refused(check(sized, 1), 1, "weights.safetensors", "--fetch")
    assert check(sized, 1, fetch=True).status == "accepted"
    (tmp_path / "there" / "w.safetensors").write_bytes(weights[:-1] + b"x")
    refused(check(sized, 1, fetch=True), 1, "weights.safetensors", "sha256")


# --- the board it would join ---------------------------------------------------------------------------


def test_repeats_on_the_board(files, check, tmp_path):
    board = tmp_path / "leaderboard"
    write_folder(files, board / "submissions" / "digits-mine-ers-digits")
    refused(check(files, 0, board=board), 0, "submission.yaml id", "already on the board")
    renamed = edit_yaml(files, put(["id"], "another-id"))
    refused(check(renamed, 0, board=board), 0, "stated.weights_sha256", "already on the board under 'ers-digits'")
    mine = board / "submissions" / "digits-mine-ers-digits"
    assert validate(mine, 0, board=board).status == "accepted"  # a folder does not repeat itself
    mine.rename(board / "submissions" / "other-name")
    refused(validate(board / "submissions" / "other-name", 0, board=board), 0, "id", "its folder is called")


def test_an_id_of_the_registry_with_other_weights(files, check, tmp_path, monkeypatch):
    registered = card(sha256="1" * 64)
    path = tmp_path / "checkpoints.json"
    path.write_text(json.dumps({"schema_version": 1, "checkpoints": {MODEL: registered.model_dump(mode="json")}}))
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(path))
    refused(check(files, 0), 0, "model.id", "registered with other weights")


# --- the commands ----------------------------------------------------------------------------------------


def test_from_a_run_to_a_verified_bundle(typed, made, tmp_path):
    source = made[1]
    entry = source / "record.json"
    out = tmp_path / "mine"
    done = typed("submit", "init", source / "run", "--checkpoint", entry, "--out", out / "submission.yaml")
    assert "still to fill in: 5 fields" in done.out
    forced = ["--checkpoint", entry, "--out", out / "submission.yaml", "--force"]
    drafted = typed("submit", "init", source / "run", *forced, "--json").json
    assert drafted["submission"] == str(out / "submission.yaml") and drafted["to_fill_in"] == [
        "title", "authors.0", "checkpoint.title", "checkpoint.train.command", "checkpoint.license"
    ]  # fmt: skip
    assert "already there" in typed(
        "submit", "init", source / "run", "--checkpoint", entry, "--out", out / "submission.yaml", code=2
    ).err  # fmt: skip
    packing = [
        "submit",
        "pack",
        source / "run",
        "--submission",
        out / "submission.yaml",
        "--weights",
        source / "weights.safetensors",
    ]
    done = typed(*packing, "--out", out / "b.zip", code=1)
    assert "not ready: level 0: submission.yaml authors.0: has not been filled in" in done.err
    told = typed(*packing, "--out", out / "b.zip", "--json", code=1).json
    problem = {"level": 0, "field": "submission.yaml authors.0", "reason": "has not been filled in"}
    assert problem in told["problems"] and told["id"] is None and not told["passed"]
    text = (out / "submission.yaml").read_text().replace("license: FILL-IN", "license: MIT")
    text = text.replace("FILL-IN", "A. Tester")
    (out / "submission.yaml").write_text(text)
    done = typed(*packing, "--out", out / "b.zip")
    assert "7 files" in done.out and "level 0 passed" in done.out
    told = typed(*packing, "--out", out / "b.zip", "--json").json
    assert told["passed"] and told["id"] == drafted["id"] and len(told["files"]) == 7 and told["problems"] == []

    done = typed("validate", out / "b.zip", "--level", "2", "--device", "cpu")
    assert done.out.rstrip().endswith("b.zip: accepted")
    assert "at least 32" in typed(*packing, "--sample", "31", "--out", out / "short.zip", code=2).err
    assert "kept the images of 32 queries" in typed(*packing, "--sample", "300", "--out", out / "long.zip", code=2).err

    done = typed("validate", out / "b.zip", "--level", "3", "--seed", "1", "--device", "cpu")
    assert [line[:14] for line in done.out.splitlines()[:4]] == [f"level {i} passed" for i in range(4)]
    assert done.out.rstrip().endswith("b.zip: accepted")

    folder = out / "submissions" / drafted["id"]
    typed(*packing, "--out", folder)
    done = typed("verify", folder, "--device", "cpu")
    assert "verified: ERS" in done.out
    record = json.loads((out / "verifications" / f"{folder.name}.json").read_text())
    assert record["agreed"] and record["ers_measured"] == pytest.approx(record["ers_stated"], abs=1e-3)
    assert "say with --out" in typed("verify", out / "b.zip", code=2).err


def test_a_refused_bundle_on_the_command_line(typed, files, tmp_path):
    path = zipped(edit_json(files, RUN, put(["ers"], 99.0)), tmp_path / "b.zip")
    done = typed("validate", path, code=1)
    assert "REFUSED level 0: run/evaluation.json ers: says 99.0" in done.out and "b.zip: refused" in done.out
    content = typed("validate", path, "--json", code=1).json
    assert content["status"] == "refused" and {p["level"] for p in content["problems"]} == {0}
    assert "refused before anything" in typed("verify", path, "--out", "v.json", code=1).out
    assert not (tmp_path / "v.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["submit", "init", "nowhere"], 4, "not a readable run folder"),
        (["submit", "pack", "nowhere", "--out", "b.zip"], 4, "not a readable run folder"),
        (["validate", "nowhere.zip"], 4, "does not exist"),
        (["verify", "nowhere.zip"], 4, "does not exist"),
        (["validate", ".", "--board", "nowhere"], 4, "--board nowhere has no folder submissions"),
        (["validate", "b.zip", "--level", "5"], 2, "level"),
        (["schema", "rwo"], 2, "did you mean 'row'"),
        (["submit", "inti"], 2, "inti"),
    ],
)
def test_bad_input(typed, arguments, code, says):
    done = typed(*arguments, code=code)
    assert says in done.err + done.out and len((done.err or done.out).strip().splitlines()) <= 2


def test_a_partial_run_and_a_model_in_memory_cannot_be_submitted(typed, tmp_path):
    embedder, _ = model(tmp_path)
    limited = dmlbench.evaluate(embedder, "digits", limit=8, attacks=["TMA"], device="cpu")
    save(limited, tmp_path / "partial")
    assert "only a full one" in typed("submit", "init", "partial", code=2).err
    save(
        limited.model_copy(
            update={"partial": (), "model": limited.model.model_copy(update={"weights_sha256": None})}
        ).with_arrays(limited.arrays),
        tmp_path / "memory",
    )
    assert "model in memory" in typed("submit", "init", "memory", code=2).err


def test_a_full_rerun_that_does_not_agree_is_a_dispute(files, check, tmp_path, monkeypatch):
    """The rerun gives the run's own outcomes but for one part, which it finds 4 points weaker."""
    checked = check_static(zipped(files, tmp_path / "b.zip"))
    arrays = {k: v.copy() for k, v in checked.evaluation.arrays.items()}
    arrays["CA+/value"] -= 2.0
    again = Evaluation.model_validate(checked.evaluation.model_dump()).with_arrays(arrays)
    monkeypatch.setattr(rerun, "evaluate", lambda *a, **k: again)
    embedder = rerun.load_submitted(checked)
    full = rerun.rerun_all(checked, embedder)
    assert [(p.level, p.field) for p in full.problems] == [(4, "run/evaluation.json measurements.CA+")]
    assert "-4.00 points of score" in full.problems[0].reason
    arrays["CA+/value"] += 2.0
    assert rerun.rerun_all(checked, embedder).problems == ()


@pytest.mark.parametrize("name", list(schemas()))
def test_schemas_are_printed(typed, name):
    content = typed("schema", name).json
    assert content["$schema"].startswith("https://json-schema.org/") and content["properties"]
    assert content["additionalProperties"] is False
    assert name in typed("schema").out


def test_the_arrays_of_a_bundle_read_as_numpy_reads_them(made, tmp_path):
    arrays = {
        "a/b": np.arange(12.0).reshape(3, 4),
        "c": np.zeros((0, 2), dtype=np.int64),
        "d": np.asfortranarray(np.eye(3)),
    }
    found = read_arrays(npz_bytes(arrays), "f")
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)
    buffer = io.BytesIO()
    np.savez(buffer, d=np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    np.testing.assert_array_equal(read_arrays(buffer.getvalue(), "f")["d"], np.arange(6.0).reshape(2, 3))


def npy(header):
    """The first bytes of an array with any header."""
    raw = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw


@pytest.mark.parametrize(
    ("descr", "shape", "body", "reason"),
    [
        ("'<f4'", "(-2, -2)", bytes(16), "claims shape (-2, -2)"),
        ("'<f4'", "(True,)", bytes(4), "claims shape (True,)"),
        ("'<f4'", "(" + "1," * 70 + ")", bytes(4), "which no array here has"),
        ("'<f4'", "(0, 9223372036854775808)", b"", "which no array here has"),
        ("'<U0'", "(5,)", b"", "take no bytes"),
        ("(" * 3000 + "'<f4'", "(1,)", bytes(4), "is not an array"),
    ],
)
def test_array_headers_that_lie(descr, shape, body, reason):
    raw = npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}") + body
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", raw)
    with pytest.raises(Refused) as found:
        read_arrays(buffer.getvalue(), "f")
    (problem,) = found.value.problems
    assert problem.level == 0 and problem.field == "f a" and reason in problem.reason and "\n" not in problem.reason


def test_corrupt_lzma(files, check, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        first = archive.infolist()[0]
    raw = bytearray(buffer.getvalue())
    begin = first.header_offset + 30 + len(first.filename) + 12
    raw[begin : begin + 28] = bytes(b ^ 0xFF for b in raw[begin : begin + 28])
    (tmp_path / "outer.zip").write_bytes(raw)
    refused(validate(tmp_path / "outer.zip", 0), 0, first.filename, "cannot be read from the archive")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("query.npy", bytes(range(256)) * 8)
    raw = bytearray(buffer.getvalue())
    raw[30 + 9 + 12 : 30 + 9 + 40] = b"\xff" * 28
    refused(check(sealed({**files, QUERIES: bytes(raw)}), 0), 0, QUERIES, "not a readable npz file")


def test_packing_again(made, typed, tmp_path):
    """Weights that do not exist are one line; a folder packed without weights keeps none of an earlier bundle."""
    run = made[1]
    options = ["submit", "pack", run / "run", "--submission", run / "submission.yaml"]
    assert "does not exist" in typed(*options, "--weights", "nofile", "--out", "q.zip", code=4).err
    typed(*options, "--weights", run / "weights.safetensors", "--out", tmp_path / "held")
    assert (tmp_path / "held" / "weights.safetensors").is_file()
    typed(*options, "--no-weights", "--out", tmp_path / "held")
    assert not (tmp_path / "held" / "weights.safetensors").exists()


def test_a_protocol_that_measures_some_of_the_queries_is_packed_and_looked_at_again(tmp_path, monkeypatch) -> None:
    rules = """name = "few"
version = "1"
kind = "parts"
title = "A hundred of the queries"
queries = 100
[threat]
norm = "linf"
eps = "40/255"
step = "10/255"
steps = 2
[[components]]
name = "LTM"
attack = "LTM"
readout = "recall_at_1"
worst = 0
best = 100
"""
    (tmp_path / "few.toml").write_text(rules)
    monkeypatch.setitem(protocols.PROTOCOLS._entries, "few", tmp_path / "few.toml")
    done = dmlbench.evaluate(NONE, "digits", "few", device="cpu")
    assert done.dataset.n_queries == 100 and not done.partial
    save(done, tmp_path / "run")
    (tmp_path / "submission.yaml").write_text(draft(tmp_path / "run", authors=["Somebody"]))
    files = pack(tmp_path / "run", tmp_path / "submission.yaml", with_weights=False)
    write_folder(files, tmp_path / f"{NONE}-few")
    report = validate(tmp_path / f"{NONE}-few", 3, seed=0, share=0.1, least=8, device="cpu")
    assert report.status == "accepted" and report.passed == (0, 1, 2, 3), report.problems
