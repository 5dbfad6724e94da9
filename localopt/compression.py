"""The mean of what a round has changed, in fewer bytes.

Ranks exchange changes since the round's start, which are small and shrink as training settles, not
parameters. A codec turns numbers into bytes and back. What it loses stays with the rank that sent,
which adds it to what it sends next: error feedback (Seide et al., Interspeech 2014; Karimireddy et
al., arXiv 1901.09847).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .collective import Collective

PIECE = 2**19  # elements that are looked at at once: what that takes in memory stays in the cache
TRAVELS = 2**21  # elements that travel at once, while others are encoded


def _nothing(start: int, end: int) -> None:
    pass


@dataclass(frozen=True)
class Codec(ABC):
    """Numbers as bytes.

    Args:
        block: elements that belong together; what is encoded is a multiple of it.

    Raises:
        ValueError: if it is no multiple of 16.
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
        """The numbers (n,) that ``wire`` stands for, the same bits on every rank.

        In ``dtype``, or in another that is converted where they are used.
        """

    def send_(self, x: Tensor, wire: Tensor, fill: Callable[[int, int], None] = _nothing) -> None:
        """Write ``x`` to ``wire``, and leave in ``x`` what the bytes lose of it.

        ``fill`` is called with the first and last element + 1 of what is about to be read.
        """
        start = 0
        for piece, part in self._pieces(x, wire):
            fill(start, start + len(piece))
            start += len(piece)
            whole = self._whole(piece)
            self.encode(whole, part)
            piece.sub_(self.decode(part, x.dtype)[: len(piece)])

    def receive_(self, x: Tensor, wire: Tensor, *, add: bool = False) -> None:
        """Replace ``x`` by what ``wire`` holds, or ``add`` that to it."""
        for piece, part in self._pieces(x, wire):
            decoded = self.decode(part, x.dtype)[: len(piece)]
            piece.add_(decoded) if add else piece.copy_(decoded)

    def _pieces(self, x: Tensor, wire: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        elements = PIECE if x.device.type == "cpu" else 16 * PIECE  # or a GPU would launch too much
        for piece in x.split(-(-elements // self.block) * self.block):
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
        return wire.view(torch.bfloat16)  # whoever reads it widens it on the way


@dataclass(frozen=True)
class Int8(Codec):
    """x ≈ s q, q an integer from -127 to 127, s = max |x| / 127 over a block: 1 byte, and 4 for s.

    Rounded to the nearest. A block below the smallest normal float is left for later.
    """

    def size(self, n: int) -> int:
        return n + 4 * (n // self.block)

    def encode(self, x: Tensor, wire: Tensor) -> None:
        blocks = x.view(-1, self.block)
        # Two passes: torch's one for both takes seventeen times as long on a CPU.
        scales = (torch.maximum(-blocks.amin(1), blocks.amax(1)) / 127).float()
        scales = torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 0.0)
        divisors = torch.where(scales > 0, scales, torch.inf).to(x.dtype)
        numbers = (blocks / divisors[:, None]).round_()  # at most 127: s is exact to 2^-24
        wire[: x.numel()].view(torch.int8).copy_(numbers.view(-1))
        # Byte by byte: the scales need not start at a multiple of four.
        wire[x.numel() :].copy_(scales.view(torch.uint8))

    def decode(self, wire: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = wire.numel() // (self.block + 4)
        numbers, scales = wire.split([blocks * self.block, 4 * blocks])
        factors = scales.clone().view(torch.float32).to(dtype)
        q: Tensor = numbers.view(torch.int8).view(blocks, self.block).to(dtype)
        return q.mul_(factors[:, None]).view(-1)


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


class CompressedMean:
    """Means in fewer bytes; each rank averages one shard of each piece of a tensor. Collective.

    Shards of C(d_i) go from every rank i to every rank j, which averages those it gets with its
    own, uncompressed; C of that goes to all. ``d`` keeps what is lost on the way: what rank i's
    codec has lost outside its shard, and m times what is lost of the mean inside.

    One piece is encoded while another travels. Nothing of it runs behind training: the second half
    needs what other ranks do after the first.

    Args:
        changes: d, one tensor (n,) per buffer; what is lost of it afterwards.
        means: where the means are written, of the same shapes.
        collective: the ranks.
        codec: C.
        starts: z, for the mean of d + z - x, where ``means`` hold x.

    Attributes:
        bytes: that this rank sends: 2 (m - 1) / m of the compressed numbers, whatever m is.
    """

    def __init__(
        self,
        changes: Sequence[Tensor],
        means: Sequence[Tensor],
        collective: Collective,
        codec: Codec,
        starts: Sequence[Tensor] | None = None,
    ) -> None:
        tensors = (changes, means) if starts is None else (changes, means, starts)
        pieces = (
            piece
            for buffer in zip(*tensors, strict=True)
            for piece in zip(*(x.split(TRAVELS) for x in buffer), strict=True)
            if len(buffer[0])  # else: a type that only buffers have
        )
        self._pieces = [
            _Piece(*piece, collective=collective, codec=codec, number=number)
            for number, piece in enumerate(pieces)
        ]
        self.bytes = sum(piece.bytes for piece in self._pieces)

    def wait(self) -> None:
        """Send them, wait for them, and write the means."""
        before: _Piece | None = None
        for piece in self._pieces[:1]:
            piece.start()
        for piece, following in itertools.zip_longest(self._pieces, self._pieces[1:]):
            if following is not None:
                following.start()
            piece.send_mean()
            if before is not None:
                before.finish()
            before = piece
        if before is not None:
            before.finish()


class _Piece:
    """A piece of a tensor: `start`, `send_mean` and `finish`, in this order."""

    def __init__(
        self,
        d: Tensor,
        mean: Tensor,
        z: Tensor | None = None,
        *,
        collective: Collective,
        codec: Codec,
        number: int,
    ) -> None:
        self._d, self._mean, self._z = d, mean, z
        self._collective, self._codec, self._number = collective, codec, number
        m = collective.world_size
        blocks = -(-len(d) // codec.block)
        size = -(-blocks // m) * codec.block
        self._ends = [min(size * i, len(d)) for i in range(m + 1)]
        self._shape = m, codec.size(size)
        self.bytes = 2 * (m - 1) * codec.size(size)

    def start(self) -> None:
        """Send the other ranks their shards."""
        rank = self._collective.rank
        self._fill(0, *self._ends[rank : rank + 2])
        if self._collective.world_size == 1:
            return
        wires = torch.empty(self._shape, dtype=torch.uint8, device=self._d.device)
        if len(self._d) < self._ends[1] * len(wires):
            wires.zero_()  # nothing is written behind the last one's end
        for i, shard in enumerate(self._shards()):
            if i != rank:
                self._codec.send_(shard, wires[i], partial(self._fill, self._ends[i]))
        received, exchanged = self._collective.start_exchange_shards(wires, self._number)
        self._wires, self._received, self._exchanged = wires, received, exchanged

    def _fill(self, first: int, start: int, end: int) -> None:
        """d ← d + z - x, for the elements ``start`` to ``end`` behind the ``first``."""
        if self._z is not None:
            part = slice(first + start, first + end)
            d, z, x = self._d[part], self._z[part], self._mean[part]
            d.add_(z.to(x.dtype)).sub_(x)

    def _shards(self) -> list[Tensor]:
        return [self._d[a:b] for a, b in itertools.pairwise(self._ends)]

    def send_mean(self) -> None:
        """Wait for the other ranks' shards of this rank's part, and send their mean to all."""
        m, rank, codec = self._collective.world_size, self._collective.rank, self._codec
        if m == 1:
            return
        self._exchanged.wait()
        received, mine = self._received(), self._shards()[rank]
        for i in range(m):
            if i != rank:
                codec.receive_(mine, received[i], add=True)
        codec.send_(mine.div_(m), self._wires[rank])
        mine.mul_(m)
        self._sent_on = self._collective.start_gather_shards_(self._wires, self._number)

    def finish(self) -> None:
        """Wait for the mean, and write it."""
        if self._collective.world_size == 1:
            self._mean.copy_(self._d)
            self._d.zero_()
            return
        self._sent_on.wait()
        for i, (a, b) in enumerate(itertools.pairwise(self._ends)):
            self._codec.receive_(self._mean[a:b], self._wires[i])
        # What is on its way keeps the memory that it was sent from.
        del self._wires, self._received, self._exchanged, self._sent_on
