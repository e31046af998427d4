"""What a command cannot use ends it with status 2 and one line that names the option, before the work is done."""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.kernels import native_step
from fewstep.runtime import Bundle
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import ddim

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; its status, and what it printed."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version") == (0, metadata.version("fewstep") + "\n", "")


TEACHER = "fashion-mnist-teacher"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate -o folder", "--output: folder is a folder"),
        ("generate -o file/x.png", "--output: there is no folder"),
        ("generate --solver nobody", "--solver: fashion-mnist-mm4 has no table for nobody"),
        ("generate --steps 99", "--steps: fashion-mnist-mm4 has no table for ddim with 99 steps"),
        ("demo -o folder", "--output: folder is a folder"),
        ("bench run http://127.0.0.1:1 --json folder", "--json: folder is a folder"),
        ("capacity 40+1 --rate 1 --p99-ms 100 --json folder", "--json: folder is a folder"),
        (f"fit {TEACHER} -o folder", "--output: folder is a folder"),
        (f"fit {TEACHER} -o nowhere/t.table", "--output: there is no folder"),
        (f"fit {TEACHER} -o t --steps 0", "steps: 0, must be at least 1"),
        (f"fit {TEACHER} -o t --steps 2000", "steps: 2000 of 10 substeps each are more than the 1024"),
        (f"fit {TEACHER} -o t --substeps 0", "substeps: 0, must be at least 1"),
        (f"fit {TEACHER} -o t --method rows --history 0", "history: 0, must be at least 1"),
        (f"fit {TEACHER} -o t --method rows --history 17", "history: 17, a table may read at most 16"),
        (f"fit {TEACHER} -o t --method rows --ridge -1", "ridge: -1, must be at least 0"),
        (f"fit {TEACHER} -o t --method rows --ridge nan", "ridge: nan, must be at least 0"),
        ("evaluate fashion-mnist-mm4 -o folder", "--output: folder is a folder"),
        ("evaluate fashion-mnist-mm4 --steps 1,2 --plot nowhere/x.svg", "--plot: there is no folder"),
        ("evaluate fashion-mnist-mm4 --steps 99", "fashion-mnist-mm4 has no table for ddim with 99 steps"),
        ("train digits -o file/run", "Not a directory"),
    ],
)
def test_what_cannot_be_done_is_said_first(
    run: Run, words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    status, out, err = run(*words.split())
    assert (status, out) == (2, "")
    assert err.startswith("fewstep: ")
    assert said in err
    assert err.count("\n") == 1
    assert {each.name for each in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate --num 4 -o out.png", "--output: out.png cannot be written: File too large"),
        (
            f"fit {TEACHER} --method dode --solver ddim --steps 3 -o t.table",
            "t.table: cannot be written: File too large",
        ),
        ("export fashion-mnist-mm4 -o fast --precision float16", "cannot be written: [Errno 27] File too large"),
        ("export fashion-mnist-mm4 --triton repository", "cannot be written: "),
        ("generate -o out.png", "--output: out.png cannot be written: File too large"),
        ("capacity 40+1 --rate 5 --replicas 1 --json out.json", "--json: out.json: File too large"),
    ],
)
def test_a_full_disk_is_told_in_one_line(words: str, said: str, tmp_path: Path) -> None:
    """The system lets no file grow at all."""
    native_step()  # compiled and kept, if it was not yet
    process = subprocess.run(
        [sys.executable, "-m", "fewstep", *words.split()], capture_output=True, text=True, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("fewstep: ")
    assert said in process.stderr
    assert process.stderr.count("\n") == 1
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]


def test_a_bundle_of_the_package_is_not_changed(run: Run, tmp_path: Path) -> None:
    ddim(karras(5)).save(tmp_path / "t.table")
    status, _, err = run("table", "add", TEACHER, tmp_path / "t.table")
    assert status == 2
    assert f"{TEACHER} comes with fewstep and is not changed" in err
    assert ("ddim", 5) in Bundle.load(TEACHER).tableaus


def test_inspect_says_the_whole_folder_and_the_whole_hash(run: Run) -> None:
    """On a narrow terminal too."""
    bundle = Bundle.load()
    _, out, _ = run("inspect")
    squeezed = "".join(out.split())
    assert str(bundle.path) in squeezed
    assert bundle.weights_sha256 in squeezed


def test_what_a_table_says_of_itself_is_shown_and_not_obeyed(run: Run, tmp_path: Path) -> None:
    """Neither the terminal's control characters nor the markup of the library that prints."""
    odd = replace(ddim(karras(3)), provenance={"by": "[/nobody] [red]\x1b[2J", "[b]": "x"})
    odd.save(tmp_path / "odd.table")
    replace(odd, provenance={}).save(tmp_path / "plain.table")
    for words in (("show", tmp_path / "odd.table"), ("diff", tmp_path / "plain.table", tmp_path / "odd.table")):
        _, out, _ = run("table", *words)
        assert r"[/nobody] [red]\x1b[2J" in out
        assert "\x1b[2J" not in out
