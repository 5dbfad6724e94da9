"""Replicas in checkpoints of `torch.distributed.checkpoint` (DCP): every rank's own state.

DCP takes tensors of one name for copies of each other, and keeps one rank's. Replicas differ within
a round, so here each rank's state has a name of its own, and each rank writes its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from os import PathLike
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    FileSystemReader,
    Metadata,
)
from torch.optim import Optimizer

from ..merge import merged


class ReplicaState:
    """What this rank needs to go on, as a ``Stateful`` of `torch.distributed.checkpoint`.

    Every rank gets back its own weights, buffers, optimizer state and step in the round, saved
    at any step; `LocalOptimizer.state_dict` waits for what is in flight. The state is copied to
    the host's memory when `state_dict` is called, so training may go on during
    ``dcp.async_save``. Give that one a process group of its own, for its collectives run along with
    training's. Save to a new folder each time.

    Args:
        model: the module; its ``state_dict`` is saved.
        optimizer: its optimizer, such as a `LocalOptimizer`.
        process_group: the ranks that save, where ``dcp.save`` is given some; else all.

    Example:
        >>> state = {"replica": ReplicaState(model, optimizer)}
        >>> dcp.save(state, checkpoint_id=folder)  # on all ranks
        >>> dcp.load(state, checkpoint_id=folder)  # on all ranks, into a new model and optimizer
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, process_group: dist.ProcessGroup | None = None
    ) -> None:
        self.model, self.optimizer = model, optimizer
        several = dist.is_initialized()
        self.rank = dist.get_rank(process_group) if several else 0
        self.world_size = dist.get_world_size(process_group) if several else 1

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, under the rank's name. No collective.

        If it cannot be had, as of a replica with NaN, the error is raised when the state is
        written. So DCP reports it to all ranks (`CheckpointException`), and none waits for one that
        has left; and a replica with NaN can be loaded over, for DCP asks for its state then too.

        Example:
            >>> ReplicaState(model, optimizer).state_dict().keys()
            dict_keys(['rank0'])
        """
        try:
            own: object = SimpleNamespace(
                optimizer=_on_host(self.optimizer.state_dict()),  # first: it waits
                model=_on_host(self.model.state_dict()),
                world_size=self.world_size,
            )
        except Exception as error:
            own = _Missing(error)
        return {_name(self.rank): own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave on this rank: the model first, then the optimizer.

        Raises:
            ValueError: if it is something else, or was saved by another number of replicas.

        Example:
            >>> state = ReplicaState(model, optimizer)
            >>> state.load_state_dict(state.state_dict())
        """
        own = _checked(state_dict.get(_name(self.rank)), self.rank)
        self._check_number(own.world_size)
        self.model.load_state_dict(own.model)
        self.optimizer.load_state_dict(own.optimizer)

    def _check_number(self, saved: int) -> None:
        if saved != self.world_size:
            raise ValueError(
                f"the checkpoint was saved by {saved} replicas, and there are {self.world_size}: "
                "localopt.integrations.dcp.merged_state makes one state of it, for any number"
            )


def load(
    state: dict[str, Any],
    folder: str | PathLike[str],
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """``dcp.load(state, checkpoint_id=folder)``, that says in a line what does not fit. Collective.

    Where fewer replicas have saved than load, DCP itself raises a `CheckpointException` about a
    missing key such as ``replica.rank2``.

    Raises:
        ValueError: if the checkpoint was saved by another number of replicas, or holds none.
        CheckpointException: DCP's own (a `BaseException`) for all else, such as damaged files.
        FileNotFoundError: if there is no checkpoint.

    Example:
        >>> load({"replica": ReplicaState(model, optimizer)}, folder)
    """
    try:
        dcp.load(state, checkpoint_id=folder, process_group=process_group)
        return
    except CheckpointException as error:  # on all ranks
        failed = error
    metadata = FileSystemReader(folder).read_metadata()
    for key, value in state.items():
        if isinstance(value, ReplicaState):
            value._check_number(_replicas(metadata, key, folder))
    raise failed


def merged_state(
    folder: str | PathLike[str], key: str = "replica"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One state of the model and of its optimizer, for any number of replicas: `merged`.

    Reads the states of all ranks, one after another. No process group is needed.

    Args:
        folder: what ``dcp.save`` has written.
        key: the name that the `ReplicaState` had in the saved dictionary.

    Returns:
        Both states; load the model's first.

    Raises:
        ValueError: if the checkpoint holds no `ReplicaState` of this name, or its states do not
            fit each other.

    Example:
        >>> weights, state = merged_state(folder)
        >>> model.load_state_dict(weights)
        >>> optimizer.load_state_dict(state)
    """
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    replicas = _replicas(metadata, key, folder)
    return merged(_states(reader, metadata, key, replicas))


def _name(rank: int) -> str:
    return f"rank{rank}"


# DCP takes dictionaries and lists apart, to load tensors into tensors that are there; a new
# optimizer has none yet. A namespace is written and read as a whole, its tensors as they are.
# (`bytes` are too, but torch.save makes them half as many again, slowly, and never several GiB.)
_FIELDS = {"model", "optimizer", "world_size"}


def _checked(own: object, rank: int) -> SimpleNamespace:
    """What a `ReplicaState` has saved; `ValueError` for all else."""
    if not isinstance(own, SimpleNamespace) or vars(own).keys() != _FIELDS:
        raise ValueError(f"rank {rank}: what is loaded is not what a ReplicaState has saved")
    return own


class _Missing:
    """In place of a state that could not be had; who writes it gets the error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        raise self._error

    def __deepcopy__(self, memo: object) -> _Missing:
        return self


def _on_host(value: Any) -> Any:
    """A copy of a state, tensors in the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # a module's state has the versions of its parts as an attribute
        for key in copied:
            copied[key] = _on_host(value[key])
        return copied
    if isinstance(value, list | tuple):
        items = [_on_host(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return copy.deepcopy(value)


def _replicas(metadata: Metadata, key: str, folder: object) -> int:
    """How many replicas have saved under a name."""
    names, count = metadata.state_dict_metadata, 0
    while f"{key}.{_name(count)}" in names:
        count += 1
    if not count:
        raise ValueError(f"{folder} holds no ReplicaState of the name {key!r}")
    return count


def _states(
    reader: FileSystemReader, metadata: Metadata, key: str, replicas: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The states of all ranks, read one at a time."""
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    for rank in range(replicas):
        name = _name(rank)
        wanted: dict[str, Any] = {key: {name: None}}
        planner = DefaultLoadPlanner()
        planner.set_up_planner(wanted, metadata, is_coordinator=True)
        reader.read_data(planner.create_local_plan(), planner).wait()
        own = _checked(wanted[key].pop(name), rank)
        yield own.model, own.optimizer
