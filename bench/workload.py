"""What is asked for and when: kinds of requests with weights, and a closed or an open loop.

    closed    N clients, each asks anew when it has its answer. Throughput is the server's; latency is N / throughput.
    open      requests come at their own times, whatever the server does. Latency is what users would see.

Everything is drawn from one seed before the run: two runs with the same workload send the same requests at the same
times.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import BenchError

ARRIVALS = ("poisson", "burst", "constant")
_WHOLE = ("steps", "n", "priority", "seed", "label")
_OR_ZERO = ("guidance",)
_NUMBERS = (*_OR_ZERO, "deadline_ms", "target_ms", "weight")
_OF_ITS_OWN = ("prompt", "label", "seed")  # what tells a request of a trace from others of its kind
_DRAWN = 65536  # kinds drawn ahead; afterwards from the beginning


@dataclass(frozen=True)
class Kind:
    """One kind of request. ``fields`` are in the words of `targets`; those left out are the server's defaults."""

    name: str
    weight: float = 1.0
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Images of one request."""
        return int(self.fields.get("n", 1))

    @property
    def target_ms(self) -> float | None:
        """The latency it should keep to: ``target_ms``, or the deadline that the server is told."""
        target_ms: float | None = self.fields.get("target_ms", self.fields.get("deadline_ms"))
        return target_ms


@dataclass(frozen=True)
class Arrival:
    """One line of a trace. ``fields`` are those that it does not share with the others of its kind."""

    at_s: float
    kind: int
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """Kinds of requests, and when they come."""

    kinds: tuple[Kind, ...] = (Kind("all"),)
    clients: int = 32  # of the closed loop
    rate: float | None = None  # requests a second of the open loop; None: the closed loop, unless there is a trace
    arrivals: str = "poisson"  # or burst, constant, or the file of a trace
    burst: int = 16  # requests of one burst
    warmup_s: float = 1.0
    seconds: float = 10.0
    seed: int = 0
    trace: tuple[Arrival, ...] = ()  # in the order of their times

    @property
    def loop(self) -> Literal["open", "closed"]:
        """Which of the two."""
        return "open" if self.rate is not None or self.trace else "closed"

    def schedule(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """When each request of the open loop is meant to be sent, in seconds from the start, and its kind."""
        end_s = self.warmup_s + self.seconds
        if self.trace:
            recorded = np.array([one.at_s for one in self.trace])
            if self.rate is not None:
                recorded = recorded * (len(recorded) / self.rate / max(recorded[-1], 1e-9))
            times = recorded[recorded < end_s]
            return times, np.array([one.kind for one in self.trace[: len(times)]])
        assert self.rate is not None
        rng = np.random.default_rng(self.seed)
        size = self.burst if self.arrivals == "burst" else 1
        pace = self.rate / size
        if self.arrivals == "constant":
            times = np.arange(math.ceil(end_s * pace)) / pace
        else:
            gaps = rng.exponential(1 / pace, int(end_s * pace + 10 * math.sqrt(end_s * pace) + 20))
            times = np.cumsum(gaps)
        times = np.repeat(times, size)
        times = times[times < end_s]
        drawn = self.draw()
        return times, drawn[np.arange(len(times)) % len(drawn)]

    def request(self, kind: int, number: int) -> Kind:
        """What the request of that number asks for, which is one of that kind."""
        of = self.kinds[kind]
        own = self.trace[number].fields if self.trace else {}
        return replace(of, fields={**of.fields, **own}) if own else of

    def draw(self) -> NDArray[np.int64]:
        """Kinds by their weights, in the order in which requests take them."""
        weights = np.array([kind.weight for kind in self.kinds])
        return np.random.default_rng([self.seed, 1]).choice(len(self.kinds), _DRAWN, p=weights / weights.sum())

    def describe(self) -> dict[str, Any]:
        """For a report."""
        told: dict[str, Any] = {"loop": self.loop}
        if self.loop == "closed":
            told["clients"] = self.clients
        else:
            told |= {"rate": self.rate, "arrivals": self.arrivals}
            if self.arrivals == "burst":
                told["burst"] = self.burst
        told |= {"seconds": self.seconds, "warmup_s": self.warmup_s, "seed": self.seed}
        told["kinds"] = [{"name": k.name, "weight": k.weight, **k.fields} for k in self.kinds]
        return told


def workload(
    mix: str | None = None,
    *,
    clients: int = 32,
    rate: float | None = None,
    arrivals: str = "poisson",
    burst: int = 16,
    deadline_ms: float | None = None,
    warmup_s: float = 1.0,
    seconds: float | None = None,
    seed: int = 0,
) -> Workload:
    """A workload from what a person types.

    Args:
        mix: ``"steps=1:0.5, steps=4 solver=ddim:0.3"``, each kind with its weight, or a TOML file with ``[[request]]``.
        clients: of the closed loop.
        rate: requests a second; with it the loop is open.
        arrivals: poisson, burst, constant, or the file of a trace; with a trace ``rate`` is the one it is scaled to.
        burst: requests of one burst.
        deadline_ms: of kinds that name none.
        warmup_s: load before the clock.
        seconds: load on the clock; 10 when left out, or what a trace takes.
        seed: of the arrivals and of the kinds' order.

    Raises:
        BenchError: a value is not allowed; the message names the option.
    """
    for option, value in (("--seconds", seconds), ("--rate", rate), ("--deadline-ms", deadline_ms)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise BenchError(f"{option}: {value:g} must be more than 0")
    if not (warmup_s >= 0 and math.isfinite(warmup_s)):
        raise BenchError(f"--warmup: {warmup_s:g} must be 0 or more")
    for option, number in (("--clients", clients), ("--burst", burst)):
        if number < 1:
            raise BenchError(f"{option}: {number} must be at least 1")
    kinds = list(parse_mix(mix)) if mix else [Kind("all")]
    trace: tuple[Arrival, ...] = ()
    if arrivals not in ARRIVALS:
        trace = _trace(Path(arrivals), kinds, seed)
    elif rate is None and arrivals != "poisson":
        raise BenchError(f"--arrivals {arrivals}: needs --rate, the requests a second")
    if seconds is None:
        took_s = (len(trace) / rate if rate else trace[-1].at_s) if trace else warmup_s + 10.0
        seconds = max(took_s - warmup_s, 0.0) + (1e-3 if trace else 0.0)
    if deadline_ms is not None:
        kinds = [Kind(k.name, k.weight, {"deadline_ms": deadline_ms, **k.fields}) for k in kinds]
    return Workload(tuple(kinds), clients, rate, arrivals, burst, warmup_s, seconds, seed, trace)


def parse_mix(text: str) -> tuple[Kind, ...]:
    """Kinds of requests from ``"steps=1:0.5, steps=4 solver=ddim:0.5"`` or from a TOML file.

    Raises:
        BenchError: it is neither.
    """
    if text.endswith(".toml"):
        return _mix_file(Path(text))
    kinds = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        words, colon, weight = part.rpartition(":")
        if not colon:
            words, weight = part, "1"
        fields: dict[str, Any] = {}
        for word in words.split():
            name, equals, value = word.partition("=")
            if not equals or not name or not value:
                raise BenchError(f"--mix: {word!r} is not NAME=VALUE; a mix looks like 'steps=1:0.5, steps=4:0.5'")
            fields[name] = value
        kinds.append(_kind(" ".join(words.split()) or "all", weight, fields, "--mix"))
    return _distinct(kinds, "--mix")


def _mix_file(file: Path) -> tuple[Kind, ...]:
    try:
        held = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise BenchError(f"--mix: {file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BenchError(f"--mix: {file}: is not TOML: {error}") from None
    requests = held.get("request")
    if set(held) != {"request"} or not isinstance(requests, list):
        raise BenchError(f"--mix: {file}: holds tables [[request]] and nothing else")
    kinds = []
    for one in requests:
        fields = dict(one)
        name, weight = str(fields.pop("name", "")), fields.pop("weight", 1.0)
        kinds.append(_kind(name or _named(fields), weight, fields, f"--mix: {file}"))
    return _distinct(kinds, f"--mix: {file}")


def _named(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items()) or "all"


def _kind(name: str, weight: Any, fields: Mapping[str, Any], where: str) -> Kind:
    typed: dict[str, Any] = {}
    for field_name, given in {**fields, "weight": weight}.items():
        value = given
        try:
            if field_name == "seed" and value == "none":
                pass
            elif field_name in _WHOLE:
                value = int(value)
            elif field_name in _NUMBERS:
                value = float(value)
                is_allowed = value >= 0 if field_name in _OR_ZERO else value > 0
                if not (is_allowed and math.isfinite(value)):
                    raise ValueError
        except (TypeError, ValueError, OverflowError):
            wanted = "a whole number" if field_name in _WHOLE else "a number above 0"
            wanted = "a number, 0 or more" if field_name in _OR_ZERO else wanted
            raise BenchError(f"{where}: {name}: {field_name} is {given!r}, must be {wanted}") from None
        typed[field_name] = value
    if typed.get("n", 1) < 1:
        raise BenchError(f"{where}: {name}: n is {typed['n']}, at least one image is needed")
    return Kind(name, typed.pop("weight"), typed)


def _distinct(kinds: Sequence[Kind], where: str) -> tuple[Kind, ...]:
    names = [kind.name for kind in kinds]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BenchError(f"{where}: {twice!r} is there twice; add up the weights")
    if not kinds:
        raise BenchError(f"{where}: holds no kind of request")
    return tuple(kinds)


def _trace(file: Path, kinds: list[Kind], seed: int) -> tuple[Arrival, ...]:
    """A recorded trace: a number of seconds a line, or JSON with ``at`` and the fields of a kind.

    Lines of fields add their kind to ``kinds``, which is all that they say but for prompt, label and seed; those of a
    time alone take one of the mix.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise BenchError(f"--arrivals: {file}: is not text") from None
    except OSError as error:
        choices = ", ".join(ARRIVALS)
        raise BenchError(f"--arrivals: {file} is none of {choices}, and no file: {error.strerror}") from None
    drawn = Workload(tuple(kinds), seed=seed).draw()
    number_of = {kind.name: i for i, kind in enumerate(kinds)}
    trace: list[Arrival] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            fields = dict(said) if isinstance(said, dict) else {}
            at = float(fields.pop("at") if fields else said)
            if not (at >= 0 and math.isfinite(at)):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            wanted = 'a number of seconds, or {"at": SECONDS, "steps": 4}'
            raise BenchError(f"--arrivals: {file}, line {number}: {line.strip()[:60]!r} is not {wanted}") from None
        index, own = int(drawn[len(trace) % len(drawn)]), {}
        if fields:
            said = _kind(_named(fields), 1.0, fields, f"--arrivals: {file}, line {number}").fields
            own = {name: value for name, value in said.items() if name in _OF_ITS_OWN}
            shared = {name: value for name, value in said.items() if name not in own}
            name = _named(shared)
            if name not in number_of:
                number_of[name] = len(kinds)
                kinds.append(Kind(name, 1.0, shared))
            index = number_of[name]
        trace.append(Arrival(at, index, own))
    if not trace:
        raise BenchError(f"--arrivals: {file}: holds no arrivals")
    trace.sort(key=lambda one: one.at_s)
    used = sorted({one.kind for one in trace})
    kinds[:] = [kinds[index] for index in used]
    return tuple(replace(one, at_s=one.at_s - trace[0].at_s, kind=used.index(one.kind)) for one in trace)
