"""Fit tables to teachers and measure what it gains: the numbers of docs/learned-tables.md.

    python benchmarks/fit_tables.py mixture
    python benchmarks/fit_tables.py digits --bundle FOLDER      a bundle of the digits recipe's teacher
    python benchmarks/fit_tables.py fashion --bundle FOLDER
    python benchmarks/fit_tables.py recorded                    what the embedded teacher's tables say of themselves
    python benchmarks/fit_tables.py served                      all its tables of 3 to 8 steps against one reference
    python benchmarks/fit_tables.py wall                        what a whole ``fewstep fit`` takes, on all cores

Each adds its part to docs/results/fitting.json; of a bundle, what was asked for takes the place of what stood there
for the same guidance, solver, steps and arm. Every number is over seeds of the noise that is fitted on and of the noise
that is measured on, both fresh each time: mean and standard deviation. ``recorded`` fits nothing: it gathers what
``fewstep fit`` measured and wrote into each table when it was made.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.runtime import Bundle, Tableau
from fewstep.runtime.prediction import Prediction
from fewstep.runtime.schedules import Level, Levels, karras
from fewstep.runtime.solvers import SOLVERS
from fewstep.training.evaluate import Judge, frechet, make_judge
from fewstep.training.exact import Mixture
from fewstep.training.fitting import METHODS, Direction, Method, Network, Samples, Teacher, fit, fit_rows, follow
from fewstep.training.fitting.bundles import levels_of, network_of
from fewstep.training.fitting.closed_form import direction_of
from fewstep.training.fitting.end_to_end import EndToEnd
from fewstep.training.fitting.fit import RIDGES, rms
from fewstep.training.images import load_images
from fewstep.training.recipe import recipe_from

Array = NDArray[np.float64]
OUT = Path(__file__).parents[1] / "docs" / "results" / "fitting.json"
SEEDS = 3
BASES = ("ddim", "euler", "pndm", "ipndm_4", "dpm_solver_1", "dpm_solver_2", "dpm_solver_3", "deis_3", "heun")
KEY = ("guidance", "solver", "steps")
ADAMS = ("pndm", "ipndm_4", "deis_3")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("mixture", "digits", "fashion", "recorded", "served", "wall"))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--solvers", nargs="+", default=["ddim", "dpmpp_2m"])
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--classifier", type=Path, help="also judge samples, by this feature network")
    parser.add_argument("--data", type=Path, help="its images, if not where the bundle's recipe says")
    parser.add_argument("--judged", type=int, default=500, help="samples that are judged")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    if asked.part == "mixture":
        results = mixture(asked.seeds)
    elif asked.part == "recorded":
        results = recorded(Bundle.load(str(asked.bundle or "fashion-mnist-teacher")))
    elif asked.part == "served":
        results = served(Bundle.load(str(asked.bundle or "fashion-mnist-teacher")), asked.samples, asked.seeds)
    elif asked.part == "wall":
        results = wall(asked.seeds)
    elif asked.bundle is None:
        sys.exit(f"{asked.part} needs --bundle")
    else:
        results = bundle(asked, start_s)
    keep(asked.part, results, start_s)


def keep(part: str, results: dict[str, Any], start_s: float) -> None:
    """Write a part's results, in the place of older ones."""
    results |= {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "seconds": time.perf_counter() - start_s,
    }
    held = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    held[part] = results
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(held, indent=1) + "\n", "utf-8")


def recorded(loaded: Bundle) -> dict[str, Any]:
    """The provenance of a bundle's fitted tables."""
    facts = ("method", "base", "guidance", "data", "seed", "target", "optimiser", "rmse_base", "rmse", "rmse_on")
    rows: list[dict[str, Any]] = [
        {"steps": table.num_steps, **{fact: table.provenance[fact] for fact in facts if fact in table.provenance}}
        for table in loaded.tableaus.values()
        if "rmse" in table.provenance
    ]
    order: list[str] = [*METHODS]
    rows.sort(key=lambda row: (row["steps"], order.index(row["method"])))
    return {"bundle": loaded.name, "weights_sha256": loaded.weights_sha256, "rows": rows}


def joined(part: str, results: dict[str, Any]) -> dict[str, Any]:
    """A bundle's results, and of those that stand there already the arms that were not measured again.

    What was measured on other weights, by another classifier or on other samples is dropped. An arm that stands there
    with more seeds is kept.
    """
    held = (json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}).get(part, {})
    same = ("weights_sha256", "classifier_sha256", "samples", "judged", "seeds")
    if any(held.get(name) != results[name] for name in same):
        return results
    rows = {key(row): row for row in held["rows"]}
    for row in results["rows"]:
        old = rows.get(key(row), {})
        fuller = {arm for arm in old.keys() & row.keys() if arm not in KEY and row[arm]["seeds"] < old[arm]["seeds"]}
        rows[key(row)] = old | {name: value for name, value in row.items() if name not in fuller}
    return results | {"rows": [rows[name] for name in sorted(rows)]}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(row[name] for name in KEY)


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


# --- the exact mixture


def mixture(seeds: int) -> dict[str, Any]:
    """All base solvers and methods on the exact 16-d mixture, against its ODE's end by 400 steps of Heun."""
    exact = Mixture.random(dimensions=16, components=5, scale=0.2, seed=0)

    def told(x: Array, level: Level, _: Samples) -> Array:
        return exact.x0(x, 1.0, float(np.exp(4 * level.t)))

    network = Network(Prediction("x0"), told)

    def moments(x: Array) -> tuple[Array, Array]:
        return x.mean(0), np.cov(x, rowvar=False)

    count = 2000
    rows: list[dict[str, Any]] = []
    floors, exact_distances = [], []  # of two sets of data; of the ODE's own end, which no table can be asked to pass
    worlds = []
    for seed in range(seeds):
        rng = np.random.default_rng(100 + seed)
        test = Samples(rng.standard_normal((count, 16)))
        data, others = moments(exact.sample(count, rng)), moments(exact.sample(count, rng))
        floors.append(frechet(*data, *others))
        ends = follow(SOLVERS["heun"](karras(200)), network, test)[-1]
        exact_distances.append(frechet(*moments(ends), *data))
        worlds.append((rng, test, data, ends))

    def measure(tables: list[Any]) -> dict[str, Any]:
        errors, distances = [], []
        for table, (_, test, data, ends) in zip(tables, worlds, strict=True):
            end = follow(table, network, test)[-1]
            errors.append(float(np.sqrt(((end - ends) ** 2).mean())))
            distances.append(frechet(*moments(end), *data))
        return {"rmse": spread(errors), "frechet": spread(distances)}

    for solver in (*BASES, "dpmpp_2m"):
        for calls in range(4, 9):
            levels = next(
                (karras(n) for n in range(2, calls + 1) if SOLVERS[solver](karras(n)).num_steps == calls), None
            )
            if levels is None:
                continue
            cells: dict[str, Any] = {"base": measure([SOLVERS[solver](levels)] * seeds)}
            ways: list[tuple[str, Method, Direction | None]] = [
                (method, method, None) for method in (METHODS if solver == "ddim" else METHODS[:2])
            ]
            if solver in ADAMS:  # which have two outputs that D-ODE may take the difference of
                other: Direction = "newest" if direction_of(solver) == "combined" else "combined"
                ways.append((f"dode {other}", "dode", other))
            for arm, method, direction in ways:
                tables, took = [], []
                for seed in range(seeds):
                    learn = Samples(
                        np.random.default_rng(seed).standard_normal((512 if method == METHODS[2] else 100, 16))
                    )
                    start_s = time.process_time()
                    made = fit(
                        network, levels, solver, method, learn, Samples(learn.noise[:2]), direction=direction,
                        end_to_end=EndToEnd(15),
                    )  # fmt: skip
                    took.append(time.process_time() - start_s)
                    tables.append(made.table)
                cells[arm] = {**measure(tables), "cpu_seconds": spread(took)}
            rows.append({"solver": solver, "steps": calls, **cells})
            said = "  ".join(f"{k} {v['rmse']['mean']:.3f}/{v['frechet']['mean']:.3f}" for k, v in cells.items())
            print(f"{solver} {calls}: {said}", flush=True)
    return {
        "samples": count,
        "fitted_on": 100,
        "seeds": seeds,
        "frechet_floor": spread(floors),
        "frechet_of_the_ode": spread(exact_distances),
        "rows": rows,
    }


# --- bundles


def served(loaded: Bundle, samples: int, seeds: int) -> dict[str, Any]:
    """How far a bundle's tables end from one reference: DPM-Solver++(2M) with 48 steps, at the default guidance."""
    network = network_of(loaded, loaded.manifest.guidance.default, 1, lambda rows: None)
    exact = SOLVERS["dpmpp_2m"](levels_of(loaded, "dpmpp_2m", 48))
    worlds = [samples_of(loaded, seed, True, samples) for seed in range(seeds)]
    ends = [follow(exact, network, world)[-1] for world in worlds]
    rows: list[dict[str, Any]] = []
    for (solver, steps), table in sorted(loaded.tableaus.items(), key=lambda item: (item[0][1], item[0][0])):
        if 3 <= steps <= 8 and not table.is_stochastic:
            errors = [rms(follow(table, network, world)[-1] - end) for world, end in zip(worlds, ends, strict=True)]
            rows.append({"steps": steps, "solver": solver, "rmse": spread(errors), "table_sha256": table.sha256})
            print(f"{steps} {solver}: {np.mean(errors):.4f}", flush=True)
    return {"bundle": loaded.name, "weights_sha256": loaded.weights_sha256, "samples": samples, "seeds": seeds,
            "guidance": loaded.manifest.guidance.default, "rows": rows}  # fmt: skip


def wall(times: int) -> dict[str, Any]:
    """Seconds of a whole ``fewstep fit`` of the embedded bundles, its start and its check on fresh noise included."""
    rows: list[dict[str, Any]] = []
    for name in ("fashion-mnist-mm4", "fashion-mnist-teacher"):
        command = ["fit", name, "--method", "dode", "--solver", "ddim", "--steps", "8"]
        took, cpu = [], []
        for _ in range(times):
            with tempfile.TemporaryDirectory() as folder:
                before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                output = str(Path(folder) / "t.safetensors")
                subprocess.run([sys.executable, "-m", "fewstep", *command, "-o", output], check=True)
                took.append(time.perf_counter() - start_s)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        rows.append({"command": " ".join(["fewstep", *command]), "seconds": spread(took), "cpu_seconds": spread(cpu)})
        print(f"{name}: {np.mean(took):.1f} s, {np.mean(cpu):.1f} CPU seconds", flush=True)
    return {"cores": os.cpu_count(), "times": times, "rows": rows}


ARMS = ("dode local", "dode", "rows", "end-to-end")


def bundle(asked: argparse.Namespace, start_s: float) -> dict[str, Any]:
    """All ways to fit a bundle's network: distance to the teacher's end, and Frechet distance to the data.

    What is finished is kept after each seed; each arm says how many it has.
    """
    loaded = Bundle.load(str(asked.bundle))
    guidance = loaded.manifest.guidance.default if asked.guidance is None else asked.guidance
    network = network_of(loaded, guidance, asked.threads, lambda rows: None)
    judge = judge_of(loaded, asked) if asked.classifier else None
    rows: list[dict[str, Any]] = []
    results = {
        "bundle": loaded.name, "weights_sha256": loaded.weights_sha256, "samples": asked.samples, "seeds": asked.seeds,
        "judged": asked.judged if judge else 0,
        "classifier_sha256": judge.sha256 if judge else "",
        "rows": rows,
    }  # fmt: skip
    for steps in asked.steps:
        cells: dict[str, dict[str, list[dict[str, float]]]] = {solver: {} for solver in asked.solvers}
        for seed in range(asked.seeds):
            levels = levels_of(loaded, "ddim", steps)
            samples, fresh = (samples_of(loaded, seed, k, asked.samples) for k in (False, True))
            many = samples_of(loaded, seed, True, asked.judged)
            aim = Teacher(levels, network, "dpmpp_2m", 10)
            wanted = aim.trajectory(fresh)[-1]
            for solver in asked.solvers:
                base = SOLVERS[solver](levels)
                for arm in ("base", *asked.arms):
                    if arm == "end-to-end" and solver != "ddim":
                        continue
                    cpu_s = time.process_time()
                    table = (
                        base if arm == "base" else fitted(arm, loaded, base, levels, samples, aim, network, seed, asked)
                    )
                    cell = {"cpu_seconds": time.process_time() - cpu_s}
                    cell["rmse"] = rms(follow(table, network, fresh)[-1] - wanted)
                    if judge is not None and many.label is not None:
                        x = torch.from_numpy(follow(table, network, many)[-1])
                        cell["frechet"] = judge.scores(x, torch.from_numpy(many.label)).fd
                    cells[solver].setdefault(arm, []).append(cell)
                    said = "  ".join(f"{name} {value:.3f}" for name, value in cell.items())
                    print(f"{solver} {steps}, seed {seed}, {arm}: {said}", flush=True)
            done = [summed(arms, asked) | {"guidance": guidance, "solver": solver, "steps": steps}
                    for solver, arms in cells.items()]  # fmt: skip
            keep(asked.part, joined(asked.part, results | {"rows": [*rows, *done]}), start_s)
        rows += done
    return joined(asked.part, results)


def summed(arms: dict[str, list[dict[str, float]]], asked: argparse.Namespace) -> dict[str, Any]:
    """The arms of one row, each over its seeds."""
    gathered: dict[str, Any] = {
        arm: {name: spread([cell[name] for cell in found]) for name in found[0]} | {"seeds": len(found)}
        for arm, found in arms.items()
    }
    if "end-to-end" in gathered:
        gathered["end-to-end"]["optimiser"] = f"Levenberg-Marquardt from rows, {asked.iterations} iterations"
    return gathered


def fitted(
    arm: str, loaded: Bundle, base: Tableau, levels: Levels, samples: Samples, aim: Teacher, network: Network,
    seed: int, asked: argparse.Namespace,
) -> Tableau:  # fmt: skip
    """One table; the teacher's own trajectory is counted for the first arm that needs it."""
    if arm == "base":
        return base
    along = direction_of(base.name) if arm.startswith("dode") else None
    rows = fit_rows(
        base, network, samples, aim, target="local" if arm == "dode local" else "global",
        direction=along, history=4, ridge=RIDGES["dode" if along else "rows"],
    ).table  # fmt: skip
    if arm != "end-to-end":
        return rows
    return EndToEnd(asked.iterations).fit(rows, levels, network, samples, aim.trajectory(samples)[-1], 4).table


def samples_of(loaded: Bundle, seed: int, is_fresh: bool, count: int) -> Samples:
    """Noise, and every class in turn."""
    rng = np.random.default_rng((seed, is_fresh, count))
    noise = rng.standard_normal((count, *loaded.manifest.sample_shape)).astype(np.float32)
    labels = loaded.manifest.labels
    return Samples(noise, np.arange(count) % len(labels.names) if labels else None)


def judge_of(loaded: Bundle, asked: argparse.Namespace) -> Judge:
    """The classifier at ``--classifier``, made there if missing, and the images of the bundle's recipe."""
    recipe = recipe_from(json.loads((loaded.path / "recipe.json").read_text("utf-8")))
    images = load_images(recipe.data.source, asked.data or recipe.data.path, recipe.data.class_names)
    return make_judge(images, asked.classifier, recipe.evaluation.classifier_images, 0)


if __name__ == "__main__":
    main()
