"""Turn a conversation with a model into an inference request: a job that is checked before it is stored.

The job runs the inference script of the method version that made the model. If that version has no
inference script and the newest version has one, the newest version is used.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import TrainingType
from app.domain.errors import Conflict, Invalid, InvalidRequest, Violation
from app.domain.kinds import Stage
from app.domain.lifecycle import STATE_RULES
from app.domain.names import BASE_ENVIRONMENT
from app.domain.rendering import INFERENCE_EXTRAS, filled_arguments, inference_arguments, render_equals
from app.domain.script_parameters import ScriptParameters
from app.domain.stage_calls import StageCall, stage_call
from app.domain.training_types import TYPES
from app.executor.jobs.code_approval import JobCodeApproval
from app.executor.jobs.job_chain import allowed_violations
from app.executor.jobs.request_images import place_image
from app.executor.jobs.submission_inputs import permits, why_not_loaded
from app.executor.runs.job_spec import InferenceRequest, JobSpec, Named, PinnedScript
from app.registry.base_models.findings import LoadingPermission
from app.registry.methods.record import Method, method_of
from app.registry.methods.script_reading import unread_module
from app.registry.methods.wiring import MethodServices
from app.store import jobs as store
from app.store import methods as method_store
from app.store import models
from app.store.allow_lists import of_environments
from app.store.home import Home
from app.store.nodes import all_nodes
from app.store.session import Database
from app.store.tables import BaseModelRow, JobRow, ModelRow

PRIORITY: Final = -10
"""Inference requests start before trainings: a person waits for the answer."""
ROLES: Final = ("system", "user", "assistant")
_OF_TEMPLATE: Final = ("enable_thinking", "chat_template_kwargs")


class OnlineModelNotAsked(Conflict):
    """An online model has no files here. The tool that serves it answers requests."""

    code = "online_model_not_asked"


class ModelCannotBeAsked(Conflict):
    """The method has no inference for models in this state."""

    code = "model_cannot_be_asked"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `images` as the caller gives them, or as paths from the script root."""

    role: str
    content: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The messages of an inference request. `options` are members of `InferenceRequest` that the caller gave."""

    messages: Sequence[Message]
    system_prompt: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Received:
    """A conversation with its images stored as files, and the id of the job that will answer."""

    job_id: str
    conversation: Conversation


class InferenceRequests:
    """Plans the jobs of inference requests."""

    def __init__(
        self,
        *,
        database: Database,
        methods: MethodServices,
        home: Home,
        approval: JobCodeApproval,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._methods = methods
        self._home = home
        self._approval = approval
        self._clock = clock

    @asynccontextmanager
    async def received(self, conversation: Conversation) -> AsyncIterator[Received]:
        """Yield the conversation with its images stored in the job's folder. Remove them if the request is refused.

        Retention removes them with the folder.
        """
        job_id = str(uuid4())
        folder = self._home.runs / job_id
        if not any(message.images for message in conversation.messages):
            yield Received(job_id, conversation)
            return
        try:
            messages = await asyncio.to_thread(_with_images, conversation.messages, self._home, folder / "pictures")
            yield Received(job_id, replace(conversation, messages=messages))
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise

    async def plan(self, model: str, received: Received, *, submits: bool = True) -> JobRow:
        """Return the job to insert. Raise if the model cannot answer.

        `submits`: it is to be inserted, so its code has to be approved, or waits for a review from now on.
        """
        request = inference_request_of(received.conversation, session_id=received.job_id)
        async with self._database.reading() as session:
            row = await models.get_model(session, model)
            stage = _inference_stage(row)
            _check_vision_support(received.conversation, row)
            method = await self._method_with_inference(session, row, stage)
            base = await session.get(BaseModelRow, row.base_model_id)
        allowed = LoadingPermission.of(base)
        spec = await self._spec(row, method, stage, request, allowed)
        asked = spec.permits is not None
        if asked and (wrong := await asyncio.to_thread(why_not_loaded, row, allowed, home=self._home, at="{model}")):
            raise InvalidRequest(wrong)
        job = store.new_job(
            id=received.job_id,
            kind=stage,
            name=row.name,
            environment=method.environment(stage) or BASE_ENVIRONMENT,
            launch=spec.document(),
            now=self._clock(),
            priority=PRIORITY,
            method_id=method.id,
            method_name=method.name,
            method_version=method.version,
            base_model_id=row.base_model_id,
            model_id=row.id,
        )
        job.project_id = self._database.scope.project or row.project_id
        async with self._database.reading() as session:
            rules, nodes = await of_environments(session), await all_nodes(session)
        if refused := allowed_violations([job], rules, nodes, at="/model"):
            raise InvalidRequest(refused)
        if submits:

            async def record(_session: AsyncSession) -> Method:
                return method

            await self._approval.require([job], method, at="/model", record=record)
        return job

    async def _method_with_inference(self, session: AsyncSession, model: ModelRow, stage: Stage) -> Method:
        row = await method_store.get_even_deleted(session, model.method_id)
        for number in dict.fromkeys((model.method_version, row.version)):
            method = method_of(row, await method_store.get_version(session, row, number))
            runs = stage in method.files or stage_call(method.definition, stage).module is not None
            if method.definition.switched_on(model.state) and runs:
                return method
        raise ModelCannotBeAsked(model=model.name, state=model.state, method=row.name)

    async def _spec(
        self, model: ModelRow, method: Method, stage: Stage, request: InferenceRequest, allowed: LoadingPermission
    ) -> JobSpec:
        call, pinned = stage_call(method.definition, stage), method.files.get(stage)
        if pinned is not None:
            script = await asyncio.to_thread(self._methods.reader.pinned, pinned)
        else:
            script = unread_module(call.module or "")
        _check_options(request, script, call)
        return JobSpec(
            training_type=model.training_type,
            technique=method.definition.technique,
            script=None if pinned is None else PinnedScript(**asdict(pinned)),
            call=call,
            declared=script.declared_names,
            declared_only=method.definition.arguments.declared_only or script.refuses_unknown,
            withheld=_withheld(script, stage, model.training_type),
            false_as=method.definition.arguments.false_as,
            forms=script.forms,
            base_model=Named(id=model.base_model_id, name=model.base_model_name, path=model.base_model_path),
            permits=permits(method, stage, allowed),
            question=request,
        )


def _withheld(script: ScriptParameters, stage: Stage, training_type: str) -> tuple[str, ...]:
    """Return the arguments that the script would take for abbreviations of its own, or may end at."""
    names = filled_arguments(stage, TYPES[TrainingType(training_type)].inference_form)
    return tuple(name for name in names if script.longer_names(name) or name in _untaken_extras(script))


def _untaken_extras(script: ScriptParameters) -> tuple[str, ...]:
    """Return the arguments beyond the contract's that the script neither declares nor is known to ignore."""
    if script.accepts_unknown:
        return ()
    return tuple(name for name in INFERENCE_EXTRAS if name not in script.declared_names)


def _check_options(request: InferenceRequest, script: ScriptParameters, call: StageCall) -> None:
    """Raise `InvalidRequest` for what the script would not see: the answer would be another than was asked for.

    The platform's other values are for scripts that tolerate them; a strict one is told what is asked of it, and so is
    one whose arguments the method says.
    """
    if script.refuses_unknown or call.is_explicit:
        usual = {name: field.default for name, field in InferenceRequest.model_fields.items()}
        asked = [name for name in usual if name != "session_id" and getattr(request, name) not in (usual[name], ())]
    else:
        sure = not script.partly_read or _untaken_extras(script)
        asked = [name for name in _OF_TEMPLATE if getattr(request, name) is not None] if sure else []
    taken = call.platform_values if call.is_explicit else script.declared_names
    missing = [name for name in asked if name not in taken]
    if missing:
        at = {"prompt": "/messages", "history": "/messages"}
        raise InvalidRequest(
            [Violation(at.get(name, f"/{name}"), "option_not_taken", {"script": script.filename}) for name in missing]
        )


def inference_request_of(conversation: Conversation, *, session_id: str) -> InferenceRequest:
    """Build the inference request of a conversation. Raise `InvalidRequest` for wrong order, roles or length."""
    if wrong := list(_violations(conversation.messages)):
        raise InvalidRequest(wrong)
    turns = [_turn(message) for message in conversation.messages]
    if conversation.system_prompt:
        # scripts of the platform read the history only, once there is one
        turns.insert(0, {"role": "system", "content": conversation.system_prompt})
    request = InferenceRequest(
        prompt=conversation.messages[-1].content,
        history=tuple(turns),
        session_id=session_id,
        system_prompt=conversation.system_prompt,
        **conversation.options,
    )
    _check_length(request)
    return request


def _turn(message: Message) -> dict[str, Any]:
    images = {"images": [{"data": path} for path in message.images]} if message.images else {}
    return {"role": message.role, "content": message.content, **images}


def _with_images(messages: Sequence[Message], home: Home, folder: Path) -> list[Message]:
    """Store the images and replace them by paths. Raise all violations at once."""
    found: list[Violation] = []
    placed = []
    for index, message in enumerate(messages):
        paths = []
        for number, data in enumerate(message.images):
            pointer = f"/messages/{index}/images/{number}/data"
            try:
                paths.append(place_image(data, pointer, home=home, kept_as=folder / f"{index}-{number}"))
            except Invalid as error:
                found += error.violations()
        placed.append(replace(message, images=tuple(paths)))
    if found:
        raise InvalidRequest(found)
    return placed


def _check_vision_support(conversation: Conversation, model: ModelRow) -> None:
    """Raise `InvalidRequest` if the model accepts no images."""
    if TYPES[model.training_type].accepts_images:
        return
    given = [index for index, message in enumerate(conversation.messages) if message.images]
    if given:
        params = {"model": model.name, "type": model.training_type}
        raise InvalidRequest([Violation(f"/messages/{index}/images", "pictures_not_taken", params) for index in given])


def _violations(messages: Sequence[Message]) -> list[Violation]:
    if not messages:
        return [Violation("/messages", "messages_needed", {})]
    found = [
        Violation(f"/messages/{index}/role", "unknown_role", {"role": message.role, "roles": ", ".join(ROLES)})
        for index, message in enumerate(messages)
        if message.role not in ROLES
    ]
    last = len(messages) - 1
    if messages[last].role in ROLES and messages[last].role != "user":
        found.append(Violation(f"/messages/{last}/role", "last_message_not_user", {}))
    elif not messages[last].content.strip():
        found.append(Violation(f"/messages/{last}/content", "question_empty", {}))
    return found


def _check_length(request: InferenceRequest) -> None:
    """Raise `ArgumentTooLong` if the operating system would refuse the arguments at the start of the script."""
    texts = request.model_dump(
        include={"prompt", "history", "session_id", "system_prompt", "template", "chat_template_kwargs"}
    )
    render_equals(inference_arguments(model_id="", model_name="", base_model_path="", **texts))


def _inference_stage(model: ModelRow) -> Stage:
    stage = STATE_RULES[model.state].inference
    if stage is None or model.path is None:
        raise OnlineModelNotAsked(model=model.name)
    return stage
