"""`longlive doctor`: what works on this machine, found by doing it, and why the rest does not.

Every row is one *check*: a function that does the thing (imports the package, multiplies the matrices, encodes three
frames) and returns a line about it, or raises. A raised exception becomes a row that says "no" and gives the reason, so
one broken part never hides the others; the exit code is 0 whatever was found. Nothing is concluded from version numbers
or availability flags alone: they are wrong in both directions (a package may be installed whose shared libraries are
not, and raise anything at all when imported).
"""

import argparse
import contextlib
import importlib
import json
import logging
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from longlive import __version__
from longlive.doctor import compute, packages, video
from longlive.doctor.check import Check, Finding

_SUBCOMMANDS = {
    "plan": "longlive.doctor.plan_report",
    "precision": "longlive.doctor.precision",
    "run": "longlive.doctor.run_report",
    "weights": "longlive.doctor.weights",
}


def report() -> Iterator[Finding]:
    """Run every check, in the order in which they are printed; a first compile alone can take half a minute."""
    for check in checks():
        yield check.run()


def checks() -> list[Check]:
    """Every check, for the best device of this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        Check("versions", "python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        Check("versions", "longlive", lambda: __version__),
    ]
    found += [
        Check("versions", name, partial(packages.probe_package, name, module))
        for name, module in packages.PACKAGES.items()
    ]
    found += [
        Check("extras", name, partial(packages.probe_package, name, module, extra))
        for name, (module, extra) in packages.EXTRAS.items()
    ]
    found += [
        Check("devices", "cpu", compute.probe_cpu),
        Check("devices", "cuda", compute.probe_cuda),
        Check("devices", "nccl", compute.probe_nccl),
    ]
    found += [
        Check("devices", f"cuda:{index}", partial(compute.probe_cuda_device, index))
        for index in range(torch.cuda.device_count())
    ]
    found += [
        Check("precisions", "fp32", partial(compute.probe_matmul, torch.float32, device)),
        Check("precisions", "bf16", partial(compute.probe_matmul, torch.bfloat16, device)),
        Check("precisions", "fp8", partial(compute.probe_fp8, device)),
        Check("precisions", "nvfp4", partial(compute.probe_nvfp4, device)),
    ]
    found += [
        Check("kernels", f"SDPA {name}", partial(compute.probe_sdpa, backend, device))
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("memory efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    ]
    found += [
        Check("kernels", "FlexAttention forward", partial(compute.probe_flex_attention, device, backward=False)),
        Check("kernels", "FlexAttention backward", partial(compute.probe_flex_attention, device, backward=True)),
        Check("kernels", "torch.compile", partial(compute.probe_compile, device)),
    ]
    for codec in video.ENCODERS:
        found.append(Check("video codecs", f"encode {codec}", partial(video.probe_encode, codec)))
        found.append(Check("video codecs", f"decode {codec}", partial(video.probe_decode, codec)))
    found.append(Check("video codecs", "decode with decord", video.probe_decord))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report as tables, or with `--json` as a list of objects; returns 0. `plan ...`,
    `precision ...`, `run ...` and `weights ...` are other commands, each with a file of its own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _SUBCOMMANDS:
        with _quiet_logs():
            return int(importlib.import_module(_SUBCOMMANDS[arguments[0]]).main(arguments[1:]))
    parser = argparse.ArgumentParser(
        prog="longlive doctor",
        description="What works on this machine, and why not. What a training run takes: longlive doctor plan --help. "
        "What a precision does to a network: longlive doctor precision --help. What became of a run: longlive doctor "
        "run --help. What a download holds: longlive doctor weights --help",
    )
    parser.add_argument("--json", action="store_true", help="print a list of {group, name, works, detail}")
    options = parser.parse_args(arguments)
    with _quiet_logs():
        if options.json:
            print(json.dumps([asdict(finding) for finding in report()], indent=2))
        else:
            _print_tables()
    return 0


def _print_tables() -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "works", "detail"):
        table.add_column(heading, no_wrap=heading == "works")
    group = None
    all_checks = checks()
    with Console(stderr=True).status("checking") as status:
        for check in all_checks:
            status.update(f"checking {check.name}")
            finding = check.run()
            if finding.group != group:
                group = finding.group
                table.add_row(Text(group, style="bold"))
            mark = Text("yes", style="green") if finding.works else Text("no", style="red")
            table.add_row(f"  {finding.name}", mark, Text(finding.detail))
    console.print(table)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Packages log warnings while they are imported; what is wrong with them is said in the report."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
