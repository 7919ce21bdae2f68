"""From a run folder to a bundle: ``submission.yaml`` with what is known filled in, then one zip file."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from dmlbench.board.row import superseded
from dmlbench.checkpoints import PACKAGE, Checkpoint, checkpoints, first_problem, sha256_of
from dmlbench.compact import npz_bytes, stacked, tabulated
from dmlbench.errors import DataError, UsageError
from dmlbench.files import write_atomic
from dmlbench.kinds.base import WHOLE_RUN
from dmlbench.kinds.table import numbers_of
from dmlbench.models.defended import behind, hashed, named
from dmlbench.plain import read_json
from dmlbench.results import Evaluation, json_bytes, load
from dmlbench.run.subject import query_order
from dmlbench.submission.bundle import LIMITS, MANIFEST, make_manifest, verification_of, zip_bytes
from dmlbench.submission.kept import least_sample
from dmlbench.submission.record import FILL_IN, LICENSES, RANKING
from dmlbench.submission.static import WEIGHTS

HEAD = f"""# What you submit. `dmlbench submit pack` puts it into the bundle; `dmlbench validate` checks it.
# Replace every {FILL_IN}. Accepted licences: {", ".join(LICENSES)}.
"""


def draft(run: Path, checkpoint: Checkpoint | None = None, authors: Sequence[str] = ()) -> str:
    """The text of a submission.yaml for a run folder.

    Args:
        checkpoint: what the model is; by default the registry's record of the run's model. What only its author knows is
            marked to be filled in, unless the registry holds the model.
        authors: who submits; a mark to fill in where nobody is named.

    Raises:
        DataError: the run cannot be read. UsageError: it is a partial run, of one's own pictures, or has no weights to name.
    """
    e = load(run)
    if e.partial:
        raise UsageError(f"{run} is a partial run ({', '.join(e.partial)}): only a full one can be submitted")
    if ":" in e.dataset.name:
        raise UsageError(
            f"{run} was measured on {e.dataset.name}, which only you have: a board takes what anybody can measure again, "
            "on a data set of 'dmlbench datasets list'"
        )
    if e.model.weights_sha256 is None:
        raise UsageError(f"{run} was made with a model in memory: evaluate a registered model or a weights file")
    wrappers, network = named(e.model.id)
    if any(w.naive for w in wrappers):
        raise UsageError(f"{run} measures {e.model.id!r}, attacked as if nobody knew its defence: leave 'naive' out")
    registered = checkpoints().get(network)
    card = checkpoint or registered
    known = registered is not None and any(_stands_for(e, file.sha256) for file in registered.files)
    if wrappers and not any(_stands_for(e, file.sha256) for file in (card.files if card else ())):
        raise UsageError(
            f"{run} measures {e.model.id!r}: no record says what is behind the defence: name one with --checkpoint"
        )
    content = {
        "schema_version": 1,
        "id": re.sub("[^a-z0-9._-]+", "-", f"{e.model.id}-{e.protocol.name}"),
        "title": behind(card.title, e.model.id) if card and known else FILL_IN,
        "authors": list(authors) or [FILL_IN],
        "code_url": None,
        "stated": {
            "protocol": e.protocol.name,
            "protocol_sha256": e.protocol.sha256,
            "dataset": e.dataset.name,
            "dataset_sha256": e.dataset.sha256,
            "weights_sha256": e.model.weights_sha256,
            "recall_at_1": e.benign["recall_at_1"],
            "ers": e.ers,
            **{name: value for name, value in numbers_of(e).items() if name in RANKING},
        },
        "checkpoint": _record(card, known) if card else _blank(e),
    }
    return HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def read_card(path: Path) -> Checkpoint:
    """A checkpoint record from a JSON file: the record, or ``{id: record}`` as a training run writes it.

    Raises:
        DataError: the file is missing or not such a record; the field is named.
    """
    try:
        content = read_json(_read(path))
        if isinstance(content, dict) and len(content) == 1:
            (content,) = content.values()
        return Checkpoint.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _stands_for(e: Evaluation, sha256: str | None) -> bool:
    """Whether the run was made with a network from the file with this hash."""
    return sha256 is not None and hashed(named(e.model.id)[0], sha256) == e.model.weights_sha256


def _record(card: Checkpoint, known: bool) -> dict[str, Any]:
    """The model's record; of one that the registry does not hold, its author says title, licence and command."""
    content = card.model_dump(mode="json", exclude_none=True)
    if not known:
        content |= {"title": FILL_IN, "license": FILL_IN, "train": {**content["train"], "command": FILL_IN}}
    return content


def _blank(e: Evaluation) -> dict[str, Any]:
    """A checkpoint record to be filled in, for a model that the registry does not know."""
    return {
        "title": FILL_IN,
        "defense": {"name": FILL_IN},
        "train": {"loss": FILL_IN, "command": FILL_IN},
        "arch": {"builder": FILL_IN, "kwargs": {}, "embed_dim": e.model.embed_dim},
        "files": [{"sha256": e.model.weights_sha256, "format": "safetensors"}],
        "input": {"size": 0, "channels": 0},
        "dataset": {"name": e.dataset.name, "split": "train"},
        "license": FILL_IN,
        "probe": {"inputs_sha256": FILL_IN, "embedding": []},
    }


def pack(
    run: Path,
    submission: Path,
    weights: Path | None = None,
    with_weights: bool = True,
    sample: int | None = None,
) -> dict[str, bytes]:
    """The files of the bundle: those of the run, its outcomes in the least room that holds them exactly.

    The targets are left out: they follow from the protocol's seed and the model.

    Args:
        weights: the model's file; by default the registered one that lies in this package.
        with_weights: False leaves them out, which the board accepts where the package holds the same file or the submission names its address.
        sample: of how many of the sampled queries the adversarial images are kept; by default :func:`~dmlbench.submission.kept.least_sample`.

    Raises:
        DataError: a file is missing, or the weights are not those of the run.
        UsageError: ``sample`` is below that, above 0 where it is 0, or above what the run kept.
    """
    e = load(run)
    files = {"submission.yaml": _read(submission)}
    least = _least(e)
    if sample is not None and sample < least:
        raise UsageError(f"--sample {sample}: a bundle holds the images of at least {least} queries")
    if sample and not least:
        raise UsageError(
            f"--sample {sample}: pictures of {e.dataset.name} may not be passed on, so a bundle holds none"
        )
    if sample is not None and sample > (kept := len(e.sample.get("rows", ()))):
        raise UsageError(f"--sample {sample}: the run kept the images of {kept} queries")
    if with_weights:
        path = weights or packaged_weights(e)
        if not path.is_file():
            raise DataError(f"weights file {path} does not exist")
        if not _stands_for(e, sha256_of(path)):
            raise DataError(f"{path} is not the file that the run was made with (sha256 differs)")
        files[WEIGHTS] = path.read_bytes()
    return _sealed(files, e, least if sample is None else sample)


def _least(e: Evaluation) -> int:
    """Of how many queries a bundle of the run holds images at the least."""
    shape = next((v.shape[1:] for n, v in e.sample.items() if v.ndim == 4 and not n.startswith("closeup/")), (1,))
    return least_sample(e, shape)


def _sealed(files: dict[str, bytes], e: Evaluation, sample: int) -> dict[str, bytes]:
    """These files, with the run's record, its arrays in the least room and both manifests."""
    outcomes = {name: values for name, values in e.arrays.items() if not name.endswith("/targets")}
    files = {
        **files,
        "run/evaluation.json": json_bytes(e.model_dump(mode="json")),
        "run/per_query.npz": npz_bytes(tabulated(outcomes), zipfile.ZIP_LZMA),
        "run/adversarial_sample.npz": npz_bytes(stacked(shortened(e, sample)), zipfile.ZIP_LZMA),
    }
    inner = {name.removeprefix("run/"): raw for name, raw in files.items() if name.startswith("run/")}
    files["run/manifest.json"] = json_bytes(make_manifest(inner))
    files[MANIFEST] = json_bytes(make_manifest(files))
    return files


STALE_SAMPLE = 1
"""Queries whose adversarial images a stale bundle keeps: level 0, the last that looks at it, reads their shape."""


def repacked(folder: Path) -> dict[str, bytes] | None:
    """The files of a bundle on the board as they are kept today (docs/leaderboard.md); None where they are so already.

    What was measured is the same, number for number. The images of :func:`~dmlbench.submission.kept.least_sample` queries stay, of
    a stale run of :data:`STALE_SAMPLE`.

    Raises:
        DataError: the bundle cannot be read, or a record of a full rerun speaks of its manifest.
    """
    e = load(folder / "run")
    stale = superseded(e.protocol.name, e.protocol.sha256, e.model.id)
    current = {name: _read(folder / name) for name in LIMITS if (folder / name).exists()}
    files = {n: raw for n, raw in current.items() if n in ("submission.yaml", WEIGHTS)}
    files = _sealed(files, e, min(STALE_SAMPLE if stale else len(e.sample["rows"]), _least(e)))
    if files == current:
        return None
    if verification_of(folder).exists():
        raise DataError(f"{verification_of(folder)} speaks of the manifest of {folder}: pack it before it is verified")
    return files


def shortened(e: Evaluation, count: int) -> dict[str, np.ndarray]:
    """The stored adversarial images of the first ``count`` sampled queries, without what a report shows of them.

    The order is that of all queries, of which a protocol may measure the first ones alone.
    """
    measured = query_order(e.dataset.n_queries_full)[: len(e.arrays["query"])]
    first = e.arrays["query"][np.searchsorted(np.sort(measured), measured[:count])]
    keep = np.isin(e.sample["rows"], first)
    return {
        name: values[: len(values) if count else 0] if name.startswith(WHOLE_RUN) else values[keep]
        for name, values in e.sample.items()
        if not name.startswith("closeup/")
    }


def packaged_weights(e: Evaluation) -> Path:
    """The weights file of the run's model in this package."""
    _, network = named(e.model.id)
    card = checkpoints().get(network)
    for file in card.files if card else ():
        if file.path is not None and (PACKAGE / "weights" / file.path).is_file():
            return PACKAGE / "weights" / file.path
    raise UsageError(f"the weights of {network!r} are not in this package: name the file with --weights")


def write_zip(files: dict[str, bytes], out: Path) -> None:
    """Write the bundle as a zip file, whole or not at all."""
    write_atomic(out, zip_bytes(files))


def write_folder(files: dict[str, bytes], out: Path) -> None:
    """Write the bundle as a folder, as it lies on the board; what an earlier bundle had more of goes."""
    try:
        (out / "run").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be made: {error.strerror or error}") from None
    for name in set(LIMITS) - set(files):
        (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        if name != MANIFEST:
            write_atomic(out / name, content)
    write_atomic(out / MANIFEST, files[MANIFEST])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
