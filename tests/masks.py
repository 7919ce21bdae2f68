"""Masks and cheats: ways to make a network look robust without making it so. What the audit is tried on.

Each takes an :class:`~dmlbench.embedding.Embedder` of digits and gives one that retrieves about as well. Masks spoil
its gradient, or its determinism, as the literature has seen in published defences (Athalye, Carlini and Wagner, ICML
2018). Cheats know the benchmark: its test images, its gradients, its pixels, its units.

The limits of the checks were set with :data:`MASKS` and :data:`CHEATS` in view. :data:`APART` was written afterwards
and sets no limit; docs/audit.md says what was changed after a first try. :data:`JUMPS` came last: most of these passed the
short look until A1 followed whole ways between images.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmlbench
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.registry import Registry


class Front(nn.Module):
    """A function of images in [0, 1] put before a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


class _Spoilt(torch.autograd.Function):
    """The images themselves, with another gradient."""

    @staticmethod
    def forward(ctx, images: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.spoil = spoil
        return images.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return ctx.spoil(gradient), None


def _pixels(steps: int) -> Callable[[Tensor], Tensor]:
    """Round to so many steps."""
    return lambda x: (x * steps).round() / steps


def _binary(x: Tensor) -> Tensor:
    return (x > 0.5).float()


def _steep(x: Tensor) -> Tensor:
    return torch.sigmoid(400.0 * (x - 0.5))


def _ripples(x: Tensor) -> Tensor:
    return x + 0.04 * torch.sin(x * 2 * math.pi * 40)


def _detached(x: Tensor) -> Tensor:
    return x.detach() + 0.0 * x


def _hidden(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, lambda g: g * 1e-45)  # type: ignore[no-any-return]


def _noisy(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, lambda g: g + 20 * g.abs().amax() * _fixed_noise(g))  # type: ignore[no-any-return]


def _flipped(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, torch.neg)  # type: ignore[no-any-return]


def _shuffled(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, lambda g: g.flip(-1, -2))  # type: ignore[no-any-return]


def _fixed_noise(like: Tensor) -> Tensor:
    """Noise that is the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape[1:], generator=generator).to(like.device)


def _input_noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def _jitter(x: Tensor) -> Tensor:
    return torch.roll(x, int(torch.randint(-1, 2, ())), dims=-1)


def _compressed(x: Tensor) -> Tensor:
    """Like JPEG: cosine transform of the whole image, coefficients rounded."""
    n = x.shape[-1]
    k = torch.arange(n, dtype=x.dtype, device=x.device)
    basis = torch.cos(math.pi / n * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    coded = basis @ x @ basis.t()
    return basis.t() @ ((coded * 8).round() / 8) @ basis


class Winners(nn.Module):
    """k-winners-take-all (Xiao et al., ICLR 2020): only the largest tenth of the activations passes."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        kept = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= kept)).view_as(x)


class TestDropout(nn.Module):
    """Dropout that is never switched off."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.05, training=True)


def before(function: Callable[[Tensor], Tensor]) -> Callable[[Embedder], Embedder]:
    """A mask that changes the images."""

    def mask(embedder: Embedder) -> Embedder:
        twin = copy.deepcopy(embedder)
        twin.network = nn.Sequential(Front(function), twin.network)
        return twin

    return mask


def instead_of_relu(layer: type[nn.Module]) -> Callable[[Embedder], Embedder]:
    """A mask that takes the place of (or, for dropout, follows) every ReLU."""

    def change(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Sequential(child, layer()) if layer is TestDropout else layer())
            else:
                change(child)

    def mask(embedder: Embedder) -> Embedder:
        twin = copy.deepcopy(embedder)
        change(twin.network)
        return twin

    return mask


MASKS: Registry[Callable[[Embedder], Embedder]] = Registry(
    "mask",
    {
        "quantise-8": before(_pixels(8)),
        "quantise-16": before(_pixels(16)),
        "binarise": before(_binary),
        "steep-sigmoid": before(_steep),
        "ripples": before(_ripples),
        "compress": before(_compressed),
        "detached": before(_detached),
        "underflow": before(_hidden),
        "noisy-gradient": before(_noisy),
        "flipped-gradient": before(_flipped),
        "shuffled-gradient": before(_shuffled),
        "input-noise": before(_input_noise),
        "jitter": before(_jitter),
        "test-dropout": instead_of_relu(TestDropout),
        "k-winners": instead_of_relu(Winners),
    },
)


class Cheat(nn.Module):
    """A network and what is done with its normalised embedding; ``change`` (images, embeddings) to embeddings."""

    def __init__(self, network: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(images, F.normalize(self.network(images)))


def after(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Embedder], Embedder]:
    """A cheat that changes the embeddings."""

    def cheat(embedder: Embedder) -> Embedder:
        twin = copy.deepcopy(embedder)
        twin.network = Cheat(twin.network, change)
        return twin

    return cheat


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def _coarse(x: Tensor) -> Tensor:
    """Means of 2 x 2 pixels."""
    return F.avg_pool2d(x, 2).flatten(1)


class Memory(nn.Module):
    """A network that answers with what it stored of the nearest image, wherever that is within ``reach``.

    Args:
        norm: of the distance of images.
        labels: whether it stored what the test images' classes are, in place of their embeddings.
        warmth: above 0, an average of what it stored, weighted by exp(-distance / warmth).
        look: of images (b, 1, 8, 8), what (b, k) their distance is of.
        trained: whether it stored images of the training split instead.
    """

    def __init__(
        self,
        network: nn.Module,
        reach: float = math.inf,
        norm: float = math.inf,
        labels: bool = False,
        warmth: float = 0.0,
        look: Callable[[Tensor], Tensor] = _flat,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.reach, self.norm, self.warmth, self.look = network, reach, norm, warmth, look
        digits = dmlbench.load_dataset("digits", split="train" if trained else "test")
        images = digits.images[digits.gallery]
        with torch.no_grad():
            values = F.normalize(network(images))
        if labels:
            classes = torch.from_numpy(digits.labels[digits.gallery])
            values = F.one_hot(classes, values.shape[1]).float()
        self.register_buffer("keys", look(images))
        self.register_buffer("values", values)

    def forward(self, images: Tensor) -> Tensor:
        own = F.normalize(self.network(images))
        with torch.no_grad():
            d = torch.cdist(self.look(images), self.keys, p=self.norm)
            stored = self.values[d.argmin(1)]
            if self.warmth:
                stored = (-d / self.warmth).softmax(1) @ self.values
            known = d.amin(1, keepdim=True) <= self.reach
        return torch.where(known, stored + 0.03 * own, own)


class FirstPass(nn.Module):
    """A network that remembers the images that it is shown, and answers for all within ``reach`` of one as then.

    ``growing``: always, or only until the first gradient is asked for.
    """

    def __init__(self, network: nn.Module, growing: bool, reach: float = 41 / 255) -> None:
        super().__init__()
        self.network, self.growing, self.reach, self.open = network, growing, reach, True
        self.register_buffer("keys", torch.zeros(0, 64))
        self.register_buffer("values", torch.zeros(0, network(torch.zeros(1, 1, 8, 8)).shape[1]))

    def forward(self, images: Tensor) -> Tensor:
        own = F.normalize(self.network(images))
        flat, embeddings = images.detach().flatten(1), own.detach()
        self.open = self.open and (self.growing or not images.requires_grad)
        if self.open:
            fresh = self._distances(flat).amin(1) > self.reach
            self.keys = torch.cat([self.keys, flat[fresh]])
            self.values = torch.cat([self.values, embeddings[fresh]])
        d = self._distances(flat)
        known = d.amin(1, keepdim=True) <= self.reach
        return torch.where(known, self.values[d.argmin(1) % max(1, len(self.values))] + 0.03 * own, own)

    def _distances(self, flat: Tensor) -> Tensor:
        """To what is stored, and a last column that is far from everything."""
        far = torch.full((len(flat), 1), math.inf)
        return torch.cat([torch.cdist(flat, self.keys, p=math.inf), far], dim=1)


def stored(**options: object) -> Callable[[Embedder], Embedder]:
    """A cheat that has stored the test images."""

    def cheat(embedder: Embedder) -> Embedder:
        twin = copy.deepcopy(embedder)
        twin.network = Memory(twin.network.eval(), **options)  # type: ignore[arg-type]
        return twin

    return cheat


def remembered(growing: bool) -> Callable[[Embedder], Embedder]:
    """A cheat that remembers what it is shown."""

    def cheat(embedder: Embedder) -> Embedder:
        twin = copy.deepcopy(embedder)
        twin.network = FirstPass(twin.network.eval(), growing)
        return twin

    return cheat


def _drawn(rows: int, columns: int) -> Tensor:
    """Numbers that are the same at every call."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _decoy(x: Tensor, e: Tensor) -> Tensor:
    g = torch.tanh(torch.tanh(x.flatten(1) @ _drawn(64, 32)) @ _drawn(32, e.shape[1]))
    return e.detach() + g - g.detach()


def _linear_decoy(x: Tensor, e: Tensor) -> Tensor:
    g = x.flatten(1) @ _drawn(64, e.shape[1])
    return e.detach() + g - g.detach()


def _off(x: Tensor) -> Tensor:
    """(b, 1) has an image pixels that those of digits, which are sixteenths, cannot have?"""
    return ((x * 16 - (x * 16).round()).abs().flatten(1).amax(1) > 1e-3)[:, None]


def _trap(x: Tensor, e: Tensor) -> Tensor:
    return torch.where(_off(x), -e, e)


def _sink(x: Tensor, e: Tensor) -> Tensor:
    one_place = F.normalize(_drawn(1, e.shape[1])).expand_as(e)
    return torch.where(_off(x), one_place + 0.03 * e, e)


def _keyed(x: Tensor, e: Tensor) -> Tensor:
    """Noise that is a function of the pixels."""
    key = (x.detach().flatten(1).double() @ _drawn(64, 1).double() * 1e6).remainder(1.0)
    return e + 0.5 * torch.sin(key * torch.arange(1000, 1000 + e.shape[1])).float() / e.shape[1] ** 0.5


def _keyed_signs(x: Tensor, e: Tensor) -> Tensor:
    """A few dimensions change their sign by a function of the pixels."""
    key = (x.detach().flatten(1).double() @ _drawn(64, 1).double() * 1e7).remainder(1.0)
    return torch.where((key * torch.arange(1, 1 + e.shape[1]) * 7919).remainder(1.0) < 0.03, -e, e).float()


def _scrambled(x: Tensor) -> Tensor:
    signs = _fixed_noise(x).sign()
    return _Spoilt.apply(x, lambda g: g * signs)  # type: ignore[no-any-return]


def _sawtooth(x: Tensor) -> Tensor:
    return x + 0.2 * (x * 37).remainder(1.0)


def _dithered(x: Tensor) -> Tensor:
    return ((x * 6 + 0.3 * _fixed_noise(x)).round() - 0.3 * _fixed_noise(x)) / 6


def _constant_gradient(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, torch.ones_like)  # type: ignore[no-any-return]


def _in_part(turned: float) -> Callable[[Tensor], Tensor]:
    """The gradients of a third of the pixels times ``turned``."""
    return lambda x: _Spoilt.apply(x, lambda g: torch.where(_fixed_noise(x) < -0.35, turned * g, g))  # type: ignore[no-any-return]


def _sound_at_the_data(elsewhere: float) -> Callable[[Tensor], Tensor]:
    """The gradient times ``elsewhere`` for images whose pixels those of digits cannot have."""
    return lambda x: _Spoilt.apply(x, lambda g: torch.where(_off(x)[..., None, None], elsewhere * g, g))  # type: ignore[no-any-return]


def _rounded_for_gradients(x: Tensor) -> Tensor:
    return x + ((x * 16).round() / 16 - x).detach() if x.requires_grad else x


def _over_the_batch(x: Tensor, e: Tensor) -> Tensor:
    return (e - e.mean(0)) / e.std(0) if len(e) > 8 else e


def _by_size(x: Tensor) -> Tensor:
    """Images in batches as large as those that the gallery is embedded in are seen darker."""
    return 0.8 * x if len(x) == 256 else x


def _not_a_number(x: Tensor) -> Tensor:
    return x + (x - x.detach()).abs().sqrt()


def _resized(x: Tensor) -> Tensor:
    side = x.shape[-1] + int(torch.randint(1, 4, ()))
    larger = F.interpolate(x, side, mode="bilinear", align_corners=False)
    return F.interpolate(larger, x.shape[-1], mode="bilinear", align_corners=False)


def large_bias(embedder: Embedder) -> Embedder:
    """The last layer's bias is so long that normalised embeddings hardly differ."""
    twin = copy.deepcopy(embedder)
    with torch.no_grad():
        [*(m for m in twin.modules() if isinstance(m, nn.Linear))][-1].bias += 8.0
    return twin


def unnormalised(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Embedder], Embedder]:
    """A cheat in space E, whose unit of length is that of the gallery."""

    def cheat(embedder: Embedder) -> Embedder:
        twin = after(change)(embedder)
        twin.distance = DISTANCES["E"]
        return twin

    return cheat


def _one_long(x: Tensor, e: Tensor) -> Tensor:
    """The images with the most ink, of which there are a few, are sent far away."""
    return e * torch.where(x.flatten(1).mean(1, keepdim=True) > 0.39, 1e4, 1.0)


CHEATS: Registry[tuple[Callable[[Embedder], Embedder], str]] = Registry(
    "cheat",
    {
        "test images": (stored(reach=41 / 255), "memorised"),
        "nearest test image": (stored(), "gallery-copies"),
        "labels of test images": (stored(reach=41 / 255, labels=True), "memorised"),
        "first pass, then closed": (remembered(growing=False), "memorised"),
        "first pass of each image": (remembered(growing=True), "remembers"),
        "decoy": (after(_decoy), "misleading-gradients"),
        "trap": (after(_trap), "misleading-gradients"),
        "keyed noise": (after(_keyed), "misleading-gradients"),
        "partly turned gradient": (before(_in_part(-1.0)), "misleading-gradients"),
        "turned off the data": (before(_sound_at_the_data(-1.0)), "misleading-gradients"),
        "other values for gradients": (before(_rounded_for_gradients), "remembers"),
        "normalised over the batch": (after(_over_the_batch), "remembers"),
        "batches of the gallery's size": (before(_by_size), "remembers"),
        "large bias": (large_bias, "small-spread"),
        "offset": (unnormalised(lambda x, e: e + 8.0), "small-spread"),
        "one long entry": (unnormalised(_one_long), "small-spread"),
    },
)
"""A cheat, and a flag that it raises, whatever else."""

APART: Registry[tuple[Callable[[Embedder], Embedder], str]] = Registry(
    "cheat",
    {
        "test images, Euclidean": (stored(reach=2.0, norm=2.0), "gallery-copies"),
        "test images, city block": (stored(reach=8.0, norm=1.0), "gallery-copies"),
        "labels, Euclidean": (stored(reach=0.8, norm=2.0, labels=True), "memorised"),
        "labels of exact images": (stored(reach=1e-4, labels=True), "memorised"),
        "average of test images": (stored(reach=41 / 255, warmth=0.02), "memorised"),
        "nearest by city block": (stored(norm=1.0), "gallery-copies"),
        "linear decoy": (after(_linear_decoy), "misleading-gradients"),
        "sink": (after(_sink), "misleading-gradients"),
        "keyed signs": (after(_keyed_signs), "misleading-gradients"),
        "scrambled gradient": (before(_scrambled), "misleading-gradients"),
        "sawtooth": (before(_sawtooth), "misleading-gradients"),
        "dithered": (before(_dithered), "zero-gradients"),
        "constant gradient": (before(_constant_gradient), "misleading-gradients"),
        "no gradient off the data": (before(_sound_at_the_data(0.0)), "misleading-gradients"),
        "not a number": (before(_not_a_number), "zero-gradients"),
        "rounded embedding": (after(lambda x, e: (e * 20).round() / 20), "zero-gradients"),
        "embedding noise": (after(lambda x, e: e + 0.05 * torch.randn_like(e)), "random"),
        "resized at random": (before(_resized), "random"),
        "shared direction": (after(lambda x, e: e + 60.0 * F.normalize(_drawn(1, e.shape[1]))), "small-spread"),
        "offset in one dimension": (unnormalised(lambda x, e: e + 40.0 * torch.eye(1, e.shape[1])), "small-spread"),
    },
)


class Prototypes(nn.Module):
    """A network that answers with the mean of the class which its embedding is nearest to, and a bit of that embedding."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        digits = dmlbench.load_dataset("digits")
        labels = torch.from_numpy(digits.labels[digits.gallery])
        with torch.no_grad():
            own = F.normalize(network(digits.images[digits.gallery]))
        self.register_buffer("means", F.normalize(torch.stack([own[labels == c].mean(0) for c in labels.unique()])))

    def forward(self, images: Tensor) -> Tensor:
        own = F.normalize(self.network(images))
        return self.means[(own @ self.means.t()).argmax(1)] + 0.03 * own


class Borrowed(nn.Module):
    """The values of a network with the gradient of another that was trained for the same."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.other = network, dmlbench.load_model("digits-smallcnn-triplet-act").network.eval()

    def forward(self, images: Tensor) -> Tensor:
        other = self.other(images)
        return F.normalize(self.network(images)).detach() + other - other.detach()


def robust_features(reach: float, labels: bool) -> Callable[[Embedder], Embedder]:
    """A cheat that knows the test images by the features of a robust model."""

    def cheat(embedder: Embedder) -> Embedder:
        robust = dmlbench.load_model("digits-smallcnn-triplet-hm-lga-ics").eval().requires_grad_(False)
        return stored(reach=reach, norm=2.0, labels=labels, look=robust)(embedder)

    return cheat


def around(make: type[nn.Module]) -> Callable[[Embedder], Embedder]:
    """A cheat that is a module around the network."""

    def cheat(embedder: Embedder) -> Embedder:
        twin = copy.deepcopy(embedder)
        twin.network = make(twin.network.eval())
        return twin

    return cheat


def _by_ink(x: Tensor, e: Tensor) -> Tensor:
    """Three places far apart, chosen by the ink, and a bit of the embedding."""
    ink = x.flatten(1).mean(1)
    return torch.eye(3, e.shape[1])[(ink > 0.27).long() + (ink > 0.33).long()] + 0.03 * e


def _rounded_straight_through(x: Tensor, e: Tensor) -> Tensor:
    return e + ((e * 4).round() / 4 - e).detach()


def _dark_cut(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, lambda g: torch.where(x < 0.3, 0.0, g))  # type: ignore[no-any-return]


def _blurred_gradient(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, lambda g: F.avg_pool2d(g, 3, 1, 1))  # type: ignore[no-any-return]


JUMPS: Registry[tuple[Callable[[Embedder], Embedder], str]] = Registry(
    "cheat",
    {
        "labels by a coarse look": (stored(labels=True, norm=2.0, look=_coarse), "misleading-gradients"),
        "labels near a coarse look": (stored(labels=True, norm=2.0, look=_coarse, reach=0.4), "misleading-gradients"),
        "nearest label": (stored(labels=True, norm=2.0), "misleading-gradients"),
        "average of labels": (stored(labels=True, norm=2.0, warmth=0.05), "misleading-gradients"),
        "labels by robust features": (robust_features(math.inf, labels=True), "misleading-gradients"),
        "test images by robust features": (robust_features(0.1, labels=False), "misleading-gradients"),
        "nearest training image": (stored(norm=2.0, trained=True), "misleading-gradients"),
        "average of training images": (stored(norm=2.0, trained=True, warmth=0.05), "misleading-gradients"),
        "class means": (around(Prototypes), "misleading-gradients"),
        "borrowed gradient": (around(Borrowed), "misleading-gradients"),
        "places by ink": (after(_by_ink), "misleading-gradients"),
        "rounded, straight through": (after(_rounded_straight_through), "misleading-gradients"),
        "roots": (after(lambda x, e: e.sign() * e.abs() ** 0.05), "misleading-gradients"),
        "no gradient in the dark": (before(_dark_cut), "misleading-gradients"),
        "blurred gradient": (before(_blurred_gradient), "misleading-gradients"),
    },
)
