"""AIMET as a contestant: a worker process under an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("aimet_worker.py")


def find_python() -> Path | None:
    """The Python that has aimet-torch: ``$RIMET_PEERS_PYTHON``, or what ``make peers`` made."""
    named = os.environ.get("RIMET_PEERS_PYTHON")
    path = Path(named) if named else ROOT / ".venv-peers" / "bin" / "python"
    return path if path.is_file() else None


class AimetPeer:
    """Asks ``aimet_worker.py`` to time work; one line of JSON each way per request.

    Only one of the two processes works at a time, so both see the same machine.
    """

    def __init__(self, python: Path, threads: int) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [str(python), "-W", "ignore", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.versions: dict[str, str] = {}
        hello = self._ask({"do": "hello", "threads": threads})
        versions = hello["versions"]
        assert isinstance(versions, dict)
        self.versions = versions

    def _ask(self, request: dict[str, object]) -> dict[str, object]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the AIMET worker ended while asked for {request}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the AIMET worker, asked for {request}: {answer['error']}")
        if not isinstance(answer, dict):
            raise RuntimeError(f"the AIMET worker answered {answer!r}")
        return answer

    def build(self, work: str, parameters: dict[str, object]) -> int:
        return int(
            str(self._ask({"do": "build", "work": work, "parameters": parameters})["handle"])
        )

    def sample(self, handle: int, inner: int) -> float:
        return float(str(self._ask({"do": "sample", "handle": handle, "inner": inner})["seconds"]))

    def release(self, handle: int) -> None:
        self._ask({"do": "release", "handle": handle})

    def __enter__(self) -> AimetPeer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
