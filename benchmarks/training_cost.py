"""What a training step of HM costs against the passes that nobody can avoid.

    python benchmarks/training_cost.py [--arch timm:resnet18] [--size 224] [--groups 2] [--eta 8]

The yardstick is η forward + input-backward passes on the triplets and one training forward-backward
on them, with the same network, images and precision. The reach is 1.15 for HM[S,g_LGA] at η = 8.
"""

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor, nn

from dmlbench.embedding import Embedder
from dmlbench.models import build_network
from dmlbench.rng import Rng
from dmlbench.threat import Threat
from dmlbench.training.defenses import DEFENSES, Batch, Inner, Learner
from dmlbench.training.defenses.base import frozen, triples
from dmlbench.training.losses import MARGIN, build_loss, hardness, triplet


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@click.command()
@click.option("--arch", default="timm:resnet18", show_default=True)
@click.option("--size", default=224, show_default=True)
@click.option("--channels", default=3, show_default=True)
@click.option("--groups", default=2, show_default=True, help="Anchors of a batch; each has one triplet.")
@click.option("--eta", default=8, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(arch: str, size: int, channels: int, groups: int, eta: int, repeats: int, device: str) -> None:
    """Print the seconds of both and their ratio."""
    torch.manual_seed(0)
    where = torch.device(device)
    kwargs = {} if ":" in arch else {"channels": channels, "size": size}
    embedder = Embedder(build_network(arch, embed_dim=128, kwargs=kwargs).network, (channels, size, size)).to(where)
    criterion = build_loss("triplet", groups, 128, embedder.distance, {"margin": MARGIN})
    learner = Learner(embedder.train(), nn.ModuleList([criterion]), "triplet").to(where)
    learner.previous.fill_(0.0)
    rows = torch.arange(2 * groups, device=where)
    images = Rng(0, rows).uniform(channels, size, size)
    batch = Batch(images, rows // 2, rows[::2], rows.cpu().numpy(), seed=0)
    inner = Inner(Threat(eps="8/255", step="1/255", steps=eta))
    x = images[torch.arange(3 * groups, device=where) % len(images)]

    def step() -> None:
        learner.zero_grad()
        loss: Tensor = DEFENSES["hm"].step(learner, batch, inner, source="S", destination="LGA")
        loss.backward()

    def unavoidable() -> None:
        with frozen(learner):
            for _ in range(eta):
                moving = x.clone().requires_grad_(True)
                embedder(moving).sum().backward()
        learner.zero_grad()
        triplet(hardness(embedder.distance, triples(embedder(x)))).mean().backward()

    step(), unavoidable()
    pairs = [(seconds(step, where), seconds(unavoidable, where)) for _ in range(repeats)]
    ours, bare = (min(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    click.echo(f"{arch} at {size}, {groups} triplets, η = {eta}: step {ours:.2f} s, unavoidable {bare:.2f} s")
    click.echo(f"ratio {ratio:.3f} (median of {repeats}; reach 1.15)")


if __name__ == "__main__":
    main()
