"""The kinds of figure: each is a function from runs to a :class:`Figure` of plain numbers.

scikit-learn is imported when t-SNE is asked for.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dmlbench.board.compare.verdict import components_of
from dmlbench.board.paper import header, names_of, numbers
from dmlbench.board.paper import intervals as intervals_of
from dmlbench.board.plots.draw import Figure, Series
from dmlbench.board.row import headline
from dmlbench.datasets import load_dataset
from dmlbench.errors import DataError, NotComparable, UsageError
from dmlbench.intervals import Ends
from dmlbench.kinds.table import kind_of
from dmlbench.models import load_model
from dmlbench.protocol import counted, scored
from dmlbench.registry import Registry, suggest
from dmlbench.results import Evaluation
from dmlbench.run.closeup import names_of as closeup_names
from dmlbench.run.subject import embed
from dmlbench.threat import length
from dmlbench.user_code import require_named

Runs = Sequence[tuple[str, Evaluation]]
"""Runs, each with the name that the user gave it."""

PERPLEXITY = 30.0


def _require_same(runs: Runs) -> None:
    """Refuse runs whose numbers are not of one kind.

    Raises:
        NotComparable: they differ in protocol or data set.
    """
    for what, key in (
        ("protocol", lambda e: (e.protocol.name, e.protocol.sha256[:12])),
        ("data set", lambda e: (e.dataset.name, e.dataset.split, e.dataset.sha256[:12])),
    ):
        names_by_key = {key(e): name for name, e in runs}
        if len(names_by_key) > 1:
            (a, first), (b, second) = list(names_by_key.items())[:2]
            raise NotComparable(f"{first} and {second} differ in {what}: {'/'.join(a)} and {'/'.join(b)}")


def reached(e: Evaluation) -> float:
    """The largest perturbation in the run, in the protocol's norm; 0 if the run stores no norms."""
    norms = [a for key, a in e.arrays.items() if key.endswith("/norm") and a.size]
    return max((float(np.nanmax(a)) for a in norms), default=0.0)


def _ends(intervals: Sequence[Ends]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([np.nan if ends is None else ends[side] for ends in intervals]) for side in (0, 1))  # type: ignore[return-value]


def eps(runs: Runs, metric: str | None = None, part: str | None = None) -> Figure:
    """Robustness against eps, [0, 1] scale: the curve of a kind of protocol that has a grid of eps, and for parts a run at
    each eps, whose scores are joined by model.

    Raises:
        UsageError: there is nothing along eps to draw.
    """
    curves = [kind_of(e).curve(e) for _, e in runs]
    titles = {curve and curve.title for curve in curves}
    if len(titles) > 1:
        raise NotComparable("the runs are of several kinds of protocol: their curves have no axis in common")
    if titles == {None}:
        return _runs_by_eps(runs, metric)
    _require_same(runs)
    series = []
    for name, (_, e), curve in zip(names_of(runs), runs, curves, strict=True):
        assert curve is not None
        ends = intervals_of(e)
        low, high = _ends([ends.get(p.part) if p.part else None for p in curve.points])
        value = np.array([np.nan if p.value is None else p.value for p in curve.points], dtype=np.float64)
        series.append(Series(name, np.array([length(p.eps) for p in curve.points]), value, low, high))
    return Figure("eps", "eps, in 1/255", str(titles.pop()), tuple(series), limits=(0.0, 100.0))


def roc(runs: Runs, metric: str | None = None, part: str | None = None) -> Figure:
    """The share of genuine pairs that is accepted against the share of impostors, when clean, as the threshold moves.

    Raises:
        UsageError: a run decides about no pairs, or has no pair of one sort.
        NotComparable: the runs decide about pairs of different files.
    """
    _require_same(runs)
    if len({e.conditions.pairs for _, e in runs}) > 1:
        raise NotComparable("the runs decide about different pairs: --pairs")
    series = []
    for name, (label, e) in zip(names_of(runs), runs, strict=True):
        points = np.array(kind_of(e).roc(e), dtype=np.float64)
        if not len(points):
            raise UsageError(f"{label} decides about no pairs of both sorts: a ROC is drawn of runs of verification")
        series.append(Series(name, points[:, 0], points[:, 1]))
    return Figure(
        "roc", "impostors accepted (FAR), %", "genuine pairs accepted (TAR), %", tuple(series), limits=(0.0, 101.0)
    )


def _runs_by_eps(runs: Runs, metric: str | None) -> Figure:
    metric = metric or "ers"
    values = [(e.model.id, reached(e), numbers(e).get(metric), intervals_of(e).get(metric)) for name, e in runs]
    there = [v for v in values if v[2] is not None]
    if len({round(v[1], 4) for v in there}) < 2:
        raise UsageError(
            "these runs hold no curve over eps: name runs of a protocol with a grid of eps (strict, clustering), or runs at several eps"
        )
    series = []
    for model in dict.fromkeys(v[0] for v in there):
        points = sorted((v for v in there if v[0] == model), key=lambda v: v[1])
        low, high = _ends([p[3] for p in points])
        y = np.array([p[2] for p in points], dtype=np.float64)
        series.append(Series(model, np.array([p[1] for p in points]), y, low, high))
    return Figure("eps", "eps, in 1/255", header(metric), tuple(series), limits=(0.0, 100.0))


def parts(runs: Runs, metric: str | None = None, part: str | None = None) -> Figure:
    """The score of each part, side by side for several models; 0 gives in, 100 withstands."""
    _require_same(runs)
    names = list(dict.fromkeys(m.component for _, e in runs for m in e.measurements))
    series = []
    for name, (_, e) in zip(names_of(runs), runs, strict=True):
        scores, ends = {m.component: m.score for m in e.measurements}, intervals_of(e)
        low, high = _ends([ends.get(n) for n in names])
        y = np.array([np.nan if scores.get(n) is None else scores[n] for n in names], dtype=np.float64)
        series.append(Series(name, np.arange(len(names), dtype=np.float64), y, low, high))
    return Figure("parts", "", "score", tuple(series), tuple(header(n) for n in names), limits=(0.0, 100.0))


def _metric(runs: Runs, metric: str | None) -> str:
    """The given metric, or the one by which the first run is ranked.

    Raises:
        UsageError: no run has it.
    """
    if metric is None:
        number = headline(runs[0][1])
        if number is None:
            raise UsageError(f"{runs[0][0]} has no number that models are ranked by: name one with --metric")
        return number[0]
    known = dict.fromkeys(name for _, e in runs for name in numbers(e))
    if metric not in known:
        raise UsageError(f"no run has a metric {metric!r}{suggest(metric, known)}")
    return metric


def scatter(runs: Runs, metric: str | None = None, part: str | None = None) -> Figure:
    """ERS (or what the protocol ranks by) against clean R@1, a point for each run."""
    _require_same(runs)
    metric = _metric(runs, metric)
    series = []
    for name, (_, e) in zip(names_of(runs), runs, strict=True):
        x, y = e.benign.get("recall_at_1"), numbers(e).get(metric)
        if x is not None and y is not None:
            low, high = _ends([intervals_of(e).get(metric)])
            series.append(Series(name, np.array([x]), np.array([y]), low, high))
    return Figure("scatter", "clean R@1, %", header(metric), tuple(series))


def classes(runs: Runs, metric: str | None = None, part: str | None = None) -> Figure:
    """The mean score of each class's queries over the parts (or of one ``part``), the first run's weakest class first."""
    _require_same(runs)
    recalls: list[tuple[str, dict[int, float]]] = []
    titles: dict[int, str] = {}
    for name, (_, e) in zip(names_of(runs), runs, strict=True):
        known = components_of(e)
        extra = set(e.extras.get("extra_parts", ()))
        chosen = [known[part]] if part in known else [c for n, c in known.items() if n not in extra]
        if part is not None and part not in known:
            raise UsageError(f"{name} has no part {part!r}{suggest(part, known)}")
        if "label" not in e.arrays or any(f"{c.name}/value" not in e.arrays for c in chosen):
            raise DataError(f"{name} does not hold the queries' own outcomes, which classes are read from")
        table, label = counted(scored(chosen, e.arrays)), e.arrays["label"]
        by_class = {}
        for one in np.unique(label):
            columns = [column[~np.isnan(column)] for column in table[label == one].T]
            by_class[int(one)] = (
                float(np.mean([c.mean() for c in columns if len(c)])) if any(map(len, columns)) else np.nan
            )
        recalls.append((name, by_class))
        titles |= closeup_names(e.sample).classes
    everyone = sorted({c for _, by_class in recalls for c in by_class})
    order = sorted(everyone, key=lambda c: (recalls[0][1].get(c, np.inf), c))
    at = np.arange(len(order), dtype=np.float64)
    return Figure(
        "classes",
        "class",
        f"score of {part}" if part else "mean score over the parts",
        tuple(Series(name, at, np.array([by_class.get(c, np.nan) for c in order])) for name, by_class in recalls),
        tuple(titles.get(c, str(c)) for c in order),
        limits=(0.0, 100.0),
    )


def tsne(runs: Runs, metric: str | None = None, part: str | None = None) -> Figure:
    """t-SNE of the sampled queries' embeddings, clean and attacked, in one plane.

    The run keeps some adversarial images; the model and the data set, which must be at hand and the same as measured, give
    their embeddings and those of the clean images.

    Raises:
        UsageError: several runs, or a part that is not in the sample.
        DataError: the run holds no adversarial sample, or the model or the data set is another one by now.
    """
    if len(runs) != 1:
        raise UsageError("t-SNE is drawn of one run")
    label, e = runs[0]
    sampled = [m.component for m in e.measurements if m.component in e.sample]
    if not sampled or "rows" not in e.sample:
        raise DataError(
            f"{label} holds no adversarial sample, which t-SNE is drawn from: name a run folder with adversarial_sample.npz"
        )
    part = part or sampled[-1]
    if part not in sampled:
        raise UsageError(f"the sample of {label} has no part {part!r}{suggest(part, sampled)}")
    for what, name in (("model", e.model.id), ("data set", e.dataset.name)):
        require_named(what, name, label, "which t-SNE has no option for")
    model = load_model(e.model.id).eval()
    if e.model.weights_sha256 and model.weights_sha256 != e.model.weights_sha256:
        raise DataError(f"model {e.model.id!r} has other weights here than {label} was measured with")
    dataset = load_dataset(e.dataset.name, e.dataset.split, model.preprocess)
    if dataset.sha256 != e.dataset.sha256:
        raise DataError(f"data set {e.dataset.name!r} is another one here than {label} was measured on")
    rows = e.sample["rows"]
    clean = embed(model, dataset, rows).numpy()
    with torch.no_grad():
        attacked = model(torch.from_numpy(e.sample[part])).numpy()
    plane = projected(np.concatenate([clean, attacked]))
    labels = dataset.labels[rows]
    both = {"clean": plane[: len(rows)], "attacked": plane[len(rows) :]}
    series = tuple(Series(name, at[:, 0], at[:, 1], groups=labels) for name, at in both.items())
    return Figure("tsne", "", f"t-SNE, {header(part)}", series)


def projected(embeddings: np.ndarray) -> np.ndarray:
    """(n, 2) by t-SNE from the principal axes, with a fixed seed; the perplexity is 30, or less for few points."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, max(2.0, (len(embeddings) - 1) / 3))
    drawn = TSNE(
        2, perplexity=perplexity, init="pca", random_state=0, method="exact" if len(embeddings) < 500 else "barnes_hut"
    )
    plane: np.ndarray = drawn.fit_transform(embeddings.astype(np.float64))
    return plane


def matrix(runs: Runs, metric: str | None = None, part: str | None = None) -> Figure:
    """Transfer: what each model keeps (rows) under adversarial images made on each surrogate (columns). A run without a
    surrogate made them on the model itself.

    Raises:
        UsageError: two runs are of the same model and surrogate.
    """
    _require_same(runs)
    metric = _metric(runs, metric)
    values: dict[tuple[str, str], float] = {}
    for label, e in runs:
        key = e.model.id, e.conditions.surrogate or e.model.id
        if key in values:
            raise UsageError(f"{label}: there are two runs of {key[0]} under images of {key[1]}")
        value = numbers(e).get(metric)
        values[key] = np.nan if value is None else float(value)
    models = tuple(dict.fromkeys(model for model, _ in values))
    columns = (
        *(m for m in models if any(s == m for _, s in values)),
        *dict.fromkeys(s for _, s in values if s not in models),
    )
    table = np.array([[values.get((m, s), np.nan) for s in columns] for m in models])
    rows = tuple(
        Series(m, np.arange(len(columns), dtype=np.float64), row) for m, row in zip(models, table, strict=True)
    )
    return Figure("matrix", "surrogate", header(metric), rows, columns, table)


KINDS: Registry[Callable[..., Figure]] = Registry(
    "kind of plot",
    {"eps": eps, "parts": parts, "scatter": scatter, "classes": classes, "tsne": tsne, "matrix": matrix, "roc": roc},
)
"""(runs, metric, part) to the numbers of a figure."""
