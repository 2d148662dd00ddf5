"""Comments beside fields become their docstrings in the API reference.

A field of a dataclass or a named tuple is described by the comment behind it. mkdocstrings shows
what has a docstring; this extension of its parser, Griffe, makes one of the comment.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Gives attributes of classes the comment behind them as docstring."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any
    ) -> None:
        if not isinstance(node, ast.AnnAssign) or attr.docstring or not attr.parent.is_class:
            return
        last = attr.lines[-1]  # as in `name: int = 0  # what it is`
        comment = last.encode()[node.end_col_offset :].decode().strip()
        if comment.startswith("#"):
            text = comment.lstrip("# ")
            attr.docstring = griffe.Docstring(text, lineno=node.end_lineno, parent=attr)
