"""The options that say which model and on which images, shared by every verb that loads a model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmlbench.cli.output import Bar, tell
from dmlbench.models.spec import PRECISIONS

if TYPE_CHECKING:
    from dmlbench.datasets import RetrievalDataset
    from dmlbench.embedding import Embedder
    from dmlbench.models import ModelOptions

MODEL_HELP = (
    "A registered id, timm:NAME, torchvision:NAME, hf-hub:NAME, weights (a file, a folder of the hub), a run folder of "
    "dmlbench train, python:FILE.py:FUNCTION (runs that code), ensemble:A,B, or defended:WRAPPER(VALUES):MODEL."
)


class _Numbers(click.ParamType):
    """Numbers by comma, e.g. 0.485,0.456,0.406."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.485,0.456,0.406", param, ctx)


class Size(click.ParamType):
    """A side, or height x width."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        sides = str(value).lower().split("x")
        if len(sides) not in (1, 2) or not all(s.isdigit() and int(s) > 0 for s in sides):
            self.fail(f"{value!r} is not a size such as 224 or 256x128 (height x width)", param, ctx)
        return int(sides[0]), int(sides[-1])


class _Box(_Numbers):
    """Four whole numbers: left, top, right, bottom."""

    name = "box"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        corners = super().convert(value, param, ctx)
        if len(corners) != 4 or any(number != int(number) for number in corners):
            self.fail(f"{value!r} is not a box such as 68,52,183,186 (left, top, right, bottom)", param, ctx)
        return tuple(int(number) for number in corners)


_OPTIONS = (
    click.option("--weights", metavar="FILE|pretrained", help="Weights for --model; nothing in the file is run."),
    click.option("--spec", type=click.Path(path_type=Path, dir_okay=False), help="JSON that describes a weights file."),
    click.option("--embed-dim", type=int, help="Width of the last layer; 0 leaves it out."),
    click.option("--head", metavar="LAYER", help="This layer of the weights file in place of the network's last one."),
    click.option("--leave-out", metavar="LAYERS", help="Layers of the weights file to do without, by comma."),
    click.option("--checkpoint-key", help="Where in the weights file the state dictionary is, e.g. model or ema.net."),
    click.option("--checkpoint-prefix", "prefix", help="What stands before the network's names there, e.g. encoder_k."),
    click.option("--output-key", help="Which output is the embedding, if the model gives several."),
    click.option("--precision", type=click.Choice(PRECISIONS), default="auto",
                 show_default=True, help="Of gradients; results are always float32. tf32: on GPUs that have it; int8 rounds the gallery that attacks see."),
    click.option("--compile", "compiled", is_flag=True,
                 help="Run gradient steps through torch.compile; as without it where that fails."),
    click.option("--input-size", type=Size(), help="Side of the images in pixels, or HxW."),
    click.option("--resize", metavar="exact:N|shorter:N|longest:N|none",
                 help="Before the centre crop, or, for the longest side, before padding; by default exact, 8/7 of the size, and none below 128."),
    click.option("--pad", type=click.IntRange(0, 255), help="The grey of the padding; 0 is black."),
    click.option("--box", type=_Box(), help="Cut left,top,right,bottom from each picture first, in pixels."),
    click.option("--interpolation", help="nearest, bilinear, bicubic or lanczos."),
    click.option("--channel-order", "order", type=click.Choice(["rgb", "bgr"]), help="What the model was trained on."),
    click.option("--mean", type=_Numbers(), help="Per channel, subtracted inside the model."),
    click.option("--std", type=_Numbers(), help="Per channel, divided by inside the model."),
    click.option("--scale", type=float, help="255 for networks fed pixels of 0 to 255; --mean and --std are then of those."),
    click.option("--distance", type=click.Choice(["euclidean", "cosine"]), help="How embeddings are compared."),
    click.option("--normalize/--no-normalize", default=None, help="Scale embeddings to unit length."),
    click.option("--name", help="What results call the model."),
)  # fmt: skip
_FIELDS = (
    "weights", "spec", "embed_dim", "head", "leave_out", "checkpoint_key", "prefix", "output_key", "precision",
    "compiled", "input_size", "resize", "pad", "box", "interpolation", "order", "mean", "std", "scale", "distance",
    "normalize", "name",
)  # fmt: skip


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options above to a click command, which gets them as one argument ``options`` (:class:`ModelOptions`)."""

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        from dmlbench.models import ModelOptions

        options = ModelOptions(**{field: kwargs.pop(field) for field in _FIELDS})
        return command(*args, options=options, **kwargs)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered


def load_subject(
    model: str, options: "ModelOptions", dataset: str | None, split: str, *, ready: bool = True, small: bool = False
) -> tuple["Embedder", "RetrievalDataset"]:
    """The model and the images it is measured on, a part if ``small``, decoded if ``ready``; notes about them go to stderr."""
    from dmlbench.datasets import decode
    from dmlbench.datasets.preview import preview
    from dmlbench.datasets.remarks import remarks
    from dmlbench.models import open_model
    from dmlbench.task import images_for

    embedder = open_model(model, options)
    for note in embedder.notes:
        tell(note)
    images = images_for(embedder, dataset, split)
    images = preview(images) if small else images
    for note in remarks(images) if ready else images.notes:
        tell(note)
    if ready:
        with Bar("decoding images") as bar:
            decode(images, bar.at)
    return embedder, images
