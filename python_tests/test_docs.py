"""The documents: their Python runs, and the site is built from them without a warning and shows it all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import processes
import pytest
import tiny_models as tiny
import torch
from helpers import code_fences, documented_code
from source_tree import ROOT, project_files, relative

import ttt_kernels as ttt
from ttt_kernels.testing import make_inputs

DOCUMENTS = [relative(p) for p in project_files() if p.suffix == ".md"]
LANGUAGES = {"bash", "cpp", "python", "text"}  # another name for Python would hide it from the tests


# --- snippets -------------------------------------------------------------------------------------
def readme_names() -> dict:
    """What README's blocks are about: a model deep enough for the recipe, and the tensors of a layer."""
    data = make_inputs(1, 2100, 16, 24)
    model = tiny.build("qwen3", hidden_size=16, intermediate_size=24, num_hidden_layers=28)
    ids = tiny.ids(1, 10)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**vars(data), "model": model, "inputs": inputs}


def parallel_names() -> dict:
    """One rank of one, with all the tokens; test_tensor_parallel.py runs the page on more."""
    data = make_inputs(1, 24, 24, 40)
    model = tiny.build("llama", num_hidden_layers=3)
    positions, mine = torch.arange(24)[None], slice(0, 24)
    return {**vars(data), "model": model, "ids": tiny.ids(2, 24), "positions": positions, "mine": mine}


GIVEN = {"README.md": readme_names, "docs/parallel.md": parallel_names}
NEEDS = {"docs/stability.md": ["matplotlib"], "docs/stacks.md": ["accelerate", "peft"]}


def run_document(document: str, folder: Path) -> None:
    os.chdir(folder)
    torch.manual_seed(0)
    names = GIVEN.get(document, dict)()
    for block in documented_code(document):
        exec(block, names)


def run_in_group(rank: int, world_size: int, document: str, folder: Path) -> None:
    run_document(document, folder)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if documented_code(d)])
def test_code_runs(document, tmp_path, monkeypatch):
    """All blocks of a document, in order, in one namespace; in a process with a group of one where they
    are about several processes."""
    for module in ["transformers", *NEEDS.get(document, [])]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)  # and back
    if any("torch.distributed" in fence.code for fence in code_fences(document)):
        processes.run(run_in_group, 1, document, tmp_path)
    else:
        run_document(document, tmp_path)


def test_every_fence_is_run_or_says_why_not():
    assert {"README.md", "docs/models.md", "docs/stacks.md"} <= {d for d in DOCUMENTS if documented_code(d)}
    for document in DOCUMENTS:
        fences = code_fences(document)
        text = (ROOT / document).read_text(encoding="utf-8")
        assert len(re.findall(r"^\s*(?:```|~~~)", text, re.M)) == 2 * len(fences), document
        assert {fence.language for fence in fences} <= LANGUAGES, document
        excuses = len(re.findall(r"^\s*<!-- *not run", text, re.M))
        assert excuses == sum(bool(fence.excuse) for fence in fences), f"{document}: an excuse alone"


def test_a_failing_block_is_named_by_its_line(tmp_path):
    page = tmp_path / "page.md"
    text = "# Title\n\n```python\na = 1\nassert a == 2\n```\n"
    page.write_text(text + "<!-- not run: no -->\n```python\n1 / 0\n```\n")
    (block,) = documented_code(page)
    with pytest.raises(AssertionError) as error:
        exec(block, {})
    assert error.traceback[-1].lineno + 1 == 5 and error.traceback[-1].path == page


# --- the site -------------------------------------------------------------------------------------
def build(root: Path, target: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "-f", str(root / "mkdocs.yml"), "-d", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    target = tmp_path_factory.mktemp("site")
    answer = build(ROOT, target)
    assert answer.returncode == 0, answer.stderr
    return target


def pages(site: Path) -> dict[str, str]:
    """Everything that was made from a page, by its path in docs/."""
    sources = sorted((ROOT / "docs").rglob("*.md"))
    names = [source.relative_to(ROOT / "docs").as_posix() for source in sources]
    return {n: (site / n).with_suffix(".html").read_text(encoding="utf-8") for n in names}


def test_every_public_name_is_documented(site):
    shown = "".join(html for name, html in pages(site).items() if name.startswith("api/"))
    names = set(ttt.__all__) - {"distributed", "testing", "__version__"}
    names |= {f"{m}.{name}" for m in ("distributed", "testing") for name in getattr(ttt, m).__all__}
    missing = [name for name in sorted(names) if f'id="ttt_kernels.{name}"' not in shown]
    assert len(names) > 30 and not missing


def test_docstrings_keep_their_sections(site):
    html = pages(site)["api/ops.md"]
    scan = html[html.index('id="ttt_kernels.fast_weight_scan"') : html.index('id="targets"')]
    for title in ("Returns", "Precision", "Determinism", "Cost", "Limits", "Source"):
        assert f"<dt>{title}</dt>" in scan, title
    for title in ("Parameters:", "Raises:"):
        assert scan.count(title) == 1, title
    assert scan.count('class="doc-md-description"') == 13  # ten parameters, three exceptions


class Text(HTMLParser):
    """What is shown, with a mark in the place of code and in front of each cell; and the code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.depth, self.prose, self.code = 0, "", []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.depth += tag in ("code", "pre", "script", "style")
        self.prose += "\0" * (tag in ("td", "th"))

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        self.prose += "\0" if self.depth else data
        self.code += [data] * bool(self.depth)


MARKUP = re.compile(
    r"```|~~~|\|\s*:?---|^\s*\| .*\|\s*$|^\s*(?:[-*]|\d+\.) \S|^\s*#+ |`|\*\*|\]\(|^::: |<!--"
)


def left_over(html: str) -> list[str]:
    """Markdown that is shown instead of rendered. Lists and tables that lack an empty line before them
    look right on GitHub, and not here."""
    text = Text(html)
    sections = re.findall(r"<p>(?:Cost|Determinism|Limits|Precision|Returns|Source): .*", html)
    lines = [line for line in text.prose.splitlines() if MARKUP.search(line)]
    return lines + sections + [code for code in text.code if r"\|" in code]


def test_everything_is_rendered(site):
    complaints = {name: left_over(html) for name, html in pages(site).items()}
    assert len(complaints) > 15 and not any(complaints.values()), complaints


@pytest.mark.parametrize(
    "html",
    ["<p>so:\n- one\n- two</p>", "<p>x\n| a | b |\n|---|---|</p>", "<p>```python</p>", "<p>Cost: 2 D F</p>",
     "<p>see [it](there.md)</p>", "<p>**bold</p>", r"<td><code>\|\|w\|\|</code></td>", "<p>1. first</p>"],
)  # fmt: skip
def test_markup_is_noticed(html):
    assert left_over(html) and not left_over("<p>a - b, |x|</p><pre>| a |\n```</pre><li>Cost is 1</li>")


def test_nothing_is_fetched_by_a_reader(site):
    """A link may lead elsewhere; a script, a style or an image is the site's own."""
    foreign = re.compile(r'<(?:script|img|iframe)[^>]+src="?(?:https?:)?//|<link[^>]+href="?(?:https?:)?//')
    assert foreign.search('<link rel="stylesheet" href="https://x.org/a.css">')
    assert not any(foreign.search(html) for html in pages(site).values())


def test_names_become_links(site):
    html = pages(site)["models.md"]
    assert re.search(r'<a[^>]+href="checkpoints.html"[^>]*><code>docs/checkpoints.md</code></a>', html)
    assert re.search(r'href="api/models.html#ttt_kernels.TTTConfig"><code>TTTConfig</code></a>', html)


def test_a_flaw_ends_the_build(tmp_path):
    pytest.importorskip("mkdocs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "ttt_kernels").symlink_to(ROOT / "ttt_kernels")
    (tmp_path / "docs" / "new.md").write_text("[a](nowhere.md), [b](method.md#nowhere), `docs/nowhere.md`\n")
    answer = build(tmp_path, tmp_path / "site")
    assert answer.returncode != 0
    flaws = (
        'not included in the "nav"',
        "link 'nowhere.md', but the target is not found",
        "does not contain an anchor '#nowhere'",
        "names docs/nowhere.md, which is not a page",
    )
    assert not [flaw for flaw in flaws if flaw not in answer.stderr], answer.stderr
