"""One valid bundle, of a real run on the board, and ways to alter it."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dmlbench.checkpoints import PACKAGE, Checkpoint, File, checkpoints
from dmlbench.compact import npz_bytes, read_npz, unstacked, untabulated
from dmlbench.models import build, parameter_count, probe_images, write_weights
from dmlbench.protocols import load_protocol
from dmlbench.results import load, save
from dmlbench.submission.bundle import make_manifest
from dmlbench.submission.pack import draft, pack

MODEL = "digits-mine"
SUBMISSIONS = Path(__file__).resolve().parent.parent / "leaderboard" / "submissions"
NONE, EST = "digits-smallcnn-triplet-none", "digits-smallcnn-triplet-est"


def card(embed_dim=16, sha256=None, **changed):
    """A record of the small model."""
    return Checkpoint.model_validate(
        {
            "title": "A small model that nobody trained",
            "defense": {"name": "none"},
            "train": {"loss": "none", "seed": 0},
            "arch": {"builder": "smallcnn", "kwargs": {"width": 4, "embed_dim": embed_dim}, "embed_dim": embed_dim},
            "files": [{"sha256": sha256, "format": "safetensors"}],
            "input": {"size": 8, "channels": 1},
            "dataset": {"name": "digits"},
            "license": "MIT",
            **changed,
        }
    )


def model(folder: Path, seed=0, name=MODEL):
    """(embedder, record): seeded weights, written to ``folder/weights.safetensors``."""
    torch.manual_seed(seed)
    embedder = build(card(), name).eval()
    path = folder / "weights.safetensors"
    write_weights(path, embedder.network)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    images = probe_images(embedder.input_shape)
    with torch.no_grad():
        probe = {
            "inputs_sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
            "embedding": embedder(images)[0, :8].tolist(),
        }
    entry = card(sha256=sha256, probe=probe)
    entry = entry.model_copy(
        update={"arch": entry.arch.model_copy(update={"n_params": parameter_count(embedder.network)})}
    )
    embedder.card, embedder.weights_sha256 = entry, sha256
    return embedder, entry


def weights_of(name: str) -> bytes:
    """The weights of a packaged digits model."""
    return (PACKAGE / "weights" / f"{name}.safetensors").read_bytes()


def valid(folder: Path, protocol="ers-digits") -> dict[str, bytes]:
    """The files of a bundle that passes every level: a run on the board under a name that is not registered.

    ``folder`` then holds what a submitter has: ``run``, ``record.json`` (the model's), ``submission.yaml``
    and ``weights.safetensors``.
    """
    wanted = load_protocol(protocol).sha256
    for source in sorted(SUBMISSIONS.glob(f"{NONE}-{protocol}*")):
        run = load(source / "run")
        if run.protocol.sha256 == wanted:
            break
    else:
        pytest.skip(f"the board, which lies in the repository, holds no run of {NONE} under the current {protocol}")
    save(
        run.model_copy(update={"model": run.model.model_copy(update={"id": MODEL})}).with_arrays(
            run.arrays, run.sample
        ),
        folder / "run",
    )
    entry = checkpoints()[NONE]
    entry = entry.model_copy(update={"files": (File(sha256=run.model.weights_sha256),)})
    (folder / "record.json").write_text(entry.model_dump_json(), encoding="utf-8")
    (folder / "weights.safetensors").write_bytes(weights_of(NONE))
    text = draft(folder / "run", entry).replace("license: FILL-IN", "license: MIT").replace("FILL-IN", "A. Tester")
    (folder / "submission.yaml").write_text(text, encoding="utf-8")
    return pack(folder / "run", folder / "submission.yaml", folder / "weights.safetensors")


def sealed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files with both manifests made anew, as a careful liar would."""
    files = dict(files)
    inner = {n.removeprefix("run/"): c for n, c in files.items() if n.startswith("run/") and n != "run/manifest.json"}
    files["run/manifest.json"] = json.dumps(make_manifest(inner)).encode()
    del files["manifest.json"]
    files["manifest.json"] = json.dumps(make_manifest(files)).encode()
    return files


def edit_json(files, name, change):
    """The files with a JSON file changed in place by ``change(content)``, and sealed."""
    content = json.loads(files[name])
    change(content)
    return sealed({**files, name: json.dumps(content).encode()})


def edit_yaml(files, change):
    """The same for submission.yaml."""
    content = yaml.safe_load(files["submission.yaml"])
    change(content)
    return sealed({**files, "submission.yaml": yaml.safe_dump(content, allow_unicode=True).encode()})


def arrays_of(raw: bytes, folder: Path) -> dict[str, np.ndarray]:
    """The arrays of npz bytes, writable."""
    path = folder / "arrays.npz"
    path.write_bytes(raw)
    return {k: v.copy() for k, v in untabulated(unstacked(read_npz(path))).items()}


def edit_arrays(files, name, folder, change):
    """The files with an npz file changed in place, and sealed."""
    arrays = arrays_of(files[name], folder)
    change(arrays)
    return sealed({**files, name: npz_bytes(arrays)})


def zipped(files: dict[str, bytes], path: Path, infos=()) -> Path:
    """A zip file of ``files``; ``infos`` are further (ZipInfo, content)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for info, content in infos:
            archive.writestr(info, content)
    path.write_bytes(buffer.getvalue())
    return path


def put(path, value):
    """A change of one value of a nested content."""

    def change(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        content[last] = value

    return change
