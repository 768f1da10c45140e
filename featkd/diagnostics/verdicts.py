"""What the figures say, in words, and no more than a null model leaves of it."""

from __future__ import annotations

from collections.abc import Sequence

from featkd.diagnostics.findings import Findings
from featkd.diagnostics.reach import Reach
from featkd.diagnostics.shares import percent
from featkd.diagnostics.source import Layer
from featkd.diagnostics.stream import LayerResult

_SAME = 0.015  # difference of d/D up to which two curves are called equal
_SAME_STEPS = 1.5  # the same in d, which is whole: one step of few channels is above _SAME
_LOWER = 0.8  # of the Gaussian maps' rank: below it a rank is called low


def headline(layer: Layer, r: LayerResult) -> str:
    """One plain sentence about a layer's subspaces."""
    level = r.spectrum.typical
    own = r.spectrum.summaries[level].percentile99
    null = r.gaussian_spectrum.summaries[level].percentile99
    name = str(layer).capitalize()
    if own >= _LOWER * null:
        return f"{name}: the maps' ranks are no lower than noise of their size has."
    if r.rotation is None:
        return f"{name}: maps are of low rank; one image says nothing about rotation."
    found = r.rotation
    overlap = (found.pair_mean - found.random) / (1 - found.random) if found.random < 1 else 1.0
    if overlap > 0.8:
        return f"{name}: maps are of low rank, in a subspace that the images share."
    if overlap > 0.5:
        return f"{name}: maps are of low rank, in subspaces that the images share in part."
    return f"{name}: maps are of low rank, in subspaces that rotate from image to image."


def subspace_verdict(r: LayerResult) -> str:
    """Ranks of images and axes of the data set, beside Gaussian maps; overlap beside random."""
    level = r.spectrum.typical
    threshold = r.spectrum.thresholds[level]
    share = f"{percent(threshold)} %"
    null = r.gaussian_spectrum.summaries[level].percentile99
    text = (
        f"99 % of the images need at most {r.spectrum.summaries[level].percentile99} dimensions "
        f"of their own for {share} of their energy; Gaussian maps of {r.tokens} tokens and "
        f"{r.channels} channels need {null}"
    )
    if r.captured is None:
        text += ". How many of the data set's axes an image needs was not measured"
    else:
        centred = " (centred, unlike the ranks)" if r.pca.centred else ""
        text += (
            f". Of axes that all images share{centred} they need "
            f"{r.captured.summaries[level].percentile99} (Gaussian: about "
            f"{round(threshold * r.channels)})"
        )
    if r.rotation is not None:
        found = r.rotation
        text += (
            f". The {found.k} leading dimensions of two images overlap by {found.pair_mean:.2f}, "
            f"where random subspaces do by {found.random:.2f}"
        )
        if found.left_out:
            text += f" ({found.left_out} images of lower rank left out)"
    return f"{text}."


def sep_verdict(r: LayerResult) -> str:
    """SEP beside its nulls: Gaussian tokens, and the same tokens with their channels permuted."""
    null = " ".join(f"{d:.3f}" for d in r.gaussian.relative())
    figures = " ".join(f"{d:.3f}" for d in r.sep.relative())
    shares = " ".join(map(percent, r.sep.shares))
    p = r.permutation
    tried = f"{p.permutations} random orders of the channels, {p.images} images"
    text = f"SEP, d/D at {shares} %: {figures}"
    pairs = zip(r.sep.relative(), r.gaussian.relative(), strict=True)
    same = max(_SAME, _SAME_STEPS / r.channels)
    equal = all(abs(d - n) <= same for d, n in pairs)
    if equal:
        text += (
            f". This equals the null: Gaussian tokens give {null}. It is no evidence of how these "
            "features are encoded."
        )
    else:
        text += f"; Gaussian tokens give {null}."
    if 1 / (1 + p.permutations) >= 0.05:
        return f"{text} {p.permutations} random orders are too few to test the order of channels."
    if p.p_joint < 0.05:
        also = " all the same" if equal else ""
        text += f" The order of the channels matters{also} (p = {p.p_joint:.2g}; {tried})."
    else:
        text += f" Random orders of the same channels stray as far (p = {p.p_joint:.2g}; {tried})"
        text += "." if equal else ": a null as well, and no evidence of an encoding."
    if r.sep.zero_tokens:
        text += f" {r.sep.zero_tokens} tokens are all zero and left out."
    return text


def bandwidth_verdict(r: LayerResult) -> str:
    """How many channels a token uses on average, beside Gaussian tokens."""
    mine, null = r.bandwidth, r.gaussian_bandwidth
    text = (
        f"A token of the sample has 90 % of its energy in {100 * mine.channels90_mean:.0f} % of "
        f"the channels on average (Gaussian tokens: {100 * null.channels90_mean:.0f} %); "
        f"participation ratio {mine.participation_mean:.2f} "
        f"(Gaussian: {null.participation_mean:.2f})"
    )
    ratio = mine.channels90_mean / null.channels90_mean
    words = "as many as noise does" if ratio > 0.9 else "fewer than noise does"
    if ratio > 1.1:
        words = "more than noise does"
    return f"{text}: tokens use {words}."


def reach_verdict(r: Reach) -> str:
    """What a student can reach, in sentences."""
    name = str(r.teacher).capitalize()
    if r.channels >= r.teacher_channels:
        return (
            f"{name}: the student's matched map has {r.channels} channels, the teacher's "
            f"{r.teacher_channels}; there is no linear limit."
        )
    return (
        f"{name}, {r.channels} against {r.teacher_channels} channels. One linear projector with a "
        f"bias for all images reaches {100 * r.shared_with_bias:.1f} % of the teacher's energy at "
        f"most; this bounds Lift as well as a projector that is dropped after training. Pooled, "
        f"without a projector: {100 * r.pooled:.1f} %. WideLast's last block is as wide as the "
        f"teacher and has no such limit. A projector for each image could reach "
        f"{100 * r.per_image:.1f} %; of Gaussian maps, {100 * r.per_image_gaussian:.1f} %."
    )


def pca_warning(layer: Layer, r: LayerResult) -> str | None:
    """What too few images leave open."""
    tokens = r.images * r.tokens
    if tokens < 10 * r.channels:
        return (
            f"{layer}: {tokens} tokens for {r.channels} channels: the data set's axes are those "
            "of these images, so that the axes an image needs come out too few and what a student "
            "reaches too much"
        )
    if r.images < r.channels:
        return (
            f"{layer}: {r.images} images for {r.channels} channels: axes with little energy are "
            "not settled, and the axes an image needs for high shares come out too few"
        )
    return None


def verdicts(findings: Findings, focus: Sequence[Layer]) -> dict[Layer, list[str]]:
    """The sentences about each layer in focus, the headline first."""
    found = {}
    for layer in focus:
        r = findings.layers[layer]
        parts = [headline(layer, r), subspace_verdict(r), sep_verdict(r), bandwidth_verdict(r)]
        found[layer] = parts
    return found


def warnings(findings: Findings) -> list[str]:
    """Everything a reader must know before believing a figure."""
    found = list(findings.notes)
    if findings.bad:
        found.append(f"images left out, by name in summary.json: {len(findings.bad)}")
    few = [w for w in (pca_warning(la, r) for la, r in findings.layers.items()) if w]
    found += few[-1:]  # of all layers much the same
    if len(few) > 1:
        found[-1] += f" (and so for {len(few) - 1} other layers)"
    zero = max(r.spectrum.zero_images for r in findings.layers.values())
    if zero:
        found.append(f"images whose features are all zero in some layer, left out there: {zero}")
    unsolved = sum(r.spectrum.unsolved for r in findings.layers.values())
    if unsolved:
        found.append(f"spectra that missed their trace: {unsolved}")
    return [text[:1].upper() + text[1:] for text in found]
