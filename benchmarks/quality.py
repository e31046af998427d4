"""Train every recipe of the digits over several seeds, judge all of it alike, and write the page of results.

    python benchmarks/quality.py --runs runs/quality                      everything: an hour or two on one core
    python benchmarks/quality.py --only digits digits-dmd --seeds 0 1     these, these seeds
    python benchmarks/quality.py --report                                 only write the page again, from what is there
    python benchmarks/quality.py --fashion runs/fashion-mnist-mm4 ...     also judge finished runs on Fashion-MNIST

It may be stopped at any time: each recipe and seed is a folder of `--runs`, trained by ``fewstep train`` and taken up
where it was left, and its figures are kept beside it. Seed by seed, so that an early end leaves a whole table of fewer
seeds. A seed is that of the teacher too, which all recipes of a seed share; one classifier judges all.

Writes docs/results/students.json, students.md, students.png and a grid of samples for each recipe under docs/images.
"""

import argparse
import csv
import json
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from fewstep.runtime import Tableau
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import SOLVERS
from fewstep.training import Checkpoint, Images, Recipe, load_checkpoint, load_recipe, sample, save_grid, train
from fewstep.training.architectures import denoiser_of
from fewstep.training.denoiser import Denoiser
from fewstep.training.evaluate import make_judge
from fewstep.training.images import load_images
from fewstep.training.loop import generator
from fewstep.training.methods import method_of
from fewstep.training.recipe import Dkdm, Guided, Teacher
from fewstep.training.report import Examiner, Figures, over
from fewstep.training.run import Run
from fewstep.training.sampling import ve_levels

ROOT = Path(__file__).parents[1]
RESULTS, PICTURES = ROOT / "docs" / "results", ROOT / "docs" / "images"
JUDGED = "figures.json"
FIRST = 0  # the training seed for which everything is judged
TEACHER = "digits"  # the recipe whose teacher all others share

RECIPES = (  # in the order of the page, and in which they are run
    "digits", "digits-dmd", "digits-progressive", "digits-guided", "digits-dkdm", "digits-consistency",
    "digits-mm-data-free", "digits-diff-instruct", "digits-consistency-tuning", "digits-reflow",
    "digits-parameter-moments", "digits-output", "digits-guided-stochastic", "digits-dkdm-transformer",
)  # fmt: skip

CLAIMS = {  # by method: the paper's claim, and what digits can and cannot say of it
    "moment-matching": (
        "ImageNet 64x64: FID 1.24 with 8 steps, better than its many-step teacher; 3.0 with one (arXiv:2406.04103)",
        "whether few ancestral steps come to the many-step teacher's distance, and at what cost in diversity",
        "a new state of the art; the one-step claim, which is not trained here",
    ),
    "parameter-moment-matching": (
        "the same moments matched without a second network (arXiv:2406.04103, algorithm 3)",
        "whether it improves on the teacher's own few steps",
        "how the two compare at scale",
    ),
    "dmd": (
        "ImageNet 64x64: FID 2.61 in one step without a discriminator (code of arXiv:2405.14867)",
        "whether distribution matching with backward simulation keeps diversity in four steps",
        "the one-step claim; the discriminator, which is left out",
    ),
    "diff-instruct": (
        "CIFAR-10: FID 4.53 in one step (arXiv:2305.18455)",
        "whether one step gets anywhere near the teacher's many",
        "its level at scale; here it is warm-started",
    ),
    "progressive": (
        "CIFAR-10: FID 3.0 with 4 steps, 'without losing much perceptual quality' (arXiv:2202.00512)",
        "whether 4 student steps are nearer to the teacher's sample than 4 of its own, from the same noise",
        "its cost at scale, which the paper puts at no more than training the teacher",
    ),
    "guided": (
        "as good as the guided teacher with as few as 4 steps, one call each (arXiv:2210.03142)",
        "whether one call equals two at every w, and whether 4 steps hold that",
        "latent and text-to-image models",
    ),
    "output-distillation": (
        "one step for many, by regression (arXiv:2101.02388)",
        "how much regression blurs",
        "anything else; it is a warm start",
    ),
    "reflow": (
        "CIFAR-10: FID 3.36 of the 2-rectified flow by an adaptive solver, 4.85 in one step after "
        "distillation (arXiv:2209.03003)",
        "whether trajectories become straight enough for 4 steps of Euler's method",
        "its one-step claim",
    ),
    "dkdm": (
        "CIFAR-10, a quarter of the weights: FID 9.56, against 7.84 with the real data and 12.06 with as many "
        "teacher-made images; teacher 4.45 (arXiv:2409.03550)",
        "the order real data, DKDM, teacher-made images, at one budget of teacher calls",
        "large nets; 1297 images can be memorised, which makes real data look better",
    ),
    "consistency-distillation": (
        "CIFAR-10: FID 3.55 in one step, 2.93 in two, with a learned metric (arXiv:2303.01469)",
        "whether two steps beat two of the teacher",
        "what LPIPS adds",
    ),
    "consistency-tuning": (
        "CIFAR-10: FID 3.60 in one step, 2.11 in two, after 400 000 updates (code of arXiv:2406.14548)",
        "whether two steps beat two of the teacher without its sampling",
        "the long schedule the paper's figures need",
    ),
}  # fmt: skip


def main() -> None:
    """Train and judge what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1_000, help="of each noise seed")
    parser.add_argument("--noise-seeds", type=int, default=2)
    parser.add_argument("--fashion", type=Path, nargs="*", default=[], help="finished runs")
    parser.add_argument("--fashion-data", type=Path)
    parser.add_argument("--report", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if not asked.report:
        bench = Bench(asked.runs, asked.samples, asked.noise_seeds)
        for seed in asked.seeds:
            for name in asked.only:
                bench.unit(name, seed)
        for run in asked.fashion:
            bench.fashion(run, asked.fashion_data)
    write(asked.runs)


# --- what is judged


@dataclass(frozen=True)
class Arm:
    """A network with a table, and what it is compared to."""

    name: str
    calls: int  # network calls a sample
    denoiser: Denoiser
    tableau: Tableau
    noise_seeds: int
    teacher: Denoiser | None = None  # whose own solution the samples are held against, where the table adds no noise
    is_extra: bool = False  # whether it is judged for the first training seed alone


class Bench:
    """Trains and judges."""

    def __init__(self, runs: Path, samples: int, noise_seeds: int) -> None:
        self.runs, self.samples, self.noise_seeds = runs, samples, noise_seeds
        self.console = Console(stderr=True)
        self.examiners: dict[str, Examiner] = {}
        self.solutions: dict[tuple[Denoiser, float, int], Tensor] = {}  # of a teacher's equation, by its noise
        runs.mkdir(parents=True, exist_ok=True)

    def examiner(self, recipe: str, data: Path | None = None) -> Examiner:
        """The judge of a recipe's images."""
        if recipe in self.examiners:
            return self.examiners[recipe]
        settings = load_recipe(recipe)
        images = load_images(settings.data.source, data or settings.data.path, settings.data.class_names)
        place = self.runs / f"classifier-{settings.data.source}.safetensors"
        judge = make_judge(images, place, settings.evaluation.classifier_images, 0)
        return self.examiners.setdefault(recipe, Examiner.of(images, judge))

    def unit(self, name: str, seed: int) -> None:
        """Train and judge one recipe with one seed."""
        recipe = replace(load_recipe(name), seed=seed)
        out, shared = self.runs / f"{name}-{seed}", self.runs / f"{TEACHER}-{seed}" / "teacher.safetensors"
        if not shared.exists():
            train(replace(load_recipe(TEACHER), seed=seed), shared.parent, until="teacher", quiet=True)
        if not (out / "teacher.safetensors").exists():
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared, out / "teacher.safetensors")
        path = train(recipe, out, until="student", quiet=True)
        teacher, student = load_checkpoint(out / "teacher.safetensors"), load_checkpoint(path)
        self.solutions.clear()
        arms = list(student_arms(recipe, student, teacher, self.noise_seeds))
        if isinstance(recipe.student, Guided):
            arms += guided_arms(recipe, out, student, teacher)
        if isinstance(recipe.student, Dkdm) and recipe.student.network and recipe.student.network.kind == "unet":
            arms += dkdm_arms(recipe, out, teacher, self.examiner(TEACHER).images, self.noise_seeds)
        if name == TEACHER:
            arms += teacher_arms(recipe, teacher)
        if seed != FIRST:
            arms = [arm for arm in arms if not arm.is_extra]
        self.judge(out, arms, TEACHER, seconds=seconds_of(out), student=recipe.hash)

    def fashion(self, out: Path, data: Path | None) -> None:
        """Judge a finished run on Fashion-MNIST, from its own teacher."""
        path = out / "student.safetensors"
        student, teacher = load_checkpoint(path), load_checkpoint(out / "teacher.safetensors")
        recipe = student.recipe
        arms = [arm for arm in student_arms(recipe, student, teacher, self.noise_seeds) if not arm.is_extra]
        if isinstance(recipe.student, Guided):
            arms += guided_arms(recipe, out, student, teacher)
        folder = self.runs / f"fashion-{recipe.name}"
        folder.mkdir(exist_ok=True)
        self.judge(folder, arms, recipe.name, data, seconds=seconds_of(out), student=recipe.hash)

    def judge(self, out: Path, arms: Iterable[Arm], recipe: str, data: Path | None = None, **about: object) -> None:
        """Score what ``figures.json`` in ``out`` does not hold yet."""
        held = json.loads((out / JUDGED).read_text("utf-8")) if (out / JUDGED).exists() else {}
        key = {**about, "samples": self.samples}
        if held.get("about") != key:
            held = {"about": key, "arms": {}}
        for arm in arms:
            if arm.name in held["arms"] and len(held["arms"][arm.name]["figures"]) >= arm.noise_seeds:
                continue
            examiner = self.examiner(recipe, data)
            held["classifier"] = examiner.judge.sha256
            held["floor"] = asdict(examiner.floor(self.samples))
            figures = [self.score(arm, examiner, seed, out) for seed in range(arm.noise_seeds)]
            held["arms"][arm.name] = {"calls": arm.calls, "figures": [asdict(each) for each in figures]}
            (out / JUDGED).write_text(json.dumps(held, indent=1) + "\n", "utf-8")
            mean = over(figures, np.mean)
            self.console.print(
                f"{out.name}: {arm.name}: {arm.calls} calls, distance {mean.frechet_distance:.1f}, "
                f"accuracy {mean.class_accuracy:.3f}, recall {mean.recall:.2f}",
                highlight=False,
            )

    def score(self, arm: Arm, examiner: Examiner, seed: int, out: Path) -> Figures:
        """Sample and judge once; the first seed leaves a picture."""
        classes = len(examiner.images.class_names)
        label, shape = torch.arange(self.samples) % classes, examiner.images.sample_shape
        x = sample(arm.denoiser, arm.tableau, label, shape, generator(31, seed))
        other: Tensor | None = None
        if arm.teacher is not None and not arm.tableau.is_stochastic:
            top = float(arm.tableau.sigma[0])
            key = arm.teacher, top, seed
            if key not in self.solutions:
                fine = SOLVERS["dpmpp_2m"](karras(32, 0.01, top))
                self.solutions[key] = sample(arm.teacher, fine, label, shape, generator(31, seed))
            other = self.solutions[key]
        if seed == 0:
            order = torch.argsort(label, stable=True).reshape(classes, -1)[:, :10].flatten()
            save_grid(x[order], out / f"{arm.name.replace(' ', '-')}.png", 10)
        return examiner.figures(x, label, other)


def predictor(checkpoint: Checkpoint, w: float = 0.0) -> Denoiser:
    """A network, guided by ``w`` if it can be."""
    network, classes = checkpoint.network, len(checkpoint.class_names)
    return denoiser_of(network, network.config, checkpoint.sigma_data, classes, w)


def cost(denoiser: Denoiser, tableau: Tableau) -> int:
    """Network calls of a sample: two a step if a network is guided that is not told its guidance."""
    return tableau.num_steps * (2 if denoiser.guidance and not denoiser.takes_guidance else 1)


def student_arms(recipe: Recipe, student: Checkpoint, teacher: Checkpoint, seeds: int) -> Iterable[Arm]:
    """The student by its tables; on other numbers of steps than its own where that means anything."""
    settings, method = recipe.student, method_of(recipe.student)
    told = settings.guidance if student.network.config.guidance_embedding else 0.0
    few, solution = predictor(student, told), predictor(teacher, settings.guidance)
    for solver in method.solvers:
        for steps in sorted({settings.num_steps, *((1, 2, 4, 8, 16) if method.any_steps else ())}):
            is_own = steps == settings.num_steps
            levels = ve_levels(student.sigmas) if is_own else karras(steps, settings.sigma_min, settings.sigma_max)
            yield Arm(
                f"student {solver} {steps}",
                steps,
                few,
                SOLVERS[solver](levels),
                seeds if is_own else 1,
                solution,
                not is_own,
            )


def teacher_arms(recipe: Recipe, teacher: Checkpoint) -> Iterable[Arm]:
    """The teacher by training-free tables. With few steps the best grid depends on their number: two are tried."""
    network, top = predictor(teacher), recipe.student.sigma_max
    for solver in ("dpmpp_2m", "ddim", "ancestral"):
        for steps in (1, 2, 4, 8, 16, 32, 64) if solver == "dpmpp_2m" else (1, 2, 4, 8, 16, 32):
            for floor in (0.25, 0.05) if 1 < steps <= 8 else (0.01,):
                table = SOLVERS[solver](karras(steps, floor, top))
                is_extra = steps not in (4, 8, 32) or (steps, floor) == (8, 0.25)
                yield Arm(f"teacher {solver} {steps} to {floor:g}", steps, network, table, 1, network, is_extra)


def guided_arms(recipe: Recipe, out: Path, student: Checkpoint, teacher: Checkpoint) -> Iterable[Arm]:
    """Both stages told w, and the teacher guided by w with two calls a step, on the same grids."""
    settings = recipe.student
    assert isinstance(settings, Guided)
    first = out / "student-guided.safetensors"
    stage_one = load_checkpoint(first) if first.exists() else student
    fine = ve_levels(stage_one.sigmas)
    for w in (0.0, 0.5, 1.0, 2.0):
        guided, told = predictor(teacher, w), predictor(stage_one, w)
        table = SOLVERS["ddim"](fine)
        yield Arm(f"CFG w={w:g} ddim {table.num_steps}", cost(guided, table), guided, table, 1)
        yield Arm(f"stage 1 w={w:g} ddim {table.num_steps}", table.num_steps, told, table, 1, guided)
        if stage_one is not student:
            few = ve_levels(student.sigmas)
            solver, name = SOLVERS["ddim"](few), method_of(settings).solvers[0]
            yield Arm(f"CFG w={w:g} ddim {solver.num_steps}", cost(guided, solver), guided, solver, 1)
            table = SOLVERS[name](few)
            yield Arm(f"stage 2 w={w:g} {name} {table.num_steps}", table.num_steps, predictor(student, w), table, 1)


def dkdm_arms(recipe: Recipe, out: Path, teacher: Checkpoint, images: Images, seeds: int) -> Iterable[Arm]:
    """The same network trained from scratch for as long, on real images, and on images that the teacher made.

    There are as many of those as the teacher's calls in DKDM, one for each image the student sees, give with 16 steps.
    """
    settings = recipe.student
    assert isinstance(settings, Dkdm)
    assert settings.network is not None
    table = SOLVERS["dpmpp_2m"](karras(16, 0.01, settings.sigma_max))
    count = settings.images // table.num_steps
    for kind in ("real", "made"):
        folder = out / f"on-{kind}-images"
        path = folder / "teacher.safetensors"
        if not path.exists():
            data = images
            if kind == "made":
                label = torch.arange(count) % len(images.class_names)
                x = sample(predictor(teacher), table, label, images.sample_shape, generator(37, recipe.seed))
                pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
                data = replace(images, pixels=pixels, labels=label.numpy())
            plain = replace(
                recipe,
                network=settings.network,
                teacher=Teacher(
                    settings.images, settings.batch, settings.learning_rate, 2_560,
                    ema_half_life=recipe.teacher.ema_half_life,
                ),
            )  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            Run(plain, folder, data, Accelerator(cpu=True), Console(quiet=True)).teacher()
        network = predictor(load_checkpoint(path))
        for solver in ("dpmpp_2m", "ddim"):
            levels = karras(settings.num_steps, settings.sigma_min, settings.sigma_max)
            yield Arm(
                f"on {kind} images {solver} {settings.num_steps}",
                settings.num_steps,
                network,
                SOLVERS[solver](levels),
                seeds,
            )


def seconds_of(out: Path) -> float:
    """What training the student took, from the logs of its stages: seconds of one thread."""
    seconds = 0.0
    for log in out.glob("student*/log.csv"):
        with log.open(newline="") as file:
            before = 0
            for row in csv.DictReader(file):
                seconds += (int(row["images"]) - before) / float(row["images_per_second"])
                before = int(row["images"])
    return round(seconds, 1)


# --- the page

MM = "Digits: moment matching with 4 calls is no worse than the teacher with 32 to 64"
STAGE_ONE = "Digits: guided stage 1 with 16 calls equals guidance by two calls, 32 in all, for w in 0 to 2"
STAGE_TWO = "Digits: guided stage 2 with 4 calls is within 1.15 of 16-step guidance (32 calls)"
DKDM = "Digits: DKDM into a network of half the width is within 1.1 of its teacher at equal calls"
DKDM_MADE = "Digits: DKDM is better than the same network trained on teacher-made images of equal cost"
FASHION = "Fashion-MNIST: moment matching with 4 calls is no worse than the guided teacher with 64"
TRIED: dict[str, str] = {  # where a target was missed; one run each on 2026-11-21, training seed 0
    MM: "four times the images: 42.5; twice the images and rate: 42.7, the same with weight_power 0.5: 41.2; twice the "
    "images, sigma_min 0.12: 45.7. `digits-dmd` comes to the teacher's distance, so the network can",
    STAGE_ONE: "it is w = 0 that misses, an end of the range trained on, where errors are largest; a longer run and a "
    "range from below 0 were not tried",
    STAGE_TWO: "w = 0 again, as stage 1",
    DKDM: "the same network trained on the real images is no nearer, so what limits is its size or its 38 400 images; "
    "a longer run was not made",
    FASHION: "the student's own table with 6 calls comes to 94.9; a longer run was not made",
}
Cell = dict[str, Any]


def write(runs: Path) -> None:
    """Gather all figures there are into the page, its JSON and its pictures."""
    held = {
        out.name: json.loads((out / JUDGED).read_text("utf-8"))
        for out in sorted(runs.iterdir())
        if (out / JUDGED).exists()
    }
    students: dict[str, Cell] = {}
    for name in RECIPES:
        units = [held[key] for key in held if key.rpartition("-")[0] == name]
        if units:
            units.sort(key=lambda unit: -len(unit["arms"]))
            arms = {arm: gathered([unit for unit in units if arm in unit["arms"]], arm) for arm in units[0]["arms"]}
            recipe = load_recipe(name).student
            students[name] = {
                "method": recipe.method, "steps": recipe.num_steps, "solver": method_of(recipe).solvers[0],
                "seeds": len(units), "images": recipe.images, "arms": arms,
                "seconds": spread([unit["about"]["seconds"] for unit in units]),
            }  # fmt: skip
    fashion = {key.removeprefix("fashion-"): unit for key, unit in held.items() if key.startswith("fashion-")}
    any_unit = next(unit for key, unit in held.items() if not key.startswith("fashion-"))
    results = {
        "date": date.today().isoformat(), "machine": platform.machine(), "threads": 1,
        "samples": any_unit["about"]["samples"], "classifier_sha256": any_unit["classifier"],
        "floor": any_unit["floor"], "students": students,
        "fashion": {
            name: {**{k: unit[k] for k in ("about", "floor", "classifier")},
                   "arms": {arm: gathered([unit], arm) for arm in unit["arms"]}}
            for name, unit in fashion.items()
        },
    }  # fmt: skip
    results["targets"] = targets(results)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "students.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    plot(results)
    for name in students:
        own = f"student-{students[name]['solver']}-{students[name]['steps']}.png"
        if (runs / f"{name}-0" / own).exists():
            shutil.copy(runs / f"{name}-0" / own, PICTURES / f"{name}.png")
    (RESULTS / "students.md").write_text(page(results), "utf-8")


def gathered(units: list[Cell], arm: str) -> Cell:
    """An arm's figures over training seeds, each averaged over its noise seeds first; sd between training seeds.

    With one training seed the sd is that between noise seeds.
    """
    sets = [[Figures(**each) for each in unit["arms"][arm]["figures"]] for unit in units]
    means = [over(figures, np.mean) for figures in sets] if len(sets) > 1 else sets[0]
    cell: Cell = {"calls": units[0]["arms"][arm]["calls"]}
    for name in Figures.__dataclass_fields__:
        values = [getattr(figures, name) for figures in means]
        if None not in values:
            cell[name] = spread(values)
    return cell


def spread(values: list[float]) -> Cell:
    """Mean and standard deviation."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def distance(cell: Cell) -> float:
    """Mean Frechet distance of an arm."""
    return float(cell["frechet_distance"]["mean"])


def best_teacher(arms: Mapping[str, Cell], steps: int, solver: str | None = None) -> tuple[str, Cell]:
    """The best training-free table of some number of steps, over solvers and grids."""
    found = {name: cell for name, cell in arms.items() if name.startswith("teacher ") and cell["calls"] == steps}
    if solver:
        found = {name: cell for name, cell in found.items() if name.split()[1] == solver}
    name = min(found, key=lambda each: distance(found[each]))
    return name, found[name]


def targets(results: Cell) -> list[Cell]:
    """What was aimed at, and what came of it."""
    students, found = results["students"], list[Cell]()

    def add(target: str, measured: str, is_met: bool) -> None:
        found.append(
            {"target": target, "measured": measured, "met": is_met, "tried": "" if is_met else TRIED.get(target, "")}
        )

    if "digits" in students:
        arms = students["digits"]["arms"]
        own = distance(arms["student ancestral 4"])
        many = {steps: distance(best_teacher(arms, steps, "dpmpp_2m")[1]) for steps in (32, 64)}
        add(
            MM,
            f"{own:.1f} against {many[32]:.1f} (32 calls) and {many[64]:.1f} (64)", own <= max(many.values()),
        )  # fmt: skip
    if "digits-guided" in students:
        arms = students["digits-guided"]["arms"]
        ratios = {}
        for w in ("0", "0.5", "1", "2"):
            one, two = arms[f"stage 1 w={w} ddim 16"], arms[f"CFG w={w} ddim 16"]
            ratios[w] = distance(one) / distance(two)
        add(
            STAGE_ONE,
            "ratio of distances " + ", ".join(f"{r:.2f} (w = {w})" for w, r in ratios.items()),
            all(ratio <= 1.1 for ratio in ratios.values()),
        )  # fmt: skip
        late = {w: distance(arms[f"stage 2 w={w} ddim 4"]) / distance(arms[f"CFG w={w} ddim 16"]) for w in ratios}
        add(
            STAGE_TWO,
            "ratio of distances " + ", ".join(f"{r:.2f} (w = {w})" for w, r in late.items()),
            all(ratio <= 1.15 for ratio in late.values()),
        )  # fmt: skip
    if "digits-dkdm" in students and "digits" in students:
        arms, steps = students["digits-dkdm"]["arms"], students["digits-dkdm"]["steps"]
        own = distance(arms[f"student dpmpp_2m {steps}"])
        teacher = distance(best_teacher(students["digits"]["arms"], steps, "dpmpp_2m")[1])
        made = distance(arms[f"on made images dpmpp_2m {steps}"])
        add(
            DKDM,
            f"{own:.1f} against {teacher:.1f}: ratio {own / teacher:.2f}", own <= 1.1 * teacher,
        )  # fmt: skip
        add(
            DKDM_MADE,
            f"{own:.1f} against {made:.1f} (on the real images: "
            f"{distance(arms[f'on real images dpmpp_2m {steps}']):.1f})",
            own < made,
        )  # fmt: skip
    arms = json.loads((RESULTS / "fashion-mnist-mm4.json").read_text("utf-8"))["arms"]
    own, many = (arms[name]["fd"] for name in ("student ddim 4", "teacher dpmpp_2m 32"))
    add(FASHION, f"{own:.1f} against {many:.1f}, guidance 2 (figures of the README)", own <= many)
    return found


def plot(results: Cell) -> None:
    """Quality against network calls."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    students = results["students"]
    if "digits" in students:
        arms = students["digits"]["arms"]
        for solver, mark in (("dpmpp_2m", "k-"), ("ddim", "k--"), ("ancestral", "k:")):
            counts = sorted({c["calls"] for n, c in arms.items() if n.startswith(f"teacher {solver} ")})
            values = [distance(best_teacher(arms, count, solver)[1]) for count in counts]
            axes.plot(counts, values, mark, label=f"teacher, {solver}", linewidth=1)
    colours = pyplot.get_cmap("tab20")
    for i, (name, cell) in enumerate(students.items()):
        own = cell["arms"][f"student {cell['solver']} {cell['steps']}"]["frechet_distance"]
        shift = 1 + 0.012 * (i - len(students) / 2)
        axes.errorbar(
            cell["steps"] * shift,
            own["mean"],
            own["sd"],
            fmt="o",
            markersize=5,
            capsize=2,
            color=colours(i),
            label=name,
        )
    axes.axhline(results["floor"]["frechet_distance"], color="grey", linewidth=0.8, label="held-out images")
    axes.set(
        xscale="log", yscale="log", xlabel="network calls a sample", ylabel="Frechet distance (classifier features)"
    )
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], labels=["1", "2", "4", "8", "16", "32", "64"])
    axes.legend(fontsize=7, ncols=2)
    axes.set_title("Digits: mean and sd of the students' distance", fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / "students.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


COLUMNS = (
    ("frechet_distance", 1), ("precision", 2), ("recall", 2), ("class_accuracy", 3), ("memorisation", 2),
    ("rmse_to_teacher", 3),
)  # fmt: skip


def figures_of(cell: Cell) -> list[str]:
    """An arm's columns."""
    said = []
    for name, digits in COLUMNS:
        value = cell.get(name)
        if value is None:
            said.append("")
        elif isinstance(value, float):
            said.append(f"{value:.{digits}f}")
        else:
            said.append(f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}")
    return said


def line(*cells: object) -> str:
    """A row of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def page(results: Cell) -> str:
    """The page."""
    students, floor, aims = results["students"], results["floor"], results["targets"]
    header = ("distance", "precision", "recall", "class accuracy", "memorisation", "RMSE to teacher")
    text = [
        "# Students, measured", "",
        "Made by `python benchmarks/quality.py` from `students.json` beside it; do not edit.", "",
        f"{results['date']}, one thread of a shared {results['machine']} machine. Digits: scikit-learn's 1797 of 8 x 8 "
        "pixels, the recipes that ship, each trained from its own seed with a teacher of that seed. Mean and standard "
        "deviation are over training seeds, where more than one was judged, else over noise seeds. Each is judged on "
        f"{results['samples']} samples by one classifier (sha256 {results['classifier_sha256'][:12]}). *distance* is "
        "the Frechet distance to the training images in its features: not FID, and only comparable on this page. "
        "*memorisation* is the distance to the nearest training image over that of held-out images: well below 1 is "
        "copying. "
        "*RMSE to teacher* is from the same noise to the teacher's own solution, where the table adds none.", "",
        "![Frechet distance against network calls](students.png)", "",
        "## What was aimed at", "", line("target", "measured", "", "tried"), line(*["---"] * 4),
        *(line(t["target"], t["measured"], "met" if t["met"] else "**missed**", t["tried"]) for t in aims), "",
        "## Digits", "",
        line("network", "table", "calls", *header, "training, s", "seeds"), line(*["---"] * (5 + len(header))),
        line("held-out images", "the floor", "", *figures_of(floor), "", ""),
    ]  # fmt: skip
    if "digits" in students:
        arms, seeds = students["digits"]["arms"], students["digits"]["seeds"]
        for steps in (1, 2, 4, 8, 16, 32, 64):
            name, cell = best_teacher(arms, steps)
            text.append(line("teacher, best table", name.removeprefix("teacher "), steps, *figures_of(cell), "", seeds))
    for name, cell in students.items():
        for arm, own in cell["arms"].items():
            steps = int(arm.split()[-1]) if arm.startswith("student ") else 0
            if steps == cell["steps"]:
                table, first = arm.removeprefix("student "), arm.split()[1] == cell["solver"]
                label = f"`{name}`" if first else ""
                took = f"{cell['seconds']['mean']:.0f}" if first else ""
                text.append(line(label, table, own["calls"], *figures_of(own), took, cell["seeds"]))
    text += ["", *guided_page(students), *dkdm_page(students), *fashion_page(results["fashion"], header)]
    text += [
        "## Beside the papers", "",
        line("method", "the paper's claim", "measured here", "what this can show", "what it cannot"),
        line(*["---"] * 5),
    ]  # fmt: skip
    for name, cell in students.items():
        own = cell["arms"][f"student {cell['solver']} {cell['steps']}"]
        claim, can, cannot = CLAIMS[cell["method"]]
        text.append(line(f"{cell['method']} (`{name}`)", claim, verdict(students, cell, own), can, cannot))
    text += ["", "## Samples", "", "Ten of each class, training seed 0, the recipe's own table.", ""]
    for name in students:
        text += [f"`{name}`", "", f"![samples of {name}](../images/{name}.png)", ""]
    return "\n".join(text)


def verdict(students: Cell, cell: Cell, own: Cell) -> str:
    """A student beside its teacher with as many calls, and with many."""
    if "digits" not in students:
        return f"{distance(own):.1f}"
    arms = students["digits"]["arms"]
    name, same = best_teacher(arms, cell["steps"])
    many = distance(best_teacher(arms, 32)[1])
    return (
        f"{distance(own):.1f} with {cell['steps']} calls; teacher {distance(same):.1f} with as many "
        f"({name.split()[1]}), {many:.1f} with 32"
    )


def guided_page(students: Cell) -> list[str]:
    """Distance by guidance."""
    if "digits-guided" not in students:
        return []
    arms = students["digits-guided"]["arms"]
    rows = [
        "### Guidance: one call for two", "",
        "`digits-guided`. Stage 1 is told w and calls once a step; guidance without distillation (CFG) calls twice.",
        "",
        line("w", "CFG, ddim, 32 calls", "stage 1, ddim, 16 calls", "RMSE to CFG's solution", "CFG, ddim, 8 calls",
             "stage 2, ddim, 4 calls", "stochastic stage 2, 4 calls"),
        line(*["---"] * 7),
    ]  # fmt: skip
    other = students.get("digits-guided-stochastic", {"arms": {}})["arms"]

    def said(cell: Cell | None, name: str = "frechet_distance", digits: int = 1) -> str:
        return f"{cell[name]['mean']:.{digits}f} ± {cell[name]['sd']:.{digits}f}" if cell and name in cell else ""

    for w in ("0", "0.5", "1", "2"):
        one = arms[f"stage 1 w={w} ddim 16"]
        rows.append(
            line(
                w, said(arms[f"CFG w={w} ddim 16"]), said(one), said(one, "rmse_to_teacher", 3),
                said(arms[f"CFG w={w} ddim 4"]), said(arms[f"stage 2 w={w} ddim 4"]),
                said(other.get(f"stage 2 w={w} meng_stochastic 4")),
            )
        )  # fmt: skip
    return [*rows, ""]


def dkdm_page(students: Cell) -> list[str]:
    """DKDM beside the same network trained otherwise."""
    rows = []
    for name in students:
        arms, steps = students[name]["arms"], students[name]["steps"]
        for solver in ("dpmpp_2m", "ddim"):
            cells = [arms.get(f"{who} {solver} {steps}") for who in ("student", "on real images", "on made images")]
            if all(cells):
                rows.append(line(f"`{name}`", f"{solver} {steps}", *(figures_of(cell)[0] for cell in cells if cell)))
    if not rows:
        return []
    return [
        "### DKDM: no data", "",
        "The same small network, trained as long: by DKDM, on the real images, and on images that the teacher made "
        "at the cost of all of DKDM's teacher calls.", "",
        line("recipe", "table", "DKDM", "on real images", "on teacher-made images"), line(*["---"] * 5), *rows, "",
    ]  # fmt: skip


def fashion_page(fashion: Cell, header: tuple[str, ...]) -> list[str]:
    """Finished runs on Fashion-MNIST."""
    text = []
    for name, cell in fashion.items():
        text += [
            f"## Fashion-MNIST: `{name}`", "",
            f"One training seed, {cell['about']['seconds']:.0f} s of one thread for the student; "
            f"{cell['about']['samples']} samples. The distances are of a classifier of their own (sha256 "
            f"{cell['classifier'][:12]}).", "",
            line("network", "calls", *header), line(*["---"] * (2 + len(header))),
            line("held-out images", "", *figures_of(cell["floor"])),
            *(line(arm, own["calls"], *figures_of(own)) for arm, own in cell["arms"].items()), "",
        ]  # fmt: skip
    return text


if __name__ == "__main__":
    main()
