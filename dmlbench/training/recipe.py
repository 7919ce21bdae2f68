"""A recipe: everything that a training run depends on, as TOML that can be committed.

The packaged recipes lie in ``dmlbench/recipes``; a recipe may extend another by naming it.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmlbench.checkpoints import ID, PACKAGE, first_problem
from dmlbench.datasets import USER_DATASETS, dataset_entry
from dmlbench.embedding import DISTANCES
from dmlbench.errors import DataError, UsageError
from dmlbench.files import read_toml
from dmlbench.models.architectures import require_known
from dmlbench.registry import suggest
from dmlbench.threat import Threat
from dmlbench.training.defenses import DEFENSES
from dmlbench.training.losses import LOSSES
from dmlbench.user_code import require_named

RECIPES = PACKAGE / "recipes"
MOST_IMAGES = 1_000_000
"""In a step."""
PUBLISHER = "pretrained"
"""What ``init`` says for the weights that timm or torchvision publish."""


class Recipe(BaseModel):
    """One training run. Lengths are on the [0, 1] scale, written as fractions.

    A step sees ``groups`` groups of ``per_class`` images of one class; the first image of each group
    is an anchor. ``dataset`` is an id, or ``folder:PATH`` or ``csv:PATH``; ``init`` the weights to begin with. ``seed`` draws
    batches, proxies and whatever else is random, and an untrained network's first weights where ``first_weights`` is
    "seed"; "fixed" ones are the same for every seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = Field(pattern=ID)
    title: str = ""
    dataset: str
    arch: str
    arch_kwargs: dict[str, Any] = {}
    embed_dim: int = Field(default=64, ge=0)
    init: str | None = Field(default=None, min_length=1)
    init_without: str = ""
    batch_norm: Literal["batch", "frozen"] = "batch"
    input_size: tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]] | None = None
    space: str = "N"
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    loss: str = "triplet"
    loss_params: dict[str, Any] = {}
    margin: float = Field(default=0.2, gt=0)
    defense: str = "none"
    defense_params: dict[str, Any] = {}
    eps: str | float = "8/255"
    step: str | float = "2/255"
    steps: int = Field(default=8, ge=0)
    ramp: int = Field(default=0, ge=0)
    norm: str = "linf"
    start: Literal["clean", "random"] = "clean"
    groups: int = Field(default=56, ge=2)
    per_class: int = Field(default=2, ge=2)
    iterations: int = Field(default=1000, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    proxy_lr: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine", "step"] = "constant"
    step_every: int = Field(default=1000, ge=1)
    step_factor: float = Field(default=0.1, gt=0, le=1)
    precision: Literal["float32", "mixed"] = "float32"
    check_every: int = Field(default=200, ge=1)
    stored: Literal["float32", "float16"] = "float32"
    seed: int = Field(default=0, ge=0)
    first_weights: Literal["fixed", "seed"] = "fixed"

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values(cls, table: Any) -> Any:
        """No key is true or false; Python would take them for 1 and 0."""
        for key, value in table.items() if isinstance(table, dict) else ():
            if isinstance(value, bool):
                raise ValueError(f"{key} is {str(value).lower()}, not a number or text")
            if isinstance(value, dict) and (wrong := [k for k, v in value.items() if _endless(v)]):
                raise ValueError(f"{key}.{wrong[0]} must be a finite number")
        if isinstance(table, dict) and isinstance(table.get("input_size"), int):
            return {**table, "input_size": (table["input_size"],) * 2}
        return table

    @property
    def threat(self) -> Threat:
        """The adversary of training."""
        return Threat(norm=self.norm, eps=self.eps, step=self.step, steps=self.steps, start=self.start)

    def threat_at(self, iteration: int) -> Threat:
        """The adversary at a step of training: over the first ``ramp`` of them its eps and step grow evenly up to the full ones."""
        full = self.threat
        share = min(1.0, (iteration + 1) / self.ramp) if self.ramp else 1.0
        return full.but(eps=share * full.radius, step=share * full.stride) if share < 1 else full

    def check(self) -> "Recipe":
        """The recipe itself, once every name in it is known and they fit together.

        Raises:
            UsageError: an unknown name (with a suggestion), or a defence that the loss or network cannot serve.
        """
        dataset_entry(self.dataset), DISTANCES[self.space], LOSSES[self.loss]
        if self.groups * self.per_class > MOST_IMAGES:
            raise UsageError(
                f"groups x per_class is {self.groups * self.per_class} images a step, at most {MOST_IMAGES}"
            )
        require_known(self.arch)
        if self.embed_dim == 0 and not self.of_a_library:
            raise UsageError(
                f"embed_dim 0 leaves out the last layer of timm's and torchvision's networks, {self.arch!r} has none to spare"
            )
        entry = DEFENSES[self.defense]
        params = entry.parameters(self.defense_params)
        if self.space != "N" and {"D", "B(D)"} & {params.get(key) for key in ("sampling", "source", "destination")}:
            raise UsageError(
                f"sampling D weighs Euclidean distances of unit-length embeddings: it needs space 'N', not {self.space!r}"
            )
        if self.loss_params and "triplet" in entry.losses:
            raise UsageError(
                f"defence {self.defense!r} makes its own loss: loss_params would do nothing; its parameters are "
                f"margin and those of the defence ({', '.join(entry.defaults)})"
            )
        if entry.losses and self.loss not in entry.losses:
            raise UsageError(f"defence {self.defense!r} needs the loss {' or '.join(entry.losses)}, not {self.loss!r}")
        if entry.ensemble != (self.arch == "ensemble"):
            names = " or ".join(repr(name) for name, one in DEFENSES.items() if one.ensemble)
            raise UsageError(
                f"defence {self.defense!r} needs arch = 'ensemble'"
                if entry.ensemble
                else f"arch 'ensemble' is trained by the defence {names}, not {self.defense!r}"
            )
        if entry.ensemble and self.arch_kwargs.get("members") == 1:
            raise UsageError(f"defence {self.defense!r} needs two members or more: one has no other to differ from")
        if entry.norms and self.batch_norm == "frozen":
            raise UsageError(
                f"defence {self.defense!r} keeps statistics of its own for each kind of image: batch_norm 'frozen' would "
                "leave all of them those of init"
            )
        if self.ramp > self.iterations:
            raise UsageError(
                f"ramp {self.ramp} is more than the {self.iterations} iterations: eps would never be reached"
            )
        if idle := self.idle():
            raise UsageError(idle[0])
        self.threat  # noqa: B018
        return self

    @property
    def of_a_library(self) -> bool:
        """Whether the network, or each member of the ensemble, is timm's or torchvision's."""
        return ":" in (str(self.arch_kwargs.get("member", "")) if self.arch == "ensemble" else self.arch)

    def idle(self) -> list[str]:
        """One sentence for each key that was set and would do nothing."""
        entry, given = DEFENSES[self.defense], self.defense_params
        params = entry.parameters(given)
        out = []
        if self.init in (None, PUBLISHER) and self.init_without:
            out.append("init_without is of the file that init names: without one it would do nothing")
        if self.init is None and self.batch_norm == "frozen":
            out.append("batch_norm 'frozen' keeps the statistics of given weights: name these with init")
        if self.init is not None and self.embed_dim == 0 and self.first_weights == "seed":
            out.append("first_weights 'seed' draws what init does not give: with embed_dim 0 that is nothing")
        if self.init == PUBLISHER and not self.of_a_library:
            out.append(f"init 'pretrained' is of timm's and torchvision's networks, not of {self.arch!r}")
        if self.loss != "triplet":
            mines = params.get("sampling") == "M" and not entry.outer
            if self.margin != Recipe.model_fields["margin"].default and not mines:
                out.append(
                    f"margin is the triplet loss's: with loss {self.loss!r} it would do nothing; see loss_params"
                )
            if "sampling" in given and entry.outer:
                out.append(f"loss {self.loss!r} chooses its own pairs: defense_params.sampling would do nothing")
        elif "margin" in self.loss_params:
            out.append("the triplet loss's margin is the key margin: loss_params.margin would leave mining another")
        elif self.defense == "robust" and "negative_margin" in given:
            out.append("negative_margin is the contrastive loss's: with loss 'triplet' it would do nothing")
        if self.defense == "hm" and "constant" in given and params["destination"] != "constant":
            out.append(f"constant would do nothing with destination {params['destination']!r}")
        if self.defense == "hm" and "ics_margin" in given and not params["ics"]:
            out.append("ics_margin would do nothing without ics above 0")
        if not entry.searches:
            for key in ("ramp", "start"):
                if getattr(self, key) != Recipe.model_fields[key].default:
                    out.append(f"{key} is of the adversary of training: defence {self.defense!r} has none")
        if self.schedule != "step":
            for key in ("step_every", "step_factor"):
                if getattr(self, key) != Recipe.model_fields[key].default:
                    out.append(f"{key} would do nothing with schedule {self.schedule!r}")
        return out

    def differing(self, other: "Recipe") -> list[str]:
        """Keys whose values differ, for a message."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{k} ({mine[k]!r}, was {theirs[k]!r})" for k in mine if mine[k] != theirs[k]]


def _endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def packaged_recipes() -> list[str]:
    """Ids of the packaged recipes."""
    return sorted(p.stem for p in RECIPES.glob("*.toml") if not p.stem.startswith("_"))


def _table(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file's keys, over those of the recipe it extends."""
    if path in seen:
        raise DataError(f"recipe {path} extends itself")
    table = read_toml(path)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str) or Path(parent).name != parent:
        raise DataError(f"recipe {path}: extends must name a recipe in the same folder or a packaged one")
    file = path.parent / f"{parent}.toml"
    if not file.is_file() and not (file := RECIPES / f"{parent}.toml").is_file():
        known = [p.stem for p in (*path.parent.glob("*.toml"), *RECIPES.glob("*.toml"))]
        raise UsageError(f"recipe {path} extends {parent!r}, which does not exist{suggest(parent, known)}")
    return {**_table(file, (*seen, path)), **table}


def make_recipe(table: dict[str, Any], where: str) -> Recipe:
    """A checked recipe from its keys.

    Raises:
        UsageError: a missing, unknown or ill-typed key, or an unknown name.
    """
    for key in table:
        if key not in Recipe.model_fields:
            raise UsageError(f"{where}: unknown key {key!r}{suggest(key, Recipe.model_fields)}")
    try:
        return Recipe.model_validate(table).check()
    except ValidationError as error:
        raise UsageError(f"{where}: {first_problem(error)}") from None


def changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's keys with some changed; ``defense_params.ics`` changes one key of a table and keeps the others.

    Raises:
        UsageError: something before a dot is not a table.
    """
    out = dict(table)
    for key, value in changes.items():
        outer, dot, inner = key.partition(".")
        held = out.get(outer, {})
        if dot and not isinstance(held, dict):
            raise UsageError(f"{key} cannot be set: {outer} is {held!r}, not a table")
        out[outer] = {**held, inner: value} if dot else value
    return out


def load_recipe(name: str, changes: dict[str, Any] | None = None) -> Recipe:
    """A recipe by packaged id or by the path of a TOML file, with some keys :func:`changed`.

    Raises:
        UsageError: no such recipe, or something in it is wrong.
        DataError: the file cannot be read.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise DataError(f"recipe file {name} does not exist")
        raise UsageError(f"unknown recipe {name!r}{suggest(name, packaged_recipes())}")
    table = _table(path)
    if "dataset" not in (changes or {}):
        require_named("data set", str(table.get("dataset")), f"recipe {name}", "with --dataset")
    if "id" in table:
        raise UsageError(f"recipe {name}: the file's name is its id; a key id would do nothing")
    return make_recipe(changed({**table, "id": slug(path.stem)}, changes or {}), f"recipe {name}")


def slug(name: str) -> str:
    """A name as an id: lower case, a dash for what an id may not hold, and no more than that holds."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).lstrip("._-")[:100].rstrip("._-")


def short_name(name: str) -> str:
    """What an id calls a data set or a network: what stands after its colon, of a path the last part."""
    kind, colon, rest = name.partition(":")
    if not colon:
        return name
    path = Path(rest).expanduser().resolve()
    return path.stem if kind == "csv" else path.name if kind in USER_DATASETS else rest


def command_of(recipe: Recipe) -> str:
    """The command that trains by this recipe again: the packaged one of its id or the bare options, and
    every key that differs."""
    if recipe.id in packaged_recipes():
        words, base = [recipe.id], load_recipe(recipe.id).model_dump(mode="json")
    else:
        words = [w for key in ("defense", "dataset", "arch") for w in (f"--{key}", getattr(recipe, key))]
        base = {k: f.default for k, f in Recipe.model_fields.items()}
        base |= {key: getattr(recipe, key) for key in ("defense", "dataset", "arch")}
    for key, value in recipe.model_dump(mode="json").items():
        if value != base[key]:
            words += ["--set", f"{key}={_setting(value)}"]
    return shlex.join(["dmlbench", "train", *words, "--out", f"runs/{recipe.id}"])


def _setting(value: Any) -> str:
    """A value as ``--set KEY=VALUE`` reads it: JSON, or text that is not JSON as it is."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)
