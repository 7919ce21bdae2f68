"""The board: its columns, its CSV files, its ranks."""

import csv
import io
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from synthetic import evaluation

from dmlbench.board import COLUMNS, PARTS, Row, add_row, from_csv, from_evaluation, rank, to_csv
from dmlbench.board.build import build, differences, load_boards, rows_of
from dmlbench.board.row import OF_KINDS
from dmlbench.errors import DataError
from dmlbench.protocols import load_protocol
from dmlbench.results import Flag, Measurement
from dmlbench.submission.rerun import Verification
from dmlbench.submission.static import open_bundle


def row(model="m", ers=50.0, lo=None, hi=None, **more):
    lo, hi = ers if lo is None else lo, ers if hi is None else hi
    return Row(
        **{
            "protocol": "p",
            "dataset": "d",
            "model": model,
            "status": "reproduced",
            "ers": ers,
            "ers_lo": lo,
            "ers_hi": hi,
            **more,
        }
    )


def test_a_row_holds_every_number_of_the_evaluation():
    e = evaluation(level=37, warnings=(Flag(flag="collapsed", message="m"), Flag(flag="a-doubt", message="m")))
    r = from_evaluation(e)
    assert (
        r.model == e.model.id
        and r.protocol_sha256 == load_protocol("ers-digits").sha256
        and r.eps == pytest.approx(40 / 255, abs=1e-6)
        and r.dataset_sha256 == "b" * 64
    )
    assert r.ers == pytest.approx(e.ers, abs=1e-4) and (r.ers_lo, r.ers_hi) == pytest.approx(e.ers_interval, abs=1e-4)
    for m in e.measurements:
        assert getattr(r, PARTS[m.component] + "_raw") == pytest.approx(m.value, abs=1e-6)
        assert getattr(r, PARTS[m.component] + "_score") == pytest.approx(m.score, abs=1e-4)
    assert r.worst_part == min(e.measurements, key=lambda m: m.score).component
    assert r.recall_at_1 == pytest.approx(e.benign["recall_at_1"], abs=1e-4) and r.nmi == 70.0
    assert r.flags == "a-doubt collapsed" and r.partial is None and r.n_queries == 400


def test_a_missing_attack_leaves_ers_empty():
    arrays = {k: v for k, v in evaluation().arrays.items() if not k.startswith("GTT/")}
    r = from_evaluation(evaluation(arrays))
    assert r.ers is None and r.ers_lo is None and r.gtt_raw is None and r.gtm_raw is not None
    assert b",," in to_csv([r])


def test_a_claim_stands_beside_the_measured_value():
    r = from_evaluation(evaluation(level=30), claimed_ers=55.0)
    assert r.claimed_ers == 55.0 and r.claim_gap == pytest.approx(r.ers - 55.0, abs=1e-4)


def test_csv_survives_a_round_trip_byte_for_byte(tmp_path):
    path = tmp_path / "board.csv"
    path.write_bytes(to_csv(rank([from_evaluation(evaluation(seed=s, model=f"m-{s}")) for s in range(4)])))
    raw = path.read_bytes()
    assert to_csv(from_csv(path)) == raw
    assert b"\r" not in raw and set(COLUMNS) - OF_KINDS <= set(raw.decode().splitlines()[0].split(",")) <= set(COLUMNS)
    first = next(iter(csv.DictReader(io.StringIO(raw.decode()))))
    assert 0 <= float(first["ers"]) <= 100 and first["rank"] == "1" and first["paper"] == ""


@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("de"), st.integers(0, 6)), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_rank_is_the_place_among_rows_of_the_same_protocol_and_images(values):
    rows = rank(row(f"m{i}", float(ers), protocol=p, dataset=d) for i, (p, d, ers) in enumerate(values))
    assert len(rows) == len(values)
    for r in rows:
        beside = [o for o in rows if (o.protocol, o.dataset) == (r.protocol, r.dataset)]
        assert r.rank == 1 + sum(o.ers > r.ers for o in beside)
        assert r.better_than is None
        place = rows.index(beside[0])
        assert rows[place : place + len(beside)] == beside and beside == sorted(beside, key=lambda o: -o.ers)


def test_rows_of_other_hashes_are_ranked_apart_and_kept_apart(tmp_path):
    same = {"protocol_sha256": "a" * 64, "dataset_sha256": "b" * 64}
    rows = [
        row("m", 50, **same, weights_sha256="1" * 64),
        row("m", 40, **same, weights_sha256="2" * 64),
        row("m", 60, **{**same, "dataset_sha256": "c" * 64}, weights_sha256="1" * 64),
        row("m", 30, **{**same, "protocol_sha256": "d" * 64}, weights_sha256="1" * 64),
    ]
    assert len({r.key for r in rows}) == 4
    path = tmp_path / "board.csv"
    path.write_bytes(to_csv(rank(rows)))
    assert sorted((r.ers, r.rank) for r in from_csv(path)) == [(30, 1), (40, 2), (50, 1), (60, 1)]


def test_a_file_of_the_first_version_is_read_without_its_tie_groups(tmp_path):
    path = tmp_path / "board.csv"
    path.write_text(
        "schema_version,protocol,model,dataset,ers,status,rank,tie_group,surely_behind\n1,p,m,d,50,reproduced,1,1,0\n"
    )
    (read,) = from_csv(path)
    assert (read.model, read.ers, read.rank, read.schema_version) == ("m", 50, 1, 2)


def test_only_full_undisputed_measurements_are_ranked():
    rows = rank(
        [
            row("good", 40),
            row("better", 60),
            row("said", 99, status="claimed"),
            row("part", 98, partial="limit 8"),
            row("wrong", 97, status="disputed"),
            row("old", 96, status="stale"),
            row("none", 0).model_copy(update={"ers": None}),
        ]
    )
    assert [(r.model, r.rank) for r in rows] == [
        ("better", 1), ("good", 2), ("said", None), ("part", None), ("wrong", None), ("old", None), ("none", None),
    ]  # fmt: skip


def test_rows_of_a_superseded_version_of_the_protocol_lose_their_rank(tmp_path):
    old = evaluation(model="old", level=90, protocol="ers-digits@1")
    add_row(old, tmp_path / "board.csv")
    add_row(evaluation(model="new", level=40), tmp_path / "board.csv")
    assert [(r.model, r.rank, r.status) for r in from_csv(tmp_path / "board.csv")] == [
        ("new", 1, "local"), ("old", None, "stale"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("model", "=HYPERLINK(1)", "spreadsheet"),
        ("model", "m@board", "before a file"),
        ("defense", "+1", "spreadsheet"),
        ("paper", "@SUM(A1)", "spreadsheet"),
        ("license", "-2", "spreadsheet"),
        ("paper", "<script>alert(1)</script>", "HTML"),
        ("arch", "a\nb", "control"),
        ("arch", "a\u202eb", "control"),
        ("loss", " triplet", "white space"),
        ("paper_url", "javascript:alert(1)", "https"),
        ("paper_url", "http://example.org", "https"),
        ("recall_at_1", 100.5, "100"),
        ("recall_at_1", -1, "0"),
        ("ers", float("nan"), "finite"),
        ("nmi", float("inf"), "finite"),
        ("status", "sota", "claimed"),
        ("weights_sha256", "abc", "pattern"),
        ("schema_version", 3, "2"),
        ("invented", 1, "Extra"),
    ],
)
def test_a_row_refuses(column, value, reason):
    with pytest.raises(ValidationError, match=reason):
        row(**{column: value})


def altered(tmp_path, change):
    path = tmp_path / "board.csv"
    path.write_text(change(to_csv([row("a"), row("b")]).decode()), newline="", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.replace("\n", "\r\n"), "CR line ends"),
        (lambda t: t.replace("p,,,b", "p,,,a"), "line 3: model 'a' is already in line 2"),
        (lambda t: t.replace("reproduced", "sota", 1), "line 2, column status"),
        (lambda t: t.replace("\n2,", "\n7,", 1), "line 2: schema_version '7' is unknown"),
        (lambda t: t.rstrip("\n") + ",1\n", "line 3 has another number of cells"),
        (lambda t: t.replace("schema_version,", "version,"), "no column schema_version"),
        (lambda t: t.replace("arch,loss", "arch,arch"), "column twice"),
        (lambda t: t.replace("arch,loss", "arch,lost"), "unknown column 'lost'; did you mean 'loss'"),
        (lambda t: t.replace(",50,", ",fifty,", 1), "line 2, column ers"),
        (lambda t: t + '"', "unexpected end|number of cells"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_by_line_and_column(tmp_path, change, reason):
    path = altered(tmp_path, change)
    with pytest.raises(DataError, match=reason):
        from_csv(path)


def test_add_row_adds_replaces_and_ranks(tmp_path):
    path = tmp_path / "new" / "mine.csv"
    add_row(evaluation(level=30, model="weak"), path)
    add_row(evaluation(level=60, model="strong"), path)
    assert [(r.model, r.rank) for r in from_csv(path)] == [("strong", 1), ("weak", 2)]
    add_row(evaluation(level=80, model="weak"), path)
    assert [(r.model, r.rank) for r in from_csv(path)] == [("weak", 1), ("strong", 2)]
    add_row(evaluation(level=50, model="weak", protocol="ers-28"), path)
    assert len(from_csv(path)) == 3


def test_a_partial_row_is_marked_unranked_and_never_replaces_a_full_one(tmp_path):
    path = tmp_path / "mine.csv"
    add_row(evaluation(model="a", partial=("--limit 64",)), path)
    assert [(r.partial, r.rank) for r in from_csv(path)] == [("limit 64", None)]
    add_row(evaluation(model="a"), path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"holds a full result of 'a'.*limit 64"):
        add_row(evaluation(model="a", partial=("--limit 64",)), path)
    assert path.read_bytes() == before


def test_add_row_leaves_a_file_that_is_no_board_alone(tmp_path):
    path = tmp_path / "shopping.csv"
    path.write_text("item,price\nmilk,2\n")
    with pytest.raises(DataError, match="not a board"):
        add_row(evaluation(), path)
    assert path.read_text() == "item,price\nmilk,2\n"


def test_two_writers_lose_no_row(tmp_path):
    path = tmp_path / "mine.csv"
    results = [evaluation(model=f"m{i}", queries=100) for i in range(8)]
    threads = [threading.Thread(target=add_row, args=(e, path)) for e in results]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(r.model for r in from_csv(path)) == [f"m{i}" for i in range(8)]


# --- the board from its submissions ---------------------------------------------------------------------

BOARD = Path(__file__).resolve().parent.parent / "leaderboard"


@pytest.fixture(scope="session")
def part_of_the_board(tmp_path_factory):
    """A board of a few of the committed bundles, of three protocols and two data sets: most tests read it several times."""
    if not BOARD.is_dir():
        pytest.skip("the board lies in the repository, which is not at hand")
    part = tmp_path_factory.mktemp("part") / "leaderboard"
    for few in (
        "claimed-*",
        "digits-smallcnn-triplet-hm-*-ers-digits",
        "digits-*-none-ers-digits",
        "mnist-*-published",
    ):
        for folder in (BOARD / "submissions").glob(few):
            shutil.copytree(folder, part / "submissions" / folder.name)
    assert len(build(part)) > 3
    return part


@pytest.fixture
def board(part_of_the_board, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(part_of_the_board, tmp_path / "leaderboard")


def test_the_committed_board_is_what_the_submissions_give():
    if not BOARD.is_dir():
        pytest.skip("the board lies in the repository, which is not at hand")
    assert differences(BOARD) == []


def test_every_printed_number_of_the_102_published_rows_is_on_the_board():
    published = list(csv.DictReader(io.StringIO(reference("published_ers_cvpr2022.csv").read_text())))
    rows = [r for r in rows_of(BOARD) if r.submission == "claimed-zhou-2022-cvpr"]
    assert len(rows) == len(published) == 102
    names = {"R@1": "recall_at_1", "R@2": "recall_at_2", "mAP": "map", "NMI": "nmi", "ERS": "ers"}
    names |= {part: f"{column}_raw" for part, column in PARTS.items()}
    for row, printed in zip(rows, published, strict=True):
        assert {k: getattr(row, v) for k, v in names.items()} == {k: float(printed[k]) for k in names}
        assert printed["dataset"].startswith(row.dataset) and row.status == "claimed" and "CVPR 2022" in row.source
        scores = [getattr(row, f"{c}_score") for c in PARTS.values()]
        assert sum(scores) / 10 == pytest.approx(row.ers, abs=0.11)  # parts are printed rounded
        assert row.rank is None and row.protocol_sha256 is None


def test_build_writes_what_differs_and_check_finds_it(typed, board):
    csv_file = board / "ers-digits" / "digits.csv"
    good = csv_file.read_bytes()
    assert "up to date" in typed("leaderboard", "build", "--check", "--board", board).out
    csv_file.write_bytes(good.replace(b"reproduced", b"verified", 1))
    (board / "ers-224").mkdir(exist_ok=True)
    (board / "ers-224" / "mnist.csv").write_bytes(good)
    (board / "ers-28-published" / "mnist.csv").unlink()
    done = typed("leaderboard", "build", "--check", "--board", board, code=1)
    assert "ers-digits/digits.csv differs from line 2 on" in done.out
    assert (
        "ers-224/mnist.csv comes from no submission" in done.out and "ers-28-published/mnist.csv is missing" in done.out
    )
    told = typed("leaderboard", "build", "--check", "--board", board, "--json", code=1).json
    assert told["up_to_date"] is False and len(told["differences"]) == 3 and told["board"] == str(board)
    assert "3 files changed" in typed("leaderboard", "build", "--board", board).out
    assert csv_file.read_bytes() == good and not (board / "ers-224" / "mnist.csv").exists()
    typed("leaderboard", "build", "--check", "--board", board)
    told = typed("leaderboard", "build", "--board", board, "--json").json
    assert told["changed"] == [] and told["rows"] == sum(map(len, load_boards(board).values()))


def mine(board):
    return board / "submissions" / "digits-smallcnn-triplet-none-ers-digits"


def record_of(board):
    return board / "verifications" / f"{mine(board).name}.json"


def verification(board, agreed, sha256=None):
    record = Verification(
        bundle_sha256=sha256 or open_bundle(mine(board)).bundle.sha256,
        agreed=agreed, ers_stated=1.0, ers_measured=1.0, dmlbench="0", torch="0", device="cpu", date="2026-01-01",
    )  # fmt: skip
    record_of(board).parent.mkdir(exist_ok=True)
    record_of(board).write_text(record.model_dump_json())


def statuses(board):
    return {r.model: r.status for r in rows_of(board) if (r.dataset, r.protocol) == ("digits", "ers-digits")}


def test_what_stands_behind_a_row(board, tmp_path, monkeypatch):
    name = "digits-smallcnn-triplet-none"
    assert statuses(board)[name] == "reproduced"
    verification(board, True)
    assert statuses(board)[name] == "verified"
    verification(board, False)
    assert statuses(board)[name] == "disputed"
    verification(board, True, "0" * 64)
    with pytest.raises(DataError, match="speaks of another bundle"):
        rows_of(board)
    record_of(board).write_text("[]")
    with pytest.raises(DataError, match="verifications"):
        rows_of(board)
    record_of(board).rename(record_of(board).with_stem("nobody"))
    with pytest.raises(DataError, match="of no submission"):
        rows_of(board)
    (board / "verifications" / "nobody.json").unlink()

    registry = json.loads((BOARD.parent / "checkpoints.json").read_text())
    registry["checkpoints"][name] |= {"status": "retracted", "reason": "a test"}
    (tmp_path / "c.json").write_text(json.dumps(registry))
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(tmp_path / "c.json"))
    assert statuses(board)[name] == "retracted"
    registry["checkpoints"][name] |= {"status": "superseded", "superseded_by": "digits-smallcnn-triplet-none"}
    (tmp_path / "d.json").write_text(json.dumps(registry))
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(tmp_path / "d.json"))
    assert statuses(board)[name] == "stale"
    monkeypatch.delenv("DMLBENCH_CHECKPOINTS")

    rules = load_protocol("ers-digits").model_copy(update={"superseded_by": "ers-digits-2"})
    monkeypatch.setattr("dmlbench.board.row.packaged_protocol", lambda name, sha256: rules)
    assert set(statuses(board).values()) == {"stale"}
    digits = [r for r in rank(rows_of(board)) if (r.dataset, r.protocol) == ("digits", "ers-digits")]
    assert {r.rank for r in digits} == {None}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda b: (b / "submissions" / "readme.txt").write_text("x"), "is no folder"),
        (lambda b: (mine(b) / "setup.py").write_text("x"), "is not a file of a bundle"),
        (lambda b: (mine(b) / "run" / "per_query.npz").write_bytes(b"x"), "where the manifest says"),
        (lambda b: shutil.copytree(mine(b), b / "submissions" / "again"), "its folder is called"),
        (lambda b: shutil.copytree(mine(b), b / "submissions" / "Again"), "is no name for a submission"),
        (lambda b: (mine(b) / "claims.csv").write_text("x"), "lies beside claims.csv"),
        (lambda b: (mine(b) / "verification.json").write_text("{}"), "is not a file of a bundle"),
        (lambda b: claim(b, "claimed", "reproduced"), "must have status claimed"),
        (lambda b: claim(b, "README of", "=README of"), "spreadsheet"),
        (lambda b: claim(b, "ers-28-published", "ers-29-published"), "unknown protocol 'ers-29-published'"),
        (lambda b: claim(b, ",84.7,", ",184.7,"), "column nmi"),
    ],
)
def test_a_board_that_cannot_be_built(typed, board, spoil, says):
    spoil(board)
    done = typed("leaderboard", "build", "--board", board, code=4)
    assert says in done.err and len(done.err.strip().splitlines()) == 1


def claim(board, old, new):
    path = board / "submissions" / "claimed-robrank-readme" / "claims.csv"
    path.write_text(path.read_text().replace(old, new))


# --- show -----------------------------------------------------------------------------------------------


def test_show_works_from_any_folder(run):
    done = run(
        "leaderboard",
        "show",
        "--filter",
        "dataset=digits",
        "--filter",
        "protocol=ers-digits",
        "--columns",
        "model,ers,status",
        "--format",
        "csv",
    )
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert {r["status"] for r in rows} <= {"reproduced", "verified", "stale"} and len(rows) >= 5
    for measured in (True, False):  # what is stale follows
        ers = [float(r["ers"]) for r in rows if (r["status"] != "stale") == measured]
        assert ers == sorted(ers, reverse=True)


@pytest.fixture
def file(tmp_path):
    rows = [
        row("a_b", 50.0, 45.0, 55.0, recall_at_1=60.0, defense="hm & ics"),
        row("b", 40.0, recall_at_1=80.0, defense="act | 8"),
        row("c", 30.0, status="claimed", defense="EST_50%"),
    ]
    (tmp_path / "f.csv").write_bytes(to_csv(rank(rows)))
    return "f.csv"


@pytest.mark.parametrize(
    ("options", "models"),
    [
        ([], "a_b b c"),
        (["--filter", "ers>=40"], "a_b b"),
        (["--filter", "ers<50", "--filter", "ers>30"], "b"),
        (["--filter", "status=claimed"], "c"),
        (["--filter", "status!=claimed"], "a_b b"),
        (["--filter", "recall_at_1>0"], "a_b b"),
        (["--filter", "recall_at_1!=60"], "b c"),
        (["--filter", "defense~EST"], "c"),
        (["--sort", "-recall_at_1"], "b a_b c"),
        (["--sort", "recall_at_1"], "a_b b c"),
        (["--sort", "status,-ers"], "c a_b b"),
        (["--filter", "model=nothing"], ""),
    ],
)
def test_filters_and_sorting(typed, file, options, models):
    done = typed("leaderboard", "show", "--csv", file, "--columns", "model", "--format", "csv", *options)
    assert done.out.split() == ["model", *models.split()]


def test_formats(typed, file):
    base = ["leaderboard", "show", "--csv", file, "--columns", "model,defense,ers,recall_at_1"]
    assert [line.split() for line in typed(*base).out.splitlines()][2] == ["a_b", "hm", "&", "ics", "50.0", "60.0"]
    markdown = typed(*base, "--format", "md").out.splitlines()
    assert markdown[1] == "| --- | --- | ---: | ---: |" and markdown[2] == r"| a\_b | hm & ics | 50.0 | 60.0 |"
    assert r"act \| 8" in markdown[3]
    assert typed(*base, "--json").json[2] == {"model": "c", "defense": "EST_50%", "ers": 30.0, "recall_at_1": None}
    latex = typed(*base, "--format", "latex").out
    assert r"\begin{tabular}{llrr}" in latex and r"a\_b & hm \& ics & 50.0 & 60.0 \\" in latex and r"EST\_50\%" in latex
    assert len(
        typed("leaderboard", "show", "--csv", file, "--columns", "all", "--format", "csv").out.split("\n")[0].split(",")
    ) == len(COLUMNS)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--columns", "erz"], 2, "unknown column 'erz'; did you mean 'ers'"),
        (["--sort", "-erz"], 2, "did you mean 'ers'"),
        (["--filter", "erz>1"], 2, "did you mean 'ers'"),
        (["--filter", "ers>many"], 2, "ers holds numbers"),
        (["--filter", "ers"], 2, "COLUMN OPERATOR VALUE"),
        (["--format", "xml"], 2, "xml"),
        (["--csv", "none.csv"], 4, "cannot be read"),
        (["--board", "nowhere"], 4, "holds no board"),
    ],
)
def test_show_refuses(typed, file, options, code, says):
    done = typed(
        "leaderboard",
        "show",
        *(["--csv", file] if "--csv" not in options and "--board" not in options else []),
        *options,
        code=code,
    )
    assert says in done.err and len(done.err.strip().splitlines()) == 1


def test_strict_and_clustering_fill_their_columns():
    arrays = {"query": np.arange(40), "label": np.arange(40) % 4, "benign/recall_at_1": np.full(40, 100.0)}
    arrays |= {
        "strict@10/255/value": np.where(np.arange(40) < 30, 100.0, 0.0),
        "strict@40/255/value": np.where(np.arange(40) < 10, 100.0, 0.0),
    }
    parts = [
        Measurement(component=f"strict@{eps}", attack="strict", optimizer="o", readout="recall_at_1", better="higher", value=v, score=v, interval=(v - 5, v + 5), n=40)
        for eps, v in (("10/255", 75.0), ("40/255", 25.0))
    ]  # fmt: skip
    curve = [{"eps": "10/255", "recall_at_1": 75.0}, {"eps": "40/255", "recall_at_1": 25.0}]
    area = (10 * (100 + 75) / 2 + 30 * (75 + 25) / 2) / 40
    e = evaluation().model_copy(
        update={
            "ers": None,
            "ers_interval": None,
            "measurements": tuple(parts),
            "extras": {"strict": {"clean": 100.0, "curve": curve, "area": area}},
        }
    )
    e._arrays.clear()
    r = from_evaluation(e.with_arrays(arrays))
    assert (r.worst_case_recall_at_1, r.worst_case_area) == (25.0, pytest.approx(area, abs=1e-4))
    assert 0 < r.worst_case_recall_at_1_lo < 25 < r.worst_case_recall_at_1_hi < 100
    assert r.worst_case_area_lo < area < r.worst_case_area_hi and r.headline == r.worst_case_area
    worst = [
        {"eps": "8/255", "labelled": True, "nmi": 40.0, "ami": 30.0},
        {"eps": "8/255", "labelled": False, "nmi": 50.0, "ami": 45.0},
    ]
    e = evaluation(extras={"clustering": {"clean": {"nmi": 70.0, "ami": 60.0}, "worst": worst}}).model_copy(
        update={"ers": None, "measurements": (parts[0],)}
    )
    r = from_evaluation(e)
    assert (r.clustering_nmi, r.clustering_nmi_attacked, r.clustering_ami_attacked) == (70.0, 40.0, 30.0)
    assert r.headline == 30.0
