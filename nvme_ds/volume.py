"""A volume: one range of bytes striped over the files of several directories."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvme_ds.engine import Engine


class Volume:
    """Made by ``Engine.create_volume`` or ``Engine.open_volume``.

    ``num_bytes`` is the usable size (rounded up to 4096), ``paths`` the files, ``direct`` whether they bypass the page
    cache, which may end when a transfer is refused that way.
    """

    def __init__(self, engine: Engine, handle: int, paths: list[str], num_bytes: int, direct: bool, keep: bool,
                 pattern: Sequence[int], stripe_bytes: int) -> None:
        self.handle, self.paths, self.num_bytes, self.direct = handle, paths, num_bytes, direct
        self._engine = engine
        self.keep = keep
        self._pattern, self._stripe_bytes = pattern, stripe_bytes
        self._closed = False

    @property
    def keep(self) -> bool:
        """Whether the files stay. Otherwise they go with the engine, should nobody close the volume."""
        return self._keep

    @keep.setter
    def keep(self, keeps: bool) -> None:
        self._keep = keeps
        if keeps:
            self._engine.scratch.pop(self.handle, None)
        else:
            self._engine.scratch[self.handle] = self.paths

    def locate(self, offset: int) -> tuple[str, int]:
        """The file that holds a byte of the volume, and the byte's position in it."""
        number, rest = divmod(offset, self._stripe_bytes)
        round_, place = divmod(number, len(self._pattern))
        index = self._pattern[place]
        before = round_ * self._pattern.count(index) + self._pattern[:place].count(index)
        return self.paths[index], before * self._stripe_bytes + rest

    def sync(self) -> None:
        """Make every completed write durable (fdatasync of every file). Wait for the writes' tickets first.

        IoError names the first file that failed, StallError one whose device does not answer. After a failure nothing
        is known about writes since the last sync that succeeded, and the next one may succeed all the same (the kernel
        reports a lost write once): write them again first.
        """
        self._engine._sync_volume(self)

    def close(self, unlink: bool | None = None) -> None:
        """Take no more transfers; those under way finish. ``unlink`` removes the files, by default unless made with
        keep=True."""
        if self._closed:
            return
        self._closed = True
        if self._engine.is_foreign:
            return
        self._engine._close_volume(self)
        if not self.keep if unlink is None else unlink:
            remove_files(self.paths)
        self._engine.scratch.pop(self.handle, None)

    def _give_up(self) -> None:
        """Closed without a word to the device; its files stay."""
        self._closed = True


def remove_files(paths: Sequence[str]) -> None:
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass  # removed by someone else: what was wanted
