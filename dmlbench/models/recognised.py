"""What is known of a weights file that somebody brings: what the registry says of it, and how its network is fed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dmlbench.checkpoints import File, checkpoints, verified
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.files import described
from dmlbench.models.architectures import (
    Built,
)
from dmlbench.models.behaviour import probe_images
from dmlbench.models.files import WeightsFile
from dmlbench.models.inspection import width_of
from dmlbench.models.published import CLIP_MEAN, CLIP_STD
from dmlbench.models.records import space_of
from dmlbench.models.spec import preprocess_of
from dmlbench.preprocess import Preprocess


def on_record(embedder: Embedder, file: WeightsFile) -> tuple[str, ...]:
    """A sentence where the file is a registered model's, and its record feeds or compares it otherwise."""
    sha256 = file.sha256
    for name, entry in checkpoints().items():
        costly = file.parts[0] if entry.arch.builder == embedder.arch and len(file.parts) == 1 else None
        if any(_is(registered, sha256, costly) for registered in entry.files):
            mean, std = entry.normalize.of_unit()
            asks = Embedder(
                embedder.network, embedder.input_shape, mean=mean, std=std, distance=DISTANCES[space_of(entry.embedding)],
                preprocess=preprocess_of(entry.input),
            )  # fmt: skip
            image, width = probe_images(embedder.input_shape, 1), width_of(embedder.network, embedder.input_shape)
            same = (asks.preprocess, asks.distance) == (embedder.preprocess, embedder.distance)
            cut = width in (None, entry.arch.embed_dim)
            if not (same and cut and torch.equal(asks.normalise(image), embedder.normalise(image))):
                return (
                    f"{file.name} is the file of {name}, whose record says otherwise how it is fed, cut and compared: "
                    f"--model {name} --weights {file.path}",
                )
    return ()


def _is(file: File, sha256: str, path: Path | None) -> bool:
    """Whether a record names the file of this hash; by a hash of another kind where its ``path`` is given."""
    known = file.sha256 or (file.hash or "").removeprefix("sha256:")
    if "md5:" not in known:
        return bool(known) and sha256.startswith(known)
    try:
        return path is not None and verified(path, file) == path
    except DataError:
        return False


def feeding(embedder: Embedder) -> str:
    """One sentence on how a network is fed, and by which options otherwise."""
    p = embedder.preprocess
    way = (
        f"the longest side to {p.longest} and padding with {p.pad}" if p.longest else
        f"the shorter side to {p.shorter}, then the centre {p.size[0]}x{p.size[1]}" if p.shorter else
        f"all of it to {p.resize[0]}x{p.resize[1]}, then the centre {p.size[0]}x{p.size[1]}" if p.resize else
        f"all of it to {p.size[0]}x{p.size[1]}"
    )  # fmt: skip
    if embedder.identity:
        scaled = "pixels in [0, 1]"
    else:
        mean, std = (", ".join(f"{v:.3g}" for v in t.flatten().tolist()) for t in (embedder.mean, embedder.std))
        scaled = f"mean {mean}, std {std}"
    cut = "" if p.box is None else f"cut to {','.join(map(str, p.box))}, "
    order = ", blue first" if p.order == "bgr" else ""
    return f"a picture is fed so: {cut}{way} ({p.interpolation}){order}, {scaled}; --resize, --mean and --std say otherwise"


def fed_by_record(file: WeightsFile, built: Built) -> Built:
    """The architecture with the preprocessing that the hub's configuration next to the file states, if there is one."""
    config = file.config.get("pretrained_cfg", file.config)  # timm's first form has it all in one
    open_clip = file.config.get("preprocess_cfg")
    if not isinstance(config, Mapping) or ("architecture" not in file.config and open_clip is None):
        return built
    try:
        if open_clip is not None:
            config = _of_open_clip(file.config["model_cfg"], open_clip)
        channels, height, width = (int(v) for v in config.get("input_size") or built.input_shape or (3, 224, 224))
        mean, std = (
            tuple(float(v) for v in config.get(k) or default or ())
            for k, default in (("mean", built.mean), ("std", built.std))
        )
        interpolation = str(config.get("interpolation") or built.interpolation)
        plain = Preprocess.standard((channels, height, width), interpolation)
        if (mode := config.get("crop_mode") or "center") not in ("center", "squash"):
            raise ValueError(f"crop_mode {mode!r}")
        if config.get("crop_pct"):
            if mode == "center" and height != width:
                raise ValueError(f"the centre {height}x{width}, of no square, from a picture scaled to cover it")
            down, right = (int(side / float(config["crop_pct"])) for side in (height, width))
            plain = Preprocess(
                (height, width),
                resize=(down, right) if mode == "squash" and (down, right) != (height, width) else None,
                shorter=None if mode == "squash" else min(down, right),
                interpolation=interpolation,
                channels=channels,
            )
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, UsageError) as error:
        raise DataError(
            f"{file.path}: what its configuration says of how it is fed is not understood: {described(error)}; a spec "
            "whose input and normalize say it is read in its place (--model FILE --spec spec.json)"
        ) from None
    return replace(built, input_shape=plain.shape, mean=mean, std=std, interpolation=interpolation, stated=plain)


def _of_open_clip(model: Mapping[str, Any], fed: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip's configuration says, in timm's words; what it leaves out is as open_clip has it.

    Source: open_clip's ``PreprocessCfg``: bicubic, the shorter side to the size, then its centre.
    """
    size = fed.get("size") or model["vision_cfg"].get("image_size", 224)
    height, width = size if isinstance(size, Sequence) else (size, size)
    mode = fed.get("resize_mode") or "shortest"
    return {
        "input_size": (3, height, width),
        "mean": fed.get("mean") or CLIP_MEAN,
        "std": fed.get("std") or CLIP_STD,
        "interpolation": fed.get("interpolation") or "bicubic",
        "crop_mode": {"shortest": "center"}.get(mode, mode),
        "crop_pct": 1.0,
    }
