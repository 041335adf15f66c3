"""A volume: one range of bytes striped over the files of several directories."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvme_ds.files import ALIGNMENT, Inode, inode_of

if TYPE_CHECKING:
    from nvme_ds.engine import Engine

PRIORITIES = range(5)
"""The priorities of transfers, the most urgent first."""


class Volume:
    """Made by ``Engine.create_volume`` or ``Engine.open_volume``.

    ``num_bytes`` is the usable size (rounded up to 4096), ``paths`` the files, ``direct`` whether
    they bypass the page cache, which may end when a transfer is refused that way.
    """

    def __init__(self, engine: Engine, handle: int, paths: list[str], inodes: list[Inode], num_bytes: int, direct: bool,
                 keep: bool, pattern: Sequence[int], stripe_bytes: int) -> None:
        self.handle, self.paths, self.num_bytes, self.direct = handle, paths, num_bytes, direct
        self._engine, self._files = engine, list(zip(paths, inodes))
        self.keep = keep
        self._pattern, self._stripe_bytes = pattern, stripe_bytes
        self._closed = False

    @property
    def keep(self) -> bool:
        """Whether the files stay. Otherwise they go with the engine, should nobody close the
        volume."""
        return self._keep

    @keep.setter
    def keep(self, keeps: bool) -> None:
        self._keep = keeps
        if keeps:
            self._engine.scratch.pop(self.handle, None)
        else:
            self._engine.scratch[self.handle] = self._files

    def locate(self, offset: int) -> tuple[str, int]:
        """The file that holds a byte of the volume, and the byte's position in it."""
        number, rest = divmod(offset, self._stripe_bytes)
        round_, place = divmod(number, len(self._pattern))
        index = self._pattern[place]
        before = round_ * self._pattern.count(index) + self._pattern[:place].count(index)
        return self.paths[index], before * self._stripe_bytes + rest

    def sync(self) -> None:
        """Make every completed write durable (fdatasync of every file). Wait for the writes'
        tickets first.

        IoError names the first file that failed, StallError one whose device does not answer. After
        a failure nothing is known about writes since the last sync that succeeded, and the next one
        may succeed all the same (the kernel reports a lost write once): write them again first.
        """
        self._engine._sync_volume(self)

    def check_files(self) -> None:
        """Raise OSError (ESTALE) naming the first file that its name does not lead to any more, or
        that was cut short: transfers go on as if nothing had happened, but nobody will find what
        they write."""
        for path, expected in self._files:
            if _inode_at(path) != expected:
                raise OSError(errno.ESTALE, "the file was removed, replaced or cut short while it was in use", path)

    def close(self, unlink: bool | None = None) -> None:
        """Take no more transfers; those under way finish. ``unlink`` removes the files, by default
        unless made with keep=True."""
        if self._closed:
            return
        self._closed = True
        if self._engine.is_foreign:
            return
        self._engine._close_volume(self)
        if not self.keep if unlink is None else unlink:
            remove_files(self._files)
        self._engine.scratch.pop(self.handle, None)

    def _give_up(self) -> None:
        """Closed without a word to the device; its files stay."""
        self._closed = True


def remove_files(made: Sequence[tuple[str, Inode]]) -> None:
    for path, inode in made:
        found = _inode_at(path)
        if found is not None and found[:2] == inode[:2]:  # else it was removed by someone else, who may have put another there
            os.unlink(path)


def _inode_at(path: str) -> Inode | None:
    try:
        return inode_of(os.lstat(path))
    except OSError:
        return None


def refusal(error: int, volume: Volume, offset: int, address: int, num_bytes: int, priority: int) -> Exception:
    """Why native code did not take a transfer."""
    if error == errno.EBADF:
        return ValueError(f"the volume {volume.paths[0]} is closed or belongs to another engine")
    if error == errno.ERANGE:
        return ValueError(f"{num_bytes} bytes at offset {offset} reach past the end, {volume.num_bytes}")
    if error == errno.EINVAL:
        return ValueError(f"offset {offset}, address {address:#x} and size {num_bytes} must be multiples of {ALIGNMENT} and the "
                          f"priority {priority} one of 0..{PRIORITIES[-1]}")
    return OSError(error, os.strerror(error))
