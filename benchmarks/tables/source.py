"""Where figures come from: machine, PyTorch, commit and command of a file under
benchmarks/results."""

from typing import Any

Content = dict[str, Any] | list[dict[str, Any]]


class NoCommit(SystemExit):
    """A result of which nobody can say what code gave it is none."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: no commit. Measure again in a checkout (or with RATEL_COMMIT set): a result names the commit of its code")


def source(name: str, content: Content) -> str:
    """One line for under a title. Raises NoCommit where the file names none."""
    facts = _facts(content)
    command = facts.get("command")
    how = f"; `{command}`" if command else ""
    return f"{_machine(facts)}{_commit(name, content)}{how}."


def _facts(content: Content) -> dict[str, Any]:
    """The facts of a result; those of a list are its first entry's that has any."""
    if isinstance(content, dict):
        return content
    return next((entry for entry in content if "hardware" in entry or "machine" in entry), {})


def _commit(name: str, content: Content) -> str:
    """A list may have entries of several commits."""
    entries = content if isinstance(content, list) else [content]
    measured = [entry.get("commit") for entry in entries]
    if all(measured):
        named = list(dict.fromkeys(commit[:10] for commit in measured))
        return f"commit {' and '.join(named)}"
    stored = {entry.get("stored_by") for entry in entries if not entry.get("commit")}
    if None in stored:
        raise NoCommit(name)
    return f"stored by commit {' and '.join(sorted(stored))}, when the commit that was measured was not noted yet"


def _machine(facts: dict[str, Any]) -> str:
    hardware, torch = facts.get("hardware") or {}, facts.get("torch")
    torch = torch or hardware.get("torch") or facts.get("versions", {}).get("torch") or facts.get("machine", {}).get("torch")
    where = facts.get("gpu") or hardware.get("gpu") or hardware.get("name") or _gpu(facts) or _processor(facts, hardware)
    versions = [f"torch {torch}"] if torch else []
    if transformers := facts.get("versions", {}).get("transformers"):
        versions.append(f"transformers {transformers}")
    return "".join(f"{fact}, " for fact in (where, *versions) if fact)


def _gpu(facts: dict[str, Any]) -> str | None:
    devices = facts.get("cuda", {}).get("devices") or []
    return devices[0]["name"] if devices else None


def _processor(facts: dict[str, Any], hardware: dict[str, Any]) -> str | None:
    """The model's name, where the file has it, else how many processors the machine has."""
    for place in (facts.get("host", {}), facts.get("machine", {})):
        cpu = place.get("cpu")
        if cpu:
            return cpu if isinstance(cpu, str) else cpu["model"]
    if "cpus" in hardware:
        return f"{hardware['cpus']} processors ({hardware['machine']}, Linux {hardware['kernel']})"
    return "CPU" if "device" in hardware else None
