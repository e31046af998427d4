"""A run: teacher, student, evaluation, each taken up where the folder shows it was left.

    out/teacher/  student/     state.safetensors to resume from, log.csv, sample grids
    out/teacher.safetensors    the finished networks; `load_checkpoint` reads them, export wants the student
    out/student.safetensors    (of a method of several stages, ``student-...`` are those before the last)
    out/classifier.safetensors the judge's feature network
    out/metrics.json  *.png    what came of it

Devices and processes are Accelerate's: under ``accelerate launch`` its processes are used, else
``processes`` are started here. On a CPU each keeps to one thread: two threads that contend for a core are
slower than one. In bfloat16, Accelerate casts inside the networks that are trained; weights, averages and
losses stay in float32.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from rich.console import Console
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from ..runtime.schedules import karras
from ..runtime.solvers import SOLVERS
from ..runtime.tableau import Tableau
from .architectures import AnyNetwork, build_network, conditions_of, configure, denoiser_of
from .checkpoint import Checkpoint, CheckpointError, WriteError, load_checkpoint, save_checkpoint, writing
from .denoiser import Denoiser
from .diffusers_teacher import DiffusersError, load_network
from .distillation import Distillation, Stage
from .evaluate import Scores, make_judge, write_metrics
from .images import DataError, Images, load_images, to_float
from .loop import Plan, TrainingError, generator, train_plan
from .methods import method_of
from .network import NetworkConfig, channels_last
from .recipe import Dkdm, Guided, Recipe, RecipeError, Student
from .sampling import sample, save_grid, ve_levels
from .teacher import teacher_plan

Part = Literal["teacher", "student", "evaluation"]
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16"}  # by Accelerate's names
PARTS: tuple[Part, ...] = ("teacher", "student", "evaluation")


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    data: str | Path | None = None,
    processes: int = 1,
    precision: str = "float32",
    until: Part = "evaluation",
    quiet: bool = False,
) -> Path:
    """Train a teacher, distil a student, evaluate both.

    What ``out`` already holds is kept and gone on from; a kill at any moment costs the work since the last
    checkpoint and changes nothing in the result.

    Args:
        recipe: what to do; see `load_recipe`.
        out: the run's folder.
        data: where the images are, if not where the recipe says.
        processes: processes to start, one a GPU or CPU core. The result depends on their number.
        precision: ``float32`` or ``bfloat16``, what the networks that are trained compute in. Weights are float32.
        until: last stage to do.
        quiet: print nothing.

    Returns:
        The path of the student's checkpoint.

    Raises:
        DataError: the images cannot be used.
        RecipeError: the recipe does not suit the images.
        TrainingError: a loss is not finite, or ``out`` belongs to another recipe.
        WriteError: a file of ``out`` cannot be written, for one because the disk is full.
    """
    if precision not in MIXED_PRECISION:
        raise TrainingError(f"precision = {precision!r} should be one of {', '.join(MIXED_PRECISION)}")
    out = Path(out)
    images = read_data(recipe, data)  # before any process starts, so that an error is one line
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if processes == 1 or "RANK" in os.environ:
        _work(0, recipe, out, images, precision, until, quiet)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            start_processes(
                _process, (processes, port, recipe, out, data, precision, until, quiet), processes,
                start_method=start_method(),
            )  # type: ignore[no-untyped-call]  # fmt: skip
        except ProcessRaisedException as error:
            for kind in (TrainingError, WriteError, CheckpointError, DataError, RecipeError):
                _, found, message = str(error).rpartition(f"{kind.__module__}.{kind.__name__}: ")
                if found:
                    raise kind(message.strip()) from None
            raise
        except ProcessExitedException as error:
            why = "is memory short?" if error.signal_name == "SIGKILL" else "and says no more"
            goes_on = "the same command goes on from the last checkpoint"
            raise TrainingError(f"{str(error).strip()}; {why} {goes_on}") from None
    return out / "student.safetensors"


def start_method() -> str:
    """How processes are started: on a CPU from one that imports PyTorch once for all, now and later.

    What is forked cannot use CUDA if the import has touched the driver, so there each imports for itself.
    """
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    return "forkserver"


def read_data(recipe: Recipe, data: str | Path | None) -> Images:
    """The images of a recipe, from ``data`` if given; checked against the network's shape."""
    images = load_images(recipe.data.source, data or recipe.data.path, recipe.data.class_names)
    if recipe.data.sigma_data is None:
        images.sigma_data()
    try:
        config = network_config(recipe, images)
    except DiffusersError as error:
        raise RecipeError(f"[network] {error}") from None
    except ValueError as error:
        raise RecipeError(f"[network] does not suit the images: {error}") from None
    if config.diffusers is not None:
        refuse_misuse(recipe.student, config)
    return images


def refuse_misuse(settings: Student, config: NetworkConfig) -> None:
    """Check that a method can do with a network of diffusers as it is.

    Raises:
        RecipeError: it asks for levels, classes or inputs that the network does not know.
    """
    assert config.diffusers is not None
    schedule = config.diffusers.schedule()
    least, most = (float(schedule.ratio(np.array([t]))[0]) for t in (0.0, np.inf))
    if settings.sigma_max > most * (1 + 1e-6):
        raise RecipeError(f"[student] sigma_max = {settings.sigma_max:g}; the network's noisiest level is {most:.6g}")
    if settings.sigma_floor < least * (1 - 1e-6):
        floor = f"{settings.sigma_floor:g}; the network's cleanest level is {least:.3g}"
        raise RecipeError(f"[student] sigma_floor = {floor}")
    if not config.takes_label and settings.guidance != 0:
        raise RecipeError(f"[student] guidance = {settings.guidance:g}, but the network takes no class; give 0")
    if isinstance(settings, Dkdm) and not settings.conditional and settings.network is None and config.takes_label:
        raise RecipeError("[student] conditional = false needs a [student.network]; the teacher's is told a class")
    if isinstance(settings, Guided):
        raise RecipeError("[student] method = 'guided' adds an input, which networks of diffusers do not have")


def network_config(recipe: Recipe, images: Images) -> NetworkConfig:
    """The recipe's network for these images."""
    return configure(recipe.network, images.sample_shape, len(images.class_names))


def _process(
    rank: int,
    count: int,
    port: int,
    recipe: Recipe,
    out: Path,
    data: str | Path | None,
    precision: str,
    until: Part,
    quiet: bool,
) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    _work(rank, recipe, out, read_data(recipe, data), precision, until, quiet)
    torch.distributed.destroy_process_group()


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone: killed, it cannot, and the run would go on unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(rank: int, recipe: Recipe, out: Path, images: Images, precision: str, until: Part, quiet: bool) -> None:
    cpu = not torch.cuda.is_available()
    if cpu:
        torch.set_num_threads(1)
    torch.set_flush_denormal(cpu)
    try:
        _stages(cpu, recipe, out, images, precision, until, quiet)
    finally:
        torch.set_flush_denormal(False)  # it is the whole process's, whose other work counts on them


def _stages(cpu: bool, recipe: Recipe, out: Path, images: Images, precision: str, until: Part, quiet: bool) -> None:
    AcceleratorState._reset_state()  # else a process is held to its first precision
    # No buffer here changes; were they sent around at every call, processes that call a student for other numbers of
    # steps of its own would wait for each other for ever.
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=cpu, mixed_precision=MIXED_PRECISION[precision], kwargs_handlers=[parallel])
    console = Console(stderr=True, quiet=quiet or not accelerator.is_main_process)
    run = Run(recipe, out, images, accelerator, console)
    last = PARTS.index(until)
    teacher = run.teacher()
    if last >= 1:
        student = run.student(teacher)
        if last >= 2:
            run.evaluation(teacher, student)
    accelerator.wait_for_everyone()


class Run:
    """The stages of one run, on one process of several."""

    def __init__(self, recipe: Recipe, out: Path, images: Images, accelerator: Accelerator, console: Console) -> None:
        self.recipe, self.out, self.images = recipe, out, images
        self.accelerator, self.console = accelerator, console
        if accelerator.is_main_process:
            for left in out.glob("**/.*.safetensors.[0-9]*"):  # by a run that was killed while it wrote
                left.unlink(missing_ok=True)
        self.student_seed = recipe.seed if recipe.student.seed is None else recipe.student.seed
        self.sigma_data = recipe.data.sigma_data or round(images.sigma_data(), 3)
        self.no_class = len(images.class_names)
        levels = karras(recipe.student.num_steps, recipe.student.sigma_min, recipe.student.sigma_max)
        self.sigmas = tuple(float(sigma) for sigma in levels.sigma[:-1])

    def teacher(self) -> Checkpoint:
        """Train the teacher, or load the finished one, or that of a folder."""
        if self.recipe.network.folder is not None and not (self.out / "teacher.safetensors").exists():
            self._take(self.recipe.network.folder)
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            network = build_network(network_config(self.recipe, self.images))

        def plan() -> Plan:
            return teacher_plan(self.recipe.teacher, self._denoiser(self._prepare(network)))

        return self._finish(plan, network, "teacher", (), 0.0)

    def _take(self, folder: str) -> None:
        """Keep a trained network of diffusers as the teacher."""
        if self.accelerator.is_main_process:
            network = load_network(folder, conditions_of(self.recipe.network))
            network.config = network_config(self.recipe, self.images)
            self._save(self.out / "teacher.safetensors", "teacher", network, (), 0.0, 0)
        self.accelerator.wait_for_everyone()

    def student(self, teacher: Checkpoint) -> Checkpoint:
        """Distil the student stage by stage, or load the finished one."""
        before = teacher
        for stage in method_of(self.recipe.student).stages(self.recipe.student, self.sigmas):
            before = self._stage(stage, teacher, before)
        return before

    def _stage(self, stage: Stage, teacher: Checkpoint, before: Checkpoint) -> Checkpoint:
        """Do one stage, or load what came of it."""
        settings = self.recipe.student
        config = stage.config(before.network.config)
        with torch.random.fork_rng():
            torch.manual_seed(self.student_seed + 1)
            student = build_network(config)
        if not stage.from_scratch:  # only an embedding of guidance is new
            student.load_state_dict(student.state_dict() | before.network.state_dict())

        def plan() -> Plan:
            auxiliary = build_network(before.network.config)
            auxiliary.load_state_dict(before.network.state_dict())
            source = before if stage.teaches_itself else teacher
            frozen = channels_last(source.network).to(self.accelerator.device)
            student_ = self._denoiser(self._prepare(student))
            distillation = Distillation(
                teacher=self._denoiser(frozen, settings.guidance if source is teacher else 0.0),
                student=student_,
                auxiliary=self._denoiser(self._prepare(auxiliary)) if stage.has_auxiliary else student_,
                sigmas=stage.sigmas,
                sigma_floor=settings.sigma_floor,
                sigma_data=self.sigma_data,
                images=self.images,
                device=self.accelerator.device,
                seed=self.student_seed,
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
            )
            return dataclasses.replace(stage.plan(settings, distillation), name=stage.name, images=stage.images)

        return self._finish(plan, student, stage.name, stage.sigmas, settings.guidance)

    def _denoiser(self, network: nn.Module, guidance: float = 0.0) -> Denoiser:
        config = self.accelerator.unwrap_model(network).config
        return denoiser_of(network, config, self.sigma_data, self.no_class, guidance)

    def _prepare(self, network: nn.Module) -> nn.Module:
        prepared = self.accelerator.prepare(channels_last(network))
        assert isinstance(prepared, nn.Module)
        return prepared

    def _finish(
        self,
        make_plan: Callable[[], Plan],
        network: AnyNetwork,
        name: str,
        sigmas: tuple[float, ...],
        guidance: float,
    ) -> Checkpoint:
        """Carry out a plan unless its result is there, and return the result."""
        path, kind = self.out / f"{name}.safetensors", "teacher" if name == "teacher" else "student"
        if not path.exists():
            plan, show = make_plan(), partial(self._show, sigmas=sigmas)
            seed = self.recipe.seed if kind == "teacher" else self.student_seed
            averaged = train_plan(
                plan, self.images, self.recipe, seed, self.out / name, self.accelerator, self.console, show
            )
            network.load_state_dict(averaged)
            if self.accelerator.is_main_process:
                self._save(path, kind, network, sigmas, guidance, plan.steps * plan.batch)
            self.accelerator.wait_for_everyone()
        checkpoint = load_checkpoint(path)
        if (checkpoint.kind, checkpoint.sigmas) != (kind, sigmas):
            theirs = f"a {checkpoint.kind} of {len(checkpoint.sigmas)} steps" if checkpoint.sigmas else "a teacher"
            raise TrainingError(f"{path}: is {theirs}, and not what the run calls {name}; move it away")
        differences = self.recipe.differences(checkpoint.recipe.text, student=kind == "student")
        if differences:
            raise TrainingError(f"{path}: made by another recipe ({'; '.join(differences[:3])}); use another folder")
        return checkpoint

    def _save(
        self, path: Path, kind: str, network: AnyNetwork, sigmas: tuple[float, ...], guidance: float, images: int
    ) -> None:
        data = self.recipe.data
        checkpoint = Checkpoint(
            kind, network, self.recipe, self.images.class_names, self.sigma_data, sigmas, guidance, images,
            data.dataset, data.licence,
        )  # fmt: skip
        save_checkpoint(checkpoint, path)

    def _show(self, network: nn.Module, path: Path, sigmas: tuple[float, ...]) -> None:
        """Draw a few samples of every class, on the grid of the stage."""
        guidance = self.recipe.student.guidance
        if sigmas:
            name = method_of(self.recipe.student).solvers[0] if sigmas == self.sigmas else "ddim"
            denoiser, tableau = self._few_step(network), SOLVERS[name](ve_levels(sigmas))
        else:
            denoiser, tableau = self._denoiser(network, guidance), self._table("dpmpp_2m", 12, 0.02)
        classes, columns = min(10, self.no_class), 8
        label = torch.arange(classes, device=self.accelerator.device).repeat_interleave(columns)
        network.eval()
        x = sample(denoiser, tableau, label, self.images.sample_shape, generator(self.recipe.seed, 11))
        network.train()
        save_grid(x, path, columns)

    def _few_step(self, network: nn.Module) -> Denoiser:
        """A student, told its guidance if it has to be told."""
        denoiser = self._denoiser(network)
        return dataclasses.replace(denoiser, guidance=self.recipe.student.guidance * denoiser.takes_guidance)

    def _table(self, solver: str, num_steps: int | None = None, sigma_min: float | None = None) -> Tableau:
        settings = self.recipe.student
        return SOLVERS[solver](
            karras(num_steps or settings.num_steps, sigma_min or settings.sigma_min, settings.sigma_max)
        )

    def evaluation(self, teacher: Checkpoint, student: Checkpoint) -> None:
        """Judge teacher and student by many tables, and write ``metrics.json`` and the grids."""
        settings, path = self.recipe.evaluation, self.out / "classifier.safetensors"
        if self.accelerator.is_main_process:
            make_judge(self.images, path, settings.classifier_images, self.recipe.seed)
        self.accelerator.wait_for_everyone()
        judge = make_judge(self.images, path, settings.classifier_images, self.recipe.seed)
        arms = list(self._arms(teacher, student))
        device = self.accelerator.device
        for checkpoint in (teacher, student):
            channels_last(checkpoint.network).to(device)

        # The units, an arm with one noise seed each, are dealt out to the processes.
        label = torch.arange(settings.samples) % self.no_class
        units = [(name, seed) for name, _, _, seeds in arms for seed in range(seeds)]
        mine: list[tuple[str, int, Scores]] = []
        named = {name: (denoiser, tableau) for name, denoiser, tableau, _ in arms}
        for name, seed in units[self.accelerator.process_index :: self.accelerator.num_processes]:
            denoiser, tableau = named[name]
            rng = generator(self.recipe.seed, 13, seed)
            x = sample(denoiser, tableau, label.to(device), self.images.sample_shape, rng).cpu()
            try:
                scores = judge.scores(x, label)
            except TrainingError as error:
                raise TrainingError(f"{name}: {error}") from None
            mine.append((name, seed, scores))
            self.console.print(
                f"{name}, noise {seed}: FD {scores.fd:.2f}, accuracy {scores.accuracy:.3f}, "
                f"diversity {scores.diversity:.2f}",
                highlight=False,
            )
            if seed == 0:
                columns = 16
                order = torch.argsort(label, stable=True)
                first = torch.cat([order[label[order] == c][:columns] for c in range(self.no_class)])
                save_grid(x[first], self.out / f"{name.replace(' ', '-')}.png", columns)
        gathered = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        if self.accelerator.is_main_process:
            real = to_float(self.images.held_out_pixels[: settings.samples])
            floor = judge.scores(real, torch.from_numpy(self.images.held_out_labels[: settings.samples]))
            write_metrics(
                self.out / "metrics.json",
                {
                    "recipe": self.recipe.name, "recipe_hash": self.recipe.hash,
                    "samples": settings.samples, "classifier_sha256": judge.sha256,
                    "held_out": dataclasses.asdict(floor), "held_out_samples": len(real),
                    "arms": {name: _summary(name, tableau, gathered) for name, _, tableau, _ in arms},
                },
            )  # fmt: skip

    def _arms(self, teacher: Checkpoint, student: Checkpoint) -> Iterable[tuple[str, Denoiser, Tableau, int]]:
        """What is compared: name, network, table, noise seeds."""
        settings, steps = self.recipe.evaluation, self.recipe.student.num_steps
        method = method_of(self.recipe.student)
        guided = self._denoiser(teacher.network, self.recipe.student.guidance)
        few = self._few_step(student.network)
        yield "teacher dpmpp_2m 32", guided, self._table("dpmpp_2m", 32, 0.01), min(2, settings.noise_seeds)
        for solver in ("ancestral", "ddim", "dpmpp_2m"):
            yield f"teacher {solver} {steps}", guided, self._table(solver), 1
        for solver in method.solvers:
            for count in sorted({*settings.step_counts, steps} if method.any_steps else {steps}):
                seeds = settings.noise_seeds if count == steps else 1
                yield f"student {solver} {count}", few, self._table(solver, count), seeds


def _summary(name: str, tableau: Tableau, gathered: list[tuple[str, int, Scores]]) -> dict[str, object]:
    """One arm's scores over its noise seeds."""
    scores = [score for arm, _, score in sorted(gathered, key=lambda unit: unit[1]) if arm == name]
    columns = torch.tensor([[score.fd, score.accuracy, score.diversity] for score in scores], dtype=torch.float64)
    mean: Tensor = columns.mean(0)
    by_class = torch.tensor([score.by_class for score in scores], dtype=torch.float64).mean(0)
    return {
        "num_steps": len(tableau.a),
        "fd": float(mean[0]), "accuracy": float(mean[1]), "diversity": float(mean[2]),
        "fd_by_seed": columns[:, 0].tolist(), "accuracy_by_class": by_class.tolist(),
    }  # fmt: skip
