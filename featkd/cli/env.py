"""`featkd env`: print the environment, for bug reports."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from featkd.cli.arguments import Parser, add_json
from featkd.cli.output import write_json

# environment variables that change what featkd does
_SETTINGS = re.compile("FEATKD_|OMP_|CUDA_VISIBLE_DEVICES$|TORCHINDUCTOR_|TRITON_")


def env(words: Sequence[str]) -> int:
    """Run `featkd env` and return the exit code."""
    options = parser().parse_args(words)
    facts = environment_facts()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    write_json(options.json, facts)
    return 0


def environment_facts() -> dict[str, str]:
    """Return versions, devices, backends, the compiled extension and environment variables."""
    import platform
    from importlib import metadata

    import torch

    from featkd.ops import backends, extension
    from featkd.runtime import environment, interrupt

    interrupt.loading_done()
    facts = {**environment.versions(), "commit": environment.commit()}
    if environment.has_changes():
        facts["commit"] += ", with changes"
    facts |= {**environment.machine(), "libc": " ".join(platform.libc_ver()).strip() or "unknown"}
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        facts[f"cuda:{number}"] = f"{name}, compute capability {major}.{minor}"
    facts["cuda of torch"] = torch.version.cuda or "none"
    facts["cudnn"] = str(torch.backends.cudnn.version() or "none")  # type: ignore[no-untyped-call]
    facts["backend"] = backends.wanted_backend()
    found = metadata.distributions()
    dali = (x.version for x in found if (x.name or "").startswith("nvidia-dali"))
    facts["dali"] = next(dali, "not installed")
    why_not = extension.missing()
    facts["csrc"] = why_not or f"loaded from {extension.LIBRARY}"
    if not why_not:
        for device in ("cpu", "cuda"):
            there = extension.has_kernel(extension.PROBE, device)
            facts[f"csrc for {device}"] = "built" if there else "not built"
    return facts | {name: os.environ[name] for name in sorted(os.environ) if _SETTINGS.match(name)}


def parser() -> Parser:
    """Return the parser of `featkd env`."""
    parser = Parser(
        prog="featkd env",
        description="Print versions, devices, backends, the state of the compiled extension csrc "
        "and environment variables, for bug reports.",
        examples=("featkd env", "featkd env --json environment.json"),
    )
    add_json(parser)
    return parser
