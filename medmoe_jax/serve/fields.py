"""The fields of a request to OpenAI's chat completions, and which of them have a meaning here.

Nothing that could change the answer is passed over: a field that the model has no use for is
refused, unless its value is one that changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from medmoe_jax.sampling import Sampling

# Of no effect on an answer: who asks, and how a service of another kind is to treat it.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# What the model cannot do -> the values that do not ask for it.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
MAX_OPTIONS = 16  # each takes the memory of a conversation


class Fault(Exception):
    """What is told to a client.

    Attributes:
      status: of HTTP.
      param: the field that it is about.
      code: for programs.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ImageUrl(_Strict):
    """An image; the vision tower sees the same of it whatever the detail."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Part(_Strict):
    """A piece of a message: the field named like its type."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Part:
        given = [name for name in ("text", "image_url") if getattr(self, name) is not None]
        if given != [self.type]:
            raise ValueError(f"a part of the type {self.type} has the field {self.type} alone")
        return self


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    """Of a role; what else clients repeat of an answer (refusal, annotations, ...) says nothing."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts)]

    @property
    def text(self) -> str:
        """The pieces of text, a line each."""
        return "\n".join(part.text for part in self.content if part.text is not None)

    @property
    def urls(self) -> dict[int, str]:
        """The images by their place in the message."""
        return {i: p.image_url.url for i, p in enumerate(self.content) if p.image_url is not None}


class StreamOptions(_Strict):
    """Whether the number of tokens comes at the end of a stream; `include_obfuscation` is about
    services whose traffic is watched."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _texts(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Body(_Strict):
    """The fields of a request that play a part; the defaults are those of `Sampling`."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = Field(default=Sampling.temperature, le=2)
    top_p: float = Sampling.top_p
    top_k: int = Field(default=Sampling.top_k, lt=1 << 31)
    repetition_penalty: float = Field(default=Sampling.repetition_penalty, le=100)
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_texts), Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool = False
    options: list[str] = Field(default=[], max_length=MAX_OPTIONS)


def parse(content: bytes) -> Body:
    """The fields of a request. Raises Fault where one is wrong, naming it."""
    try:
        fields = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise Fault(f"the body of the request is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Fault("the body of the request is no JSON object; send model and messages")
    given = {k: v for k, v in fields.items() if v is not None and k not in IGNORED}
    for name, harmless in UNSUPPORTED.items():
        if given.pop(name, harmless[0]) not in harmless:
            raise _unsupported(name)
    try:
        return Body.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise _unsupported(where) from None
        told = first["msg"].removeprefix("Value error, ")
        raise Fault(f"{where}: {told}", param=where) from None


def _unsupported(name: str) -> Fault:
    return Fault(
        f"{name} has no meaning for this model; leave it out",
        param=name,
        code="unsupported_parameter",
    )
