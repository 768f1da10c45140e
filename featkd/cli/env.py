"""`featkd env`: print the environment, for bug reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from featkd.cli.arguments import Parser, add_json, check_folders


def env(words: Sequence[str]) -> int:
    """Run `featkd env` and return the exit code."""
    options = parser().parse_args(words)
    check_folders(options, ("json",))
    facts = environment_facts()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    if options.json is not None:
        from featkd.runtime.files import atomic_write

        with atomic_write(Path(options.json)) as file:
            file.write(json.dumps(facts, indent=2).encode() + b"\n")
    return 0


def environment_facts() -> dict[str, str]:
    """Return versions, devices, backends and the state of the compiled extension."""
    from importlib.util import find_spec

    import torch

    from featkd.ops import backends, extension
    from featkd.runtime import environment, interrupt

    interrupt.loading_done()
    facts = {**environment.versions(), "commit": environment.commit(), **environment.machine()}
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        facts[f"cuda:{number}"] = f"{name}, compute capability {major}.{minor}"
    facts["cuda of torch"] = torch.version.cuda or "none"
    facts["backend"] = backends.wanted_backend()
    facts["dali"] = "installed" if find_spec("nvidia.dali") is not None else "not installed"
    why_not = extension.missing()
    facts["csrc"] = why_not or f"loaded from {extension.LIBRARY}"
    if not why_not:
        for device in ("cpu", "cuda"):
            there = extension.has_kernel(extension.PROBE, device)
            facts[f"csrc for {device}"] = "built" if there else "not built"
    return facts


def parser() -> Parser:
    """Return the parser of `featkd env`."""
    parser = Parser(
        prog="featkd env",
        description="Print versions, devices, backends and the state of the compiled extension "
        "csrc, for bug reports.",
        examples=("featkd env", "featkd env --json environment.json"),
    )
    add_json(parser)
    return parser
