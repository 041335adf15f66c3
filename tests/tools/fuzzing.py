"""Mutations of the files that Ratel reads: of their structure, of what stands in them, and of their
bytes. No tests here."""

import json
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

canary = "/nowhere"
"""A directory that nothing may be written to, by its absolute name; CANARY stands for it in what
follows."""

NUMBERS = (-1, 0, 1, 2, 3, 7, 64, 255, 4096, 65536, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, 1 << 62, 1 << 63, 1 << 64, -(1 << 63),
           10**18, 10**30, 10**400, -0.0, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", " ", "x", "0", "true", "null", "../../x", "CANARY/x", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "..", "/",
         ".", "a\nb", "a\0b", "\ud800", "\udcff", "\ufeff", "%s%n{}", "{{ 7 * 7 }}", "A" * 5000, "\U0001f600", "-1", "1e999", "bf16", "llama",
         "kernels-community/flash-attn", "eager", "NaN", "$(touch x)", "`x`", "\x1b[31m", "\r")


def _text(rng: random.Random) -> str:
    return rng.choice(TEXTS).replace("CANARY", canary)


class Raw(str):
    """Text that stands in JSON as it is."""


def mutate_json(rng: random.Random, content: Any) -> bytes:
    """One to three changes of a tree, then perhaps of its text."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _changed(rng, content)
    return spell(content)


def _changed(rng: random.Random, content: Any) -> Any:
    """Walks down to a random place, and changes what is there."""
    if isinstance(content, dict) and content and rng.random() < 0.85:
        key = rng.choice(list(content))
        return _with_key(rng, content, key) if rng.random() < 0.3 else {**content, key: _changed(rng, content[key])}
    if isinstance(content, list) and content and rng.random() < 0.7:
        index = rng.randrange(len(content))
        return [*content[:index], _changed(rng, content[index]), *content[index + 1 :]]
    return _another(rng, content)


def _with_key(rng: random.Random, content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content[key]
    rest = {name: other for name, other in content.items() if name != key}
    return rng.choice([
        lambda: rest, lambda: {**rest, _text(rng): value}, lambda: {**content, _text(rng): _another(rng, value)},
        lambda: {**content, key: content[rng.choice(list(content))]}, lambda: {**content, Raw(json.dumps(key)): _another(rng, value)},
        lambda: dict(reversed(content.items()))])()


def _another(rng: random.Random, value: Any) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: rng.choice(NUMBERS), lambda: _text(rng), lambda: None, lambda: rng.choice((True, False)), lambda: [], lambda: {},
        lambda: [value], lambda: {"x": value}, lambda: Raw("[" * 100000 + "]" * 100000), lambda: Raw('{"a":' * 5000 + "1" + "}" * 5000),
        lambda: Raw("9" * 5000), lambda: Raw("1e999"), lambda: Raw('"\\ud800"'), lambda: [value] * 300]
    if isinstance(value, bool) or value is None:
        choices += [lambda: not value, lambda: int(bool(value))] * 3
    elif isinstance(value, (int, float)):
        choices += [lambda: rng.choice(NUMBERS), lambda: value + 1, lambda: value - 1, lambda: -value, lambda: value * 2, lambda: str(value),
                    lambda: float(value), lambda: value // 2 if value == value and abs(value) < 1e300 else 0] * 2
    elif isinstance(value, str):
        choices += [lambda: _text(rng), lambda: value + "x", lambda: value[:-1], lambda: value.upper(), lambda: "../" + value,
                    lambda: "../" * 8 + value, lambda: f"{canary}/{value}"] * 2
    elif isinstance(value, list):
        choices += [lambda: value[:-1], lambda: value + value[:1], lambda: value[::-1], lambda: value * 2] * 3
    return rng.choice(choices)()


def spell(content: Any) -> bytes:
    """JSON, with `Raw` values as they are and `Raw` keys a second time."""
    try:
        return _spelled(content).encode("utf-8", "surrogatepass")
    except RecursionError:  # a change of what an earlier one had made deep, which newer versions of Python read
        return b"[" * 100000


def _spelled(content: Any) -> str:
    if isinstance(content, Raw):
        return str(content)
    if isinstance(content, dict):
        return "{" + ", ".join(f"{key if isinstance(key, Raw) else json.dumps(key)}: {_spelled(value)}"
                               for key, value in content.items()) + "}"
    if isinstance(content, (list, tuple)):
        return "[" + ", ".join(map(_spelled, content)) + "]"
    return json.dumps(content)


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    kind = rng.randrange(9)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if kind == 1 and data:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        at = rng.randrange(len(data) + 1)
        data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
    elif kind == 3:
        begin = rng.randrange(len(data) + 1)
        del data[begin : begin + rng.choice((1, 2, 10, 100))]
    elif kind == 4:
        return b"\xef\xbb\xbf" + bytes(data)
    elif kind == 5:
        return bytes(data).decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-16-le")))
    elif kind == 6:
        data += rng.choice((b"\0" * 10, b"}", b"\n\n", b"garbage", b"\xff\xfe", bytes(data)))
    elif kind == 7:
        return b"" if rng.random() < 0.3 else rng.randbytes(rng.choice((1, 7, 8, 9, 1000)))
    else:
        for old, new in ((b"\n", b"\r\n"), (b"\n", b"\r"), (b"\n", b"\xe2\x80\xa8"), (b'"', b"'"), (b":", b"=")):
            if rng.random() < 0.4:
                data = data.replace(old, new)
    return bytes(data)


def resealed(content: bytes) -> bytes:
    """JSON with the seal of a state, made again over whatever stands there now. What cannot be read
    keeps none."""
    try:
        found = json.loads(content)
        found.pop("seal", None)
        return json.dumps({**found, "seal": zlib.crc32(json.dumps(found).encode())}).encode()
    except (ValueError, AttributeError, RecursionError, TypeError):
        return content


def mutate_sealed(rng: random.Random, content: bytes) -> bytes:
    head, newline, rest = content.partition(b"\n")
    if rng.random() < 0.15:
        return mutate_bytes(rng, content)
    mutated = mutate_json(rng, json.loads(head))
    return (resealed(mutated) if rng.random() < 0.85 else mutated) + newline + (rest if rng.random() < 0.9 else rest[:-4])


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.15:
        return mutate_bytes(rng, content)
    if rng.random() < 0.3:
        one, other = rng.sample([name for name in header if name != "__metadata__"], 2)
        header[one] = {**header[one], rng.choice(("data_offsets", "shape", "dtype")): header[other][rng.choice(("data_offsets", "shape", "dtype"))]}
        text = spell(header)
    else:
        text = mutate_json(rng, header)
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 1 << 32, 1 << 63, (1 << 64) - 1))
    return struct.pack("<Q", size) + text + (data if rng.random() < 0.85 else rng.choice((data[:-1], data + b"\0", b"", data * 2)))


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """JSON lines: some of them changed each in its structure."""
    lines = content.splitlines()
    if rng.random() < 0.25:
        return mutate_bytes(rng, content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        index = rng.randrange(len(lines))
        lines[index] = mutate_json(rng, json.loads(lines[index])) if lines[index].startswith(b"{") and _is_json(lines[index]) else b"{}"
    return rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + rng.choice((b"\n", b""))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
        return True
    except (ValueError, RecursionError):
        return False


TOML_VALUES = ("-1", "0", "1", "true", "nan", "inf", "-inf", "1e999", "9" * 5000, '""', '"x"', "[]", "{}", "[[]]", "1979-05-27T07:32:00Z", "07:32:00",
               '"../../x"', '"CANARY/x"', "'''\nx'''", "[" * 5000, "{a=" * 2000, "0x10", "1_000", '"10GiB"', '"-5GiB"', '"1e30TiB"', "[1, 2]",
               '["a", "b"]', '"\\ud800"', "10000000000000000000000")


def mutate_toml(rng: random.Random, content: bytes) -> bytes:
    lines = content.decode().splitlines()
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    for _ in range(rng.choice((1, 1, 2))):
        index = rng.randrange(len(lines))
        value = rng.choice(TOML_VALUES).replace("CANARY", canary)
        key = lines[index].partition("=")[0].strip() or "x"
        lines[index] = rng.choice((f"{key} = {value}",) * 5 + (f"{key}.x = 1", f"[{key}]", f"{key.upper()} = 1", f"{key} =", key,
                                  lines[index] + "\n" + lines[index], f"{key.replace('_', '-')} = 1\n{key} = 2", f"[[{key}]]\nx = 1"))
    return "\n".join(lines).encode()


TEMPLATES = ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ range(10**9)|list }}", "{{ 'x' * 10**9 }}",
             "{{ messages[0].content.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}", "{% include '/etc/passwd' %}",
             "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ undefined.x }}", "{% for m in messages %}", "{{ cycler.__init__.__globals__ }}",
             "{% set x = messages.append(1) %}", "{{ messages[0].__setitem__('role', 'x') }}", "{{ 10 ** 10 ** 8 }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
             "{{ self.__init__ }}", "{% extends 'x' %}", "{{ messages|tojson }}" * 100, "{{ '%0999999d' % 1 }}", "{{ lipsum(100000) }}",
             "{% for m in messages %}{{ m.content }}{% endfor %}" * 50, "{%- if true -%}" * 500, "{{ strftime_now('%Y') }}", "")


def mutate_template(rng: random.Random, content: bytes) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(rng, content)
    at = rng.randrange(len(content) + 1)
    piece = rng.choice(TEMPLATES).encode()
    return piece if kind == 1 else content[:at] + piece + content[at:] if kind == 2 else piece + content


def mutate_json_file(rng: random.Random, content: bytes) -> bytes:
    return mutate_bytes(rng, content) if rng.random() < 0.15 else mutate_json(rng, json.loads(content))


def replace_by_other(rng: random.Random, path: Path) -> str:
    """Something else than a file in a file's place; returns what."""
    content = path.read_bytes() if path.is_file() else b""
    path.unlink()
    kind = rng.choice(("pipe", "socket", "directory", "zero", "full", "nowhere", "loop", "sparse", "link", "gone", "tty"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            here = os.getcwd()
            os.chdir(path.parent)  # the name of a socket has 108 bytes at most
            sock.bind(path.name)
            os.chdir(here)
    elif kind == "directory":
        path.mkdir()
    elif kind in ("zero", "full", "tty"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "nowhere":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 36 if path.suffix not in (".txt", ".jsonl") else 1 << 20)
    elif kind == "link":
        other = path.with_name(path.name + ".elsewhere")
        other.write_bytes(content)
        path.symlink_to(other)
    return kind
