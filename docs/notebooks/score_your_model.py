# %% [markdown]
# # Score your model
#
# From a network of your own to its robustness, on a laptop, without a download: the images are scikit-learn's digits,
# 8×8 pixels. Classes 0 to 4 are for training; the test asks for images of the unseen classes 5 to 9.

# %%
import numpy as np
import torch
from torch import nn

import dmlbench

torch.manual_seed(0)

train = dmlbench.load_dataset("digits", "train")
test = dmlbench.load_dataset("digits")
test

# %% [markdown]
# ## A network
#
# Any `torch.nn.Module` will do that maps images of shape (b, channels, height, width), with values in [0, 1], to
# embeddings of shape (b, d). This one is trained for a moment with a contrastive loss: images of one class are to
# lie at a cosine of 1, images of two classes below 0.3.

# %%
network = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 32))

images = train.images[np.arange(len(train.labels))]  # (b, 1, 8, 8) float32 in [0, 1]
labels = torch.from_numpy(train.labels)
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
for _ in range(100):
    batch = torch.randint(len(labels), (128,))
    embeddings = nn.functional.normalize(network(images[batch]), dim=1)
    cosine = embeddings @ embeddings.T
    same = labels[batch, None] == labels[batch]
    loss = torch.where(same, 1 - cosine, (cosine - 0.3).relu()).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% [markdown]
# ## The score
#
# `load_model` wraps the network. `mean` and `std` would be given here if it had been trained on normalised images;
# never normalise before, since the attacks work on pixels in [0, 1].

# %%
model = dmlbench.load_model(network.eval(), input_shape=(1, 8, 8), name="mine")
result = dmlbench.evaluate(model, test, limit=64)
result

# %% [markdown]
# Each part is one attack, its score is 100 for a model that withstands it and 0 for one that gives in; ERS is the mean of
# the ten. `limit=64` attacks 64 of the 896 queries and marks the result *partial*: leave it out for a
# number to report. The clean numbers, without any attack, are in `benign`:

# %%
{name: round(value, 1) for name, value in result.benign.items()}

# %%
result.to_frame()[["component", "value", "score", "low", "high"]].round(1)

# %% [markdown]
# ## Beside a robust model
#
# The registry has models that were trained to withstand attacks. `compare` pairs the two results query by query.

# %%
robust = dmlbench.evaluate("digits-smallcnn-triplet-hm-lga-ics", test, limit=64)
difference = dmlbench.compare(robust, result, labels=("robust", "mine"))
print(difference)

# %%
result.plot()

# %% [markdown]
# ## Keep it
#
# `save` writes the run folder that `dmlbench report`, `table`, `plot`, `compare` and `submit` take.

# %%
result.save("runs/mine")

# %% [markdown]
# On data of your own: `dmlbench.RetrievalDataset("mine", "test", dmlbench.TensorImages(images), labels)`, or
# `dmlbench.load_dataset("folder:/my/pictures")`, a folder with a folder of pictures for each class.
