"""The command line: ``fewstep serve | bench | capacity | generate | inspect | train | fit | export | triton ...``.

Each command imports what it needs when it runs, so that serving never loads torch and ``--help`` is quick.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

from . import __version__

if TYPE_CHECKING:
    from rich.text import Text

    from .runtime import Bundle, Tableau

app = typer.Typer(
    name="fewstep",
    help="Serve, try, train and export few-step diffusion students.\n\n"
    "BUNDLE is a folder or the name of an embedded bundle; left out, it is the embedded student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

tables = typer.Typer(help="Look at table files, and put them into bundles.", no_args_is_help=True)
app.add_typer(tables, name="table")


class _RunByDefault(TyperGroup):
    """``fewstep bench TARGET`` is ``fewstep bench run TARGET``."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:  # Typer brings its own click
        if arguments and arguments[0] not in (*self.commands, "--help"):
            arguments = ["run", *arguments]
        return super().parse_args(context, arguments)


benchmarks = typer.Typer(
    help="Measure latency and throughput of a server, or of a student in this process.\n\n"
    "fewstep bench http://127.0.0.1:8000 --rate 40\n\n"
    "'run' may be left out; 'fewstep bench run --help' lists its options.",
    cls=_RunByDefault,
    no_args_is_help=True,
)
app.add_typer(benchmarks, name="bench")
triton = typer.Typer(help="Serve a repository that `export --triton` wrote on a Triton server.", no_args_is_help=True)
app.add_typer(triton, name="triton")

T = TypeVar("T")
BundleArgument = Annotated[str | None, typer.Argument(help="A folder, or the name of an embedded bundle.")]


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _of_all(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    bundles: Annotated[list[str] | None, typer.Argument(help="Folders or embedded names, one or more.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    grpc: Annotated[bool | None, typer.Option("--grpc/--no-grpc", help="Serve gRPC too.", show_default="on")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Its port; left out, the one after --port.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings; flags win over it.")] = None,
    repository: Annotated[Path | None, typer.Option(help="Folder of bundles that clients may load.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Samples of a student that run together.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Samples of a student that may wait.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one network call.")] = None,
    tables_folder: Annotated[
        Path | None, typer.Option(help="Folder whose tables are served too, as they come.")
    ] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="TOML file of API keys; see `fewstep key`.")] = None,
    tls_certfile: Annotated[Path | None, typer.Option(help="PEM certificate: serve HTTPS and gRPC over TLS.")] = None,
    tls_keyfile: Annotated[Path | None, typer.Option(help="Its PEM key.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or tensorrt.", show_default="cpu")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, or one that `fewstep export` added; tensorrt: of the engine.")
    ] = None,
    simulate: Annotated[
        str | None, typer.Option(help="A+B: simulate an accelerator whose call on n rows takes A + B n ms.")
    ] = None,
    access_log: Annotated[bool | None, typer.Option("--access-log", help="Log each request.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting, such as max_images=8; may be given again."),
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the settings, and do not serve.")] = False,
) -> None:
    """Serve students over HTTP and gRPC.

    Every setting that --print-config prints can be said after --set, stand in the TOML file, or in the environment as
    FEWSTEP_ and its name in capitals.

    Then, from anywhere:

    curl -s localhost:8000/v1/images/generations -d '{"prompt": "Sneaker", "seed": 7}'
    """
    from .server import Settings
    from .server import serve as run

    flags = {
        "bundles": bundles or None, "host": host, "port": port, "max_rows": max_rows, "max_waiting": max_waiting,
        "grpc": grpc, "grpc_port": grpc_port, "repository": repository,
        "threads": threads, "tables_folder": tables_folder, "access_log": access_log, "log_format": log_format,
        "log_level": log_level, "api_keys_file": api_keys_file, "tls_certfile": tls_certfile,
        "tls_keyfile": tls_keyfile, "simulate": simulate,
        "device": device, "precision": precision,
    }  # fmt: skip
    settings = Settings.load(config, flags, os.environ, set_ or ())
    if print_config:
        print(settings.to_toml(), end="")
    else:
        run(settings)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Who will call with it.")],
    admin: Annotated[bool, typer.Option("--admin", help="May load and unload students and tables.")] = False,
) -> None:
    """Make an API key: the key for the caller, and its hash for the server's settings."""
    from .server.keys import hashed, new_key

    secret = new_key()
    print(f"# For {name}, once; nobody can read it from the settings: {secret}", file=sys.stderr)
    print(f"[api_keys.{json.dumps(name)}]\nsha256 = {json.dumps(hashed(secret))}" + ("\nadmin = true" if admin else ""))


@benchmarks.command("run")
def bench_run(
    target: Annotated[
        str | None, typer.Argument(help="URL of a server, http(s):// or grpc(s)://; or a bundle, which then runs here.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="openai, http or grpc (KServe v2), in-process.", show_default="by URL"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to ask for.", show_default="the first")] = None,
    clients: Annotated[int, typer.Option(help="Closed loop: clients, each with one request under way.")] = 32,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests a second, whatever is answered.")] = None,
    arrivals: Annotated[
        str, typer.Option(help="Open loop: poisson, burst, constant, or the file of a trace.")
    ] = "poisson",
    burst: Annotated[int, typer.Option(help="Requests of one burst.")] = 16,
    mix: Annotated[
        str | None, typer.Option(help="Kinds of requests with weights, 'steps=1:0.5, steps=4:0.5'; or a TOML file.")
    ] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="Deadline of requests whose kind names none.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Load on the clock.", show_default="10, or what the trace takes")
    ] = None,
    warmup: Annotated[float, typer.Option(help="Seconds of load before it.")] = 1.0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is an error.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the arrivals and the order of the kinds.")] = 0,
    metrics: Annotated[str | None, typer.Option(help="URL of Prometheus metrics.", show_default="/metrics")] = None,
    server_pid: Annotated[
        int | None, typer.Option(help="The server's process, for its CPU time.", show_default="by its port")
    ] = None,
    key: Annotated[str | None, typer.Option(help="API key, sent as a bearer token.", envvar="FEWSTEP_API_KEY")] = None,
    cafile: Annotated[
        Path | None, typer.Option(help="https, grpcs: certificates to trust, PEM.", show_default="the system's")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="in-process: samples that run together.")] = 16,
    threads: Annotated[int | None, typer.Option(help="in-process: CPU threads of one network call.")] = None,
    simulate: Annotated[str | None, typer.Option(help="in-process: a simulated accelerator, A+B ms a call.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the report, which compare reads.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Add a round to the file of --json.")] = False,
    html: Annotated[Path | None, typer.Option(help="File for the report as a page with plots.")] = None,
) -> None:
    """Load a server, or a student in this process, and say how long requests took.

    Closed loop: --clients each ask again when they have their answer. Open loop, by --rate or a trace: requests come
    when they come, and each one's time counts from when it was meant to be sent.
    """
    _need_bench()
    _refuse_unwritable(json=json, html=html)
    from .bench.page import save_page
    from .bench.report import check_added, save, show
    from .bench.run import address_of, bench
    from .bench.workload import workload

    address = address_of(
        target, protocol, model=model, key=key, cafile=cafile, max_rows=max_rows, threads=threads, simulate=simulate
    )  # fmt: skip
    load = workload(
        mix, clients=clients, rate=rate, arrivals=arrivals, burst=burst, deadline_ms=deadline_ms, warmup_s=warmup,
        seconds=seconds, seed=seed,
    )  # fmt: skip
    if append:
        check_added(json, load)
    made = bench(
        address, load, timeout_s=timeout, metrics=metrics, server_pid=server_pid, ends_on_interrupt=True
    )  # fmt: skip
    show(made)
    try:
        if json is not None:
            save(json, made, is_added=append)
    finally:
        if html is not None:
            save_page(html, made)
    if made["interrupted"]:
        raise SystemExit(130)


@benchmarks.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="A report of --json.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
    confidence: Annotated[float, typer.Option(help="Of all intervals together.")] = 0.99,
    smallest: Annotated[float, typer.Option(help="Differences below this share are noise.")] = 0.02,
) -> None:
    """Say which figures of two reports differ by more than noise. Exit status 1 when one is worse."""
    _need_bench()
    from .bench import compare_files

    found = compare_files(before, after, confidence=confidence, smallest=smallest)
    if any(one.verdict == "worse" for one in found):
        raise SystemExit(1)


@app.command()
def capacity(
    target: Annotated[
        str,
        typer.Argument(
            help="A+B, ms of a network call and of each row in it; or a server's URL or a bundle to measure."
        ),
    ],
    rate: Annotated[float | None, typer.Option(help="Requests a second, of all replicas.")] = None,
    p99_ms: Annotated[
        float | None, typer.Option("--p99-ms", help="99 % of the requests are to be answered in this time.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Only say how the load goes on so many.")] = None,
    mix: Annotated[
        str | None, typer.Option(help="Kinds of requests with weights, as for bench; or a TOML file.")
    ] = None,
    arrivals: Annotated[str, typer.Option(help="poisson, burst, constant, or the file of a trace.")] = "poisson",
    burst: Annotated[int, typer.Option(help="Requests of one burst.")] = 16,
    deadline_ms: Annotated[float | None, typer.Option(help="That requests tell the server, for its admission.")] = None,
    routing: Annotated[
        str, typer.Option(help="Who gets a request: least-loaded, two-choices, random or round-robin.")
    ] = "least-loaded",
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Samples of a replica that run together.", show_default="measured, or 16")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Samples of a replica that may wait.")] = 1024,
    overhead_ms: Annotated[
        float | None,
        typer.Option(min=0, help="A request's time outside the engine.", show_default="measured, or 0"),
    ] = None,
    measure: Annotated[float, typer.Option(help="URL, bundle: seconds of each of nine loads.")] = 2.0,
    model: Annotated[str | None, typer.Option(help="URL: the model to ask for.", show_default="the first")] = None,
    key: Annotated[
        str | None, typer.Option(help="URL: API key, sent as a bearer token.", envvar="FEWSTEP_API_KEY")
    ] = None,
    cafile: Annotated[
        Path | None, typer.Option(help="https: certificates to trust, PEM.", show_default="the system's")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Bundle: CPU threads of one network call.")] = None,
    seed: Annotated[int, typer.Option(help="Of the arrivals and the order of the kinds.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for what was found.")] = None,
) -> None:
    """Say how many replicas a load needs, by simulating them with the engine's own scheduler.

    fewstep capacity 40+1 --rate 16667 --mix 'steps=1:0.5, steps=4:0.5' --p99-ms 400

    A URL should be that of a replica nobody else uses: it is loaded to measure it.
    """
    _need_bench()
    _refuse_unwritable(json=json)
    from .bench.plan import plan

    plan(
        target, rate=rate, p99_ms=p99_ms, replicas=replicas, mix=mix, arrivals=arrivals, burst=burst,
        deadline_ms=deadline_ms, routing=routing, max_rows=max_rows, max_waiting=max_waiting, overhead_ms=overhead_ms,
        measure_s=measure, model=model, key=key, cafile=cafile, threads=threads, seed=seed, json_file=json,
    )  # fmt: skip


@app.command()
def generate(
    bundle: BundleArgument = None,
    label: Annotated[str | None, typer.Option(help="Class name or number; left out, all classes in turn.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Network calls per image.")] = None,
    solver: Annotated[str | None, typer.Option(help="Name of one of the student's tables.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="0 to 1: share of the conditional output's deviation to give back.")
    ] = None,
    dynamic_thresholding: Annotated[
        float | None, typer.Option(help="Quantile, such as 0.995, that predicted data are brought within.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, max=100_000, help="How many images.")] = 16,
    precision: Annotated[str, typer.Option(help="float32, or one that `fewstep export` added.")] = "float32",
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file: one image, or a grid.")] = Path("out.png"),
) -> None:
    """Make images here, without a server."""
    import time

    from rich.progress import track

    from .runtime import Bundle, Engine, Request
    from .runtime.hooks import hooks_of
    from .runtime.pictures import encode, grid

    _refuse_unwritable(output=output)
    loaded = Bundle.load(bundle)
    labels = loaded.manifest.labels
    tableau = _tableau(loaded, solver, steps)
    wanted: list[int | None] = [None]
    if label is not None and labels is None:
        _stop(f"--label: {loaded.name} has no classes; leave it out")
    if labels and label is not None:
        wanted = [_named("--label", lambda: labels.parse(label))]
    elif labels:
        wanted = list(range(len(labels.names)))
    engine = Engine(loaded, max_waiting=num, precision=precision)
    hooks = hooks_of(dynamic_thresholding, guidance_rescale)
    requests = [Request(seed + i, tableau, wanted[i % len(wanted)], guidance, hooks=hooks) for i in range(num)]
    try:
        futures = engine.submit(requests)
    except ValueError as error:  # begins with the request's field, of which the option has the name
        field, _, reason = str(error).partition(":")
        _stop(f"--{field.replace('_', '-')}:{reason}")
    start_s = time.perf_counter()
    for future in track(futures, "Generating", transient=True, disable=not sys.stderr.isatty()):
        while not future.done():
            engine.step()
    took_s = time.perf_counter() - start_s
    pixels = [future.result().to_uint8() for future in futures]
    columns = len(wanted) if len(wanted) > 1 else max(1, round(num**0.5))
    rows = [pixels[i : i + columns] for i in range(0, num, columns)]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if num == 1:
            output.write_bytes(encode(pixels[0]))
        else:
            grid(rows).save(output, "PNG")
    except OSError as error:
        _stop(f"--output: {output} cannot be written: {error.strerror or error}")
    calls = tableau.num_steps
    print(f"{output}: {num} images by {tableau.name} with {calls} steps, {1000 * took_s / num:.1f} ms each")


@app.command()
def inspect(bundle: BundleArgument = None) -> None:
    """Verify a bundle and say what it is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .runtime import Bundle

    loaded = Bundle.load(bundle)
    manifest = loaded.manifest
    console = Console()
    console.print(Text(manifest.name, "bold"), f"version {manifest.version}:", _as_text(manifest.description))
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column()
    facts.add_column(overflow="fold")  # a path or a hash that is cut off is of no use
    channels, height, width = manifest.sample_shape
    facts.add_row("folder", _as_text(str(loaded.path)))
    facts.add_row("samples", f"{channels} x {height} x {width}")
    facts.add_row("network", f"says {manifest.output.type}, on the {manifest.path} path")
    if manifest.labels:
        facts.add_row("labels", _as_text(", ".join(f"{i} {name}" for i, name in enumerate(manifest.labels.names))))
    scale = manifest.guidance
    facts.add_row("guidance", f"{scale.mode}, {scale.minimum:g} to {scale.maximum:g}, default {scale.default:g}")
    facts.add_row("weights", f"{loaded.network.stat().st_size:,} bytes, sha256 {loaded.weights_sha256}")
    for fact, value in {"licence": manifest.licence, **manifest.provenance}.items():
        facts.add_row(_as_text(fact.replace("_", " ")), _as_text(value))
    console.print(facts)
    table = Table("solver", "steps", "form", "history", "noise", "sha256", title="Tables", title_justify="left")
    default = manifest.default_tableau
    for (solver, steps), tableau in sorted(loaded.tableaus.items()):
        star = " *" if solver == default.solver_for(steps) else ""
        star += "*" if star and steps == default.num_steps else ""
        noise = "fresh" if tableau.is_stochastic else "none"
        numbers = (str(tableau.num_steps), tableau.form, str(tableau.history), noise, tableau.sha256[:12])
        table.add_row(tableau.name + star, *numbers)
    console.print(table)
    console.print("* the default of its number of steps; ** of all. Every file has the hash its manifest says.")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that comes with fewstep.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the run; runs/NAME.")] = None,
    data: Annotated[Path | None, typer.Option(help="The images, if not where the recipe says.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes, one a GPU or CPU core.")] = 1,
    precision: Annotated[
        str, typer.Option(help="What the networks that are trained compute in: float32 or bfloat16.")
    ] = "float32",
) -> None:
    """Train a teacher, distil a student, evaluate both. Goes on where it was interrupted."""
    _need_torch("train")
    from .training import load_recipe
    from .training import train as run

    loaded = load_recipe(recipe)
    student = run(loaded, output or Path("runs") / loaded.name, data=data, processes=processes, precision=precision)
    print(f"{student}: done. To serve it: fewstep export {student} -o {loaded.name} && fewstep serve {loaded.name}")


@app.command()
def fit(
    bundle: Annotated[str, typer.Argument(help="A folder, or the name of an embedded bundle.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File of the table.")],
    method: Annotated[str, typer.Option(help="dode, rows or end-to-end.")] = "dode",
    solver: Annotated[str, typer.Option(help="The solver to start from.")] = "ddim",
    steps: Annotated[int, typer.Option(help="Network calls per image.")] = 8,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale to fit at; the student's default.")] = None,
    samples: Annotated[int, typer.Option(help="Trajectories to fit on.")] = 48,
    fresh: Annotated[int, typer.Option(help="Trajectories to measure on.")] = 32,
    substeps: Annotated[int, typer.Option(help="Steps of the teacher in one of the table.")] = 10,
    target: Annotated[
        str, typer.Option(help="global: the teacher's trajectory. local: anew from each step.")
    ] = "global",
    teacher: Annotated[str, typer.Option(help="Solver of the teacher.")] = "dpmpp_2m",
    seed: Annotated[int, typer.Option(help="Which noise to fit on.")] = 0,
    sigmas: Annotated[str | None, typer.Option(help="LAST,FIRST noise-to-signal ratio; as in the tables.")] = None,
    history: Annotated[int, typer.Option(help="rows, end-to-end: predictions that a row may read.")] = 4,
    ridge: Annotated[float | None, typer.Option(help="How strongly rows stay near the base.")] = None,
    iterations: Annotated[int, typer.Option(help="end-to-end: linearisations.")] = 6,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Fit a solver's table to a bundle's network, which stays as it is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from .runtime import Bundle
    from .training.fitting import Settings, fit_bundle

    settings = Settings(
        _one_of("--method", method, ("dode", "rows", "end-to-end")),
        solver,
        steps,
        guidance,
        samples,
        fresh,
        substeps,
        _one_of("--target", target, ("global", "local")),
        teacher,
        history=history,
        ridge=ridge,
        seed=seed,
        sigma_range=_two_numbers("--sigmas", sigmas),
        iterations=iterations,
    )
    _refuse_unwritable(output=output, makes_folder=False)
    loaded = Bundle.load(bundle)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"Fitting {method} {solver} {steps}", total=None)
        made = fit_bundle(
            loaded,
            settings,
            threads=threads,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    made.table.save(output)
    gain = 100 * (1 - made.after / made.before) if made.before else 0.0
    print(
        f"{output}: {made.table.name} with {steps} steps in {made.seconds:.1f} s; RMSE to the teacher's end on fresh "
        f"noise {made.before:.4f} before, {made.after:.4f} after ({0 - gain:+.0f} %); sha256 {made.table.sha256[:12]}"
    )


@tables.command("show")
def table_show(file: Annotated[Path, typer.Argument(help="A table file.")]) -> None:
    """Print a table: what it is, where it comes from, its rows."""
    from rich.console import Console
    from rich.table import Table

    from .runtime import Tableau

    tableau = Tableau.load(file)
    console = Console()
    console.print(f"[bold]{tableau.name}[/] with {tableau.num_steps} steps, predictions kept as {tableau.form}")
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("sha256", tableau.sha256)
    facts.add_row(
        "made for", _as_text("any weights" if tableau.weights_sha256 == "any" else f"weights {tableau.weights_sha256}")
    )
    facts.add_row("starts at", f"{tableau.initial_scale:.6g} x noise")
    facts.add_row("misses its levels by", f"{tableau.residual:.3g} at most" if tableau.residual else "nothing")
    for fact, value in tableau.provenance.items():
        facts.add_row(_as_text(fact.replace("_", " ")), _as_text(value))
    console.print(facts)
    weights = [f"b[{j}]" for j in range(tableau.history)]
    rows = Table("row", "alpha", "sigma", "t", "a", *weights, "c", header_style="bold")
    for column in rows.columns[1:]:
        column.justify = "right"
    for i in range(tableau.num_steps):
        numbers = (tableau.alpha[i], tableau.sigma[i], tableau.t[i], tableau.a[i], *tableau.b[i], tableau.c[i])
        rows.add_row(str(i), *(f"{number:.5g}" for number in numbers))
    rows.add_row("end", f"{tableau.alpha[-1]:.5g}", f"{tableau.sigma[-1]:.5g}")
    console.print(rows)


@tables.command("check")
def table_check(
    file: Annotated[Path, typer.Argument(help="A table file.")],
    bundle: Annotated[str | None, typer.Option("--bundle", help="The student it should fit.")] = None,
) -> None:
    """Say whether a table is sound, and whether it can be served with a student. Exit status 2 when not."""
    from .runtime import Bundle, Tableau

    tableau = Tableau.load(file)
    what = f"{file}: {tableau.name} with {tableau.num_steps} steps"
    if bundle is None:
        print(f"{what} is sound; sha256 {tableau.sha256[:12]}")
        return
    loaded = Bundle.load(bundle)
    try:
        loaded.refuse_misfit(tableau)
    except ValueError as error:
        _stop(f"{file} does not fit {loaded.name}: {error}")
    own = loaded.tableaus.get((tableau.name, tableau.num_steps))
    same = own is not None and own.sha256 == tableau.sha256
    note = "" if own is None else ", which has it already" if same else f", in the place of {own.sha256[:12]}"
    print(f"{what} fits {loaded.name}{note}")


@tables.command("diff")
def table_diff(
    old: Annotated[Path, typer.Argument(help="A table file.")],
    new: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Compare two tables. Exit status 1 when they differ."""
    from .runtime import Tableau
    from .runtime.tableau import differences

    found = differences(Tableau.load(old), Tableau.load(new))
    if not found:
        print(f"{old} and {new} are the same table")
        return
    for line in found:
        print(_as_text(line))
    raise SystemExit(1)


@tables.command("add")
def table_add(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    files: Annotated[list[Path], typer.Argument(help="Table files; one of the same name and steps is replaced.")],
    default: Annotated[bool, typer.Option("--default", help="Requests for so many steps get them.")] = False,
) -> None:
    """Put tables into a bundle, each checked against its network first."""
    from .runtime import Tableau
    from .runtime.bundle import add_tables

    loaded = add_tables(bundle, [Tableau.load(file) for file in files], default)
    print(f"{bundle}: {loaded.name} has {len(loaded.tableaus)} tables")


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A bundle's folder, or a student.safetensors of a run.")],
    data: Annotated[Path | None, typer.Option(help="Its images, if not where its recipe says.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="File of the feature network; made if missing.")] = None,
    solver: Annotated[str | None, typer.Option(help="Name of a table.")] = None,
    steps: Annotated[str, typer.Option(help="Network calls a sample; several as 1,2,4,8.")] = "",
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    precision: Annotated[str, typer.Option(help="A bundle's: float32, or one that was added.")] = "float32",
    samples: Annotated[int, typer.Option(min=100, help="Samples of each noise seed.")] = 1_000,
    seeds: Annotated[int, typer.Option(min=1, help="Noise seeds.")] = 3,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON file for the figures; of several steps, a list.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file: Frechet distance against network calls.")] = None,
) -> None:
    """Judge samples against real images: distances, precision, recall, accuracy, each with its noise floor."""
    _need_torch("evaluate")
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from .bench.page import draw
    from .training.report import evaluate as judge

    parts = [part.strip() for part in steps.split(",")] if steps else []
    if not all(part.isdecimal() and int(part) for part in parts):
        _stop(f"--steps: {steps!r} should be numbers of network calls, such as 4 or 1,2,4,8")
    if plot is not None and len(parts) < 2:
        _stop("--plot: draws several numbers of steps; give them, such as --steps 1,2,4,8")
    _refuse_unwritable(output=output, plot=plot, makes_folder=False)
    for option, file in (("--output", output), ("--plot", plot)):
        if file is not None and not file.parent.is_dir():
            _stop(f"{option}: there is no folder {file.parent}")
    reports = judge(
        source, [int(part) for part in parts] or [None], data=data, classifier=classifier, solver=solver,
        guidance=guidance, precision=precision, samples=samples, seeds=seeds,
    )  # fmt: skip
    console = Console()
    for report in reports:
        title = (
            f"{report.name}: {report.solver} with {report.num_steps} steps, {report.seeds} x {report.samples} samples"
        )
        floor_of = f"floor, {report.floor_samples} images"
        table = Table("", "mean", "sd over seeds", floor_of, title=title, title_justify="left")
        columns = [asdict(part) if part else {} for part in (report.mean, report.deviation, report.floor)]
        for name in columns[0]:
            figures = (f"{column[name]:.4g}" if column.get(name) is not None else "" for column in columns)
            table.add_row(name.replace("_", " "), *figures)
        console.print(table)
    console.print(f"features: {report.features}, accuracy {report.features_accuracy:.3f} on held-out images")
    if output is not None:
        text = report.to_json() if len(reports) == 1 else "[" + ",\n".join(each.to_json() for each in reports) + "]\n"
        output.write_text(text, "utf-8")
    if plot is not None:
        points = sorted((float(each.num_steps), each.mean.frechet_distance) for each in reports)
        floor = [(calls, report.floor.frechet_distance) for calls, _ in points]
        lines = {f"{report.name}, {report.solver}": points, "held-out images": floor}
        named = "Frechet distance; red: that of held-out images"
        marks = [calls for calls, _ in points]
        plot.write_text(
            draw(lines, "network calls a sample", named, x_scale=math.log, x_marks=marks, is_log=True), "utf-8"
        )


# What `export` makes, and the options that each takes; any other one is refused, for it would do nothing.
_EXPORTS: dict[str, set[str]] = {
    "a bundle of a checkpoint": {"output", "name", "version", "solver", "notice", "replace", "precision"},
    "--precision": {"output", "precision"},
    "--tensorrt": {
        "output", "tensorrt", "precision", "flavour", "batch", "target", "sampler", "plugin", "timing_cache",
    },
    "--sampler": {"output", "sampler", "precision", "solver", "steps", "replace"},
    "--triton": {
        "repository", "variant", "tensorrt", "device", "precision", "name", "decoupled", "max_rows", "instances",
        "threads", "version", "replace",
    },
    "--triton --variant graph": {
        "repository", "variant", "device", "precision", "name", "solver", "steps", "max_rows", "instances", "threads",
        "replace",
    },
    "--triton --variant graph --tensorrt": {
        "repository", "variant", "tensorrt", "device", "precision", "name", "solver", "steps", "max_rows", "instances",
        "replace",
    },
}  # fmt: skip


@app.command()
def export(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A student.safetensors or teacher.safetensors of a run; or a BUNDLE.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the bundle; --sampler: the ONNX file.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The student's name; the recipe's.")] = None,
    version: Annotated[str, typer.Option(help="The student's. --triton: a number, of the model; beside others.")] = "1",
    solver: Annotated[str | None, typer.Option(help="Solver of a request that does not say; the method's own.")] = None,
    notice: Annotated[Path | None, typer.Option(help="File with the notices of the data's licence.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a bundle that is there.")] = False,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="BUNDLE: build engines into it. --variant graph: for Triton's TensorRT.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="float32, float16, bfloat16, int8, int8-cpu, with commas. --triton: what runs."),
    ] = None,
    flavour: Annotated[str, typer.Option(help="--tensorrt: rtx or full.")] = "rtx",
    batch: Annotated[str, typer.Option(help="--tensorrt: smallest, usual and largest number of rows.")] = "1,8,64",
    target: Annotated[str | None, typer.Option(help="--tensorrt: sm80,sm89 and so on; portable.")] = None,
    sampler: Annotated[
        bool, typer.Option("--sampler", help="BUNDLE: the whole sampler as an ONNX file; --tensorrt: as an engine too.")
    ] = False,
    plugin: Annotated[
        bool, typer.Option("--plugin", help="--sampler: our kernel in the engine, by a plugin of the full TensorRT.")
    ] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="--flavour full: file of measured kernel times.")] = None,
    repository: Annotated[
        Path | None, typer.Option("--triton", help="BUNDLE: write it into this model repository.")
    ] = None,
    variant: Annotated[str, typer.Option(help="--triton: inflight, iterative, loop or graph.")] = "inflight",
    steps: Annotated[
        int | None, typer.Option(help="--sampler, --variant graph: network calls; the default table's.")
    ] = None,
    decoupled: Annotated[bool, typer.Option("--decoupled", help="--triton: with previews, for streams only.")] = False,
    max_rows: Annotated[int, typer.Option(min=1, help="--triton: samples that run together in an instance.")] = 16,
    instances: Annotated[int, typer.Option(min=1, help="--triton: processes that run the student.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="--triton: CPU threads of one network call.")] = None,
    device: Annotated[str | None, typer.Option(help="--triton: cpu, cuda or tensorrt.", show_default="cpu")] = None,
) -> None:
    """Turn a trained network into a bundle, add precisions and TensorRT engines to one, or give one to Triton.

    With --precision a bundle gets precisions/*.onnx and parity.json, which holds each against float32 step by step, and
    against PyTorch where a checkpoint is exported.
    """
    is_checkpoint = Path(source).is_file()
    if repository is not None:
        made = "--triton" + (" --variant graph" + " --tensorrt" * tensorrt) * (variant == "graph")
    elif tensorrt:
        made = "--tensorrt"
    elif sampler:
        made = "--sampler"
    elif precision is not None and not is_checkpoint:
        made = "--precision"
    else:
        made = "a bundle of a checkpoint"
    _refuse_idle(context, made)
    if repository is not None:
        folder = _export_to_triton(
            source, repository, variant, solver, steps, tensorrt, device, precision, name=name, is_decoupled=decoupled,
            version=version, max_rows=max_rows, instances=instances, threads=threads, replace=replace,
        )  # fmt: skip
        if tensorrt:
            print(f"{folder}: written; fewstep triton check {repository} says how its plan is made")
        else:
            print(
                f"{folder}: written. To try it: fewstep triton check {repository} && fewstep triton serve {repository}"
            )
        return
    _need_torch("export")
    from .export.precisions import PRECISIONS

    given = precision or {"--tensorrt": "float16", "--sampler": "float32"}.get(made)
    precisions = [_one_of("--precision", each, PRECISIONS) for each in given.split(",")] if given else []
    if made != "a bundle of a checkpoint":
        if is_checkpoint:
            _stop(f"{made}: needs a bundle: fewstep export {source} -o FOLDER makes one")
        from .runtime import Bundle

        bundle = Bundle.load(source)
        if made == "--tensorrt":
            _export_engines(bundle, output or bundle.path, precisions, flavour, batch, target, sampler, plugin,
                            timing_cache)  # fmt: skip
        elif made == "--sampler":
            _export_sampler(bundle, output, precisions, solver, steps, replace)
        else:
            from .export.additions import add_precisions

            out = output or bundle.path
            _, report = add_precisions(bundle, out, precisions)
            _print_parity(out, report)
        return
    if Path(source).is_dir():
        _stop(f"{source}: is a bundle already; --precision, --tensorrt, --sampler or --triton say what to make of it")
    checkpoint = Path(source)
    if output is None:
        _stop("--output: a checkpoint needs the folder of the bundle to make")
    from .training.student_bundle import export_checkpoint

    bundle, parity = export_checkpoint(
        checkpoint, output, name=name, version=version, solver=solver, notice=notice, replace=replace,
        precisions=precisions,
    )  # fmt: skip
    size = bundle.network.stat().st_size
    print(
        f"{output}: {bundle.name}, {len(bundle.tableaus)} tables, weights {size:,} bytes; "
        f"against torch {parity.graph_error:.1e} (graph), {parity.storage_error:.1e} (float16 storage)"
    )
    if precisions:
        from .export.additions import REPORT

        _print_parity(output, json.loads((output / REPORT).read_text("utf-8")))


def _refuse_idle(context: typer.Context, made: str) -> None:
    """Stop at an option that was given and does nothing for what `export` makes."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or parameter.name in {"source", *_EXPORTS[made]}:
            continue
        flag = max(parameter.opts, key=len)
        where = [kind for kind, takes in _EXPORTS.items() if parameter.name in takes]
        _stop(f"{flag}: does nothing with {made}; it belongs to {' or '.join(where)}")


def _print_parity(out: Path, report: dict[str, Any]) -> None:
    against = "torch" if report["against_torch"] else "float32"
    for precision, found in report[f"against_{against}"].items():
        steps = found["steps"]
        how = ", emulated on the CPU" if report["run"][precision].startswith("emulated") else ""
        print(
            f"{out}: {precision}{how}: against {'PyTorch' if against == 'torch' else 'float32 in ONNX Runtime'} at the "
            f"worst of {len(steps)} steps: max abs {max(step['max_abs'] for step in steps):.2g}, "
            f"relative {max(step['relative'] for step in steps):.2g}; "
            f"samples {report['against_float32'][precision]['samples']:.2g} from float32's"
        )


def _export_sampler(
    bundle: "Bundle", output: Path | None, precisions: list[Any], solver: str | None, steps: int | None, replace: bool
) -> None:
    from .export.sampler_file import write_sampler

    if output is None:
        _stop("--output: --sampler needs the ONNX file to write, such as -o sampler.onnx")
    if len(precisions) != 1:
        _stop("--precision: a sampler has one")
    tableau = _tableau(bundle, solver, steps)
    parity = write_sampler(bundle, output, tableau, precisions[0], replace)
    how = ", emulated on the CPU," if precisions[0] == "bfloat16" else ""
    print(
        f"{output}: {bundle.name}, {tableau.name} with {tableau.num_steps} steps, {precisions[0]}{how} "
        f"{output.stat().st_size:,} bytes; against the engine's samples: max abs {parity.max_abs:.2g}, "
        f"relative {parity.relative:.2g}"
    )


def _export_to_triton(
    source: str,
    repository: Path,
    variant: str,
    solver: str | None,
    steps: int | None,
    is_tensorrt: bool,
    device: str | None,
    precision: str | None,
    *,
    is_decoupled: bool,
    version: str,
    **common: Any,
) -> Path:
    from .deploy.triton_repository import VARIANTS, write_model
    from .runtime import Bundle
    from .runtime.gpu_backends import DEVICES

    bundle = Bundle.load(source)
    _one_of("--variant", variant, (*VARIANTS, "graph"))
    if variant != "graph":
        if is_tensorrt:
            _stop(f"--tensorrt: is for --variant graph; what runs {variant} on TensorRT is --device tensorrt")
        chosen = _one_of("--variant", variant, VARIANTS)
        where = _one_of("--device", device or "cpu", DEVICES)
        if not version.isdecimal() or int(version) < 1:
            _stop(f"--version: {version[:80]!r}: the versions of Triton's models are 1, 2 and so on")
        return write_model(
            bundle, repository, variant=chosen, is_decoupled=is_decoupled, device=where, version=int(version),
            precision=precision or "float32", **common,
        )  # fmt: skip
    for flag, said in (("--device", device), ("--precision", precision)):
        if said is not None:
            _stop(f"{flag}: a graph is float32, and Triton chooses where it runs; leave it out")
    _need_torch("export --variant graph")
    from .deploy.triton_graph import write_graph_model

    _tableau(bundle, solver, steps)
    return write_graph_model(bundle, repository, solver=solver, steps=steps, is_tensorrt=is_tensorrt, **common)


def _export_engines(
    bundle: "Bundle",
    out: Path,
    precisions: list[Any],
    flavour: str,
    batch: str,
    target: str | None,
    sampler: bool,
    plugin: bool,
    timing_cache: Path | None,
) -> None:
    from .export.additions import add_engines
    from .export.engines import FLAVOURS

    try:
        low, usual, high = map(int, batch.split(","))
    except ValueError:
        _stop(f"--batch: {batch!r} is not three numbers with commas between them")
    _, engines = add_engines(
        bundle,
        out,
        flavour=_one_of("--flavour", flavour, FLAVOURS),
        precisions=precisions,
        batch=(low, usual, high),
        targets=tuple(target.split(",")) if target else (),
        has_sampler=sampler,
        has_plugin=plugin,
        timing_cache=timing_cache,
    )
    for name, engine in engines.items():
        size = (out / name).stat().st_size
        where = ", ".join(engine.targets) or "any GPU that this TensorRT knows"
        print(f"{out}: {name}: {size:,} bytes by TensorRT {engine.version} for {where}; not run on a GPU yet")


TritonFolder = Annotated[Path | None, typer.Option("--environment", help="Its folder; in the user's cache.")]
RepositoryArgument = Annotated[Path, typer.Argument(help="Folder that `fewstep export BUNDLE --triton` wrote.")]


@triton.command("setup")
def triton_setup(
    folder: Annotated[Path | None, typer.Argument(help="Its folder; left out, in the user's cache.")] = None,
    backend: Annotated[
        Path | None, typer.Option(help="Folder of a further backend, onnxruntime for graphs; is copied into it.")
    ] = None,
) -> None:
    """Install a Triton server and what students need in it, in a folder of its own."""
    from .deploy.triton_server import Environment

    environment = Environment(folder.absolute()) if folder else Environment.default()
    environment.make()
    if backend is not None:
        environment.add_backend(backend.absolute())
    print(f"{environment.folder}: a Triton server, ready")


@triton.command("serve")
def triton_serve(
    repository: RepositoryArgument,
    arguments: Annotated[list[str] | None, typer.Argument(help="After --: arguments of tritonserver's own.")] = None,
    environment: TritonFolder = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of gRPC.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port of the metrics.")] = 8002,
) -> None:
    """Serve a repository on a Triton server here, until Ctrl-C."""
    import os

    from .deploy.triton_server import Environment, read_repository, refuse_without_backend

    server = Environment(environment.absolute()) if environment else Environment.default()
    models = read_repository(repository)
    server.refuse_unready()
    refuse_without_backend(models, server)
    where = [f"--http-address={host}", f"--grpc-address={host}", f"--metrics-address={host}"]
    where += [f"--http-port={port}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}"]
    command = server.command(repository, [*where, *(arguments or [])])
    os.execve(command[0], command, server.variables())


@triton.command("check")
def triton_check(
    repository: RepositoryArgument,
    environment: TritonFolder = None,
    url: Annotated[str | None, typer.Option(help="HOST:PORT of gRPC, to ask a server that runs already.")] = None,
) -> None:
    """Start a Triton server on a repository, ask it, and hold every pixel against the engine's.

    Exit status 2 where one is another, or the repository cannot be served.
    """
    from .deploy.triton_server import Environment, check

    server = Environment(environment.absolute()) if environment else Environment.default()
    wrong = []
    for model, verdict in check(repository, None if url else server, url):
        if verdict is None:
            told = "is whole; it was held against the engine when it was written, and not asked"
            print(f"{model.name} ({model.variant}): {told}: no {model.backend} backend that check knows")
            continue
        how = f"{model.variant}, decoupled" if model.is_decoupled else model.variant
        told = f"{verdict.alone} alone and {verdict.together} at once of {verdict.asked} requests have the right pixels"
        print(f"{model.name} ({how}): {told}", flush=True)
        wrong += [] if verdict.is_right else [model.name]
    if wrong:
        _stop(f"{', '.join(wrong)}: not the pixels of the engine")


@app.command("ray")
def ray_serve(
    bundles: Annotated[list[str] | None, typer.Argument(help="Folders or embedded names, one or more.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    config: Annotated[Path | None, typer.Option(help="TOML file with the server's settings.")] = None,
    min_replicas: Annotated[int, typer.Option(min=0, help="Replicas at least.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="Replicas at most.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one network call.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that Ray keeps for a replica.")] = 0,
    students: Annotated[int, typer.Option(min=1, help="Of the settings' repository, that a replica has at once.")] = 4,
    cpus: Annotated[
        float | None, typer.Option(help="CPUs that Ray keeps for a replica.", show_default="threads")
    ] = None,
    max_queued: Annotated[int, typer.Option(min=1, help="Requests in the proxy's line; more are refused.")] = 256,
    up_s: Annotated[float, typer.Option(min=0, help="A load that lasts so long starts replicas.")] = 5,
    down_s: Annotated[float, typer.Option(min=0, help="One that stays away so long ends them.")] = 60,
) -> None:
    """Serve students on Ray Serve: replicas of the server, on this machine or on the cluster that RAY_ADDRESS names."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        _stop("fewstep ray needs Ray Serve: pip install 'fewstep[ray]'")
    from .deploy.ray_app import Arguments, run

    named = ",".join(bundles) if bundles else None
    run(
        Arguments(bundles=named, config=config, min_replicas=min_replicas, max_replicas=max_replicas, threads=threads,
                  num_cpus=threads if cpus is None else cpus, num_gpus=gpus, students=students, max_queued=max_queued,
                  up_s=up_s, down_s=down_s), host, port,
    )  # fmt: skip


@app.command()
def demo(
    bundle: BundleArgument = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file for the grid.")] = Path("demo.png"),
    port: Annotated[int, typer.Option(help="Port to serve on; 0 takes a free one.")] = 0,
    stay: Annotated[bool, typer.Option("--stay", help="Go on serving afterwards.")] = False,
) -> None:
    """Start a server, send it real requests, draw what comes back and say how long it took."""
    from .server.demo import run

    _refuse_unwritable(output=output)
    run(bundle, output, port, stay)


def _need_torch(command: str) -> None:
    _need(command, ("torch", "onnx", "onnxscript", "accelerate"), "train")


def _need_bench() -> None:
    _need("bench", ("hdrh", "psutil"), "bench")


def _need(command: str, modules: tuple[str, ...], extra: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        _stop(f"fewstep {command} needs {', '.join(missing)}: pip install 'fewstep[{extra}]'")


def _one_of(what: str, given: str, choices: tuple[T, ...]) -> T:
    if given not in choices:
        _stop(f"{what}: {given!r} is not one of {', '.join(map(str, choices))}")
    return choices[choices.index(given)]


def _two_numbers(what: str, given: str | None) -> tuple[float, float] | None:
    if given is None:
        return None
    try:
        low, high = map(float, given.split(","))
    except ValueError:
        _stop(f"{what}: {given!r} is not two numbers with a comma between them")
    return low, high


def _named(what: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        _stop(f"{what}: {error}" if not str(error).startswith(what) else str(error))


def _tableau(bundle: "Bundle", solver: str | None, steps: int | None) -> "Tableau":
    is_solver_there = solver is None or any(name == solver for name, _ in bundle.tableaus)
    return _named("--steps" if is_solver_there else "--solver", lambda: bundle.tableau(solver, steps))


def _refuse_unwritable(*, makes_folder: bool = True, **files: Path | None) -> None:
    """Stop before the work at a file, named as its option, that could not be written after it."""
    for option, file in files.items():
        if file is None:
            continue
        folder = next(each for each in file.absolute().parents if each.exists() or not makes_folder)
        if file.is_dir():
            _stop(f"--{option}: {file} is a folder; name a file in it")
        if not folder.is_dir():
            _stop(f"--{option}: there is no folder {folder}")
        if not os.access(file if file.exists() else folder, os.W_OK):
            _stop(f"--{option}: {file} cannot be written: permission denied")


def _as_text(said: str) -> "Text":
    """What a file says, for the terminal: neither markup nor control characters of it are obeyed."""
    from rich.text import Text

    return Text("".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in said))


def _stop(message: str) -> NoReturn:
    print(f"fewstep: {message}", file=sys.stderr)
    raise SystemExit(2)


def _stop_at_file(error: OSError) -> None:
    """Stop where the error is one of a file that is used or made; else return."""
    import shutil

    from .runtime.files import NO_ROOM

    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of a folder: what, where to, why, of each
        _, copy, reason = error.args[0][0]
        _stop(f"{copy}: cannot be written: {reason}")
    if error.filename is not None:
        _stop(f"{error.filename}: {error.strerror}")
    if error.errno in NO_ROOM:  # a write does not know its file's name
        _stop(f"a file cannot be written: {error.strerror}; make room, and do it again")


def main() -> None:
    """Entry point: errors of the user's are one line on stderr and exit status 2."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.startswith("fewstep."):
            _stop(str(error))
        if isinstance(error, OSError):
            _stop_at_file(error)
        raise
