"""What durability costs a step, and what becomes of runs that are killed or whose drives fail."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ratel.units import GIB

FORMS = {"command": "command", "library": "session in a program"}


def durable_lines(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    shape = ", ".join(f"{key} {settings[key]}" for key in ("layers", "hidden", "batch", "seq_len", "tier", "optimizer"))
    rounds = f"{settings['rounds']} round{'s' if settings['rounds'] > 1 else ''}"
    lines = [f"{shape}; {settings['steps']} steps a round, {rounds}:", "",
             "| | s/step | against nothing | written by a save | waited at the end |", "|---|---|---|---|---|"]
    for way, found in result["ways"].items():
        last = found["runs"][-1]
        lines.append(f"| {way} | {found['step_s']:.2f} | {found['ratio']:.2f} | {last['saved_bytes'] / GIB:.1f} GiB | "
                     f"{last['waited_at_the_end_s']:.1f} s |")
    return lines


def ordeal_lines(kind: str, report: dict[str, Any]) -> list[str]:
    """How often something went otherwise than it should."""
    results, script = report["results"], {"kills": "kill_run", "faults": "fault_run"}[kind]
    seeds = ", ".join(map(str, report["settings"]["seeds"]))
    lines = [f"`python -m tests.tools.{script} DIRECTORY SEED {results[kind]} --json FILE`, seeds {seeds}.", "", "| | |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {value} |" for key, value in results.items() if not isinstance(value, dict)]
    for key, counts in results.items():
        if isinstance(counts, dict):
            parts = "; ".join(f"{what}: {count}" for what, count in counts.items())
            lines.append(f"| {key.replace('_', ' ')} | {parts} |")
    return lines


def proof_lines(entries: list[dict[str, Any]]) -> list[str]:
    """The long proofs, a table for each commit that they were run on."""
    lines: list[str] = []
    for entry in entries:
        machine = entry["machine"]
        lines += [f"Commit {entry['commit'][:10]}, {machine['cpu']['model']}, {machine['cores']} processors, Python {machine['python']}; "
                  f"`{entry['command']}`:", "", "| | tried | failed |", "|---|---|---|"]
        lines += [f"| {what} | {tried} | {failed} |" for what, tried, failed in _proofs(entry["results"])] + [""]
    return lines[:-1]


def _proofs(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    fuzz = results["fuzz"]
    kinds = Counter(f"{failure['file']}: {failure['problem']}" for failure in fuzz["failures"])
    yield "mutated files", f"{fuzz['cases']:,}", "; ".join(f"{count} of {kind}" for kind, count in kinds.items()) or "0"
    if "moves" in results:
        moves, power, independent = results["moves"], results["power"], results["independent_disks"]
        moved = sum(count for kind, count in moves["by_displacement"].items() if kind != "none")
        yield f"kills; {moved} copies, renames and other mounts between them", f"{moves['kills']}", str(moves["durable_steps_lost"])
        yield "disks after power failures (`power_run`)", f"{power['disks']:,}", str(power["lost"])
        lost = independent["states_lost"] + independent["exports_lost"]
        yield ("disks of another simulation, which is not in this repository; "
               f"{independent['disks_with_an_export']} with an export that was reported"), f"{independent['disks']:,}", str(lost)
    for form in FORMS if "command" in results else ():
        found = results[form]
        where = ", ".join(f"`{place}`" for place in found["problems"])
        yield (f"interrupts of a {FORMS[form]}, a sample of {found['moments']:,} lines", f"{found['tried']:,}",
               f"{len(found['problems'])}" + (f": {where}" if where else ""))
