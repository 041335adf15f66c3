"""Names of modules as users write them: their ends, and what is nearest to one that is not
there."""

from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches

from ratel.errors import RatelError
from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.outline import OTHER, ModelOutline


def ends_with_any(name: str, targets: Collection[str]) -> bool:
    """Whether it is one of them, or ends with one after a dot. As fast for thousands of them as for
    one, if they are a set."""
    return any(end in targets for end in ends_of(name))


def ends_of(name: str) -> Iterator[str]:
    """The name itself, and what follows each of its dots."""
    parts = name.split(".")
    return (".".join(parts[begin:]) for begin in range(len(parts)))


def nothing_found(config: LoraConfig, outline: ModelOutline) -> RatelError:
    name = "parameters" if config.parameters and not config.targets else "targets"
    value = getattr(config, name)
    left_out = [words for words, given in (("what is excluded", config.exclude), ("the chosen layers", config.layers is not None),
                                           ("what is trained as a whole", config.full)) if given]
    message = "fits no layer of the model" + (f", with {' and '.join(left_out)} taken into account" if left_out else "")
    shown = ", ".join(value) if isinstance(value, tuple) else value
    return RatelError(message, field=config.words[name], value=shown or "none", remedy=nearest(shown or "", adaptable(outline)))


def adaptable(outline: ModelOutline) -> list[str]:
    return [module.name for module in outline.modules if module.kind != OTHER]


def nearest(given: str, names: Iterable[str]) -> str:
    """A sentence with what may have been meant: ends of names, of as many parts as were given."""
    parts = given.count(".") + 1
    found = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))
    close = get_close_matches(given, found, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    if not found:
        return "Give a model with linear layers or embeddings, which adapters can be put on"
    return f"Use names of the model, such as {', '.join(found[:8])}"
