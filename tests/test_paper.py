"""Tables for a paper: numbers are the runs', bold is what the paired comparison says, names cannot break a format."""

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlbench.board.compare import compare
from dmlbench.board.paper import as_csv, as_latex, as_markdown, escape_latex, table
from dmlbench.errors import NotComparable, UsageError
from dmlbench.results import Evaluation, load, save

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("triplet-none", "triplet-act", "triplet-hm-lga-ics")
HOSTILE = r"a_b%c$d&e#f{g}h~i^j\k|l<m>*n--o[p]`q" + "'\"é中\n=x"


def bundled(name: str, protocol: str) -> Evaluation:
    return load(ROOT / "leaderboard" / "submissions" / f"digits-smallcnn-{name}-{protocol}" / "run")


@pytest.fixture(scope="module")
def runs() -> list[tuple[str, Evaluation]]:
    return [(name, bundled(name, "ers-digits")) for name in MODELS]


def renamed(e: Evaluation, name: str) -> Evaluation:
    return e.model_copy(update={"model": e.model.model_copy(update={"id": name})}).with_arrays(e.arrays)


def test_numbers_are_the_runs(runs: list[tuple[str, Evaluation]]) -> None:
    found = table(runs)
    for (_, e), (name, cells) in zip(runs, found.rows, strict=True):
        by_column = dict(zip(found.columns, cells, strict=True))
        assert name == e.model.id
        assert by_column["recall_at_1"].value == e.benign["recall_at_1"]
        assert by_column["ers"].value == e.ers and by_column["ers"].interval == pytest.approx(e.ers_interval)
        for m in e.measurements:
            assert by_column[m.component].value == m.score
            assert by_column[m.component].interval == pytest.approx(m.interval)
            assert np.mean(e.arrays[f"{m.component}/value"]) == pytest.approx(m.value, abs=1e-4)
    for said in ("ers-digits", runs[0][1].protocol.sha256[:12], "n = 896"):
        assert said in found.caption


@pytest.mark.parametrize("protocol", ["strict", "verification", "sides", "universal", "poison", "corruptions"])
def test_a_protocols_own_numbers_have_the_intervals_of_the_board(protocol: str) -> None:
    from dmlbench.board.row import from_evaluation
    from dmlbench.kinds.table import KINDS, numbers_of

    e = bundled("triplet-none", protocol)
    (_, cells), columns = table([("a run", e)]).rows[0], table([("a run", e)]).columns
    row, wanted = from_evaluation(e), [n.name for n in KINDS[protocol].numbers if n.name in numbers_of(e)]
    for name in wanted:
        ends = getattr(row, f"{name}_lo", None), getattr(row, f"{name}_hi", None)
        shown = cells[columns.index(name)].interval
        assert (shown or (None, None)) == pytest.approx(ends, abs=1e-3), name
    assert any(cells[columns.index(name)].interval for name in wanted)


def test_bold_is_what_compare_says(runs: list[tuple[str, Evaluation]]) -> None:
    found = table(runs)
    for c, column in enumerate(found.columns):
        cells = [row[1][c] for row in found.rows]
        best = max(range(len(runs)), key=lambda r: cells[r].value)
        for r in range(len(runs)):
            sure = False
            if r != best:
                metric = {m.metric: m for m in compare(runs[best][1], runs[r][1]).metrics}[column]
                sure = metric.interval[1] < 0
            assert cells[r].bold is (not sure), (column, r)
    shown = [cell.bold for _, row in found.rows for cell in row]
    assert any(shown) and not all(shown)


def test_other_kinds_of_protocol() -> None:
    strict = table([(n, bundled(n, "strict")) for n in MODELS])
    assert strict.columns[:2] == ("recall_at_1", "strict@5/255") and "worst_case_recall_at_1" in strict.columns
    clustering = table([(n, bundled(n, "clustering")) for n in MODELS[:2]], ["clustering_nmi_attacked"])
    assert clustering.rows[0][1][0].value == bundled(MODELS[0], "clustering").extras["clustering"]["worst"][2]["nmi"]
    one = table([("x", bundled(MODELS[0], "strict"))])
    assert not any(cell.bold for cell in one.rows[0][1])  # nothing to be better than


def test_a_part_that_no_run_has_a_value_of_is_an_empty_column() -> None:
    e = bundled(MODELS[0], "sides")
    empty = e.model_copy(
        update={"measurements": tuple(m.model_copy(update={"value": None, "score": None}) for m in e.measurements)}
    )
    for twice in ([("x", empty)], [("x", empty.with_arrays(e.arrays)), ("y", empty.with_arrays(e.arrays))]):
        assert [cell.value for cell in table(twice, ["both@20/255"]).rows[0][1]] == [None]


def test_doubts_stand_in_the_caption(runs: list[tuple[str, Evaluation]]) -> None:
    partial = runs[0][1].model_copy(update={"partial": ("--limit 9",)}).with_arrays(runs[0][1].arrays)
    said = table([("a", partial), runs[1]]).caption
    assert "Partial result (--limit 9): digits-smallcnn-triplet-none" in said


def test_refusals(runs: list[tuple[str, Evaluation]]) -> None:
    with pytest.raises(NotComparable, match="protocol"):
        table([runs[0], ("strict", bundled(MODELS[1], "strict"))], ["recall_at_1"])
    some = runs[1][1].model_copy().with_arrays({})
    some._arrays = {name: values[:100] for name, values in runs[1][1].arrays.items()}
    with pytest.raises(NotComparable, match="other queries"):
        table([runs[0], ("some", some)])
    with pytest.raises(UsageError, match="did you mean 'ers'"):
        table(runs, ["erss"])


def unescaped_latex(text: str) -> str:
    """A plain reader of what escape_latex writes: commands to their character, groups to their content."""
    named = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">",
             "textbar": "|", "textendash": "–", "ldots": "…"}  # fmt: skip
    out, i = [], 0
    while i < len(text):
        if match := re.match(r"\\char(\d+)\{\}", text[i:]):
            out.append(chr(int(match[1])))
        elif match := re.match(r"\$\\(pm|to|times)\$", text[i:]):
            out.append({"pm": "±", "to": "→", "times": "×"}[match[1]])
        elif match := re.match(r"\\([a-z]+)\{\}", text[i:]):
            out.append(named[match[1]])
        elif match := re.match(r"\\[{}$&#_%]|\{[-\[\]*]\}", text[i:]):
            out.append(match[0][1])
        else:
            assert text[i] not in "\\{}$&#_%~^", text[i:]
            out.append(text[i])
            i += 1
            continue
        i += len(match[0])
    return "".join(out)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("éß±→×–…"), max_size=40))
def test_latex_prints_the_text(text: str) -> None:
    assert unescaped_latex(escape_latex(text)) == " ".join(text.split())


def test_hostile_names(runs: list[tuple[str, Evaluation]]) -> None:
    found = table([("a", renamed(runs[0][1], HOSTILE)), ("b", renamed(runs[1][1], "=cmd()\x01\x1b[31m")), runs[2]])
    for text in (as_latex(found), as_markdown(found), as_csv(found)):
        assert all(line.isprintable() for line in text.split("\n"))
    latex = as_latex(found).splitlines()
    rows = latex[latex.index(r"\midrule") + 1 : latex.index(r"\bottomrule")]
    assert len(rows) == 6  # each with its intervals below
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) == len(found.columns) and row.removesuffix(r"\addlinespace").endswith(
            r" \\"
        )
        bare = re.sub(r"\\[\\{}&$%#_]", "", row)
        assert bare.count("{") == bare.count("}") and "%" not in bare and "#" not in bare
    markdown = as_markdown(found).splitlines()
    for line in markdown[:5]:
        assert len(re.findall(r"(?<!\\)\|", line)) == len(found.columns) + 2
    assert "<m>" not in markdown[2] and r"\_b" in markdown[2]
    cells = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["model"][:5] for row in cells] == ["a_b%c", "'=cmd", "digit"]
    assert float(cells[2]["ers"]) == pytest.approx(runs[2][1].ers)
    assert float(cells[2]["ers_lo"]) == pytest.approx(runs[2][1].ers_interval[0])


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(runs: list[tuple[str, Evaluation]], tmp_path: Path) -> None:
    found = as_latex(table([("a", renamed(runs[0][1], HOSTILE)), *runs[1:]]))
    if subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode:
        rules = ("toprule", "midrule", "bottomrule")
        package = "".join(rf"\let\{rule}\hline" for rule in rules) + r"\let\addlinespace\relax"
    else:
        package = r"\usepackage{booktabs}"
    page = rf"\documentclass{{article}}\usepackage{{graphicx}}{package}\begin{{document}}{found}\end{{document}}"
    (tmp_path / "page.tex").write_text(page, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_command(typed, runs: list[tuple[str, Evaluation]], tmp_path: Path) -> None:
    folders = [save(e, tmp_path / name) for name, e in runs]
    said = typed("table", *folders, "--format", "md", "--columns", "recall_at_1,ers").out
    assert f"{runs[2][1].ers:.1f}" in said and said.startswith(r"| Model | R\@1 | ERS |")
    assert typed("table", *folders, "--out", "x/t.tex").out == "x/t.tex\n"
    told = typed("table", *folders, "--columns", "ers", "--json").json
    assert [row["cells"][0]["value"] for row in told["rows"]] == [e.ers for _, e in runs] and told["file"] is None
    assert r"\toprule" in (tmp_path / "x" / "t.tex").read_text(encoding="utf-8")
    assert "named twice" in typed("table", folders[0], folders[0], code=2).err
    stored = [e.model.id for _, e in runs[:2]]
    assert typed("table", *stored, "--protocol", "ers-digits", "--format", "csv").out.count("\n") == 3
