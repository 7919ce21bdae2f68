"""Does a user's model behave as a benchmark needs? Outputs, modes, sizes, randomness, independence.

What is harmless is corrected, with a note; what makes numbers doubtful becomes a warning in the result;
what cannot work ends with a sentence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmlbench.embedding import STEADY, Embedder, disagreement, trains
from dmlbench.errors import DataError, UsageError
from dmlbench.files import first_line

ALONE = 1e-3
"""An image embedded alone differs by more than this from the same image in a batch: batches matter."""


def probe_images(shape: tuple[int, int, int], count: int = 4) -> Tensor:
    """(count, C, H, W): the fixed input of a checkpoint's probe, smooth waves in [0, 1]."""
    c, h, w = shape
    y = torch.linspace(0, 1, h)[None, None, :, None]
    x = torch.linspace(0, 1, w)[None, None, None, :]
    phase = torch.arange(count * c).view(count, c, 1, 1) * 0.7
    return 0.5 + 0.5 * torch.sin(6.2831853 * (x + 2 * y) + phase)


class Picked(nn.Module):
    """A network of which one output is the embedding.

    Args:
        network: gives a tensor, a sequence of tensors or a mapping.
        key: which of them, a name or a position; None for a tensor.
        flat: (b, d, 1, 1) is also taken, as (b, d).
    """

    def __init__(self, network: nn.Module, key: str | int | None, flat: bool = False) -> None:
        super().__init__()
        self.network = network
        self.key = key
        self.flat = flat

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images)
        picked: Tensor = output if self.key is None else output[self.key]
        return picked.flatten(1) if self.flat else picked


def _parts(output: Any) -> dict[str | int, Any]:
    """What an output consists of, by name or position; empty for a tensor."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, Sequence):
        return dict(enumerate(output))
    return {}


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    numbers = "" if value.is_floating_point() else f" of {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{numbers}"


def _is_embedding(value: Any, batch: int) -> bool:
    """(b, d), or (b, d, 1, 1) as networks without a flatten give it."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape[:1] != (batch,):
        return False
    if not value.numel():
        return False
    return value.dim() == 2 or (value.dim() == 4 and value.shape[2:] == (1, 1))


def pick_output(network: nn.Module, output: Any, batch: int, key: str | None, name: str) -> tuple[nn.Module, list[str]]:
    """The network with its embedding picked out of what it gives, and what was done.

    Raises:
        UsageError: ``key`` names nothing, or several outputs could be the embedding.
        DataError: nothing it gives is an embedding (batch, d).
    """
    parts = _parts(output)
    notes: list[str] = []
    chosen: str | int | None = None
    if not parts:
        if key is not None:
            raise UsageError(f"--output-key {key!r}: model {name!r} gives one tensor, nothing to choose from")
        value = output
    else:
        inside = ", ".join(f"{k} {_shape(v)}" for k, v in parts.items())
        kind = "dictionary" if isinstance(output, Mapping) else "tuple"
        if key is not None:
            by_text = {str(k): k for k in parts}
            if key not in by_text:
                raise UsageError(f"--output-key {key!r}: model {name!r} gives a {kind} with {inside}")
            chosen = by_text[key]
        else:
            likely = [k for k, v in parts.items() if _is_embedding(v, batch)]
            if len(likely) != 1:
                raise UsageError(f"model {name!r} gives a {kind} with {inside}: name the embedding with --output-key")
            chosen = likely[0]
            notes.append(f"the model gives a {kind} with {inside}; {chosen!r} is taken as the embedding")
        value = parts[chosen]
    if not _is_embedding(value, batch):
        raise DataError(
            f"model {name!r} gives {_shape(value)} where embeddings (batch, d) are expected"
            + ("; its feature map has to be pooled first" if isinstance(value, Tensor) and value.dim() == 4 else "")
        )
    flat = value.dim() == 4
    if chosen is None and not flat:
        return network, notes
    return Picked(network, chosen, flat).eval(), notes


def settle(embedder: Embedder, output_key: str | None = None) -> None:
    """Try a model on the probe images; put right what is harmless, note it, and keep doubts.

    Sets ``embedder.notes`` and ``embedder.doubts``, and may replace ``embedder.network``.

    Raises:
        UsageError: which output is the embedding is not clear.
        DataError: the model does not take images of its shape, or gives no embeddings.
    """
    notes = list(embedder.notes)
    doubts = list(embedder.doubts)
    try:
        modules = embedder.network.eval().named_modules()
    except Exception as error:  # anybody's code, and a program of torch.export, which is exported in one mode for good
        raise DataError(f"model {embedder.name!r} cannot be put into eval mode: {first_line(error)}") from error
    stuck = [name or type(module).__name__ for name, module in modules if trains(module)]
    embedder.eval()
    if stuck:
        notes.append(f"kept training after eval(), put right: {', '.join(stuck[:3])}{' ...' if len(stuck) > 3 else ''}")
    others = {p.dtype for p in embedder.network.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if others and not isinstance(embedder.network, torch.jit.ScriptModule):
        embedder.network = embedder.network.float()
        kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in others))
        notes.append(f"weights in {kinds} are computed with in float32")
    images = probe_images(embedder.input_shape, 3).to(embedder.device)
    with torch.no_grad():
        output = attempt(embedder, images)
        embedder.network, note = pick_output(embedder.network, output, len(images), output_key, embedder.name)
        first, second, alone = embedder(images), embedder(images), embedder(images[:1])
    gap = disagreement([first, second])
    if gap > STEADY:
        dropout = [n for n, m in embedder.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        cause = f"; it has dropout ({dropout[0]})" if dropout else ""
        doubts.append(
            (
                "randomised",
                f"two forwards of one batch differ by {gap:.1e}{cause}: "
                "attack scores are too high unless the attack averages over the randomness",
            )
        )
    elif disagreement([first[:1], alone], first.abs().amax()) > ALONE:
        doubts.append(
            (
                "batch-dependent",
                "an image's embedding depends on the other images of its batch (batch norm without running "
                "statistics?): no number of this model means what it says",
            )
        )
    embedder.notes = (*notes, *note)
    embedder.doubts = tuple(doubts)


def attempt(embedder: Embedder, images: Tensor) -> Any:
    """What the network gives for images, before anything is made of it.

    Raises:
        DataError: it refuses them.
    """
    try:
        return embedder.network(embedder.normalise(images))
    except Exception as error:  # the network is anybody's code; whatever it says is for the user
        shape = "x".join(map(str, embedder.input_shape))
        raise DataError(
            f"model {embedder.name!r} does not take images of {shape} (channels, height, width): "
            f"{first_line(error)} (--input-size chooses another size)"
        ) from None
