"""The only file that knows DeepSpeed: process group, device, engine."""

from __future__ import annotations

import argparse
import collections
import contextlib
import difflib
import functools
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, get_total_norm

from localopt import LocalOptimizer
from localopt.collective import waiting

from .config import Config
from .optimizers import DataParallel
from .settings import text_of
from .values import ConfigError, absolute, shortened

if not torch.accelerator.is_available():
    # Told so, DeepSpeed does not search for accelerators, and does not warn that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.accelerator
import deepspeed.ops
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigObject
from deepspeed.utils.logging import log_levels

# Compiling DeepSpeed's shared-memory collective takes a minute, and only inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# How far replicas may be apart in time at the end of a round of thousands of steps.
PATIENCE = timedelta(hours=1)
# How long the first waits for the last at the start.
ARRIVAL = timedelta(minutes=5)

# Images (b, 3, R, R) and labels (b,); where labels are mixed, probabilities (b, classes).
Batch = tuple[Tensor, Tensor]

# How DeepSpeed complains of its settings.
_REFUSALS = (DeepSpeedConfigError, NotImplementedError, ValueError, TypeError, AssertionError)

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among the replicas and on its host, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def start(config: Config) -> Place:
    """Join the process group that the launcher describes; alone without a launcher.

    GPUs talk through NCCL, one replica each. More replicas than GPUs share them through gloo,
    and so do replicas on CPUs.

    Raises:
        ConfigError: if GPUs are asked for and there are none, or the launcher's hostfile is
            missing, or some replicas do not come.
    """
    _require_hostfile()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    gpus = torch.accelerator.device_count()
    if config.device == "cuda" and not gpus:
        raise ConfigError("device is cuda: this host has no GPU that torch can use")
    _default_environment(config.local_rank)
    if config.deterministic:
        use_deterministic_kernels()
    local_rank = int(os.environ["LOCAL_RANK"])
    replicas_here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if gpus and config.device != "cpu":
        device = torch.device(local_rank % gpus)
        torch.accelerator.set_device_index(device.index)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // replicas_here))
    own_gpu = device.type != "cpu" and replicas_here <= gpus
    _join(dist.get_default_backend_for_device(device) if own_gpu else "gloo")
    return Place(dist.get_rank(), dist.get_world_size(), local_rank, device)


def use_deterministic_kernels() -> None:
    """From now on the same inputs give the same bits; an operator that cannot raises.

    Before the first use of a GPU, whose matrix products read the environment then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and for debugging
    torch.backends.cudnn.benchmark = False


def _join(backend: str) -> None:
    """Meet the other replicas, which after `ARRIVAL` have failed to come."""
    if dist.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=ARRIVAL))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"not all {world_size} replicas met at {where} within {ARRIVAL.total_seconds():.0f} "
            f"seconds ({str(error).partition(chr(10))[0]}): see docs/cluster.md"
        ) from None
    store.set_timeout(PATIENCE)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE
    )
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=PATIENCE)


def _require_hostfile() -> None:
    """Refuse a launcher whose --hostfile is missing: it only warns, and trains on fewer replicas.

    The launcher does not pass the flag on, so it is looked for in the processes above this one.
    """
    for _, arguments, folder in _processes_above():
        if not any("deepspeed" in argument for argument in arguments[:4]):
            continue  # srun and mpirun have other flags of these names
        for flag, value in itertools.pairwise(arguments):
            name, _, joined = flag.partition("=")
            hostfile = folder / (joined or value)
            if name in ("-H", "--hostfile") and not hostfile.is_file():
                raise ConfigError(
                    f"hostfile {hostfile} is missing: write one line per host, such as "
                    "`localhost slots=2`"
                )


def launchers() -> list[int]:
    """The processes above this one that launched it: without them nobody waits for the run.

    They are torchrun, or DeepSpeed's launcher with its runner above, or with the ssh session that
    the runner on another host has opened.
    """
    found: list[int] = []
    remote = False
    for pid, arguments, _ in _processes_above():
        start = " ".join(arguments[:4])
        if "deepspeed.launcher.launch" in start or "torch.distributed.run" in start:
            remote = "deepspeed" in start
            found.append(pid)
        elif "deepspeed" in start or "torchrun" in start:
            remote = False
            found.append(pid)
        elif remote and arguments[0].startswith("sshd"):
            return [*found, pid]
    return found


def _processes_above() -> Iterator[tuple[int, list[str], Path]]:
    """Number, command line and working directory of this process's ancestors, where visible."""
    pid = os.getppid()
    with contextlib.suppress(OSError):
        while pid > 1:
            process = Path("/proc", str(pid))
            arguments = (process / "cmdline").read_text().split("\0")
            yield pid, arguments, (process / "cwd").readlink()
            # "pid (name) state parent …": the name may hold spaces.
            pid = int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _default_environment(local_rank: int) -> None:
    """What a launcher would say for one replica, where none has spoken."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(os.environ.get(name, "1")) > 1:
                raise ConfigError(
                    f"{name} is {os.environ[name]}, but RANK is not set: every process would train "
                    "alone; start main.py with deepspeed or torchrun"
                )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone["MASTER_PORT"] = str(free.getsockname()[1])
        os.environ.update(alone)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


@dataclass
class Measures:
    """What one step tells, on the device: reading it costs a host synchronisation.

    Attributes:
        loss: mean training loss of the step's images, 0-dim.
        correct: images of the step whose label was predicted, 0-dim; with Mixup, whose larger part.
        grad_norm: global norm of the gradient before clipping, 0-dim; None if not measured.
        param_norm: global norm of the parameters before the step, 0-dim; None if not measured.
    """

    loss: Tensor
    correct: Tensor
    grad_norm: Tensor | None
    param_norm: Tensor | None


class Engine:
    """DeepSpeed's engine around a model; its gradient all-reduce is off for local optimizers.

    Args:
        config: the run's settings.
        model: the module, on its device.
        optimizer: as `training.optimizers.build` made it.
        world_size: number of replicas.

    Raises:
        ConfigError: if the user's DeepSpeed JSON cannot be read or contradicts the run.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optimizer: LocalOptimizer | DataParallel,
        world_size: int,
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.accumulation = config.total_batch_size // world_size // config.physical_batch_size
        self.autocast = functools.partial(
            torch.autocast,
            next(model.parameters()).device.type,
            _AUTOCAST.get(config.precision, torch.bfloat16),
            enabled=config.precision in _AUTOCAST,
        )
        client = optimizer if isinstance(optimizer, LocalOptimizer) else optimizer.inner
        self._engine = self._initialized(client)
        if config.compile:
            self.model.compile()
        # Loss scaling is the replica's own, as its gradients are; part of what is saved.
        self.scaler: torch.amp.GradScaler | None = self._engine.torch_autocast_z0_gradscaler
        self._records_loss = config.local and (config.track_replicas or optimizer.sync.needs_loss)
        if config.local:
            self._engine.enable_backward_allreduce = False
        else:
            self._time_all_reduce(optimizer)

    def _initialized(self, client: torch.optim.Optimizer) -> deepspeed.DeepSpeedEngine:
        device = next(self.model.parameters()).device
        if device.type != deepspeed.accelerator.get_accelerator().device_name():
            # It would move the model to a GPU that is there and was not asked for.
            deepspeed.accelerator.set_accelerator(CPU_Accelerator())
        # Left alone it takes the GPU numbered LOCAL_RANK, which shared GPUs do not have.
        place = argparse.Namespace(device_rank=device.index or 0)
        settings = deepspeed_settings(self.config, self.accumulation)
        # Both optimizers have made the replicas equal; DeepSpeed's way refuses channels_last.
        with patch.object(deepspeed.DeepSpeedEngine, "_broadcast_model", lambda _: None):
            try:
                engine, *_ = deepspeed.initialize(
                    model=self.model, optimizer=client, config=settings, args=place,
                    dist_init_required=False,
                )  # fmt: skip
            except _REFUSALS as error:
                if not self.config.deepspeed_config:
                    raise
                told = f"DeepSpeed refuses it: {' '.join(str(error).split())}"
                path = absolute(self.config.deepspeed_config)
                raise ConfigError(f"deepspeed_config {path}: {told}") from None
        return engine

    def _time_all_reduce(self, optimizer: DataParallel) -> None:
        reduce, timer = self._engine.allreduce_gradients, _Timer(self.model)

        @functools.wraps(reduce)
        def timed(*args: Any, **kwargs: Any) -> None:
            before = timer.seconds
            with timer, waiting:
                reduce(*args, **kwargs)
            optimizer.count_round(self._engine.communication_data_type, timer.seconds - before)

        self._engine.allreduce_gradients = timed

    def step(self, micro_batches: Iterable[Batch], *, norms: bool = False) -> Measures:
        """One optimizer step on the mean loss of ``micro_batches``; ``norms``: measure them too."""
        losses: list[Tensor] = []
        correct: list[Tensor] = []
        for images, targets in micro_batches:
            logits = self._engine(images).float()  # (B, classes)
            loss = functional.cross_entropy(
                logits, targets, label_smoothing=self.config.label_smoothing
            )
            self._engine.backward(loss)
            losses.append(loss.detach())
            labels = targets if targets.dim() == 1 else targets.argmax(1)
            correct.append((logits.detach().argmax(1) == labels).sum())
            if self._engine.is_gradient_accumulation_boundary():
                grad_norm, param_norm = self._before_update(norms)
                if self._records_loss:
                    self.optimizer.record_loss(torch.stack(losses).mean())
            self._engine.step()
        return Measures(
            torch.stack(losses).mean(), torch.stack(correct).sum(), grad_norm, param_norm
        )

    @torch.no_grad()
    def _before_update(self, norms: bool) -> tuple[Tensor | None, Tensor | None]:
        """Clip the step's gradient: the replica's own, or the average where that is reduced."""
        if not (norms or self.config.clip_norm):
            return None, None
        if self.scaler is not None:
            self.scaler.unscale_(self._engine.optimizer)
        parameters = list(self.model.parameters())
        if self.config.clip_norm:
            grad_norm = clip_grad_norm_(parameters, self.config.clip_norm)
        else:
            grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        return grad_norm, get_total_norm(parameters) if norms else None

    def uncompiled(self) -> contextlib.AbstractContextManager[None]:
        """Within the context a compiled model runs as it is written.

        Evaluation has batches of other sizes, which would be compiled anew.
        """
        if self.config.compile:
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()


class OutOfMemoryError(RuntimeError):
    """The GPU's memory does not hold a step."""


def out_of_memory(batch: int, error: torch.OutOfMemoryError) -> OutOfMemoryError:
    """Say what would fit, where ``batch`` images at a time do not."""
    smaller = f"give --physical-batch-size {batch // 2} or less, and gradients add up as before"
    told = next(iter(str(error).strip().splitlines()), "")
    return OutOfMemoryError(
        f"the GPU has too little memory for {batch} images at a time"
        f"{': ' + smaller if batch > 1 else ''} ({told})"
    )


def leave() -> None:
    """Leave the process group together: gloo aborts ranks that leave one by one."""
    dist.barrier()
    dist.destroy_process_group()


class _Timer:
    """Adds up the seconds inside its context; on a GPU by events, without waiting for it."""

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        self._pending: collections.deque[tuple[torch.Event, torch.Event]] = collections.deque()
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()
        if self._device.type != "cpu":
            self._event = torch.Event(self._device, enable_timing=True)
            self._event.record()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cpu":
            self.seconds += time.perf_counter() - self._started
            return
        end = torch.Event(self._device, enable_timing=True)
        end.record()
        self._pending.append((self._event, end))
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self.seconds += begin.elapsed_time(end) / 1000


_OURS = {
    "train_batch_size": "total_batch_size",
    "train_micro_batch_size_per_gpu": "physical_batch_size",
    "gradient_accumulation_steps": "physical_batch_size",
    "gradient_clipping": "clip_norm",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "bf16": "precision",
    "fp16": "precision",
    "bfloat16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "managed_gradient_accumulation": "physical_batch_size",
    "elasticity": "total_batch_size",
    "compile": "compile",
}


def deepspeed_settings(config: Config, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, and what the user's JSON adds.

    Raises:
        ConfigError: if the JSON cannot be read, or sets what the run itself decides.
    """
    settings: dict[str, Any] = {
        "train_batch_size": config.total_batch_size,
        "train_micro_batch_size_per_gpu": config.physical_batch_size,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed's default of 1.0 would clip by an all-reduced norm at every step.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        # "bf16" would wrap the optimizer around copies of the weights that averaging misses.
        "torch_autocast": {
            "enabled": config.precision in _AUTOCAST,
            "dtype": "float16" if config.precision == "fp16" else "bfloat16",
        },
        "steps_per_print": None,
        # It would synchronise the device twice in every micro-step.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merged(settings, _user_json(config)) if config.deepspeed_config else settings


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """``theirs`` on top of ``ours``, section by section."""
    merged = ours | theirs
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            merged[key] = _merged(ours[key], theirs[key])
    return merged


def _user_json(config: Config) -> dict[str, Any]:
    path = absolute(config.deepspeed_config)
    try:
        content = _from_json(text_of(path))
        _take_out(content, {key: f"it is the recipe's: set {_OURS[key]} there" for key in _OURS})
        _check_stage(config, content.get("zero_optimization", {}))
        _take_out(content, _SPLITS | _SAVES | (_REDUCES if config.local else {}))
        _check_values(content)
    except ConfigError as error:
        raise ConfigError(f"deepspeed_config {path}: {error}") from None
    return content


def _from_json(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = collections.Counter(key for key, _ in pairs)
        if keys and keys.most_common(1)[0][1] > 1:
            raise ConfigError(f"key {shortened(keys.most_common(1)[0][0])} is given twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ConfigError(f"not valid JSON: {constant} is no number")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"it must hold one JSON object, not {shortened(content)}")
    return content


def _take_out(content: dict[str, Any], reasons: dict[str, str]) -> None:
    """Remove sections that are switched off, as templates often have them; refuse the others."""
    for key, reason in reasons.items():
        section = content.pop(key, None)
        off = isinstance(section, dict) and section.get("enabled") is False
        if section and not off and section not in _NEUTRAL.get(key, ()):
            raise ConfigError(f"{key} is {shortened(section)}: {reason}")


def _check_stage(config: Config, zero: Any) -> None:
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage != 0:
        reason = (
            "a local optimizer needs all parameters and their optimizer state on every replica"
            if config.local
            else "this program saves and evaluates whole replicas"
        )
        raise ConfigError(f"zero_optimization.stage is {shortened(stage)}: {reason}; use stage 0")


class _Asked(dict[str, Any]):
    """A dictionary that remembers what it was asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.names: set[Any] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.names.add(key)
        return super().__contains__(key)


def _check_values(content: dict[str, Any]) -> None:
    """Show DeepSpeed each key now: it passes over unknown ones, and finds some wrong types late."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    least = {"train_micro_batch_size_per_gpu": 1}
    standard = deepspeed.DeepSpeedConfig(_Asked(least))
    for key, value in content.items():
        name = key if key.isprintable() and key else repr(key)
        asked, wrong = _Asked({**least, key: value}), f"{name} is {shortened(value)}: "
        try:
            given = deepspeed.DeepSpeedConfig(asked)
        except Exception as error:  # what it makes of this value: without it there was none
            told = " ".join(str(error).split())
            raise ConfigError(f"{wrong}DeepSpeed refuses it: {told[:300]}") from None
        if key not in asked.names:
            close = difflib.get_close_matches(key, map(str, asked.names), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{wrong}DeepSpeed has no such setting{hint}")
        if misfit := _misfit(key, standard, given):
            raise ConfigError(f"{wrong}{misfit}")
        if key == "steps_per_print" and value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{wrong}it must be a positive integer, or null for none")
        if key == "log_level" and value not in (None, *log_levels):
            raise ConfigError(f"{wrong}it must be one of {', '.join(log_levels)}")


def _misfit(name: str, standard: Any, given: Any) -> str | None:
    """Where a value is of another kind than the one that DeepSpeed takes if none is given."""
    if isinstance(standard, bool):
        return None if isinstance(given, bool) else f"{name} must be true or false"
    if isinstance(standard, int | float):
        fits = isinstance(given, int | float) and not isinstance(given, bool)
        return None if fits else f"{name} must be a number"
    if isinstance(standard, deepspeed.DeepSpeedConfig | DeepSpeedConfigObject):
        standard, given = vars(standard), vars(given)
    if type(standard) is dict and isinstance(given, dict):
        found = (_misfit(key, standard[key], given[key]) for key in standard.keys() & given.keys())
        return next(filter(None, found), None)
    return None


# What is said of each where a template has it, and nothing changes.
_NEUTRAL = {
    "sequence_parallel_size": [1],
    "gradient_predivide_factor": [1],
    "gradient_allreduce_op": ["mean"],
    "tensor_parallel": [{"autotp_size": 0}, {"autotp_size": 1}],
}
_SPLITS = dict.fromkeys(
    ("tensor_parallel", "sequence_parallel_size", "pipeline", "hybrid_engine"),
    "every rank is a whole replica with images of its own; leave it out",
)
_SAVES = dict.fromkeys(
    ("nebula", "datastates_ckpt"),
    "this program saves its checkpoints itself; leave it out",
)
_REDUCES = dict.fromkeys(
    (
        "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
        "gradient_allreduce_op", "sparse_gradients", "fp32_allreduce",
    ),
    "it is about the all-reduce of gradients, and a local optimizer makes none; leave it out",
)  # fmt: skip
