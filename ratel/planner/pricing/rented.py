"""GPUs that can be rented, and what they cost: a dated table, which a user can replace."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.planner.machine.hardware import machine_names
from ratel.reading import read_text
from ratel.schema import Check, SchemaError, check, mapping, number, record, text, whole
from ratel.units import parse_bytes

TABLE = Path(__file__).parent / "rented.toml"
THIS = "this"
"""The machine that one sits at. It has no price but the one that a table gives it."""

_ENTRY: Check = record({"dollars_per_hour": number(0, 1e6), "as_of": text(r"\d{4}(-\d\d){0,2}", "a date, as 2026-01-31"), "source": text()},
                       {"machine": text(), "dram": text(), "ssds": whole(0, 1024), "watts": number(0, 1e6, above=True)})
_TABLE = mapping(text(r"[\w.-]+", "a name of letters, digits, dots and dashes"), _ENTRY)


@dataclass(frozen=True, kw_only=True)
class Price:
    """``source``: who asks for it."""

    dollars_per_hour: float
    as_of: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Rented:
    """One machine to train on. What is None of ``dram`` and ``ssds`` is as in the machine's file."""

    name: str
    machine: str
    """What `load_hardware` takes, or THIS."""
    price: Price | None
    dram: int | None = None
    ssds: int | None = None
    watts: float | None = field(default=None)
    """Drawn at most."""


def rented(names: tuple[str, ...], table: str | Path | None = None) -> list[Rented]:
    """The machines of these names, in the order given; without names all of the table.

    ``table``: a TOML file in the place of the table that comes along. A name that is not in it is a
    machine file's, without a price, or ``this``. Raises RatelError for a table that is not as
    rented.toml says, and for a name that is neither.
    """
    known = read_table(TABLE if table is None else Path(table))
    return [known[name] if name in known else _unpriced(name, known) for name in names or known]


def read_table(path: Path) -> dict[str, Rented]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        entries = check(tomllib.loads(read_text(path)), _TABLE)
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error
    except SchemaError as error:
        raise _wrong(path, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"is not TOML: {error}") from error
    if not entries:
        raise _wrong(path, "names no GPU")
    return {name: _entry(name, content) for name, content in entries.items()}


def _entry(name: str, content: dict[str, Any]) -> Rented:
    price = Price(**{key: content[key] for key in ("dollars_per_hour", "as_of", "source")})
    dram = parse_bytes(content["dram"], field=f"--price {name}.dram") if "dram" in content else None
    return Rented(name=name, machine=content.get("machine", name), price=price, dram=dram, ssds=content.get("ssds"),
                  watts=content.get("watts"))


def _unpriced(name: str, known: dict[str, Rented]) -> Rented:
    if name != THIS and name not in machine_names() and not Path(name).is_file():
        raise RatelError("is neither in the table of prices nor a machine", field="--gpu", value=name,
                         remedy=f"Give one of {', '.join(dict.fromkeys([*known, *machine_names(), THIS]))}, or a machine's file")
    return Rented(name=Path(name).stem if Path(name).is_file() else name, machine=name, price=None)


def _wrong(path: Path, problem: str) -> RatelError:
    return RatelError(problem, field="--price", value=path, remedy="Write it as ratel/planner/pricing/rented.toml is")
