"""One training loop, read top to bottom: recipe, data set, learner, steps, checkpoints.

A run folder holds ``recipe.json``, ``log.csv`` (one row per check), ``state.pt`` (everything that a
resume needs), ``last.safetensors``, ``best.safetensors`` and, when it is done, ``checkpoint.json``:
the entry for the registry. Every file is written whole. Batches and random numbers depend on (seed,
rank, iteration) alone, so a resumed run goes on exactly as the uninterrupted one.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dmlbench.datasets import Images, decode, load_dataset
from dmlbench.errors import DataError, UsageError
from dmlbench.files import first_line, prepare_folder, write_atomic
from dmlbench.models import build, probe_images, write_weights
from dmlbench.models.architectures import drawn_weights
from dmlbench.preprocess import Preprocess
from dmlbench.results import json_bytes
from dmlbench.rng import seed_of
from dmlbench.run.parallel import World
from dmlbench.training.defenses import DEFENSES, Batch, Inner, Learner
from dmlbench.training.defenses.base import batch_norms
from dmlbench.training.losses import build_loss
from dmlbench.training.progress import COLLAPSE, QUICK_QUERIES, Progress, collapsed, log_bytes, quick_check
from dmlbench.training.recipe import Recipe, load_recipe
from dmlbench.training.sampling import check_classes, check_groups, class_batch
from dmlbench.training.start import Begun, begin, learnable, settled
from dmlbench.training.state import RUN_FILES, checkpoint_entry, finish, read_state, save_state


class TrainingFailed(DataError):
    """The run ended early: a loss that is not a number, or a collapsed model. Exit code 4."""


@dataclass(frozen=True)
class Trained:
    """What a finished run gives."""

    folder: Path
    progress: tuple[Progress, ...]
    entry: dict[str, Any]


def make_learner(
    recipe: Recipe, preprocess: Preprocess, classes: int, load: bool = True
) -> tuple[Learner, Begun | None]:
    """The embedder with the weights that it begins with, and its losses.

    A loss's own weights (proxies) are of the recipe's seed, the network's too where ``first_weights`` says so.

    Args:
        preprocess: how its images are prepared.
        classes: how many there are to learn.
        load: False leaves it untrained, where an earlier run's weights come into it.

    Raises:
        UsageError: the network does not take its arguments, or these images; ``init`` names no such weights.
        DataError: the weights that it names cannot be had, or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, "init"))
        try:
            with drawn_weights() if recipe.first_weights == "seed" else nullcontext():
                embedder = build(checkpoint_entry(recipe, preprocess), recipe.id)
        except TypeError as error:
            raise UsageError(f"arch_kwargs of {recipe.arch!r}: {error}") from None
        c, h, w = preprocess.shape
        members = getattr(embedder.network, "members", None)
        parts: list[nn.Module] = list(members) if members is not None else [embedder.network]
        probe = probe_images((c, h, w), 2)
        try:
            with torch.no_grad():
                dims = [int(part.eval()(probe).shape[1]) for part in parts]
        except Exception as error:  # a network says in any way that it does not take these images
            raise UsageError(
                f"network {recipe.arch!r} does not take images of {c}x{h}x{w} of data set {recipe.dataset!r}: {first_line(error)}"
            ) from None
        begun = begin(embedder, recipe) if load else None
        params = {"margin": recipe.margin} if recipe.loss == "triplet" else {}
        criteria = [
            build_loss(recipe.loss, classes, dim, embedder.distance, {**params, **recipe.loss_params}) for dim in dims
        ]
    norms = DEFENSES[recipe.defense].norms
    learner = Learner(embedder.train(), nn.ModuleList(criteria), recipe.loss, recipe.margin, norms)
    if recipe.batch_norm == "frozen":
        network_norms = batch_norms(embedder).values()
        if not network_norms:
            raise UsageError(f"batch_norm 'frozen' would do nothing: network {recipe.arch!r} has no batch norm")
        for norm in network_norms:
            norm.eval()
    return learner, begun


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """The factor on the learning rates at a step: constant, half a cosine, or a staircase."""
    if recipe.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * iteration / recipe.iterations))
    if recipe.schedule == "step":
        return recipe.step_factor ** (iteration // recipe.step_every)
    return 1.0


@contextmanager
def fitting(recipe: Recipe) -> Iterator[None]:
    """Within it, memory that runs out is one line.

    Raises:
        DataError: a step does not fit.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # the CPU's allocator has no error of its own
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            count = recipe.groups * recipe.per_class
            raise DataError(
                f"a step on {count} images does not fit into memory: set groups ({recipe.groups}) lower"
            ) from None
        raise


@contextmanager
def training_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, what a network draws by itself (dropout, drop path) depends on ``seed`` alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def batches(
    recipe: Recipe,
    images_of: Images,
    learnt: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    rank: int,
    start: int,
) -> Iterator[Batch]:
    """The batches of a run from step ``start``, each fetched while the one before is learnt from.

    Args:
        images_of: of the whole data set.
        learnt: (n,) the rows of it that are learnt from.
        labels: (n,) their classes.
    """

    def fetch(iteration: int) -> Batch:
        rng = np.random.default_rng(seed_of(recipe.seed, "batch", rank, iteration))
        drawn = class_batch(labels, recipe.groups, recipe.per_class, rng)
        rows = learnt[drawn]
        images, y = images_of[rows], torch.from_numpy(labels[drawn])
        if device.type == "cuda":
            images, y = images.pin_memory(), y.pin_memory()
        return Batch(
            images=images.to(device, non_blocking=True),
            labels=y.to(device, non_blocking=True),
            anchors=torch.arange(0, len(rows), recipe.per_class, device=device),
            rows=rows,
            seed=seed_of(recipe.seed, "step", rank, iteration),
            iteration=iteration,
        )

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(fetch, start)
        for iteration in range(start, recipe.iterations):
            with fitting(recipe):
                batch = ahead.result()
            if iteration + 1 < recipe.iterations:
                ahead = pool.submit(fetch, iteration + 1)
            yield batch


def train(
    recipe: Recipe | str,
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    allow_collapse: bool = False,
    report: Callable[[Progress], None] = lambda row: None,
    tell: Callable[[str], None] = lambda note: None,
    decoded: Callable[[int, int], None] = lambda done, total: None,
    stepped: Callable[[int, int], None] = lambda done, total: None,
    world: World | None = None,
) -> Trained:
    """Train by a recipe into a run folder.

    Args:
        recipe: or a packaged recipe's id, or the path of a TOML file.
        report: called with each row of the log.
        tell: called with each sentence about the images and the weights that it begins with.
        decoded: called with (images done, images in all) while pictures are decoded.
        stepped: called after each step with (steps done, steps in all) of this call, which after a resume are those that were left.
        world: the processes that train together; one by default.

    Raises:
        UsageError: the recipe does not fit the data or an earlier run.
        DataError: data or folder cannot be used.
        TrainingFailed: a loss or weights that are not numbers (the last good checkpoint stays), or collapse.
    """
    began = time.monotonic()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    folder = Path(folder)
    world = world or World()
    device = torch.device(device)
    recipe, preprocess = settled(recipe)
    dataset = load_dataset(recipe.dataset, "train", preprocess)
    learnt, notes = learnable(dataset, recipe.per_class)
    check_classes(dataset.labels[learnt], recipe.per_class, f"data set {recipe.dataset!r}")
    check_groups(dataset.labels[learnt], recipe.groups, recipe.per_class)
    labels = np.unique(dataset.labels[learnt], return_inverse=True)[1].astype(np.int64)
    defense = DEFENSES[recipe.defense]
    params = defense.parameters(recipe.defense_params)

    learner, begun = make_learner(recipe, preprocess, int(labels.max()) + 1, load=not resume)
    learner, origin = learner.to(device), begun.origin if begun else None
    optimizer = torch.optim.Adam(
        [
            {"params": [*learner.embedder.parameters(), *learner.norms.parameters()], "lr": recipe.lr},
            {"params": list(learner.criteria.parameters()), "lr": recipe.proxy_lr},
        ],
        weight_decay=recipe.weight_decay,
    )
    base = [group["lr"] for group in optimizer.param_groups]
    rows: list[Progress] = []
    best = -math.inf

    def store(which: str) -> None:
        write_weights(folder / f"{which}.safetensors", learner.embedder.network, half=recipe.stored == "float16")

    if resume:
        state = read_state(folder, recipe, world.size, dataset.sha256)
        try:
            learner.load_state_dict(state["learner"])
            optimizer.load_state_dict(state["optimizer"])
            rows = [Progress(**row) for row in state["rows"]]
            best = float(state["best"])
            origin = state.get("begun")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{folder / 'state.pt'} is not the state of such a run: {error}") from None
        if world.leads and not (folder / "last.safetensors").exists():
            store("last")
    elif held := [name for name in RUN_FILES if (folder / name).exists()]:
        how = "resume it with --resume, or" if held[0] == "state.pt" else "it has no state.pt to resume from, so"
        raise UsageError(f"{folder} already holds a run ({held[0]}): {how} name another folder")
    if world.leads:
        prepare_folder(folder)
    world.share(learner)

    if recipe.seed and recipe.init is None and recipe.first_weights == "fixed":
        notes.append(
            f"seed {recipe.seed} begins with the same weights as every other; --set first_weights=seed draws them"
        )
    for note in (*notes, *(begun.notes if begun else ())):
        tell(note)
    decode(dataset, decoded)
    sample = np.random.default_rng(seed_of("quick")).permutation(len(learnt))[:QUICK_QUERIES]
    seen, seen_labels = dataset.images[learnt[sample]].to(device), torch.from_numpy(labels[sample]).to(device)
    mixed = recipe.precision == "mixed" and device.type == "cuda"
    start = rows[-1].iteration if rows else 0
    total = torch.zeros((), device=device)
    since = 0

    def judge() -> None:
        if not allow_collapse and collapsed(rows, bool(rows) and rows[-1].iteration == recipe.iterations):
            raise TrainingFailed(
                f"the model has collapsed by step {rows[-1].iteration}: embeddings of different images lie "
                f"{rows[-1].spread:.2g} apart (of their length), below {COLLAPSE}; --allow-collapse trains on"
            )

    if world.leads:
        write_atomic(folder / "recipe.json", json_bytes(recipe.model_dump(mode="json")))
    judge()
    for batch in batches(recipe, dataset.images, learnt, labels, device, world.rank, start):
        factor = learning_rate(recipe, batch.iteration)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad(set_to_none=True)
        with fitting(recipe), training_randomness(batch.seed, device):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
                loss = defense.step(learner, batch, Inner(recipe.threat_at(batch.iteration)), **params)
            loss.backward()
        world.average(learner)
        optimizer.step()
        total += loss.detach()
        since += 1

        done = batch.iteration + 1
        stepped(done - start, recipe.iterations - start)
        if done % recipe.check_every and done != recipe.iterations:
            continue
        mean = world.mean(total) / since
        finite = all(bool(torch.isfinite(p).all()) for p in learner.parameters())
        if not (math.isfinite(mean) and finite):
            what = "the model's weights are" if math.isfinite(mean) else "the loss is"
            fallback = (
                f"the last good checkpoint, of step {rows[-1].iteration}, is kept" if rows else "no checkpoint was made"
            )
            raise TrainingFailed(f"{what} not a number at or before step {done}; {fallback} in {folder}")
        benign, attacked, spread = quick_check(learner, recipe, seen, seen_labels)
        total.zero_()
        since = 0
        row = Progress(done, mean, benign, attacked, spread, recipe.lr * factor, round(time.monotonic() - began, 1))
        rows.append(row)
        report(row)
        if world.leads:
            store("last")
            if benign + attacked > best:
                best = benign + attacked
                store("best")
            write_atomic(folder / "log.csv", log_bytes(rows))
            save_state(folder, recipe, learner, optimizer, rows, best, world.size, origin, dataset.sha256)
        judge()
    entry = finish(folder, recipe, preprocess, learner.embedder, origin, world.size) if world.leads else {}
    return Trained(folder, tuple(rows), entry)
