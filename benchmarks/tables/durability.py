"""What durability costs a step, and what becomes of runs that are killed or whose drives fail."""

from typing import Any

from ratel.units import GIB


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
