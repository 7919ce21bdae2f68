"""Attacks on the board, each replayed against the real check script in a scratch git repository.

    python benchmarks/forgeries.py [--out docs/forgeries.md] [--only WORD]

A small board of one run is committed, then each attack changes the checkout as a pull request would, and
``.github/check-submissions.sh`` has to refuse it. Exits 1 where one passes. The table says which level refused it and how.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
BOARD, MODEL = ROOT / "leaderboard" / "submissions", "digits-smallcnn-triplet-none"
OTHER = "digits-smallcnn-triplet-est"
VICTIM = f"{OTHER}-ers-digits"
ID = "digits-mine-ers-digits"
sys.path.insert(0, str(ROOT))

Files = dict[str, bytes]


class Attack(NamedTuple):
    """What it is, what it does to (the repository, the honest bundle's files), and the level of the check."""

    name: str
    do: Callable[[Path, Files], None]
    level: int = 0


def sealed(files: Files) -> Files:
    """With both manifests made anew, as a careful liar would."""
    from dmlbench.submission.bundle import make_manifest

    files = dict(files)
    inner = {n[4:]: c for n, c in files.items() if n.startswith("run/") and n != "run/manifest.json"}
    files["run/manifest.json"] = json.dumps(make_manifest(inner)).encode()
    files.pop("manifest.json")
    files["manifest.json"] = json.dumps(make_manifest(files)).encode()
    return files


def put(repository: Path, files: Files, name: str = ID) -> None:
    """The bundle as a folder of the board."""
    for path, content in files.items():
        target = repository / "leaderboard" / "submissions" / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def run(change: Callable[[Any], Any]) -> Callable[[Path, Files], None]:
    """An attack that edits the run's record and seals the bundle."""

    def do(repository: Path, files: Files) -> None:
        content = json.loads(files["run/evaluation.json"])
        change(content)
        put(repository, sealed({**files, "run/evaluation.json": json.dumps(content).encode()}))

    return do


def text(name: str, change: Callable[[str], str]) -> Callable[[Path, Files], None]:
    """An attack that edits a file as text and seals the bundle."""
    return lambda repository, files: put(repository, sealed({**files, name: change(files[name].decode()).encode()}))


def card(change: Callable[[Any], Any]) -> Callable[[Path, Files], None]:
    """An attack that edits submission.yaml and seals the bundle."""

    def do(repository: Path, files: Files) -> None:
        content = yaml.safe_load(files["submission.yaml"])
        change(content)
        put(repository, sealed({**files, "submission.yaml": yaml.safe_dump(content, allow_unicode=True).encode()}))

    return do


def at(*path: Any, to: Any) -> Callable[[Any], None]:
    """The change of one value of a nested content."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def arrays(name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path, Files], None]:
    """An attack that edits an npz file and seals the bundle."""

    def do(repository: Path, files: Files) -> None:
        from dmlbench.compact import npz_bytes, untabulated
        from dmlbench.submission.bundle import read_arrays

        stored = read_arrays(files[name], name)
        stored = untabulated(stored) if name == "run/per_query.npz" else stored
        found = {k: v.copy() for k, v in stored.items()}
        change(found)
        put(repository, sealed({**files, name: npz_bytes(found)}))

    return do


def beside(path: str, content: bytes = b"x") -> Callable[[Path, Files], None]:
    """An honest bundle, and a file somewhere else in the repository."""

    def do(repository: Path, files: Files) -> None:
        put(repository, files)
        target = repository / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    return do


def named(name: str) -> Callable[[Path, Files], None]:
    """A bundle under another folder's name."""
    return lambda repository, files: put(repository, files, name)


def outcomes(change: Callable[[dict[str, np.ndarray], np.ndarray, Any], None]) -> Callable[[Path, Files], None]:
    """An attack that edits the arrays, given which queries' images are kept and the components, with every sum made anew."""

    def do(repository: Path, files: Files) -> None:
        from dmlbench.compact import npz_bytes, unstacked, untabulated
        from dmlbench.evaluate import retention, scores
        from dmlbench.protocols import load_protocol
        from dmlbench.submission.bundle import read_arrays

        components = load_protocol("ers-digits").components
        stored = untabulated(read_arrays(files["run/per_query.npz"], ""))
        kept = np.isin(stored["query"], unstacked(read_arrays(files["run/adversarial_sample.npz"], ""))["rows"])
        found = {k: v.copy() for k, v in stored.items()}
        change(found, kept, components)
        e = json.loads(files["run/evaluation.json"])
        parts, e["ers"], e["ers_interval"] = scores(components, found, {}, complete=True)
        e["measurements"] = [part.model_dump() for part in parts]
        e["extras"]["retention"] = retention(parts, e["benign"])
        content = yaml.safe_load(files["submission.yaml"])
        content["stated"]["ers"] = e["ers"]
        put(repository, sealed({
            **files,
            "run/evaluation.json": json.dumps(e).encode(),
            "run/per_query.npz": npz_bytes(found),
            "submission.yaml": yaml.safe_dump(content).encode(),
        }))  # fmt: skip

    return do


def invented(found: dict[str, np.ndarray], kept: np.ndarray, components: Any) -> None:
    """Outcomes that nobody measured for all queries whose images are not kept."""
    best = {"CA+": 50.0, "CA-": 0.5, "QA+": 50.0, "QA-": 0.5, "TMA": 0.0, "ES:D": 0.0, "GTT": 100.0}
    for c in components:
        values = found[f"{c.name}/value"]
        free = ~kept & ~np.isnan(values)
        values[free] = best.get(c.name, found["benign/recall_at_1"][free])


def without_the_broken(found: dict[str, np.ndarray], kept: np.ndarray, components: Any) -> None:
    """Half of the broken queries have no outcome, as those have none that have no other image of their class."""
    for c in components:
        if c.readout == "recall_at_1":
            values = found[f"{c.name}/value"]
            values[np.flatnonzero((values == 0) & ~kept)[::2]] = np.nan


def linked(repository: Path, files: Files) -> None:
    put(repository, files)
    path = repository / "leaderboard" / "submissions" / ID / "run" / "per_query.npz"
    path.unlink()
    path.symlink_to("/etc/passwd")


def whole_link(repository: Path, files: Files) -> None:
    (repository / "leaderboard" / "submissions" / ID).symlink_to(VICTIM)


def of_other(path: str, content: bytes | None) -> Callable[[Path, Files], None]:
    """A change to a folder that is on the board."""

    def do(repository: Path, files: Files) -> None:
        put(repository, files)
        target = repository / "leaderboard" / "submissions" / VICTIM / path
        if content is None:
            target.unlink()
        else:
            target.write_bytes(content)

    return do


def row(old: bytes, new: bytes) -> Callable[[Path, Files], None]:
    """An edit of a CSV file of the board."""

    def do(repository: Path, files: Files) -> None:
        path = repository / "leaderboard" / "ers-digits" / "digits.csv"
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return do


def other_weights(repository: Path, files: Files) -> None:
    """The weights of another model, with its hash wherever a hash is stated."""
    raw = (ROOT / "dmlbench" / "weights" / f"{OTHER}.safetensors").read_bytes()
    old, new = (hashlib.sha256(r).hexdigest() for r in (files["weights.safetensors"], raw))
    changed = {n: c.replace(old.encode(), new.encode()) for n, c in files.items()}
    put(repository, sealed({**changed, "weights.safetensors": raw}))


def registered(repository: Path, files: Files) -> None:
    """The registered model under its own id and record, with a defence that it never had."""
    from dmlbench.checkpoints import checkpoints

    content, about = json.loads(files[E_]), yaml.safe_load(files[S_])
    content["model"]["id"] = MODEL
    record = checkpoints()[MODEL].model_dump(mode="json", exclude_none=True)
    about["checkpoint"] = {**record, "defense": {"name": "unbreakable"}}
    put(repository, sealed({**files, E_: json.dumps(content).encode(), S_: yaml.safe_dump(about).encode()}))


def better(repository: Path, files: Files) -> None:
    """Clean outcomes of as many queries as rounding may change, all of them raised, with the means made anew."""
    from dmlbench.compact import npz_bytes, untabulated
    from dmlbench.submission.bundle import read_arrays

    arrays = {k: v.copy() for k, v in untabulated(read_arrays(files["run/per_query.npz"], "")).items()}
    content = json.loads(files[E_])
    for name in ("map", "map_at_r"):
        values = arrays[f"benign/{name}"]
        values[np.argsort(values)[:17]] = 100.0
        content["benign"][name] = float(np.nanmean(values.astype(np.float64)))
    put(repository, sealed({**files, E_: json.dumps(content).encode(), "run/per_query.npz": npz_bytes(arrays)}))


def bomb(size: int) -> bytes:
    """An npz whose one array is small bytes of ``size`` zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
        archive.writestr("query.npy", head.getvalue() + bytes(size))
    return stream.getvalue()


def raw(name: str, content: bytes) -> Callable[[Path, Files], None]:
    """A file of the bundle replaced whole."""
    return lambda repository, files: put(repository, sealed({**files, name: content}))


def tensors(header: bytes) -> bytes:
    """A safetensors file of that header."""
    return len(header).to_bytes(8, "little") + header


E_, S_, W_ = "run/evaluation.json", "submission.yaml", "weights.safetensors"
CHEAT = b'{"schema_version":1,"bundle_sha256":"%s","agreed":true}' % (b"0" * 64)
ATTACKS = (
    # those that the first board let pass
    Attack("outcomes invented wherever no image is kept, every sum made anew", outcomes(invented), 3),
    Attack("a self-written verification in the bundle", beside(f"leaderboard/submissions/{ID}/verification.json", CHEAT)),
    Attack("a self-written verification in the board's folder", beside(f"leaderboard/verifications/{ID}.json", CHEAT)),
    Attack("a verification that disputes another's row", beside(f"leaderboard/verifications/{VICTIM}.json", CHEAT.replace(b"true", b"false"))),
    Attack("verification.json in another's folder", of_other("verification.json", CHEAT)),
    Attack("claims.csv in another's folder", of_other("claims.csv", b"x")),
    Attack("claims.csv beside one's own bundle", beside(f"leaderboard/submissions/{ID}/claims.csv")),
    Attack("a folder of claims of one's own", beside("leaderboard/submissions/claimed-mine/claims.csv")),
    Attack("a folder with an umlaut", named("modèle-ers-digits")),
    Attack("a folder in Cyrillic letters that look Latin", named("digits-minе-ers-digits")),
    Attack("a folder in full-width letters", named("ｄigits-mine-ers-digits")),
    Attack("a folder with a line feed", named("digits\nmine")),
    Attack("a folder with a quotation mark", named('digits"mine')),
    Attack("a folder with a command", named("$(touch x)")),
    Attack("a folder in capitals", named("Digits-Mine")),
    Attack("a folder that begins with a hyphen", named("--level=0")),
    Attack("a folder that ends with a dot", named("digits-mine.")),
    Attack("a folder with a tab", named("digits\tmine")),
    Attack("a folder whose name is no UTF-8", named(os.fsdecode(b"digits-\xff"))),
    Attack("a folder with a right-to-left mark", named("digits-\u202emine")),
    Attack("a folder with a space", named("digits mine")),
    Attack("a folder with a combining accent", named("digits-e\u0301")),
    Attack("a name of 300 letters", card(at("id", to="a" * 300))),
    Attack("another id than the folder's", card(at("id", to="digits-other"))),
    Attack("an empty id", card(at("id", to=""))),
    Attack("model.id with a command", run(at("model", "id", to="$(rm -rf ~)"))),
    Attack("model.id with backticks", run(at("model", "id", to="a`id`"))),
    Attack("model.id with quotes", run(at("model", "id", to="a'; true '"))),
    Attack("model.id in Cyrillic", run(at("model", "id", to="digits-minе"))),
    Attack("model.id full-width", run(at("model", "id", to="ｄigits"))),
    Attack("model.id with a control character", run(at("model", "id", to="a\u0007b"))),
    Attack("model.id with a line feed at its end", run(at("model", "id", to="digits-mine\n"))),
    Attack("model.id empty", run(at("model", "id", to=""))),
    Attack("model.id of a registered model with other weights", run(at("model", "id", to=OTHER))),
    Attack("!!binary in the defence's parameters", text(S_, lambda t: t.replace("params: {}", "params: {a: !!binary aGVsbG8=}"))),
    Attack(".nan as a number", text(S_, lambda t: re.sub(r"recall_at_1: .*", "recall_at_1: .nan", t, count=1))),
    Attack("n_gallery 1", run(at("dataset", "n_gallery", to=1))),
    Attack("n_gallery 10^12", run(at("dataset", "n_gallery", to=10**12))),
    Attack("n_gallery as text", run(at("dataset", "n_gallery", to="896"))),
    Attack("n_gallery true", run(at("dataset", "n_gallery", to=True))),
    Attack("n_classes -1", run(at("dataset", "n_classes", to=-1))),
    Attack("n_classes 2", run(at("dataset", "n_classes", to=2))),
    Attack("date yesterday", run(at("date", to="yesterday"))),
    Attack("date in month 13", run(at("date", to="2026-13-01T00:00:00+00:00"))),
    Attack("date without a zone", run(at("date", to="2026-01-01T00:00:00"))),
    Attack("seconds 1e400", text(E_, lambda t: re.sub(r'(?s)"seconds": [0-9.]+(?!.*"seconds")', '"seconds": 1e400', t))),
    Attack("seconds below zero", run(at("seconds", to=-5.0))),
    Attack("AMI removed", run(lambda c: c["benign"].pop("ami"))),
    Attack("a clean metric invented", run(at("benign", "accuracy", to=99.0))),
    Attack("a JSON key twice", text(E_, lambda t: t.replace('"ers":', '"ers": 99.0, "ers":', 1))),
    Attack("NaN in JSON", text(E_, lambda t: re.sub(r'"ers": [0-9.]+', '"ers": NaN', t, count=1))),
    Attack("trained on the test split", card(at("checkpoint", "dataset", "split", to="test"))),
    Attack("FILL-IN left in the title", card(at("title", to="FILL-IN"))),
    Attack("an unknown licence", card(at("checkpoint", "license", to="mine, all mine"))),
    # further ones
    Attack("another's run deleted", of_other("run/per_query.npz", None)),
    Attack("another's submission.yaml edited", of_other("submission.yaml", b"x")),
    Attack("another's weights replaced", of_other("weights.safetensors", b"x")),
    Attack("a new file in another's folder", of_other("readme.md", b"x")),
    Attack("the check script edited", beside(".github/check-submissions.sh", b"exit 0\n")),
    Attack("a workflow edited", beside(".github/workflows/submission.yml", b"on: push\n")),
    Attack("a module that shadows the package", beside("dmlbench/__init__.py")),
    Attack("sitecustomize.py at the root", beside("sitecustomize.py")),
    Attack(".gitattributes that hides differences", beside("leaderboard/.gitattributes", b"* -diff\n")),
    Attack(".gitignore that hides files", beside("leaderboard/submissions/.gitignore", b"*\n")),
    Attack("a program in the bundle", beside(f"leaderboard/submissions/{ID}/setup.py")),
    Attack("a page in the bundle", beside(f"leaderboard/submissions/{ID}/index.html")),
    Attack("a link in the bundle", linked),
    Attack("a link to another's bundle", whole_link),
    Attack("a file instead of a folder", beside("leaderboard/submissions/note")),
    Attack("a board of no submission", beside("leaderboard/ers-28/mine.csv", b"schema_version\n")),
    Attack("a row edited", row(b"reproduced", b"verified")),
    Attack("a row's score edited", row(b",digits,test", b",digits,train")),
    Attack("a copy of another's bundle", lambda r, f: shutil.copytree(r / "leaderboard" / "submissions" / VICTIM, r / "leaderboard" / "submissions" / "digits-copy") and None),
    Attack("a bundle without the CSV files that follow", lambda r, f: put(r, f)),
    Attack("ERS 99 in the run", run(at("ers", to=99.0))),
    Attack("ERS 99 stated", card(at("stated", "ers", to=99.0))),
    Attack("a partial run", run(at("partial", to=["--limit 64"]))),
    Attack("a part left out", run(lambda c: c["measurements"].pop())),
    Attack("another protocol's hash", run(at("protocol", "sha256", to="0" * 64))),
    Attack("another seed", run(at("protocol", "seed", to=7))),
    Attack("the interval made narrow", run(at("ers_interval", to=[22.2, 22.3]))),
    Attack("R@1 of 140 %", run(at("benign", "recall_at_1", to=140.0))),
    Attack("a field that nobody knows", run(at("trusted", to=True))),
    Attack("a formula as device", run(at("environment", "device", to="=HYPERLINK(1)"))),
    Attack("HTML as torch's version", run(at("environment", "torch", to="<script>1</script>"))),
    Attack("a formula as title", card(at("title", to="=1+1"))),
    Attack("HTML as author", card(at("authors", to=["<img src=x>"]))),
    Attack("javascript: as address", card(at("code_url", to="javascript:alert(1)"))),
    Attack("an address of the runner's own network", card(at("checkpoint", "files", 0, "url", to="http://169.254.169.254/"))),
    Attack("a flag with HTML", run(lambda c: c["warnings"].append({"flag": "<b>", "message": "m"}))),
    Attack("another's labels", arrays("run/per_query.npz", lambda a: a["label"].__setitem__(slice(None), 1))),
    Attack("a flag that praises", run(lambda c: c["warnings"].append({"flag": "verified", "message": "m"}))),
    Attack("a smaller eps than the protocol's", run(at("protocol", "eps", to=["8/255"]))),
    Attack("a registered model with another defence", registered),
    Attack("another space of embeddings", run(at("model", "space", to="E")), 1),
    Attack("another loss in the run", run(at("model", "loss", to="magic")), 1),
    Attack("500 queries without a positive", run(at("dataset", "n_without_positive", to=500)), 2),
    Attack("17 clean outcomes better than they are", better, 2),
    Attack("queries in another order", arrays("run/per_query.npz", lambda a: a.update(query=a["query"][::-1].copy()))),
    Attack("outcomes of 101 %", arrays("run/per_query.npz", lambda a: a.update({"CA+/value": np.full(896, 101.0, np.float32)}))),
    Attack("broken queries left out, as if they had no other image of their class", outcomes(without_the_broken)),
    Attack("queries without a positive that all have one", run(at("dataset", "n_without_positive", to=17)), 2),
    Attack("another eps, without a norm", run(lambda c: c["protocol"].update(norm=None, eps=["200/255"]))),
    Attack("perturbations outside the ball", arrays("run/per_query.npz", lambda a: a.update({"CA+/norm": np.full(896, 1.0, np.float32)}))),
    Attack("an index of names twice", arrays("run/adversarial_sample.npz", lambda a: a.update({"stack/names": np.frombuffer(b'["rows","rows"]', np.uint8)}))),
    Attack("an index without values", arrays("run/adversarial_sample.npz", lambda a: a.pop("stack/values"))),
    Attack("a pickle as array", raw("run/per_query.npz", b"\x80\x04]\x94.")),
    Attack("300 MB of zeros in a small archive", raw("run/per_query.npz", bomb(300_000_000))),
    Attack("33,000 keys in YAML", raw(S_, b"".join(b"k%d: 1\n" % i for i in range(22_000)))),
    Attack("YAML nested 100,000 deep", raw(S_, b"[" * 100_000)),
    Attack("YAML with an alias bomb", raw(S_, b"a: &a [1]\nb: [*a, *a]\n")),
    Attack("YAML with a number of 200,000 hexadecimal digits", raw(S_, b"a: 0x" + b"f" * 200_000)),
    Attack("YAML in base 60", raw(S_, b"a: 1" + b":59" * 60_000)),
    Attack("YAML that makes an object", raw(S_, b"!!python/object/apply:os.system ['true']")),
    Attack("JSON nested 100,000 deep", raw(E_, b"[" * 100_000)),
    Attack("a number of 5,000 digits in JSON", text(E_, lambda t: t.replace('"seed": 0', '"seed": ' + "9" * 5000, 1))),
    Attack("a pickle as weights", raw(W_, b"\x80\x04N.")),
    Attack("a page as weights", raw(W_, b"<!doctype html>")),
    Attack("200,000 empty tensors", raw(W_, tensors(json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}).encode())), 1),
    Attack("a tensor that claims 100 TB", raw(W_, tensors(b'{"a":{"dtype":"F32","shape":[25000000000000],"data_offsets":[0,100000000000000]}}')), 1),
    Attack("another model's weights", other_weights, 1),
    Attack("no weights, and no address of them", lambda r, f: (put(r, sealed({k: v for k, v in f.items() if k != W_}))), 1),
    Attack("clean images for adversarial ones", arrays("run/adversarial_sample.npz", lambda a: a.update({"stack/index": a["stack/index"][..., [0] * a["stack/index"].shape[-1]]})), 2),
)  # fmt: skip


def honest(folder: Path) -> Files:
    """An honest bundle: a run on the board, as a model that is not registered."""
    from dmlbench.checkpoints import File, checkpoints
    from dmlbench.results import load, save
    from dmlbench.submission.pack import draft, pack

    e = load(BOARD / f"{MODEL}-ers-digits" / "run")
    own = e.model.model_copy(update={"id": "digits-mine"})
    save(e.model_copy(update={"model": own}).with_arrays(e.arrays, e.sample), folder / "run")
    entry = checkpoints()[MODEL].model_copy(update={"files": (File(sha256=e.model.weights_sha256),)})
    words = draft(folder / "run", entry).replace("license: FILL-IN", "license: MIT").replace("FILL-IN", "A. Tester")
    (folder / "submission.yaml").write_text(words, encoding="utf-8")
    weights = ROOT / "dmlbench" / "weights" / f"{MODEL}.safetensors"
    return pack(folder / "run", folder / "submission.yaml", weights)


def scratch(folder: Path) -> Path:
    """A repository with a board of one run of another model, committed."""
    repository = folder / "repository"
    shutil.copytree(BOARD / VICTIM, repository / "leaderboard" / "submissions" / VICTIM)
    shutil.copytree(ROOT / ".github", repository / ".github")
    inside(repository, ["leaderboard", "build"])
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "board")):
        git(repository, *words)
    return repository


def git(repository: Path, *words: str) -> None:
    named = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *named, *words], cwd=repository, check=True, capture_output=True)


def inside(folder: Path, words: list[str]) -> tuple[int, str]:
    """Exit code and output of ``dmlbench WORDS`` in ``folder``, in a fork of this process: its imports are done."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = (open(stream, "w", closefd=False, encoding="utf-8") for stream in (1, 2))  # noqa: SIM115
            os.chdir(folder)
            sys.argv = ["dmlbench", *words]
            from dmlbench.cli import main

            main()
            code = 0
        except SystemExit as left:  # what the command line ends with
            code = left.code if isinstance(left.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        printed = stream.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


def check(repository: Path, level: int) -> tuple[int, str]:
    """What ``.github/check-submissions.sh`` gives: the script runs, and the command that it ends in runs in a fork."""
    with tempfile.TemporaryDirectory() as shims:
        shim = Path(shims) / "python"
        shim.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
        shim.chmod(0o755)
        environment = {**os.environ, "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}", "LEVEL": str(level)}
        script = ["bash", ".github/check-submissions.sh", "HEAD"]
        done = subprocess.run(script, cwd=repository, env=environment, check=True, capture_output=True, text=True)
    module, package, *words = done.stdout.split("\0")[:-1]
    assert (module, package) == ("-m", "dmlbench")
    return inside(repository, words)


def replay(attack: Attack, repository: Path, files: Files) -> tuple[int, str]:
    """Exit code and first reason of one attack; the repository is as before afterwards."""
    script = (repository / ".github" / "check-submissions.sh").read_bytes()
    attack.do(repository, dict(files))
    proposed = repository / ".github" / "check-submissions.sh"
    changed = proposed.read_bytes()
    try:
        if changed != script:  # CI runs the script of the branch that is joined, on the checkout that is proposed
            shutil.copy(ROOT / ".github" / "check-submissions.sh", repository.parent / "trusted.sh")
            return inside(repository, ["leaderboard", "admit", "HEAD", "--level", str(attack.level)])
        return check(repository, attack.level)
    finally:
        git(repository, "reset", "-q", "--hard")
        git(repository, "clean", "-qfdx")


def said(printed: str) -> str:
    """The first reason, as a cell of a table."""
    lines = [line for line in printed.splitlines() if line.startswith("REFUSED")] or printed.splitlines()[-1:] or [""]
    text = (
        lines[0].removeprefix("REFUSED ").replace("|", r"\|").replace("`", "'").replace("<", "&lt;").replace("[", r"\[")
    )
    return text[:180] + ("…" if len(text) > 180 else "")


HEAD = """# Forgeries

Each attack below is replayed in a scratch git repository against `.github/check-submissions.sh`, which has to refuse it;
"asked for" is the level that it was checked at. This page is written by

```
python benchmarks/forgeries.py --out docs/forgeries.md
```

| attack | asked for | refused at | first reason |
|---|---:|---:|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument("--most", type=int, default=4, help="attacks up to this level")
    options = parser.parse_args()
    lines, passed = [], []
    from dmlbench.submission import validate  # noqa: F401  (before any fork)

    with tempfile.TemporaryDirectory() as folder:
        files = honest(Path(folder))
        repository = scratch(Path(folder))
        for attack in ATTACKS:
            if options.only not in attack.name or attack.level > options.most:
                continue
            code, printed = replay(attack, repository, files)
            level = re.search(r"REFUSED level (\d)", printed)
            if code != 1 or level is None:
                passed.append(attack.name)
            lines.append(f"| {attack.name} | {attack.level} | {level[1] if level else '–'} | {said(printed)} |")
            print(lines[-1], flush=True)
        if not options.only:
            put(repository, files)
            inside(repository, ["leaderboard", "build"])
            code, printed = check(repository, min(3, options.most))
            print(printed)
            if code:
                passed.append("the honest bundle is refused")
    print(f"{len(lines)} attacks, {len(passed)} not refused{': ' if passed else ''}{', '.join(passed)}")
    if options.out:
        options.out.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
