"""The command line: ``fewstep serve | generate | inspect | train | export | demo``.

Each command imports what it needs when it runs, so that serving never loads torch and ``--help`` is quick.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

app = typer.Typer(
    name="fewstep",
    help="Serve, try, train and export few-step diffusion students.\n\n"
    "BUNDLE is a folder or the name of an embedded bundle; left out, it is the embedded student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

T = TypeVar("T")
BundleArgument = Annotated[str | None, typer.Argument(help="A folder, or the name of an embedded bundle.")]


@app.command()
def serve(
    bundles: Annotated[list[str] | None, typer.Argument(help="Folders or embedded names, one or more.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings; flags win over it.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Samples of a student that run together.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Samples of a student that may wait.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one network call.")] = None,
    access_log: Annotated[bool | None, typer.Option("--access-log", help="Log each request.")] = None,
) -> None:
    """Serve students over HTTP.

    Then, from anywhere:

    curl -s localhost:8000/v1/images/generations -d '{"prompt": "Sneaker", "seed": 7}'
    """
    from .server import Settings
    from .server import serve as run

    flags = {
        "bundles": bundles or None, "host": host, "port": port, "max_rows": max_rows, "max_waiting": max_waiting,
        "threads": threads, "access_log": access_log,
    }  # fmt: skip
    run(Settings.load(config, flags))


@app.command()
def generate(
    bundle: BundleArgument = None,
    label: Annotated[str | None, typer.Option(help="Class name or number; left out, all classes in turn.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Network calls per image.")] = None,
    solver: Annotated[str | None, typer.Option(help="Name of one of the student's tables.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    num: Annotated[int, typer.Option(min=1, max=100_000, help="How many images.")] = 16,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file: one image, or a grid.")] = Path("out.png"),
) -> None:
    """Make images here, without a server."""
    import time

    from rich.progress import track

    from .runtime import Bundle, Engine, Request
    from .runtime.pictures import grid

    loaded = Bundle.load(bundle)
    labels = loaded.manifest.labels
    tableau = _named("--steps", lambda: loaded.tableau(solver, steps))
    wanted: list[int | None] = [None]
    if labels and label is not None:
        wanted = [_named("--label", lambda: labels.parse(label))]
    elif labels:
        wanted = list(range(len(labels.names)))
    engine = Engine(loaded, max_waiting=num)
    requests = [Request(seed + i, tableau, wanted[i % len(wanted)], guidance) for i in range(num)]
    futures = _named("request", lambda: engine.submit(requests))
    start_s = time.perf_counter()
    for future in track(futures, "Generating", transient=True, disable=not sys.stderr.isatty()):
        while not future.done():
            engine.step()
    took_s = time.perf_counter() - start_s
    pixels = [future.result().to_uint8() for future in futures]
    columns = len(wanted) if len(wanted) > 1 else max(1, round(num**0.5))
    rows = [pixels[i : i + columns] for i in range(0, num, columns)]
    output.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, scale=2 if num > 1 else 1).save(output, "PNG")
    calls = tableau.num_steps
    print(f"{output}: {num} images by {tableau.name} with {calls} steps, {1000 * took_s / num:.1f} ms each")


@app.command()
def inspect(bundle: BundleArgument = None) -> None:
    """Verify a bundle and say what it is."""
    from rich.console import Console
    from rich.table import Table

    from .runtime import Bundle

    loaded = Bundle.load(bundle)
    manifest = loaded.manifest
    console = Console()
    console.print(f"[bold]{manifest.name}[/] version {manifest.version}: {manifest.description}")
    facts = Table(show_header=False, box=None, pad_edge=False)
    channels, height, width = manifest.sample_shape
    facts.add_row("folder", str(loaded.path))
    facts.add_row("samples", f"{channels} x {height} x {width}")
    facts.add_row("network", f"says {manifest.output.type}, on the {manifest.path} path")
    if manifest.labels:
        facts.add_row("labels", ", ".join(f"{i} {name}" for i, name in enumerate(manifest.labels.names)))
    scale = manifest.guidance
    facts.add_row("guidance", f"{scale.mode}, {scale.minimum:g} to {scale.maximum:g}, default {scale.default:g}")
    facts.add_row("weights", f"{loaded.network.stat().st_size:,} bytes, sha256 {loaded.weights_sha256}")
    facts.add_row("licence", manifest.licence)
    for fact, value in manifest.provenance.items():
        facts.add_row(fact.replace("_", " "), value)
    console.print(facts)
    table = Table("solver", "steps", "form", "history", "noise", "sha256", title="Tables", title_justify="left")
    default = (manifest.default_tableau.solver, manifest.default_tableau.num_steps)
    for key, tableau in sorted(loaded.tableaus.items()):
        star = " *" if key == default else ""
        noise = "fresh" if tableau.is_stochastic else "none"
        numbers = (str(tableau.num_steps), tableau.form, str(tableau.history), noise, tableau.sha256[:12])
        table.add_row(tableau.name + star, *numbers)
    console.print(table)
    console.print("* the default. Every file has the hash its manifest says.")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that comes with fewstep.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the run; runs/NAME.")] = None,
    data: Annotated[Path | None, typer.Option(help="The images, if not where the recipe says.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes, one a GPU or CPU core.")] = 1,
) -> None:
    """Train a teacher, distil a student, evaluate both. Goes on where it was interrupted."""
    _need_torch("train")
    from .training import load_recipe
    from .training import train as run

    loaded = load_recipe(recipe)
    student = run(loaded, output or Path("runs") / loaded.name, data=data, processes=processes)
    print(f"{student}: done. To serve it: fewstep export {student} -o {loaded.name} && fewstep serve {loaded.name}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A student.safetensors or teacher.safetensors of a run.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the bundle.")],
    name: Annotated[str | None, typer.Option(help="The student's name; the recipe's.")] = None,
    version: Annotated[str, typer.Option(help="The student's version.")] = "1",
    notice: Annotated[Path | None, typer.Option(help="File with the notices of the data's licence.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a bundle that is there.")] = False,
) -> None:
    """Turn a trained network into a bundle that can be served."""
    _need_torch("export")
    from .training.student_bundle import export_checkpoint

    bundle, parity = export_checkpoint(checkpoint, output, name=name, version=version, notice=notice, replace=replace)
    size = bundle.network.stat().st_size
    print(
        f"{output}: {bundle.name}, {len(bundle.tableaus)} tables, weights {size:,} bytes; "
        f"against torch {parity.graph_error:.1e} (graph), {parity.storage_error:.1e} (float16 storage)"
    )


@app.command()
def demo(
    bundle: BundleArgument = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file for the grid.")] = Path("demo.png"),
    port: Annotated[int, typer.Option(help="Port to serve on; 0 takes a free one.")] = 0,
    stay: Annotated[bool, typer.Option("--stay", help="Go on serving afterwards.")] = False,
) -> None:
    """Start a server, send it real requests, draw what comes back and say how long it took."""
    from .server.demo import run

    run(bundle, output, port, stay)


def _need_torch(command: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "onnx", "onnxscript", "accelerate") if find_spec(name) is None]
    if missing:
        _stop(f"fewstep {command} needs {', '.join(missing)}: pip install 'fewstep[train]'")


def _named(what: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        _stop(f"{what}: {error}" if not str(error).startswith(what) else str(error))


def _stop(message: str) -> NoReturn:
    print(f"fewstep: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """Entry point: errors of the user's are one line on stderr and exit status 2."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.startswith("fewstep."):
            _stop(str(error))
        raise


if __name__ == "__main__":
    main()
