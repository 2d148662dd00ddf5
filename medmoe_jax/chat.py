"""A conversation in the terminal: `python -m medmoe_jax.chat --model-path DIR --image FILE`.

A line is a question, or a command:

    /image FILE   show an image with the next question (may be given several times)
    /reset        forget the conversation and its images
    /save FILE    write the conversation as JSON
    /help, /quit

Works piped as well: `echo "Is there a lesion?" | python -m medmoe_jax.chat ...`; the exit status is
then 1 if a line could not be answered.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from medmoe_jax import model as loaded
from medmoe_jax.config import natural
from medmoe_jax.conversation import NOTICE, Chat
from medmoe_jax.data.medical import flags
from medmoe_jax.data.problems import DataError, check_text
from medmoe_jax.model import Model, Reply
from medmoe_jax.sampling import Sampling

HELP = "a question, or /image FILE, /reset, /save FILE, /help, /quit"


def certainty(reply: Reply) -> str:
    """One line on how sure the model is, and what the router takes the images for."""
    line = f"confidence {reply.confidence:.0%}"
    if reply.modality:
        name, share = max(reply.modality.items(), key=lambda item: item[1])
        line += f", modality {name} {share:.0%}"
    if not reply.finished:
        line += ", cut at --max-new-tokens"
    return f"[{line}]"


class Session:
    """Reads lines, writes answers."""

    def __init__(self, model: Model, how: Sampling, out: TextIO) -> None:
        self.chat: Chat = model.chat(how)
        self.out = out
        self.waiting: list[str] = []  # image files for the next question
        self.history: list[dict[str, Any]] = []
        self.faults = 0

    def line(self, text: str) -> bool:
        """Handles one line; False: the session is over. What goes wrong is said, not raised."""
        word, _, rest = text.strip().partition(" ")
        try:
            check_text(text)
            if word == "/quit":
                return False
            if word == "/image":
                self.show(rest.strip())
            elif word == "/reset":
                self.chat.reset()
                self.waiting, self.history = [], []
                self.say("the conversation is forgotten")
            elif word == "/save":
                self.save(rest.strip())
            elif word == "/help":
                self.say(HELP)
            elif word.startswith("/"):
                raise DataError(f"unknown command {word}; type {HELP}")
            elif word:
                self.ask(text.strip())
        except (DataError, OSError) as error:
            self.faults += 1
            self.say(f"error: {error}")
        return True

    def say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self.out, flush=True)

    def show(self, file: str) -> None:
        """Reads an image for the next question."""
        if not file:
            raise DataError("/image needs a file")
        self.chat.model.pixels(file)  # what is wrong with it is said now
        self.waiting.append(file)
        self.say(f"{file} is shown with the next question")

    def ask(self, question: str) -> None:
        """Streams the answer."""
        for piece in self.chat.stream(question, list(self.waiting)):
            self.say(piece, end="")
        reply = self.chat.reply
        assert reply is not None
        self.say(f"\n{certainty(reply)}")
        for warning in reply.warnings:
            self.say(f"warning: {warning}")
        self.history.append(
            {
                "images": self.waiting,
                "question": question,
                "answer": reply.text,
                "confidence": reply.confidence,
                "router": reply.modality,
                **({"warnings": list(reply.warnings)} if reply.warnings else {}),
            }
        )
        self.waiting = []

    def save(self, file: str) -> None:
        """Writes the turns since the last reset."""
        if not file:
            raise DataError("/save needs a file")
        Path(file).write_text(
            json.dumps({"notice": NOTICE, "turns": self.history}, indent=1, ensure_ascii=False)
            + "\n",
            encoding="utf-8",
        )
        self.say(f"{len(self.history)} turns in {file}")


def run(session: Session, lines: Iterable[str]) -> int:
    """Handles all lines; returns the number of those that failed."""
    for line in lines:
        if not session.line(line):
            break
    return session.faults


def typed() -> Iterable[str]:
    """Lines from the keyboard until the end of input."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    loaded.add_flags(parser)
    add("--image", action="append", default=[], help="shown with the first question; repeatable")
    add("--temperature", type=float, default=0.0, help="0 = the likeliest answer")
    add("--top-p", type=float, default=1.0)
    add("--max-new-tokens", type=int, default=256)
    add("--seed", type=natural, default=0)
    add("--mesh", type=loaded.mesh_sizes, help="DATA,FSDP,EXPERT devices, as 1,2,4; default: one")
    flags.add_view(parser)
    args = parser.parse_args()
    print(NOTICE, flush=True)
    try:
        how = Sampling(
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
        )
        model = loaded.load(
            args.model_path,
            template=args.conv_mode,
            dtype=args.dtype,
            view=flags.view(args),
            bits=args.bits,
            mesh=args.mesh,
        )
        session = Session(model, how, sys.stdout)
        for file in args.image:
            session.show(file)
    except loaded.FAULTS as error:
        sys.exit(f"error: {error}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is one fault
    by_hand = sys.stdin.isatty()
    faults = run(session, typed() if by_hand else sys.stdin)
    sys.exit(1 if faults and not by_hand else 0)


if __name__ == "__main__":
    main()
