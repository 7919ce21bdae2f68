# %% [markdown]
# # Write an attack
#
# An attack is an objective, a loss for each image that the adversary makes small, aimed at chosen targets, followed by
# an optimizer inside a ball of small perturbations. To invent one is to write the objective: a function of the
# embeddings and of what the adversary knows.

# %%
import torch

import dmlbench
from dmlbench.attacks import Attack
from dmlbench.objectives import OBJECTIVES

# %% [markdown]
# ## The objective
#
# The idea: carry an image away from the centre of its own class. `e` holds the embeddings of the images under attack,
# (B, D). `scene.gallery.embeddings`, (N, D), are those of the images that are searched, and `scene.same`, (B, N), is
# true where a gallery image is of the query's class; the query's own entry is left out. The result is one loss for
# each image, (B,): no image may know of another, so that the batch size never changes a result.


# %%
def leave_class(e, scene):
    """Minus the Euclidean distance to the mean embedding of the other images of the class."""
    weights = scene.same.float()  # (B, N)
    centre = weights @ scene.gallery.embeddings / weights.sum(1, keepdim=True)  # (B, D)
    return -(e - centre).norm(dim=1)


# %% [markdown]
# ## Check the formula
#
# The same in plain loops, on random embeddings. Each formula of dmlbench has such a twin in its tests.

# %%
from dmlbench import DISTANCES
from dmlbench.scene import Gallery, Scene

draw = torch.Generator().manual_seed(0)
gallery = Gallery(torch.randn(12, 4, generator=draw), torch.arange(12) % 3)
queries = torch.tensor([0, 5, 7])
scene = Scene(
    DISTANCES["E"], gallery, gallery.embeddings[queries], gallery.labels[queries], queries, torch.empty(3, 0).long()
)
moved = scene.clean + 0.1 * torch.randn(3, 4, generator=draw)

for loss, e, row in zip(leave_class(moved, scene), moved, queries, strict=True):
    others = [i for i in range(12) if gallery.labels[i] == gallery.labels[row] and i != row]
    centre = sum(gallery.embeddings[i] for i in others) / len(others)
    expected = -(sum((a - b) ** 2 for a, b in zip(e, centre, strict=True)) ** 0.5)
    assert abs(loss - expected) < 1e-5

# %% [markdown]
# ## Name it
#
# An `Attack` says which objective, which targets (none here) and what is read: the share of queries whose nearest
# image is still of their class.

# %%
OBJECTIVES.add("leave_class", leave_class)
dmlbench.ATTACKS.add("leave-class", Attack("leave one's class", "leave_class", "", ("recall_at_1",), "this notebook"))

# %% [markdown]
# ## Run it
#
# Any model, data set, threat and optimizer goes with it: `NAME@OPTIMIZER`. Here it stands beside two attacks of the
# literature on one model and 128 queries, in the ball of the protocol `ers-digits`.

# %%
attacks = ["leave-class@pgd", "leave-class@apgd", "LTM@pgd", "GTM@pgd"]
result = dmlbench.evaluate("digits-smallcnn-triplet-hm-lga-ics", attacks=attacks, limit=128)
frame = result.to_frame().set_index("component")[["value", "low", "high"]].round(1)
frame

# %% [markdown]
# `value` is R@1 in %: the lower, the stronger the attack. Without an attack it is

# %%
round(result.benign["recall_at_1"], 1)

# %% [markdown]
# Does it find what others miss? Count the queries that it breaks and that GTM leaves alone.

# %%
queries = result.to_frame("queries")
mine, theirs = queries["leave-class@pgd/value"], queries["GTM@pgd/value"]
int(((mine == 0) & (theirs > 0)).sum()), int(((mine > 0) & (theirs == 0)).sum())

# %% [markdown]
# ## Give it to others
#
# A package of yours that adds both entries in a module of the entry-point group `dmlbench.plugins` makes the attack
# known to every command: [extending](../extend.md).
