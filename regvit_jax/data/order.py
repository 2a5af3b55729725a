"""Order: a new permutation of range(n) every epoch, in constant memory, so that data needs no state to resume.

A Feistel network permutes the integers below a power of two that holds n; a result that falls outside is sent through
again until it falls inside (cycle walking), which leaves a permutation of range(n).

Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains".
"""

import dataclasses
import functools

import numpy as np

_ROUNDS = 8
# Fewer than 64 states are too few to reach every permutation of a small n; walking from 64 down to n costs little.
_MIN_BITS = 6
_WORD = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True)
class Order:
    """The sample at each position of an endless pass over `n` samples: epoch p // n is a permutation of range(n).

    A pure function of (seed, p): the same on every machine and with every numpy version.

    Raises:
      ValueError: if n < 1.
    """

    n: int
    seed: int

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"an order needs at least one sample, got n={self.n}")

    def index(self, p):
        """Sample index at position p >= 0: an int for an int, int64 of the same shape for an array of positions."""
        if np.ndim(p) == 0:
            return self._one(int(p))
        position = np.asarray(p, np.int64)
        flat = position.reshape(-1)
        if flat.size and flat.min() < 0:
            raise ValueError(f"positions start at 0, got {flat.min()}")
        epochs, which = np.unique(flat // self.n, return_inverse=True)
        keys = (
            np.array([_round_keys(self.seed, int(epoch)) for epoch in epochs], np.uint64).reshape(-1, _ROUNDS)[which].T
        )
        value = self._feistel((flat % self.n).astype(np.uint64), keys)
        outside = np.flatnonzero(value >= self.n)
        while outside.size:
            value[outside] = self._feistel(value[outside], keys[:, outside])
            outside = outside[value[outside] >= self.n]
        return value.astype(np.int64).reshape(position.shape)

    def _one(self, p):
        if p < 0:
            raise ValueError(f"positions start at 0, got {p}")
        keys = _round_keys(self.seed, p // self.n)
        value = self._feistel(p % self.n, keys)
        while value >= self.n:
            value = self._feistel(value, keys)
        return value

    def _feistel(self, value, keys):
        """A permutation of range(2**bits) chosen by `keys` (_ROUNDS, ...); Python ints and uint64 arrays alike."""
        bits = max(_MIN_BITS, (self.n - 1).bit_length())
        low_bits = bits // 2
        low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
        low, high = value & low_mask, value >> low_bits
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            low = low ^ (_mix(high ^ first) & low_mask)
            high = high ^ (_mix(low ^ second) & high_mask)
        return (high << low_bits) | low


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    key = _mix((_mix((seed + _GOLDEN) & _WORD) + epoch) & _WORD)
    return tuple(_mix((key + round_number * _GOLDEN) & _WORD) for round_number in range(_ROUNDS))


def _mix(x):
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit moves half of the output bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)
