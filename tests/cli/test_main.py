"""Commands, help, spelling of options, completion and plain output."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import featkd
from featkd.cli import bench
from featkd.cli.arguments import Parser
from featkd.cli.main import COMMANDS, main
from featkd.cli.recipe_arguments import parse_recipe
from featkd.ops import extension
from featkd.train.recipe import Recipe
from tests.test_docs import fields_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    others = [name for name in COMMANDS if name != "bench"]
    found = {name: import_module(f"featkd.cli.{name}").parser() for name in others}
    return found | {f"bench {name}": parser for name, parser in bench.parsers().items()}


def split(line: str) -> tuple[str, list[str]]:
    """The command of a line that begins with featkd or torchrun, and its arguments."""
    words = shlex.split(line[line.index("featkd ") :])[1:]
    count = 2 if words[0] == "bench" else 1
    return " ".join(words[:count]), words[count:]


def test_help_and_version_load_no_torch():
    code = "import sys; from featkd.cli.main import main; main(['--version']); main(['--help']); "
    code += "print([m for m in ('torch', 'triton', 'jsonargparse') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    own, others, backends, *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]", done.stderr
    assert own == f"featkd {featkd.__version__}"
    version = torch.__version__.partition("+")[0]
    assert re.fullmatch(rf"python 3\S+, torch {version}\S*, triton .+", others)
    assert backends.startswith("backends: reference")
    assert ("csrc" in backends) == extension.LIBRARY.exists()
    assert {f"  {name:8}  {text}" for name, text in COMMANDS.items()} <= {*lines}


def test_no_command(capsys):
    assert main([]) == 2
    assert "distill" in capsys.readouterr().out


@pytest.mark.parametrize("command", [*COMMANDS, *(f"bench {name}" for name in bench.COMMANDS)])
def test_help_ends_with_two_examples(command, capsys):
    if command == "bench":
        assert main(["bench", "--help"]) == 0
    else:
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        assert stop.value.code == 0
    printed, examples = capsys.readouterr().out.split("\nexamples:\n")
    lines = examples.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"  featkd {command}") for line in lines)
    options = re.findall(r"(?<![\w-])--[\w.-]+", printed)
    assert options
    assert not [option for option in options if "_" in option]
    assert not re.search(r"^ *(Args|Returns|Raises|Example)s?:", printed, re.MULTILINE)


def test_examples_of_help_parse(parsers):
    for command, parser in parsers.items():
        for example in parser.examples:
            name, words = split(example)
            assert name == command
            if command in ("distill", "cache", "compare"):
                parse_recipe(parser, words)
            else:
                parser.parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_in_documents_have_known_options(parsers, page):
    text = page.read_text().replace("\\\n", " ")
    commands = "|".join(parsers)
    for line in re.findall(rf"(?:^    .*|`)\b(featkd (?:{commands})\b[^`\n#|>]*)", text, re.M):
        command, words = split(line)
        parsers[command].check_options(words)


def test_every_option_has_one_name(parsers):
    """Commands share names for output, images, batch size, device and figures."""
    files = {"bench plot", "bench table", "bench compare"}
    timed = {"bench loader", "bench step"}
    without = {
        "--out": {"env", "evaluate", "bench compare", *timed},
        "--data": {"demo", "env", "bench run", *files},
        "--batch_size": {"demo", "env", "export", "bench run", *files},
        "--device": {"demo", "env", "export", "bench loader", *files},
        "--json": {"distill", "cache", "compare", "predict", "demo"},
        "--quiet": {"env"},
    }
    for common, commands in without.items():
        found = {name for name, x in parsers.items() if common not in x._option_string_actions}
        assert found == commands, common
    for name in parsers.keys() - without["--data"]:
        assert "  --data DIR  " in parsers[name].format_help(), name


@pytest.mark.parametrize(
    "words",
    [
        ("--data.augment.rand-augment", "null", "--batch-size", "6", "--data", "DIR"),
        ("--data.augment.rand_augment=null", "--batch_size=6", "--data.path=DIR"),
    ],
)
def test_dashes_and_underscores_set_the_same_fields(words, recipe_file, parsers):
    nested = ("--student.options.drop-path-rate", "0.5", "--teacher.options.drop_path_rate", "0.5")
    recipe, options = parse_recipe(
        parsers["distill"], [str(recipe_file), *words, *nested, "--dry-run"]
    )
    assert recipe.batch_size == 6
    assert recipe.data.augment.rand_augment is None
    assert recipe.data.path == "DIR"
    assert recipe.student.options["drop_path_rate"] == 0.5
    assert recipe.teacher.options["drop_path_rate"] == 0.5
    assert options.dry_run


@pytest.mark.parametrize("place", [0, 2, 3, 4, 6])
def test_the_recipe_stands_anywhere_between_the_options(place, recipe_file, parsers):
    words = ["--batch-size", "6", "--dry-run", "--data=DIR", "--teacher.name", "x"]
    words.insert(place, str(recipe_file))
    recipe, options = parse_recipe(parsers["distill"], words)
    assert (recipe.batch_size, recipe.data.path, options.dry_run) == (6, "DIR", True)
    assert (recipe.teacher.name, recipe.student.arch) == ("x", "widelast")  # the file's student


def test_options_of_a_mapping_take_any_key(parsers):
    words = ["--model-options.drop-rate", "0.5", "--model_options.depth=3", "--out", "x"]
    options = parsers["diagnose"].parse_args(words)
    assert options.model_options == {"drop_rate": 0.5, "depth": 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["destill"], "no command 'destill'; did you mean 'distill'?"),
        (["kernels"], "no command 'kernels'"),
        (["--verison"], "no option '--verison'; did you mean '--version'?"),
        (["demo", "--seeds", "x"], "--seeds: expected a whole number; got 'x'"),
        (["demo", "--seed", "1"], "no option '--seed'; did you mean '--seeds'?"),
        (["demo", "--seeds"], "argument --seeds: expected one argument"),
        (["evaluate", "--data", "x"], "name a checkpoint of featkd distill, or a timm model by"),
        (["evaluate", "x.pt"], "--data: expected the folder with the images"),
        (["evaluate", "x.pt", "--data", "x", "--pretrained"], "--pretrained: expected --model"),
        (["evaluate", "x.pt", "--data", "x", "--scores", "knm"], "--scores: expected head, knn,"),
        (["evaluate", "x.pt", "--data", "x", "--images", "0"], "--images: expected >= 1, got 0"),
        (["predict", "x.pt", "--data", "x"], "the following arguments are required: --out"),
        (["predict", "x.pt", "y.pt", "--data", "x", "--out", "z"], "expected one model, got x.pt"),
        (
            ["predict", "x.pt", "--data", "x", "--out", "z", "--features", "f.csv"],
            "--features: expected a file ending in .npy or .safetensors, got f.csv",
        ),
        (["diagnose"], "the following arguments are required: --out"),
        (["diagnose", "--layers", "a", "--out", "x"], "--layers: expected a list [a whole number"),
        (["distill", "demo", "--optim.step-on", "x"], "--optim.step-on: expected epoch or update;"),
        (["distill", "demo", "--teacher.weights", "x"], "--teacher.weights: expected auto, model"),
        (["cache", "demo", "--logits-top", "x"], "--logits-top: expected a whole number, all or"),
        (["cache", "--verify", "x", "--views", "2"], "--verify: expected no other arguments, got"),
        (["distill"], "name a recipe: a YAML file, or one of cifar10_teacher, "),
        (["cache"], "name a recipe: "),
        (["distill", "demo", "DATA"], "expected one recipe, got 'demo' and 'DATA'; the folder of"),
        (["distill", "demo", "--teacher.help"], "no option '--teacher.help'"),
        (["distill", "--config", "x.yaml"], "no option '--config'"),
        (["bench", "rum"], "bench: expected one of run, plot, table, compare, loader, step"),
        (["bench", "step", "--batch-size", "0"], "--batch-size: expected a finite number > 0"),
        (["--print-completion", "fish"], "--print-completion: expected bash or zsh, got 'fish'"),
    ],
)
def test_bad_arguments_get_one_line(words, message, fails):
    fails(words, 2, f"featkd: {message}")


@pytest.mark.parametrize("command", ["distill", "cache"])
def test_help_lists_every_field_of_a_recipe(parsers, command):
    printed = parsers[command].format_help()
    listed = set(re.findall(r"^  (--[\w.-]+)", printed, re.MULTILINE))
    fields = [f"--{name}".replace("_", "-") for name in fields_of(Recipe)]
    sections = {name.rpartition(".")[0] for name in fields}
    assert {*fields} - sections <= listed
    assert "--teacher.name" in listed
    assert "--teacher.help" not in printed
    assert not re.search(r"Optional\[|Literal\[|Union\[|--[\w.-]+\+|default: \)", printed)
    assert printed.startswith(f"usage: featkd {command} RECIPE ")


@pytest.mark.parametrize("value", ["-1", "[-1]", "0,-1"])
@pytest.mark.parametrize("joined", [True, False])
def test_numbers_are_taken_as_a_list(parsers, value, joined):
    words = [f"--layers={value}"] if joined else ["--layers", value]
    layers = parsers["diagnose"].parse_args([*words, "--out", "x"]).layers
    assert layers == [int(number) for number in value.strip("[]").split(",")]


def test_the_note_of_a_removed_field_is_one_line(recipe_file, parsers, capsys):
    text = recipe_file.read_text()
    recipe_file.write_text(text.replace("teacher:\n", "teacher:\n  inference: fastest\n"))
    parse_recipe(parsers["distill"], [str(recipe_file)])
    errors = capsys.readouterr().err
    assert errors.startswith(
        f"featkd: recipe {recipe_file}: teacher.inference: 'fastest' was removed"
    )
    assert errors.count("\n") == 1


def test_a_missing_optional_dependency_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "pip install '/path/to/featkd[demo]'" in capsys.readouterr().err


def test_env_says_why_the_extension_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_csrc.so")
    monkeypatch.setenv("FEATKD_JOIN_SECONDS", "300")
    assert main(["env", "--json", str(tmp_path / "env.json")]) == 0
    facts = json.loads((tmp_path / "env.json").read_text())
    printed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"] == printed["torch"]
    assert facts["FEATKD_JOIN_SECONDS"] == "300"
    assert torch.__version__.startswith(facts["torch"])
    assert facts["csrc"].startswith(
        "csrc is not built, because torch or a C++ compiler was missing"
    )
    assert extension.REBUILD in facts["csrc"]


def test_completion_scripts_hold_commands_and_dashed_options(tmp_path, capsys):
    for shell in ("bash", "zsh"):
        assert main(["--print-completion", shell]) == 0
        script = capsys.readouterr().out
        (tmp_path / shell).write_text(script)
        for word in (*COMMANDS, *bench.COMMANDS, "--optim.warmup-epochs", "--batch-sizes"):
            assert word in script
        assert "--optim.warmup_epochs" not in script
    for words, completed in (
        ("dis", "distill"),
        ("bench comp", "compare"),
        ("distill --optim.warmup-e", "--optim.warmup-epochs"),
    ):
        code = f"""source {tmp_path / "bash"}
COMP_WORDS=(featkd {words}); COMP_CWORD={len(words.split())}
$(complete -p featkd | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == [completed], done.stderr


def test_no_bars_and_no_colours_where_output_is_no_terminal(recipe_file, tmp_path, capfd):
    cached = ("--out", str(tmp_path / "cache"), "--data.augment.rand-augment", "null")
    assert main(["cache", str(recipe_file), *cached]) == 0
    assert main(["distill", str(recipe_file), "--optim.epochs=1", "--optim.warmup-epochs=0"]) == 0
    said = capfd.readouterr()
    for text in said:
        assert text
        assert not {"\r", "\x1b"} & {*text}


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["demo", "--seed", "1"]])
def test_no_color_is_respected_on_a_terminal(words):
    master, terminal = pty.openpty()
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "featkd", *words]
    subprocess.run(command, stdout=terminal, stderr=terminal, env=environment, timeout=120)
    os.close(terminal)
    said = b""
    with open(master, "rb", buffering=0) as output, contextlib.suppress(OSError):  # its end
        while chunk := output.read(65536):
            said += chunk
    assert said
    assert b"\x1b" not in said
