"""Our ten published parts beside a second writing of the field's public battery, in plain loops, on any registered model.

    python benchmarks/published_parity.py [--limit N] [--seeds N | --starts] [MODEL ...]

Nothing of dmlbench's attacks is used here but the network and the images. The distances are torch's own
(``cdist``, ``norm``, ``pairwise_distance`` with the 1e-6 that it adds to every difference), taken where the public code
takes them. Targets that are drawn come from ``torch.manual_seed``, once for each of ``--seeds``; parts without chance
must agree to the query. A few seconds a model and seed on digits, a minute or so on MNIST (``--limit 250``).

``--starts`` instead shows where embedding shift may begin: from the clean image along -1 or along +1, for each image the
farther of these two runs, or the farther of two from random starts, which the corrected protocols take.
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dmlbench
from dmlbench.datasets import load_dataset
from dmlbench.task import default_dataset, default_protocol
from dmlbench.threat import Threat

MODELS = (
    "digits-smallcnn-triplet-none",
    "digits-smallcnn-triplet-hm-lga-ics",
    "digits-smallcnn-proxyanchor-at",
    "omniglot-small-conv3-triplet-none-2",
    "omniglot-small-conv3-triplet-hm-lga-ics-2",
    "mnist-conv3-triplet-none-2",
    "mnist-conv3-triplet-hm-lga-ics-2",
)
PARTS = ("CA+", "CA-", "QA+", "QA-", "TMA", "ES:D", "ES:R", "LTM", "GTM", "GTT")
DRAWN = ("CA+", "CA-", "QA+", "QA-", "TMA")
"""Parts whose targets are drawn."""
BLOCK = 256

Forward = Callable[[Tensor], Tensor]


def embeddings(forward: Forward, images: Tensor) -> Tensor:
    """(n, d) in blocks, without a graph."""
    with torch.no_grad():
        return torch.cat([forward(images[a : a + BLOCK]) for a in range(0, len(images), BLOCK)])


def descend(
    forward: Forward, x0: Tensor, loss: Callable[[Tensor, int], Tensor], eps: float, alpha: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Embeddings of the images after the last step, and those that the last step was taken from."""
    x, before = x0.clone(), x0
    for step in range(steps):
        x = x.detach().requires_grad_(True)
        e = forward(x)
        (g,) = torch.autograd.grad(loss(e, step).sum(), x)
        before = e.detach()
        x = x.detach() - alpha * g.sign()
        x = torch.max(torch.min(x, x0 + eps), x0 - eps).clamp(0.0, 1.0)
    with torch.no_grad():
        return forward(x), before


class Battery:
    """The ten parts on a batch of queries ``x`` (b, c, h, w), whose gallery is ``X`` (n, d) with labels ``y``."""

    def __init__(
        self, forward: Forward, x: Tensor, labels: Tensor, X: Tensor, y: Tensor, eps: float, alpha: float, steps: int
    ) -> None:
        self.x, self.labels, self.X, self.y, self.n = x, labels, X, y, len(X)
        self.run = lambda loss: descend(forward, x, loss, eps, alpha, steps)
        with torch.no_grad():
            self.clean = forward(x)
            self.dist = torch.cdist(self.clean, X)
        self.own = self.dist.argmin(1)  # as the public code finds it

    def recall(self, e: Tensor) -> list[float]:
        out = []
        for d, own, label in zip(torch.cdist(e, self.X), self.own, self.labels, strict=True):
            d[own] = torch.inf
            out.append(100.0 * float(self.y[d.argmin()] == label))
        return out

    def head(self, i: int) -> Tensor:
        """Rows of query i's top 1 %, itself left out."""
        return self.dist[i].argsort()[1 : int(0.01 * self.n) + 1]

    def targets(self, sign: str) -> Tensor:
        rows = []
        for i in range(len(self.x)):
            among = torch.arange(self.n) if sign == "+" else self.head(i)
            rows.append(int(among[torch.randint(len(among), (1,))]))
        return torch.tensor(rows)

    def candidate(self, sign: str) -> list[float]:
        """CA: x are candidates, the targets queries."""
        q = self.X[self.targets(sign)]
        to_all = torch.stack([torch.cdist(one[None], self.X)[0] for one in q])
        way = 1.0 if sign == "+" else -1.0
        e, _ = self.run(lambda e, _: (way * ((q - e).norm(dim=1)[:, None] - to_all)).clamp(min=0).mean(1))
        return (100.0 * ((q - e).norm(dim=1)[:, None] > to_all).float().mean(1)).tolist()

    def hinge(self, rows: Tensor, sign: str) -> Tensor:
        """QA, GTT: x are queries; the embeddings that push gallery ``rows`` up or down their lists."""
        c, way = self.X[rows], 1.0 if sign == "+" else -1.0

        def loss(e: Tensor, _: int) -> Tensor:
            one = torch.cat([torch.cdist(e[i : i + 1], c[i : i + 1]) for i in range(len(e))])
            return (way * (one - torch.cdist(e, self.X))).clamp(min=0).mean(1)

        return self.run(loss)[0]

    def query(self, sign: str) -> list[float]:
        rows = self.targets(sign)
        d = torch.cdist(self.hinge(rows, sign), self.X)
        place = [int((line.argsort() == row).nonzero()[0]) for line, row in zip(d, rows, strict=True)]
        return [100.0 * p / self.n for p in place]

    def tma(self) -> list[float]:
        t = self.X[self.targets("+")]
        e, _ = self.run(lambda e, _: 1 - F.cosine_similarity(e, t))
        return F.cosine_similarity(e, t).tolist()

    def es(self) -> tuple[list[float], list[float]]:
        """The reference is moved by 1e-7 at the first step; ES:D is read from before the last one."""
        e, before = self.run(lambda e, step: -F.pairwise_distance(e, self.clean + 1e-7 if step == 0 else self.clean))
        return F.pairwise_distance(before, self.clean).tolist(), self.recall(e)

    def ltm(self) -> list[float]:
        """The own entry counts as a positive."""
        same = self.labels[:, None] == self.y[None]

        def loss(e: Tensor, _: int) -> Tensor:
            d = torch.cdist(e, self.X)
            return (d.masked_fill(same, -torch.inf).amax(1) - d.masked_fill(~same, torch.inf).amin(1)).relu()

        return self.recall(self.run(loss)[0])

    def gtm(self) -> list[float]:
        """A place in the list of entries of another class, used as a row of the gallery."""
        rows = []
        for d, own in zip(self.dist.clone(), self.own, strict=True):
            d[own] = torch.inf
            rank = d.argsort().argsort()
            rows.append(int(rank[self.y != self.y[d.argmin()]].argmin()))
        u = self.X[torch.tensor(rows)]
        return self.recall(self.run(lambda e, _: F.pairwise_distance(e, u))[0])

    def gtt(self) -> list[float]:
        first = torch.stack([d.argsort()[1] for d in self.dist])
        d = torch.cdist(self.hinge(first, "-"), self.X)
        d[torch.arange(len(d)), self.own] = torch.inf
        return (100.0 * (d.topk(4, largest=False).indices == first[:, None]).any(1).float()).tolist()

    def parts(self, wanted: tuple[str, ...]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for part in wanted:
            if part in ("ES:D", "ES:R"):
                if "ES:D" not in found:
                    found["ES:D"], found["ES:R"] = self.es()
            elif part[:2] == "CA":
                found[part] = self.candidate(part[2])
            elif part[:2] == "QA":
                found[part] = self.query(part[2])
            else:
                found[part] = getattr(self, part.lower())()
        return found


def published(
    forward: Forward,
    dataset: dmlbench.RetrievalDataset,
    rows: np.ndarray,
    threat: Threat,
    wanted: tuple[str, ...] = PARTS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Per query, each wanted part as the public battery has it."""
    torch.manual_seed(seed)
    X = embeddings(forward, dataset.images[dataset.gallery])
    y = torch.from_numpy(dataset.labels[dataset.gallery])
    out: dict[str, list[float]] = {}
    for a in range(0, len(rows), BLOCK):
        some = rows[a : a + BLOCK]
        labels = torch.from_numpy(dataset.labels[some])
        battery = Battery(forward, dataset.images[some], labels, X, y, threat.radius, threat.stride, threat.steps)
        for part, values in battery.parts(wanted).items():
            out.setdefault(part, []).extend(values)
    return {part: np.array(values) for part, values in out.items()}


def both(model: str, limit: int | None, seeds: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Ours by part, and the public battery's means by part and seed; "ERS" too."""
    embedder = dmlbench.load_model(model)
    dataset = load_dataset(default_dataset(embedder), preprocess=embedder.preprocess)
    rules = dmlbench.load_protocol(f"{default_protocol(dataset)}-published")
    done = dmlbench.evaluate(embedder, dataset, rules, limit=limit, device="cpu")
    ours = {m.component: m.value for m in done.measurements} | {"ERS": done.ers}
    threat = Threat.of(rules.threat)
    forward = embedder.frozen()
    theirs: dict[str, list[float]] = {}
    for seed in range(seeds):
        wanted = PARTS if seed == 0 else DRAWN
        found = published(forward, dataset, done.arrays["query"], threat, wanted, seed)
        for part in PARTS:
            theirs.setdefault(part, []).append(float(found[part].mean()) if part in found else theirs[part][0])
    scores = [[float(rules.component(p).rescale(theirs[p][s])) for p in PARTS] for s in range(seeds)]
    theirs["ERS"] = np.mean(scores, axis=1).tolist()
    return {p: float(v) for p, v in ours.items() if v is not None}, {p: np.array(v) for p, v in theirs.items()}


def table(models: list[str], limit: int | None, seeds: int) -> str:
    """Markdown: a row for each model, ours / the public battery's mean ± deviation over seeds."""
    lines = ["| model | " + " | ".join((*PARTS, "ERS")) + " |", "| --- |" + " ---: |" * (len(PARTS) + 1)]
    for model in models:
        ours, theirs = both(model, limit, seeds)
        cells = []
        for part, values in theirs.items():
            digits = 3 if part in ("TMA", "ES:D") else 1
            spread = f" ± {values.std():.{digits}f}" if part in (*DRAWN, "ERS") else ""
            cells.append(f"{ours[part]:.{digits}f} / {values.mean():.{digits}f}{spread}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def starts(models: list[str], limit: int | None) -> str:
    """Markdown: ES:D and ES:R of each way to begin, under the corrected protocol's threat."""
    ways = ("-1", "+1", "farther of -1 and +1", "two random starts")
    lines = ["| model, ES:D / ES:R | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * len(ways)]
    for model in models:
        wanted = ["ES:D", "ES:R", "ES@pgd", "ES-published@pgd"]
        found = dmlbench.evaluate(model, attacks=wanted, limit=limit, device="cpu").arrays
        shift, right = (
            [found[f"{attack}@pgd:{readout}/value"] for attack in ("ES", "ES-published")]
            for readout in ("embedding_shift", "recall_at_1")
        )
        both = list(zip(shift, right, strict=True))
        both.append((np.maximum(*shift), np.where(shift[1] > shift[0], right[1], right[0])))
        both.append((found["ES:D/value"], found["ES:R/value"]))
        lines.append(f"| {model} | " + " | ".join(f"{d.mean():.3f} / {np.nanmean(r):.1f}" for d, r in both) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="published_parity.py", description="Our published parts beside plain loops.")
    options.add_argument("models", nargs="*", default=list(MODELS), help="registered ids")
    options.add_argument("--limit", type=int, help="only this many queries of each")
    options.add_argument("--seeds", type=int, default=3, help="how often the targets are drawn")
    options.add_argument("--starts", action="store_true", help="where embedding shift may begin")
    given = options.parse_args()
    torch.set_num_threads(1)
    print(starts(given.models, given.limit) if given.starts else table(given.models, given.limit, given.seeds))
