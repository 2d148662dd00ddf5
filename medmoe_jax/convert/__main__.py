"""Command line of the conversion: `python -m medmoe_jax.convert {to-jax,to-torch,to-peft,...}`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from medmoe_jax.checkpoint import CheckpointError
from medmoe_jax.config import ConfigError, natural
from medmoe_jax.convert import ConversionError, peft, to_jax, to_torch
from medmoe_jax.convert.to_torch import LAYOUTS
from medmoe_jax.convert.torch_files import FLOATS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 with a message on stderr."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "check":
            # it runs the model, which the other two commands do without
            from medmoe_jax.convert import check

            return check.main(args)
        if args.command == "to-jax":
            report = to_jax(
                args.src,
                args.dst,
                vision=args.vision,
                llm=args.llm,
                projector=args.projector,
                router=args.router,
                tokenizer=args.tokenizer,
                seed=args.seed,
            )
        elif args.command == "to-peft":
            report = peft.to_peft(args.src, args.dst)
        elif args.command == "from-peft":
            report = peft.from_peft(args.src, args.dst, args.base)
        else:
            report = to_torch(args.src, args.dst, layout=args.layout, dtype=args.dtype)
    except (ConversionError, CheckpointError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m medmoe_jax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    jax = commands.add_parser("to-jax", help="PyTorch files to a model folder")
    jax.add_argument(
        "src",
        help="official Med-MoE folder (stage 1, 2 or 3), Hugging Face Phi, StableLM-2 or CLIP "
        "folder, or router .pth",
    )
    jax.add_argument("dst", help="model folder to write")
    jax.add_argument("--vision", help="CLIP folder, where the one that config.json names is absent")
    jax.add_argument("--llm", help="base language model, for a stage-1 folder")
    jax.add_argument("--projector", help="mm_projector.bin or a stage-1 folder")
    jax.add_argument(
        "--router", help="router .pth, kept beside a dense model, put into a MoE model"
    )
    jax.add_argument("--tokenizer", help="folder with tokenizer files")
    jax.add_argument("--seed", type=natural, default=0, help="of a projector that no file holds")
    torch = commands.add_parser("to-torch", help="a model folder to PyTorch files")
    torch.add_argument("src", help="model folder")
    torch.add_argument("dst", help="folder to write")
    torch.add_argument(
        "--layout", choices=LAYOUTS, help="default: official where the model is whole"
    )
    torch.add_argument("--dtype", choices=FLOATS, help="of all weights; default: their own")
    export = commands.add_parser("to-peft", help="adapters to an adapter folder of peft")
    export.add_argument("src", help="model folder of a run with config.lora.rank")
    export.add_argument("dst", help="folder to write")
    adapters = commands.add_parser("from-peft", help="an adapter folder of peft to adapters")
    adapters.add_argument("src", help="folder with adapter_config.json")
    adapters.add_argument("dst", help="model folder to write")
    adapters.add_argument("--base", required=True, help="model folder that they belong to")
    check = commands.add_parser("check", help="compare the model with recorded activations")
    check.add_argument("src", help="PyTorch folder or model folder")
    check.add_argument("--io", required=True, help="activation file (.safetensors)")
    check.add_argument("--vision", help="CLIP folder, where a PyTorch folder lacks it")
    check.add_argument("--atol", type=float, default=1e-4, help="largest absolute difference")
    return parser


if __name__ == "__main__":
    sys.exit(main())
