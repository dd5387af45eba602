"""Request and response shapes of inference requests."""

from typing import Annotated, Any

from pydantic import Field

from app.api.schemas.common import JOB_ID, RequestBody
from app.domain.values import Value
from app.executor.jobs.inference_requests import Conversation, Message
from app.executor.runs.inference_protocol import FinishReason

MAX_MESSAGES = 2_000
MAX_IMAGES = 100


class ChatImage(RequestBody):
    """A picture that a turn is about."""

    data: str = Field(
        description="Path of the picture, relative to DEEPE_HOME, in `multimodal/`, `images/` or `datasets/`; or the "
        "picture itself as a data URL (`data:image/png;base64,...`), which is kept with the job.",
        examples=["multimodal/label.png"],
    )


class ChatMessage(RequestBody):
    """One turn of the conversation."""

    role: str = Field(description="`system`, `user` or `assistant`.", examples=["user"])
    content: str = Field(examples=["Which is larger, 3 or 8?"])
    images: Annotated[
        list[ChatImage], Field(max_length=MAX_IMAGES, description="Pictures, for vision-language models.")
    ] = []


class ChatRequest(RequestBody):
    """The messages of a conversation, the user's latest last. Absent options have the platform's defaults."""

    messages: Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)]
    system_prompt: str | None = Field(default=None, description="Instructions before the conversation.")
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000, description="Most tokens of the answer.")
    max_context_tokens: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Most tokens of the conversation; the oldest turns are left out."
    )
    temperature: float | None = Field(default=None, ge=0, le=10, description="0: always the most likely answer.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    template: str | None = Field(default=None, description="Chat template, for scripts that take one.")
    enable_thinking: bool | None = Field(
        default=None,
        description="Whether the answer begins with reasoning, for templates that know it. Default: as in training.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Arguments of the model's chat template. Default: those of the training."
    )
    negative_prompt: str | None = Field(
        default=None, max_length=10_000, description="Image models: what the image must not show."
    )
    batch_size: int | None = Field(default=None, ge=1, le=64, description="Image models: number of images.")
    aspect_ratio: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]?:[1-9][0-9]?$",
        description="Image models: width and height, such as `16:9`.",
        examples=["1:1"],
    )
    stream: bool | None = Field(
        default=None,
        description="False: the whole answer as one JSON document. Default: events, unless `Accept` wants JSON only.",
    )

    def conversation(self) -> Conversation:
        """Return what the executor takes."""
        given = {
            "max_length": self.max_tokens,
            "max_context_tokens": self.max_context_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "template": self.template,
            "enable_thinking": self.enable_thinking,
            "chat_template_kwargs": self.chat_template_kwargs,
            "negative_prompt": self.negative_prompt,
            "batch_size": self.batch_size,
            "aspect_ratio": self.aspect_ratio,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        messages = [
            Message(role=message.role, content=message.content, images=tuple(image.data for image in message.images))
            for message in self.messages
        ]
        return Conversation(messages=messages, system_prompt=self.system_prompt, options=options)


class ChatEnd(Value):
    """The end of the answer (the event `done`)."""

    finish_reason: FinishReason
    job: str = Field(description="Id of the job that answered; its log says more.", examples=[JOB_ID])
    error: str | None = Field(description="What the script said when `finish_reason` is `error`.")
    reason_detail: str | None = Field(description="Why the job ended when it did not succeed, and what to do.")


class ChatAnswer(ChatEnd):
    """The complete answer."""

    text: str = Field(examples=["8 is larger."])
    images: list[str] = Field(
        description="Addresses of the pictures, if the model generates images.", examples=[[f"/images/{JOB_ID}.png"]]
    )
