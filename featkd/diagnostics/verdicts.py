"""Conclusions in words, as far as the null models allow them."""

from __future__ import annotations

from featkd.diagnostics.findings import Findings, format_percent
from featkd.diagnostics.layer_diagnostics import LayerResult
from featkd.diagnostics.source import Layer
from featkd.diagnostics.student_reach import StudentReach
from featkd.runtime.names import plural

_SAME = 0.015  # largest difference of d/D between curves that are called equal
_SAME_STEPS = 1.5  # the same in steps of d: with few channels one step exceeds _SAME
_LOW_RANK = 0.8  # of the Gaussian maps' rank: a rank below it is called low


def headline(layer: Layer, r: LayerResult) -> str:
    """One sentence about the subspaces of a layer."""
    level = r.spectrum.typical
    rank = r.spectrum.summaries[level].percentile99
    null = r.gaussian_spectrum.summaries[level].percentile99
    name = str(layer).capitalize()
    if rank >= _LOW_RANK * null:
        return f"{name}: the maps' energy ranks are no lower than those of noise of the same size."
    if r.rotation is None:
        return f"{name}: the maps have low rank; rotation needs more than one image."
    found = r.rotation
    overlap = (found.pair_mean - found.random) / (1 - found.random) if found.random < 1 else 1.0
    if overlap > 0.8:
        return f"{name}: the maps have low rank, in a subspace that the images share."
    if overlap > 0.5:
        return f"{name}: the maps have low rank, in subspaces that the images share in part."
    return f"{name}: the maps have low rank, in subspaces that rotate from image to image."


def subspace_verdict(r: LayerResult) -> str:
    """Ranks of images and axes of the data set beside Gaussian maps; overlap beside random."""
    level = r.spectrum.typical
    threshold = r.spectrum.thresholds[level]
    null = r.gaussian_spectrum.summaries[level].percentile99
    text = (
        f"99 % of the images need at most {r.spectrum.summaries[level].percentile99} dimensions "
        f"of their own for {format_percent(threshold)} % of their energy; Gaussian maps of "
        f"{r.tokens} tokens and {r.channels} channels need {null}."
    )
    if r.captured is None:
        text += " The number of the data set's axes that an image needs was not measured."
    else:
        centred = " (centred, unlike the ranks)" if r.pca.centred else ""
        text += (
            f" They need {r.captured.summaries[level].percentile99} of the axes that all images "
            f"share{centred}; Gaussian maps need about {round(threshold * r.channels)}."
        )
    if r.rotation is not None:
        found = r.rotation
        text += (
            f" The {found.k} leading dimensions of two images overlap by {found.pair_mean:.2f}, "
            f"random subspaces by {found.random:.2f}."
        )
        if found.left_out:
            text += f" Images of lower rank left out: {found.left_out}."
    return text


def sep_verdict(r: LayerResult) -> str:
    """SEP beside Gaussian tokens, and beside the same tokens with permuted channels."""
    null = " ".join(f"{d:.3f}" for d in r.gaussian.relative())
    figures = " ".join(f"{d:.3f}" for d in r.sep.relative())
    shares = " ".join(map(format_percent, r.sep.shares))
    p = r.permutation
    tried = f"p = {p.p_joint:.2g}; {p.permutations} random orders, {p.images} images"
    pairs = zip(r.sep.relative(), r.gaussian.relative(), strict=True)
    equal = all(abs(d - n) <= max(_SAME, _SAME_STEPS / r.channels) for d, n in pairs)
    text = (
        f"Spectral energy pattern (SEP), d/D at {shares} %: {figures}; Gaussian tokens give {null}."
    )
    if equal:
        text += " This equals the null, so it is no evidence of how these features are encoded."
    if 1 / (1 + p.permutations) >= 0.05:
        return f"{text} {p.permutations} random orders are too few to test the order of channels."
    if p.p_joint < 0.05:
        text += f" The order of the channels{' still' if equal else ''} matters ({tried})."
    else:
        text += f" Random orders of the same channels differ as much ({tried})"
        text += "." if equal else ", so this too is no evidence of an encoding."
    if r.sep.zero_tokens:
        text += f" Tokens left out because they are all zero: {r.sep.zero_tokens}."
    return text


def bandwidth_verdict(r: LayerResult) -> str:
    """Channels used per token, beside Gaussian tokens."""
    found, null = r.bandwidth, r.gaussian_bandwidth
    ratio = found.channels90_mean / null.channels90_mean
    words = "as many channels as noise" if ratio > 0.9 else "fewer channels than noise"
    if ratio > 1.1:
        words = "more channels than noise"
    return (
        f"On average a token has 90 % of its energy in {100 * found.channels90_mean:.0f} % of the "
        f"channels (Gaussian tokens: {100 * null.channels90_mean:.0f} %); participation ratio "
        f"{found.participation_mean:.2f} (Gaussian: {null.participation_mean:.2f}): tokens use "
        f"{words}."
    )


def reach_verdict(r: StudentReach) -> str:
    """Limits of the student on a teacher layer."""
    name = str(r.teacher).capitalize()
    if r.channels >= r.teacher_channels:
        return (
            f"{name}: the student's matched map has {r.channels} channels, the teacher's "
            f"{r.teacher_channels}; there is no linear limit."
        )
    return (
        f"{name}, {r.channels} against {r.teacher_channels} channels. One linear projector with a "
        f"bias for all images reaches at most {100 * r.shared_with_bias:.1f} % of the teacher's "
        "energy; this bounds Lift, and any projector that is removed after training. Pooling "
        f"without a projector reaches {100 * r.pooled:.1f} %. WideLast's last block is as wide as "
        f"the teacher and has no such limit. One projector per image could reach "
        f"{100 * r.per_image:.1f} %; for Gaussian maps, {100 * r.per_image_gaussian:.1f} %."
    )


def pca_warning(layer: Layer, r: LayerResult) -> str | None:
    """Warning that there are too few tokens or images for the PCA, or None."""
    tokens = r.images * r.tokens
    if tokens < 10 * r.channels:
        return (
            f"{layer}: {tokens} tokens for {r.channels} channels: the axes fit these images too "
            "well, so the axes that an image needs are too few and the student's reach too high"
        )
    if r.images < r.channels:
        return (
            f"{layer}: {r.images} images for {r.channels} channels: axes with little energy are "
            "uncertain, so the axes that an image needs for high shares are too few"
        )
    return None


def layer_verdicts(findings: Findings) -> dict[Layer, list[str]]:
    """Sentences about the last layer of each model, the headline first."""
    verdicts = {}
    for layer in findings.last_layers():
        r = findings.layers[layer]
        others = subspace_verdict(r), sep_verdict(r), bandwidth_verdict(r)
        verdicts[layer] = [headline(layer, r), *others]
    return verdicts


def warnings(findings: Findings) -> list[str]:
    """The notes, and facts that make figures unreliable or incomplete."""
    texts = list(findings.notes)
    if findings.left_out:
        texts.append(f"images left out, listed in summary.json: {len(findings.left_out)}")
    layers = findings.layers.items()
    too_few = [w for w in (pca_warning(layer, r) for layer, r in layers) if w]
    texts += too_few[-1:]  # much the same for all layers
    if len(too_few) > 1:
        texts[-1] += f" (the same for {plural(len(too_few) - 1, 'other layer')})"
    zero = max(r.spectrum.zero_images for _, r in layers)
    if zero:
        texts.append(f"images left out of a layer because its features are all zero: {zero}")
    unsolved = sum(r.spectrum.unsolved for _, r in layers)
    if unsolved:
        texts.append(f"spectra whose eigenvalues missed the trace: {unsolved}")
    return [text[:1].upper() + text[1:] for text in texts]
