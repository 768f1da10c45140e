"""`Loader` with a DALI pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from featkd.data.augment_params import AugmentParamSampler, evaluation_params
from featkd.data.config import DataConfig
from featkd.data.dali.files import File, load
from featkd.data.dali.pipeline import build_pipeline, pipeline_inputs
from featkd.data.dali.read_ahead import EpochReader, FedBatch
from featkd.data.imageset import ImageSet
from featkd.data.loader import Batch, RawBatch, SampledLoader, as_tensor
from featkd.data.sampler import EpochSampler, SampleKey
from featkd.runtime.names import printable


class DaliLoader(SampledLoader):
    """`Loader` with a DALI pipeline; made by `build_loader`.

    Threads of this process read the files, and this process draws the augmentation parameters.
    DALI does all work on pixels up to the `DeviceStage`.

    Args:
        dataset: the images.
        config: sizes, filter, statistics and augmentation.
        sampler: the order of the samples.
        batch_size: images per batch.
        device: device of the batches. On a CUDA device JPEGs are decoded there too.
    """

    def __init__(
        self,
        dataset: ImageSet,
        config: DataConfig,
        sampler: EpochSampler,
        *,
        batch_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(dataset, config, sampler, batch_size=batch_size, device=device)
        self.decoder = f"dali on {device.type}"
        self._config = config
        self._device = device
        self._param_sampler = (
            AugmentParamSampler(config, dataset.seed) if dataset.training else None
        )
        self._reader: EpochReader | None = None
        self._pipeline: Any = None

    def __iter__(self) -> Iterator[Batch]:
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
            yield RawBatch(
                images,
                torch.tensor(fed.targets, dtype=torch.int64),
                as_tensor(fed.keys),
                torch.tensor(fed.source_index, dtype=torch.int64),
                fed.errors,
                len(fed.requested),
            )
        reader.close()
        self._reader = None
        nothing = torch.empty(0, dtype=torch.int64)
        yield RawBatch(
            *(nothing, nothing, as_tensor([]), nothing), reader.errors, len(reader.requested)
        )
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
        samples = []
        for batch in fed:
            for key in batch.keys:
                decoded, _ = self.dataset.decode(key, load)
                if decoded is not None:
                    samples.append((decoded[0], key, decoded[2]))
        count = len(samples)
        while len(samples) > 1:
            half = samples[: len(samples) // 2]
            samples = half if self._fails(half) else samples[len(half) :]
        if samples and self._fails(samples):
            return f"{printable(self.dataset.name(samples[0][2]))}, which Pillow decodes"
        return f"a batch, but on none of its {count} images alone, all of which Pillow decodes"

    def _fails(self, samples: Sequence[tuple[File, SampleKey, int]]) -> bool:
        """Checks if a new pipeline fails on these samples."""
        files, keys = [file for file, _, _ in samples], [key for _, key, _ in samples]
        inputs = iter([self._inputs(files, keys)])
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
        sampler = self._param_sampler
        return build_pipeline(
            self._config,
            feed,
            batch_size=batch_size,
            num_ops=0 if sampler is None else sampler.num_ops,
            fill_color=(0, 0, 0) if sampler is None else sampler.fill_color,
            device=self._device,
        )

    def _feed(self) -> tuple[Any, ...]:
        """Returns the pipeline's inputs for a batch; DALI calls it ahead of the output.

        Raises:
            StopIteration: the epoch is over.
        """
        reader = self._reader
        if reader is None:
            raise StopIteration
        for batch, decodable in reader:
            files, keys, targets, source_index = [], [], [], []
            for key, (decoded, errors) in batch:
                reader.errors += errors
                if decoded is not None:
                    file, target, index = decoded
                    files.append(file)
                    targets.append(target)
                    source_index.append(index)
                    keys.append(key)
            reader.requested.append([key for key, _ in batch])
            if not files:
                continue
            errors, requested = reader.errors, reader.requested
            reader.fed.append(FedBatch(keys, targets, source_index, errors, requested, decodable))
            reader.errors, reader.requested = [], []
            return self._inputs(files, keys)
        raise StopIteration

    def _inputs(self, files: Sequence[File], keys: Sequence[SampleKey]) -> tuple[Any, ...]:
        """Returns the pipeline's inputs for these files and keys."""
        config, sampler = self._config, self._param_sampler
        contents, sizes = [content for content, _ in files], [size for _, size in files]
        if sampler is None:
            params = evaluation_params(sizes, config.img_size, config.crop_pct)
        else:
            params = sampler.sample(sizes, keys)
        return pipeline_inputs(contents, params, config.img_size)


def _reason(error: RuntimeError) -> str:
    """Returns the first line of DALI's message that is not only a heading."""
    lines = [line.strip() for line in str(error).splitlines()]
    return printable(next((line for line in lines if line and line[-1] != ":"), "no reason given"))


def _stream(device: torch.device) -> Any:
    """Returns torch's current CUDA stream, on which the output is ordered; None on the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
