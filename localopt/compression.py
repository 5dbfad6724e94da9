"""The mean of what a round has changed, in fewer bytes.

Ranks exchange changes since the round's start, which are small and shrink as training settles, not
parameters. A codec turns numbers into bytes and back. What it loses stays with the rank that sent,
which adds it to what it sends next: error feedback (Seide et al., Interspeech 2014; Karimireddy et
al., arXiv 1901.09847).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .collective import Collective, synchronised_clock
from .flat import Vector
from .replica import Replica

PIECE = 2**20  # elements that are looked at at once: what is beside them in memory stays small


@dataclass(frozen=True)
class Codec(ABC):
    """Numbers as bytes.

    Args:
        block: elements that belong together; what is encoded is a multiple of it.
    """

    block: int = 512

    def __post_init__(self) -> None:
        if self.block < 1 or self.block % 16:
            raise ValueError(f"block is {self.block}: it must be a multiple of 16")

    @abstractmethod
    def size(self, n: int) -> int:
        """Bytes for ``n`` numbers."""

    @abstractmethod
    def encode(self, x: Tensor, wire: Tensor) -> None:
        """Write ``x`` (n,) to ``wire`` (size(n),) of bytes."""

    @abstractmethod
    def decode(self, wire: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers (n,) that ``wire`` stands for: the same bits on every rank."""

    def send_(self, x: Tensor, wire: Tensor) -> None:
        """Write ``x`` to ``wire``, and leave in ``x`` what the bytes do not tell of it."""
        for piece, part in self._pieces(x, wire):
            whole = self._whole(piece)
            self.encode(whole, part)
            piece.sub_(self.decode(part, x.dtype)[: len(piece)])

    def receive_(self, x: Tensor, wire: Tensor, *, add: bool = False) -> None:
        """Replace ``x`` by what ``wire`` tells, or ``add`` that to it."""
        for piece, part in self._pieces(x, wire):
            told = self.decode(part, x.dtype)[: len(piece)]
            piece.add_(told) if add else piece.copy_(told)

    def _pieces(self, x: Tensor, wire: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for piece in x.split(-(-PIECE // self.block) * self.block):
            end = start + self.size(len(piece) + -len(piece) % self.block)
            yield piece, wire[start:end]
            start = end

    def _whole(self, piece: Tensor) -> Tensor:
        """``piece`` with zeros up to the end of its last block."""
        missing = -len(piece) % self.block
        return torch.cat([piece, piece.new_zeros(missing)]) if missing else piece


@dataclass(frozen=True)
class Bfloat16(Codec):
    """The upper half of a 32-bit float, rounded to the nearest: 2 bytes."""

    def size(self, n: int) -> int:
        return 2 * n

    def encode(self, x: Tensor, wire: Tensor) -> None:
        wire.view(torch.bfloat16).copy_(x)

    def decode(self, wire: Tensor, dtype: torch.dtype) -> Tensor:
        return wire.view(torch.bfloat16).to(dtype)


@dataclass(frozen=True)
class Int8(Codec):
    """x ≈ s q, q an integer from -127 to 127, s = max |x| / 127 over a block: 1 byte, and 4 for s.

    Rounded to the nearest. A block below the smallest normal float is left for later.
    """

    def size(self, n: int) -> int:
        return n + 4 * (n // self.block)

    def encode(self, x: Tensor, wire: Tensor) -> None:
        blocks = x.view(-1, self.block)
        least, greatest = torch.aminmax(blocks, dim=1)
        scales = (torch.maximum(-least, greatest) / 127).float()
        scales = torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 0.0)
        divisors = torch.where(scales > 0, scales, torch.inf).to(x.dtype)
        numbers = (blocks / divisors[:, None]).round_().clamp_(-127, 127)
        wire[: x.numel()].view(torch.int8).copy_(numbers.view(-1))
        # Byte by byte: the scales need not start at a multiple of four.
        wire[x.numel() :].copy_(scales.view(torch.uint8))

    def decode(self, wire: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = wire.numel() // (self.block + 4)
        numbers, scales = wire.split([blocks * self.block, 4 * blocks])
        factors = scales.clone().view(torch.float32).to(dtype)
        return numbers.view(torch.int8).view(blocks, self.block).to(dtype).mul_(
            factors[:, None]
        ).view(-1)  # fmt: skip


CODECS: dict[str, type[Codec]] = {"bf16": Bfloat16, "int8": Int8}


def codec(compress: str | Codec | None) -> Codec | None:
    """The codec of a name; None, or a codec, is returned as it is.

    Raises:
        ValueError: for another name.
    """
    if compress is None or isinstance(compress, Codec):
        return compress
    if compress not in CODECS:
        names = ", ".join(CODECS)
        raise ValueError(f"compress is {compress!r}: it must be None or one of {names}")
    return CODECS[compress]()


class ChangeMean:
    """The mean of the replicas' changes, each rank averaging one shard of it.

    d_i = z - x_i + e_i;  every rank j gets shard j of C(d_i) from each i, and averages them with
    its own, uncompressed; C of that goes to all. e_i keeps what rank i's codec has lost: of d_i
    outside its shard, and m times that of the mean inside. So with z as the start of each round,
    the sum of all means is that of all changes less mean_i(e_i).

    Bytes sent per rank: 2 (m - 1) / m of the compressed parameters, however many the ranks are.

    Args:
        replica: whose parameters.
        compress: the codec.
        start: z, the parameters at the round's start, equal on all replicas.
        lost: e, zeros at first.
    """

    def __init__(self, replica: Replica, compress: Codec, start: Vector, lost: Vector) -> None:
        self._replica, self._codec, self._start, self._lost = replica, compress, start, lost

    @contextmanager
    def mean_(
        self, settings: object = (), check: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """In here the parameters are the mean of z - x_i, as it has arrived. Collective.

        What is averaged beside the parameters (buffers) travels uncompressed.

        Args:
            settings: as for `Replica.meet`.
            check: what may raise on all ranks alike, once these have met.

        Raises:
            ReplicaMismatchError: if the ranks are not at the same call.
            NonFiniteError: if a replica brought NaN or infinity.
        """
        replica, collective = self._replica, self._replica.collective
        replica.gather_buffers()
        (headers,) = replica.meet(settings=settings)
        check()
        replica.measure_spread(headers, collective)
        with replica.changing():
            self._replace()
            yield

    def _replace(self) -> None:
        replica, collective = self._replica, self._replica.collective
        flat = replica.flat
        started, sent = synchronised_clock(replica.device), 0
        for x, z, e in zip(flat.params, self._start.data, self._lost.data, strict=True):
            if not len(x):
                continue  # a type that only buffers have
            e.add_(z.to(x.dtype)).sub_(x)
            sent += self._mean_of(e, x, collective)
        for buffer in flat.buffers:
            buffer.beside_averaged.div_(collective.world_size)
        with replica.told():
            sent += collective.sum_([b.beside for b in flat.buffers if len(b.beside)])
        replica.buffers.scatter(flat.views)
        replica.count_part(sent, started)

    def _mean_of(self, d: Tensor, mean: Tensor, collective: Collective) -> int:
        """Write the mean of ``d`` over the ranks to ``mean``, and what is lost of it to ``d``."""
        m, rank, codec = collective.world_size, collective.rank, self._codec
        if m == 1:
            mean.copy_(d)
            d.zero_()
            return 0
        blocks = -(-len(d) // codec.block)
        size = -(-blocks // m) * codec.block
        ends = [min(size * i, len(d)) for i in range(m + 1)]
        shards = [d[a:b] for a, b in itertools.pairwise(ends)]
        wires = torch.zeros(m, codec.size(size), dtype=torch.uint8, device=d.device)
        for i, shard in enumerate(shards):
            if i != rank:
                codec.send_(shard, wires[i])
        with self._replica.told():
            received, sent = collective.exchange_shards(wires)
        mine = shards[rank]
        for i in range(m):
            if i != rank:
                codec.receive_(mine, received[i], add=True)
        codec.send_(mine.div_(m), wires[rank])
        mine.mul_(m)
        with self._replica.told():
            sent += collective.gather_shards_(wires)
        for i in range(m):
            codec.receive_(mean[ends[i] : ends[i + 1]], wires[i])
        return sent
