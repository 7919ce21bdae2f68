"""The board: its columns, its CSV files, ranks and tie groups."""

import csv
import io
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from synthetic import evaluation

from dmlbench.errors import DataError
from dmlbench.leaderboard import COLUMNS, PARTS, Row, add_row, from_csv, from_evaluation, rank, to_csv
from dmlbench.protocol import load_protocol
from dmlbench.results import Flag


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
    assert b"\r" not in raw and raw.decode().splitlines()[0].split(",") == list(COLUMNS)
    first = next(iter(csv.DictReader(io.StringIO(raw.decode()))))
    assert 0 <= float(first["ers"]) <= 100 and first["rank"] == "1" and first["paper"] == ""


@given(
    st.lists(
        st.tuples(st.floats(0, 100, width=32), st.floats(0, 20, width=32), st.floats(0, 20, width=32)),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None)
def test_ranks_are_the_connected_intervals(values):
    rows = rank(row(f"m{i}", ers, ers - down, ers + up) for i, (ers, down, up) in enumerate(values))
    # by the definition: overlap, directly or through others, is one group; a plain search for it
    groups = {r.model: {r.model} for r in rows}
    for _ in rows:
        for a in rows:
            for b in rows:
                if a.ers_lo <= b.ers_hi and b.ers_lo <= a.ers_hi:
                    joined = groups[a.model] | groups[b.model]
                    groups[a.model] = groups[b.model] = joined
    for r in rows:
        better = [o for o in rows if o.model not in groups[r.model] and o.ers > r.ers]
        assert r.rank == 1 + len(better)
        assert {o.model for o in rows if o.tie_group == r.tie_group} == groups[r.model]
    assert [r.ers for r in rows] == sorted((r.ers for r in rows), reverse=True)
    assert sorted({r.tie_group for r in rows}) == list(range(1, len({r.tie_group for r in rows}) + 1))


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


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("model", "=HYPERLINK(1)", "spreadsheet"),
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
        ("schema_version", 2, "1"),
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
        (lambda t: t.replace("\n1,", "\n7,", 1), "line 2: schema_version '7' is unknown"),
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
