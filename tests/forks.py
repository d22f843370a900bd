"""Training processes that start at once, for tests that kill many: a warm process forks them.

`python tests/forks.py` imports all that training needs, trains a little, and then starts a fork of
itself for every line on its standard input: a process of its own, with its own exit code.
"""

import io
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml


class Forks:
    """Starts `align pretrain` in forks of a warm process, one at a time.

    Example:
        >>> with Forks() as forks:
        ...     pid = forks.start(tiny_pretrain(data, out))
        ...     os.kill(pid, signal.SIGKILL)
        ...     assert forks.code() == -signal.SIGKILL
    """

    def __enter__(self) -> "Forks":
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parent.parent,
            bufsize=0,
        )
        assert self._line(120) == "ready"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def start(self, values: dict[str, Any], *, patch: str = "") -> int:
        """Start a run, after some Python that changes it; returns the number of its process."""
        out = Path(values["out"])
        self._said = out.with_name(f"{out.name}.said")
        (out.with_name(f"{out.name}.yaml")).write_text(yaml.safe_dump(values))
        wanted = {
            "config": str(out.with_name(f"{out.name}.yaml")),
            "said": str(self._said),
            "patch": patch,
        }
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(wanted) + "\n").encode())
        return int(self._line(30))

    def code(self, *, seconds: float = 120) -> int:
        """Wait for the end of the run; its exit code, or minus the signal that ended it."""
        return int(self._line(seconds))

    @property
    def said(self) -> str:
        """What the latest run printed, errors too."""
        return self._said.read_text()

    def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None
        data = b""
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], seconds)
            if not ready:
                raise TimeoutError(f"no answer in {seconds} s")
            byte = self._process.stdout.read(1)
            assert byte, "the warm process has ended"
            data += byte
        return data.decode().strip()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        from pairs_corpus import tiny_pretrain, write_pairs

        from pipelines import pretrain
        from pipelines.config import build
        from pipelines.schemas import PretrainConfig

        write_pairs(Path(folder) / "data")
        values = tiny_pretrain(Path(folder) / "data", Path(folder) / "run", samples=16)
        sys.stdout = io.StringIO()
        pretrain.run(build(PretrainConfig, values, origin="warm-up"))
        sys.stdout = sys.__stdout__
    answers.write("ready\n")
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _run(**json.loads(line))
        answers.write(f"{pid}\n")
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


def _run(config: str, said: str, patch: str) -> None:
    from pipelines.cli import main

    code = 1
    try:
        told = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(told, 1)
        os.dup2(told, 2)
        exec(patch, {})
        main(["pretrain", config])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
