"""How far the numbers of ``clustering`` move when nothing but a rounding changes.

    python benchmarks/clustering_rounding.py digits-smallcnn-triplet-hm-lga-ics@40/255 --copies 5

Each CELL is MODEL@EPS, a registered model and an eps of the protocol's grid. The protocol's attacks are run on copies of the model, whose weights (but for the first copy's) are
multiplied by 1 + u, with u normal of a standard deviation of one float32 epsilon: as far as other hardware rounds otherwise. The
table gives the lowest and the highest of each number over the copies.
"""

import argparse

import torch

from dmlbench import load_dataset, load_model, load_protocol
from dmlbench.cluster_attacks import CLUSTER_ATTACKS
from dmlbench.fast.exact import true_float32
from dmlbench.kinds.clustering.search import groups, measured, union
from dmlbench.kinds.clustering.summary import components, numbers
from dmlbench.run.subject import prepare

EPSILON = torch.finfo(torch.float32).eps


@true_float32()
def copy_of(model: str, eps: str, seed: int) -> dict[str, dict[str, float]]:
    """The numbers of each attack on one copy; the first, 0, is the model itself."""
    rules, embedder = load_protocol("clustering"), load_model(model)
    dataset = load_dataset(str(embedder.card.dataset.name))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in embedder.network.parameters():
            p.mul_(1 + (EPSILON if seed else 0.0) * torch.randn(p.shape, generator=generator))
    if eps not in (grid := rules.eps_for(dataset.images.shape)):
        raise SystemExit(f"{eps} is not on the grid of {model}'s data set: {', '.join(grid)}")
    subject = prepare(embedder, dataset, limit=rules.measured(len(dataset.query)), device="cpu")
    labels, image_groups = subject.scene.labels.numpy(), groups(subject, rules)
    found, given = [], {}
    for part in components(rules, dataset.images.shape):
        if not part.name.endswith(f"@{eps}"):
            continue
        if CLUSTER_ATTACKS[part.attack].way == "union":
            outcomes = union(subject, rules, image_groups[True], found)
        else:
            outcomes = measured(subject, rules, part, image_groups, rules.seed)[1]
            found.append(outcomes)
        given[part.attack] = numbers(labels, outcomes["clusters"], outcomes["value"])
    return given


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", metavar="CELL", help="MODEL@EPS")
    parser.add_argument("--copies", type=int, default=5)
    args = parser.parse_args()
    print("| model | eps | attack | NMI | AMI | pair F1 | R@1 |\n|---|---|---|---|---|---|---|")
    for cell in args.cells:
        model, _, eps = cell.rpartition("@")
        copies = [copy_of(model, eps, seed) for seed in range(args.copies)]
        for attack in copies[0]:
            ranges = (
                f"{min(values):.1f} – {max(values):.1f}"
                for values in ([c[attack][key] for c in copies] for key in ("nmi", "ami", "f1", "recall_at_1"))
            )
            print(f"| {model} | {eps} | {attack} | {' | '.join(ranges)} |", flush=True)


if __name__ == "__main__":
    main()
