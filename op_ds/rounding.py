"""The draws by which moments in bf16 are rounded: from a counter, so that nothing but an element's
own number and what it is drawn for decides about them."""

from dataclasses import dataclass

_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What one update of one vector draws. Threads, cuts and instruction sets leave no trace: element
    ``first + i`` has one draw."""

    key: int
    """64 bits, of `rounding_key`."""
    first: int = 0
    """The number of a call's first element among those of its vector."""

    @property
    def keys(self) -> tuple[int, int]:
        """The key in 32-bit halves, as kernels take it."""
        return self.key & 0xffffffff, self.key >> 32

    @property
    def counter(self) -> int:
        """The first element's, modulo 2^32."""
        return self.first & 0xffffffff


def rounding_key(*numbers: int) -> int:
    """64 bits that numbers (a seed, a step, a vector's index) are mixed to, one after the other, by
    the last steps of SplitMix64 (Steele, Lea and Flood, 2014)."""
    key = 0
    for number in numbers:
        key = (key + number + 0x9e3779b97f4a7c15) & _ALL_BITS
        key = ((key ^ (key >> 30)) * 0xbf58476d1ce4e5b9) & _ALL_BITS
        key = ((key ^ (key >> 27)) * 0x94d049bb133111eb) & _ALL_BITS
        key ^= key >> 31
    return key
