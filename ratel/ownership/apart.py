"""Whether one place is inside of another, under whatever names."""

import os
from pathlib import Path


def contains(tree: Path, path: Path) -> bool:
    """Whether ``path`` is in ``tree`` by their names, links followed; or one of the directories
    above ``path`` is the same as ``tree``, as a second mount is. Neither need exist."""
    real, inside = os.path.realpath(tree), os.path.realpath(path)
    if inside == real or inside.startswith(os.path.join(real, "")):
        return True
    try:
        found = os.stat(real)
    except OSError:
        return False
    above = (Path(inside), *Path(inside).parents)
    return any(os.path.samestat(found, os.stat(folder)) for folder in above if os.path.exists(folder))
