"""Small kernels written in PTX, so that the tests of the checks need no nvcc."""

from __future__ import annotations

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = (
    ".reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<20>;\n.reg .f32 %f<20>;\n"
    ".reg .b64 %rd<20>;\n.reg .f64 %d<9>;\n"
)


def kernel(
    body: str,
    parameters: str = ".param .u64 a",
    shared: int = 0,
    declarations: str = "",
    target: str = "sm_80",
    name: str = "k",
) -> str:
    """Returns a PTX file with one kernel.

    At the start of `body`, %r0 is the thread, %r1 four times the thread, %rd0 the parameter `a`,
    and %rd1 the address of the thread's element of `a`.
    """
    block = f".shared .align 16 .b8 s[{shared}];\n" if shared else ""
    start = (
        "mov.u32 %r0, %tid.x;\nshl.b32 %r1, %r0, 2;\nld.param.u64 %rd0, [a];\n"
        "mul.wide.u32 %rd1, %r0, 4;\nadd.s64 %rd1, %rd0, %rd1;\n"
    )
    text = f"{declarations}\n.visible .entry {name}({parameters})\n{{\n{REGISTERS}{block}{start}"
    return HEAD.replace("sm_80", target) + f"{text}{body}\nret;\n}}\n"


def together(*files: str, target: str = "sm_80") -> str:
    """Joins files to one, which is compiled once."""
    bodies = (file.partition(".address_size 64\n")[2] for file in files)
    return HEAD.replace("sm_80", target) + "".join(bodies)


# addresses in shared memory: %r2 of the thread's element, %r3 of the element at the opposite end
SHARED = """
mov.u32 %r2, s;
add.u32 %r2, %r2, %r1;
mov.u32 %r3, %ntid.x;
sub.u32 %r3, %r3, %r0;
sub.u32 %r3, %r3, 1;
shl.b32 %r3, %r3, 2;
mov.u32 %r4, s;
add.u32 %r3, %r3, %r4;
"""
