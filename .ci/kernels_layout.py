"""The layout from which Hugging Face's `kernels` loads w2s_fast: a build variant of torch's stable ABI, from a wheel.

    python .ci/kernels_layout.py WHEEL FOLDER     writes FOLDER/build/torch-stable-abi211-cpu-x86_64-linux
    python .ci/kernels_layout.py --check FOLDER   with kernels, kernel-abi-check and torch: loads it, calls an op
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path

#: what imports the package beside it: its operators have one name in a process, so a copy that is there already serves
ENTRY = '''"""Fused kernels for weak-to-strong, efficient and robust training; see `w2s_fast`."""

import sys
from pathlib import Path

_place = str(Path(__file__).parent / "package")
sys.path.insert(0, _place)
try:
    import w2s_fast
finally:
    sys.path.remove(_place)
__version__ = w2s_fast.__version__
__all__ = list(w2s_fast.__all__)
globals().update({name: getattr(w2s_fast, name) for name in __all__})
'''


def write(wheel: Path, folder: Path) -> None:
    """The variant of an abi3 wheel."""
    variant = folder / "build" / f"torch-stable-abi211-cpu-{platform.machine()}-linux"
    shutil.rmtree(variant, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(variant / "package")
    assert list(variant.glob("package/w2s_fast/*.abi3.so")), f"{wheel} has no compiled kernels"
    text = next(variant.glob("package/*.dist-info/METADATA")).read_text(encoding="utf-8")
    version = re.search(r"^Version: (\S+)", text, re.M)
    assert version is not None
    (variant / "__init__.py").write_text(ENTRY, encoding="utf-8")
    metadata = {
        "id": f"_w2s_fast_cpu_{hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]}", "name": "w2s-fast",
        "version": int(version[1].split(".")[0]), "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cpu"},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    print(variant)


def check(folder: Path) -> None:
    """Raises where the ABI is not the one that `kernels` asks for, or the kernel does not load and compute."""
    import kernel_abi_check
    import torch

    from kernels import get_local_kernel

    (binary,) = folder.glob("build/*/package/w2s_fast/*.abi3.so")
    file = kernel_abi_check.ObjectFile(binary)
    tags = next(folder.glob("build/*/package/*.dist-info/WHEEL")).read_text(encoding="utf-8")
    # the hub's own builds are of manylinux_2_28; a wheel is of what the machine that built it has
    platforms = re.findall(r"^Tag: .*-(manylinux_\d+_\d+)_", tags, re.M)
    assert platforms, f"no manylinux tag: {tags}"
    violations = [*file.check_python_abi("3.10"), *file.check_manylinux(min(platforms))]
    assert not violations, violations
    kernel = get_local_kernel(folder)
    base, expert, anti = torch.randn(3, 2, 500).unbind()
    with kernel.backend("cpp"):
        torch.testing.assert_close(kernel.fuse_logits(base, [expert], anti, 0.5), base + 0.5 * (expert - anti))
    assert Path(sys.modules["w2s_fast"].__file__ or "").is_relative_to(folder), "another copy was imported"
    print(f"kernels: {binary.name} is Python 3.10's ABI and {min(platforms)}, loaded and computed")


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(Path(sys.argv[2]).resolve())
    else:
        write(Path(sys.argv[1]), Path(sys.argv[2]))
