"""Draw the error of every solver against its network calls, on a teacher that is known exactly.

    python benchmarks/solver_gallery.py

The data are a Gaussian mixture in 16 dimensions, so the network is exact and all that is left is the solver's error.
Deterministic solvers are judged by how far their samples end from those of 400 steps of Heun's method from the same
noise (RMS, relative); those that add noise by the Fréchet distance of 8192 samples to the mixture's own mean and
covariance, beside that of as many true samples. Writes docs/results/solvers.json and solvers.png, and the table in
docs/solvers.md. Nothing is random but the seeds in the file.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from fewstep.runtime import Levels, Tableau
from fewstep.runtime.schedules import discrete, flow, vp_linear
from fewstep.runtime.solvers import SOLVERS, heun
from fewstep.training.exact import Mixture, run

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a screen

Array = NDArray[np.float64]
Schedule = Callable[[int], Levels]

ROOT = Path(__file__).parent.parent
MIXTURE = Mixture.random(dimensions=16, components=5, scale=0.2, seed=0)
NFE = (3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
PAIRED, DRAWN = 512, 8192  # samples for the distance to the reference, and for the Fréchet distance

VP: Schedule = partial(vp_linear, spacing="log_snr")
LCM: Schedule = partial(discrete, betas="scaled_linear", spacing="lcm")
PANELS: list[tuple[str, Schedule, list[str]]] = [
    ("single-step", VP, ["dpm_solver_2", "dpm_solver_3", "heun", "dpmpp_2s", "dpmpp_3s"]),
    ("equal Adams weights", VP, ["pndm", "ipndm_2", "ipndm_3", "ipndm_4"]),
    ("DEIS", VP, ["deis_1", "deis_2", "deis_3", "deis_rho_3", "deis_log_rho_3"]),
    ("multistep in log-SNR", VP, ["dpm_solver_2m", "dpm_solver_3m", "dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3"]),
    ("straight path", flow, ["flow_heun", "dpmpp_2m", "dpmpp_3m", "unipc_3"]),
    (
        "with fresh noise",
        VP,
        ["ancestral", "dpm_solver_2m_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "sa_solver", "consistency", "tcd"],
    ),
]
NOISY = "with fresh noise"


def table_of(name: str, schedule: Schedule, nfe: int) -> Tableau:
    """The solver's table with at most that many network calls."""
    num_levels = {"heun": (nfe + 1) // 2, "flow_heun": (nfe + 1) // 2, "pndm": nfe - 1}.get(name, nfe)
    return SOLVERS[name]((LCM if name == "tcd" else schedule)(num_levels))


def samples(table: Tableau, num: int, seed: int) -> Array:
    """Samples from seeded noise; the same for every table of one path, up to its scale."""
    generator = np.random.default_rng(seed)
    start = table.initial_scale * generator.standard_normal((num, MIXTURE.means.shape[1]))
    return run(table, MIXTURE.x0, start, lambda _: generator.standard_normal(start.shape))[-1]


def frechet(drawn: Array) -> float:
    """Squared Fréchet distance between Gaussians fitted to samples and to the mixture."""
    mean = MIXTURE.weights @ MIXTURE.means
    off = MIXTURE.means - mean
    covariance = (MIXTURE.weights[:, None] * off).T @ off + np.eye(len(mean)) * (MIXTURE.weights @ MIXTURE.scales**2)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values) @ vectors.T
    theirs = np.cov(drawn, rowvar=False)
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ theirs @ root), 0)).sum()
    return float(((drawn.mean(0) - mean) ** 2).sum() + np.trace(covariance + theirs) - 2 * shared)


def measure() -> dict[str, object]:
    """Every solver of every panel, at every number of calls it can make."""
    references = {
        "vp": samples(heun(vp_linear(400, spacing="log_snr")), PAIRED, seed=1),
        "flow": samples(SOLVERS["flow_heun"](flow(400)), PAIRED, seed=1),
    }
    curves = []
    for panel, schedule, names in PANELS:
        for name in [*names, "ddim"]:
            points: list[tuple[int, float]] = []
            for nfe in NFE:
                table = table_of(name, schedule, nfe)
                if panel == NOISY:
                    error = frechet(samples(table, DRAWN, seed=2))
                else:
                    reference = references["flow" if schedule is flow else "vp"]
                    off = samples(table, PAIRED, seed=1) - reference
                    error = float(np.sqrt((off**2).mean() / (reference**2).mean()))
                if not points or points[-1][0] != table.num_steps:
                    points.append((table.num_steps, error))
            curves.append(
                {"panel": panel, "solver": name, "nfe": [p[0] for p in points], "error": [p[1] for p in points]}
            )
            print(f"{panel:22s} {name:16s}", " ".join(f"{p[0]}:{p[1]:.2e}" for p in points), flush=True)
    floor = frechet(MIXTURE.sample(DRAWN, np.random.default_rng(3)))
    return {
        "data": {"dimensions": 16, "components": 5, "scale": 0.2, "seed": 0},
        "levels": {"vp": "vp_linear, spacing log_snr, t from 1 to 0.001", "flow": "t uniform from 1 to 0"},
        "paired_samples": PAIRED,
        "drawn_samples": DRAWN,
        "frechet_floor": floor,
        "curves": curves,
    }


def draw(results: dict[str, object], path: Path) -> None:
    """One panel a family, DDIM in all of them as the common measure."""
    curves = results["curves"]
    assert isinstance(curves, list)
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7.4), sharex=True)
    for axis, (panel, _, _) in zip(axes.flat, PANELS, strict=True):
        for curve in curves:
            if curve["panel"] != panel:
                continue
            is_ddim = curve["solver"] == "ddim"
            style = {"color": "0.6", "linestyle": "--"} if is_ddim else {"marker": "o", "markersize": 3.5}
            axis.plot(curve["nfe"], curve["error"], label=curve["solver"], linewidth=1.5, **style)
        if panel == NOISY:
            axis.axhline(float(str(results["frechet_floor"])), color="0.8", linewidth=1, label="true samples")
        axis.set(title=panel, xscale="log", yscale="log", xticks=[3, 4, 6, 8, 12, 16, 24, 32])
        axis.set_xticks([], minor=True)
        axis.set_ylim(top=min(200, axis.get_ylim()[1]))  # what is worse is off the picture
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(visible=True, alpha=0.25)
        axis.legend(fontsize=8, frameon=False, loc="lower left" if panel == NOISY else "best")
        axis.set_ylabel("Fréchet distance" if panel == NOISY else "distance to the exact sample")
    for axis in axes[1]:
        axis.set_xlabel("network calls")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def markdown(results: dict[str, object]) -> str:
    """The figures as a table, best of each column in bold; a column is for at most that many calls."""
    curves = results["curves"]
    assert isinstance(curves, list)
    shown = (4, 6, 8, 12, 16, 32)
    lines = []
    for panel, _, _ in PANELS:
        rows = [curve for curve in curves if curve["panel"] == panel]
        what = "Fréchet distance" if panel == NOISY else "relative distance"
        lines += [f"| {panel}, {what} | " + " | ".join(map(str, shown)) + " |", "|---|" + "---:|" * len(shown)]
        cells = [[row["error"][max(i for i, m in enumerate(row["nfe"]) if m <= n)] for n in shown] for row in rows]
        best = [min(column) for column in zip(*cells, strict=True)]
        for row, errors in zip(rows, cells, strict=True):
            said = [f"{e:.3f}" if e < 1000 else f"{e:.0e}" for e in errors]
            texts = [
                f"**{text}**" if e == best[i] else text for i, (e, text) in enumerate(zip(errors, said, strict=True))
            ]
            lines.append(f"| `{row['solver']}` | " + " | ".join(texts) + " |")
        lines.append("")
    lines.append(f"{DRAWN} true samples have a Fréchet distance of {float(str(results['frechet_floor'])):.3f}.")
    return "\n".join(lines)


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="only draw what stands in the JSON file")
    folder = ROOT / "docs" / "results"
    if parser.parse_args().redraw:
        results = json.loads((folder / "solvers.json").read_text("utf-8"))
    else:
        results = measure()
        (folder / "solvers.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    draw(results, folder / "solvers.png")
    page = ROOT / "docs" / "solvers.md"
    before, _, rest = page.read_text("utf-8").partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->")
    page.write_text(f"{before}<!-- table -->\n{markdown(results)}\n<!-- end -->{after}", "utf-8")


if __name__ == "__main__":
    main()
