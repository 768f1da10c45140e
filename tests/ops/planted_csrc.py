"""Slips to plant in csrc's sweeps over rows, and a library that holds the sweeps with each of them.

The library registers its operators as `planted_rows::...`, which a package planted under that name
calls; `choose(k)` says which of the sweeps they run: 0 are the true ones, and k has the k-th slip
of each header. Slips of rows.h, which all include, come where the other lists have ended.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import torch

CSRC = Path(__file__).parents[2] / "csrc"
NAME = "planted_rows"
TORCH = Path(torch.__file__).parent
FLAGS = ("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-w")

Slip = tuple[str, str, str]

DISTANCE: list[Slip] = [
    ("dropped row sums", "error + more[i & 1]", "error"),
    ("dropped alternating sums", "even ? mean + alternating : mean", "mean"),
    ("loss without H", "energy_here += error * half", "energy_here += error * error"),
    ("dropped mean(g)", "+ c) - mean - hat * product)", "+ c) - hat * product)"),
    ("dropped mean(g x_hat)", " - hat * product)", ")"),
    ("dropped rstd in the gradient", ") * norm.rstd : g", ") : g"),
    ("gamma's gradient of the last row", "part.load(to_gamma + c) + g * hat", "g * hat"),
    ("beta's gradient of the last row", "part.load(to_beta + c) + g)", "g)"),
    ("bias's gradient of the last row", "part.load(to_bias + c) + d)", "d)"),
    ("dropped bias", "part.load(input + c) + part.load(bias + c)", "part.load(input + c)"),
    ("dropped gamma", "if (NORM) y = y * part", "if (false) y = y * part"),
    ("dropped beta", "if (NORM && norm.beta) y +=", "if (false) y +="),
]
LIFT_HEAD: list[Slip] = [
    ("dropped upstream gradient of the loss", "V slope = half * scale", "V slope = half"),
    ("gradient of the first image's pool", "row / p.source.tokens * n", "0 * row"),
]
ROWS: list[Slip] = [
    ("skipped last channels", "if (c < count) body(Rest", "if (false) body(Rest"),
    ("padding in the variance", "part.keep(part.load(x + c) - mean)", "part.load(x + c) - mean"),
    ("dropped epsilon", "+ Real(eps))", "+ Real(1e-3))"),
]
SOFT: list[Slip] = [
    ("missing tau in the softmaxes", "SHARED ? at_1 : at_1 * warmth", "at_1"),
    ("missing tau^2", "p.alpha * p.tau * p.tau * (", "p.alpha * ("),
    ("missing tau in the student's gradient", "by_s = Real(p.alpha * p.tau", "by_s = Real(p.alpha"),
    ("missing tau in the teacher's", "by_t = Real(p.alpha * p.tau", "by_t = Real(p.alpha"),
    ("dropped partition function", " - mass * __builtin_log(z_1)", ""),
    ("dropped partition functions of KL", " + __builtin_log(z_s / z_t)", ""),
    ("dropped label", "slope[label] -= hard", "slope[label] -= 0"),
    ("dropped soft label", "d -= part.load(soft + c) * hard", "d -= 0 * part.load(soft + c)"),
    ("soft labels taken to sum to one", "soft ? labels.total() : 1", "1"),
    ("dropped share of KL", "(SHARED ? p.alpha : 0)", "0"),
    ("padding in the softmax", "e = part.keep(exponential(at_1))", "e = exponential(at_1)"),
    ("padding in KL", "part.keep(e * (guided - at))", "e * (guided - at) + 1"),
    ("dropped maximum", "part.load(logits + c) - top", "part.load(logits + c)"),
]
NORMS: list[Slip] = [
    (
        "dropped beta",
        "hat * part.load(gamma + c) + part.load(beta + c)",
        "hat * part.load(gamma + c)",
    ),
    ("dropped mean of u's gradient", ") - mean - hat_r", ") - hat_r"),
    ("dropped mean(g x_hat) of u's", " - hat_r * mean_product)", ")"),
    ("dropped gradient of r", "if (dr) d +=", "if (false) d +="),
    ("dropped mean of r's gradient", " - mean_h - hat", " - hat"),
    ("dropped mean(g x_hat) of r's", " - hat * mean_product_h)", ")"),
    ("gamma_1's gradient of the last row", "part.load(to_gamma_1 + c) + given", "given"),
    ("beta_1's gradient of the last row", "part.load(to_beta_1 + c) + given)", "given)"),
    ("gamma_p's gradient of the last row", "part.load(to_gamma_p + c) + d", "d"),
    ("beta_p's gradient of the last row", "part.load(to_beta_p + c) + d)", "d)"),
    ("statistics of the other norm", "{of_h.mean, of_h.rstd, of_r", "{of_r.mean, of_r.rstd, of_h"),
    ("dropped gamma_p in r", "hat * part.load(gamma_p + c) + part", "hat + part"),
]
HEADS: list[Slip] = [
    ("mixed by the other head's weights", "[(g + i) * p.heads + h]", "[h * p.heads + g + i]"),
    ("dropped bias", "(bias ? bias[g + i] : 0)", "0 * (bias ? bias[g + i] : 0)"),
    ("dropped maximum", "part.load(of + c) - top", "part.load(of + c)"),
    ("padding in the softmax", "-Real(__builtin_inff());  // exp", "0;  // exp"),
    ("skipped last keys", "if (c == p.keys) return;", "return;"),
    ("skipped short rows", "Rest<Real>{int(p.keys)}", "Rest<Real>{0}"),
    ("softmax not divided", "[h * heads + g] / total", "[h * heads + g]"),
    ("divided by another head's sum", "p.post)[h * heads + g]", "p.post)[g * heads + h]"),
    ("skipped last heads", "for (; g < p.heads; g++)", "for (; false; g++)"),
    ("the first query's scores", "+ query * n;", "+ 0 * query;"),
]

# of each op, at the places of the library: (number, slip)
_distance = [*DISTANCE, *LIFT_HEAD]
_shared = max(len(_distance), len(SOFT), len(NORMS), len(HEADS))
HEADERS = {
    "distance.h": _distance,
    "soft_kd.h": SOFT,
    "two_norms.h": NORMS,
    "heads.h": HEADS,
    "rows.h": [*[("", "", "")] * _shared, *ROWS],
}
SLIPS: dict[str, list[tuple[int, str]]] = {
    "projected_feature_kd": [(k + 1, x[0]) for k, x in enumerate(DISTANCE)]
    + [(_shared + k + 1, x[0]) for k, x in enumerate(ROWS)],
    "lift_head": [(len(DISTANCE) + k + 1, x[0]) for k, x in enumerate(LIFT_HEAD)],
    "soft_kd": [(k + 1, x[0]) for k, x in enumerate(SOFT)],
    "widelast_projection": [(k + 1, x[0]) for k, x in enumerate(NORMS)],
    "talking_heads_attention": [(k + 1, x[0]) for k, x in enumerate(HEADS)],
}


def build(folder: Path) -> Callable[[int], None]:
    """Compile and load the library; returns what chooses among its sweeps."""
    compiler = os.environ.get("CXX", "c++")
    objects: list[Path] = []
    commands: list[list[str]] = []

    def compiled(source: Path, *flags: str) -> None:
        objects.append(source.with_suffix(".o"))
        commands.append([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(objects[-1])])

    sets = list(zip_longest(*HEADERS.values(), fillvalue=("", "", "")))
    for number, slips in enumerate([[("", "", "")] * len(HEADERS), *sets]):
        place = folder / f"slip_{number}"
        place.mkdir()
        for path in [*CSRC.glob("*.h"), CSRC / "rows_isa.cpp"]:
            # float64 alone is run: half of what there is to compile
            text = re.sub(r"HeadRows<float, \w+>", "HeadRows<double, double>", path.read_text())
            text = text.replace("Rows<float", "Rows<double")
            (place / path.name).write_text(text)
        for header, (_, there, slip) in zip(HEADERS, slips, strict=True):
            text = (place / header).read_text()
            assert not there or text.count(there) == 1, f"{header}: stands not once: {there}"
            (place / header).write_text(text.replace(there, slip) if there else text)
        compiled(place / "rows_isa.cpp", f"-DFEATKD_ISA=slip_{number}")
    names = [f"rows_slip_{number}" for number in range(len(sets) + 1)]
    text = (CSRC / "rows_cpu.cpp").read_text()
    start, end = text.index("extern const RowKernels"), text.index("namespace {")
    chooser = (
        f"extern const RowKernels {', '.join(names)};\n"
        f"const RowKernels* all[] = {{{', '.join('&' + name for name in names)}}};\n"
        "int chosen = 0;\n"
        "const RowKernels& row_kernels() { return *all[chosen]; }\n"
        'extern "C" __attribute__((visibility("default"))) void choose(int k) { chosen = k; }\n'
    )
    text = text[:start] + chooser + text[end:]
    # so that a block of a small problem has several rows
    (folder / "rows_cpu.cpp").write_text(text.replace("MOST_BLOCKS", "2"))
    compiled(folder / "rows_cpu.cpp", f"-I{CSRC}")
    text = (CSRC / "rows_bindings.cpp").read_text()
    (folder / "rows_bindings.cpp").write_text(text.replace("IMPL(featkd,", f"IMPL({NAME},"))
    version = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    compiled(folder / "rows_bindings.cpp", f"-I{CSRC}", f"-isystem{TORCH / 'include'}", version)
    with ThreadPoolExecutor(2) as pool:  # the longest, which is the last, first
        list(pool.map(lambda command: subprocess.run(command, check=True), reversed(commands)))
    library = folder / "planted.so"
    link = [compiler, "-shared", "-o", str(library), *map(str, objects)]
    subprocess.run([*link, f"-L{TORCH / 'lib'}", "-ltorch_cpu"], check=True)
    torch.ops.load_library(library)
    choose: Callable[[int], None] = ctypes.CDLL(str(library)).choose
    return choose
