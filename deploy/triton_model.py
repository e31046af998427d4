"""What Triton's Python backend runs: a student, in one of three ways.

    inflight    execute() hands the requests to an engine in a thread of its own and returns; each is answered when its
                images are done. A request joins the running batch at its next step.
    loop        execute() runs its batch to the end. Requests that come meanwhile wait for the longest of the batch.
    iterative   execute() is one step of all rows; Triton itself puts the unfinished requests back in line
                (iterative sequences). A request joins at the next step, and each step pays for Triton's scheduling.

All three are the engine of `runtime.engine`, so the pixels are the same to the bit, and the same as the server's. What
a call means stands in `runtime.call`. Triton's own queue is in front: with its priorities and timeouts for the first
two, without them for sequences.
"""

import base64
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb  # Triton's; it exists in its processes alone

from ..runtime import Bundle, Engine, EngineThread, Preview, RequestError, Sample, SampleFailed, StepFailed
from ..runtime.backends import BackendError
from ..runtime.call import INPUTS, NAMES, CallError, in_words, outputs_of, requests_of
from ..runtime.gpu_backends import backend_on

log = logging.getLogger("fewstep")

_CANCEL_S = 0.1  # between looks at whether clients went away; a look is a question to Triton's other process
_FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_AGAIN = pb.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE


class Call:
    """One of Triton's requests, understood: its images, and what is to be answered.

    Args:
        student: the model.
        request: Triton's.

    Raises:
        CallError: it cannot be answered.
    """

    def __init__(self, student: "Student", request: Any) -> None:
        parameters = json.loads(request.parameters() or "{}")
        if request.timeout():
            parameters["timeout"] = request.timeout()
        if "text_input" in parameters:  # as Triton's generate calls it
            parameters["prompt"] = parameters.pop("text_input")
        tensors = {
            tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs() if tensor.name() in INPUTS
        }
        self.requests, self.preview_every = requests_of(student.engine, tensors, parameters, student.max_images)
        if not student.is_decoupled and self.preview_every:
            raise CallError("preview_every: this model answers once; export it with --decoupled", "preview_every")
        self.wanted = tuple(request.requested_output_names())
        self.futures: list[Future[Sample]] = []
        self.previews: list[tuple[int, Preview]] = []

    @property
    def is_done(self) -> bool:
        """Whether every image came to an end."""
        return all(future.done() for future in self.futures)

    def cancel(self) -> None:
        """Its images are not wanted any more."""
        for future in self.futures:
            future.cancel()

    def wants(self, preview: Preview) -> bool:
        """Whether a preview was asked for."""
        return self.preview_every > 0 and preview.step % self.preview_every == 0

    def answer(self) -> Any:
        """All images as one response."""
        try:
            return self._response([future.result() for future in self.futures], 0)
        except BaseException as error:
            return _refusal(error)

    def end(self, i: int) -> Any:
        """One image that came to its end, as a response of its own."""
        try:
            return self._event(i, self.futures[i].result())
        except BaseException as error:
            return _refusal(error)

    def preview(self, i: int, preview: Preview) -> Any:
        """A preview as a response of its own."""
        try:
            return self._event(i, preview)
        except Exception as error:
            return _refusal(error)

    def _event(self, i: int, image: Preview | Sample) -> Any:
        step = image.step if isinstance(image, Preview) else image.num_steps
        extra = {
            "INDEX": np.array([[i]], np.int32),
            "STEP": np.array([[step]], np.int32),
            "IS_PREVIEW": np.array([[isinstance(image, Preview)]], np.bool_),
        }
        return self._response([image], i, extra)

    def _response(self, images: Sequence[Preview | Sample], i: int, extra: dict[str, Any] | None = None) -> Any:
        seeds = [request.seed for request in self.requests[i : i + len(images)]]
        made = outputs_of(images, seeds, [name for name in ("IMAGE", "SEED", "STEPS") if name in self.wanted])
        if "PNG_BASE64" in self.wanted:
            pngs = outputs_of(images, seeds, ["PNG"])["PNG"]
            made["PNG_BASE64"] = np.array([[base64.b64encode(png[0])] for png in pngs], np.object_)
        made |= {name: array for name, array in (extra or {}).items() if name in self.wanted}
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in made.items()])


class Student:
    """What was loaded from the model's folder.

    Args:
        args: what Triton gives to ``initialize``.

    Raises:
        pb.TritonModelException: it cannot be served.
    """

    def __init__(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        said = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self.max_rows = int(said["max_rows"])
        self.max_images = max(1, config["max_batch_size"])
        self.is_decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        self.idle_s = int(config.get("sequence_batching", {}).get("max_sequence_idle_microseconds", 0)) / 1e6
        threads = int(said.get("threads") or 0) or None
        try:
            if said["device"] != "cpu":
                _see_one_gpu(args)
            bundle = Bundle.load(folder / "bundle")
            self.engine = Engine(
                bundle,
                max_rows=self.max_rows,
                max_waiting=1 << 20,  # waiting is Triton's work; the engine's line only keeps its slots full
                threads=threads,
                precision=said["precision"],
                backend=backend_on(said["device"], said["precision"]),
            )
            self.engine.warm_up()
        except Exception as error:  # whatever it is: Triton's log gets one line
            raise pb.TritonModelException(f"{args['model_name']}: {' '.join(str(error).split())}") from None

    def call(self, request: Any) -> Call | Any:
        """A request understood, or the response that refuses it."""
        try:
            return Call(self, request)
        except Exception as error:  # one that left execute() would end all calls of the batch, with a traceback each
            return _refusal(error)

    def submit(self, call: Call) -> Any | None:
        """Put a call's images in the engine's line; gives the response that refuses it, if it is refused."""
        on_preview = (lambda i, preview: call.previews.append((i, preview))) if call.preview_every else None
        try:
            call.futures = self.engine.submit(call.requests, on_preview)
        except (ValueError, RequestError) as error:
            return _refusal(error)
        return None


def _see_one_gpu(args: dict[str, str]) -> None:
    """Make the GPU that Triton gave to this instance the only one of its process, before a library asks for one.

    Raises:
        BackendError: it gave none.
    """
    if args["model_instance_kind"] != "GPU":
        told = f"its device is a GPU, but this instance is of KIND_{args['model_instance_kind']}"
        raise BackendError(f"{told}; export the model again with --replace")
    gpu = args["model_instance_device_id"]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(gpu)] if seen else gpu


def model_of(args: dict[str, str]) -> "Inflight | Loop | Iterative":
    """The model in the way that its configuration says."""
    variant = json.loads(args["model_config"])["parameters"]["variant"]["string_value"]
    variants: dict[str, type[Inflight | Loop | Iterative]] = {
        "inflight": Inflight, "loop": Loop, "iterative": Iterative,
    }  # fmt: skip
    return variants[variant](Student(args))


class Inflight:
    """The engine steps in a thread of its own; execute() only hands over.

    It hands over no more images than the slots hold and once as many to refill them from, then waits: the rest stays in
    Triton's queue, where priorities, timeouts and the bound of the queue work. Who cancels frees its slots soon after.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        self._room = threading.Semaphore(2 * student.max_rows)
        self._ended: queue.SimpleQueue[tuple[Any, Any, bool] | None] = queue.SimpleQueue()
        self._live: dict[int, tuple[Call, Any]] = {}  # calls under way, and their senders; by the call's id()
        self._steps = EngineThread([student.engine])
        self._answers = threading.Thread(target=self._answer, name="fewstep-answers", daemon=True)
        self._steps.start()
        self._answers.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand requests over; wait only where there is no room."""
        for request in requests:
            sender = request.get_response_sender()
            call = self._student.call(request)
            if isinstance(call, Call):
                self._start(call, sender)
            else:
                sender.send(call, flags=_FINAL)

    def _start(self, call: Call, sender: Any) -> None:
        unfinished = len(call.requests)
        lock = threading.Lock()

        def on_preview(i: int, _: int, preview: Preview) -> None:
            if call.wants(preview):
                self._ended.put((sender, partial(call.preview, i, preview), False))

        def on_end(i: int, future: Future[Sample]) -> None:
            nonlocal unfinished
            with lock:
                unfinished -= 1
                is_last = not unfinished
            if is_last:
                self._live.pop(id(call), None)
            if not self._student.is_decoupled:
                if is_last:
                    self._ended.put((sender, call.answer, True))
            else:
                self._ended.put((sender, partial(call.end, i), is_last))

        for i, one in enumerate(call.requests):
            self._room.acquire()
            try:
                (future,) = self._student.engine.submit([one], partial(on_preview, i) if call.preview_every else None)
            except (ValueError, RequestError) as error:  # it does not fit the student, or would be late
                future = Future()
                future.set_exception(error)
            future.add_done_callback(lambda _: self._room.release())
            call.futures.append(future)
        self._live[id(call)] = call, sender
        # Only now: a call is answered when all its images are known.
        for i, future in enumerate(call.futures):
            future.add_done_callback(partial(on_end, i))

    def _answer(self) -> None:
        looked_s, before = time.monotonic(), set[int]()
        while True:
            try:
                ended = self._ended.get(timeout=_CANCEL_S)
            except queue.Empty:
                pass
            else:
                if ended is None:
                    return
                sender, response, is_last = ended
                sender.send(response(), flags=_FINAL if is_last else 0)
            if time.monotonic() - looked_s > _CANCEL_S:
                live = dict(self._live)
                for name in live.keys() & before:  # those that have been here since the last look
                    call, sender = live[name]
                    if not call.is_done and sender.is_cancelled():
                        call.cancel()
                looked_s, before = time.monotonic(), set(live)

    def finalize(self) -> None:
        """Finish what was handed over, then stop."""
        self._steps.stop()
        self._ended.put(None)
        self._answers.join()


class Loop:
    """execute() runs its batch to the end."""

    def __init__(self, student: Student) -> None:
        self._student = student

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Make all images of a batch."""
        student = self._student
        senders = [request.get_response_sender() for request in requests] if student.is_decoupled else []
        calls = [student.call(request) for request in requests]
        refused = [call if not isinstance(call, Call) else student.submit(call) for call in calls]
        while student.engine.step():
            for call, sender in zip(calls, senders, strict=False):
                if isinstance(call, Call):
                    _show(call, sender)
        if not student.is_decoupled:
            return [refusal or call.answer() for refusal, call in zip(refused, calls, strict=True)]
        for refusal, call, sender in zip(refused, calls, senders, strict=True):
            _finish(refusal, call, sender)
        return None

    def finalize(self) -> None:
        """Nothing is left."""


class Iterative:
    """execute() is one step; Triton brings the unfinished requests again.

    Triton frees the place of a request that ends, but not if its client was gone by then: see its core's
    ``IterativeSequencer::RescheduleRequest``. So a cancelled one is never ended here: it goes back in line, where
    Triton finds it cancelled and frees its place. One that Triton drops from its line between two steps is not heard of
    again, and keeps its place until ``max_sequence_idle_microseconds`` are over: so there are more places than rows.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        self._calls: dict[int, tuple[Call, float]] = {}  # by Triton's sequence; and when brought last, in that order

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Start what is new, step all rows, answer what is finished."""
        student, now_s = self._student, time.monotonic()
        known: list[tuple[Call | None, Any | None]] = []
        for request in requests:
            is_first = bool(pb.get_input_tensor_by_name(request, "START").as_numpy().any())
            call, _ = self._calls.pop(request.correlation_id(), (None, 0.0))
            if call is not None and not is_first:
                self._calls[request.correlation_id()] = call, now_s
                known.append((call, None))
                continue
            if call is not None:  # left behind by a client that is gone
                call.cancel()
            made = student.call(request)
            refusal = student.submit(made) if isinstance(made, Call) else made
            known.append((made if isinstance(made, Call) else None, refusal))
            if refusal is None:
                self._calls[request.correlation_id()] = made, now_s
        for request, (call, _) in zip(requests, known, strict=True):
            if call and request.is_cancelled():
                call.cancel()
        student.engine.step()
        # A client may call its request a whole sequence: Triton would not bring that again.
        are_whole = [bool(request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END) for request in requests]
        for is_whole, (call, refusal) in zip(are_whole, known, strict=True):
            while is_whole and call and not refusal and not call.is_done:
                student.engine.step()
        responses: list[Any] = []
        for request, is_whole, (call, refusal) in zip(requests, are_whole, known, strict=True):
            sender = request.get_response_sender() if student.is_decoupled else None
            if call and sender:
                _show(call, sender)
            is_done = call is None or refusal is not None or call.is_done
            if is_done:
                self._calls.pop(request.correlation_id(), None)
            if not is_done or (not is_whole and request.is_cancelled()):
                request.set_release_flags(_AGAIN)
                responses.append(None)
            elif sender:
                _finish(refusal, call, sender)
            else:
                responses.append(refusal or (call and call.answer()))
        while self._calls:  # those that Triton has dropped
            sequence, (oldest, brought_s) = next(iter(self._calls.items()))
            if now_s - brought_s <= student.idle_s:
                break
            del self._calls[sequence]
            oldest.cancel()
        return None if student.is_decoupled else responses

    def finalize(self) -> None:
        """Nothing is left: Triton waits for its sequences."""


def _show(call: Call, sender: Any) -> None:
    """Send the previews that have come since the last step."""
    previews, call.previews = call.previews, []
    for i, preview in previews:
        if call.wants(preview):
            sender.send(call.preview(i, preview))


def _finish(refusal: Any | None, call: Any, sender: Any) -> None:
    """Send a call's images, each as a response of its own."""
    if refusal is not None:
        sender.send(refusal, flags=_FINAL)
        return
    last = len(call.futures) - 1
    for i in range(last + 1):
        sender.send(call.end(i), flags=_FINAL if i == last else 0)


def _refusal(error: BaseException) -> Any:
    """An error as a response."""
    message, codes = str(error), pb.TritonError
    if isinstance(error, CancelledError):
        return pb.InferenceResponse(error=codes("the request was cancelled", codes.CANCELLED))
    if isinstance(error, ValueError):  # the call is wrong, or does not fit the student
        field = error.field if isinstance(error, CallError) else message.partition(":")[0]
        return pb.InferenceResponse(error=codes(in_words(message, field, NAMES), codes.INVALID_ARG))
    if isinstance(error, StepFailed) or not isinstance(error, RequestError):
        message = "the server failed on this request; Triton's log says why"
    if not isinstance(error, RequestError):
        log.error("an error that was not foreseen", exc_info=error)
    is_busy = isinstance(error, RequestError) and not isinstance(error, SampleFailed)  # late, or no room
    return pb.InferenceResponse(error=codes(message, codes.UNAVAILABLE if is_busy else codes.INTERNAL))
