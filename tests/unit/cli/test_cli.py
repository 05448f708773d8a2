"""The command line: how arguments are read, what help says, and the configs to start from."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field

from raytower.cli import main
from raytower.cli.arguments import read_arguments
from raytower.cli.keys import keys_of
from raytower.cli.starting import starting_config
from raytower.commands import COMMANDS, find_reference
from raytower.config import ByteSize, Config, load_config, make_config
from raytower.errors import InputError
from raytower.examples import EXAMPLES

ROOT = Path(__file__).resolve().parents[3]


class Source(Config):
    shorthand = "path"

    path: str
    """Where the rows are."""
    split: str | None = None


class Squared(Config):
    name: Literal["squared"] = "squared"
    margin: float = Field(default=0.5, ge=0)


class Ranked(Config):
    name: Literal["ranked"] = "ranked"
    depth: int = 3


class Example(Config):
    text: str
    source: Source | None = None
    loss: Squared | Ranked = Squared()
    k: list[int] = Field(default=[10])
    names: list[str] = Field(default_factory=list)
    values: dict[str, Any] = Field(default_factory=dict)
    where: dict[str, Any] | str | None = None
    max_length: int | None = Field(default=None, ge=1)
    memory: ByteSize = ByteSize(2**30)
    full: bool = False
    rescore: Literal["auto"] | bool = "auto"


def read(*given: str) -> Example:
    arguments = read_arguments(Example, ("text",), given)
    return make_config(Example, arguments.overrides)


class TestArguments:
    @pytest.mark.parametrize(
        ("given", "key", "value"),
        [
            (["--k", "5"], "k", [5]),
            (["--k=5", "--k", "7"], "k", [5, 7]),
            (["--k", "[5, 7]"], "k", [5, 7]),
            (["--k", "5,7"], "k", [5, 7]),
            (["--names", '["a, b", "c"]'], "names", ["a, b", "c"]),
            (["--names", r'["a\u4f60", "b\\c", "d\"e", "f\tg"]'], "names", ["a你", "b\\c", 'd"e', "f\tg"]),
            (["--names", 'x"y', "--names", " a,b"], "names", ['x"y', " a,b"]),
            (["--values", r'{"a": "x\\"}'], "values", {"a": "x\\"}),
            (["--where", "id IN ('a,b') AND x >= 2"], "where", "id IN ('a,b') AND x >= 2"),
            (["--where", '{"a": 1} x'], "where", '{"a": 1} x'),
            (["--loss", "ranked"], "loss", Ranked()),
            (["--max-length", "8"], "max_length", 8),
            (["--max_length=8"], "max_length", 8),
            (["--max-length", "null"], "max_length", None),
            (["--memory", "3GiB"], "memory", 3 * 2**30),
            (["--source", "a.tsv"], "source", Source(path="a.tsv")),
            (["--source", '{"path": "a.tsv", "split": "dev"}'], "source", Source(path="a.tsv", split="dev")),
            (["--source", "a.tsv", "--source.split", "dev"], "source", Source(path="a.tsv", split="dev")),
            (["--source", "null"], "source", None),
            (["--source.path", "null"], "source", Source(path="null")),
            (["--values", '{"a": 1, "b": [true, null]}'], "values", {"a": 1, "b": [True, None]}),
            (["--where", '{"year": {"$gte": 2020}}'], "where", {"year": {"$gte": 2020}}),
            (["--where", "year = 3"], "where", "year = 3"),
            (["--where=a = 1, b = 2"], "where", "a = 1, b = 2"),
            (["--where", "null"], "where", None),
            (["--where", "year > 3 AND name IN ('a', 'b')"], "where", "year > 3 AND name IN ('a', 'b')"),
            (["--full"], "full", True),
            (["--full", "false"], "full", False),
            (["--full=true"], "full", True),
            (["--full", "True"], "full", True),
            (["--full", "No"], "full", False),
            (["--full=0"], "full", False),
            (["--no-full"], "full", False),
            (["--rescore", "false"], "rescore", False),
            (["--loss", "ranked", "--loss.depth", "2"], "loss", Ranked(depth=2)),
            (["--loss.name", "squared", "--loss.margin", "1e-5"], "loss", Squared(margin=1e-5)),
            (["--loss.margin=-0"], "loss", Squared(margin=0)),
        ],
        ids=str,
    )
    def test_what_is_written_is_what_is_meant(self, given: list[str], key: str, value: object) -> None:
        assert getattr(read("--text", "x", *given), key) == value

    @pytest.mark.parametrize(
        "text",
        [
            "123",
            "yes",
            "what is: this",
            "[x",
            '{"a": 1}',
            '"quoted"',
            "null",
            "",
            "-",
            "-5 degrees",
            "a,b",
            "\0",
        ],
    )
    def test_plain_text_stays_as_it_was_typed(self, text: str) -> None:
        assert read("--text", text).text == text
        assert read(f"--text={text}").text == text

    def test_two_dashes_are_a_text_too(self) -> None:
        assert read("--text=--").text == "--"

    def test_flags_take_dashes_and_underscores(self) -> None:
        for flag in ("--dry-run", "--dry_run"):
            assert read_arguments(Example, ("text",), ["x", flag]).dry_run

    def test_a_position_stands_beside_other_keys_of_its_section(self) -> None:
        config_class = find_reference(COMMANDS["index sync"].config)
        for given in (["i", "d.tsv", "--input.format", "tsv"], ["i", '{"path": "d.tsv", "format": "tsv"}']):
            said = read_arguments(config_class, ("index", "input"), given).overrides
            config = make_config(config_class, said)
            assert (config.input.path, config.input.format) == ("d.tsv", "tsv")

    def test_a_list_of_texts_takes_several_arguments_where_no_position_is_meant(self) -> None:
        config_class = find_reference(COMMANDS["evaluate"].config)
        given = ["--compare", "a", "b", "--k", "1,5", "--compare=c", "--metrics", "nDCG@10,AP"]
        config = make_config(config_class, read_arguments(config_class, (), given).overrides)
        assert (config.compare, config.k) == (["a", "b", "c"], [1, 5])
        assert config.metrics == ["nDCG@10", "AP"]
        # Where a position is meant, the next argument is it.
        assert read("--names", "a", "x").text == "x"

    def test_positions_stand_anywhere(self) -> None:
        assert read("x", "--k", "5").text == read("--k", "5", "x").text == read("--full", "x").text == "x"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--textt", "x"], "unknown key 'textt'; the nearest known key is 'text'"),
            (["--textt=x"], "nearest known key is 'text'"),
            (["--source.pth", "x"], "nearest known key is 'source.path'"),
            (["--zzzz", "x"], "unknown key 'zzzz'; known are text, "),
            (["--values.a", "1"], "values is one value; a mapping is given whole"),
            (["--text"], "--text has no value; write --text VALUE"),
            (["--text", "--k", "3"], "--text has no value"),
            (["--config"], "--config has no value"),
            (["x", "y"], "unexpected argument 'y'"),
            (["x", "--text", "y"], "text is given by position and by name"),
            (["--text", "x", "--names", "[a"], "which is no JSON list"),
            (["--text", "x", "--values", "{a"], "values is '{a'; it must be a mapping"),
            (["--text", "x", "--k", "five"], r"k\.0 is 'five'"),
            (["--tex", "x"], "nearest known key is 'text'"),
            (["--text", "x", "--text", "y"], "text is given twice; give it once"),
            (["x", "--full", "--no-full"], "full is given twice"),
            (["x", "--source", "a", "--source.path=b"], "source.path is given twice"),
            (["x", "--config", "a.yaml", "--config=b.yaml"], "--config is given twice; give one file"),
            (["x", "--values", '{"a": 1, "b": {"c": 1, "c": 2}}'], "key 'c' stands twice in a mapping"),
        ],
        ids=str,
    )
    def test_what_cannot_be_meant_is_refused(self, given: list[str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            read(*given)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["search", "i", "x", "--rerank_k", "5"], "'rerank_k': it is called 'recall_k' now"),
            (["search", "i", "x", "--compute.dtype=float16"], "'compute.dtype': it is called 'dtype' now"),
            (["index", "compact", "i", "--memory", "4GiB"], "'memory': it is called 'target.memory' now"),
        ],
        ids=str,
    )
    def test_a_key_of_before_is_refused_with_its_name_of_now(
        self, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(given) == 2
        assert message in capsys.readouterr().err

    def test_an_alias_is_its_key(self) -> None:
        given = [
            "--encoder",
            "e",
            "--input",
            "i",
            "--output",
            "o",
            "--workers.max",
            "3",
            "--workers.num_cpus=2",
        ]
        config_class = find_reference(COMMANDS["encode"].config)
        config = load_config(config_class, None, read_arguments(config_class, (), given).overrides)
        assert (config.workers.num, config.workers.num_cpus) == (3, 2)

    def test_a_file_lies_below_the_command_line(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text(
            "text: x\nsource: a.tsv\nvalues: {a: 1}\nk: [1, 2]\n", encoding="utf-8"
        )
        given = [
            "--config",
            str(tmp_path / "c.yaml"),
            "--source.split",
            "dev",
            "--values",
            '{"b": 2}',
            "--k",
            "3",
        ]
        arguments = read_arguments(Example, (), given)
        config = load_config(Example, arguments.config_path, arguments.overrides)
        assert config.source == Source(path="a.tsv", split="dev")
        assert (config.values, config.k) == ({"b": 2}, [3])

    @pytest.mark.parametrize(
        ("file", "above", "message"),
        [
            ("text: x\nk: [1]\n", {"max_length": "0"}, "the command line: max_length is '0'"),
            ("text: x\nmax_length: 0\n", {"k": ["1"]}, "FILE: max_length is 0"),
            ("text: x\n", {"sorce": "a"}, "the command line: unknown key 'sorce'"),
            ("txt: x\n", {"k": ["1"]}, "FILE: unknown key 'txt'"),
            ("loss: ranked\n", {"loss.depth": "1"}, "FILE: text is required"),
            ("text: x\nsource: {split: a}\n", {"source.split": "b"}, "FILE: source.path is required"),
        ],
    )
    def test_the_blame_goes_to_who_gave_the_value(
        self, file: str, above: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "c.yaml").write_text(file)
        with pytest.raises(InputError) as raised:
            load_config(Example, tmp_path / "c.yaml", above)
        assert str(raised.value).startswith(message.replace("FILE", f"config file '{tmp_path / 'c.yaml'}'"))

    @pytest.mark.parametrize("below", ["ranked", {"name": "ranked", "depth": 9}])
    def test_what_a_file_chose_stays_chosen(self, below: object, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"text": "x", "loss": below}))
        assert load_config(Example, tmp_path / "c.yaml", {"loss.depth": "4"}).loss == Ranked(depth=4)
        # Another choice begins with its own defaults.
        assert load_config(Example, tmp_path / "c.yaml", {"loss.name": "squared"}).loss == Squared()

    def test_a_config_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_bytes("text: 中文".encode("gbk"))
        with pytest.raises(InputError, match="not UTF-8"):
            load_config(Example, tmp_path / "c.yaml")


class TestHelp:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_key_has_a_meaning(self, name: str) -> None:
        keys = list(keys_of(find_reference(COMMANDS[name].config)))
        assert [key.path for key in keys if not key.meaning] == []

    @pytest.mark.parametrize("name", COMMANDS)
    def test_the_example_of_a_command_is_one(self, name: str) -> None:
        command = COMMANDS[name]
        given = shlex.split(command.example.replace("jobs/", f"{ROOT}/jobs/"))
        given = find_reference(command.part)(given) if command.part else given
        arguments = read_arguments(find_reference(command.config), command.positions, given)
        assert load_config(find_reference(command.config), arguments.config_path, arguments.overrides)

    def test_help_shows_type_choices_unit_and_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["index", "build", "--help"]) == 0
        out = capsys.readouterr().out
        assert "--target.memory SIZE  (default 8GiB)" in out
        assert "--kind auto|flat|hnsw|ivf_flat|ivf_rabitq|ivf_sq8|ivf_pq  (default auto)" in out
        assert "--embeddings TEXT  (required)" in out
        assert "example: raytower index build --embeddings" in out

    def test_a_group_lists_its_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["index", "--help"]) == 0
        out = capsys.readouterr().out
        assert "raytower index build" in out
        assert "raytower search" not in out
        assert main(["index"]) == 2

    @pytest.mark.parametrize(
        ("given", "nearest"),
        [(["serv"], "serve"), (["index", "bild"], "index build"), (["train_retriever"], "train-retriever")],
    )
    def test_the_nearest_command_is_named(
        self, given: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(given) == 2
        assert f"did you mean {nearest!r}?" in capsys.readouterr().err

    @pytest.mark.parametrize("shell", ["bash", "zsh"])
    def test_completion_is_a_script_that_the_shell_reads(
        self, shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "--target.recall" in script
        assert "--embeddings" in script
        if shell == "bash":
            (tmp_path / "completion").write_text(script, encoding="utf-8")
            subprocess.run(["bash", "-n", str(tmp_path / "completion")], check=True)

    def test_completion_offers_commands_and_choices(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert main(["completion", "bash"]) == 0
        asked = {
            "config": {"encode", "index", "search"},
            "config index": {"build", "sync"},
            "completion": {"bash", "zsh"},
            "train-retriever --objective": {
                "simcse",
                "margin_mse",
                "cosent",
                "angle",
                "embedding_distillation",
            },
            "train-reranker --objective": {"rank_net", "lambda_loss"},
            "index compact --kind": {"hnsw", "null"},
        }
        script = capsys.readouterr().out + "".join(
            f'COMP_WORDS=(raytower {words} ""); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); COMPREPLY=()\n'
            '_shtab_raytower; echo "${COMPREPLY[@]}"\n'
            for words in asked
        )
        done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
        for line, expected in zip(done.stdout.splitlines(), asked.values(), strict=True):
            assert expected <= set(line.split())

    @pytest.mark.parametrize("name", ["config", "completion"])
    def test_commands_about_commands_have_help(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        for given in ([name, "--help"], [name, "-h"], ["help", name]):
            assert main(given) == 0
            assert f"raytower {name} {'COMMAND' if name == 'config' else 'SHELL'}" in capsys.readouterr().out

    def test_who_reads_may_stop_reading(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
        command = f"{sys.executable} -m raytower.cli completion bash"
        done = subprocess.run(
            ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert (done.returncode, done.stderr) == (141, "")

    def test_completion_of_another_shell_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["completion", "dos"]) == 2
        assert "bash" in capsys.readouterr().err


class TestOutput:
    def test_a_closed_output_is_said_before_any_work(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
        assert main(["search", "/no/such", "x"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("raytower: standard output is closed; ")
        assert err.count("\n") == 1

    @pytest.mark.parametrize("given", [["--version"], ["--help"], ["config", "encode"], ["search", "--help"]])
    @pytest.mark.parametrize("is_line_buffered", [True, False])
    def test_an_output_without_space_is_said(
        self,
        given: list[str],
        is_line_buffered: bool,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with open("/dev/full", "w", buffering=1 if is_line_buffered else -1) as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert main(given) == 1
        err = capsys.readouterr().err
        assert err.startswith("raytower: standard output cannot be written: No space left on device; ")
        assert err.count("\n") == 1

    def test_closed_messages_stop_nothing(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stderr", None)
        assert main(["config", "encode"]) == 0
        sys.stderr.close()  # opened in its place

    def test_messages_cannot_move_the_cursor(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["search", "/no/such/\x1b[2J\u202e", "x"]) == 2
        err = capsys.readouterr().err
        assert "\x1b" not in err
        assert "\\x1b[2J\\u202e" in err


class TestStartingConfigs:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_it_holds_the_example(self, name: str) -> None:
        assert yaml.safe_load(starting_config(name)) == json.loads(json.dumps(EXAMPLES[name].values))

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_key_that_is_commented_out_can_be_switched_on(self, name: str) -> None:
        config_class = find_reference(COMMANDS[name].config)
        names = {key.name for key in keys_of(config_class)}
        lines = []
        for line in starting_config(name).splitlines():
            off = re.fullmatch(r"((?:  )*)# ((?:  )*)(\w+):(.*)", line)
            if off is None or off[3] not in names:
                lines.append(line)
                continue
            value = yaml.safe_load(off[4])  # a default is one YAML value
            lines.append(f"{off[1]}{off[2]}{off[3]}:{' ' + json.dumps(value) if off[4] else ''}")
        switched_on = yaml.safe_load("\n".join(lines))
        assert set(switched_on) == set(config_class.model_fields)
        for key in keys_of(config_class):
            if key.chosen_by is None:
                where = switched_on
                for part in key.path.split("."):
                    assert part in where, key.path
                    where = where[part]

    @pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
    def test_the_configs_beside_the_jobs_are_these(self, path: Path) -> None:
        match = re.search(r'run_command\("([^"]+)"', path.with_suffix(".py").read_text(encoding="utf-8"))
        assert match is not None
        assert path.read_text(encoding="utf-8") == starting_config(match.group(1))

    def test_an_unknown_command_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["config", "encod"]) == 2
        assert "there are" in capsys.readouterr().err
