"""A network's last layer: where it is, how wide, another width, none, or a layer that a file brings."""

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from dmlbench.errors import UsageError

HEADS = ("fc", "classifier", "head", "heads", "last_linear")
"""Where networks keep their last layer."""
MOST_WIDTH = 1 << 20
"""Values of an embedding."""


def head_of(network: nn.Module) -> str | None:
    """The name of the module that holds a network's last layer."""
    return next((name for name in HEADS if isinstance(getattr(network, name, None), nn.Module)), None)


def _last_linear(module: nn.Module) -> tuple[str, nn.Linear] | None:
    """Name (below ``module``, "" for itself) and layer of the last linear layer."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return layers[-1] if layers else None


def with_head(network: nn.Module, embed_dim: int, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network with its last linear layer giving ``embed_dim`` values, or left out where that is 0.

    Where ``tensors`` hold the head as one linear layer (as RobRank's MNASNet does), the whole head
    becomes one.

    Raises:
        UsageError: the network has no last layer that we know.
    """
    require_width(embed_dim)
    if callable(reset := getattr(network, "reset_classifier", None)):  # timm's own way, which keeps the pooling
        reset(embed_dim)
        return network
    name = head_of(network)
    last = _last_linear(getattr(network, name)) if name else None
    if name is None or last is None:
        raise UsageError(f"a {type(network).__name__} has no last layer to change: leave --embed-dim out")
    inner, layer = last
    if embed_dim == 0 and inner == "":
        setattr(network, name, nn.Identity())
    elif embed_dim == 0:
        _replace(getattr(network, name), inner, nn.Identity())
    elif inner == "" or f"{name}.weight" in (tensors or {}):
        first = next(m for m in getattr(network, name).modules() if isinstance(m, nn.Linear))
        setattr(network, name, nn.Linear(first.in_features, embed_dim))
    else:
        _replace(getattr(network, name), inner, nn.Linear(layer.in_features, embed_dim))
    return network


def last_widths(network: nn.Module) -> tuple[int, int] | None:
    """How many values a network's last linear layer takes and gives; None where it has none that we know."""
    name = head_of(network)
    last = _last_linear(getattr(network, name)) if name else None
    return (last[1].in_features, last[1].out_features) if last else None


def _replace(head: nn.Module, inner: str, layer: nn.Module) -> None:
    """Put ``layer`` at the dotted name ``inner`` below ``head``."""
    above, _, last = inner.rpartition(".")
    setattr(head.get_submodule(above), last, layer)


def head_width(network: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """How wide the head is in a file's tensors (already without prefix); None where they hold none.

    The width is that of the last two-dimensional weight under the head's name.
    """
    name = head_of(network)
    widths = [t.shape[0] for k, t in tensors.items() if name and k.startswith(f"{name}.") and t.dim() == 2]
    return int(widths[-1]) if widths else None


def require_width(embed_dim: int) -> None:
    """Refuse a last layer that no embedding has.

    Raises:
        UsageError: below 0 or above :data:`MOST_WIDTH`.
    """
    if not 0 <= embed_dim <= MOST_WIDTH:
        raise UsageError(f"embed_dim {embed_dim} is not 0 (no last layer) to {MOST_WIDTH}")


def layer_of(tensors: Mapping[str, Tensor], name: str) -> nn.Module | None:
    """The untrained layer that a file holds under ``name``: linear, or a batch norm; None where it is neither.

    ``tensors`` are those of the layer, names without it.
    """
    weight = tensors.get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    if weight.dim() == 2 and set(tensors) <= {"weight", "bias"}:
        return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
    if weight.dim() == 1 and {"running_mean", "running_var"} <= set(tensors):
        layer = nn.BatchNorm1d(weight.shape[0])
        if "bias" not in tensors:
            layer.register_parameter("bias", None)
        return layer
    return None


def with_layer(network: nn.Module, layer: nn.Module) -> nn.Module:
    """A network followed by ``layer``."""
    return nn.Sequential(OrderedDict(features=network, head=layer))
