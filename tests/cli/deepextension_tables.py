"""Databases of DeepExtension in the shapes that its installations have, by the columns that an import looks at."""

import json
from collections.abc import Mapping
from typing import Any, Final

_STAMPS: Final = "created_at int8 NOT NULL DEFAULT 1751328000000"
_V2505: Final[Mapping[str, str]] = {
    "table1": "template_name jsonb, template_uuid uuid, is_system bool DEFAULT false, co_id int4, train_file bytea",
    "table3": "job_id text, job_name jsonb, job_parameters jsonb, task_parameters jsonb, job_template_uuid uuid",
    "table4": "job_id text, task_uuid text",
    "table7": "template_uuid uuid, shared_to int4",
    "llm_factories": "factory text, is_deploy bool",
    "sys_deploy_env": "deploy_factory text, env_url text, co_code int4",
    "base_model": "model_name text, technic_name text, co_id int4, path text, authors text, license varchar",
    "model": "model_name text, task_uuid uuid, model_type int4, co_id int4, actual_path text, base_path varchar, "
    "base_model varchar, is_deleted bool DEFAULT false",
    "save_models_tasks": "save_path text, base_model_path text, lora_adapter_path text, dtype_str text, train_id text, "
    "task_uuid uuid",
    "deploy_models_tasks": "save_model_path text, task_uuid uuid, server_url text, quantize text, save_task_uuid uuid",
    "dataset_base_info": "dataset_name text, dataset_desc text, dataset_uuid uuid, co_id int4",
    "dataset_detail_info": "file_uuid uuid, dataset_detail jsonb",
    "file_upload_info": "file_path text, file_name text, file_uuid uuid, file_relate uuid",
}
_V2507: Final = {
    **_V2505,
    "table1": f"{_V2505['table1']}, train_env text NOT NULL DEFAULT 'base'",
    "model": f"{_V2505['model']}, model_usage_type text NOT NULL DEFAULT 'chat'",
    "sys_plan_profile": "name jsonb, profile_uuid uuid, co_id int4",
    "sys_params": "profile_uuid uuid, field_name text, field_type text, field_value text, co_id int4",
}
_V2509: Final = {
    **_V2507,
    "train_method_info": "template_uuid uuid, training_type int4[], life_cycle int4, deployment_tools int4[], "
    "trained_inference_support bool, saved_inference_support bool, python_file_config jsonb, co_id int8",
    "python_env_info": "env_name text, co_id int8",
    "save_models_tasks": f"{_V2507['save_models_tasks']}, template_uuid uuid, co_id int4",
    "deploy_models_tasks": f"{_V2507['deploy_models_tasks']}, train_template_uuid text, base_model_id int8",
}
SHAPES: Final = {"v2505": _V2505, "v2507": _V2507, "v2509": _V2509}


def uid(number: int) -> str:
    """Return a UUID that is easy to recognize."""
    return f"00000000-0000-4000-8000-{number:012}"


METHOD, TRAINING, SAVING, DEPLOYMENT, ROWS, STORED, PROFILE = map(uid, range(1, 8))


def tables(shape: str, schema: str) -> list[str]:
    """Return the statements that make the tables of a release."""
    made = [
        f"CREATE TABLE {schema}.{name} (id bigserial PRIMARY KEY, {_STAMPS}, {columns})"
        for name, columns in SHAPES[shape].items()
    ]
    return [f"CREATE SCHEMA IF NOT EXISTS {schema}", *made]


def insert(schema: str, table: str, **values: Any) -> str:
    """Return the statement that adds a row."""
    names = ", ".join(values)
    return f"INSERT INTO {schema}.{table} ({names}) VALUES ({', '.join(map(_literal, values.values()))})"


def _literal(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case bool() | int():
            return str(value)
        case bytes():
            return f"decode('{value.hex()}', 'hex')"
        case list():
            return f"ARRAY[{', '.join(map(str, value))}]::int4[]"
        case dict():
            return f"{_literal(json.dumps(value))}::jsonb"
        case _:
            return "'" + str(value).replace("'", "''") + "'"


def installation(shape: str, schema: str) -> list[str]:
    """Return an installation of one tenant: a method, its models down to an online one, data sets, a target."""

    def add(table: str, **values: Any) -> str:
        return insert(schema, table, **values)

    made = [
        *tables(shape, schema),
        add("table1", template_name={"en": "Finance SFT", "zh": "金融"}, template_uuid=METHOD, co_id=7,
            train_file=b"finance.py"),
        add("sys_deploy_env", deploy_factory="Ollama", env_url="gpu-box:11434", co_code=7),
        add("base_model", model_name="Qwen 2.5", technic_name="Qwen2.5-tiny", co_id=7, path="../models/qwen"),
        add("dataset_base_info", dataset_name="问答 (1)", dataset_desc="rows of a file", dataset_uuid=ROWS, co_id=7),
        add("dataset_base_info", dataset_name="stored", dataset_uuid=STORED, co_id=7),
        *(add("dataset_detail_info", file_uuid=STORED, dataset_detail={"q": str(n), "a": "中"}) for n in range(3)),
        add("table3", job_id="j1", job_parameters={"lora_rank": 8}, task_parameters={}, job_template_uuid=METHOD),
        add("table4", job_id="j1", task_uuid=TRAINING),
        add("model", model_name="tuned", task_uuid=TRAINING, model_type=2, co_id=7, base_model="Qwen2.5-tiny",
            actual_path="/app/models/out/tuned"),
        add("model", model_name="merged", task_uuid=SAVING, model_type=3, co_id=7, base_path="../models/qwen",
            actual_path="../models/out/merged"),
        add("save_models_tasks", save_path="../models/out/merged", base_model_path="../models/qwen",
            lora_adapter_path="../models/out/tuned", train_id=TRAINING, task_uuid=SAVING),
        add("model", model_name="served", task_uuid=DEPLOYMENT, model_type=4, co_id=7, base_model="Qwen2.5-tiny"),
        add("deploy_models_tasks", save_model_path="../models/out/merged", task_uuid=DEPLOYMENT, quantize="q8_0",
            server_url="http://gpu-box:11434", save_task_uuid=SAVING),
        add("model", model_name="gone", task_uuid=uid(90), model_type=2, co_id=7, is_deleted=True),
    ]  # fmt: skip
    if shape != "v2505":
        made += [
            add("sys_plan_profile", name={"en": "quick"}, profile_uuid=PROFILE, co_id=7),
            *(
                add("sys_params", profile_uuid=PROFILE, field_name=name, field_type=kind, field_value=value, co_id=7)
                for name, kind, value in (("epochs", "int", "3"), ("rate", "float", "2e-5"), ("note", "string", "12"))
            ),
        ]
    if shape == "v2509":
        stage = {"python_file": "ask", "conda_env": "tuned_env"}
        made += [
            add("train_method_info", template_uuid=METHOD, training_type=[1], life_cycle=4, deployment_tools=[1],
                trained_inference_support=True, saved_inference_support=False, co_id=7,
                python_file_config={"training": {"file": "finance.py", "conda_env": "tuned_env"},
                                    "saving": {"pythonFile": "linux_code/save_model", "condaEnv": "base"},
                                    "inferenceCustomized": stage}),
            add("python_env_info", env_name="tuned_env", co_id=7),
            add("sys_deploy_env", deploy_factory="vLLM", env_url="http://llm:8000", co_code=7),
            add("table1", template_name={"en": "served"}, template_uuid=uid(30), co_id=7),
            add("train_method_info", template_uuid=uid(30), training_type=[1], life_cycle=3, deployment_tools=[2],
                trained_inference_support=False, saved_inference_support=False, co_id=7,
                python_file_config={"training": "finance", "deploy_file": {"path": "ask.py", "env": "tuned_env"}}),
        ]  # fmt: skip
    return made
