# %% [markdown]
# # What each score measures, in pictures
#
# A picture of two pixels can be drawn as a point: its first pixel to the right, its second upwards. The model on this
# page does nothing, so the embedding of a picture is that very point, and everything that an attack does can be seen.
# The attacks are the suite's own; nothing here is drawn by hand.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import dmlbench
from dmlbench.attacks import ATTACKS, measure
from dmlbench.board.plots import parts
from dmlbench.datasets.base import RetrievalDataset, TensorImages
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.protocols import load_protocol
from dmlbench.run.search import aimed, run_search, searches
from dmlbench.run.subject import Silent, prepare

draw = np.random.default_rng(7)
middles = np.array([[0.25, 0.3], [0.72, 0.35], [0.45, 0.75]])
points = np.concatenate([middle + 0.09 * draw.standard_normal((40, 2)) for middle in middles]).clip(0.03, 0.97)
images = torch.from_numpy(points.astype(np.float32)).reshape(-1, 2, 1, 1)  # 2 channels, 1 x 1
dataset = RetrievalDataset("two pixels", "test", TensorImages(images), np.repeat([0, 1, 2], 40))
model = Embedder(torch.nn.Flatten(), (2, 1, 1), distance=DISTANCES["E"], name="nothing")
subject = prepare(model, dataset, device="cpu")
edge = int(points[:40, 0].argmax())  # the picture of the first class that is furthest to the right
protocol = load_protocol("ers-28").at_eps(("38/255",))  # eps 0.15: how far a pixel may be changed

# %% [markdown]
# The words of the pictures below:
#
# - Circles, triangles and crosses are the **gallery**, the pictures that are searched; each shape is a class.
# - The white star is the picture under attack, a **query** (or a **candidate**, a picture that others find). The square
#   around it is all that an adversary may do: every pixel may change by at most **eps**.
# - The blue star is where the attack ended. A ring marks the **target**, where the attack has one.
#
# Above each picture stands what is read, before and after. The better a model withstands, the less changes.


# %%
def pictured(part, row, axes, words):
    """Draw what one part of ERS does to the picture in ``row``, and what is read of it."""
    search = next(s for s in searches(protocol, protocol.components) if any(c.name == part for c in s.components))
    component = next(c for c in search.components if c.name == part)
    scene = aimed(subject, search, protocol.seed)
    _, moved = run_search(subject, search, protocol.seed, len(points), Silent(), keep=np.arange(len(points)))
    attack = ATTACKS[search.attack]
    before, after = (
        measure(subject.embedder, attack, search.threat, torch.as_tensor(x), images, scene)[component.readout][row]
        for x in (images, moved)
    )
    eps = search.threat.radius
    for label, marker in enumerate("o^x"):
        there = points[dataset.labels == label]
        axes.scatter(*there.T, marker=marker, color=f"{0.25 + 0.2 * label}", s=12)
    low, high = np.maximum(points[row] - eps, 0), np.minimum(points[row] + eps, 1)
    axes.add_patch(plt.Rectangle(low, *(high - low), fill=False, linestyle=":", edgecolor="0.4"))
    for target in scene.chosen[row].tolist():
        axes.scatter(*points[target], s=130, facecolors="none", edgecolors="#b4510f", linewidths=1.6)
    start, end = points[row], moved[row].reshape(2)
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-", "color": "#0b57a4", "linewidth": 1.4})
    axes.scatter(*start, marker="*", s=90, color="white", edgecolors="#0b57a4", zorder=3)
    axes.scatter(*end, marker="*", s=150, color="#0b57a4", edgecolors="white", zorder=3)
    axes.set(title=f"{part}: {words}\n{before:.3g} → {after:.3g}", xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    axes.title.set_fontsize(9)
    axes.set_aspect("equal")


def row_of(chosen, row):
    figure, axes = plt.subplots(1, len(chosen), figsize=(3.1 * len(chosen), 3.5), layout="constrained")
    for one, (part, words) in zip(axes, chosen.items(), strict=True):
        pictured(part, row, one, words)
    plt.close(figure)
    return figure


# %% [markdown]
# ## Candidate attacks: who is found
#
# A seller changes the picture of a product. **CA+**: it rises in the list of a query that it has nothing to do with.
# **CA-**: it sinks in the list of a query that it belongs to. What is read is its place in that list, in percent: 0 is the
# top. The ring is the query.

# %%
row_of({"CA+": "rise for the query", "CA-": "sink for the query"}, 11)

# %% [markdown]
# ## Query attacks: what is found
#
# The one who searches is attacked, or attacks: the query is changed, the gallery is not. **QA+** lifts a candidate
# (ring) in the query's list, **QA-** lowers one. Read, again, is its place in percent.

# %%
row_of({"QA+": "lift the candidate", "QA-": "lower the candidate"}, 2)

# %% [markdown]
# ## Looking like another, and unlike oneself
#
# **TMA** makes the query look like another picture (ring): what is read is the cosine of the two embeddings, 1 is the
# same direction. **ES** moves the query as far from where it was as it can. **ES:D** reads how far it came; **ES:R** reads
# whether the nearest other picture is still of the query's class (100) or not (0).

# %%
row_of({"TMA": "look like the target", "ES:D": "come far", "ES:R": "come far, still found?"}, edge)

# %% [markdown]
# ## Misranking
#
# **LTM** pulls the query to pictures of other classes and away from its own, **GTM** goes straight for the nearest picture of
# another class (ring); both read R@1. **GTT** only wants the picture that is nearest (ring) out of the first four
# places; it reads whether it stays among them (100) or not (0).

# %%
row_of({"LTM": "others before one's own", "GTM": "to the nearest other", "GTT": "lose the nearest"}, edge)

# %% [markdown]
# ## ERS: the mean of ten
#
# Each part is stretched so that 0 is a model that gives in and 100 one that withstands, as
# [the protocols](../protocols.md) say; the Empirical Robustness Score is their mean over all queries. So two models with the
# same ERS can have very different parts, which is why a board shows them all.

# %%
plain = dmlbench.evaluate("digits-smallcnn-triplet-none", limit=32, device="cpu")
hardened = dmlbench.evaluate("digits-smallcnn-triplet-hm-lga-ics", limit=32, device="cpu")
parts([("no defence", plain), ("HM & ICS", hardened)])

# %% [markdown]
# ## Worst case: what is left under all attacks together
#
# A part asks what one attack does. The [strict protocol](../strict.md) asks what is left when many searches try in turn, at
# every eps of a grid: a query counts as right only if none of them moves it to a place where another class is nearest.
# Below, the plane again: around every eighth picture (ring) the smallest square that reaches such a place. The median of their sizes over the queries is
# the headline of `strict`, the **smallest eps that breaks a query**.

# %%
figure, axes = plt.subplots(figsize=(4.6, 4.6), layout="constrained")
grid = np.stack(np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201)), axis=-1).reshape(-1, 2)
sizes = []
for row, point in enumerate(points):
    others = np.arange(len(points)) != row
    nearest = np.linalg.norm(grid[:, None] - points[None, others], axis=2).argmin(1)
    wrong = dataset.labels[others][nearest] != dataset.labels[row]
    sizes.append(np.abs(grid[wrong] - point).max(axis=1).min())
    corner = point - sizes[-1]
    if row % 8 == 0:
        axes.add_patch(plt.Rectangle(corner, 2 * sizes[-1], 2 * sizes[-1], fill=False, edgecolor="0.6", linewidth=0.8))
        axes.scatter(*point, s=60, facecolors="none", edgecolors="0.3", linewidths=0.8)
for label, marker in enumerate("o^x"):
    axes.scatter(*points[dataset.labels == label].T, marker=marker, color=f"{0.25 + 0.2 * label}", s=12)
axes.set(title=f"smallest eps, median {np.median(sizes):.3f}", xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
axes.set_aspect("equal")
plt.close(figure)
figure

# %% [markdown]
# ## Clusters
#
# The [clustering protocol](../protocols.md) moves every picture at once and asks whether the classes can still be found
# by k-means: **NMI** is 100 where clusters and classes agree and 0 where one says nothing of the other. An attack does not
# have to carry a picture into another class: it is enough to mix the clusters.
