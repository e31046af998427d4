"""A bundle: one deployable student, as a folder that proves what it is.

    bundle.json       the manifest: what the network expects and says, who made it, the hash of every other file
    model.onnx        one network call: ``x[B, ...], t[B], label[B] -> raw[B, ...]``, any B
    tableaus/*        the solvers it is served with; the manifest names the default
    NOTICE, ...       licence notices and whatever else the manifest lists

Loading refuses, by name, any file that is missing, unknown or altered, and any table that was not made for
this network. Nothing in a bundle is executed and nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .files import replace_all
from .prediction import Prediction
from .solvers import why_no_table
from .tableau import Tableau, TableauError

MANIFEST = "bundle.json"
NETWORK = "model.onnx"
WEIGHTS = "model.onnx.data"  # beside it, if they are too large to be in it
FORMAT = 1
EMBEDDED = Path(__file__).parent / "embedded"
DEFAULT_BUNDLE = "fashion-mnist-mm4"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(ge=1, le=65536)]


class BundleError(ValueError):
    """A bundle that cannot be served. One line: which bundle, which file, what is wrong."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkOutput(_Strict):
    """What the network predicts; see `prediction.Prediction`."""

    type: Literal["x0", "eps", "v", "flow", "edm"]
    sigma_data: float = Field(default=0.5, gt=0, lt=1e6)

    def prediction(self) -> Prediction:
        """The runtime's object for it."""
        return Prediction(self.type, self.sigma_data)


class ClassLabels(_Strict):
    """The condition of a class-conditional network: its input ``label``, int64."""

    names: tuple[str, ...] = Field(min_length=1)
    null: int | None = Field(default=None, ge=0)  # the label that means "no condition", if the network knows one

    @model_validator(mode="after")
    def _names_tell_apart(self) -> "ClassLabels":
        folded = [name.casefold() for name in self.names]
        if len(set(folded)) != len(folded):
            raise ValueError("class names must differ by more than case")
        return self

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {name.casefold(): i for i, name in enumerate(self.names)}

    def parse(self, text: str) -> int:
        """The label that a number or a class name means; case and surrounding blanks do not matter.

        Raises:
            ValueError: it is neither.
        """
        wanted = text.strip().casefold()
        label = self._by_name.get(wanted)
        if label is not None:
            return label
        if wanted.isascii() and wanted.isdigit() and len(wanted) < 9 and int(wanted) < len(self.names):
            return int(wanted)
        listed = ", ".join(self.names)
        raise ValueError(f"{text[:80]!r} is no class of this student; it has 0 to {len(self.names) - 1}: {listed}")


class Guidance(_Strict):
    """How guidance reaches the sample.

    ``none``: not at all, or baked in by distillation. ``embedded``: the network takes it as the input
    ``guidance``. ``classifier-free``: a second call without condition, combined by the fused step.
    """

    mode: Literal["none", "embedded", "classifier-free"] = "none"
    default: float = 1.0  # weight of the conditional output: 1 is no guidance
    minimum: float = 1.0
    maximum: float = 1.0

    @model_validator(mode="after")
    def _default_is_in_range(self) -> "Guidance":
        if not self.minimum <= self.default <= self.maximum:
            raise ValueError(f"default {self.default:g} is outside {self.minimum:g} to {self.maximum:g}")
        return self


class TableauChoice(_Strict):
    """Which table a request gets when it does not say."""

    solver: str
    num_steps: int
    by_steps: dict[int, str] = {}  # the solver for a number of steps, where it is another

    def solver_for(self, num_steps: int) -> str:
        """The solver of a request that says no more than its number of steps."""
        return self.by_steps.get(num_steps, self.solver)


class EngineFile(_Strict):
    """A TensorRT engine of the bundle: what it was built from, by what, and where it runs."""

    flavour: Literal["rtx", "full"]  # TensorRT for RTX, or the full one
    version: str  # of the library; an engine runs with no other
    graph: Literal["step", "sampler"]
    precision: Literal["float32", "float16", "bfloat16", "int8"]
    batch: tuple[Positive, Positive, Positive]  # smallest, usual, largest
    targets: tuple[str, ...] = ()  # architectures such as sm89; none: where the library says
    network_sha256: Sha256  # the step graph

    def refusal(self, version: str, capability: str) -> str | None:
        """Why the engine cannot run here, if it cannot.

        Args:
            version: of the TensorRT that is installed.
            capability: compute capability of the GPU without the point, such as ``89``.
        """
        if version != self.version:
            return f"it was built by TensorRT {self.version}, here is {version}"
        if self.targets and f"sm{capability}" not in self.targets:
            return f"it was built for {', '.join(self.targets)}, this GPU is sm{capability}"
        return None


class Manifest(_Strict):
    """``bundle.json``."""

    format: Literal[1]
    name: Name
    version: Name
    description: str
    sample_shape: tuple[Positive, Positive, Positive]  # channels, height, width
    path: Literal["ve", "vp", "flow"]  # the noise path the network was trained on
    output: NetworkOutput
    labels: ClassLabels | None = None
    guidance: Guidance = Guidance()
    default_tableau: TableauChoice
    licence: str
    provenance: dict[str, str]  # who made it, from what, how
    metrics: dict[str, Any]  # measured quality, as the evaluation printed it
    engines: dict[str, EngineFile] = {}  # by file
    files: dict[str, Sha256]  # every file but the manifest

    @model_validator(mode="after")
    def _guidance_has_a_null_label(self) -> "Manifest":
        if self.guidance.mode == "classifier-free" and (self.labels is None or self.labels.null is None):
            raise ValueError("classifier-free guidance needs labels.null, the label of the call without condition")
        return self

    @property
    def weights_sha256(self) -> str:
        """The fingerprint of the network, which tables and engines made for it refer to."""
        hashes = [self.files[name] for name in (NETWORK, WEIGHTS) if name in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A loaded and verified bundle."""

    manifest: Manifest
    path: Path
    tableaus: Mapping[tuple[str, int], Tableau]  # by solver name and number of steps
    max_steps: int | None = None  # of a table; see `within`

    @property
    def name(self) -> str:
        """The student's name, by which requests address it."""
        return self.manifest.name

    @property
    def is_embedded(self) -> bool:
        """Whether it is one of those that come with the package, which are not changed."""
        return self.path.resolve().is_relative_to(EMBEDDED.resolve())

    @property
    def network(self) -> Path:
        """The file of the step graph."""
        return self.path / NETWORK

    def network_in(self, precision: str) -> Path:
        """The file of the step graph in a precision that was added to the bundle; ``float32`` is the step graph itself.

        Raises:
            BundleError: it has none.
        """
        if precision == "float32":
            return self.network
        prefix, suffix = "precisions/", ".onnx"
        have = [name[len(prefix) : -len(suffix)] for name in self.manifest.files
                if name.startswith(prefix) and name.endswith(suffix)]  # fmt: skip
        if precision not in have:
            listed = ", ".join(dict.fromkeys(["float32", *have]))
            how = f"fewstep export {self.name} -o FOLDER --precision {precision}"
            raise BundleError(f"precision: {self.name} has {listed}, not {precision!r}; {how} adds it")
        return self.path / f"{prefix}{precision}{suffix}"

    def within(self, max_steps: int) -> "Bundle":
        """The same student without its tables of more steps, which are not taken from elsewhere either.

        Raises:
            BundleError: its default table is one of them.
        """
        default = self.manifest.default_tableau.num_steps
        if default > max_steps:
            raise BundleError(f"max_steps = {max_steps}: {self.name} has {default} steps where nothing else is said")
        tableaus = {key: tableau for key, tableau in self.tableaus.items() if tableau.num_steps <= max_steps}
        return replace(self, tableaus=tableaus, max_steps=max_steps)

    @property
    def weights_sha256(self) -> str:
        """See `Manifest.weights_sha256`."""
        return self.manifest.weights_sha256

    def tableau(self, solver: str | None = None, num_steps: int | None = None) -> Tableau:
        """The table a request asks for; what it leaves out is taken from the default.

        Raises:
            BundleError: there is none; the message lists those there are.
        """
        if num_steps is not None and self.max_steps is not None and num_steps > self.max_steps:
            raise BundleError(f"at most {self.max_steps} steps are served here, got {num_steps}")
        default = self.manifest.default_tableau
        usual = default.solver_for(num_steps or default.num_steps)
        if solver is None and num_steps is not None and (usual, num_steps) not in self.tableaus:
            others = [name for name, steps in self.tableaus if steps == num_steps]
            solver = others[0] if others else None
        key = (solver or usual, num_steps or default.num_steps)
        if solver is not None and num_steps is None and key not in self.tableaus:
            steps = [s for name, s in self.tableaus if name == solver]
            key = (solver, min(steps, key=lambda s: abs(s - default.num_steps))) if steps else key
        if key not in self.tableaus:
            have: dict[str, list[int]] = {}
            for name, steps_ in sorted(self.tableaus):
                have.setdefault(name, []).append(steps_)
            listed = "; ".join(f"{name} with {', '.join(map(str, s))}" for name, s in have.items())
            if reason := why_no_table(key[0]):
                raise BundleError(f"{key[0]} is no table: it {reason}; {self.name} has {listed}")
            raise BundleError(f"{self.name} has no table for {key[0]} with {key[1]} steps; it has {listed}")
        return self.tableaus[key]

    def refuse_misfit(self, tableau: Tableau) -> None:
        """Check that a table can be served with this network.

        Raises:
            TableauError: other weights, other noise path, a form the network cannot give, or too many steps.
        """
        if self.max_steps is not None and tableau.num_steps > self.max_steps:
            raise TableauError(
                f"{tableau.name}: has {tableau.num_steps} steps, at most {self.max_steps} are served here"
            )
        if tableau.weights_sha256 not in ("any", self.weights_sha256):
            theirs, ours = tableau.weights_sha256[:12], self.weights_sha256[:12]
            raise TableauError(f"{tableau.name}: was fitted to weights {theirs}, {self.name} has {ours}")
        alpha, sigma = tableau.alpha[:-1], tableau.sigma[:-1]
        paths = {"ve": alpha - 1, "vp": np.hypot(alpha, sigma) - 1, "flow": alpha + sigma - 1}
        off = paths[self.manifest.path]
        if np.abs(off).max() > 1e-6:
            level = int(np.abs(off).argmax())
            raise TableauError(f"{tableau.name}: level {level} is not on the {self.manifest.path} path of {self.name}")
        try:
            tableau.step_rows(self.manifest.output.prediction())
        except ValueError as error:
            raise TableauError(f"{tableau.name}: {error}") from None

    @classmethod
    def load(cls, source: str | Path | None = None) -> "Bundle":
        """Load and verify a bundle.

        Args:
            source: a folder, or the name of an embedded bundle; left out, the embedded student.

        Raises:
            BundleError: it does not exist, or is not exactly what its manifest says.
        """
        path = _find(str(source or DEFAULT_BUNDLE))
        try:
            text = (path / MANIFEST).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", "it is not UTF-8")
            raise BundleError(f"{path}: {MANIFEST} cannot be read: {reason}") from None
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BundleError(f"{path / MANIFEST}: {where}: {first['msg']}") from None
        _verify_files(path, manifest)
        bundle = cls(manifest, path, {})
        tableaus: dict[tuple[str, int], Tableau] = {}
        for name in sorted(manifest.files):
            if not name.startswith("tableaus/"):
                continue
            try:
                tableau = Tableau.load(path / name)
            except TableauError as error:  # which names the file
                raise BundleError(str(error)) from None
            try:
                bundle.refuse_misfit(tableau)
            except TableauError as error:
                raise BundleError(f"{path / name}: {error}") from None
            key = (tableau.name, tableau.num_steps)
            if key in tableaus:
                raise BundleError(f"{path / name}: a second table for {key[0]} with {key[1]} steps")
            tableaus[key] = tableau
        default = manifest.default_tableau
        for steps, solver in {default.num_steps: default.solver, **default.by_steps}.items():
            if (solver, steps) not in tableaus:
                raise BundleError(f"{path}: the default table {solver} with {steps} steps is missing")
        return cls(manifest, path, tableaus)


def embedded_names() -> list[str]:
    """The bundles that come with the package."""
    return sorted(manifest.parent.name for manifest in EMBEDDED.glob(f"*/{MANIFEST}"))


def write_manifest(path: Path, fields: Mapping[str, Any]) -> Manifest:
    """Hash what stands in a folder and write its manifest, all but ``files`` given.

    Raises:
        BundleError: a field is not valid.
    """
    files = {name: _sha256(path / name) for name in _files_below(path) if name != MANIFEST}
    manifest = _manifest(path, fields, files)
    replace_all({path / MANIFEST: _text_of(manifest)})
    return manifest


def _manifest(path: Path, fields: Mapping[str, Any], files: Mapping[str, str]) -> Manifest:
    try:
        return Manifest.model_validate({"format": FORMAT, **fields, "files": files})
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(f"{path / MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _text_of(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()


def add_tables(path: Path, tableaus: Sequence[Tableau], is_default: bool = False) -> Bundle:
    """Put tables into a bundle's folder; one of the same name and number of steps is replaced.

    Args:
        path: the folder.
        tableaus: the tables.
        is_default: whether requests that say no more than a number of steps get them.

    Raises:
        BundleError: the folder holds no bundle, or one that comes with the package, or cannot be written; nothing was
            changed.
        TableauError: a table does not fit it; nothing was changed.
    """
    bundle = Bundle.load(path)
    if bundle.is_embedded:
        raise BundleError(f"{bundle.name} comes with fewstep and is not changed: copy {bundle.path} and name the copy")
    for tableau in tableaus:
        bundle.refuse_misfit(tableau)
    held = {key: name for name in bundle.manifest.files if (key := _key_of(bundle, name)) is not None}
    added: dict[str, bytes] = {}
    for tableau in tableaus:
        name = held.get((tableau.name, tableau.num_steps), f"tableaus/{tableau.name}-{tableau.num_steps}.safetensors")
        added[name] = tableau.to_bytes()
    fields = json.loads((bundle.path / MANIFEST).read_text("utf-8"))
    del fields["format"], fields["files"]
    if is_default:
        by_steps = fields["default_tableau"].setdefault("by_steps", {})
        by_steps |= {str(tableau.num_steps): tableau.name for tableau in tableaus}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in added.items()}
    manifest = _manifest(bundle.path, fields, dict(sorted({**bundle.manifest.files, **hashes}.items())))
    whole = {**added, MANIFEST: _text_of(manifest)}
    try:
        replace_all({bundle.path / name: content for name, content in whole.items()})
    except OSError as error:
        reason = f"{path}: the tables cannot be written: {error.strerror}; nothing was changed"
        raise BundleError(reason) from None
    return Bundle.load(bundle.path)


def _key_of(bundle: Bundle, name: str) -> tuple[str, int] | None:
    """Which table a file of a bundle is."""
    if not name.startswith("tableaus/"):
        return None
    tableau = Tableau.load(bundle.path / name)
    return tableau.name, tableau.num_steps


def _find(source: str) -> Path:
    path = Path(source)
    try:
        if path.is_dir():
            return path
        if path.name == source and (EMBEDDED / source / MANIFEST).is_file():
            return EMBEDDED / source
    except OSError as error:  # a name too long, a folder that may not be entered
        raise BundleError(f"{source[:200]}: cannot be read: {error.strerror}") from None
    names = ", ".join(embedded_names()) or "none"
    raise BundleError(f"{source}: no such folder, and no embedded bundle of that name (there are: {names})")


def _verify_files(path: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name == MANIFEST:
            raise BundleError(f"{path / MANIFEST}: files: {name!r} is not a path inside the bundle")
    if NETWORK not in manifest.files:
        raise BundleError(f"{path / MANIFEST}: files: {NETWORK} is missing")
    for name, engine in manifest.engines.items():
        if name not in manifest.files:
            raise BundleError(f"{path / MANIFEST}: engines: {name} is not among the files")
        if engine.network_sha256 != manifest.weights_sha256:
            raise BundleError(f"{path}: {name} was built from another {NETWORK}; build it again")
    present = set(_files_below(path)) - {MANIFEST}
    for name in sorted(set(manifest.files) - present):
        raise BundleError(f"{path}: {name} is missing")
    for name in sorted(present - set(manifest.files)):
        raise BundleError(f"{path}: {name} is unknown to the manifest; remove it or list it")
    for name, expected in manifest.files.items():
        try:
            actual = _sha256(path / name)
        except OSError as error:
            raise BundleError(f"{path}: {name} cannot be read: {error.strerror}") from None
        if actual != expected:
            raise BundleError(f"{path}: {name} was altered: sha256 {actual[:12]}, the manifest says {expected[:12]}")


def _files_below(path: Path) -> list[str]:
    files = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return sorted(file.relative_to(path).as_posix() for file in files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
