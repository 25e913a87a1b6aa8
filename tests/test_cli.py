# SPDX-License-Identifier: Apache-2.0
"""The command line: which errors are one line, and what is refused before any work."""

import errno
import os
import signal
from types import SimpleNamespace

import pytest

from vllm_rsparse import cli
from vllm_rsparse.arguments import writing
from vllm_rsparse.errors import ArtifactError, SettingError

MISSING = FileNotFoundError(errno.ENOENT, "No such file or directory", "/no/file")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def failing(monkeypatch):
    """Call with an exception: the subcommand ``inspect`` then raises it."""

    def fail(error):
        def run(args):
            raise error

        module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
        monkeypatch.setattr("importlib.import_module", lambda name: module)

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ArtifactError("DIR: damaged"), "DIR: damaged"),
        (MISSING, "[Errno 2] No such file or directory: '/no/file'"),
        (FULL, "[Errno 28] No space left on device"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(failing, capsys, error, message):
    failing(error)
    assert cli.main(["inspect"]) == 1
    assert capsys.readouterr().err == f"vllm-rsparse inspect: error: {message}\n"
    with pytest.raises(type(error)):
        cli.main(["--debug", "inspect"])


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not enough values to unpack"),
        KeyError("q_proj"),
        # Libraries raise OSError for what is no failed system call.
        OSError("cannot load the tokenizer"),
    ],
)
def test_a_bug_shows_its_traceback(failing, error):
    failing(error)
    with pytest.raises(type(error)) as caught:
        cli.main(["inspect"])
    assert caught.value is error


def test_an_interrupt_is_one_line(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["inspect"]) == 130
    assert capsys.readouterr().err == "vllm-rsparse inspect: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_whatever_a_library_makes_of_it(
    number, monkeypatch, capsys
):
    def run(args):
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except BaseException:
            raise RuntimeError("cannot be loaded") from None

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    before = signal.getsignal(number)
    assert cli.main(["inspect"]) == 128 + number
    assert capsys.readouterr().err == "vllm-rsparse inspect: interrupted\n"
    assert signal.getsignal(number) is before


def test_every_subcommand_is_the_command_of_its_package():
    for module, _ in cli.COMMANDS.values():
        assert module.startswith("vllm_rsparse.")
        assert module.endswith(".command")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["evaluate", "DIR", "--data", "FILE"], "--json"),
        (["evaluate", "DIR", "--data", "FILE"], "--plot"),
        (["inspect", "DIR"], "--plot"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(
    arguments, option, tmp_path, capsys
):
    folder = tmp_path / "none"
    for path, problem in (
        (folder / "out.png", f"there is no folder {folder}; make it, or"),
        (tmp_path, "is a folder; give the name of a file in it"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*arguments, option, str(path)])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert f"error: argument {option}: {path}: {problem}" in error


def test_a_file_that_turns_out_unwritable_is_named_with_its_option(tmp_path):
    path = tmp_path / "out.json"
    message = rf"^--json {path}: cannot be written \(\[Errno 28\] No space.*free space"
    with (
        pytest.raises(SettingError, match=message) as caught,
        writing(f"--json {path}"),
    ):
        raise FULL
    assert caught.value.__cause__ is FULL


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["evaluate", "D", "--data", "a", "--data", "b"], "--data"),
        (
            ["evaluate", "D", "--data", "a", "--window", "1", "--window", "2"],
            "--window",
        ),
        (["prepare", "M", "O", "--sparsity", "0.3", "--sparsity", "0.4"], "--sparsity"),
        (["bench", "--n", "8", "--n", "16", "--k", "8"], "--n"),
    ],
)
def test_an_option_that_is_given_twice_is_refused(arguments, option, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    several = "" if option == "--window" else ", with all its values"
    assert f"argument {option}: is given twice; give it once{several}\n" in error
