"""`python -m p3d_kernels COMMAND`; each command's module is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys

# Each names a module of this package with `add_arguments(parser)` and `main(args) -> exit code`.
COMMANDS = {
    "info": "versions, card, backends, and why a part is missing",
    "demo": "a real video through P3D ResNet, plain PyTorch beside these kernels",
    "bench": "time one's own shapes against PyTorch",
    "features": "videos to pool5 vectors",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m p3d_kernels", description="Kernels for pseudo-3-D video networks.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if argv[:1] == [name]:
            module = importlib.import_module(f"p3d_kernels.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
