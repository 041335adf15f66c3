"""What the models of a family do, found out on a shrunken copy: does a token see the next one, are
documents kept apart?

It takes tenths of a second, once for a class, its settings and the versions of what computes; then
it is known.
"""

import copy
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratel import probe_cache
from ratel.errors import RatelError
from ratel.models.calls.caches import Caches
from ratel.models.calls.documents import MADE, OWN
from ratel.models.calls.running import CausalLMRunner
from ratel.models.checks.shrink import FIRST_SPECIAL, random_parameters, shrunken
from ratel.models.structure.blocks import count_elements

log = logging.getLogger(__name__)

LENGTHS = (21, 13, 17)
"""Tokens of each of the documents in one row: longer than the windows of a shrunken copy, shorter
than its positions."""
ROUNDING = 1e-3
"""Relative, of the logits of a token. Sums over a whole row come in another order than those over
one document."""
SEEN = 1e-2
"""The least that another context must change, or else the copy does not show what its tokens
see."""
SMALL_ELEMENTS = 20_000_000
"""A model below this is tried as it is where its configuration cannot be shrunken."""


@dataclass(frozen=True, kw_only=True)
class Family:
    is_causal: bool | None
    """No logits depend on later tokens; None: it could not be tried."""
    documents: str | None
    """`OWN` or `MADE`: how documents in one row are kept apart; None: they are not, or it could not
    be tried."""
    reason: str = ""
    """What stood in the way of finding out."""


def family_of(module: nn.Module) -> Family:
    """The family of a causal language model of transformers; ``module`` itself is not run."""
    config = copy.deepcopy(module.config)
    attention = str(getattr(config, "_attn_implementation", None) or "eager")
    attention = "sdpa" if "flash" in attention else attention  # a copy is on the CPU
    try:
        with _quietly():
            small = shrunken(config)
        key = _key(type(module), small, attention)
        family = _KNOWN.get(json.dumps(key, sort_keys=True)) or probe_cache.load(key, lambda content: Family(**content))
        if family is None:
            family = _try(type(module), small, attention)
            if family.is_causal is None and count_elements(module) <= SMALL_ELEMENTS:
                family = _try(type(module), config, attention)
            probe_cache.store(key, asdict(family))
        _KNOWN[json.dumps(key, sort_keys=True)] = family
        return family
    except Exception as error:  # whatever configurations of others do
        return _untried(error)


def documents_of(module: nn.Module, name: str) -> str | None:
    """How documents in one row are kept apart (`Family.documents`); a warning says where they are
    not. Raises RatelError for a model in which the next token is nothing to learn."""
    found = family_of(module)
    if found.is_causal is False:
        raise RatelError("tokens see those that come after them, so the next token is nothing to learn", field="model",
                         value=type(module).__name__, remedy="Use --task masked-lm, classify or tokens; if it is a "
                         "decoder, set is_decoder in its configuration")
    if found.documents is None:
        log.warning("%s: documents in one sequence cannot be kept apart (%s), so each sequence holds one", name, found.reason)
    return found.documents


_KNOWN: dict[str, Family] = {}


def _untried(error: Exception) -> Family:
    text = " ".join(str(error).split())[:160]
    return Family(is_causal=None, documents=None, reason=f"a small copy of it does not run ({type(error).__name__}: {text})")


def _try(model_class: type[nn.Module], config: Any, attention: str) -> Family:
    try:
        with _quietly(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            copy_of_it = model_class._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention)
            Caches(copy_of_it)
            return judge(random_parameters(copy_of_it).eval())
    except Exception as error:
        return _untried(error)


@contextmanager
def _quietly() -> Iterator[None]:
    """What transformers has to say about a small configuration concerns nobody."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


@torch.no_grad()
def judge(model: nn.Module) -> Family:
    """Find out what the family of a model does; it is on the CPU in fp32, and its weights tell
    tokens apart."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = min(FIRST_SPECIAL, model.config.get_text_config().vocab_size)
    apart = [torch.randint(3, vocabulary, (1, length), generator=generator) for length in LENGTHS]
    row = torch.cat(apart, 1)
    runner = CausalLMRunner(model, torch.device("cpu"), torch.float32)
    together = runner.run({"input_ids": row})
    alone = torch.cat([runner.run({"input_ids": document}) for document in apart], 1)
    if not together.isfinite().all():
        return Family(is_causal=None, documents=None, reason="a small copy of it does not stay finite")
    begin = LENGTHS[0]
    if not _is_causal(runner, row, together):
        return Family(is_causal=False, documents=None, reason="tokens see those that come after them")
    other = torch.cat([3 + (apart[0] + 7) % 60, *apart[1:]], 1)
    if difference(runner.run({"input_ids": other})[:, begin:], together[:, begin:]) < SEEN:
        return Family(is_causal=True, documents=None, reason="a small copy of it does not show what its tokens see")
    return _documents(runner, row, alone)


def _is_causal(runner: CausalLMRunner, row: Tensor, logits: Tensor) -> bool:
    changed, begin = row.clone(), row.shape[1] // 2
    changed[:, begin:] = 3 + (changed[:, begin:] + 7) % 60
    return difference(runner.run({"input_ids": changed})[:, :begin], logits[:, :begin]) < ROUNDING


def _documents(runner: CausalLMRunner, row: Tensor, alone: Tensor) -> Family:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    reason = ""
    for way in (OWN, MADE):
        runner.documents = way
        try:
            packed = runner.run({"input_ids": row, "position_ids": positions})
        except Exception as error:
            reason = reason or f"{type(error).__name__} with a mask for documents"
            continue
        if difference(packed, alone) < ROUNDING:
            return Family(is_causal=True, documents=way)
    return Family(is_causal=True, documents=None, reason=reason or "they see each other, whatever mask it is given")


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest relative one of a token's logits; infinite where shapes differ or numbers are not
    finite."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)).max())


def _key(model_class: type, config: Any, attention: str) -> probe_cache.Key:
    import transformers

    settings = {name: value for name, value in config.to_dict().items() if name not in ("transformers_version", "_name_or_path")}
    return {"family": f"{model_class.__module__}.{model_class.__qualname__}", "attention": attention,
            "config": json.loads(json.dumps(settings, default=str)), "source": _source_digest(model_class),
            "versions": [transformers.__version__, torch.__version__], "ratel": _own_digest()}


def _source_digest(model_class: type) -> str:
    """A digest of the source of a class that is not transformers' own, since the user may change
    it."""
    if model_class.__module__.startswith("transformers."):
        return ""
    path = getattr(sys.modules.get(model_class.__module__), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


@lru_cache
def _own_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
