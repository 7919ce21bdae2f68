"""Submissions under strict and clustering protocols: valid ones pass, and one that lies is refused in one clear line."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from bundles import MODEL, SUBMISSIONS, arrays_of, edit_arrays, edit_json, edit_yaml, put, valid, zipped

import dmlbench
from dmlbench.board import build
from dmlbench.board.row import shown as cell
from dmlbench.intervals import PERCENT, VERSION, class_intervals
from dmlbench.kinds.clustering import search as clustering
from dmlbench.kinds.clustering.checks import CLEAN, clusters_differ
from dmlbench.kinds.smallest import within
from dmlbench.kinds.strict import search as strict
from dmlbench.protocols import load_protocol
from dmlbench.results import Evaluation, Flag, save
from dmlbench.submission import rerun
from dmlbench.submission.pack import write_folder
from dmlbench.submission.static import check_static
from dmlbench.submission.validate import validate

RUN, QUERIES, SAMPLE = "run/evaluation.json", "run/per_query.npz", "run/adversarial_sample.npz"
GRID = ("5/255", "10/255", "20/255", "40/255")
AT = [f"strict@{eps}" for eps in GRID]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """By protocol: the files of a valid bundle, made when they are first asked for."""

    class Made(dict):
        def __missing__(self, protocol):
            self[protocol] = valid(tmp_path_factory.mktemp(protocol), protocol)
            return self[protocol]

    return Made()


@pytest.fixture
def bundle(tmp_path):
    """Validate files, as a zip."""

    def run(files, level=0, **options):
        return validate(zipped(files, tmp_path / "bundle.zip"), level, device="cpu", **options)

    return run


def refused(report, level, field, reason, lines=1):
    """One problem (or as many as said) of this level that names the field and says why; besides what the submission
    and the retention repeat of the number."""
    assert report.status == "refused"
    said = [
        str(p)
        for p in report.problems
        if field in p.field or not {"stated", "retention"} & set(p.field.replace(" ", ".").split("."))
    ]
    assert any(p.level == level and field in p.field and reason in p.reason for p in report.problems), said
    assert len(said) == lines, said


@pytest.fixture
def brief(monkeypatch):
    """Reruns take a few of the steps and rounds that they are asked for; what was asked for is kept here."""
    asked, whole = [], rerun.evaluate

    def few(embedder, dataset, rules, **options):
        asked.append(rules)
        fewer = [{k: min(v, 25) if k in ("steps", "queries") else v for k, v in s.threat.items()} for s in rules.steps]
        rounds = [{"rounds": min(s.rounds, 4), "fewest": min(s.fewest, 4)} for s in rules.steps]
        steps = [s.model_copy(update={"threat": t, **r}) for s, t, r in zip(rules.steps, fewer, rounds, strict=True)]
        return whole(embedder, dataset, rules.model_copy(update={"steps": tuple(steps)}), **options)

    monkeypatch.setattr(rerun, "evaluate", few)
    return asked


@pytest.mark.parametrize("protocol", ["strict", "clustering"])
def test_a_valid_bundle_passes_up_to_the_rerun(made, bundle, brief, protocol):
    report = bundle(made[protocol], 3, seed=0, share=0.0, least=8)
    assert report.status == "accepted" and report.passed == (0, 1, 2, 3)
    said = "attacked 8 queries again" if protocol == "strict" else "attacked all 896 images again by "
    assert said in report.notes[0] and report.notes[0].endswith("chosen by --seed 0")
    if protocol == "strict":  # a share is searched for as long as all were
        curve = json.loads(made[protocol][RUN])["extras"]["strict"]["curve"]
        most = max(len(row["steps"][1]["rounds"]) for row in curve)
        assert most > 4 and [(s.rounds, s.fewest) for s in brief[0].steps][1] == (most, most)


# --- level 0: the run's own numbers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        (put(["extras", "strict", "smallest_eps", "median"], 0.06), "smallest_eps.median", "outcomes give 0.0329"),
        (put(["extras", "strict", "clean"], 99.0), "extras.strict.clean", "outcomes give 88.8"),
        (put(["extras", "strict", "norm"], "l2"), "extras.strict.norm", "says 'l2'"),
        (put(["extras", "strict", "curve", 1, "recall_at_1"], 50.0), "curve.1.recall_at_1", "outcomes give 29.3"),
        (put(["extras", "strict", "curve", 1, "map_at_r"], 50.0), "curve.1.map_at_r", "outcomes give 19."),
        (put(["extras", "strict", "curve", 2, "carried"], 1.0), "curve.2.carried", "outcomes give 59."),
        (put(["extras", "strict", "curve", 0, "eps"], "4/255"), "curve.0.eps", "outcomes give '5/255'"),
        (put(["extras", "strict", "curve", 0, "steps", 1, "broken"], 6), "steps.1.broken", "outcomes give 48"),
        (put(["extras", "strict", "curve", 0, "steps", 1, "rounds", 0], 99), "steps.1.rounds.0", "outcomes give"),
        (put(["extras", "strict", "curve", 0, "missed_at_most"], 0.1), "curve.0.missed_at_most", "outcomes give 1.11"),
        (put(["extras", "strict", "curve", 0, "steps", 1, "attacked"], 6), "steps.1.attacked", "outcomes give 575"),
        (put(["extras", "strict", "curve", 0, "steps", 1, "points"], 6.0), "steps.1.points", "outcomes give 5.35"),
        (lambda c: c["extras"]["strict"]["curve"][0]["steps"].pop(), "extras.strict.curve", "steps by eps"),
        (lambda c: c["extras"]["strict"]["curve"].pop(), "extras.strict.curve", "steps by eps"),
        (put(["extras", "strict", "curve"], []), "extras.strict.curve", "at least 1"),
        (put(["extras", "strict", "curve", 0, "steps", 1, "broken"], -6), "steps.1.broken", "greater than or equal"),
        (put(["extras", "strict", "codes", "W1"], 3), "codes.W1", "outcomes give 2"),
        (put(["extras", "strict", "values_per_query"], 3.0), "values_per_query", "outcomes give"),
        (put(["extras", "strict", "invented"], 3.0), "extras.strict.invented", "Extra"),
        (put(["extras", "retention", AT[0]], 99.0), f"extras.retention.{AT[0]}", "outcomes give 66.2"),
        (put(["extras", "clustering"], {"clean": 1}), "extras.clustering", "Field required"),
        (lambda c: c["extras"].pop("strict"), "extras.strict", "is missing"),
        (lambda c: c["extras"].pop("audit"), "extras.audit", "holds the checks none"),
        (put(["extras", "audit", 3, "verdict"], "warn"), "warnings.audit-F4", "in one of warnings and extras.audit alone"),
        (lambda c: c["warnings"].append({"flag": "audit-F4", "message": "all is well"}), "warnings.audit-F4", "or in other words"),
        (put(["measurements", 1, "value"], 50.0), f"measurements.{AT[1]}.value", "outcomes give 29.3"),
        (put(["measurements", 1, "interval"], [80.0, 90.0]), f"measurements.{AT[1]}.interval", "outcomes give"),
        (put(["measurements", 1, "n"], 3), f"measurements.{AT[1]}.n", "hold 896"),
        (put(["measurements", 1, "optimizer"], "pgd"), f"measurements.{AT[1]}", "is not the protocol's"),
        (lambda c: c["measurements"].pop(), "measurements", "the protocol has"),
        (put(["ers"], 50.0), "ers", "outcomes give None"),
    ],
)  # fmt: skip
def test_an_edited_strict_run(made, bundle, change, field, reason):
    report = bundle(edit_json(made["strict"], RUN, change))
    refused(report, 0, field, reason, len(report.problems) if field in ("extras.clustering", "ers") else 1)


def test_a_doubt_is_not_edited_away(made, bundle, tmp_path):
    """Where Square broke what the gradient left, F4 cannot say "pass"."""

    def change(a):
        by_square = a[f"{AT[0]}/broken_by"] == 3
        a[f"{AT[0]}/broken_by"][by_square], a[f"{AT[0]}/round"][by_square] = 4, 0

    assert json.loads(made["strict"][RUN])["extras"]["audit"][3]["verdict"] == "pass"
    report = bundle(believable(made["strict"], tmp_path, change, "strict"))
    refused(report, 0, "extras.audit.F4", "48 of 575 queries are broken")


def code(eps, old, new, count=1):
    """Change the code of some queries at one eps."""

    def change(a):
        by = a[f"{AT[eps]}/broken_by"]
        by[np.flatnonzero(by == old)[:count]] = new

    return change


def some(name, was, value):
    """Set one of the entries that ``was`` picks."""

    def change(a):
        a[name][np.flatnonzero(was(a[name]))[0]] = value

    return change


def back(a):
    """One query is right at rank 2 again at a larger eps."""
    now = a[f"{AT[1]}/recall_at_2"]
    now[np.flatnonzero((now == 0) & (a[f"{AT[0]}/recall_at_2"] == 0))[0]] = 100.0


@pytest.mark.parametrize(
    ("change", "field", "reason", "lines"),
    [
        (code(0, 2, 9), f"{AT[0]}/broken_by", "1 codes are none of -1 to 4", 1),
        (code(0, -1, -7), f"{AT[0]}/broken_by", "1 codes are none of -1 to 4", 2),
        (code(1, -1, 0), f"{AT[1]}/broken_by", "wrong when clean in one of", 4),
        (code(0, 2, 1), f"{AT[0]}/broken_by", "in one of this and the smaller eps alone", 5),
        (code(1, 1, -1), f"{AT[1]}/broken_by", "in one of this and the smaller eps alone", 4),
        (some(f"{AT[0]}/value", lambda v: v == 0, 100.0), f"{AT[0]}/value", "1 outcomes do not fit broken_by", 1),
        (some(f"{AT[0]}/value", lambda v: v == 0, 50.0), f"{AT[0]}/value", "other than 0 and 100", 1),
        (some(f"{AT[0]}/value", lambda v: v == 0, np.nan), f"{AT[0]}/value", "1 outcomes are missing", 1),
        (some(f"{AT[3]}/norm", lambda v: v > 0, 0.2), f"{AT[3]}/norm", "outside the linf ball of 40/255", 1),
        (some(f"{AT[0]}/norm", lambda v: v == 0, 0.01), f"{AT[0]}/norm", "of queries that nothing attacked", 1),
        (some(f"{AT[3]}/norm", lambda v: v > 0, 0.0), f"{AT[3]}/norm", "differ from the smaller eps", 1),
        (some(f"{AT[0]}/iteration", lambda v: v > 0, 0), f"{AT[0]}/iteration", "do not fit broken_by", 2),
        (some(f"{AT[0]}/round", lambda v: v > 0, 0), f"{AT[0]}/round", "1 do not fit broken_by", 1),
        (some(f"{AT[0]}/round", lambda v: v == 0, 1), f"{AT[0]}/round", "1 do not fit broken_by", 1),
        (some(f"{AT[0]}/round", lambda v: v > 0, 119), f"{AT[0]}/round", "after the last that the protocol gives", 1),
        (some(strict.SMALLEST, np.isfinite, 0.9), strict.SMALLEST, "none of the eps that are asked about", 2),
        (some(strict.SMALLEST, lambda v: v <= 5 / 255, 10 / 255), strict.SMALLEST, "do not lie between the grid's eps", 1),
        (some(strict.SMALLEST, np.isnan, 5 / 255), strict.SMALLEST, "missing where the query is right", 1),
        (back, f"{AT[1]}/recall_at_2", "above those at a smaller eps", 1),
        (some(f"{AT[0]}/recall_at_4", lambda v: v == 100, 50.0), f"{AT[0]}/recall_at_4", "other than 0 and 100", 1),
        (some(f"{AT[0]}/recall_at_8", lambda v: v == 100, np.nan), f"{AT[0]}/recall_at_8", "missing in one of", 1),
        (some(f"{AT[0]}/map_at_r", lambda v: v > 0, 101.0), f"{AT[0]}/map_at_r", "outside 0 to 100", 1),
        (lambda a: a[f"{AT[0]}/recall_at_8"].fill(0.0), f"{AT[0]}/recall_at_8", "below those at a smaller rank", 1),
        (lambda a: a.pop(f"{AT[0]}/iteration"), f"{AT[0]}/iteration", "not one integer for each of 896", 1),
        (lambda a: a.update({f"{AT[0]}/broken_by": np.zeros(5, int)}), f"{AT[0]}/broken_by", "not one integer for each", 1),
    ],
)  # fmt: skip
def test_edited_arrays_of_a_strict_run(made, bundle, tmp_path, change, field, reason, lines):
    report = bundle(edit_arrays(made["strict"], QUERIES, tmp_path, change))
    refused(report, 0, field, reason, max(lines, len(report.problems)))
    assert not any("measurements" in p.field or "extras" in p.field for p in report.problems)  # no wake of other lines


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        (put(["extras", "clustering", "worst", 2, "ami"], 60.0), "worst.2.ami", "outcomes give -"),
        (put(["extras", "clustering", "attacks", 3, "nmi"], 60.0), "attacks.3.nmi", "outcomes give 14."),
        (put(["extras", "clustering", "attacks", 3, "f1"], 60.0), "attacks.3.f1", "outcomes give 29."),
        (put(["extras", "clustering", "attacks", 3, "attack"], "C1"), "attacks.3.attack", "outcomes give 'U1'"),
        (put(["extras", "clustering", "attacks", 3, "labelled"], True), "attacks.3.labelled", "outcomes give False"),
        (put(["extras", "clustering", "clean", "ami"], 60.0), "clean.ami", "outcomes give 24."),
        (put(["extras", "clustering", "seeds", 0], 9), "seeds.0", "outcomes give 0"),
        (lambda c: c["extras"]["clustering"]["attacks"].pop(), "extras.clustering.attacks", "outcomes give"),
        (lambda c: [r.update(labelled=False) for r in c["extras"]["clustering"]["worst"]], "extras.clustering.worst", "no row"),
        (put(["extras", "retention"], {}), "extras.retention", "is not what a run of kind 'clustering' has"),
        (put(["measurements", 0, "value"], 10.0), "measurements.C1@10/255.value", "outcomes give 82.5"),
    ],
)  # fmt: skip
def test_an_edited_clustering_run(made, bundle, change, field, reason):
    refused(bundle(edit_json(made["clustering"], RUN, change)), 0, field, reason)


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        (lambda a: a["C1@10/255/clusters"].__setitem__((0, 0), 5), "C1@10/255/clusters", "1 images are in clusters other"),
        (lambda a: a["U2@40/255/clusters"].__setitem__((3, 1), -1), "U2@40/255/clusters", "other than 0 to 4"),
        (lambda a: a.update({"C1@10/255/clusters": a["C1@10/255/clusters"][:, :2]}), "C1@10/255/clusters", "for each of 896 x 5"),
        (lambda a: a.pop("clustering/clean/value"), "clustering/clean/value", "not one number for each of 896"),
        (some("C1@10/255/value", lambda v: v == 0, np.nan), "C1@10/255/value", "missing where the class has another"),
        (some("C1@10/255/value", lambda v: v == 0, 40.0), "C1@10/255/value", "other than 0 and 100"),
        (some("C1@10/255/norm", lambda v: v > 0, 0.2), "C1@10/255/norm", "outside the linf ball of 10/255"),
        (lambda a: a["union@10/255/choice"].__setitem__(0, 7), "union@10/255/choice", "1 are other than 0 to 6"),
        (some("union@40/255/norm", lambda v: v > 0.1, 0.1), "union@40/255/norm", "not those of the chosen images"),
        (lambda a: a.pop("union@10/255/choice"), "union@10/255/choice", "is not one integer for each of 896"),
    ],
)  # fmt: skip
def test_edited_arrays_of_a_clustering_run(made, bundle, tmp_path, change, field, reason):
    refused(bundle(edit_arrays(made["clustering"], QUERIES, tmp_path, change)), 0, field, reason)


def test_other_clusters_are_other_numbers(made, bundle, tmp_path):
    """Whoever puts the true classes in place of the clusters is told of every number that hangs on them."""

    def change(a):
        classes = np.unique(a["label"], return_inverse=True)[1]
        a["union@40/255/clusters"][:] = classes[:, None]

    report = bundle(edit_arrays(made["clustering"], QUERIES, tmp_path, change))
    fields = {p.field.removeprefix(f"{RUN} extras.clustering.") for p in report.problems}
    assert {"attacks.15.nmi", "attacks.15.ami", "attacks.15.f1", "worst.2.ami"} <= fields
    assert any(p.field.endswith("attacks.15.ami") and "give 100.0" in p.reason for p in report.problems)


def test_an_ers_run_cannot_carry_the_columns_of_other_kinds(tmp_path, bundle, made):
    files = valid(tmp_path, "ers-digits")
    extras = json.loads(made["clustering"][RUN])["extras"]
    refused(bundle(edit_json(files, RUN, put(["extras"], extras))), 0, "extras.clustering", "kind 'ers'")


@pytest.mark.parametrize(("protocol", "name"), [("strict", "smallest_eps"), ("clustering", "clustering_ami_attacked")])
def test_the_submission_states_what_the_board_ranks_by(made, bundle, protocol, name):
    for value in (77.0, None):
        report = bundle(edit_yaml(made[protocol], put(["stated", name], value)))
        refused(report, 0, f"stated.{name}", f"says {value}, the run")


# --- level 2: the stored images ---------------------------------------------------------------------------


def image(name, of, change):
    """Change one stored image, of those that ``of`` picks by its query's code."""

    def edit(a, by):
        a[name][np.flatnonzero(of(by))[0]] = change(a[name][np.flatnonzero(of(by))[0]])

    return edit


def edit_sample(files, tmp_path, name, change):
    queries = arrays_of(files[QUERIES], tmp_path)

    def edit(a):
        keep = np.isin(queries["query"], a["rows"])
        change(a, queries[f"{name}/broken_by"][keep])

    return edit_arrays(files, SAMPLE, tmp_path, edit)


@pytest.mark.parametrize(
    ("name", "of", "move", "field", "reason"),
    [
        (AT[3], lambda by: by > 1, lambda x: 1 - x, f"{SAMPLE} {AT[3]}", "1 images are outside the linf ball of 40/255"),
        (AT[0], lambda by: by == -1, lambda x: x - 2, f"{SAMPLE} {AT[0]}", "outside [0, 1]"),
        (AT[1], lambda by: by == 1, lambda x: np.abs(x - 1e-5), f"{SAMPLE} {AT[1]}", "1 images are not those of the smaller eps"),
        (AT[0], lambda by: by == -1, lambda x: x * np.nan, f"{SAMPLE} {AT[0]}", "NaN or infinite"),
    ],
)  # fmt: skip
def test_strict_images_that_lie(made, bundle, tmp_path, name, of, move, field, reason):
    files = edit_sample(made["strict"], tmp_path, name, image(name, of, move))
    report = bundle(files, 2)
    assert report.passed == (0, 1)
    refused(report, 2, field, reason, len(report.problems))


def test_clean_images_for_those_that_broke_queries(made, bundle, tmp_path):
    def change(a, by):
        clean = dmlbench.load_dataset("digits").images[a["rows"]].numpy()
        for name in AT:
            a[name][:] = clean

    report = bundle(edit_sample(made["strict"], tmp_path, AT[0], change), 2)
    for name in AT:
        assert any(p.field == f"{QUERIES} {name}/norm" for p in report.problems)
        assert any(p.field == f"{QUERIES} {name}/value" and "score otherwise" in p.reason for p in report.problems)


def believable(files, tmp_path, change, protocol):
    """The bundle of a careful liar: ``change`` the arrays, then every number that hangs on them."""
    rules = load_protocol(protocol)
    kept = {}

    def edit(a):
        change(a)
        kept.update(a)

    files = edit_arrays(files, QUERIES, tmp_path, edit)

    def state(content):
        for m in content["measurements"]:
            m["value"] = m["score"] = float(np.nanmean(kept[f"{m['component']}/value"].astype(float)))
        table = np.stack([kept[f"{m['component']}/value"] for m in content["measurements"]], axis=1)
        ends = class_intervals(table, kept["label"], [PERCENT] * table.shape[1]).columns
        content["interval_version"] = VERSION
        for m, one in zip(content["measurements"], ends, strict=True):
            m["interval"] = one
        if protocol == "clustering":
            content["extras"]["clustering"] = clustering.summary(rules, rules.eps_for((1, 8, 8)), kept["label"], kept)
            return
        spent = [point["steps"] for point in content["extras"]["strict"]["curve"]]
        clean = kept["benign/recall_at_1"]
        halving = content["extras"]["strict"]["smallest_eps"]
        content["extras"]["strict"] = strict.summary(rules, GRID, clean, kept["label"], kept, spent, halving)
        for m in content["measurements"]:
            content["extras"]["retention"][m["component"]] = 100.0 * m["value"] / content["benign"]["recall_at_1"]

    files = edit_json(files, RUN, state)
    content = json.loads(files[RUN])["extras"]
    if protocol == "strict":
        return edit_yaml(
            files,
            put(
                ["stated", "smallest_eps"],
                within(content["strict"]["smallest_eps"]["median"], content["strict"]["smallest_eps"]),
            ),
        )
    return edit_yaml(files, put(["stated", "clustering_ami_attacked"], content["clustering"]["worst"][2]["ami"]))


def survive(only=lambda a: np.ones(len(a["query"]), dtype=bool)):
    """Every query that is right when clean, and picked, survives all."""

    def change(a):
        who = (a["benign/recall_at_1"] == 100) & only(a)
        a[strict.SMALLEST] = np.where(who, np.inf, a[strict.SMALLEST])
        for name in AT:
            a[f"{name}/broken_by"][who] = strict.SURVIVED
            a[f"{name}/iteration"][who] = a[f"{name}/round"][who] = 0
            a[f"{name}/value"][who] = 100.0
            for proxy in strict.PROXIES:
                a[f"{name}/{proxy}"][who] = a[f"benign/{proxy}"][who]

    return change


def test_invented_survivors_fall_at_the_replay(made, bundle, tmp_path):
    files = believable(made["strict"], tmp_path, survive(), "strict")
    report = bundle(files, 2)
    assert report.passed == (0, 1)
    assert any(p.field.endswith(f"{AT[3]}/value") and "score otherwise" in p.reason for p in report.problems)
    assert any(p.field.endswith(f"{AT[3]}/map_at_r") and "score lower than stated" in p.reason for p in report.problems)


def test_survivors_invented_where_no_image_is_kept_fall_at_the_rerun(made, bundle, tmp_path, brief):
    rows = np.load(io.BytesIO(made["strict"][SAMPLE]))["rows"]
    invent = survive(lambda a: ~np.isin(a["query"], rows))

    def careful(a):  # more survivors spend what the rule asks for in fewer rounds: all others fall in the first
        invent(a)
        for name in AT:
            a[f"{name}/round"] = np.minimum(a[f"{name}/round"], 1)

    report = bundle(believable(made["strict"], tmp_path, careful, "strict"), 3, seed=0, share=0.0, least=16)
    assert report.passed == (0, 1, 2)
    said = [str(p) for p in report.problems]
    assert any("extras.strict.smallest_eps: attacking 16 queries again gave 0." in line for line in said), said
    assert any(f"measurements.{AT[3]}: attacking 16 queries again gave -" in line for line in said), said


def test_survivors_invented_where_no_image_is_kept_change_when_the_rounds_had_to_end(made, bundle, tmp_path):
    """More survivors spend what the rule asks for in fewer rounds, so the rounds that broke others come too late."""
    rows = np.load(io.BytesIO(made["strict"][SAMPLE]))["rows"]

    def quiet(a):
        by_rounds = np.any([a[f"{name}/round"] > 0 for name in AT], axis=0)
        return ~np.isin(a["query"], rows) & ~by_rounds

    report = bundle(believable(made["strict"], tmp_path, survive(quiet), "strict"), 3, seed=0, share=0.0, least=16)
    assert report.passed == () and report.status == "refused"
    said = [str(p) for p in report.problems]
    assert any("are after the last that the protocol gives the group" in line for line in said), said


def unspoilt(a):
    """Every attacked set clusters as the clean one."""
    for name in [k.removesuffix("/clusters") for k in a if "@" in k and k.endswith("/clusters")]:
        for key in ("clusters", "value"):
            a[f"{name}/{key}"] = a[f"clustering/clean/{key}"]


def test_invented_clusters_fall_when_one_attack_is_run_again(made, bundle, tmp_path):
    files = believable(made["clustering"], tmp_path, unspoilt, "clustering")
    assert bundle(files, 2).status == "accepted"  # as docs/submitting.md says
    report = bundle(files, 3, seed=2)
    assert report.passed == (0, 1, 2)
    assert all(p.level == 3 and "measured again it is" in p.reason for p in report.problems)
    assert any("/clusters" in p.field and "give ami 24.2" in p.reason for p in report.problems), report.problems


def test_invented_clean_clusters_fall_at_the_replay(made, bundle, tmp_path):
    def change(a):
        a["clustering/clean/clusters"][:] = np.unique(a["label"], return_inverse=True)[1][:, None]

    report = bundle(believable(made["clustering"], tmp_path, change, "clustering"), 2)
    refused(report, 2, "clustering/clean/clusters", "give ami 100.00, measured again it is 24.", 3)


@pytest.mark.parametrize(
    ("change", "field", "reason", "lines"),
    [
        (lambda x, clean: x * 0, f"{SAMPLE} union@40/255", "outside the linf ball of 40/255", 1),
        (lambda x, clean: x[:3], f"{SAMPLE} union@40/255", "is not float32 images of shape (32, 1, 8, 8)", 1),
        (lambda x, clean: (x + clean) / 2, f"{QUERIES} union@40/255/norm", "are not the norms", 2),
        (lambda x, clean: (x + clean) / 2, f"{SAMPLE} union@40/255", "other images than those that were chosen", 2),
    ],
)
def test_clustering_images_that_lie(made, bundle, tmp_path, change, field, reason, lines):
    def edit(a):
        clean = dmlbench.load_dataset("digits").images[a["rows"]].numpy()
        a["union@40/255"] = change(a["union@40/255"], clean)

    report = bundle(edit_arrays(made["clustering"], SAMPLE, tmp_path, edit), 2)
    assert report.passed == (0, 1)
    refused(report, 2, field, reason, lines)


def test_an_attack_on_the_set_as_a_whole_may_end_at_other_images(made, tmp_path):
    e = check_static(zipped(made["clustering"], tmp_path / "b.zip")).evaluation

    def fields(part, share, way="alone"):
        again = {key: e.arrays[f"{part}/{key}"].copy() for key in ("clusters", "value")}
        right = np.flatnonzero(again["value"] == 100)
        again["value"][right[: int(share * len(again["value"]))]] = 0
        return [p.field for p in clusters_differ(3, part, e, again, e.arrays["label"], way)]

    for way in ("joint", "union"):
        part = f"{way}@40/255"
        assert fields(part, 0.1, way) == [] and fields(part, 0.2, way) == [f"{QUERIES} {part}/value"]
    for part in ("C1@40/255", "U3@10/255", CLEAN):
        assert fields(part, 0.01) == [] and fields(part, 0.1) == [f"{QUERIES} {part}/value"]


# --- level 4 and the board ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "name"), [("strict", "smallest_eps"), ("clustering", "clustering_ami_attacked")])  # fmt: skip
def test_a_full_rerun_names_what_the_board_ranks_by(made, tmp_path, monkeypatch, typed, protocol, name):
    """The rerun gives the run's own outcomes: verified. With a new doubt, or other clusters: disputed."""
    folder = tmp_path / "leaderboard" / "submissions" / f"{MODEL}-{protocol}"
    write_folder(made[protocol], folder)
    checked = check_static(folder)
    e = checked.evaluation
    again = Evaluation.model_validate(e.model_dump()).with_arrays({k: v.copy() for k, v in e.arrays.items()})
    monkeypatch.setattr(rerun, "evaluate", lambda *a, **k: again)
    done = typed("verify", folder, "--device", "cpu")
    assert f"verified: {name} " in done.out
    record = json.loads((tmp_path / "leaderboard" / "verifications" / f"{folder.name}.json").read_text())
    assert record["headline"] == name and record["stated"] == record["measured"] is not None
    (row,) = build.rows_of(tmp_path / "leaderboard")
    assert row.status == "verified" and row.headline == pytest.approx(record["stated"], abs=1e-3)
    if protocol == "strict":
        again.__dict__["warnings"] = (*e.warnings, Flag(flag="audit-F2", message="fail: the gradient is exactly zero"))
    else:
        again.arrays["C1@10/255/clusters"][:] = 0
    assert ": disputed" in typed("verify", folder, "--device", "cpu", code=1).out
    (row,) = build.rows_of(tmp_path / "leaderboard")
    assert row.status == "disputed" and row.rank is None


def test_a_doubt_that_only_the_rerun_has_is_a_dispute(made, tmp_path, monkeypatch):
    checked = check_static(zipped(made["strict"], tmp_path / "b.zip"))
    e = checked.evaluation
    again = Evaluation.model_validate(e.model_dump()).with_arrays(e.arrays)
    monkeypatch.setattr(rerun, "evaluate", lambda *a, **k: again)
    embedder = rerun.load_submitted(checked)
    assert rerun.rerun_all(checked, embedder, device="cpu").problems == ()
    again.__dict__["warnings"] = (Flag(flag="audit-F4", message="fail: the gradient hides what is there"),)
    (problem,) = rerun.rerun_all(checked, embedder, device="cpu").problems
    assert problem.level == 4 and "audit-F4" in problem.field and "hides what is there" in problem.reason


def every(name, value, of=""):
    """A lie of the queries' arrays that end in ``name``."""

    def lie(e):
        for key in [k for k in e.arrays if k.endswith(name) and not k.startswith("benign") and of in k]:
            e.arrays[key] = np.where(np.isnan(e.arrays[key]), np.nan, value).astype(e.arrays[key].dtype)

    return lie


def first_step(e):
    for name in AT:
        by = e.arrays[f"{name}/broken_by"]
        e.arrays[f"{name}/broken_by"] = np.where(by > 1, 2, by)


def cheap(e):
    e.extras["strict"]["gradients_per_query"] /= 10


def median_a_step_up(name):
    """The median a step up the ladder, by queries too few to move the mean of the logarithms far."""

    def lie(e):
        x = e.arrays[name]
        values = np.unique(x[np.isfinite(x)])
        at = int(np.searchsorted(values, np.nanmedian(x)))
        e.arrays[name] = np.where(x == values[at], values[at + 1], x)

    return lie


@pytest.mark.parametrize(
    ("protocol", "lie", "field"),
    [
        ("strict", every("/map_at_r", 100.0), "map_at_r"),
        ("strict", first_step, "broken_by"),
        ("strict", cheap, "extras.strict"),
        ("strict", median_a_step_up("smallest_eps/value"), "smallest_eps"),
        ("corruptions", every("/map_at_r", 100.0), "corruption_map_at_r"),
        ("verification", every("impersonation/smallest_eps", 0.15), "impersonation_smallest_eps"),
        ("poison", every("/recall_at_1", 100.0), "recall_at_1"),
        ("certified", every("certified/margin", 0.01), "certified/margin"),
        ("clustering", lambda e: None, None),
        ("universal", lambda e: None, None),
        ("sides", lambda e: None, None),
    ],
)  # fmt: skip
def test_a_full_rerun_sees_every_number_that_lies(tmp_path, monkeypatch, protocol, lie, field):
    """Not the ranked one alone; the rerun is the honest run itself."""
    folder = SUBMISSIONS / f"digits-smallcnn-triplet-hm-lga-ics-{protocol}"
    if not folder.is_dir():
        pytest.skip("the board lies in the repository")
    honest, checked = check_static(folder).evaluation, check_static(folder)
    embedder = rerun.load_submitted(checked)
    monkeypatch.setattr(rerun, "evaluate", lambda *a, **k: honest)
    assert rerun.rerun_all(checked, embedder, device="cpu").problems == ()
    lie(checked.evaluation)
    problems = rerun.rerun_all(checked, embedder, device="cpu").problems
    assert any(field in p.field for p in problems) if field else not problems


@pytest.mark.parametrize("protocol", ["strict", "clustering"])
def test_from_a_run_to_the_board_as_a_user_types_it(made, typed, tmp_path, protocol):
    checked = check_static(zipped(made[protocol], tmp_path / "made.zip"))
    save(checked.evaluation, tmp_path / "runs" / "mine")
    (tmp_path / "record.json").write_text(checked.submission.checkpoint.model_dump_json())
    (tmp_path / "w.safetensors").write_bytes(made[protocol]["weights.safetensors"])
    drafted = Path(
        typed("submit", "init", "runs/mine", "--checkpoint", "record.json", "--author", "A", "--json").json[
            "submission"
        ]
    )
    text = drafted.read_text().replace("license: FILL-IN", "license: MIT").replace("FILL-IN", "A. Tester")
    drafted.write_text(text)
    board = tmp_path / "leaderboard"
    out = board / "submissions" / f"{MODEL}-{protocol}"
    assert "level 0 passed" in typed("submit", "pack", "runs/mine", "--weights", "w.safetensors", "--out", out).out
    assert typed("validate", out, "--level", "2", "--device", "cpu", "--board", board).out.endswith("accepted\n")
    done = typed("leaderboard", "build", "--board", board, "--site", tmp_path / "site")
    assert f"{protocol}/digits.csv" in done.out
    (row,) = build.load_boards(board)[f"{protocol}/digits"]
    assert row.rank == 1 and row.headline is not None and row.ers is None and row.status == "reproduced"
    shown = typed("leaderboard", "show", "--board", board).out
    column = "smallest_eps" if protocol == "strict" else "clustering_ami_attacked"
    assert column in shown and cell(column, row.headline) in shown and "ers_lo" not in shown
    page = (tmp_path / "site" / "datasets" / "digits.html").read_text()
    assert f'data-column="{column}" data-value="{row.headline}"' in page
    done = typed("compare", "runs/mine", "runs/mine")
    assert column in done.out and "Gate passed" in done.out
