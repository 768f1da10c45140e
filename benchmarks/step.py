"""One training update and its parts, eager in float32 beside what featkd offers, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import featkd
from featkd.cache import CacheConfig
from featkd.data import Batch
from featkd.data.loader import as_tensor
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.environment import multiplies_bf16
from featkd.train.build_cache import fill
from featkd.train.recipe import Recipe
from featkd.train.trainer import Trainer

from .results import Measured
from .roofline import measure_rates
from .throughput import Rate
from .timing import take_turns
from .variants import Step

PARTS = ("teacher", "student", "loss", "optimizer", "step")
EAGER = "eager_fp32"
CACHED = "cached"
_PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution",
    "aten::convolution_backward", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How an update is computed."""

    amp: Any  # as a recipe's
    compile: bool
    backend: str
    cached: bool = False  # the teacher's outputs are read, not computed

    @property
    def about(self) -> str:
        """In words."""
        precision = "float32" if self.amp == "off" else f"{self.amp} autocast and teacher weights"
        compiled = "torch.compile" if self.compile else "eager"
        ops = "plain torch" if self.backend == "reference" else "featkd's fused ops"
        cached = ", the teacher's outputs from a cache" if self.cached else ""
        return f"{compiled}, {precision}, {ops}{cached}"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """featkd's ops take this way's backend."""
        with featkd.use_backend(self.backend):
            yield


def ways(device: torch.device) -> dict[str, Way]:
    """The variants: plain torch; featkd as one would use it here; featkd in the other precision;
    featkd without the teacher's forward pass.

    One would use bf16 only where the device multiplies in it.
    """
    own = "bf16" if multiplies_bf16(device) else "fp32"
    other = "fp32" if own == "bf16" else "bf16"
    amp = {"bf16": "bf16", "fp32": "off"}
    return {
        EAGER: Way("off", False, "reference"),
        "featkd": Way(amp[own], True, "auto"),
        f"featkd_{other}": Way(amp[other], True, "auto"),
        CACHED: Way(amp[own], True, "auto", cached=True),
    }


def as_way(recipe: Recipe, way: Way) -> Recipe:
    """A recipe computed in another way, with random teacher weights."""
    teacher = recipe.teacher
    if teacher is not None:
        teacher = replace(teacher, pretrained=False, checkpoint=None)
    return replace(recipe, teacher=teacher, amp=way.amp, compile=way.compile)


def random_batch(trainer: Trainer) -> Batch:
    """Normal noise as images, and random classes, on the device; the keys of the first batch."""
    recipe, device = trainer.recipe, trainer.context.device
    generator = torch.Generator().manual_seed(0)
    size = (recipe.batch_size, 3, recipe.data.img_size, recipe.data.img_size)
    images = torch.randn(size, generator=generator)
    targets = torch.randint(trainer.parts.num_classes, size[:1], generator=generator)
    keys = as_tensor(list(islice(trainer.parts.train_loader.sampler, recipe.batch_size)))
    return Batch(images.to(device), targets.to(device), [], keys, keys[:, 1])


def first_batch(trainer: Trainer) -> Batch:
    """The run's first batch, on the device."""
    batch = next(iter(trainer.batches(0)))
    device = trainer.context.device
    return batch._replace(images=batch.images.to(device), targets=batch.targets.to(device))


def steps(trainer: Trainer, batch: Batch, way: Way) -> dict[str, Step]:
    """Each part alone, with what the parts before it put out once, and the whole update.

    teacher: forward. student: forward and backward from gradients of its outputs. loss: forward and
    backward to the student's outputs. optimizer: the update of the weights and of their average.
    """
    parts = trainer.parts
    parameters = [p for p in parts.student.parameters() if p.requires_grad]
    parts.student.train()
    with way.in_use():
        taught = trainer.teach(batch)
        learnt = trainer.learn(batch.images, taught)
        leaves = learnt._replace(
            logits=_leaf(learnt.logits),
            maps=[_leaf(x) for x in learnt.maps],
            feature_loss=None if learnt.feature_loss is None else _leaf(learnt.feature_loss),
        )
        total = trainer.compare(leaves, batch.targets, taught).total
        torch.autograd.backward(parts.scaler.scale(total))
        outputs, inputs = _tensors(learnt), _tensors(leaves)
        used = [(y, x.grad) for y, x in zip(outputs, inputs, strict=True) if x.grad is not None]
        torch.autograd.backward([y for y, _ in used], [g for _, g in used])
    upstream = [None if x.grad is None else x.grad.clone() for x in inputs]
    gradients = [p.grad for p in parameters]
    del learnt, outputs, used

    def forget() -> tuple[Tensor, ...]:
        for x in (*parameters, *inputs):
            x.grad = None
        return ()

    def restore() -> tuple[Tensor, ...]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return ()

    def student() -> None:
        found = _tensors(trainer.learn(batch.images, taught))
        pairs = [(y, g) for y, g in zip(found, upstream, strict=True) if g is not None]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])

    def loss() -> None:
        torch.autograd.backward(trainer.compare(leaves, batch.targets, taught).total)

    work: dict[str, tuple[Callable[[], tuple[Tensor, ...]], Callable[[], object]]] = {
        "student": (forget, student),
        "loss": (forget, loss),
        "optimizer": (restore, trainer.apply_gradients),
        "step": (forget, lambda: trainer.step([batch])),
    }
    if parts.source is not None:
        work = {"teacher": (forget, lambda: trainer.teach(batch)), **work}
    forget()
    return {name: Step(prepare, _run(way, run)) for name, (prepare, run) in work.items()}


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _tensors(learnt: Any) -> list[Tensor]:
    distance = [] if learnt.feature_loss is None else [learnt.feature_loss]
    return [learnt.logits, *learnt.maps, *distance]


def _run(way: Way, work: Callable[[], object]) -> Callable[[tuple[Tensor, ...]], Any]:
    def run(ready: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with way.in_use():
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
    """Every part of every variant in turns, after one round to warm up (and compile).

    Args:
        recipe: a run whose data folders exist.
        variants: name -> way, as of `ways`.
        rounds: timed rounds.
        batch_of: what is trained on; from `random_batch` no file is read, but for a cache.

    Raises:
        RuntimeError: a variant's loss is not finite.
    """
    with built(recipe, context, variants) as trainers:
        work = {}
        for name, trainer in trainers.items():
            for part, step in steps(trainer, batch_of(trainer), variants[name]).items():
                work[f"{part} {name}"] = step
        clock = _clock(context.device)
        seconds = take_turns(work, clock, min_seconds=0, min_rounds=rounds)
        for name, trainer in trainers.items():
            if not trainer.losses(batch_of(trainer)).total.isfinite():
                raise RuntimeError(f"{name}: the loss is not finite after the timed updates")
    return [
        Rate(part, name, recipe.batch_size, seconds[key])
        for part in PARTS
        for name in variants
        if (key := f"{part} {name}") in seconds
    ]


@contextmanager
def built(
    recipe: Recipe, context: ProcessContext, variants: Mapping[str, Way]
) -> Iterator[dict[str, Trainer]]:
    """The runs as `featkd distill` would build them, and caches of an epoch where they need one."""
    with ExitStack() as stack:
        trainers = {}
        for name, way in variants.items():
            run = as_way(recipe, way)
            if way.cached:
                folder = stack.enter_context(TemporaryDirectory(prefix="featkd-cache-"))
                cache = Path(folder)
                fill(run, CacheConfig(), context, cache, quiet=True, strict_classes=False)
                run = replace(run, cache=folder, cache_epochs="cycle")
            trainers[name] = Trainer(run, context, strict_classes=False)
            stack.callback(trainers[name].parts.close)
        yield trainers


def _clock(device: torch.device) -> Callable[[Step], float]:
    """Wall time until the device is done: what a training run waits for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def clock(step: Step) -> float:
        ready = step.prepare()
        wait()
        start = time.perf_counter()
        step.run(ready)
        wait()
        return time.perf_counter() - start

    return clock


def shares(rates: Sequence[Rate], variant: str) -> dict[str, float]:
    """Each part's time / the whole update's; what is left is "other"."""
    of = {rate.name: rate.median for rate in rates if rate.variant == variant}
    whole = of.pop("step")
    found = {name: seconds / whole for name, seconds in of.items()}
    return {**found, "other": 1 - sum(found.values())}


@dataclass(frozen=True)
class Bound:
    """What an eager float32 update's matrix products say of the speed that can be had."""

    time_share: float
    """Of the products in the update's time, by torch's profiler."""
    gflop_per_image: float
    """Of the products."""
    gflop_per_s: float
    """The best rate seen of float32 products here: large ones', before and after the update, or
    the update's own."""

    @property
    def most_images_per_s(self) -> float:
        """Modelled: the products alone, all at the rate of large ones."""
        return self.gflop_per_s / self.gflop_per_image

    @property
    def text(self) -> str:
        """In words."""
        return (
            f"matrix products take {self.time_share:.0%} of the eager update: all else made free "
            f"gains {1 / self.time_share:.2f} times. They are {self.gflop_per_image:.1f} GFLOP an "
            f"image; at {self.gflop_per_s:.0f} GFLOP/s, the best seen of such products here, no "
            f"float32 update exceeds {self.most_images_per_s:.2f} images/s (modelled)"
        )

    def figures(self) -> list[Measured]:
        """In the JSON form."""
        return [
            ("step", EAGER, "product_time_share", "ratio", self.time_share),
            ("step", EAGER, "gflop_per_image", "GFLOP", self.gflop_per_image),
            ("step", EAGER, "large_products", "GFLOP/s", self.gflop_per_s),
            ("step", "modelled_bound", "images_per_s", "images/s", self.most_images_per_s),
        ]


def bound(recipe: Recipe, context: ProcessContext) -> Bound:
    """Profile an eager float32 update on a CPU, after another, and count another's flops."""
    way = ways(context.device)[EAGER]
    # the machine's pace changes, and a bound has to be of its best
    rates = [_product_rate(context.device)]
    with built(recipe, context, {EAGER: way}) as trainers:
        trainer = trainers[EAGER]
        batch = random_batch(trainer)
        trainer.parts.student.train()
        with way.in_use():
            trainer.step([batch])
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                trainer.step([batch])
            # the counter does not know the CPU's fused attention
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                trainer.step([batch])
    events = recorded.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    inside = sum(event.self_cpu_time_total for event in events if event.key in _PRODUCTS)
    gflop = counter.get_total_flops() / 1e9
    rates += [_product_rate(context.device), gflop / (inside / 1e6)]  # the profiler's are us
    return Bound(inside / whole, gflop / recipe.batch_size, max(rates))


def _product_rate(device: torch.device) -> float:
    return measure_rates(device, ("fp32",)).gflop_per_s["fp32"]
