"""Command line: `python -m medmoe_jax.serve --model-path DIR`; stops on SIGTERM or Ctrl-C when what
was asked is answered."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

from medmoe_jax import compilation
from medmoe_jax import model as loaded
from medmoe_jax.conversation import NOTICE
from medmoe_jax.data.medical import flags
from medmoe_jax.model import Model, Request

KEY = "MEDMOE_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def positive(text: str) -> int:
    """A whole number of 1 or more: a type of `argparse`."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1; give 1 or more")
    return number


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m medmoe_jax.serve",
        description="Answers clients of OpenAI's chat completions. Not for clinical use.",
    )
    add = parser.add_argument
    loaded.add_flags(parser)
    add("--served-name", default="", help="of the model; default: the name of its folder")
    add("--host", default="127.0.0.1", help="address to listen at; default: this machine alone")
    add("--port", type=int, default=8000, help="0 = any free one, which is then told")
    add("--api-key", default="", help=f"that clients must send; default: the variable {KEY}")
    add("--batch", type=positive, default=8, help="requests answered at once")
    add("--waiting", type=positive, default=64, help="requests that may wait behind them")
    add("--max-body", type=positive, default=32, help="of one request, in MiB")
    add("--max-images", type=positive, default=4, help="of one conversation")
    add("--max-pixels", type=positive, default=25_000_000, help="of one image")
    add("--patience", type=positive, default=60, help="seconds to finish in after SIGTERM")
    add("--warm-up", action="store_true", help="compile for one image before the first request")
    add("--mesh", type=loaded.mesh_sizes, help="DATA,FSDP,EXPERT devices, as 1,2,4; default: one")
    compilation.add_flag(parser)
    flags.add_view(parser)
    return parser


def warm_up(model: Model, rows: int) -> None:
    """Asks about an image in a batch of each size, so that its programs are compiled."""
    size = model.spec.crop
    request = Request("Is there a lesion?", np.zeros((1, size, size, 3), np.uint8))
    for many in sorted({1, rows}):
        start = time.monotonic()
        model.answer([request] * many, rows=many)
        print(f"warm for {many} at once after {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    args = arguments().parse_args()
    try:
        import uvicorn

        from medmoe_jax.serve import app, messages
    except ImportError as error:
        sys.exit(f"error: the server needs {error.name}: pip install 'medmoe_jax[serve]'")
    print(NOTICE, flush=True)
    folder: Path = args.model_path
    settings = app.Settings(
        name=args.served_name or folder.resolve().name,
        key=args.api_key or os.environ.get(KEY, ""),
        rows=args.batch,
        waiting=args.waiting,
        limits=messages.Limits(args.max_body << 20, args.max_images, args.max_pixels),
    )
    if not settings.key and args.host not in LOCAL:
        print(f"warning: anyone who reaches {args.host} may ask; set {KEY}", file=sys.stderr)
    try:
        compilation.keep(args.compilation_cache)
        model = loaded.load(
            folder,
            template=args.conv_mode,
            dtype=args.dtype,
            view=flags.view(args),
            bits=args.bits,
            mesh=args.mesh,
        )
    except loaded.FAULTS as error:
        sys.exit(f"error: {error}")
    if args.warm_up:
        warm_up(model, args.batch)
    uvicorn.run(
        app.build(model, settings),
        host=args.host,
        port=args.port,
        timeout_graceful_shutdown=args.patience,
        server_header=False,
    )


if __name__ == "__main__":
    main()
