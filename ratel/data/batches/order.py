"""The order of documents: a new permutation each epoch that costs no memory and can be entered at
any place."""

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """A permutation of ``range(size)`` fixed by ``key``.

    A Feistel network over the smallest even number of bits that holds ``size``, walked until it
    lands inside. A shuffled array would need 8 bytes per document and depend on a library's
    generator staying as it is; resuming must not.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        assert size > 0
        self._size = size
        self._half_bits = max(2, -(-(size - 1).bit_length() // 2))
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = [_mix(*key, number) for number in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self._size
        value = self._scramble(index)
        while value >= self._size:
            value = self._scramble(value)
        return value

    def _scramble(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(key, right) & self._half_mask)
        return left << self._half_bits | right


def _mix(*numbers: int) -> int:
    """64 well-mixed bits of some integers (a chain of multiply-xorshift finalisers)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) * 0xD6E8FEB86659FD93 & _MASK
        state = (state ^ state >> 32) * 0xD6E8FEB86659FD93 & _MASK
        state ^= state >> 29
    return state
