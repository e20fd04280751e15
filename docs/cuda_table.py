"""Write the tables of docs/cuda.md from the compiled library that is installed.

    python docs/cuda_table.py          # needs g++, c++filt and the disassembler (in the triton package)
"""

from __future__ import annotations

from pathlib import Path

from ttt_kernels import _extension
from ttt_kernels.cli.documents import fill, markdown_head, markdown_row
from ttt_kernels.testing import cuda_compiled

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"


def tables() -> str:
    """Of every compiled image; the first line names the compiler."""
    module = _extension.load()
    images = cuda_compiled.read_library(Path(module.__file__), cuda_compiled.storage_bytes(ROOT / "csrc"))
    lines = [f"Compiled by the nvcc of CUDA {module.cuda_runtime_version()}."]
    for image, reports in images.items():
        rows = map(markdown_row, cuda_compiled.table(reports))
        lines += ["", f"### {image}", "", *markdown_head(cuda_compiled.COLUMNS), *rows]
    return "\n".join(lines)


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(fill(text, BEGIN, END, str(DOCUMENT), tables()), encoding="utf-8")
