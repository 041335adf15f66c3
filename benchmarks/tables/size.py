"""How large a model, a batch and a sequence can be: what was really trained."""

from typing import Any

from ratel.units import GIB


def largest_lines(r: dict[str, Any]) -> list[str]:
    losses = ", ".join(f"{loss:.3f}" for loss in r["losses"])
    return [f"{r['preset']}, {r['parameters'] / 1e9:.1f} B parameters with fp32 AdamW states, {r['batch_size']} x {r['seq_len']} "
            f"tokens a step, {r['plan']['optimizer']} optimizer. {r['step_s']:.1f} s a step ({r['fraction_of_bound']:.0%} of "
            f"the bound, {r['bound_by']}), losses {losses}; GPU peak {r['gpu_peak_bytes'] / GIB:.1f} GiB, DRAM peak "
            f"{r['dram_peak_bytes'] / GIB:.1f} GiB."]


def max_lines(results: list[dict[str, Any]]) -> list[str]:
    from ratel.training.bench.largest import table

    what = "max-model" if "layers" in results[0] else "max-batch"
    return [f"`ratel bench {what}`. Each maximum was found by planning and then trained:", "", "```", *table(results).splitlines(), "```"]
