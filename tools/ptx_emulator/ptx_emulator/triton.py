"""Triton kernels: ahead-of-time compilation to PTX, and execution on CPU tensors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from ptx_emulator.emulator import Emulator
from ptx_emulator.reports import Launch
from ptx_emulator.tensor_map import TensorMap

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def _is_descriptor(value: Any) -> bool:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return isinstance(value, TensorDescriptor)


def _expand(name: str, value: Any, layout: dict[str, Any]) -> list[Any]:
    """Returns what a launch passes for a tensor descriptor: tensor map, sizes and strides."""
    if layout["is_im2col"] or layout["fp4_padded"] or value.padding != "zero":
        raise TypeError(f"{name}: only plain tensor descriptors that pad with zeros are supported")
    tensor = torch.as_strided(value.base, value.shape, value.strides)
    swizzle = (0, 32, 64, 128)[layout["swizzle"]]
    tensor_map = TensorMap(tensor, tuple(layout["block_size"]), swizzle)
    return [tensor_map, *value.shape, *value.strides]


def _specialise(name: str, value: Any) -> tuple[str, bool]:
    """Returns an argument's Triton type, and True if a launch finds it divisible by 16."""
    if _is_descriptor(value):
        kind = _POINTERS[value.base.dtype].removeprefix("*")
        return f"tensordesc<{kind}[{', '.join(map(str, value.block_shape))}]>", False
    if isinstance(value, torch.Tensor):
        if value.dtype not in _POINTERS:
            raise TypeError(f"{name}: tensors of {value.dtype} are not supported")
        return _POINTERS[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{name}: {value} does not fit 64 bits")
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return kind, value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"{name}: expected a tensor or a number, got {type(value).__name__}")


def _is_constant(parameter: Any, value: Any) -> bool:
    """Checks if a launch compiles the value in: None, and the integer 1 unless told otherwise."""
    if parameter.is_constexpr or value is None:
        return True
    free = parameter.do_not_specialize or parameter.annotation_type
    return type(value) is int and value == 1 and not free


@lru_cache(maxsize=64)
def _emulator(ptx: str, check: bool, count: bool) -> Emulator:
    return Emulator(ptx, check=check, count=count)


def compile_triton(
    kernel: Any,
    arguments: dict[str, Any],
    arch: int,
    num_warps: int,
    num_stages: int,
    enable_fp_fusion: bool = True,
    maxnreg: int | None = None,
) -> Any:
    """Compiles a `triton.jit` function with the specialisation of a launch.

    Args:
        kernel: a `triton.jit` function.
        arguments: value of each parameter.
        arch: compute capability, such as 80 or 90.
        num_warps: as for Triton.
        num_stages: as for Triton.
        enable_fp_fusion: as for Triton.
        maxnreg: as for Triton.

    Returns:
        Triton's compiled kernel; `asm["ptx"]` is its PTX.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if _is_constant(parameter, value):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        kind, divisible = _specialise(parameter.name, value)
        signature[parameter.name] = parameter.annotation_type or kind
        free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if divisible and not free:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": enable_fp_fusion,
        "maxnreg": maxnreg,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def run_triton(
    kernel: Any,
    grid: int | Sequence[int],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = True,
    maxnreg: int | None = None,
    arch: int = 80,
    check: bool = True,
    count: bool = False,
    seed: int = 0,
    time_limit: float = 60.0,
    outputs: Sequence[str] = (),
    **constexprs: Any,
) -> Launch:
    """Compiles a Triton kernel to PTX and executes it on the CPU.

    Args:
        kernel: a `triton.jit` function.
        grid: up to three sizes.
        args: arguments of the kernel: numbers, CPU tensors (read and written in place), and for
            `arch` 90 `TensorDescriptor`s of CPU tensors. They are specialised as in a real
            launch: divisibility by 16 and the integer 1 are compiled in.
        num_warps, num_stages, enable_fp_fusion, maxnreg: as for Triton.
        arch: compute capability, 80 or 90.
        check, count, seed, time_limit: as for `Emulator` and its `launch`.
        outputs: names of tensor arguments that the kernel must fill.
        constexprs: the other arguments by name.

    Raises:
        TypeError: arguments that do not fit the kernel.
        UnsupportedInstruction: the PTX has an instruction that is not implemented.
    """
    if not hasattr(kernel, "params"):
        raise TypeError(f"kernel: expected a triton.jit function, got {type(kernel).__name__}")
    bound = inspect.signature(kernel.fn).bind(*args, **constexprs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    unknown = [
        name
        for name in outputs
        if not isinstance(arguments.get(name), torch.Tensor)
        and not _is_descriptor(arguments.get(name))
    ]
    if unknown:
        raise TypeError(f"outputs: {', '.join(unknown)} are no tensor arguments")
    compiled = compile_triton(
        kernel, arguments, arch, num_warps, num_stages, enable_fp_fusion, maxnreg
    )
    emulator = _emulator(compiled.asm["ptx"], check, count)
    names = [p.name for p in kernel.params if not _is_constant(p, arguments[p.name])]
    # Triton appends two pointers to scratch memory, which supported kernels do not use.
    scratch = compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size
    if scratch:
        raise TypeError(f"kernel: uses {scratch} bytes of scratch memory, which is not supported")
    values: list[Any] = []
    positions: dict[str, int] = {}
    layouts = iter(compiled.metadata.tensordesc_meta or ())
    for name in names:
        positions[name], value = len(values), arguments[name]
        values += _expand(name, value, next(layouts)) if _is_descriptor(value) else [value]
    return emulator.launch(
        compiled.metadata.name,
        [*values, None, None],
        grid,
        32 * num_warps,
        shared_bytes=compiled.metadata.shared,
        seed=seed,
        time_limit=time_limit,
        outputs=[positions[name] for name in outputs],
    )
