"""The samples on kernels that were compiled for aarch64 and run under qemu; see aarch64_check.sh.

csrc/cpu is linked with torch_stand_in.cpp, which has what it calls of torch, into a server. Here each implementation in
C++ is replaced by one that sends its arguments there, so that the samples, forward and backward, and the policy of
accuracy are those of every other backend.

A call, little endian: text op, text of one letter a result (t tensor, T list), u32 arguments, and of each a letter and
    t, o tensor (o: of a Tensor?): i32 dtype, u32 n, i64 sizes[n], i64 strides[n], the elements that strides reach
    n nothing   T u32 n, tensors   d f64   i i64   b u8   y i32 dtype   s text   D u32 n, f64[n]   I u32 n, i64[n]
where a text is u32 length, bytes. The answer: e text, or r and the results, tensors without strides.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup  # noqa: E402  how the sources are compiled is stated there
from w2s_fast import extension  # noqa: E402
from w2s_fast.testing.compare import Mismatch, compare  # noqa: E402
from w2s_fast.testing.samples import all_samples  # noqa: E402
from w2s_fast.testing.selection import covering  # noqa: E402

FOLDER = ROOT / "build" / "aarch64"
#: ARMv8.0 alone: no instruction that came later
EMULATOR = ["qemu-aarch64", "-cpu", "cortex-a57", "-L", "/usr/aarch64-linux-gnu"]
CODES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6,
    torch.float64: 7, torch.bool: 11, torch.bfloat16: 15, torch.uint16: 27, torch.uint32: 28, torch.uint64: 29,
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}
#: they write into an argument: for the tests of the dense product alone, and a step in place beside projected_step
LEFT_OUT = ("product", "product_rates", "projected_step_")


def built() -> Path:
    """The server."""
    # gcc 12 for aarch64 crashes in that pass, where a source begins with a header precompiled at another level
    objects, made = setup.compile_cpu(FOLDER, setup.TARGETS["portable"], ["-fno-ipa-cp"])
    headers = setup.torch_folder() / "include"
    flags = [*setup.FLAGS, "-O1", f"-isystem{headers}", f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET}"]
    command = [os.environ["CXX"], *flags, "-c", ".ci/torch_stand_in.cpp"]
    stand_in = setup.Step(FOLDER / "torch_stand_in.o", command)
    made += stand_in.run()
    program = FOLDER / "server"
    command = [os.environ["CXX"], *map(str, objects), str(stand_in.target), "-ldl", "-o", str(program)]
    subprocess.run(command, check=True)
    print(f"aarch64: {made} of {len(objects) + 1} objects compiled", flush=True)
    return program


class Server:
    """The ops under the emulator."""

    def __init__(self, program: Path) -> None:
        environment = {**os.environ, "W2S_FAST_GEMM": "own"}
        self.process = subprocess.Popen(
            [*EMULATOR, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.signatures = extension.read_signatures(self._text())
        self.calls: Counter[str] = Counter()

    def call(self, op: str, arguments: tuple[Any, ...]) -> Any:
        """What the dispatcher wants of an implementation."""
        given, made = (side.split(", ") for side in self.signatures[op].split(" -> "))
        kinds = "".join("T" if kind == "Tensor[]" else "t" for kind in made)
        parts = [_text(op), _text(kinds), struct.pack("<I", len(arguments))]
        parts += [_argument(kind, value) for kind, value in zip(given, arguments, strict=True)]
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()
        self.calls[op] += 1
        if self._read(1) == b"e":
            raise RuntimeError(self._text())
        results = [self._tensor() if kind == "t" else self._tensors() for kind in kinds]
        return results[0] if len(results) == 1 else tuple(results)

    def _read(self, count: int) -> bytes:
        assert self.process.stdout is not None
        found = self.process.stdout.read(count)
        if len(found) != count:
            raise SystemExit(f"aarch64: the emulated process ended with {self.process.wait()}")
        return found

    def _number(self) -> int:
        return int(struct.unpack("<I", self._read(4))[0])

    def _text(self) -> str:
        return self._read(self._number()).decode()

    def _tensor(self) -> Tensor:
        dtype = DTYPES[self._number()]
        n = self._number()
        made = torch.empty(struct.unpack(f"<{n}q", self._read(8 * n)), dtype=dtype)
        if made.numel():
            data = bytearray(self._read(made.numel() * made.element_size()))
            made = torch.frombuffer(data, dtype=dtype).view(made.shape)
        return made

    def _tensors(self) -> list[Tensor]:
        return [self._tensor() for _ in range(self._number())]


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


def _sent(t: Tensor) -> bytes:
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    flat = t.detach().as_strided((reach,), (1,))
    numbers = struct.pack(f"<iI{t.ndim}q{t.ndim}q", CODES[t.dtype], t.ndim, *t.shape, *t.stride())
    return numbers + (flat.contiguous().view(torch.uint8).numpy().tobytes() if reach else b"")


def _argument(kind: str, value: Any) -> bytes:
    if kind.startswith("Tensor") and value is None:
        return b"n"
    if kind in ("Tensor", "Tensor?"):
        return (b"o" if kind.endswith("?") else b"t") + _sent(value)
    if kind == "Tensor[]":
        return b"T" + struct.pack("<I", len(value)) + b"".join(map(_sent, value))
    if kind == "str":
        return b"s" + _text(value)
    if kind in ("float[]", "int[]"):
        letter, code = ("D", "d") if kind == "float[]" else ("I", "q")
        return letter.encode() + struct.pack(f"<I{len(value)}{code}", len(value), *value)
    letter, code = {"float": ("d", "d"), "int": ("i", "q"), "bool": ("b", "?"), "ScalarType": ("y", "i")}[kind]
    return letter.encode() + struct.pack(f"<{code}", CODES[value] if kind == "ScalarType" else value)


def replaced(server: Server) -> torch.library.Library:
    """Every C++ implementation goes to the server, until the result is gone."""
    library = torch.library.Library("w2s_fast", "IMPL", "CPU")
    for op in server.signatures:
        if op not in LEFT_OUT:
            library.impl(op, lambda *a, op=op: server.call(op, a), allow_override=True)
    return library


def main() -> int:
    """Build and run; how many comparisons failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only samples of this op")
    parser.add_argument("--quick", action="store_true", help="a part of the samples, each op in each dtype")
    parser.add_argument("--build", action="store_true", help="compile and link only")
    given = parser.parse_args()
    if extension.ERROR is not None:
        sys.exit(f"aarch64: this machine's own kernels are wanted too: {extension.ERROR}")
    program = built()
    if given.build:
        return 0
    server = Server(program)
    assert server.signatures == extension.signatures(), "the kernels of this machine are of other sources: make build"
    held = replaced(server)
    cases = [(s, dtype) for s in all_samples() for dtype in s.dtypes if not given.op or s.op in given.op]
    if given.quick:
        cases = covering(cases, lambda case: [(case[0].op, case[1])], 1)
    failures, worst, start = [], 0.0, time.perf_counter()
    for sample, dtype in cases:
        try:
            worst = max(worst, compare(sample, "cpp", dtype))
        except Mismatch as error:
            failures.append(str(error))
        except RuntimeError as error:
            if "cannot serve this call" not in str(error):  # a call that `auto` sends elsewhere
                failures.append(f"{sample.id} {dtype}: {error}")
    del held
    for failure in failures:
        print(f"aarch64: {failure}")
    unseen = set() if given.op or given.quick else set(server.signatures) - set(server.calls) - set(LEFT_OUT)
    print(
        f"aarch64: {len(cases)} samples and dtypes, {sum(server.calls.values())} calls of {len(server.calls)} ops in "
        f"{time.perf_counter() - start:.0f} s; {len(failures)} failed; at most {worst:.2f} of the allowed error"
        + (f"; never called: {', '.join(sorted(unseen))}" if unseen else "")
    )
    return len(failures) + len(unseen)


if __name__ == "__main__":
    sys.exit(main())
