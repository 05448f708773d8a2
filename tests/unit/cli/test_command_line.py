"""The command line as a user starts it, bad inputs included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytower.cli import COMMANDS, main
from tests.support.processes import run_cli


class TestCommandLine:
    def test_help_lists_every_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        told = capsys.readouterr().out
        assert all(f"raytower {name}" in told for name in COMMANDS)

    def test_help_of_a_command_lists_its_keys(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["encode", "--help"]) == 0
        told = capsys.readouterr().out
        assert "--dtype float32|" in told
        assert "--encoder TEXT  (required)" in told

    def test_dry_run_prints_config_and_plan_and_writes_nothing(
        self, dummy_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "corpus.txt").write_text("a\nb\nc\n")
        arguments = ["--encoder", str(dummy_encoder_dir), "--input.path", str(tmp_path / "corpus.txt")]
        arguments += ["--output", str(tmp_path / "out"), "--max_length", "64", "--dry-run"]
        assert main(["encode", *arguments]) == 0
        told = capsys.readouterr().out
        assert "tokens_per_batch: null" in told
        assert json.loads(told.splitlines()[-1])["plan"]["rows"] == 3
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("encode", "--config", "nothing.yaml"), "cannot be read"),
            (("encode", "--encodr", "x"), "nearest known key is 'encoder'"),
            (("encode",), "is required and not given"),
            (("encode", "--encoder", "/no/such", "--input.path", "x", "--output", "y"), "does not exist"),
            (("search", "--index", "/no/such", "--query", "x"), "/no/such"),
            (("search", "--index", "/no/such", "--query", "x", "--k", "0"), "k"),
        ],
    )
    def test_bad_input_is_code_2_and_one_message(
        self,
        arguments: tuple[str, ...],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        assert message in err
        assert "Traceback" not in err
        assert out == ""

    def test_an_empty_name_of_a_config_file_is_not_passed_over(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["encode", "--config", ""]) == 2
        assert capsys.readouterr().err.startswith("raytower: config file '': cannot be read")

    def test_the_code_is_the_process_s_exit_code(self, tmp_path: Path) -> None:
        done = run_cli("enode", cwd=tmp_path)
        assert done.returncode == 2
        assert "no command 'enode'" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "corpus.txt"), (b"", "empty"), (b"fine\n\xff\xfe\n", "UTF-8"), (b"a\tb\tc\n", "column")],
        ids=["missing", "empty", "not UTF-8", "columns"],
    )
    def test_bad_corpora(
        self,
        dummy_encoder_dir: Path,
        tmp_path: Path,
        content: bytes | None,
        message: str,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        path = tmp_path / "corpus.txt"
        if content is not None:
            path = path.with_suffix(".tsv") if b"\t" in content else path
            path.write_bytes(content)
        arguments = ["--encoder", str(dummy_encoder_dir), "--input.path", str(path), "--max_length", "64"]
        capfd.readouterr()  # of what made the model
        assert main(["encode", *arguments, "--output", str(tmp_path / "out"), "--dry-run"]) == 2
        _, err = capfd.readouterr()
        assert message in err
        assert "Traceback" not in err
