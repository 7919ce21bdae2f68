"""Several processes that train together (torchrun), by averaging their gradients.

Each process draws its own batches; after every backward pass the gradients are averaged in one
message, so defences may run the network as often as they like in a step.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The processes of a run: the rank of this one, and their number."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """The processes that torchrun's environment variables describe; a single one without them."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Is this the process that writes files?"""
        return self.rank == 0

    def share(self, module: nn.Module) -> None:
        """Give every process the leader's parameters and buffers."""
        if self.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, 0)

    def average(self, module: nn.Module) -> None:
        """Replace every gradient, and every floating buffer, by its mean over the processes."""
        if self.size == 1:
            return
        tensors = [p.grad for p in module.parameters() if p.grad is not None]
        tensors += [b for b in module.buffers() if b.is_floating_point()]
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def mean(self, value: Tensor) -> float:
        """The mean of a number over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value) / self.size

    def agree_on(self, value: int) -> int:
        """The leader's ``value``, for every process."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, 0)
            return box[0]
        return value
