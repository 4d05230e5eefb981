"""What `speed.py` shows: Markdown tables of its rows, and plots."""

from pathlib import Path

COLUMNS = {
    "d": ("d", "d"),
    "n": ("n", ",d"),
    "k": ("k", "d"),
    "dtype": ("dtype", "s"),
    "sign": ("codes", "s"),
    "threads": ("threads", "d"),
    "model": ("model", "s"),
    "system": ("system", "s"),
    "tokens": ("tokens", ",d"),
    "atoms": ("atoms", ",d"),
    "threshold": ("threshold", ".3f"),
    "units": ("units", ".2f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "prepare_seconds": ("preparation, s", ".2f"),
    "peak_bytes": ("peak memory, GB", ".3f"),
    "agreement": ("same as plain", "s"),
    "seconds": ("seconds", ".1f"),
    "forward_seconds": ("forward, s", ".1f"),
    "per_forward": ("construction / forward", ".2f"),
    "of_encoding": ("throughput / encoding", ".2f"),
    "settled": ("choices settled in float64", ".2%"),
    "replayed": ("tokens replayed", ".2%"),
}


def table(rows):
    """Rows as one Markdown table of the columns they have; a system without figures says why."""
    present = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = ["| " + " | ".join(COLUMNS[key][0] for key in present) + " |", "|---" * len(present) + "|"]
    lines += ["| " + " | ".join(cell(row, key) for key in present) + " |" for row in rows]
    return "\n".join(lines)


def cell(row, key):
    """One entry of the table."""
    if key == "units" and "unavailable" in row:
        return f"not available: {row['unavailable']}".replace("|", "\\|")
    if row.get(key) is None:
        return ""
    if key == "agreement":
        found = row[key]
        return f"{found['same']}/{found['checked']}, {found['near_ties']} near ties"
    value = row[key] / 1e9 if key == "peak_bytes" else row[key]
    return format(value, COLUMNS[key][1])


def plot(rows, axis, label, title, path):
    """Units over `axis`, a line for each system, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for system, marker in zip(dict.fromkeys(row["system"] for row in rows), "os^v", strict=False):
        points = sorted((row[axis], row["units"]) for row in rows if row["system"] == system and "units" in row)
        axes.plot(*zip(*points, strict=True), marker=marker, label=system)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    ticks = sorted({row[axis] for row in rows})
    axes.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    marks = [m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= m <= high]
    axes.set_yticks(marks, list(map(str, marks)))
    axes.grid(alpha=0.3)
    axes.set_xlabel(label)
    axes.set_ylabel("time per token, in products X @ atoms.T")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
