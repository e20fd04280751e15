"""`python -m ttt_kernels`: exit codes and messages."""

import subprocess
import sys

import pytest

from ttt_kernels import __version__
from ttt_kernels.cli import errors
from ttt_kernels.cli.main import main


def fails(capsys, *arguments: str) -> str:
    """Standard error of a call that must end with exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def test_module_runs_in_a_process_of_its_own():
    command = [sys.executable, "-m", "ttt_kernels", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize("command", ["info", "demo", "generate", "bench", "kernels", "verify"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"python -m ttt_kernels {command}" in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert __version__ in shown and "torch" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["fly"], ["invalid choice", "fly"]),
        (["bench", "--op", "scam"], ["--op", "scam", "scan"]),
        (["bench", "--shape", "gpt-2"], ["--shape", "gpt-2", "qwen3-0.6b"]),
        (["bench", "--impl", "tritn"], ["--impl", "tritn", "eager"]),
        (["bench", "--suite", "fundation"], ["--suite", "fundation", "foundation"]),
        (["bench", "--chunk-size", "0"], ["--chunk-size", ">= 1", "0"]),
        (["bench", "--repeats", "many"], ["--repeats", "many"]),
        (["bench", "--device", "tpu"], ["--device", "tpu", "cpu or cuda"]),
        (["bench", "--suite", "foundation", "--T", "64"], ["--suite foundation", "--T"]),
        (["bench", "--op", "conv_target", "--preserve-row-norm"], ["--preserve-row-norm", "conv"]),
        (["demo", "--chunk-size", "64", "--window", "32"], ["--chunk-size", "32", "64"]),
        (["demo", "--chunk-size", "1", "--window", "1"], ["--window", "at least 2"]),
        (["demo", "--lr", "nan"], ["--lr", "finite", "nan"]),
        (["demo", "--inner-optimizer", "adam"], ["--inner-optimizer", "adam", "specnorm"]),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    shown = fails(capsys, *arguments)
    assert all(word in shown for word in words), shown


def test_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    for command in ("demo", "bench"):
        assert f"pip install 'ttt_kernels[{command}]'" in fails(capsys, command)


def test_require_does_not_hide_a_broken_package(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import surely_absent_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="surely_absent_dependency"):
        errors.require("half_installed", "demo")
