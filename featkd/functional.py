"""Public functions: they check their arguments and call the ops.

Shapes: B images, N tokens (patches, row-major, no CLS), Cs/Ct student/teacher channels, K classes.
Scalars are float32, or float64 if the first argument is float64. All functions are differentiable
in all inputs except the teacher's tensors, give bitwise equal results when repeated, and never
write to an input.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from featkd.ops import soft_kd as soft_kd_op
from featkd.ops import support
from featkd.ops import talking_heads_attention as talking_heads_attention_op
from featkd.ops.feature_distance import feature_distance
from featkd.ops.two_layer_norms import two_layer_norms
from featkd.runtime import checks

Metric = Literal["mse", "spectral"]

__all__ = [
    "lift_head",
    "projected_feature_kd",
    "soft_kd",
    "talking_heads_attention",
    "widelast_projection",
]


def projected_feature_kd(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    metric: Metric = "mse",
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Distance of a student's (projected) feature map from a teacher's.

    With Y = LN(S W^T + b) (a step is skipped if its parameters are None) and E = Y - T:
    "mse" is mean(E^2); "spectral" is the mean over real and imaginary parts of
    rfft2(E, norm="ortho")^2 on the patch grid ([EM26], MSE and SpectralKD losses; section 3 of
    docs/method.md has the FFT-free form that is computed).

    Args:
        student: (B, N, Cs), floating.
        teacher: (B, N, Ct), floating, without requires_grad; its dtype may differ.
        weight: (Ct, Cs) or None; None needs Cs == Ct.
        bias: (Ct,) or None; only with `weight`.
        norm_weight: (Ct,) or None (no LayerNorm).
        norm_bias: (Ct,) or None; only with `norm_weight`.
        eps: LayerNorm's epsilon.
        metric: "mse" or "spectral".
        grid: (H, W) with H*W == N, only used by "spectral". None assumes a square grid.

    Returns:
        A scalar.

    Raises:
        TypeError: an argument is an integer tensor, or neither tensor nor number.
        ValueError: shapes, devices or the grid don't match, an input is empty, or the teacher
            requires grad.

    Notes:
        S W^T + b is torch's linear layer, under autocast too; without autocast the parameters
        are cast to the student's dtype. Everything after it is computed in float32 (float64 for a
        float64 student). CUDA tensors take one Triton kernel forward and one backward, each of
        which reads the two maps once; other tensors take plain torch (`featkd.use_backend`). The
        projected map and the teacher's map are kept for the backward pass. Results are bitwise
        repeatable. Double backward through the kernels is not supported.

    Examples:
        >>> import torch
        >>> student, teacher = torch.zeros(2, 4, 3), torch.ones(2, 4, 5)
        >>> projected_feature_kd(student, teacher, weight=torch.ones(5, 3))
        tensor(1.)
    """
    checks.check_metric(metric)
    checks.check_positive("eps", eps)
    checks.check_floating("student", student, ("B", "N", "Cs"))
    batch, tokens, width = student.shape
    if weight is None:
        if bias is not None:
            raise ValueError("bias: given without weight")
    else:
        checks.check_not_swapped(student, teacher, weight)
        checks.check_floating("weight", weight, ("Ct", width))
        width = weight.shape[0]
        if bias is not None:
            checks.check_floating("bias", bias, (width,))
    checks.check_norm(norm_weight, norm_bias, width, optional=True)
    checks.check_not_empty("student", student)
    checks.check_teacher_map(teacher, (batch, tokens, width))
    checks.warn_of_class_token(metric, grid, tokens)
    checks.check_same_device(
        student=student,
        teacher=teacher,
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    if weight is not None:
        student = support.project(student, weight, bias)
    tensors = (student, teacher, norm_weight, norm_bias)
    grid = checks.resolve_grid(metric, grid, tokens)
    loss, _ = feature_distance("projected_feature_kd", *tensors, eps=eps, grid=grid)
    return cast(Tensor, loss)


def widelast_projection(
    x: Tensor,
    weight: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Input projection of a wider block: the new residual stream and its normalised copy.

    r = LN_p(x W^T) and u = LN_1(r) ([EM26], WideLast): r is the residual stream, u the input
    of the block's attention.

    Args:
        x: (B, N, Cs), floating.
        weight: (Ct, Cs).
        proj_norm_weight, proj_norm_bias, norm1_weight, norm1_bias: (Ct,).
        eps: epsilon of both LayerNorms.

    Returns:
        (residual, normed), both (B, N, Ct) in x's dtype. Under autocast the residual is float32
        and the normed map has the autocast dtype, to which the next linear layer would cast it.

    Raises:
        TypeError: an argument is an integer tensor, or neither tensor nor number.
        ValueError: shapes or devices don't match.

    Notes:
        x W^T is torch's linear layer, under autocast too; without autocast the weight is cast to
        x's dtype. Both norms are computed in float32 (float64 for a float64 x), and LN_1 sees r
        before it is rounded. CUDA tensors take one Triton kernel forward and one backward; other
        tensors take plain torch (`featkd.use_backend`). x W^T is kept for the backward pass.
        Results are bitwise repeatable. Double backward through the kernels is not supported.
        Exported graphs contain plain torch operators.

    Examples:
        >>> import torch
        >>> ones, zeros = torch.ones(4), torch.zeros(4)
        >>> r, u = widelast_projection(torch.randn(2, 9, 3), torch.randn(4, 3),
        ...                            ones, zeros, ones, zeros)
        >>> r.shape, u.shape
        (torch.Size([2, 9, 4]), torch.Size([2, 9, 4]))
    """
    checks.check_positive("eps", eps)
    checks.check_floating("x", x, ("B", "N", "Cs"))
    checks.check_floating("weight", weight, ("Ct", x.shape[2]))
    width = weight.shape[0]
    checks.check_norm(
        proj_norm_weight, proj_norm_bias, width, ("proj_norm_weight", "proj_norm_bias")
    )
    checks.check_norm(norm1_weight, norm1_bias, width, ("norm1_weight", "norm1_bias"))
    checks.check_same_device(
        x=x,
        weight=weight,
        proj_norm_weight=proj_norm_weight,
        proj_norm_bias=proj_norm_bias,
        norm1_weight=norm1_weight,
        norm1_bias=norm1_bias,
    )
    parameters = (proj_norm_weight, proj_norm_bias, norm1_weight, norm1_bias)
    cast_by_autocast = support.is_autocast_on(x) and x.dtype != torch.float64
    return two_layer_norms(
        "widelast_projection",
        support.project(x, weight),
        parameters,
        eps=eps,
        residual_dtype=torch.float32 if cast_by_autocast else x.dtype,
    )


def lift_head(
    features: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    teacher: Tensor | None = None,
    *,
    eps: float = 1e-5,
    metric: Metric = "mse",
    grid: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Lift's head: projects the patch tokens to the teacher's width, pools, and compares.

    z = LN(f W^T) ([EM26], Lift); pooled = mean of z over the tokens, the classifier's input;
    loss = `projected_feature_kd`'s distance of z from the teacher's map.

    Args:
        features: (B, N, Cs), the last block's raw patch tokens, floating.
        weight: (Ct, Cs).
        norm_weight, norm_bias: (Ct,).
        teacher: (B, N, Ct), or None (no loss).
        eps, metric, grid: as in `projected_feature_kd`.

    Returns:
        (pooled (B, Ct) in features' dtype, scalar loss or None). B may be 0 without a teacher.

    Raises:
        TypeError: an argument is an integer tensor, or neither tensor nor number.
        ValueError: shapes, devices or the grid don't match, an input is empty, or the teacher
            requires grad.

    Notes:
        f W^T is torch's linear layer, as in `projected_feature_kd`, and is kept for the backward
        pass. For CUDA tensors one Triton kernel computes both results without writing z, and one
        computes the gradient. Other tensors, and patch grids with more than 128 columns, take
        plain torch (`featkd.use_backend`). Results are bitwise repeatable. Double backward
        through the kernels is not supported.

    Examples:
        >>> import torch
        >>> pooled, loss = lift_head(torch.randn(2, 9, 3), torch.randn(4, 3),
        ...                          torch.ones(4), torch.zeros(4))
        >>> pooled.shape, loss
        (torch.Size([2, 4]), None)
    """
    checks.check_metric(metric)
    checks.check_positive("eps", eps)
    checks.check_floating("features", features, ("B", "N", "Cs"))
    batch, tokens, channels = features.shape
    checks.check_floating("weight", weight, ("Ct", channels))
    checks.check_norm(norm_weight, norm_bias, weight.shape[0])
    if teacher is not None or batch:  # the mean over the tokens of no image is an empty map
        checks.check_not_empty("features", features)
    if teacher is not None:
        checks.check_teacher_map(teacher, (batch, tokens, weight.shape[0]))
        checks.warn_of_class_token(metric, grid, tokens)
    checks.check_same_device(
        features=features,
        weight=weight,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        teacher=teacher,
    )
    tensors = (support.project(features, weight), teacher, norm_weight, norm_bias)
    grid = None if teacher is None else checks.resolve_grid(metric, grid, tokens)
    loss, pooled = feature_distance(
        "lift_head", *tensors, eps=eps, grid=grid, pooled_dtype=features.dtype
    )
    return cast(Tensor, pooled), loss


def soft_kd(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor | None,
    *,
    alpha: float,
    tau: float = 1.0,
) -> Tensor:
    """Cross-entropy plus KL divergence at a temperature, weighted as published.

    (1 - alpha) CE(student, target) + alpha tau^2 KL(softmax(teacher/tau) || softmax(student/tau)),
    batch means ([EM26], SoftKD).

    Args:
        student_logits: (B, K), floating.
        teacher_logits: (B, K), floating, without requires_grad; may be None if alpha is 0.
        target: (B,) class indices, int64, each in [0, K); or (B, K) soft labels, floating, with any
            sum; may be None if alpha is 1. The three dtypes may differ.
        alpha: weight of the teacher, from 0 to 1. A term of weight zero is skipped, and its
            tensor is not read.
        tau: temperature, > 0.

    Returns:
        A scalar.

    Raises:
        TypeError: logits are an integer tensor, the target has a wrong dtype, or an argument is
            neither tensor nor number.
        ValueError: shapes or devices don't match, alpha or tau is out of range, the batch is
            empty, the teacher is missing although alpha > 0, the target is missing although
            alpha < 1, or the teacher requires grad.
        RuntimeError: on a CPU, a class index is outside of [0, K) ("index 7 is out of bounds for
            dimension 1 with size 5"); no index is ignored, not even -100. On a GPU a check would
            have to wait for the device: there the loss and the gradient of that row become NaN.

    Notes:
        Computed in float32 (float64 for a float64 student), under autocast too. CUDA tensors take
        one Triton kernel forward and one backward; other tensors take plain torch
        (`featkd.use_backend`). Only the inputs are kept for the backward pass. Results are
        bitwise repeatable. Double backward through the kernels is not supported. Soft labels that
        require grad take plain torch, with a warning. Masked classes (logits of -inf) follow the
        equation in IEEE arithmetic: a finite cross-entropy for class indices, NaN for 0 * inf.

    Examples:
        >>> import torch
        >>> soft_kd(torch.zeros(2, 4), None, torch.tensor([0, 3]), alpha=0.0)  # log 4
        tensor(1.3863)
    """
    checks.check_fraction("alpha", alpha)
    checks.check_positive("tau", tau)
    checks.check_floating("student_logits", student_logits, ("B", "K"))
    checks.check_not_empty("student_logits", student_logits)
    batch, classes = student_logits.shape
    if target is not None:
        checks.check_target("target", target, batch, classes)
    elif alpha < 1:
        raise ValueError(f"target: None, but alpha is {alpha} (only 1 needs no target)")
    if teacher_logits is not None:
        checks.check_floating("teacher_logits", teacher_logits, (batch, classes))
        checks.check_constant("teacher_logits", teacher_logits)
    elif alpha > 0:
        raise ValueError(f"teacher_logits: None, but alpha is {alpha} (only 0 needs no teacher)")
    checks.check_same_device(
        student_logits=student_logits, teacher_logits=teacher_logits, target=target
    )
    return soft_kd_op.soft_kd(student_logits, teacher_logits, target, alpha=alpha, tau=tau)


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Attention that mixes the heads before and after the softmax, as in CaiT.

    With S_h = scale Q_h K_h^T: P_g = softmax over the keys of sum_h pre_gh S_h + pre_bias_g, and
    O_h = (sum_g post_hg P_g + post_bias_h) V_h (Shazeer et al., arXiv 2003.02436 [THA20]; CaiT,
    arXiv 2103.17239).

    Args:
        q, k, v: (B, heads, N, d), floating, of one dtype.
        pre_weight, post_weight: (heads, heads), as timm's proj_l.weight and proj_w.weight.
        pre_bias, post_bias: (heads,).
        scale: factor of the scores, > 0, for example d ** -0.5.

    Returns:
        (B, heads, N, d) in q's dtype; o.transpose(1, 2) is contiguous.

    Raises:
        TypeError: an argument is an integer tensor, or neither tensor nor number.
        ValueError: shapes, dtypes or devices don't match, or an input is empty.

    Notes:
        On a CPU, inference takes the compiled kernel of csrc/, whose blocks of scores stay in the
        cache. If an input requires grad, plain torch runs, with a warning. Tensors on other
        devices take plain torch, which torch.compile can fuse (`featkd.use_backend`).

    Examples:
        >>> import torch
        >>> q, k, v = torch.randn(3, 2, 4, 9, 8)
        >>> mix, bias = torch.eye(4), torch.zeros(4)
        >>> o = talking_heads_attention(q, k, v, mix, bias, mix, bias, scale=8 ** -0.5)
        >>> torch.allclose(
        ...     o, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5
        ... )
        True
    """
    checks.check_positive("scale", scale)
    checks.check_floating("q", q, ("B", "heads", "N", "d"))
    checks.check_not_empty("q", q)
    for name, x in (("k", k), ("v", v)):
        checks.check_floating(name, x, q.shape)
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    heads = q.shape[1]
    parameters = {
        "pre_weight": pre_weight,
        "pre_bias": pre_bias,
        "post_weight": post_weight,
        "post_bias": post_bias,
    }
    for name, x in parameters.items():
        checks.check_floating(name, x, (heads, heads) if name.endswith("weight") else (heads,))
    checks.check_same_device(q=q, k=k, v=v, **parameters)
    return talking_heads_attention_op.talking_heads_attention(
        q, k, v, pre_weight, pre_bias, post_weight, post_bias, scale=scale
    )
