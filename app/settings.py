"""Settings: every `DEEPE_*` variable with its description and bounds. Read by the roots only; others are handed values.

A bad value becomes a `SettingsError` whose text names the variable, what is wrong and what is expected; the roots print
it and exit with status 2.
"""

import difflib
import os
import re
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.access.loopback import is_loopback
from app.access.signing_keys import ALGORITHMS, is_safe_url
from app.domain.access import Role, parse_roles
from app.domain.code_review import CodeApproval
from app.domain.containment import ContainmentWish, StageNetwork
from app.domain.labels import parse_labels
from app.domain.secret_references import parse_keys
from app.secret_values import PREFIX, SECRET_FIELDS, SecretFileError, file_variable, secret_from_file, variable

MIN_TOKEN_LENGTH: Final = 16
MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB

# Variables that the service hands to stage scripts; a service that was started by a script meets them.
_STAGE_VARIABLES = frozenset(
    {
        *("DEEPE_JOB_ID", "DEEPE_ATTEMPT", "DEEPE_OUTPUT_DIR", "DEEPE_CACHE_DIR", "DEEPE_PARAMS", "DEEPE_EVENTS"),
        "DEEPE_LOADING_PERMITS",
        *("DEEPE_RESUME_FROM", "DEEPE_MODEL_PATH"),
    }
)
_TEST_VARIABLES = frozenset({"DEEPE_FAULT_POINT", "DEEPE_FAULT_SIGNAL"})  # of fault-injection tests
_PLACEHOLDERS = (
    "changeme",
    "change-me",
    "change_me",
    "placeholder",
    "example",
    "your-token",
    "your_token",
    "<",
    "xxxx",
)
_RANDOM_HINT = "for instance from: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
_MASK = "********"


class SettingsError(Exception):
    """Settings that cannot be used; the text lists every problem, one a line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("Settings cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))


class Settings(BaseSettings):
    """What an operator can set. Paths are absolute after loading, URLs name their driver."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, validate_default=True
    )

    # Places
    home: Path = Field(
        Path("~/.deepe"),
        description="Folder of scripts, models, data sets and runs; on a cluster shared between the nodes.",
    )
    node_home: Path = Field(
        Path(),
        description="Control folders and environments of this node; a local disk. Default: DEEPE_HOME/nodes/<node>.",
    )
    node_name: str = Field(
        "", description="Name of this node; 1-100 letters, digits, '.', '_' or '-'. Default: the host's name."
    )

    # Servers
    database_url: str = Field(
        "",
        description="sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME. Default: a SQLite file in DEEPE_HOME.",
    )
    redis_url: SecretStr | None = Field(
        None, description="redis://HOST:PORT, rediss:// or unix://. Without one a changed file notifies the worker."
    )

    # HTTP
    host: str = Field(
        "127.0.0.1", description="Address to listen on. Any but a loopback address needs DEEPE_API_TOKEN."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_token: SecretStr | None = Field(
        None,
        description=f"Bearer token of the administrator, at least {MIN_TOKEN_LENGTH} characters. Others have API keys.",
    )
    secrets_key: SecretStr | None = Field(
        None,
        description="Keys that encrypt secrets, the newest first, separated by commas or lines; each is 32 random "
        "bytes in URL-safe Base64. Default: those in `DEEPE_HOME/secrets.key`, which the first secret makes.",
    )
    code_approval: CodeApproval = Field(
        CodeApproval.OFF,
        description="`required`: stages run code only that a second person has approved. Set it where the API runs; it "
        "counts for all nodes.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Host names, comma-separated, that a service without a token answers besides loopback."
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins of web pages, comma-separated, that may call the service (https://pages.example.com)."
    )
    max_body_bytes: int = Field(4 * MIB, ge=1024, le=GIB, description="Largest JSON body of a request.")
    max_script_bytes: int = Field(1 * MIB, ge=64 * 1024, le=64 * MIB, description="Largest stage file.")
    max_upload_bytes: int = Field(4 * GIB, ge=1024, le=1024 * GIB, description="Largest uploaded data set.")
    max_base_model_bytes: int = Field(
        1024 * GIB, ge=1024, le=16 * 1024 * GIB, description="Largest uploaded base model, all of its files together."
    )

    max_connections: int = Field(
        1000, ge=0, le=1_000_000, description="Open connections of one API process, streams among them; 0: no limit."
    )
    max_requests_per_minute: int = Field(
        0, ge=0, le=1_000_000, description="Requests that one caller may send to one API process; 0: no limit."
    )
    max_streams_per_caller: int = Field(
        500, ge=0, le=1_000_000, description="Event streams that one caller may hold at one API process; 0: no limit."
    )

    # People of an identity provider
    oidc_issuers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Issuers (OpenID Connect), comma-separated, whose signed tokens let people in, exactly as in their "
        "tokens: https://idp.example.com/realms/lab. Needs DEEPE_OIDC_AUDIENCES and DEEPE_API_TOKEN.",
    )
    oidc_audiences: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Names of this service at the issuers, comma-separated; a token must be made for one of them."
    )
    oidc_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Where the keys (JWKS) of each issuer are, in the order of DEEPE_OIDC_ISSUERS: an https:// address "
        "or a file, for a service without a network. Default: where the issuer's discovery document says.",
    )
    oidc_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        ("RS256", "PS256", "ES256", "EdDSA"),
        description="Algorithms, comma-separated, that tokens may be signed with; only those with a public key.",
    )
    oidc_leeway_seconds: float = Field(
        60.0, ge=0, le=300, description="How far the clocks of the service and the issuers may be apart."
    )
    oidc_name_claims: Annotated[tuple[str, ...], NoDecode] = Field(
        ("preferred_username", "email", "sub"),
        description="Claims, comma-separated, the first of which that a token has is the person's name.",
    )
    oidc_role_claim: str = Field(
        "groups",
        description="Claim that says to which groups a person belongs; a path with dots leads into objects: "
        "realm_access.roles.",
    )
    oidc_roles: Annotated[dict[str, Role], NoDecode] = Field(
        {},
        description="Role of each group, comma-separated: ml-team=developer,ops=admin; as a JSON object where names "
        "have commas. The highest of a person's groups counts.",
    )
    oidc_default_role: Role | None = Field(
        None,
        description="Role (viewer, operator, developer, admin) of people none of whose groups has one. Default: they "
        "may do nothing.",
    )
    oidc_client_id: str = Field(
        "",
        description="Id of the public client at the first issuer with which `deepe login` logs people in by the device "
        "flow. Default: `deepe login` asks for an API key.",
    )
    oidc_scopes: str = Field(
        "openid profile email offline_access",
        description="Scopes that `deepe login` asks for, with spaces; those that the issuer lacks are left out.",
    )

    # DeepExtension's runner
    runner_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port that answers DeepExtension's backend in the place of its runner. Default: none does.",
    )
    runner_host: str = Field(
        "127.0.0.1",
        description="Address that DEEPE_RUNNER_PORT listens on. Any but a loopback address needs DEEPE_RUNNER_CLIENTS "
        "or DEEPE_API_TOKEN.",
    )
    runner_clients: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        (),
        description="Addresses or networks, comma-separated, that may call DEEPE_RUNNER_PORT without the token, which "
        "the backend cannot send: 172.18.0.5,10.1.0.0/16.",
    )

    trusted_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        (),
        description="Addresses or networks, comma-separated, of the proxies in front of the service, such as 10.0.0.2. "
        "The address that they say in X-Forwarded-For or Forwarded stands in the access log and in the audit trail; it "
        "permits nothing.",
    )

    # Licence
    license_public_key: Path | None = Field(
        None, description="PEM file with the key that licences are verified with. Default: the built-in key."
    )

    # Registry
    platform: Literal["auto", "cuda", "apple", "cpu", "all"] = Field(
        "auto", description="Platform whose preset methods are installed at start."
    )
    samples: bool = Field(
        True, description="Whether installed presets bring their sample data sets and base models (`true`, `false`)."
    )
    dataset_max_line: int = Field(
        4 * MIB,
        ge=1,
        le=100_000_000,
        description="Longest row of a data set, in characters of its JSON. It bounds memory; methods bound tokens.",
    )

    # Executor
    slots: int = Field(1, ge=1, le=1024, description="Training, saving and deployment jobs at once on a CPU node.")
    inference_slots: int = Field(2, ge=1, le=1024, description="Inference processes at once on this node.")
    compare_answers: bool = Field(
        True,
        description="Whether the first question to a model is asked again in the background, of its base model too, to "
        "see whether a user's script reads the model (`true`, `false`).",
    )
    poll_seconds: float = Field(
        2.0, ge=0.05, le=86_400, description="Pause between two looks for jobs in the database."
    )
    stop_grace_seconds: float = Field(10.0, ge=0, le=3600, description="Time between TERM and KILL for a stage.")
    min_free_bytes: int = Field(
        1 * GIB,
        ge=0,
        le=1024 * GIB,
        description="Free disk space that a submit demands, and a node to take jobs; 0: none.",
    )
    conda_root: Path | None = Field(
        None, description="Root prefix of the conda installation. Default: found from CONDA_EXE, PATH and usual places."
    )
    env_builder: Literal["auto", "conda", "rattler", "venv"] = Field(
        "auto", description="What builds environments; auto: conda family on PATH, else rattler, else venv with pip."
    )

    # Environments of a node
    conda_channels: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Channels, comma-separated, for environments whose specification names none."
    )
    keep_environment_days: float = Field(
        30, ge=0.01, le=36_500, description="Days that an environment built here stays after its last use."
    )
    offline: bool = Field(
        False, description="This node has no network: environments are built from packed ones, or not at all."
    )

    torch_index: str = Field(
        "",
        description="Index that shipped environments take torch from. Default: the registry's build for CUDA, and on "
        "nodes without an NVIDIA GPU torch's own index of CPU builds.",
    )
    torch_find_links: str = Field(
        "", description="Folder or page of links with torch's wheels, instead of `torch_index` or beside it."
    )

    # Nodes
    stage_variables: str = Field(
        "",
        description="Variables of the worker's environment that stage scripts get besides the usual ones: "
        "comma-separated names or beginnings, such as HTTPS_PROXY,MODELSCOPE_*,ASCEND_*.",
    )
    containment: ContainmentWish = Field(
        ContainmentWish.AUTO,
        description="Containment of stages: `auto` where a probe at the worker's start shows that it works, `off`, or "
        "`bubblewrap`: the worker does not start without.",
    )
    stage_network: StageNetwork = Field(
        StageNetwork.ALL,
        description="What contained stages reach: `all`, or `none` (deployments keep their network). The worker does "
        "not start with `none` where it cannot contain stages.",
    )
    stage_user: str = Field(
        "",
        description="Account of the machine that contained stages run as, for a worker that is root; empty: the "
        "worker's own. The worker does not start where that is not possible.",
    )
    stage_readable: str = Field(
        "",
        description="Folders and files that every contained stage may read although they are hidden: comma-separated, "
        "relative to DEEPE_HOME or absolute.",
    )
    stage_writable: str = Field("", description="Folders that every contained stage may write, shared by all of them.")
    stage_hidden: str = Field("", description="Folders and files that contained stages do not see.")
    node_labels: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="Labels of this node that jobs may ask for, comma-separated: gpu=a100,zone=b."
    )
    join_token: SecretStr | None = Field(
        None,
        description="Secret that workers must share with the API to join the installation; "
        f"at least {MIN_TOKEN_LENGTH} characters.",
    )
    foreign_memory_mib: int = Field(
        1024, ge=0, le=2**31 - 1, description="Memory of a card that others may use before it counts as occupied."
    )
    simulated_accelerators: str = Field(
        "", description="For tests: COUNT or COUNTxMIB accelerators that do not exist, in place of the real ones."
    )

    # Webhooks
    webhook_addresses: Literal["any", "public"] = Field(
        "any",
        description="Where messages may be sent: anywhere, private networks included, or public addresses only. "
        "Metadata services of clouds are always refused.",
    )

    # Deploy targets
    target_addresses: Literal["any", "public"] = Field(
        "any",
        description="Where deploy targets, and vLLM servers of jobs, may be: anywhere, private networks included, or "
        "public addresses only. Metadata services of clouds are always refused. Set it for API and workers.",
    )

    # What is kept how long
    keep_failed_runs_days: int = Field(
        90, ge=0, le=36500, description="Days that run folders of failed and cancelled jobs are kept; 0: for ever."
    )
    keep_questions_days: int = Field(
        30, ge=0, le=36500, description="Days that run folders of inference requests are kept; 0: for ever."
    )
    keep_checkpoints_days: int = Field(
        0,
        ge=0,
        le=36500,
        description="Days that the checkpoints beside the model of a successful training are kept; 0: for ever.",
    )
    keep_logs_days: int = Field(
        90, ge=0, le=36500, description="Days that log files of scripts (logs/*.jsonl) are kept; 0: for ever."
    )
    keep_deliveries_days: int = Field(
        30,
        ge=0,
        le=36500,
        description="Days that webhook messages are kept after they were delivered or given up; 0: for ever.",
    )
    keep_audit_days: int = Field(
        0, ge=0, le=36500, description="Days that records of the audit trail are kept; 0: for ever."
    )

    # Metrics
    metrics_token: SecretStr | None = Field(
        None, description="Bearer token that opens /metrics and nothing else, beside DEEPE_API_TOKEN."
    )

    # Command line: read by the options --url and --project, listed here so that they are documented with the rest
    url: str = Field("http://127.0.0.1:8000", description="Service that the commands call, unless --url names one.")
    project: str | None = Field(
        None, description="Project of the service that the commands work in, unless --project names one."
    )

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="Form of the log; auto: console on a terminal, else one JSON object a line."
    )

    @field_validator(
        "platform", "env_builder", "webhook_addresses", "target_addresses", "log_level", "log_format", mode="before"
    )
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("home")
    @classmethod
    def _absolute_home(cls, value: Path) -> Path:
        return _absolute(value)

    @field_validator("conda_root")
    @classmethod
    def _existing_folder(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        path = _absolute(value)
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
        return path

    @field_validator("license_public_key")
    @classmethod
    def _existing_file(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        return _existing(value)

    @field_validator("node_name")
    @classmethod
    def _node_name(cls, value: str) -> str:
        name = value.strip() or re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("-.")[:100] or "node"
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"{name!r} cannot be a node's name")
        return name

    @field_validator("simulated_accelerators")
    @classmethod
    def _simulated_accelerators(cls, value: str) -> str:
        if value and not re.fullmatch(r"[0-9]{1,4}(x[1-9][0-9]{0,7})?", value):
            raise ValueError("give a number of accelerators, or number and memory in MiB like 8x40000")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and urlsplit(value.get_secret_value()).scheme not in {"redis", "rediss", "unix"}:
            raise ValueError("the URL must begin with redis://, rediss:// or unix://")
        return value

    @field_validator("host", "runner_host")
    @classmethod
    def _host(cls, value: str) -> str:
        host = value.strip().strip("[]")
        if not host or not re.fullmatch(r"[A-Za-z0-9._:%-]+", host):
            raise ValueError("give an IP address or a host name, without a port")
        return host

    @field_validator("node_labels", mode="before")
    @classmethod
    def _labels(cls, value: object) -> object:
        return parse_labels(value) if isinstance(value, str) else value

    @field_validator("api_token", "join_token")
    @classmethod
    def _token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_token(value.get_secret_value())
        return value

    @field_validator("secrets_key")
    @classmethod
    def _keys_of_secrets(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_keys(value.get_secret_value())
        return value

    @field_validator("stage_variables")
    @classmethod
    def _names_of_variables(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",") if name.strip()]
        for name in names:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*\*?", name) or name.upper().startswith(PREFIX):
                raise ValueError(
                    f"{name!r} must be a name or the beginning of one with a * (no secrets of the service: {PREFIX}...)"
                )
        return ",".join(names)

    @field_validator("stage_readable", "stage_writable", "stage_hidden")
    @classmethod
    def _paths(cls, value: str) -> str:
        return ",".join(path.strip() for path in value.split(",") if path.strip())

    @field_validator("torch_index", "torch_find_links")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        if urlsplit(value).username is not None:
            raise ValueError("credentials do not belong in the address: put them into ~/.netrc, where pip finds them")
        return value

    @field_validator(
        *("allowed_hosts", "allowed_origins", "conda_channels", "runner_clients", "trusted_proxies"),
        *("oidc_issuers", "oidc_audiences", "oidc_keys", "oidc_algorithms", "oidc_name_claims"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("oidc_issuers")
    @classmethod
    def _issuers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for issuer in value:
            if not is_safe_url(issuer):
                raise ValueError(f"{issuer!r} must begin with https:// (http:// for this machine only)")
        if len(set(value)) < len(value):
            raise ValueError("an issuer is named twice")
        return value

    @field_validator("oidc_keys")
    @classmethod
    def _places_of_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(place if is_safe_url(place) else str(_existing(place)) for place in value)

    @field_validator("oidc_algorithms")
    @classmethod
    def _algorithms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        refused = [name for name in value if name not in ALGORITHMS]
        if refused or not value:
            raise ValueError(f"{', '.join(refused) or 'nothing'} cannot be used; choose of {', '.join(ALGORITHMS)}")
        return value

    @field_validator("oidc_name_claims", "oidc_role_claim")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not value:
            raise ValueError("name a claim")
        return value

    @field_validator("oidc_roles", mode="before")
    @classmethod
    def _roles(cls, value: object) -> object:
        return parse_roles(value) if isinstance(value, str) else value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if "/" in host or "*" in host:
                raise ValueError(f"{host!r} must be a plain host name or address")
        return tuple(host.lower() for host in value)

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if (
                parts.scheme not in {"http", "https"}
                or not parts.netloc
                or parts.path not in {"", "/"}
                or "*" in origin
            ):
                raise ValueError(f"{origin!r} must look like https://pages.example.com")
        return tuple(origin.rstrip("/").lower() for origin in value)

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, data: Any) -> Any:
        return {key: value.strip() if isinstance(value, str) else value for key, value in data.items()}

    @model_validator(mode="after")
    def _fill(self) -> Self:
        # the model is frozen for everyone else; these defaults depend on other fields
        derived = {
            "node_home": self.home / "nodes" / self.node_name
            if self.node_home == Path()
            else _absolute(self.node_home),
            "database_url": database_url(self.database_url or f"sqlite:///{self.home / 'deepe.db'}"),
        }
        for name, value in derived.items():
            self.__dict__[name] = value
        return self

    @property
    def token(self) -> str | None:
        """The bearer token in the clear, if one is set."""
        return self.api_token.get_secret_value() if self.api_token else None

    @property
    def given_secrets_key(self) -> str | None:
        """The keys that encrypt secrets in the clear, if they are set."""
        return self.secrets_key.get_secret_value() if self.secrets_key else None

    @property
    def is_open_to_others(self) -> bool:
        """Whether a service with these settings would answer other machines without a token."""
        return self.api_token is None and not is_loopback(self.host)

    def secret_variables(self, *, without: Collection[str] = ()) -> dict[str, str]:
        """Return the variables by which a child process gets the secrets that are set, and what hides their files."""
        values = {field: getattr(self, field) for field in SECRET_FIELDS if field not in without}
        return {
            variable(field): value.get_secret_value() if isinstance(value, SecretStr) else value
            for field, value in values.items()
            if value is not None
        } | ({variable("stage_hidden"): self.stage_hidden} if self.stage_hidden else {})


@dataclass(frozen=True)
class SettingRow:
    """One line of `deepe settings`."""

    name: str
    type: str
    default: str
    current: str
    is_set: bool
    description: str


def load_settings(*, serves: bool = True, **overrides: Any) -> Settings:
    """Read `DEEPE_*` from the environment; `overrides` (by field name, None is ignored) win.

    `serves`: whether HTTP is to be answered with them. Otherwise no token is needed, whatever the host.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    problems, files = [], []
    for field in SECRET_FIELDS:
        try:
            secret = secret_from_file(field, os.environ)
        except SecretFileError as error:
            problems.append(str(error))
        else:
            if secret is not None:
                given.setdefault(field, secret)
                files.append(str(Path(os.environ[file_variable(field)].strip()).expanduser().absolute()))
    try:
        settings = Settings(**given)
        if files:
            settings = Settings(**given | {"stage_hidden": ",".join([*filter(None, [settings.stage_hidden]), *files])})
    except ValidationError as error:
        problems += [_problem(detail) for detail in error.errors(include_url=False)]
    else:
        if serves and settings.runner_port is not None:
            problems += _runner_problems(settings)
        if serves:
            problems += _oidc_problems(settings)
        if serves and settings.is_open_to_others:
            problems.append(
                f"DEEPE_HOST={settings.host} can be reached from other machines, so DEEPE_API_TOKEN must be set. "
                f"Use random characters, {_RANDOM_HINT}."
            )
    if problems:
        raise SettingsError(problems)
    return settings


def _oidc_problems(settings: Settings) -> list[str]:
    """Return why people cannot be let in like this."""
    found = []
    if settings.oidc_issuers and not settings.oidc_audiences:
        found.append("DEEPE_OIDC_AUDIENCES must say for whom the tokens of DEEPE_OIDC_ISSUERS are made.")
    if settings.oidc_issuers and settings.api_token is None:
        found.append(
            "DEEPE_OIDC_ISSUERS lets people in by their names, so DEEPE_API_TOKEN must be set: without it whoever "
            f"calls from this machine is the administrator. Use random characters, {_RANDOM_HINT}."
        )
    if settings.oidc_keys and len(settings.oidc_keys) != len(settings.oidc_issuers):
        found.append("DEEPE_OIDC_KEYS must name as many places as DEEPE_OIDC_ISSUERS names issuers.")
    if settings.oidc_client_id and not settings.oidc_issuers:
        found.append("DEEPE_OIDC_CLIENT_ID belongs to the first issuer of DEEPE_OIDC_ISSUERS, which names none.")
    return found


def _runner_problems(settings: Settings) -> list[str]:
    """Return why the runner's port cannot be opened like this."""
    found = []
    if settings.runner_port == settings.port:
        found.append(f"DEEPE_RUNNER_PORT={settings.runner_port} is DEEPE_PORT as well; choose another one.")
    if settings.token is None and not settings.runner_clients and not is_loopback(settings.runner_host):
        found.append(
            f"DEEPE_RUNNER_HOST={settings.runner_host} can be reached from other machines, so DEEPE_RUNNER_CLIENTS "
            "must name the addresses of DeepExtension's backend."
        )
    return found


def describe_settings(settings: Settings, *, environ: Mapping[str, str] | None = None) -> list[SettingRow]:
    """Return every variable with its current value; secrets and passwords are masked."""
    environ = os.environ if environ is None else environ
    return [
        SettingRow(
            name=PREFIX + name.upper(),
            type=_type_name(name),
            default=_default(name),
            current=_shown(getattr(settings, name)),
            is_set=any(environ.get(given) for given in _variables(name)),
            description=(field.description or "") + _bounds(name) + _other_way(name),
        )
        for name, field in Settings.model_fields.items()
    ]


def unknown_variables(environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Return `DEEPE_*` variables that nothing reads (a typing slip), each with the name that was probably meant."""
    environ = os.environ if environ is None else environ
    known = {read for name in Settings.model_fields for read in _variables(name)}
    read = known | _STAGE_VARIABLES | _TEST_VARIABLES
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in read)
    return {name: _closest(name.removeprefix(PREFIX), known) for name in unknown}


def database_url(url: str) -> str:
    """Return `url` with the asynchronous driver we use; the common spellings of Postgres URLs are understood."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ValueError("DEEPE_DATABASE_URL must look like sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")
    if scheme in {"sqlite", "sqlite+aiosqlite"}:
        return f"sqlite+aiosqlite://{rest}"
    if scheme in {"postgres", "postgresql", "postgresql+asyncpg"}:
        parts = urlsplit(f"postgresql+asyncpg://{rest}")
        query = [("ssl" if key == "sslmode" else key, value) for key, value in parse_qsl(parts.query)]
        return urlunsplit(parts._replace(query=urlencode(query)))
    raise ValueError(f"DEEPE_DATABASE_URL: {scheme!r} is not supported; use sqlite:// or postgresql://")


def _closest(name: str, known: Iterable[str]) -> str | None:
    # without the prefix, which would make everything alike
    close = difflib.get_close_matches(name, [other.removeprefix(PREFIX) for other in known], n=1)
    return PREFIX + close[0] if close else None


def _existing(file: str | Path) -> Path:
    path = _absolute(Path(file))
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return path


def _absolute(path: Path) -> Path:
    try:
        return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - links stay as the operator wrote them
    except RuntimeError:
        raise ValueError(f"{path} cannot be expanded because HOME is unknown; give an absolute path") from None


def _check_token(token: str) -> None:
    if len(token) < MIN_TOKEN_LENGTH:
        raise ValueError(f"the token is too short; use at least {MIN_TOKEN_LENGTH} random characters, {_RANDOM_HINT}")
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("the token must be printable ASCII without spaces: it travels in a header")
    lowered = token.lower()
    if len(set(token)) < 6 or any(word in lowered for word in _PLACEHOLDERS):
        raise ValueError(f"the token is a placeholder; use random characters, {_RANDOM_HINT}")


def _problem(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    field = Settings.model_fields.get(name)
    if field is None:
        return f"{PREFIX}{name.upper()}: {message}"
    given = "" if name in SECRET_FIELDS else f" (got {str(error['input'])!r})"
    return f"{PREFIX}{name.upper()}: {message}{given}. {field.description or ''}{_bounds(name)}"


def _variables(name: str) -> tuple[str, ...]:
    return (variable(name), file_variable(name)) if name in SECRET_FIELDS else (variable(name),)


def _other_way(name: str) -> str:
    return f" Or {file_variable(name)}: a file that holds it." if name in SECRET_FIELDS else ""


def _type_name(name: str) -> str:
    annotation = Settings.model_fields[name].annotation
    choices = getattr(annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return "|".join(choices)
    if choices[:1] == (Role,):
        return "|".join(Role)
    for kind, label in ((SecretStr, "secret"), (Path, "path"), (bool, "bool"), (int, "int"), (float, "float")):
        if annotation is kind or kind in choices:
            return label
    return "list" if getattr(annotation, "__origin__", None) is tuple else "text"


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    return "" if default in (None, PydanticUndefined, Path()) else _shown(default)


def _bounds(name: str) -> str:
    limits = Settings.model_fields[name].metadata
    low = next((limit.ge for limit in limits if hasattr(limit, "ge")), None)
    high = next((limit.le for limit in limits if hasattr(limit, "le")), None)
    return "" if low is None or high is None else f" From {low} to {high}."


def _shown(value: object) -> str:
    match value:
        case None:
            return ""
        case SecretStr():
            return _MASK
        case dict():
            return ",".join(f"{key}={item}" for key, item in value.items())
        case tuple():
            return ",".join(str(item) for item in value)
        case _:
            return re.sub(r"(://[^:/@\s]*):[^/\s]*@", rf"\1:{_MASK}@", str(value))
