"""`Loader` with a DALI pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from featkd.data.augment_params import AugmentParamSampler, evaluation_params
from featkd.data.dali.files import load
from featkd.data.dali.pipeline import build_pipeline, pipeline_inputs
from featkd.data.dali.read_ahead import EpochReader, FedBatch
from featkd.data.imageset import Sample
from featkd.data.loader import NO_IMAGES, Batch, Loader, RawBatch, raw_batch
from featkd.data.sampler import SampleKey
from featkd.runtime.names import printable


class DaliLoader(Loader):
    """`Loader` with a DALI pipeline.

    Threads of this process read the files, and this process draws the augmentation parameters.
    DALI does all work on pixels up to the `DeviceStage`. On a CUDA device JPEGs are decoded there.
    """

    _reader: EpochReader | None = None
    _pipeline: Any = None

    @property
    def decoder(self) -> str:  # type: ignore[override]
        """See `Loader`."""
        return f"dali on {self._device.type}"

    @cached_property
    def _param_sampler(self) -> AugmentParamSampler:
        return AugmentParamSampler(self._config, self.dataset.seed)

    def __iter__(self) -> Iterator[Batch]:
        """See `Loader`."""
        self.close()
        return self._ready(self._run(), self._iteration)

    def close(self) -> None:
        """See `Loader`."""
        self._iteration += 1
        if self._reader is not None:  # an unfinished epoch, whose batches the pipeline still holds
            self._reader.close()
            self._reader = self._pipeline = None

    def _run(self) -> Iterator[RawBatch]:
        reader = EpochReader(self.dataset, iter(self._batches), self._config.workers)
        self._reader = reader  # the pipeline calls `_feed`, which reads from it
        self._prepare_pipeline()
        while True:
            try:
                output = self._next_output(reader)
            except StopIteration:
                break
            fed = reader.fed.popleft()
            # Not a copy: DALI reuses the memory once the tensor is freed.
            images = torch.utils.dlpack.from_dlpack(output.as_tensor())
            yield fed.batch._replace(images=images)
        reader.close()
        self._reader = None
        yield raw_batch(NO_IMAGES, [], reader.errors, len(reader.requested))
        if reader.failure is not None:
            raise reader.failure

    def _next_output(self, reader: EpochReader) -> Any:
        """Runs the pipeline and returns its output.

        A file that DALI cannot decode ends the pipeline, and DALI does not name the file. A new
        pipeline is then fed the batches that the old one held, after Pillow has checked each file.

        Raises:
            StopIteration: the epoch is over.
            RuntimeError: the pipeline failed on files that Pillow decodes.
        """
        while True:
            try:
                (output,) = self._pipeline.run(_stream(self._device))
                return output
            except RuntimeError as error:
                self._pipeline = None
                if not reader.fed:
                    raise
                if all(fed.decodable for fed in reader.fed):
                    raise RuntimeError(
                        f"DALI failed on {self._find_failing(reader.fed)}: {_reason(error)}; set "
                        'data.backend to "timm"'
                    ) from error
            reader.retry_fed()
            self._prepare_pipeline()

    def _find_failing(self, fed: Iterable[FedBatch]) -> str:
        """Describes the image that a pipeline fails on, found by halving the batches."""
        keys = [SampleKey(*key) for each in fed for key in each.batch.keys.tolist()]
        decoded = [self.dataset.decode(key, load) for key in keys]
        samples = [sample for sample in decoded if sample.image is not None]
        count = len(samples)
        while len(samples) > 1:
            half = samples[: len(samples) // 2]
            samples = half if self._fails(half) else samples[len(half) :]
        if samples and self._fails(samples):
            return f"{printable(self.dataset.name(samples[0].source_index))}, which Pillow decodes"
        return f"a batch, but on none of its {count} images alone, all of which Pillow decodes"

    def _fails(self, samples: Sequence[Sample]) -> bool:
        """Checks if a new pipeline fails on these samples."""
        inputs = iter([self._inputs(samples)])
        try:
            self._build_pipeline(lambda: next(inputs), len(samples)).run(_stream(self._device))
        except RuntimeError:
            return True
        return False

    def _prepare_pipeline(self) -> None:
        """Reuses the pipeline of the last epoch if it ran to its end, otherwise builds one."""
        if self._pipeline is None:
            self._pipeline = self._build_pipeline(self._feed, self._batches.batch_size)
        else:
            self._pipeline.reset()

    def _build_pipeline(self, feed: Callable[[], tuple[Any, ...]], batch_size: int) -> Any:
        training = self.dataset.training
        return build_pipeline(
            self._config,
            feed,
            batch_size=batch_size,
            num_ops=self._param_sampler.num_ops if training else 0,
            fill_color=self._param_sampler.fill_color if training else (0, 0, 0),
            device=self._device,
        )

    def _feed(self) -> tuple[Any, ...]:
        """Returns the pipeline's inputs for a batch; DALI calls it ahead of the output.

        Raises:
            StopIteration: the epoch is over.
        """
        if self._reader is None:
            raise StopIteration
        return self._inputs(next(self._reader))

    def _inputs(self, samples: Sequence[Sample]) -> tuple[Any, ...]:
        """Returns the pipeline's inputs for samples with `File`s."""
        config = self._config
        contents, sizes = zip(*(sample.image for sample in samples), strict=True)
        if self.dataset.training:
            params = self._param_sampler.sample(sizes, [sample.key for sample in samples])
        else:
            params = evaluation_params(sizes, config.img_size, config.crop_pct)
        return pipeline_inputs(list(contents), params, config.img_size)


def _reason(error: RuntimeError) -> str:
    """Returns the first line of DALI's message that is not only a heading."""
    lines = [line.strip() for line in str(error).splitlines()]
    return printable(next((line for line in lines if line and line[-1] != ":"), "no reason given"))


def _stream(device: torch.device) -> Any:
    """Returns torch's current CUDA stream, on which the output is ordered; None on the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
