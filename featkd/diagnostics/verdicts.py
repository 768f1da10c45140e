"""What the figures say, in words, and no more than a null model leaves of it."""

from __future__ import annotations

from collections.abc import Sequence

from featkd.diagnostics.reach import Reach
from featkd.diagnostics.run import Findings
from featkd.diagnostics.source import Layer
from featkd.diagnostics.stream import LayerResult

_SAME = 0.015  # difference of d/D below which two curves are called equal


def subspace_verdict(layer: Layer, r: LayerResult) -> str:
    """Ranks of images beside the dimensions of the data set, and whether the subspace rotates."""
    level = r.spectrum.typical
    name = str(layer).capitalize()
    share = f"{100 * r.spectrum.thresholds[level]:g} %"
    own = r.spectrum.summaries[level].percentile99
    text = (
        f"{name}: one image's map needs at most {own} dimensions for {share} of its energy "
        f"(99th percentile; {r.channels} channels, {r.tokens} tokens)"
    )
    if r.captured is None:
        return f"{text}. How many of the data set's axes an image needs was not measured."
    shared = r.captured.summaries[level].percentile99
    text += f"; of axes shared by the data set it needs {shared}"
    if r.rotation is None:
        return f"{text}. One image says nothing about rotation."
    found = r.rotation
    text += (
        f". The {found.k} leading dimensions of two images overlap by {found.pair_mean:.2f} "
        f"(random subspaces: {found.random:.2f})"
    )
    if shared < 1.25 * own + 1:
        return f"{text}: the images share their subspace, and there is little rotation."
    if shared < 2 * own:
        return f"{text}: the images share a good part of their subspaces, not all."
    return f"{text}: each image is of low rank in a subspace of its own, which rotates."


def sep_verdict(r: LayerResult) -> str:
    """SEP beside its nulls: Gaussian tokens, and the same tokens with their channels permuted."""
    null = " ".join(f"{d:.3f}" for d in r.gaussian.relative())
    figures = " ".join(f"{d:.3f}" for d in r.sep.relative())
    shares = " ".join(f"{100 * s:g}" for s in r.sep.shares)
    p = r.permutation
    least = min(1.0, min(p.p_value) * len(p.p_value))  # Bonferroni's correction
    tried = f"{p.permutations} random orders of the channels, {p.images} images"
    text = f"SEP, d/D at {shares} %: {figures}"
    pairs = zip(r.sep.relative(), r.gaussian.relative(), strict=True)
    if all(abs(d - n) <= _SAME for d, n in pairs):
        text += (
            f". This equals the null: Gaussian tokens give {null}. The spectrum of a real signal "
            "is its own mirror image, which forces the curve to the diagonal; it is no evidence "
            "of how these features are encoded."
        )
        if least < 0.05:
            text += f" The order of the channels matters all the same (p = {least:.2g}; {tried})."
    elif least < 0.05:
        text += (
            f". This differs from the null (Gaussian tokens: {null}), and the order of the "
            f"channels matters (p = {least:.2g}; {tried})."
        )
    else:
        text += (
            f". Gaussian tokens give {null}, and random orders of the same channels stray as far "
            f"(p > 0.05; {tried}): it is no evidence of how these features are encoded."
        )
    if r.sep.zero_tokens:
        text += f" {r.sep.zero_tokens} tokens are all zero and left out."
    return text


def bandwidth_verdict(r: LayerResult) -> str:
    """How many channels a token uses, beside Gaussian tokens."""
    mine, null = r.bandwidth, r.gaussian_bandwidth
    text = (
        f"A token has 90 % of its energy in {100 * mine.channels90_mean:.0f} % of the channels "
        f"(Gaussian tokens: {100 * null.channels90_mean:.0f} %); participation ratio "
        f"{mine.participation_mean:.2f} (Gaussian: {null.participation_mean:.2f})"
    )
    ratio = mine.channels90_mean / null.channels90_mean
    if ratio > 0.9:
        return f"{text}: every token uses about as many channels as it could."
    if ratio < 0.5:
        return f"{text}: tokens are sparse, a few channels hold most of their energy."
    return f"{text}: tokens use fewer channels than noise would."


def reach_verdict(r: Reach) -> str:
    """What a student can reach, as a sentence."""
    name = str(r.teacher).capitalize()
    if r.channels >= r.teacher_channels:
        return (
            f"{name}: the student's {r.channels} channels are as many as the "
            f"teacher's {r.teacher_channels}; no linear limit."
        )
    text = (
        f"{name}, {r.channels} against {r.teacher_channels} channels. Pooled, "
        f"without a projector: at most {100 * r.pooled:.1f} % of the teacher's energy. One linear "
        f"projector for all images, kept (Lift) or dropped after training: {100 * r.shared:.1f} % "
        f"({100 * r.shared_with_bias:.1f} % with a bias). If each image had its own: "
        f"{100 * r.per_image:.1f} %. A last block of the teacher's width (WideLast): no linear "
        "limit."
    )
    if r.per_image - r.shared > 0.02:
        return f"{text} The gap between the last two is what rotation costs."
    return f"{text} The width costs little here."


def pca_warning(layer: Layer, r: LayerResult) -> str | None:
    """What too few images leave open."""
    tokens = r.images * r.tokens
    if tokens < 2 * r.channels:
        return (
            f"{layer}: {tokens} tokens for {r.channels} channels: the data set's axes are "
            "those of these images, and dimensions of the data set come out too low"
        )
    if r.images < r.channels:
        return (
            f"{layer}: {r.images} images for {r.channels} channels: axes with little energy "
            "are not settled, and the dimensions at high shares are lower bounds"
        )
    return None


def verdicts(findings: Findings, focus: Sequence[Layer]) -> dict[Layer, list[str]]:
    """The sentences about each layer in focus."""
    found = {}
    for layer in focus:
        r = findings.layers[layer]
        found[layer] = [subspace_verdict(layer, r), sep_verdict(r), bandwidth_verdict(r)]
    return found


def warnings(findings: Findings) -> list[str]:
    """Everything a reader must know before believing a figure."""
    found = list(findings.notes)
    if findings.bad:
        found.append(f"{len(findings.bad)} images were left out: see summary.json")
    few = [w for w in (pca_warning(la, r) for la, r in findings.layers.items()) if w]
    found += few[-1:]  # of all layers much the same
    if len(few) > 1:
        found[-1] += f" (and so for {len(few) - 1} other layers)"
    unsolved = sum(r.spectrum.unsolved for r in findings.layers.values())
    if unsolved:
        found.append(f"{unsolved} spectra missed their trace: see summary.json")
    return found
