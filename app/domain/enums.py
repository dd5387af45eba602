"""The product's words as enums. Values are the wire contract."""

from enum import StrEnum


class TrainingType(StrEnum):
    """Kind of model a method trains (训练类型)."""

    CHAT = "chat"
    EMBEDDING = "embedding"
    VISION_LANGUAGE = "vision-language"
    IMAGE_GENERATION = "image-generation"


class ModelState(StrEnum):
    """State a method's model passes through (定制 → 完整 → 上线)."""

    CUSTOMIZED = "customized"
    COMPLETE = "complete"
    ONLINE = "online"


class JobKind(StrEnum):
    """What a job runs: a stage of a method, the building of an environment or a sample base model, or a preview."""

    TRAINING = "training"
    SAVING = "saving"
    INFERENCE_CUSTOMIZED = "inference-customized"
    INFERENCE_COMPLETE = "inference-complete"
    DEPLOYMENT = "deployment"
    ENVIRONMENT = "environment"
    BASE_MODEL = "base-model"
    PREVIEW = "preview"


class JobStatus(StrEnum):
    """State of a job; the allowed transitions stand in `app.domain.transitions`."""

    QUEUED = "queued"
    LAUNCHING = "launching"
    RUNNING = "running"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class EndReason(StrEnum):
    """Why an attempt or job ended. Every terminal state has one, `completed` included."""

    COMPLETED = "completed"
    ALREADY_SAVED = "already_saved"
    EXIT_CODE = "exit_code"
    SIGNAL = "signal"
    OUT_OF_MEMORY = "out_of_memory"
    CUDA_OUT_OF_MEMORY = "cuda_out_of_memory"
    NCCL_ERROR = "nccl_error"
    METAL_WATCHDOG = "metal_watchdog"
    TIMED_OUT = "timed_out"
    STALLED = "stalled"
    DISK_FULL = "disk_full"
    MODULE_MISSING = "module_missing"
    COLUMN_MISSING = "column_missing"
    RESULT_FAILED = "result_failed"
    OUTPUT_MISSING = "output_missing"
    OUTPUT_INVALID = "output_invalid"
    RESULT_NOT_RECORDED = "result_not_recorded"
    SCRIPT_REPORTED_FAILURE = "script_reported_failure"
    ENV_MISSING = "env_missing"
    ENV_BUILD_FAILED = "env_build_failed"
    BASE_MODEL_BUILD_FAILED = "base_model_build_failed"
    SCRIPT_MISSING = "script_missing"
    FILE_NOT_PINNED = "file_not_pinned"
    CODE_NOT_APPROVED = "code_not_approved"
    ENVIRONMENT_NOT_ALLOWED = "environment_not_allowed"
    INPUT_MISSING = "input_missing"
    SECRET_MISSING = "secret_missing"  # noqa: S105 - no password
    SECRET_UNREADABLE = "secret_unreadable"  # noqa: S105
    SPAWN_FAILED = "spawn_failed"
    CANCELLED = "cancelled"
    NODE_LOST = "node_lost"
    SUPERVISOR_LOST = "supervisor_lost"
    PREDECESSOR_FAILED = "predecessor_failed"
    INSTALLATION_RESTORED = "installation_restored"


class Platform(StrEnum):
    """Accelerator family of a node; decides which presets are installed."""

    CUDA = "cuda"
    APPLE = "apple"
    CPU = "cpu"


class SampleKind(StrEnum):
    """What a sample of a preset becomes when it is registered."""

    DATASET = "dataset"
    BASE_MODEL = "base-model"


class VersionSource(StrEnum):
    """What made a method version."""

    CREATE = "create"
    EDIT = "edit"
    COPY = "copy"
    UPLOAD = "upload"
    DISK = "disk"
    PRESET = "preset"
    RESET = "reset"
    RESTORE = "restore"


class DeliveryState(StrEnum):
    """How far a webhook's message has come."""

    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"
