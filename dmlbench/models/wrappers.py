"""What is done to pictures at test time: transforms of pixels in [0, 1], each with how an adversary who knows it looks through it.

That is its backward pass where it has no useful gradient (BPDA, Athalye, Carlini and Wagner, ICML 2018), and how many passes
are averaged where it is random (EOT, the same paper). :mod:`dmlbench.models.defended` puts them before a model. docs/defended.md.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.registry import Registry
from dmlbench.rng import Rng

TV_STEPS = 60
"""Steps of the solver of ``tv`` ..."""


TV_BACK = 20
"""... and of these, how many its backward pass goes through."""


WAYS = ("noise", "contrast", "brightness", "blur", "motion")
"""What ``barrage`` chooses from."""


Values = tuple[int | float, ...]


Backward = Callable[[Tensor, Tensor, Values], Tensor]
"""From the images (b, C, H, W), the gradient to what the wrapper made of them and its values, to a gradient to the images."""


@dataclass(frozen=True)
class Given:
    """Arguments of a transform besides the images: a random stream for each, and unperturbed pictures (n, C, H, W) of the gallery."""

    rng: Rng
    pool: Tensor


Transform = Callable[[Tensor, Values, Given], Tensor]


@dataclass(frozen=True)
class Parameter:
    """A number that a wrapper takes.

    Attributes:
        default: where none is given.
        low, high: both allowed.
        integer: whether it is a whole number.
    """

    name: str
    default: int | float
    low: int | float
    high: int | float
    integer: bool = False

    def __str__(self) -> str:
        return f"{self.name} from {self.low:g} to {self.high:g}"

    def read(self, text: str, wrapper: str) -> float:
        """The number that ``text`` says.

        Raises:
            UsageError: none, not a whole one, or outside the range.
        """
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high or (self.integer and value != int(value)):
            kind = "a whole number" if self.integer else "a number"
            raise UsageError(f"{wrapper}: {self.name} {text!r} is not {kind} from {self.low:g} to {self.high:g}")
        return value


STAGES = ("none", "smooth", "code", "quantise", "randomise", "mix")
"""What wrappers do, in the order in which they make sense one after another: smoothing after rounding undoes it, and a codec
spends itself on the borders and the noise of random transforms."""


@dataclass(frozen=True)
class Wrapper:
    """A defence at test time.

    Attributes:
        title: one line for a person.
        parameters: the numbers it takes, in order.
        transform: (images (b, C, H, W) in [0, 1], values, :class:`Given`) to images of the same shape; or, in the stage
            "mix", to (b k, C, H, W), of which the network's outputs are averaged.
        source: the paper, and what of it is our reading.
        stage: one of :data:`STAGES`: outer wrappers are of earlier stages than inner ones.
        backward: what stands for its derivative; None where the transform is differentiable, and its own is used.
        eot: passes that an attack averages by default; 1 for one that is not random.
    """

    title: str
    parameters: tuple[Parameter, ...]
    transform: Transform
    source: str
    stage: str
    backward: Backward | None = None
    eot: int = 1


def straight_through(images: Tensor, gradient: Tensor, values: Values) -> Tensor:
    """BPDA with the identity: the gradient as if nothing had been done."""
    return gradient


def nothing(images: Tensor, gradient: Tensor, values: Values) -> Tensor:
    """Zero: what a step function or a codec has for a derivative almost everywhere."""
    return torch.zeros_like(images)


def jpeg(images: Tensor, values: Values, given: Given) -> Tensor:
    """Each picture through Pillow's JPEG of this quality, from 8 bits to 8 bits.

    Raises:
        UsageError: neither grey nor RGB.
    """
    if images.shape[1] not in (1, 3):
        raise UsageError(f"jpeg takes grey or RGB pictures, not {images.shape[1]} channels")
    bytes_ = (images.detach() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    out = np.empty_like(bytes_)
    for i, pixels in enumerate(bytes_):
        coded = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if images.shape[1] == 1 else pixels).save(coded, "JPEG", quality=int(values[0]))
        out[i] = np.asarray(Image.open(coded)).reshape(pixels.shape)
    return torch.from_numpy(out).permute(0, 3, 1, 2).to(images.device, images.dtype) / 255


def bits(images: Tensor, values: Values, given: Given) -> Tensor:
    """Each pixel to the nearest of ``2 ** depth`` evenly spaced levels from 0 to 1."""
    steps = 2 ** int(values[0]) - 1
    return (images * steps).round() / steps


def _gradient(z: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and downwards, (b, C, H, W-1) and (b, C, H-1, W)."""
    return z[..., 1:] - z[..., :-1], z[..., 1:, :] - z[..., :-1, :]


def tv(images: Tensor, values: Values, given: Given) -> Tensor:
    """z with the least ½ |z - x|² + weight · (sum of |differences| of neighbours, both ways).

    By accelerated projected gradient steps on the dual (Beck and Teboulle, 2009): z = x - Dᵀq, |q| at most the weight.
    """
    return _solved(images, values[0], TV_STEPS).clamp(0, 1)


def _solved(images: Tensor, weight: int | float, steps: int) -> Tensor:
    """What ``steps`` steps of the solver of :func:`tv` give."""
    q = [torch.zeros_like(d) for d in _gradient(images)]
    ahead, pace = q, 1.0
    for _ in range(steps):
        slopes = _gradient(images - _adjoint(*ahead))
        new = [(a + d / 8).clamp(-weight, weight) for a, d in zip(ahead, slopes, strict=True)]
        faster = (1 + math.sqrt(1 + 4 * pace * pace)) / 2
        ahead = [n + (pace - 1) / faster * (n - old) for n, old in zip(new, q, strict=True)]
        q, pace = new, faster
    return images - _adjoint(*q)


def through_solver(images: Tensor, gradient: Tensor, values: Values) -> Tensor:
    """BPDA of :func:`tv` with the derivative of the solver's first :data:`TV_BACK` steps."""
    with torch.enable_grad():
        x = images.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(_solved(x, values[0], TV_BACK), x, gradient)
    return slope


def _adjoint(across: Tensor, down: Tensor) -> Tensor:
    """What is to :func:`_gradient` as a transposed matrix is: (b, C, H, W)."""
    return F.pad(across, (1, 0)) - F.pad(across, (0, 1)) + F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1))


def resize_pad(images: Tensor, values: Values, given: Given) -> Tensor:
    """Each picture shrunk (bilinear) to a random height from ``share`` of its own to all of it, at a random place on black.

    Raises:
        UsageError: no whole number of rows is that near to the picture's own.
    """
    rows, columns = images.shape[2:]
    least = max(1, math.ceil(values[0] * rows - 1e-9))
    if least >= rows:
        raise UsageError(
            f"resize-pad({values[0]:g}) leaves pictures of {rows} rows as they are: share {100 * (rows - 1) // rows / 100:g} or less"
        )
    height = least + given.rng.integers(rows - least + 1)  # (b,)
    width = (height.double() * columns / rows).round().long().clamp(1, columns)
    top, left = given.rng.integers(rows - height + 1), given.rng.integers(columns - width + 1)
    y = torch.arange(rows, device=images.device) - top[:, None]  # (b, rows): place within the small picture
    x = torch.arange(columns, device=images.device) - left[:, None]
    grid = torch.stack(
        torch.broadcast_tensors(
            (2 * (x + 0.5) / width[:, None] - 1)[:, None, :], (2 * (y + 0.5) / height[:, None] - 1)[:, :, None]
        ),
        dim=3,
    )  # (b, rows, columns, 2)
    inside = ((y >= 0) & (y < height[:, None]))[:, :, None] & ((x >= 0) & (x < width[:, None]))[:, None, :]
    resized = F.grid_sample(images, grid.to(images.dtype), "bilinear", "border", align_corners=False)
    return resized * inside[:, None]


def barrage(images: Tensor, values: Values, given: Given) -> Tensor:
    """``count`` of the :data:`WAYS`, in random order, each with a random strength, on each picture."""
    order = given.rng.uniform(len(WAYS)).argsort(dim=1, stable=True)  # (b, 5)
    for turn in range(int(values[0])):
        out = images.clone()
        for i, way in enumerate(WAYS):
            at = (order[:, turn] == i).nonzero()[:, 0]
            if len(at):
                out[at] = _BARRAGE[way](images[at], given.rng[at].fold(way)).clamp(0, 1)
        images = out
    return images


def _between(rng: Rng, low: int | float, high: int | float) -> Tensor:
    """(b, 1, 1, 1) uniform from ``low`` to ``high``."""
    return low + (high - low) * rng.uniform(1, 1, 1)


def _noise(x: Tensor, rng: Rng) -> Tensor:
    return x + _between(rng, 0, 0.1) * rng.normal(*x.shape[1:])


def _contrast(x: Tensor, rng: Rng) -> Tensor:
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + _between(rng, 0.7, 1.3) * (x - middle)


def _brightness(x: Tensor, rng: Rng) -> Tensor:
    return x + _between(rng, -0.1, 0.1)


def _blur(x: Tensor, rng: Rng) -> Tensor:
    return torch.lerp(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1), _between(rng, 0, 0.5))


def _motion(x: Tensor, rng: Rng) -> Tensor:
    """Turned by up to 10 degrees, its size changed by up to a tenth, moved by up to a twentieth of the side."""
    angle, zoom = math.radians(10) * rng.uniform() * rng.signs(), 0.9 + 0.2 * rng.uniform()
    move = 0.2 * rng.uniform(2) - 0.1
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, "bilinear", "border", align_corners=False)


_BARRAGE = dict(zip(WAYS, (_noise, _contrast, _brightness, _blur, _motion), strict=True))


def mixup(images: Tensor, values: Values, given: Given) -> Tensor:
    """(b count, C, H, W): share · picture + (1 - share) · a random picture of the pool, ``count`` times."""
    share, count = values[0], int(values[1])
    others = given.pool[given.rng.integers(len(given.pool), count)]  # (b, count, C, H, W)
    return (share * images[:, None] + (1 - share) * others).flatten(0, 1)


WRAPPERS: Registry[Wrapper] = Registry(
    "wrapper",
    {
        "identity": Wrapper("nothing is done", (), lambda x, values, given: x, "for tests", "none"),
        "tv": Wrapper(
            "total variation is lowered", (Parameter("weight", 0.05, 0.0, 1.0),), tv,
            "Guo et al., ICLR 2018, arXiv 1711.00117, after Rudin, Osher and Fatemi, 1992; our reading: no pixel is dropped, "
            "differences count by their absolute values",
            "smooth", backward=through_solver,
        ),
        "jpeg": Wrapper(
            "JPEG and back", (Parameter("quality", 75, 1, 100, integer=True),), jpeg,
            "Guo et al., ICLR 2018, arXiv 1711.00117, who take quality 75", "code", backward=straight_through,
        ),
        "bits": Wrapper(
            "fewer bits a pixel", (Parameter("depth", 3, 1, 8, integer=True),), bits,
            "Guo et al., ICLR 2018, arXiv 1711.00117, after Xu, Evans and Qi, NDSS 2018", "quantise",
            backward=straight_through,
        ),
        "resize-pad": Wrapper(
            "random size and place", (Parameter("share", 0.9, 0.5, 0.99),), resize_pad,
            "Xie et al., ICLR 2018, arXiv 1711.01991; our reading: a network has one input size, so pictures shrink to 0.9 of "
            "it and not 299 pixels grow to 331", "randomise", eot=10,
        ),
        "barrage": Wrapper(
            "random transforms in random order", (Parameter("count", 3, 1, len(WAYS), integer=True),), barrage,
            "Raff et al., CVPR 2019; our reading: five differentiable transforms, not 25 in ten groups", "randomise", eot=10,
        ),
        "mixup": Wrapper(
            "mixed with pictures of the gallery, outputs averaged",
            (Parameter("share", 0.6, 0.0, 1.0), Parameter("count", 8, 1, 64, integer=True)), mixup,
            "Pang, Xu and Zhu, ICLR 2020, arXiv 1909.11515; our reading: outputs of the network take the place of "
            "predictions, pictures of the gallery that of training images of other classes", "mix", eot=4,
        ),
    },
)  # fmt: skip
