"""Several processes training one decomposition together; `torchrun` or `accelerate launch` starts them. Each is a *rank*.

1. The ranks meet (`join`): in the process group of torch.distributed that is there, or in one made from the launcher's
   environment variables. Without either there is one rank, and nothing below does anything.
2. Every rank holds the whole decomposition. What they were given is compared, and the initial numbers are rank 0's.
3. A step: each rank takes its rows of the batch and draws its own masks. What has to be chosen alike on all of them, rows and
   sites, is drawn from a stream that they share.
4. What enters the loss or the step other than as a mean over sequences is averaged over the ranks *before*: the usage under the
   logarithm of `frequency`, the gradient of which the adversary takes the sign.
5. The gradients are averaged, all of them in one buffer; then every rank takes the same step, and stays the same to the bit.
6. The losses are averaged before they are looked at: NaN on one rank is NaN on all, and all of them stop.
"""

import atexit
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.sites import model_device
from spd_lens.tokens import Batch

PATIENCE = timedelta(minutes=10)  # after which a rank that waits for one that is gone gives up


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default it is alone.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        device: where tensors have to be for the others to see them.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    def per_rank(self, sequences: int) -> int:
        """How many of a batch's sequences each rank gets: all the same number, since losses are means over sequences."""
        if sequences % self.count:
            below, above = sequences // self.count * self.count, -(-sequences // self.count) * self.count
            allowed = f"{below} or {above}" if below else f"{above}"
            raise SPDError(f"a batch of {sequences} sequences cannot be shared equally by {self.count} processes; "
                           f"give {allowed} (config.batch_size is that of all processes together), or start fewer.")  # fmt: skip
        return sequences // self.count

    def share(self, tokens: Batch | Tensor) -> Batch:
        """This rank's rows of the batch."""
        batch = Batch.of(tokens)
        many = self.per_rank(len(batch))
        return batch[self.rank * many : (self.rank + 1) * many]

    def stream(self, shared: torch.Generator, seed: int, step: int) -> torch.Generator:
        """Where this rank draws a step's masks from. It follows from (seed, rank, step), so that no checkpoint has to keep it and
        another number of ranks can go on; one rank alone draws from the shared stream."""
        if self.count == 1:
            return shared
        state = np.random.SeedSequence([seed % 2**64, self.rank, step]).generate_state(1, np.uint64)
        return torch.Generator(shared.device).manual_seed(int(state[0]))

    def mean(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their means over the ranks, the same bits on each. The gradient is that of the rank's own tensor: averaged over the
        ranks in turn, it is the gradient of the mean."""
        if self.count == 1 or not tensors:
            return dict(tensors)
        flat = torch.cat([t.detach().to(self.device).flatten() for t in tensors.values()])
        dist.all_reduce(flat)
        parts = (flat / self.count).split([t.numel() for t in tensors.values()])
        means = {name: part.view_as(t).to(t.dtype) for (name, t), part in zip(tensors.items(), parts)}
        return {name: t + (means[name] - t).detach() if t.requires_grad else means[name] for name, t in tensors.items()}

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        held = {str(index): p for index, p in enumerate(parameters) if p.grad is not None}
        for index, gradient in self.mean({index: p.grad for index, p in held.items() if p.grad is not None}).items():
            held[index].grad = gradient

    def anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return (
            here if self.count == 1 else bool(self.mean({"": torch.tensor(float(here), dtype=torch.float32, device=self.device)})[""] > 0)
        )

    def from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the numbers of rank 0."""
        for tensor in tensors if self.count > 1 else ():
            dist.broadcast(tensor, 0)

    def only_first(self, work: Callable[[], Any]) -> None:
        """Rank 0 does the work while the others wait; where it fails, all fail.

        Raises:
            SPDError: that of the work, on every rank.
        """
        failed: list[SPDError | None] = [None]
        if self.rank == 0:
            try:
                work()
            except SPDError as error:
                failed[0] = error
        if self.count > 1:
            dist.broadcast_object_list(failed, 0)
        if failed[0] is not None:
            raise failed[0]

    def expect_alike(self, given: Mapping[str, Any]) -> None:
        """Compare what the ranks were given: by name, tensors or what prints the same where it is the same.

        Raises:
            SPDError: naming the first that differs, on every rank.
        """
        if self.count == 1:
            return
        own = torch.tensor([_digest(value) for value in given.values()], device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(everyone, own)
        for rank, theirs in enumerate(everyone):
            for name, same in zip(given, (theirs == everyone[0]).tolist()):
                if not same:
                    raise SPDError(f"rank {rank} was given another {name} than rank 0. All {self.count} processes have to call "
                                   "decompose with the same arguments: each takes its rows of the same batches. Seed what is random.")  # fmt: skip


ALONE = Ranks()


def join(model: Any) -> Ranks:
    """Meet the other ranks, if there are any. A model on a GPU is moved to that of its rank first (`LOCAL_RANK`)."""
    device = model_device(model)
    if _several() and device.type == "cuda" and "LOCAL_RANK" in os.environ:
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if device != own:
            model.to(own)
        torch.cuda.set_device(device := own)
    return meet(device)


def _several() -> bool:
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    return dist.is_available() and (dist.is_initialized() or launched)


def meet(device: torch.device) -> Ranks:
    """The ranks of this training, whose tensors are on `device`.

    Raises:
        SPDError: the launcher's environment variables are not all there, or the others did not come.
    """
    if not _several():
        return Ranks(device=device)
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            raise SPDError(f"RANK is {os.environ['RANK']} and WORLD_SIZE {os.environ['WORLD_SIZE']}, but the processes did not meet "
                           f"({error}). Start them with torchrun or accelerate launch; or unset WORLD_SIZE to train alone.") from error  # fmt: skip
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _digest(value: Any) -> int:
    """63 bits that differ where the values do; of a tensor, sums of its bits, which come out the same in any order."""
    if isinstance(value, Tensor):
        bits = value.detach().contiguous().flatten().view(torch.int32).long()
        value = (value.shape, int(bits.sum()), int((bits * torch.arange(len(bits), device=bits.device)).sum()))
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big") >> 1
