"""The compiled CPU step where things go wrong: numpy does its work, to the same bits, and says so in the log."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.kernels import native

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")

SAY = """
import hashlib, logging
import numpy as np
from fewstep.kernels import StepRow, fused_step, native_step, pack_rows
logging.basicConfig(format="%(message)s")
rng = np.random.default_rng(0)
row = StepRow(0.1, -0.5, -1.0, 1.0, a=0.6, b=(0.3, -0.2), c=0.1, c_in=0.5, write_slot=1, noise_id=3)
x, history, raw = (rng.standard_normal(shape, np.float32) for shape in ((3, 1003), (3, 2, 1003), (5, 1003)))
said = np.empty_like(x)
uncond, guidance, seed = np.array([4, -1, 3], np.int32), np.full(3, 2.5, np.float32), np.arange(3, dtype=np.uint64)
fused_step(pack_rows([row], 2), np.zeros(3, np.int32), x, history, raw, uncond, guidance, seed, said)
print("compiled" if native_step() else "numpy", hashlib.sha256(x.tobytes() + said.tobytes()).hexdigest())
"""


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    """A process's, with empty caches of its own."""
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp"), **changes}


def run(tmp_path: Path, **changes: str) -> tuple[str, str, str]:
    """Which build ran, the hash of what it made, and the log."""
    done = subprocess.run(
        [sys.executable, "-c", SAY], env=environment(tmp_path, **changes), capture_output=True, text=True, check=True
    )
    build, made = done.stdout.split()
    return build, made, done.stderr.strip()


@needs_compiler
def test_without_a_compiler_numpy_gives_the_same_bits(tmp_path: Path) -> None:
    build, made, _ = run(tmp_path / "with")
    without, same, _ = run(tmp_path / "without", PATH="")
    assert (build, without) == ("compiled", "numpy")
    assert made == same


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("with", "without"):
        (tmp_path / name).mkdir()


def test_a_server_without_a_compiler_says_that_numpy_does_the_step(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fewstep", "serve", "--port", "0", "--threads", "1"]
    made = environment(tmp_path, PATH="")
    with subprocess.Popen(command, env=made, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        server.terminate()
    assert line.startswith("fewstep serves ")
    assert line.endswith("; the fused step in numpy, as none could be compiled; Ctrl-C ends)\n")


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    build, *_ = run(tmp_path)
    assert build == "compiled"
    assert [path.suffix for path in (tmp_path / "tmp").glob("fewstep-*/*")] == [".so"]


@needs_compiler
def test_without_any_folder_to_write_numpy_does_the_work(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    user = os.getuid()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / f"fewstep-{user}").write_text("here too")
    build, made, _ = run(tmp_path)
    assert (build, made) == ("numpy", run(tmp_path / "with")[1])


@needs_compiler
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_library_that_another_user_put_in_place_is_not_loaded(tmp_path: Path) -> None:
    """Where the home cache cannot be written: anybody can make the folder of temporary files that comes next."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    _, made, _ = run(tmp_path)
    (library,) = (tmp_path / "tmp").glob("fewstep-*/*.so")
    wrong = library.read_bytes()
    os.chown(library, 12345, 12345)
    assert run(tmp_path)[:2] == ("compiled", made)
    assert library.stat().st_uid == 0
    os.chown(library.parent, 12345, 12345)
    library.write_bytes(wrong)
    build, same, said = run(tmp_path)
    assert (build, same) == ("numpy", made)
    assert said == f"{library.parent} is not used: it belongs to another user"


@needs_compiler
def test_a_user_without_a_home_and_a_name_has_the_compiled_step(tmp_path: Path) -> None:
    """As in containers that are run under a number."""
    nobody = "import pwd; pwd.getpwuid = lambda number: {}[number]\n"
    made = environment(tmp_path, HOME="", XDG_CACHE_HOME="")
    del made["HOME"]
    done = subprocess.run([sys.executable, "-c", nobody + SAY], env=made, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("compiled ")
    assert [path.suffix for path in (tmp_path / "tmp").glob("fewstep-*/*")] == [".so"]


@needs_compiler
def test_a_library_that_was_torn_or_altered_is_built_again(tmp_path: Path) -> None:
    """Loading half a library would end the process; one with other instructions would give other bits."""
    _, made, _ = run(tmp_path)
    (library,) = (tmp_path / "cache" / "fewstep").glob("*.so")
    whole = library.read_bytes()
    middle = len(whole) // 2
    for spoiled in (whole[:1000], whole[:-1], whole[:middle] + b"x" + whole[middle + 1 :]):
        library.write_bytes(spoiled)
        assert run(tmp_path)[:2] == ("compiled", made)
        assert native.read_kept(library) is not None


@needs_compiler
def test_two_processes_that_build_at_once_both_get_a_whole_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAY]
    made = environment(tmp_path)
    together = [subprocess.Popen(command, env=made, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0] for process in together}
    assert [process.returncode for process in together] == [0, 0, 0]
    assert len(said) == 1
    assert said.pop().startswith("compiled ")
    assert [path.suffix for path in (tmp_path / "cache" / "fewstep").iterdir()] == [".so"]


@needs_compiler
def test_a_build_with_other_bits_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one by a compiler that fuses multiplications and additions."""
    source = native._FOLDER / "fewstep_step.h"
    folder = tmp_path / "kernels"
    folder.mkdir()
    shutil.copy(native._FOLDER / "cpu.cpp", folder)
    wrong = source.read_text().replace("0.693359375f", "0.69f")
    (folder / "fewstep_step.h").write_text(wrong)
    assert wrong != source.read_text()
    monkeypatch.setattr(native, "_FOLDER", folder)
    monkeypatch.setattr(native, "_places", lambda: [tmp_path / "cache"])
    with caplog.at_level(logging.WARNING, "fewstep"):
        assert native.native_step.__wrapped__() is None
    assert caplog.messages[0].endswith("gives other bits than the reference")
