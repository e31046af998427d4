"""A training run, written down: one TOML file, one frozen dataclass a table.

Everything that decides the outcome is here and nothing else is, so a recipe and its data make the same
student twice. A recipe travels inside every checkpoint, and a checkpoint of another recipe is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .denoiser import PredictionType
from .images import Source

SHIPPED = Path(__file__).parent / "recipes"
WITHOUT_EFFECT = {"data.path", "data.dataset", "data.licence", "teacher.checkpoint_every", "student.checkpoint_every"}


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the table, the setting and the remedy."""


def setting(default: Any = dataclasses.MISSING, *, least: float | None = None, most: float | None = None) -> Any:
    """A field with bounds, both of them allowed values."""
    return field(default=default, metadata={"least": least, "most": most})


@dataclass(frozen=True, slots=True)
class Data:
    """Where the images come from, and what may be done with them."""

    source: Source = "npz"
    path: str | None = None  # relative to the working directory; none for digits
    dataset: str = "unnamed"  # for the student's papers
    licence: str = "unknown"
    class_names: tuple[str, ...] = ()
    sigma_data: float | None = setting(None, least=0.01, most=10)  # measured if absent

    def __post_init__(self) -> None:
        check("data", self)


@dataclass(frozen=True, slots=True)
class Network:
    """Widths and depths; see `network.NetworkConfig`."""

    channels: int = setting(48, least=8)
    blocks: int = setting(2, least=1)
    patch: int = setting(2, least=1)
    fine_channels: int = setting(8, least=8)
    attention: bool = True
    heads: int = setting(4, least=1)
    kind: Literal["unet", "transformer", "diffusers"] = "unet"
    prediction: PredictionType = "edm"
    folder: str | None = None  # of kind diffusers: a pipeline's, which says all of the above; a teacher's weights too
    conditions: str | None = None  # and a safetensors file of what a UNet2DConditionModel is told for each class

    def __post_init__(self) -> None:
        check("network", self)
        if (self.kind == "diffusers") != (self.folder is not None):
            raise RecipeError("[network] kind = 'diffusers' and folder go together")
        if self.conditions is not None and self.folder is None:
            raise RecipeError("[network] conditions are those of kind = 'diffusers'")


@dataclass(frozen=True, slots=True)
class Teacher:
    """EDM training on real images."""

    images: int = setting(600_000, least=1)  # seen in all, repeats counted
    batch: int = setting(64, least=1)  # over all processes
    learning_rate: float = setting(1e-3, least=0)
    warmup_images: int = setting(10_000, least=0)
    label_dropout: float = setting(0.1, least=0, most=1)
    log_sigma_mean: float = -0.8  # ln(sigma) is normal
    log_sigma_std: float = setting(1.5, least=0)
    ema_half_life: float = setting(20_000.0, least=0)  # images
    checkpoint_every: int = setting(32_000, least=1)  # images

    def __post_init__(self) -> None:
        check("teacher", self)


@dataclass(frozen=True)
class Student:
    """What every method is told. Each has a table of its own below, chosen by ``method``."""

    method: str = ""
    num_steps: int = setting(4, least=1, most=64)  # levels the student is sampled on
    sigma_min: float = setting(0.25, least=1e-4)
    sigma_max: float = setting(40.0, least=0.1)
    sigma_floor: float = setting(0.02, least=1e-4)  # noise below which there is nothing to learn
    guidance: float = setting(1.0, least=-1, most=100)  # w of the teacher, baked in
    seed: int | None = setting(
        None, least=0, most=2**62
    )  # the recipe's if left out; several students of one teacher differ in it
    images: int = setting(80_000, least=1)  # seen by the student in each stage; an auxiliary sees as many a turn
    batch: int = setting(64, least=1)  # over all processes
    learning_rate: float = setting(5e-4, least=0)
    ema_half_life: float = setting(3_000.0, least=0)  # images
    checkpoint_every: int = setting(8_000, least=1)  # images

    def __post_init__(self) -> None:
        check("student", self)
        if not self.sigma_floor < self.sigma_min < self.sigma_max:
            raise RecipeError("[student] needs sigma_floor < sigma_min < sigma_max")


@dataclass(frozen=True)
class Matching(Student):
    """What moment matching, Diff-Instruct and DMD share; see `matching`."""

    auxiliary_learning_rate: float = setting(1e-3, least=0)
    auxiliary_turns: int = setting(1, least=1)  # for each turn of the student
    weight_power: float = setting(0.5, least=0, most=1)  # of EDM's weight in the student's own loss


@dataclass(frozen=True)
class MomentMatching(Matching):
    """Moment matching, alternating; see `matching`."""

    method: str = "moment-matching"
    source: Literal["data", "backward"] = "data"  # where z_t comes from


@dataclass(frozen=True)
class WarmStarted(Student):
    """A method that may begin with output distillation."""

    warm_start_images: int = setting(0, least=0)
    warm_start_trajectories: int = setting(2_048, least=1)  # of the teacher
    warm_start_teacher_steps: int = setting(16, least=1)


@dataclass(frozen=True)
class DiffInstruct(Matching, WarmStarted):
    """Diff-Instruct; see `matching`."""

    method: str = "diff-instruct"
    num_steps: int = setting(1, least=1, most=1)
    weight_power: float = setting(0.0, least=0, most=1)
    log_sigma_mean: float = -1.2  # ln(sigma_s) is normal
    log_sigma_std: float = setting(1.2, least=0)


@dataclass(frozen=True)
class Dmd(Matching, WarmStarted):
    """DMD2 without its discriminator; see `matching`."""

    method: str = "dmd"
    source: Literal["data", "backward"] = "backward"
    auxiliary_turns: int = setting(5, least=1)
    weight_power: float = setting(0.0, least=0, most=1)


@dataclass(frozen=True)
class ParameterMatching(Student):
    """Moment matching in parameter space; see `parameter_matching`."""

    method: str = "parameter-moment-matching"
    source: Literal["data", "backward"] = "data"
    guidance: float = setting(0.0, least=0, most=0)  # a guided teacher is at no minimum of a loss of its own
    weight_power: float = setting(0.5, least=0, most=1)
    moment_images: int = setting(12_800, least=1)  # that the teacher's second moments are averaged over


@dataclass(frozen=True)
class Progressive(Student):
    """Progressive distillation; see `progressive`."""

    method: str = "progressive"
    start_steps: int = setting(32, least=2)  # of the first teacher; halved down to num_steps

    def __post_init__(self) -> None:
        Student.__post_init__(self)
        _refuse_uneven(self.start_steps, self.num_steps)


@dataclass(frozen=True)
class Guided(Student):
    """Guided distillation, stage 1 and, if ``num_steps`` is less than ``start_steps``, stage 2; see `guided`."""

    method: str = "guided"
    start_steps: int = setting(16, least=1)
    guidance_min: float = setting(0.0, least=-1)  # w is uniform from here
    guidance_max: float = setting(4.0, least=-1)  # to here
    stage_one_images: int = setting(80_000, least=1)
    stochastic: bool = False  # whether the last stage is for the N-step stochastic sampler

    def __post_init__(self) -> None:
        Student.__post_init__(self)
        if not self.guidance_min <= self.guidance <= self.guidance_max:
            raise RecipeError("[student] needs guidance_min <= guidance <= guidance_max")
        if self.start_steps != self.num_steps:
            _refuse_uneven(self.start_steps, self.num_steps)


@dataclass(frozen=True)
class OutputDistillation(Student):
    """Regression on the teacher's samples; see `output_distillation`."""

    method: str = "output-distillation"
    trajectories: int = setting(2_048, least=1)  # of the teacher
    teacher_steps: int = setting(16, least=1)


@dataclass(frozen=True)
class Reflow(Student):
    """Rectified flow from the teacher's pairs; see `reflow`."""

    method: str = "reflow"
    trajectories: int = setting(4_096, least=1)
    teacher_steps: int = setting(32, least=1)


@dataclass(frozen=True)
class Dkdm(Student):
    """Data-free distillation into another network; see `dkdm`."""

    method: str = "dkdm"
    num_steps: int = setting(16, least=1, most=64)
    sigma_min: float = setting(0.05, least=1e-4)
    order: Literal["dynamic", "shuffled", "iterative"] = "dynamic"
    pool: int = setting(2_048, least=1)  # latents kept, in the dynamic order; over all processes
    chain_steps: int = setting(64, least=2)  # of the teacher
    conditional: bool = True  # whether teacher and student are told a class
    network: Network | None = None  # the student's; the teacher's if left out

    def __post_init__(self) -> None:
        Student.__post_init__(self)
        if self.order == "dynamic" and self.pool < self.batch:
            raise RecipeError(f"[student] pool = {self.pool} should be at least batch = {self.batch}")
        if not self.conditional and self.guidance != 0:
            raise RecipeError(f"[student] guidance = {self.guidance:g} is towards a class; of none, give 0")
        if not self.conditional and self.network is not None and self.network.folder is not None:
            raise RecipeError(
                "[student.network] a network of diffusers is told what its folder says: conditional = true"
            )


@dataclass(frozen=True)
class ConsistencyDistillation(WarmStarted):
    """Consistency distillation; see `consistency`."""

    method: str = "consistency-distillation"
    chain_steps: int = setting(32, least=2)  # levels whose neighbours must agree
    target_decay: float = setting(0.95, least=0, most=1)  # of the averaged target, a step


@dataclass(frozen=True)
class ConsistencyTuning(WarmStarted):
    """Easy consistency tuning; see `consistency`."""

    method: str = "consistency-tuning"
    log_sigma_mean: float = -1.1  # ln(sigma) is normal
    log_sigma_std: float = setting(2.0, least=0)
    ratio: float = setting(2.0, least=1.001)  # q: the gap to the lower level shrinks as q ** -stage
    doublings: int = setting(8, least=1)  # stages, evenly over the run


METHODS: dict[str, type[Student]] = {
    "moment-matching": MomentMatching,
    "parameter-moment-matching": ParameterMatching,
    "diff-instruct": DiffInstruct,
    "dmd": Dmd,
    "progressive": Progressive,
    "guided": Guided,
    "output-distillation": OutputDistillation,
    "reflow": Reflow,
    "dkdm": Dkdm,
    "consistency-distillation": ConsistencyDistillation,
    "consistency-tuning": ConsistencyTuning,
}


def _refuse_uneven(start_steps: int, num_steps: int) -> None:
    halvings = start_steps / num_steps
    if halvings < 2 or halvings not in (2**k for k in range(1, 12)):
        raise RecipeError(f"[student] start_steps = {start_steps} should be num_steps times 2, 4, 8, ...")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How many samples judge a student."""

    samples: int = setting(2_000, least=100)  # of every arm
    noise_seeds: int = setting(3, least=1)  # of the main arms
    classifier_images: int = setting(300_000, least=1_000)  # seen in training the feature network
    step_counts: tuple[int, ...] = (1, 2, 3, 4, 6, 8)  # tried on the student

    def __post_init__(self) -> None:
        check("evaluation", self)
        if not all(1 <= count <= 64 for count in self.step_counts):
            raise RecipeError(f"[evaluation] step_counts = {list(self.step_counts)} should each be between 1 and 64")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole run: data, network, teacher, student, evaluation."""

    name: str
    seed: int = setting(0, least=0, most=2**62)
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=MomentMatching)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        check("", self)

    @property
    def text(self) -> str:
        """Every setting, defaults included, as JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of `text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def differences(self, text: str, *, student: bool = True) -> list[str]:
        """Settings in which another recipe's `text` would give another network, each as ``key: theirs, here ours``.

        Args:
            text: the other recipe's `text`.
            student: whether the network in question is a student; a teacher does not depend on that table.
        """
        tables = ("seed", "data", "network", "teacher", "student")[: 5 if student else 4]
        with contextlib.suppress(RecipeError):  # a setting that is younger than that recipe had its default
            text = recipe_from(json.loads(text)).text
        theirs, ours = _flat(json.loads(text)), _flat(json.loads(self.text))
        return [
            f"{key}: {theirs.get(key, 'absent')!r}, here {ours.get(key, 'absent')!r}"
            for key in sorted(theirs | ours)
            if key.split(".")[0] in tables
            and key not in WITHOUT_EFFECT
            and theirs.get(key, "absent") != ours.get(key, "absent")
        ]


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe by path, or by the name of a shipped one such as ``digits``.

    Raises:
        RecipeError: it does not exist, is not TOML, or has a setting that is unknown or out of bounds.
    """
    path = Path(name)
    if not path.suffix:
        path = SHIPPED / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise RecipeError(f"{name}: no such recipe; give a .toml file or one of {shipped}")
    try:
        return recipe_from(tomllib.loads(path.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name}: not TOML: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {error}") from None


def recipe_from(tables: Mapping[str, Any]) -> Recipe:
    """Build a recipe from parsed TOML, or from the JSON of `Recipe.text`."""
    return _build(Recipe, "", tables)  # type: ignore[no-any-return]


def check(table: str, values: Any) -> None:
    """Hold a table's values to their types and bounds.

    Raises:
        RecipeError: one line naming ``[table] key``, the value and what it should be.
    """
    hints = get_type_hints(type(values))
    for item in dataclasses.fields(values):
        value, place = getattr(values, item.name), f"[{table}] {item.name}" if table else item.name
        if dataclasses.is_dataclass(hints[item.name]) or dataclasses.is_dataclass(value):
            continue
        wanted = _mismatch(value, hints[item.name])
        if wanted:
            raise RecipeError(f"{place} = {value!r} should be {wanted}")
        least, most = item.metadata.get("least"), item.metadata.get("most")
        if value is None or (least is None and most is None):
            continue
        if (least is not None and not value >= least) or (most is not None and not value <= most):
            bounds = f"between {least:g} and {most:g}" if most is not None else f"at least {least:g}"
            bounds = f"{least:g}" if least == most else bounds
            raise RecipeError(f"{place} = {value!r} should be {bounds}")


def _mismatch(value: object, hint: Any) -> str:
    """What ``value`` should be, or nothing if it is that."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return "" if value in choices else "one of " + ", ".join(map(repr, choices))
    if get_origin(hint) is tuple:
        element = get_args(hint)[0]
        good = isinstance(value, tuple) and not any(_mismatch(part, element) for part in value)
        return "" if good else f"a list of {element.__name__}"
    if type(None) in get_args(hint):
        return "" if value is None else _mismatch(value, get_args(hint)[0])
    if isinstance(value, bool) or hint is bool:
        return "" if hint is bool and isinstance(value, bool) else {bool: "true or false"}.get(hint, hint.__name__)
    if hint is float:
        return "" if isinstance(value, int | float) and math.isfinite(value) else "a finite number"
    return "" if isinstance(value, hint) else {int: "a whole number", str: "text in quotes"}[hint]


def _build(kind: Any, table: str, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{table} = {values!r} should be a table, [{table}]")
    if kind is Student:
        kind = _method(values)
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            what = "table" if not table and isinstance(value, Mapping) else "setting"
            place = f"[{table}] {key}" if table else f"[{key}]" if what == "table" else key
            owners = [name for name, other in METHODS.items() if key in get_type_hints(other)]
            if issubclass(kind, Student) and owners:
                raise RecipeError(f"{place} is a setting of {_listed(owners)}, not of {_name_of(kind)!r}")
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(hints)}"
            raise RecipeError(f"{place} is not a {what}; {hint}")
        inner = next((hint for hint in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(hint)), None)
        if inner is not None and value is not None:
            value = _build(inner, f"{table}.{key}" if table else key, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, int) and not isinstance(value, bool) and float in (hints[key], *get_args(hints[key])):
            value = float(value)  # so that 1 and 1.0 are one recipe
        arguments[key] = value
    if kind is Recipe and "name" not in arguments:
        raise RecipeError('name is missing; begin with name = "..."')
    return kind(**arguments)


def _method(values: Mapping[str, Any]) -> type[Student]:
    """The settings' class of the method that a ``[student]`` table names."""
    name = values.get("method", "moment-matching")
    if name not in METHODS:
        raise RecipeError(f"[student] method = {name!r} should be {_listed(METHODS)}")
    return METHODS[name]


def _name_of(kind: type[Student]) -> str:
    return next(name for name, other in METHODS.items() if other is kind)


def _listed(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else "one of " + ", ".join(quoted)


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
