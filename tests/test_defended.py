"""Wrappers at test time: each against a plain twin, what attacks see of it, and what a result says."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

import dmlbench
from dmlbench.attacks import AttackLoss
from dmlbench.board.row import from_evaluation
from dmlbench.doubts.questions import judged_random, passes_gap
from dmlbench.embedding import Embedder, passes
from dmlbench.errors import DataError, UsageError
from dmlbench.kinds.strict.search import attempt
from dmlbench.models import wrappers as module
from dmlbench.models.defended import Applied, averaged, behind, defended, split
from dmlbench.models.wrappers import STAGES, WRAPPERS, Given, Wrapper
from dmlbench.objectives import margin
from dmlbench.protocol import Step
from dmlbench.rng import Pass, Rng, passing, streams_of_pixels
from dmlbench.run.subject import prepare
from dmlbench.threat import Threat

MODEL = "digits-smallcnn-triplet-none"


def pictures(count=4, channels=1, rows=12, columns=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, rows, columns), generator=g).float() / 255


def given(count=4, channels=1, rows=12, columns=10):
    return Given(Rng(3, torch.arange(count)), pictures(5, channels, rows, columns, seed=9))


def applied(text):
    return split(f"{text}:model")[0]


def embedder_of(channels=1, rows=12, columns=10):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * rows * columns, 6))
    return Embedder(network, (channels, rows, columns), name="plain").eval().requires_grad_(False)


# what each does to a picture


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 75])
def test_jpeg_is_pillows(channels, quality) -> None:
    x = pictures(3, channels)
    found = applied(f"jpeg({quality})")(x, given(3, channels))
    for before, after in zip(x, found, strict=True):
        pixels = np.array([[[round(float(v) * 255) for v in row] for row in c] for c in before], dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels[0] if channels == 1 else np.moveaxis(pixels, 0, 2)).save(file, "JPEG", quality=quality)
        wanted = np.asarray(Image.open(io.BytesIO(file.getvalue()))).reshape(12, 10, channels)
        assert np.array_equal(np.round(after.numpy() * 255), np.moveaxis(wanted, 2, 0))


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_bits_against_a_plain_loop(depth) -> None:
    x = torch.rand(2, 1, 5, 4, generator=torch.Generator().manual_seed(1))
    levels = [i / (2**depth - 1) for i in range(2**depth)]
    wanted = [min(levels, key=lambda level: abs(level - v)) for v in x.flatten().tolist()]
    assert np.allclose(applied(f"bits({depth})")(x, given(2)).flatten(), wanted, atol=1e-6)


def tv_objective(z, x, weight):
    """Written out pixel by pixel."""
    rows, columns = x.shape
    total = sum(0.5 * (z[i, j] - x[i, j]) ** 2 for i in range(rows) for j in range(columns))
    total += weight * sum(abs(z[i, j] - z[i, j - 1]) for i in range(rows) for j in range(1, columns))
    return total + weight * sum(abs(z[i, j] - z[i - 1, j]) for i in range(1, rows) for j in range(columns))


@pytest.mark.parametrize("weight", [0.02, 0.2])
def test_tv_is_the_minimiser(weight) -> None:
    """Against scipy on the dual, a smooth problem in a box; the objective itself pixel by pixel."""
    x = pictures(1, rows=4, columns=5)[0, 0].double().numpy()
    found = applied(f"tv({weight})")(torch.from_numpy(x)[None, None], given(1))[0, 0].numpy()
    edges = [((i, j), (i, j + 1)) for i in range(4) for j in range(4)] + [
        ((i, j), (i + 1, j)) for i in range(3) for j in range(5)
    ]

    def primal(q):
        z = x.copy()
        for value, (a, b) in zip(q, edges, strict=True):
            z[b] -= value
            z[a] += value
        return z

    def slopes(q):
        z = primal(q)
        return np.array([z[a] - z[b] for a, b in edges])

    done = minimize(
        lambda q: 0.5 * (primal(q) ** 2).sum(), np.zeros(len(edges)), jac=slopes, method="L-BFGS-B",
        bounds=[(-weight, weight)] * len(edges), options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000},
    )  # fmt: skip
    best = tv_objective(primal(done.x), x, weight)
    assert tv_objective(found, x, weight) <= best + 1e-3 < tv_objective(x, x, weight)
    assert np.allclose(found, primal(done.x), atol=0.01)


def test_the_backward_pass_of_tv_is_that_of_its_solver(monkeypatch) -> None:
    """Against finite differences, in float64, of as many steps."""
    monkeypatch.setattr(module, "TV_STEPS", 20)
    x = torch.rand(1, 1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.6 + 0.2
    towards = torch.rand(1, 1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((applied("tv(0.1)")(leaf, given(1)) * towards).sum(), leaf)
    for at in [(0, 0), (2, 1), (4, 3)]:
        small = torch.zeros_like(x)
        small[0, 0, at[0], at[1]] = 1e-7
        ends = [(applied("tv(0.1)")(x + s * small, given(1)) * towards).sum() for s in (1, -1)]
        assert float(ends[0] - ends[1]) / 2e-7 == pytest.approx(float(gradient[0, 0, at[0], at[1]]), abs=1e-5)


def test_resize_pad_against_interpolate_and_pad() -> None:
    x, info = pictures(16), given(16)
    found = applied("resize-pad(0.6)")(x, info)
    rng, sizes = Rng(3, torch.arange(16)), set()
    height = 8 + rng.integers(5)
    width = torch.tensor([round(h * 10 / 12) for h in height.tolist()])
    top, left = rng.integers(12 - height + 1), rng.integers(10 - width + 1)
    for i in range(16):
        h, w, t, side = (int(v[i]) for v in (height, width, top, left))
        small = F.interpolate(x[i : i + 1], (h, w), mode="bilinear", align_corners=False)
        wanted = F.pad(small, (side, 10 - w - side, t, 12 - h - t))
        assert torch.allclose(found[i : i + 1], wanted, atol=1e-5)
        sizes.add(h)
    assert sizes == {8, 9, 10, 11, 12}


def test_mixup_is_a_mean_over_pictures_of_the_gallery() -> None:
    model = defended(embedder_of(), applied("mixup(0.7,3)"))
    model.distance = dmlbench.embedding.DISTANCES["E"]
    gallery = pictures(100, seed=4)
    model.front = model.front.seeing(dmlbench.datasets.base.TensorImages(gallery), np.arange(100))
    x = pictures(4)
    assert len(model.front.pool) == 64 and torch.equal(model.front.pool[[0, -1]], gallery[[0, 99]])
    with torch.no_grad():
        found = model(x)
        chosen = streams_of_pixels(x).fold("mixup").integers(64, 3)
        for i in range(4):
            mixed = [0.7 * x[i] + 0.3 * model.front.pool[j] for j in chosen[i].tolist()]
            wanted = sum(model.network(m[None])[0] for m in mixed) / 3
            assert torch.allclose(found[i], wanted, atol=1e-5)


def test_the_ways_of_a_barrage() -> None:
    x, rows = pictures(3), torch.arange(3)
    middle = x.flatten(1).mean(1)
    strength = 0.7 + 0.6 * Rng(1, rows).uniform()
    wanted = torch.stack([m + s * (p - m) for p, m, s in zip(x, middle, strength, strict=True)])
    assert torch.allclose(module._contrast(x, Rng(1, rows)), wanted, atol=1e-6)
    share = 0.5 * Rng(1, rows).uniform()
    found = module._blur(x, Rng(1, rows))
    for n, i, j in [(0, 0, 0), (1, 5, 9), (2, 11, 4)]:
        around = [(min(max(i + a, 0), 11), min(max(j + b, 0), 9)) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        mean = sum(float(x[n, 0, a, b]) for a, b in around) / 9
        assert float(found[n, 0, i, j]) == pytest.approx(
            float((1 - share[n]) * x[n, 0, i, j] + share[n] * mean), abs=1e-5
        )


def test_motion_turns_scales_and_moves_a_ramp() -> None:
    """Of a picture that is linear in its coordinates every interpolation is exact, but for the border."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramp = (0.01 * x + 0.02 * y)[None, None].expand(5, 1, 16, 16)
    found = module._motion(ramp, Rng(5, torch.arange(5)))
    rng = Rng(5, torch.arange(5))
    angle, zoom = np.radians(10) * (rng.uniform() * rng.signs()).numpy(), 0.9 + 0.2 * rng.uniform().numpy()
    move = 0.2 * rng.uniform(2).numpy() - 0.1
    for n in range(5):
        for i, j in [(7, 8), (5, 10), (9, 4)]:
            u, v = (2 * j + 1) / 16 - 1, (2 * i + 1) / 16 - 1
            to_x = zoom[n] * (np.cos(angle[n]) * u - np.sin(angle[n]) * v) + move[n, 0]
            to_y = zoom[n] * (np.sin(angle[n]) * u + np.cos(angle[n]) * v) + move[n, 1]
            column, row = ((to_x + 1) * 16 - 1) / 2, ((to_y + 1) * 16 - 1) / 2
            assert float(found[n, 0, i, j]) == pytest.approx(0.01 * column + 0.02 * row, abs=1e-5)


def test_a_barrage_takes_different_ways_in_different_orders() -> None:
    taken = Rng(3, torch.arange(64)).uniform(5).argsort(dim=1)[:, :2]
    assert len({tuple(t) for t in taken.tolist()}) > 10
    x = pictures(64)
    found = applied("barrage(2)")(x, given(64))
    for i in range(6):
        alone, rng = x[i : i + 1], Rng(3, torch.tensor([i]))
        rng.uniform(5)
        for way in taken[i].tolist():
            name = module.WAYS[way]
            alone = getattr(module, f"_{name}")(alone, rng.fold(name)).clamp(0, 1)
        assert torch.allclose(found[i : i + 1], alone, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(WRAPPERS))
def test_every_wrapper(name, channels) -> None:
    """In range, the same for an image in any batch, its gradient of use, and zero or a single draw where it is naive."""
    record, one = WRAPPERS[name], Applied.read(name, None)
    assert record.title and record.source and record.stage in STAGES
    assert all(p.low <= p.default <= p.high for p in record.parameters)
    model = defended(embedder_of(channels), one)
    x = pictures(6, channels)
    e = model(x)
    shown = model.front(x)
    assert float(shown.min()) >= 0 and float(shown.max()) <= 1 and len(shown) % len(x) == 0
    assert torch.equal(shown[: len(shown) // 2], model.front(x[:3]))
    assert torch.allclose(e[2:4], model(x[2:4]), atol=1e-6)
    drawn = list(passes(model, x, 2))
    assert torch.equal(*drawn) == (record.eot == 1)
    assert (model.eot is None) == (record.eot == 1)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf)
    assert bool((gradient.flatten(1) != 0).any(1).all())
    assert model.name == f"defended:{one}:plain" and f"defended:{split(f'{one}:m')[0]}:plain" == model.name
    if record.backward is None and record.eot == 1:
        return
    naive = defended(embedder_of(channels), replace(one, naive=True))
    assert naive.eot is None and "naive-attack" in [flag for flag, _ in naive.doubts]
    assert torch.equal(naive(x), e)
    (gradient,) = torch.autograd.grad(naive(leaf).sum(), leaf)
    assert bool((gradient == 0).all()) == (record.backward is not None)


@pytest.mark.parametrize("text", ["jpeg(75)", "bits(3)"])
def test_the_gradient_of_a_step_function_is_that_behind_it(text) -> None:
    plain, model = embedder_of(), defended(embedder_of(), applied(text))
    x = pictures()
    there = model.front(x).requires_grad_(True)
    (wanted,) = torch.autograd.grad(plain(there)[:, 0].sum(), there)
    leaf = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    assert torch.equal(found, wanted)


def test_colours_of_a_network_that_takes_blue_first() -> None:
    x = pictures(2, 3)
    model = embedder_of(3)
    model._preprocess = replace(model.preprocess, order="bgr")
    model = defended(model, applied("jpeg(50)"))
    assert torch.equal(model.front(x), applied("jpeg(50)")(x.flip(1), given(2, 3)).flip(1))


# where draws come from


def test_draws_belong_to_the_image_its_pass_and_its_turn() -> None:
    x, rows = pictures(3), torch.tensor([7, 8, 9])

    def draw(images, **now):
        with passing(Pass(**now)):
            return streams_of_pixels(images).uniform(2)

    plain = draw(x)
    assert torch.equal(draw(x[[2]]), plain[[2]]) and torch.equal(streams_of_pixels(x).uniform(2), plain)
    assert not torch.isclose(draw(x.flip(3)), plain).any()
    first = draw(x, rows=rows)
    assert torch.equal(draw(x * 0.5, rows=rows), first) and torch.equal(draw(x[1:], rows=rows[1:]), first[1:])
    calls = torch.tensor([0, 1, 2])
    others = [
        draw(x, rows=rows, turn=1),
        draw(x, rows=rows, purpose="search"),
        draw(x, rows=rows, purpose="search", calls=calls + 1),
    ]
    assert not any(torch.isclose(first, other).any() for other in others)
    assert torch.equal(draw(x, rows=rows, purpose="search", calls=calls)[0], others[1][0])


def test_a_search_draws_anew_at_every_step_and_not_what_is_read() -> None:
    model = dmlbench.load_model(f"defended:barrage(3):{MODEL}")
    subject = prepare(model, dmlbench.load_dataset("digits"), limit=8, device="cpu")
    loss, images = AttackLoss(subject.embedder, margin, subject.scene, 2), subject.images(0, 8)
    first, second = loss(images), loss(images)
    assert not torch.isclose(first, second).all()
    part = AttackLoss(subject.embedder, margin, subject.scene, 2)[2:5]
    assert torch.allclose(part(images[2:5]), first[2:5], atol=1e-5)
    read = [margin(e, subject.scene) for e in passes(subject.embedder, images, 2, rows=subject.scene.query)]
    assert not torch.isclose(sum(read) / 2, first).all()


# what a run makes of them


def result(name, **said):
    return dmlbench.evaluate(dmlbench.load_model(name), device="cpu", **{"protocol": "ers-digits", "limit": 48, **said})


def test_identity_gives_the_undefended_numbers_bit_for_bit() -> None:
    plain, wrapped, once = (
        result(MODEL),
        result(f"defended:identity:{MODEL}"),
        result(f"defended:identity:{MODEL}", eot=1),
    )
    assert wrapped.model.id == f"defended:identity:{MODEL}" and wrapped.partial == plain.partial == once.partial
    assert plain.arrays.keys() == wrapped.arrays.keys()
    for name, values in plain.arrays.items():
        assert np.array_equal(values, wrapped.arrays[name], equal_nan=True), name
        assert np.array_equal(values, once.arrays[name], equal_nan=True), name
    assert plain.ers == wrapped.ers and [w.flag for w in wrapped.warnings] == [w.flag for w in plain.warnings]
    assert [from_evaluation(e).defense for e in (plain, wrapped)] == ["none", "none, behind identity"]


@pytest.mark.parametrize("text", ["tv(0.1234567)", "tv(1e-07)", "bits(8)", "mixup(0.6000001,64)"])
def test_a_name_says_values_exactly(text) -> None:
    name, values = text.removesuffix(")").split("(")
    read = Applied.read(name, values)
    assert str(read) == text and split(f"{read}:x")[0] == read


def test_a_row_names_every_wrapper() -> None:
    assert behind("none", "m") == "none"
    assert (
        behind("hm (ics=0.5)", "defended:jpeg(75):defended:bits(4):ensemble:a,b")
        == "hm (ics=0.5), behind jpeg(75), behind bits(4)"
    )


def hunted(name, *parts):
    """What one strict step with Auto-PGD makes of 8 queries, a batch for each slice."""
    data = dmlbench.load_dataset("digits")
    subject = prepare(dmlbench.load_model(name), data, limit=8, device="cpu")
    step, threat = Step(name="A", attack="WM", optimizer="apgd"), Threat(eps="30/255", steps=20, eot=2)
    found = [attempt(subject, step, threat, np.arange(8)[part], 0) for part in parts]
    return torch.cat([f.images for f in found]), np.concatenate([f.readouts["map"] for f in found])


def test_identity_under_a_strict_step() -> None:
    plain, wrapped = (hunted(name, slice(8)) for name in (MODEL, f"defended:identity:{MODEL}"))
    assert torch.equal(plain[0], wrapped[0]) and np.array_equal(plain[1], wrapped[1])


def test_a_strict_step_is_the_same_at_any_batch_size() -> None:
    whole, parts = (hunted(f"defended:barrage(2):{MODEL}", *p) for p in ([slice(8)], [slice(3), slice(3, 8)]))
    assert torch.allclose(whole[0], parts[0], atol=1e-4) and np.allclose(whole[1], parts[1], atol=1e-3)


def test_an_attack_that_knows_jpeg_gets_through_it() -> None:
    plain, naive, known = (
        result(m + MODEL, attacks=["GTM"]) for m in ("", "defended:jpeg(75,naive):", "defended:jpeg:")
    )
    score = [e.measurements[0].score for e in (plain, naive, known)]
    assert score[1] > score[0] + 30 and score[2] < score[1] - 30
    assert known.benign == naive.benign and known.benign != plain.benign
    assert {"naive-attack", "zero-gradients"} <= {w.flag for w in naive.warnings}
    assert not {"naive-attack", "randomised", "zero-gradients"} & {w.flag for w in known.warnings}
    assert len({e.model.weights_sha256 for e in (plain, naive, known)}) == 3


@pytest.mark.parametrize("name", ["barrage(3)", "resize-pad(0.8)", "mixup(0.6,2)"])
def test_a_random_defence_has_the_same_numbers_at_any_batch_size(name) -> None:
    small, large = (result(f"defended:{name}:{MODEL}", attacks=["GTM"], eot=2, limit=12, batch_size=b) for b in (5, 12))
    assert "--eot 2" in small.partial and "randomised" in {w.flag for w in small.warnings}
    for key, values in small.arrays.items():
        assert np.allclose(values, large.arrays[key], atol=1e-3, equal_nan=True), key


def test_a_random_defence_is_averaged_over_and_never_ranked() -> None:
    e = result(f"defended:mixup(0.6,2):{MODEL}", attacks=["GTM"], limit=8)
    assert "--eot 4" in e.partial
    model = dmlbench.load_model(f"defended:resize-pad(0.8):{MODEL}")
    assert averaged(model, None) == 10 and averaged(model, 3) == 3
    with pytest.raises(UsageError, match="--eot 2 or more"):
        dmlbench.evaluate(model, protocol="ers-digits", limit=8, eot=1)
    with pytest.raises(UsageError, match="clustering"):
        dmlbench.evaluate(model, protocol="clustering")
    with pytest.raises(UsageError, match=r"surrogate .* is random"):
        dmlbench.evaluate(MODEL, protocol="ers-digits", limit=8, surrogate=model)
    naive = result(f"defended:resize-pad(0.8,naive):{MODEL}", attacks=["GTM"], limit=8)
    assert not [why for why in naive.partial if "eot" in why]
    assert {"naive-attack", "randomised"} <= {w.flag for w in naive.warnings}


def test_transfer_from_the_undefended_model() -> None:
    e = result(f"defended:jpeg:{MODEL}", surrogate=MODEL, attacks=["GTM"])
    assert f"--surrogate {MODEL}" in e.partial
    own = result(f"defended:jpeg(75,naive):{MODEL}", attacks=["GTM"])
    assert e.measurements[0].score < own.measurements[0].score - 20


def test_the_audit_knows(run) -> None:
    said = ["--dataset", "digits", "--protocol", "strict-fast", "--queries", "8", "--json"]
    found = {f["check"]: f["verdict"] for f in run("audit", f"defended:bits(3,naive):{MODEL}", *said).json["findings"]}
    assert (found["F1"], found["F2"]) == ("pass", "fail")
    for name, random in (("barrage", True), ("jpeg", False)):
        subject = prepare(dmlbench.load_model(f"defended:{name}:{MODEL}"), dmlbench.load_dataset("digits"), limit=4)
        assert (judged_random(passes_gap(subject, subject.images(0, 4), subject.scene)).verdict == "fail") == random


# what is said of bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bitz(3):x", r"unknown wrapper 'bitz'; did you mean 'bits'\?"),
        (MODEL, r"is not defended:WRAPPER\(VALUES\):MODEL"),
        ("jpeg(75:x", r"is not defended:WRAPPER\(VALUES\):MODEL"),
        (f"jpeg(0):{MODEL}", "quality '0' is not a whole number from 1 to 100"),
        (f"jpeg(7.5):{MODEL}", "is not a whole number"),
        (f"jpeg(naive,75):{MODEL}", "jpeg takes quality from 1 to 100, and last the word naive"),
        (f"tv(nan):{MODEL}", "weight 'nan' is not a number from 0 to 1"),
        (f"bits():{MODEL}", "nothing"),
        (f"bits(3,4):{MODEL}", "bits takes depth from 1 to 8"),
        (f"identity(1):{MODEL}", "identity takes no number"),
        (f"identity(naive):{MODEL}", "naive would change nothing"),
        (f"resize-pad(0.9):{MODEL}", "leaves pictures of 8 rows as they are: share 0.87 or less"),
        (f"bits(3):defended:jpeg(75):{MODEL}", r"defended:jpeg\(75\):defended:bits\(3\):MODEL"),
        (f"mixup:defended:identity:defended:tv:{MODEL}", r"defended:tv\(0.05\):defended:mixup"),
        (f"jpeg:defended:jpeg(50):{MODEL}", "do the same kind of thing"),
        ("jpeg:nix", "unknown model 'nix'"),
    ],
)
def test_bad_input(text, said) -> None:
    if said == "nothing":  # no value is the default
        assert dmlbench.load_model(f"defended:{text}").name == f"defended:bits(3):{MODEL}"
        return
    with pytest.raises(UsageError, match=said) as error:
        dmlbench.load_model(f"defended:{text}")
    assert "\n" not in str(error.value)


def test_the_command_line_refuses_and_takes(run, typed) -> None:
    done = typed("evaluate", "--model", f"defended:barrage:{MODEL}", "--eot", "1", code=2)
    assert "--eot 2 or more" in done.err
    done = typed("evaluate", "--model", f"ensemble:defended:jpeg:{MODEL},{MODEL}", code=2)
    assert "defended:WRAPPER:ensemble:A,B" in done.err
    name = f"defended:tv:defended:jpeg:defended:bits(4):ensemble:{MODEL},{MODEL}"
    said = ["--dataset", "digits", "--limit", "8", "--attacks", "GTM", "--csv", "board.csv", "--json"]
    made = run("evaluate", "--model", name, *said).json["model"]["id"]
    assert made == f"defended:tv(0.05):defended:jpeg(75):defended:bits(4):ensemble:{MODEL},{MODEL}"


def test_the_page_s_own_wrapper(monkeypatch) -> None:
    monkeypatch.setattr(WRAPPERS, "_entries", dict(WRAPPERS._entries))
    page = (Path(__file__).parent.parent / "docs/defended.md").read_text(encoding="utf-8")
    exec(page.split("```python\n")[1].split("```")[0], {})
    x = pictures()
    assert torch.equal(defended(embedder_of(), applied("round-up(4)"))(x), embedder_of()((x * 4).ceil() / 4))


def test_a_wrapper_of_another_package(monkeypatch) -> None:
    table = {"dim": Wrapper("darker", (), lambda x, values, given: x / 2, "this test", "smooth")}
    monkeypatch.setattr(WRAPPERS, "_entries", {**WRAPPERS._entries, **table})
    x = pictures()
    assert torch.equal(defended(embedder_of(), applied("dim"))(x), embedder_of()(x / 2))
    table["dim"] = replace(table["dim"], transform=lambda x, values, given: x[:1])
    WRAPPERS._entries.update(table)
    with pytest.raises(DataError, match="makes"):
        defended(embedder_of(), applied("dim"))
    WRAPPERS._entries["dim"] = replace(table["dim"], transform=lambda x, values, given: 1 / 0)
    with pytest.raises(DataError, match=r"wrapper dim fails on .* ZeroDivisionError"):
        defended(embedder_of(), applied("dim"))
