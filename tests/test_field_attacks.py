"""The field's further attacks: objectives, target rules and read-outs against plain loops, and free combination."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import PLAIN, average, distance, order, relu, to_all
from scenes import big_scene, scene_of
from scipy.stats import kendalltau

import dmlbench
from dmlbench.attacks import ATTACKS, parse
from dmlbench.embedding import DISTANCES
from dmlbench.errors import UsageError
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES, PRESERVED
from dmlbench.protocols import load_protocol, protocol_names
from dmlbench.rng import Rng
from dmlbench.scene import Gallery, Scene
from dmlbench.targets import TARGETS

DEFAULT = "digits-smallcnn-triplet-hm-lga-ics"


def gap(wrong):
    def loss(s, i, e, X, y, chosen):
        d = to_all(s, e, X)
        positive = min(d[j] for j in range(len(y)) if y[j] == y[i] and j != i)
        return min(d[j] for j in range(len(y)) if wrong(y[j], y[i], y[chosen[0]])) - positive

    return loss


def disorder(s, i, e, X, y, chosen):
    d = [distance(s, e, X[c]) for c in chosen]
    return average([relu(d[a] - d[b]) for a in range(len(d)) for b in range(a + 1, len(d))])


def guides(away: bool):
    def loss(s, i, e, X, y, chosen):
        used = [c for c in chosen if c != i and y[c] == y[i]] if away else list(chosen)
        squares = [sum((float(a) - float(b)) ** 2 for a, b in zip(e, X[c], strict=True)) for c in used]
        return (-1.0 if away else 1.0) * (average(squares) if squares else 0.0)

    return loss


def keeping(name: str, weight: float):
    def loss(s, i, e, X, y, chosen):
        kept = PLAIN["raise_in_query"](s, i, e, X, y, chosen[-PRESERVED:])
        return PLAIN[name](s, i, e, X, y, chosen[:-PRESERVED]) + weight * kept

    return loss


TWINS = {
    "margin": gap(lambda other, own, target: other != own),
    "margin_to_class": gap(lambda other, own, target: other == target),
    "margin_to_entry": lambda s, i, e, X, y, c: (
        distance(s, e, X[c[0]]) - min(distance(s, e, X[j]) for j in range(len(y)) if y[j] == y[i] and j != i)
    ),
    "leave": lambda s, i, e, X, y, c: -distance(s, e, X[c[0]]),
    "leave_guides": guides(away=True),
    "join_guides": guides(away=False),
    "order": disorder,
    "order_in_place": lambda s, i, e, X, y, c: disorder(s, i, e, X, y, c) + PLAIN["raise_in_query"](s, i, e, X, y, c),
    "raise_and_keep": keeping("raise_in_query", 1.0),
    "lower_and_keep": keeping("lower_in_query", 100.0),
}


def aimed_scene(space: str, name: str):
    scene, moved = scene_of(space, k=7 if "keep" in name else 4, seed=2)
    wrong = scene.chosen + (scene.gallery.labels[scene.chosen] == scene.labels[:, None]).long()
    return scene.aimed(wrong % len(scene.gallery)), moved


@pytest.mark.parametrize("space", list(DISTANCES))
@pytest.mark.parametrize("name", list(TWINS))
def test_objectives_against_plain_loops(space: str, name: str) -> None:
    scene, moved = aimed_scene(space, name)
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    moved = moved.requires_grad_(True)
    found = OBJECTIVES[name](moved, scene)
    for i in range(len(scene)):
        twin = lambda e, i=i: TWINS[name](space, i, e, X, y, scene.chosen[i].tolist())  # noqa: E731
        e = moved[i].detach().double().numpy()
        assert float(found.detach()[i]) == pytest.approx(twin(e), abs=2e-5 * (100 if "lower" in name else 1))
    (gradient,) = torch.autograd.grad(found.sum(), moved)
    e, direction = moved[0].detach().double().numpy(), Rng(9, torch.arange(1)).normal(e.shape[0])[0].double().numpy()
    twin = lambda v: TWINS[name](space, 0, v, X, y, scene.chosen[0].tolist())  # noqa: E731
    slope = (twin(e + 1e-6 * direction) - twin(e - 1e-6 * direction)) / 2e-6
    assert float(gradient[0].double().numpy() @ direction) == pytest.approx(slope, rel=2e-3, abs=2e-4)


def test_every_objective_has_a_twin() -> None:
    assert set(OBJECTIVES) == set(PLAIN) | set(TWINS)


def test_the_margin_is_the_recall() -> None:
    for space in DISTANCES:
        scene, moved = scene_of(space, seed=5)
        wrong = OBJECTIVES["margin"](moved, scene) <= 0
        assert torch.equal(wrong, READOUTS["recall_at_1"].read(moved, scene) == 0) and 0 < wrong.sum() < len(wrong)


@pytest.mark.parametrize("space", list(DISTANCES))
def test_target_rules_against_plain_loops(space: str) -> None:
    scene = big_scene(space)
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    rng = Rng(0, scene.row)
    same, classes = TARGETS["nearest_same"](scene, 2, rng), TARGETS["nearest_classes"](scene, 5, rng)
    kept = TARGETS["top_percent_keeping_nearest"](scene, 2, rng)
    for i in range(len(scene)):
        ranking = order(to_all(space, X[i], X), leave_out=i)
        assert same[i].tolist() == [j for j in ranking if y[j] == y[i]][:2]
        first = {}
        for j in ranking:
            if y[j] != y[i]:
                first.setdefault(y[j], j)
        assert classes[i].tolist() == list(first.values())[:5], "the closest member of each class, nearest class first"
        assert kept[i, 2:].tolist() == ranking[:PRESERVED] and set(kept[i, :2].tolist()) == set(ranking[:2])


def test_nearest_same_where_there_are_too_few() -> None:
    x = torch.eye(4)
    scene = Scene(
        DISTANCES["E"], Gallery(x, torch.tensor([0, 0, 1, 1])), x[:1], torch.tensor([0]), torch.tensor([0]),
        torch.zeros(1, 0, dtype=torch.long),
    )  # fmt: skip
    assert TARGETS["nearest_same"](scene, 2, Rng(0, scene.row))[0].tolist()[0] == 1


def test_more_wrong_classes_than_there_are_is_refused() -> None:
    scene, _ = scene_of("N")
    with pytest.raises(UsageError, match="4 classes"):
        TARGETS["nearest_classes"](scene, 4, Rng(0, scene.row))


def test_order_attack_scores_against_scipy() -> None:
    scene, moved = aimed_scene("N", "order")
    found = READOUTS["kendall_tau"].read(moved, scene)
    pairs = READOUTS["pair_accuracy"].read(moved, scene)
    X = scene.gallery.embeddings
    for i in range(len(scene)):
        d = [float((moved[i] - X[c]).norm()) for c in scene.chosen[i]]
        if len(set(scene.chosen[i].tolist())) == len(d):
            assert float(found[i]) == pytest.approx(kendalltau(range(len(d)), d).statistic, abs=1e-6)
        right = [d[a] < d[b] for a in range(len(d)) for b in range(a + 1, len(d))]
        ties = [d[a] == d[b] for a in range(len(d)) for b in range(a + 1, len(d))]
        assert float(pairs[i]) == pytest.approx(100 * (sum(right) + 0.5 * sum(ties)) / len(right))


def test_panum_reads_only_what_was_right() -> None:
    scene, moved = scene_of("E", seed=3)
    clean = READOUTS["recall_at_1"].read(scene.clean, scene)
    assert 0 < int((clean == 100).sum()) < len(clean)
    for name, plain in (("recall_of_right", "recall_at_1"), ("map_at_r_of_right", "map_at_r")):
        found = READOUTS[name].read(moved, scene)
        assert torch.equal(found.isnan(), clean != 100)
        torch.testing.assert_close(found[clean == 100], READOUTS[plain].read(moved, scene)[clean == 100])
    from dmlbench.metrics import retrieval

    np.testing.assert_allclose(
        READOUTS["map_at_r"].read(moved, scene).numpy(), retrieval(replace(scene, clean=moved))["map_at_r"], rtol=1e-6
    )


def test_semantics_preserving_reads_both_lists() -> None:
    scene, moved = aimed_scene("N", "raise_and_keep")
    wanted, kept = scene.aimed(scene.chosen[:, :2]), scene.aimed(scene.chosen[:, 2:])
    assert torch.equal(READOUTS["rank_of_wanted"].read(moved, scene), READOUTS["rank_in_query"].read(moved, wanted))
    assert torch.equal(READOUTS["rank_of_kept"].read(moved, scene), READOUTS["rank_in_query"].read(moved, kept))


def test_every_attack_is_whole() -> None:
    for name, attack in ATTACKS.items():
        assert len(attack.ends) == len(attack.readouts), name
        assert attack.objective in OBJECTIVES and (not attack.targets or attack.targets in TARGETS), name
        assert all(r in READOUTS for r in attack.readouts) and all(a != b for a, b in attack.ends), name
    for protocol in map(load_protocol, protocol_names()):
        for c in protocol.components:
            ends = dict(zip(ATTACKS[c.attack].readouts, ATTACKS[c.attack].ends, strict=True))
            assert ends[c.readout] == (c.worst, c.best), f"{protocol.name} {c.name}"


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(DEFAULT)


@pytest.fixture(scope="module")
def short():
    p = load_protocol("ers-digits")
    return p.model_copy(update={"threat": {**p.threat, "steps": 4, "step": "10/255", "queries": 30}})


@pytest.mark.parametrize("names", [
    "SPQA+@pgd,SPQA-@mi-fgsm,CA+5@fgsm,QA-2@apgd", "FOA2@pgd,SPFOA5@apgd,Panum@r-fgsm,MT@pgd-restarts",
    "ES@universal,WM@cw,GTM@nes,LTM@spsa,QA+@square,WM@noise",
])  # fmt: skip
def test_any_combination_is_an_extra_part(model, short, names: str) -> None:
    names = names.split(",")
    found = dmlbench.evaluate(model, "digits", short, attacks=[*names, "GTT"], limit=6)
    columns = [r for n in names for r in ATTACKS[parse(n)[0]].readouts]
    assert len(found.extras["extra_parts"]) == len(columns) and found.ers is None
    assert [m.component for m in found.measurements] == ["GTT", *found.extras["extra_parts"]]
    for m in found.measurements:
        assert m.value is not None and m.optimizer in m.component + "pgd"


def test_extra_parts_never_count_in_ers(model, short) -> None:
    plain = dmlbench.evaluate(model, "digits", short, limit=6)
    more = dmlbench.evaluate(model, "digits", short, attacks=["all", "WM@apgd"], limit=6)
    assert more.ers == plain.ers and more.partial == plain.partial == ("--limit 6",)
    assert more.part("WM@apgd").value is not None
    recalls = {"ES:R", "LTM", "GTM", "WM@apgd"}
    assert set(more.extras["retention"]) == recalls
    clean = more.benign["recall_at_1"]
    for part in recalls:
        assert more.extras["retention"][part] == pytest.approx(100 * more.part(part).value / clean)


def test_a_surrogate_is_weaker_than_the_model_itself(model, short) -> None:
    strong = short.model_copy(update={"threat": {**short.threat, "steps": 20, "step": "5/255"}})
    own = dmlbench.evaluate(model, "digits", strong, attacks=["WM@pgd", "CA-"], limit=48)
    other = dmlbench.evaluate(
        model, "digits", strong, attacks=["WM@pgd", "CA-"], limit=48, surrogate="digits-smallcnn-triplet-none"
    )
    assert own.part("WM@pgd").value < other.part("WM@pgd").value <= own.benign["recall_at_1"]
    assert "--surrogate digits-smallcnn-triplet-none" in other.partial
    np.testing.assert_array_equal(own.arrays["CA-/targets"], other.arrays["CA-/targets"])
    itself = dmlbench.evaluate(model, "digits", strong, attacks=["WM@pgd"], limit=48, surrogate=DEFAULT)
    np.testing.assert_array_equal(itself.arrays["WM@pgd/value"], own.arrays["WM@pgd/value"])


def test_eot_averages_passes(short) -> None:
    class Shaky(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x + 0.3 * torch.randn_like(x))

    base = dmlbench.load_model(DEFAULT)
    base.network = Shaky(base.network)
    threat = {**short.threat, "steps": 12, "step": "6/255"}
    strong = short.model_copy(update={"threat": threat})
    torch.manual_seed(0)
    one = dmlbench.evaluate(base, "digits", strong, attacks=["WM@pgd"], limit=64)
    many = dmlbench.evaluate(base, "digits", strong, attacks=["WM@pgd"], limit=64, eot=8)
    assert many.partial[-1] == "--eot 8" and many.protocol.sha256 == one.protocol.sha256
    assert len(np.unique(many.arrays["WM@pgd/value"])) > 2, "a share of the passes, not 0 or 100"
    assert many.part("WM@pgd").value < one.part("WM@pgd").value, "averaged gradients attack a random model better"


@pytest.mark.parametrize("args,message", [
    (["--attacks", "QA+@squre"], "unknown optimizer 'squre'; did you mean 'square'?"),
    (["--attacks", "FAO5@pgd"], "unknown attack 'FAO5'; did you mean"),
    (["--attacks", "QAA"], "unknown attack 'QAA' in protocol 'ers-digits'; did you mean 'QA"),
    (["--attacks", "CA-10"], "the top 1 % of a gallery of 896 entries holds 8"),
    (["--eot", "0"], "eot"),
    (["--surrogate", "nobody"], "unknown model 'nobody'"),
    (["--protocol", "strict", "--surrogate", DEFAULT], "has no transfer"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(typed, args, message) -> None:
    done = typed("evaluate", "--model", DEFAULT, "--limit", "4", *args, code=2)
    assert message in done.err and done.err.strip().count("\n") == 0


def test_a_surrogate_of_another_input_size_is_refused(model, short) -> None:
    from dmlbench.embedding import Embedder
    from dmlbench.models import ARCHITECTURES

    other = Embedder(ARCHITECTURES["conv3"](), (1, 28, 28), name="bigger")
    with pytest.raises(UsageError, match=r"'bigger' takes images of shape \(1, 28, 28\)"):
        dmlbench.evaluate(model, "digits", short, attacks=["WM@pgd"], limit=4, surrogate=other)


def test_eps_outside_the_range_is_refused(tmp_path) -> None:
    from dmlbench.errors import DataError

    text = (dmlbench.protocols.FOLDER / "strict-fast.toml").read_text().replace('"5/255"', '"5"')
    (tmp_path / "wild.toml").write_text(text)
    with pytest.raises(DataError, match=r"eps '5' is outside \[0, 1\]"):
        load_protocol(str(tmp_path / "wild.toml"))


def test_cli_combines_freely(typed) -> None:
    done = typed(
        "evaluate", "--model", DEFAULT, "--limit", "4", "--protocol", "strict", "--attacks", "QA+@r-fgsm", "--json"
    )
    assert [m["component"] for m in done.json["measurements"]] == [f"QA+@r-fgsm@{e}/255" for e in (5, 10, 20, 40)]


def test_guides_of_another_class_by_loops() -> None:
    scene, _ = scene_of("N", k=1, seed=4)
    chosen = TARGETS["guides_of_another"](scene, 5, Rng(1, torch.arange(len(scene))))
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    drawn = set()
    for i, rows in enumerate(chosen.tolist()):
        wanted = y[rows[0]]
        drawn.add(wanted)
        assert wanted != int(scene.labels[i])
        clean = scene.clean[i].double().numpy()
        own = sorted((j for j in range(len(y)) if y[j] == wanted), key=lambda j: distance("N", clean, X[j]))
        assert rows == [own[min(n, len(own) - 1)] for n in range(5)]
    assert len(drawn) > 1
    one = replace(scene, gallery=replace(scene.gallery, labels=scene.labels[0].expand(len(y)).clone()))
    with pytest.raises(UsageError, match="single class"):
        TARGETS["guides_of_another"](one[:1], 5, Rng(1, torch.arange(1)))


def test_guides_that_are_of_another_class_do_not_push() -> None:
    scene, moved = scene_of("N", k=1, seed=4)
    wrong = torch.stack([torch.nonzero(scene.gallery.labels != label)[:3, 0] for label in scene.labels])
    assert not OBJECTIVES["leave_guides"](moved, scene.aimed(wrong)).any()
