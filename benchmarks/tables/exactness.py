"""Whether the same work has the same bits, and whether Ratel trains as transformers' Trainer
does."""

from typing import Any

TRAINER_HEAD = ("| data | steps | target tokens | first loss | last loss | losses differ by | norms differ by | Trainer from itself: losses "
                "| norms | generation | Trainer's logged norm |")


def reproducible_lines(report: dict[str, Any]) -> list[str]:
    lines = ["Each piece of work was repeated on the same inputs; a repetition differs if any bit of its results does. The largest "
             "shares of elements are named.", "", "| work | repetitions that differ | in |", "|---|---|---|"]
    for p in report["points"]:
        if "error" in p:
            lines.append(f"| {p['name']} | not possible: {p['error'].split('.')[0]} | |")
            continue
        chosen = f" ({p['chosen']})" if p.get("chosen") else ""
        row = f"| {p['name']}{chosen} | {p['different']} of {p['repetitions']} | {_different_tensors(p['tensors'])} |"
        lines.append(row.replace("|  |", "| |"))
    return lines


def _different_tensors(tensors: dict[str, dict[str, Any]]) -> str:
    ranked = sorted(tensors.items(), key=lambda item: -(item[1]["elements"] or 0) / (item[1]["of"] or 1))
    found = [name if one["elements"] is None else f"{name} ({one['elements']:,} of {one['of']:,}, up to {one['largest']:.1e})"
             for name, one in ranked[:3]]
    return "; ".join(found) + (f" and {len(ranked) - 3} more" if len(ranked) > 3 else "")


def trainer_lines(report: dict[str, Any]) -> list[str]:
    model, settings = report["model"], report["settings"]
    limit = settings.get("max_grad_norm", 1.0)
    clipping = f"clipping at {limit:g}" if limit else "no clipping"
    return [f"{model['model_type']} with {model['num_hidden_layers']} layers of width {model['hidden_size']}, fp32, AdamW, {clipping}, "
            f"{settings['rows']} rows of {settings['seq_len']} tokens, the same batches for both. Errors are the largest of any step, "
            "relative; norms are those of Trainer's gradients in fp64, from which the norm that it logs, a sum in fp32, differs by the "
            "last column. Trainer itself was run again with the rows of each batch in another order.", "",
            TRAINER_HEAD, "|" + "---|" * 11, *map(_trainer_row, report["points"])]


def _trainer_row(p: dict[str, Any]) -> str:
    logged = "" if p["logged_norm_error"] is None else f"{p['logged_norm_error']:.1e}"
    cells = [p["kind"], str(p["steps"]), f"{p['targets']:,}", f"{p['first_loss']:.4f}", f"{p['last_loss']:.4f}", f"{p['loss_error']:.1e}",
             f"{p['norm_error']:.1e}", f"{p['own_loss_error']:.1e}", f"{p['own_norm_error']:.1e}",
             "the same" if p["generates_the_same"] else "differs", logged]
    return f"| {' | '.join(cells)} |"


def states_lines(report: dict[str, Any]) -> list[str]:
    found, settings = report["summary"], report["settings"]
    seeds = found["seeds"]
    lines = [f"{settings['steps']} steps of {settings['rows']} rows of {settings['seq_len']} bytes at a learning rate of {settings['lr']:g}, "
             f"{settings['dtype']}, from scratch. Evaluation losses at the end, by seed; exact runs lie up to "
             f"{found['spread_of_exact']:.4f} from each other.", "",
             f"| states | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | above exact, by seed | mean above exact |",
             "|---|" + "---|" * (len(seeds) + 3)]
    for states in (name for name in found if isinstance(found[name], dict)):
        own = found[states]
        above = ", ".join(f"{value:+.4f}" for value in own["above_exact"])
        losses = " | ".join(f"{value:.4f}" for value in own["eval_losses"])
        lines.append(f"| {states} | {losses} | {own['mean']:.4f} | {above} | {own['mean_above_exact']:+.4f} |")
    return lines


def moments_lines(report: dict[str, Any]) -> list[str]:
    """Formats that were tried in PyTorch alone, before any was built."""
    losses: dict[str, dict[int, float]] = {}
    for p in report["points"]:
        losses.setdefault(p["format"], {})[p["seed"]] = p["eval_loss"]
    seeds = sorted({p["seed"] for p in report["points"]})
    lines = ["Evaluation losses at the end of the same runs with an AdamW of PyTorch, by seed. What was not measured is left open.", "",
             f"| moments | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---|" + "---|" * len(seeds)]
    return lines + [f"| {name} | " + " | ".join(f"{own[seed]:.4f}" if seed in own else "" for seed in seeds).replace("|  |", "| |") + " |"
                    for name, own in losses.items()]
