"""Times of a training update and its parts, in plain torch and in featkd, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, clone
from torch.utils._pytree import tree_leaves, tree_map_only

import featkd
from featkd.cache import CacheConfig, TeacherCache, TeacherOutputs
from featkd.cache.shard import write_shard
from featkd.data import Batch
from featkd.data.loader import as_tensor
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.environment import has_fast_bf16
from featkd.train.build_cache import build_cache
from featkd.train.recipe import Recipe
from featkd.train.student_forward import StudentOutputs
from featkd.train.teacher import begin_graph_step
from featkd.train.trainer import Trainer

from .throughput import Rate
from .timing import take_turns, wall_clock
from .variants import Step, step_of

PARTS = ("teacher", "student", "loss", "optimizer", "step")
EAGER = "eager_fp32"
CACHED = "cached"
STORE = "store"  # what `featkd cache` does with a batch of outputs, partly in a thread


@dataclass(frozen=True)
class Way:
    """Settings with which an update is computed."""

    amp: Any
    """Value of the recipe's `amp`."""
    compile: bool
    backend: str
    cached: bool = False
    """Reads the teacher's outputs from a cache."""
    graphs: bool = False
    """Replays CUDA graphs (torch.compile's mode "reduce-overhead")."""
    tf32: bool = False
    """Lets float32 products of a GPU use TF32."""

    @property
    def about(self) -> str:
        """Description of the settings."""
        precision = "float32" if self.amp == "off" else f"{self.amp} autocast and teacher weights"
        precision += " with TF32" if self.tf32 else ""
        compiled = "torch.compile" if self.compile else "eager"
        compiled += " with CUDA graphs" if self.graphs else ""
        ops = "plain torch" if self.backend == "reference" else "featkd's fused ops"
        cached = ", the teacher's outputs from a cache" if self.cached else ""
        return f"{compiled}, {precision}, {ops}{cached}"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Selects the backend of featkd's ops, and TF32, while the block runs."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            with featkd.use_backend(self.backend):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


def ways(device: torch.device) -> dict[str, Way]:
    """Returns the variants by name.

    Plain torch runs eagerly in float32 and in featkd's precision, and compiled in featkd's. That is
    bf16 if the device multiplies faster in it (see `product_speedup`), otherwise float32. featkd
    runs in this precision, in the other one, and with the teacher's outputs from a cache. On a GPU
    there are also eager TF32, and compiled variants with and without CUDA graphs.
    """
    own, other = ("bf16", "fp32") if has_fast_bf16(device) else ("fp32", "bf16")
    amp = {"bf16": "bf16", "fp32": "off"}
    gpu = device.type == "cuda"
    eager = {EAGER: Way("off", False, "reference")}
    if gpu:
        eager["eager_tf32"] = Way("off", False, "reference", tf32=True)
    if own == "bf16":
        eager["eager_bf16"] = Way("bf16", False, "reference")
    compiled = {"compiled": Way(amp[own], True, "reference")}
    featkd_ways = {"featkd": Way(amp[own], True, "auto", graphs=gpu)}
    if gpu:
        compiled["compiled_graphs"] = Way(amp[own], True, "reference", graphs=True)
        featkd_ways["featkd_no_graphs"] = Way(amp[own], True, "auto")
    return {
        **eager,
        **compiled,
        **featkd_ways,
        f"featkd_{other}": Way(amp[other], True, "auto", graphs=gpu),
        CACHED: Way(amp[own], True, "auto", cached=True, graphs=gpu),
    }


def as_way(recipe: Recipe, way: Way) -> Recipe:
    """Returns the recipe with other settings and random teacher weights."""
    teacher = recipe.teacher
    if teacher is not None:
        teacher = replace(teacher, pretrained=False, checkpoint=None, random=True)
    # A batch that fits the machine can scale the peak learning rate below min_lr.
    # CUDA graphs can't accumulate gradients, nor replay a sharded student.
    optim = replace(recipe.optim, min_lr=0.0, accumulate=1)
    return replace(
        recipe,
        teacher=teacher,
        optim=optim,
        distributed="ddp",
        amp=way.amp,
        compile=way.compile,
        compile_mode="reduce-overhead" if way.graphs else "default",
    )


def random_batch(trainer: Trainer) -> Batch:
    """Draws noise as images and random classes, on the device, with the keys of the first batch."""
    recipe, device = trainer.recipe, trainer.context.device
    generator = torch.Generator().manual_seed(0)
    size = (recipe.batch_size, 3, recipe.data.img_size, recipe.data.img_size)
    images = torch.randn(size, generator=generator)
    targets = torch.randint(trainer.components.num_classes, size[:1], generator=generator)
    keys = as_tensor(list(islice(trainer.components.train_loader.sampler, recipe.batch_size)))
    return Batch(images.to(device), targets.to(device), [], keys, keys[:, 1])


def first_batch(trainer: Trainer) -> Batch:
    """Returns the run's first batch, on the device."""
    return next(iter(trainer.batches(0)))


def steps(trainer: Trainer, batch: Batch, way: Way) -> dict[str, Step]:
    """Returns each part of the update as a separate step, and the whole update.

    - teacher: forward
    - student: forward, and backward from the gradients of its outputs
    - loss: forward, and backward to the student's outputs
    - optimizer: the update of the weights and of their average

    Each part takes the outputs that the parts before it have computed once.
    """
    components = trainer.components
    parameters = [p for p in components.parameters if p.requires_grad]
    components.student.train()
    with way.in_use():
        begin_graph_step(trainer.context.device)
        # Copies: the next replay of a CUDA graph overwrites its outputs.
        teacher = tree_map_only(Tensor, clone, TeacherOutputs(*components.teacher_outputs(batch)))
        outputs = components.student_outputs(batch.images, teacher)
        leaves = tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(), outputs)
        total = components.compute_loss(leaves, batch.targets, teacher).total
        torch.autograd.backward(components.scaler.scale(total))
        inputs = _tensors(leaves)
        upstream = [None if x.grad is None else x.grad.clone() for x in inputs]
        _backward(outputs, upstream)
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    del outputs

    def forget() -> tuple[Tensor, ...]:
        for x in (*parameters, *inputs):
            x.grad = None
        return ()

    def restore() -> tuple[Tensor, ...]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return ()

    def student() -> None:
        _backward(components.student_outputs(batch.images, teacher), upstream)

    def loss() -> None:
        torch.autograd.backward(components.compute_loss(leaves, batch.targets, teacher).total)

    work: dict[str, tuple[Callable[[], tuple[Tensor, ...]], Callable[[], object]]] = {
        "student": (forget, student),
        "loss": (forget, loss),
        "optimizer": (restore, trainer.apply_gradients),
        "step": (forget, lambda: trainer.step([batch])),
    }
    if components.teacher is not None:
        work = {"teacher": (forget, lambda: components.teacher_outputs(batch)), **work}
    forget()
    return {name: Step(prepare, _run(trainer, way, run)) for name, (prepare, run) in work.items()}


def _storing(trainer: Trainer, batch: Batch) -> Step:
    """Encodes the outputs for a batch and writes them as a shard, checksums included."""
    assert trainer.recipe.cache is not None
    cache = TeacherCache(Path(trainer.recipe.cache))
    layout = cache.manifest.layout
    layers = [shape.layer for shape in layout.layers]
    outputs, source_index = cache.read(batch.keys, layers, trainer.context.device)
    path = cache.folder / "benchmark.safetensors"

    def store() -> None:
        rows = layout.encode(outputs)
        write_shard(path, "benchmark", batch.keys, source_index, rows, layout.varying)

    return step_of(store)


def _tensors(outputs: StudentOutputs) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if x is not None]


def _backward(outputs: StudentOutputs, gradients: Sequence[Tensor | None]) -> None:
    """Runs the backward pass from the outputs that have a gradient."""
    pairs = zip(_tensors(outputs), gradients, strict=True)
    used = [(y, g) for y, g in pairs if g is not None]
    torch.autograd.backward([y for y, _ in used], [g for _, g in used])


def _run(
    trainer: Trainer, way: Way, work: Callable[[], object]
) -> Callable[[tuple[Tensor, ...]], Any]:
    def run(ready: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with way.in_use():
            begin_graph_step(trainer.context.device)
            work()
        return ready

    return run


def measure(
    recipe: Recipe,
    context: ProcessContext,
    variants: Mapping[str, Way],
    rounds: int,
    batch_of: Callable[[Trainer], Batch] = random_batch,
) -> list[Rate]:
    """Times every part of every variant in turns, after one round to warm up and compile.

    Args:
        recipe: run whose data folders exist.
        variants: values of `ways` by name.
        rounds: timed rounds.
        batch_of: returns the batch to train on; with `random_batch` only a cache reads files.

    Raises:
        RuntimeError: a variant's loss is not finite.
    """
    with built(recipe, context, variants) as trainers:
        work = {}
        for name, trainer in trainers.items():
            batch = batch_of(trainer)
            for part, step in steps(trainer, batch, variants[name]).items():
                work[f"{part} {name}"] = step
            if variants[name].cached:
                work[f"{STORE} {name}"] = _storing(trainer, batch)
        seconds = take_turns(work, wall_clock(context.device), min_rounds=rounds)
        for name, trainer in trainers.items():
            if not trainer.losses(batch_of(trainer)).total.isfinite():
                raise RuntimeError(f"{name}: the loss is not finite after the timed updates")
    return [
        Rate(part, name, recipe.batch_size, seconds[key])
        for part in (*PARTS, STORE)
        for name in variants
        if (key := f"{part} {name}") in seconds
    ]


@contextmanager
def built(
    recipe: Recipe, context: ProcessContext, variants: Mapping[str, Way]
) -> Iterator[dict[str, Trainer]]:
    """Builds the trainers as `featkd distill` does, with a cache of one epoch where needed."""
    with ExitStack() as stack:
        trainers = {}
        for name, way in variants.items():
            run = as_way(recipe, way)
            if way.cached:
                folder = stack.enter_context(TemporaryDirectory(prefix="featkd-cache-"))
                cache = Path(folder)
                build_cache(run, CacheConfig(), context, cache, quiet=True, strict_classes=False)
                run = replace(run, cache=folder, cache_epochs="cycle")
            trainers[name] = Trainer(run, context, strict_classes=False)
            stack.callback(trainers[name].components.close)
        yield trainers


def shares(rates: Sequence[Rate], variant: str) -> dict[str, float]:
    """Returns the share of each part in the update's time; "other" is the rest."""
    medians = {x.name: x.median for x in rates if x.variant == variant and x.name != STORE}
    whole = medians.pop("step")
    found = {name: seconds / whole for name, seconds in medians.items()}
    return {**found, "other": 1 - sum(found.values())}
