"""Latency benchmarks: ``fewstep bench``. Floor 4; it imports the runtime, and of a server it knows only the wire.

    workload    what is asked for, and when: kinds of requests, closed and open loops
    targets     who is asked: OpenAI images, KServe v2 over HTTP and gRPC, an engine in the same process
    generator   the load: an asynchronous client in a process of its own
    observer    the server from outside: batch fill, CPU time, memory
    report      what was measured, as JSON and for the terminal; page is the same as a web page
    compare     whether two reports differ by more than noise
    run         all of it in order
    simulation  a load on replicas that are real engines on a virtual clock
    capacity    how many of them it needs, and measuring what one costs; plan is the command

In an open loop the clock of a request starts when it was meant to be sent, whether or not anything was free to send it
then. A server that stalls is charged for everyone who would have come meanwhile.
"""

from .compare import compare_files
from .errors import BenchError
from .run import bench

__all__ = ["BenchError", "bench", "compare_files"]
