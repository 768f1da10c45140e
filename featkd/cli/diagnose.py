"""`featkd diagnose`: from arguments to models or files, a run, and its report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from featkd.cli.arguments import Parser, check_folders, check_known
from featkd.data import DataConfig
from featkd.diagnostics import report, tables, verdicts
from featkd.diagnostics.feature_files import FeatureFiles
from featkd.diagnostics.findings import Findings, RunOptions
from featkd.diagnostics.model_features import ModelFeatures, Subject
from featkd.diagnostics.reach import Reach, of_focus, reach
from featkd.diagnostics.run import DiagnosticsRun
from featkd.diagnostics.source import Source, fingerprint
from featkd.diagnostics.stream import Settings
from featkd.models import FeatureModel, Lift, create_teacher
from featkd.runtime import distributed, environment
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.files import atomic_write
from featkd.train import checkpoint
from featkd.train.trained import load_trained

_MODELS = ("model", "student", "teacher")
_EPILOG = """\
A model is a timm name, or a checkpoint of `featkd distill` (.pt). Under torchrun the images are
shared out, and the figures are the same for any number of processes."""


def diagnose(words: Sequence[str]) -> int:
    """Measure the mismatch of feature maps; the arguments are the command line's."""
    parser = _parser()
    known = [option[2:] for action in parser._actions for option in action.option_strings]
    check_known(words, known, [f"{name}-options." for name in _MODELS])
    args = parser.parse_args(list(words))
    settings = Settings(**{f.name: _tuple(args[f.name]) for f in fields(Settings)})
    _check(args)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, {out} is a file")
    try:
        return _run(args, list(words), settings, out, distributed.start(args.device))
    finally:
        distributed.stop()


def _check(args: Any) -> None:
    """What would otherwise come up only after hours, or as a riddle."""
    for name in ("batch_size", "images"):
        if args[name] is not None and args[name] < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {args[name]}")
    for name in ("layers", "student_layers", "teacher_layers"):
        chosen = args[name]
        if chosen is not None and (not chosen or len(set(chosen)) < len(chosen)):
            raise ValueError(f"{name}: expected layers, each once, got {chosen}")
    if args.centred and args.student is not None:
        raise ValueError("centred: got true beside --student, whose reach needs uncentred axes")
    check_folders(args, ("json",))
    out = Path(args.out).resolve()
    if args.data is not None and out.is_relative_to(Path(args.data).resolve()):
        raise ValueError(
            f"out: expected a folder outside of data, {args.data}, where its figures would be "
            f"taken for images the next time; got {args.out}"
        )
    if args.features is not None and out == Path(args.features).resolve():
        raise ValueError(f"out: expected another folder than features, got {args.out} for both")


def _run(
    args: Any, words: list[str], settings: Settings, out: Path, context: ProcessContext
) -> int:
    on_gpu = context.device.type == "cuda"
    options = RunOptions(
        keep=args.keep,
        budget_gib=args.budget_gib,
        on_bad=args.on_bad,
        compiled=args.compile == "on" or (args.compile == "auto" and on_gpu),
        resume=args.resume == "auto",
        save_seconds=args.save_seconds,
    )
    source = _source(args, context)
    out.mkdir(parents=True, exist_ok=True)
    remedy = f"the same command goes on from {out}/state"
    with distributed.naming_lost_processes(remedy):
        with _Progress(context) as progress:
            run = DiagnosticsRun(source, settings, options, out / "state", context, progress)
            found = run.run()
        if isinstance(found, int):
            print(f"featkd: stopped; {remedy}", file=sys.stderr)
            return 128 + found
        if found is not None:
            _write(out, found, source, settings, args, _command(words, context.world_size))
        run.clear()
    return 0


def _write(
    out: Path, found: Findings, source: Source, settings: Settings, args: Any, command: str
) -> None:
    reaches = _reaches(found, source)
    about = {
        "command": command,
        "run": _described(args),
        "source": source.identity(),
        "settings": asdict(settings),
        "facts": {
            **environment.versions(),
            "commit": environment.commit(),
            "uncommitted changes": "yes" if environment.has_changes() else "no",
            **environment.machine(),
            "processes": os.environ.get("WORLD_SIZE", "1"),
        },
    }
    tables.write_tables(out, found, reaches, about)
    page = report.write_report(out, found, reaches, about)
    if args.json is not None:
        with atomic_write(Path(args.json)) as file:
            file.write((out / tables.SUMMARY).read_bytes())
    focus = report.focus_layers(list(found.layers))
    for texts in verdicts.verdicts(found, focus).values():
        print("\n".join(texts))
    matched = of_focus(reaches, focus)
    if matched is not None:
        print(verdicts.reach_verdict(matched))
    for text in verdicts.warnings(found):
        print(f"note: {text}")
    speed = found.images_per_s
    pace = "" if speed is None else f", {speed:.1f} images/s in the first pass of process 0"
    print(f"{found.images} images{pace}: {page}")


def _command(words: list[str], processes: int) -> str:
    """What was typed, with the launcher that started several processes."""
    launcher = ["featkd"]
    if processes > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        nodes = [] if local == processes else ["--nnodes", str(processes // local)]
        launcher = ["torchrun", *nodes, "--nproc-per-node", str(local), "-m", "featkd"]
    return shlex.join([*launcher, "diagnose", *words])


def _reaches(found: Findings, source: Source) -> list[Reach]:
    """The student's limits: of the width behind its projector, if it has one."""
    widths = {la.index: r.channels for la, r in found.layers.items() if la.model == "student"}
    if not widths or not isinstance(source, ModelFeatures):
        return []
    student = source.model("student")
    width = student.embed_dim if isinstance(student, Lift) else widths[max(widths)]
    return [reach(la, r, width) for la, r in found.layers.items() if la.model == "teacher"]


def _described(args: Any) -> str:
    if args.features is not None:
        return f"feature files in {args.features}"
    names = [
        f"{label}{args[name]}{'' if _has_weights(args, name) else ' (random weights)'}"
        for name, label in (("model", ""), ("student", "student "), ("teacher", "teacher "))
        if args[name] is not None
    ]
    return f"{' and '.join(names)} on the images in {args.data}"


def _has_weights(args: Any, name: str) -> bool:
    return bool(args.pretrained or not _takes_pretrained(args, name))


def _takes_pretrained(args: Any, name: str) -> bool:
    """Whether a model is a timm name without a file of weights: what --pretrained is about."""
    return not (args[name].endswith(".pt") or _weights_file(args, name))


def _weights_file(args: Any, name: str) -> str | None:
    file: str | None = args.checkpoint if name == "model" else args[f"{name}_checkpoint"]
    return file


# Sources.


def _source(args: Any, context: ProcessContext) -> Source:
    models = [name for name in _MODELS if args[name] is not None]
    if args.features is not None:
        if models or args.data is not None:
            others = ", ".join(f"--{name}" for name in models or ["data"])
            raise ValueError(f"features: given together with {others}; give one of them")
        unused = ("checkpoint", "pretrained", "img_size", "mean", "std", "crop_pct")
        wrong = [name for name in unused if args[name]]
        if wrong:
            raise ValueError(f"{wrong[0]}: given together with --features, which needs no model")
        return FeatureFiles(
            Path(args.features),
            args.layers,
            limit=args.images,
            allow_pickle=args.allow_pickle,
            prefix_tokens=args.prefix_tokens,
            chunk_size=args.batch_size,
            on_bad=args.on_bad,
        )
    if models not in (["model"], ["student", "teacher"]):
        raise ValueError(
            f"model: expected --features, --model, or --student and --teacher; got "
            f"{', '.join(models) or 'none of them'}"
        )
    if args.data is None:
        raise ValueError("data: expected a folder of images beside the model, got none")
    if args.pretrained and not any(_takes_pretrained(args, name) for name in models):
        given = [_weights_file(args, name) or args[name] for name in models]
        raise ValueError(
            f"pretrained: expected a timm name without a file of weights, got {' and '.join(given)}"
        )
    configs: list[dict[str, Any]] = []
    subjects = []
    for name in models:
        model, config, about = _model(args, name)
        model.to(context.device)
        layers = args.get(f"{name}_layers") or args.layers
        label = "" if name == "model" else name
        subjects.append(Subject(label, model, None if layers is None else tuple(layers), about))
        configs.append(config)
    asked = {k: args[k] for k in ("img_size", "mean", "std", "crop_pct") if args[k] is not None}
    if "img_size" not in asked and configs[0]["img_size"] != configs[-1]["img_size"]:
        raise ValueError(
            f"img_size: the student was made for {configs[0]['img_size']} pixels, the teacher for "
            f"{configs[-1]['img_size']}; say which with --img-size"
        )
    source = ModelFeatures(
        subjects,
        Path(args.data),
        DataConfig(workers=args.workers, **{**configs[-1], **asked}),
        device=context.device,
        bf16=args.amp == "bf16",
        limit=args.images,
        chunk_size=args.batch_size,
        on_bad=args.on_bad,
    )
    random = [name for name in models if not _has_weights(args, name)]
    if random:
        source.notes.append(f"random weights: {' and '.join(random)}")
    for k in configs[0]:
        if k not in asked and configs[0][k] != configs[-1][k]:
            source.notes.append(
                f"images are preprocessed for the teacher ({k} {configs[-1][k]}), not as the "
                f"student's are ({configs[0][k]})"
            )
    return source


def _model(args: Any, name: str) -> tuple[FeatureModel, dict[str, Any], dict[str, Any]]:
    """A model, the preprocessing that it was made for, and what identifies it."""
    word = args[name]
    file = _weights_file(args, name)
    if word.endswith(".pt"):
        path = Path(word)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no checkpoint {word}")
        other = f"{name}_options"
        if args[other]:
            raise ValueError(f"{other}: got {args[other]!r} beside {word}, which fixes it")
        if file:
            raise ValueError(f"checkpoint: got {file} beside {word}, which holds its weights")
        data = checkpoint.load(path)["recipe"]["data"]
        if args.img_size not in (None, data["img_size"]):
            raise ValueError(
                f"img_size: got {args.img_size} beside {word}, which is for {data['img_size']}"
            )
        kept = ("img_size", "mean", "std", "crop_pct", "interpolation")
        about = {"name": word, "weights": fingerprint([path])}
        model: Any = load_trained(path)
        return model, {k: _tuple(data[k]) for k in kept}, about
    options = dict(args[f"{name}_options"] or {})
    if args.img_size is not None:
        options["img_size"] = args.img_size
    pretrained = args.pretrained and not file  # the file is this model's, the option the other's
    if not (pretrained or file):
        torch.manual_seed(args.seed)
        print(f"featkd: {name} {word} has random weights", file=sys.stderr)
    model = create_teacher(word, pretrained=pretrained, checkpoint=file, **options)
    made = model.pretrained_cfg
    config = {
        "img_size": options.get("img_size", made["input_size"][-1]),
        "mean": tuple(made["mean"]),
        "std": tuple(made["std"]),
        "crop_pct": made["crop_pct"],
        "interpolation": made["interpolation"],
    }
    weights = "pretrained" if pretrained else f"random, seed {args.seed}"
    about = {"name": word, "weights": fingerprint([file]) if file else weights}
    return model, config, {**about, "options": {k: str(v) for k, v in options.items()}}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# The command line.


def _parser() -> Parser:
    parser = Parser(
        prog="featkd diagnose",
        description="Spectra, dataset PCA, subspace rotation and SEP of feature maps. " + _EPILOG,
    )
    add = parser.add_argument
    what = "a timm name or a checkpoint of featkd distill"
    add("--model", type=str, default=None, help=f"the model to look at: {what}")
    add("--checkpoint", type=str, default=None, help="weights of --model, a file")
    add("--student", type=str, default=None, help=f"the narrow one of two models: {what}")
    add("--student-checkpoint", type=str, default=None, help="weights of --student, a file")
    add("--student-layers", type=list[int], default=None, help="of --student; default: --layers")
    add("--teacher", type=str, default=None, help=f"the wide one of two models: {what}")
    add("--teacher-checkpoint", type=str, default=None, help="weights of --teacher, a file")
    add("--teacher-layers", type=list[int], default=None, help="of --teacher; default: --layers")
    add("--pretrained", action="store_true", help="timm's weights where no file gives them")
    for name in _MODELS:
        help = f"further arguments of timm for --{name}, as YAML or JSON"
        add(f"--{name}-options", type=dict[str, Any] | None, default=None, help=help)
    add("--data", type=str, default=None, help="folder with images anywhere below it")
    add("--features", type=str, default=None, help="folder of .npy, .npz or .safetensors files")
    add("--allow-pickle", action="store_true", help="read object arrays; runs code from the files")
    add(
        "--prefix-tokens",
        type=int | Literal["auto"],
        default="auto",
        help="class tokens at the front of the files' maps",
    )
    add("--out", type=str, required=True, help="folder for report.html and the tables")
    add("--json", type=str, default=None, metavar="FILE", help="write summary.json here as well")
    add("--layers", type=list[int] | None, default=None, help="as [0,-1]; default: all")
    add("--images", type=int | None, default=None, help="only so many images, spread evenly")
    add("--batch-size", type=int, default=16, help="images computed at once")
    add("--img-size", type=int | None, default=None, help="default: the model's")
    add("--mean", type=tuple[float, float, float] | None, default=None, help="default: the model's")
    add("--std", type=tuple[float, float, float] | None, default=None, help="default: the model's")
    add("--crop-pct", type=float | None, default=None, help="default: the model's")
    add("--amp", type=Literal["off", "bf16"], default="off", help="precision of the models")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--workers", type=int, default=2, help="processes that read images, for each process")
    add("--keep", type=Literal["fp32", "bf16", "never"], default="fp32", help="for the second pass")
    add("--budget-gib", type=float, default=8.0, help="most disk for kept features")
    add("--on-bad", type=Literal["error", "skip"], default="error", help="unusable images")
    compiled = "torch.compile for elementwise and FFT parts; auto: on a GPU"
    add("--compile", type=Literal["auto", "on", "off"], default="auto", help=compiled)
    add("--resume", type=Literal["auto", "never"], default="auto", help="go on from out/state")
    add("--save-seconds", type=float, default=30.0, help="least time between two states")
    parser.add_class_arguments(Settings)
    return parser


class _Progress:
    """A bar on process 0: images of this process in each pass."""

    def __init__(self, context: ProcessContext) -> None:
        self._shown = context.is_main
        self._bar: Any = None
        self._pass = 0

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, number: int, done: int, total: int) -> None:
        if not self._shown:
            return
        if number != self._pass:
            self.__exit__()
            self._pass = number
            self._bar = tqdm(
                total=total,
                initial=done,  # of a run that goes on: the rate is of this one's images
                desc=("", "features", "captured energy")[number],
                unit=" images",
                disable=not sys.stderr.isatty(),
            )
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
