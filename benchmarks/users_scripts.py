r"""Other people's training scripts, unmodified, through the service: what one has to write, and how far each comes.

    python -m benchmarks.users_scripts --checkouts ~/src --base BASE --environment trl=ENV --environment foreign=ENV \
        [--vision-base BASE] [--only trl]

`--checkouts` is a folder with clones under their own names (trl, peft, mlx-lm, DeepExtension, LLaMA-Factory, ms-swift,
sentence-transformers, accelerate, Qwen; run_clm.py of transformers beside them). What is absent is left out. An
environment is a prefix with a Python in it; rows whose environment is not given are left out too. Base model and rows
are small and local: nothing is downloaded.

A row is one script. Its method is what `deepe methods suggest` proposes; what a person writes besides stands in the
table. R registers, P parameters read, S starts, T trains, M curve and progress (p: one of them), V saves a complete
model, A answers, D deploys; y yes, n no, - not asked for.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.presets.sample_pictures import draw_all
from benchmarks.service import running_service
from tests.e2e.installation import Installation
from tests.ollama_stand_in import ollama_stand_in

PRESETS = Path(__file__).parents[1] / "app" / "presets"
ROWS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "text": [{"text": f"{a} plus {b} is {a + b}."} for a in range(5) for b in range(8)],
    "prompts": [{"prompt": [{"role": "user", "content": f"{a} plus {b}?"}]} for a in range(5) for b in range(8)],
    "pairs": [{"prompt": f"{a} plus {b}?", "chosen": f"{a + b}", "rejected": "7"} for a in range(5) for b in range(8)],
    "labelled": [
        {"prompt": f"{a} plus 1?", "completion": f"{a + b}", "label": b == 1} for a in range(20) for b in (1, 2)
    ],
    "alpaca": [
        {"instruction": f"{a} plus {b}?", "input": "", "output": f"{a + b}"} for a in range(5) for b in range(8)
    ],
    "questions": [{"question": f"{a} plus {b}?", "answer": f"#### {a + b}"} for a in range(5) for b in range(8)],
}
PICTURES = ("red-ring-16-16-11-28.png", "blue-square-15-16-10-12.png")
SEEN = [
    {"images": [{"imageId": name}], "input": [{"question": "What is this?", "answer": name[:8]}], "generation": ""}
    for name in PICTURES
]
PLAIN = """
import argparse, json, transformers
p = argparse.ArgumentParser()
for name in ("model_path", "dataset_path", "output_dir"):
    p.add_argument("--" + name, required=True)
p.add_argument("--max_steps", type=int, default=10)
args, _ = p.parse_known_args()
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_path)
model = transformers.AutoModelForCausalLM.from_pretrained(args.model_path)
rows = [{"input_ids": tokenizer(json.loads(line)["text"])["input_ids"]} for line in open(args.dataset_path)]
options = transformers.TrainingArguments(
    args.output_dir, max_steps=args.max_steps, logging_steps=1, use_cpu=True, save_strategy="no", report_to="none"
)
collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = transformers.Trainer(model, options, collator, rows)
trainer.train()
trainer.save_model()
tokenizer.save_pretrained(args.output_dir)
"""
"""What people write who know neither this service nor DeepExtension."""
OLDER = ("deepextension", "foreign", "examples", "swift")
"""Environments with transformers 4."""
PATIENCE = 60.0
"""Seconds after which a node that has not described a library's options is not waited for."""
ARGUMENT_ERRORS = (
    *("unrecognized arguments", "not used by the", "arguments are required", "ignored explicit argument"),
    *("remaining_argv", "expected one argument", "invalid choice"),
)
QUICK = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "bf16": False}
TRL = {**QUICK, "use_peft": True, "max_length": 64, "learning_rate": 1e-3}
DEEPEXTENSION = {"max_steps": 4, "load_in_4bit": False, "max_seq_length": 128, "max_samples": 20}
SPELT_OUT = {
    **{"lora_rank": 8, "max_input_length": 128, "max_content_length": 128, "num_generations": 2, "max_grad_norm": 0.5},
    **{"batch_size": 2, "grad_accum_steps": 1, "learning_rate": 1e-3, "warmup_steps": 2},
}
"""What DeepExtension's parsers ask for, where a method has arguments of its own: the platform adds nothing then."""
CALLED = [f"--{name}={{{name}}}" for name in ("train_id", "seq", "model_name", "model_path", "output_dir")]


@dataclass(frozen=True)
class Script:
    """A script, and what a person says besides what is proposed."""

    name: str
    start: str
    """A file of a checkout, or a command."""
    environment: str
    rows: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    beside: Sequence[str] = ()
    """Files of the checkout that lie beside it."""
    writes: Mapping[str, Any] = field(default_factory=dict)
    """Members of the stage that the person writes."""
    stages: Mapping[str, str] = field(default_factory=dict)
    """Files of the other stages; `ours`: those that the product ships."""
    source: str = ""
    """Its text, where it is of no checkout."""
    base: str = ""
    """Its base model, where it needs another than its environment and its rows say."""

    @property
    def is_file(self) -> bool:
        """Whether it is a file of a checkout."""
        return self.start.endswith(".py")


OURS = {"saving": "ours", "inference-customized": "ours", "deployment": "ours"}
THEIRS = {
    "saving": "DeepExtension/deep-e-python/linux_code/save_model.py",
    "inference-customized": "DeepExtension/deep-e-python/qwen_inference.py",
    "deployment": "DeepExtension/deep-e-python/deploy_ollama.py",
}
DX = "DeepExtension/deep-e-python/"
SCRIPTS = (
    Script("DeepExtension sft-demo", f"{DX}sft-demo.py", "deepextension", "alpaca", DEEPEXTENSION, stages=THEIRS),
    Script("DeepExtension sft-saved", f"{DX}sft-saved.py", "deepextension", "alpaca", DEEPEXTENSION),
    Script(
        "DeepExtension grpo-demo",
        f"{DX}grpo-demo.py",
        "deepextension",
        "questions",
        {**DEEPEXTENSION, "max_steps": 2, "learning_rate": 1e-4},
        stages=THEIRS,
    ),
    Script("DeepExtension orpo-demo", f"{DX}orpo-demo.py", "deepextension", "pairs", DEEPEXTENSION),
    Script(
        "DeepExtension vl-demo", f"{DX}vl-demo.py", "vision", "pictures", DEEPEXTENSION | {"input_train_name": "input"}
    ),
    Script("DeepExtension custom-template", f"{DX}custom-template.py", "deepextension", "alpaca", DEEPEXTENSION),
    Script(
        "DeepExtension mlx-demo",
        f"{DX}mlx-demo.py",
        "mlx-torch",
        "split",
        {**DEEPEXTENSION, **SPELT_OUT, "max_steps": 20},  # a curve has a point at every tenth step
        writes={"arguments": [*CALLED, "--dataset_path={dataset_dir}", "{parameters}"]},
        base="deep",
    ),
    Script(
        "DeepExtension model_manager",
        f"{DX}sft-demo.py",
        "deepextension",
        "alpaca",
        DEEPEXTENSION,
        stages={"inference-customized": f"{DX}linux_code/model_manager.py"},
    ),
    Script(
        "DeepExtension save_model behind trl sft",
        "trl/trl/scripts/sft.py",
        "trl",
        "text",
        TRL,
        stages={"saving": THEIRS["saving"]},
    ),
    Script("trl sft (file)", "trl/trl/scripts/sft.py", "trl", "text", TRL, stages=OURS),
    Script("trl sft (module)", "trl sft", "trl", "text", TRL, stages=OURS),
    Script("trl dpo", "trl/trl/scripts/dpo.py", "trl", "pairs", TRL, stages=OURS),
    Script(
        "trl grpo",
        "trl/trl/scripts/grpo.py",
        "trl",
        "prompts",
        {
            **{name: value for name, value in TRL.items() if name != "max_length"},
            **{"reward_funcs": ["think_format_reward"], "max_completion_length": 8, "num_generations": 2},
        },
        stages=OURS,
    ),
    Script("trl kto", "trl/trl/scripts/kto.py", "trl", "labelled", TRL, stages=OURS),
    Script("trl reward", "trl/trl/scripts/reward.py", "trl", "pairs", {**QUICK, "max_length": 64}),
    Script(
        "peft sft/train.py",
        "peft/examples/sft/train.py",
        "trl",
        "split",
        {**QUICK, "use_peft_lora": True, "max_length": 64, "dataset_text_field": "text"},
        beside=("utils.py",),
        stages=OURS,
    ),
    Script(
        "peft dora_finetuning.py",
        "peft/examples/dora_finetuning/dora_finetuning.py",
        "foreign",
        "text",
        {"batch_size": 2, "num_epochs": 1, "cutoff_len": 32, "val_set_size": 4, "eval_step": 2, "save_step": 2},
    ),
    Script(
        "peft olora_finetuning.py",
        "peft/examples/olora_finetuning/olora_finetuning.py",
        "trl",
        "alpaca",
        {"batch_size": 2, "num_epochs": 1, "cutoff_len": 32, "val_set_size": 4, "eval_step": 2, "save_step": 2},
    ),
    Script(
        "peft pissa_finetuning.py",
        "peft/examples/pissa_finetuning/pissa_finetuning.py",
        "trl",
        "alpaca",
        {**QUICK, "dataset_field": ["instruction", "output"], "dataset_split": "train", "init_lora_weights": "pissa"},
        writes={"output": "pissa_ft"},
    ),
    Script("transformers run_clm.py", "run_clm.py", "examples", "text", {**QUICK, "block_size": 32}),
    Script(
        "mlx_lm lora",
        "mlx_lm lora",
        "mlx",
        "split",
        {"iters": 4, "batch-size": 2, "steps-per-report": 1, "num-layers": 1},
    ),
    Script(
        "DeepExtension mac_save behind mlx_lm lora",
        "mlx_lm lora",
        "mlx",
        "split",
        {"iters": 4, "batch-size": 2, "steps-per-report": 1, "num-layers": 1},
        stages={"saving": f"{DX}mac_code/mac_save.py"},
    ),
    Script(
        "llamafactory-cli train",
        "llamafactory-cli train",
        "foreign",
        "alpaca",
        {**QUICK, "template": "qwen3", "cutoff_len": 64},
        stages=OURS,
    ),
    Script(
        "swift sft",
        "swift sft",
        "swift",
        "alpaca",
        {**QUICK, "model_type": "qwen3", "template": "qwen3", "torch_dtype": "float32", "save_steps": 4},
    ),
    Script(
        "sentence-transformers training_stsbenchmark.py",
        "sentence-transformers/examples/sentence_transformer/training/sts/training_stsbenchmark.py",
        "foreign",
        "text",
    ),
    Script("accelerate nlp_example.py", "accelerate/examples/nlp_example.py", "foreign", "text"),
    Script("simpletuner train", "simpletuner train", "simpletuner", "text"),
    Script("Qwen finetune.py", "Qwen/finetune.py", "trl", "text", QUICK),
    Script("argparse and Trainer", "plain.py", "trl", "text", source=PLAIN, stages=OURS),
    Script(
        "argparse and Trainer under torchrun",
        "plain.py",
        "trl",
        "text",
        source=PLAIN,
        writes={"launcher": {"kind": "torchrun", "processes": 2}},
    ),
)


class Trial:
    """One script on its way through the service."""

    def __init__(self, site: Installation, checkouts: Path, script: Script) -> None:
        self._site, self._checkouts, self._script = site, checkouts, script
        self.outcome = dict.fromkeys("RPSTMVAD", "-")
        self.why = ""

    def run(self) -> None:
        """Take the script as far as it comes; why it came no further is kept."""
        try:
            self._run()
        except _Stopped as stopped:
            self.why = str(stopped)

    def _run(self) -> None:
        script = self._script
        name = self._name()
        found = self._post(f"/scripts/{name.replace(' ', '%20')}:suggest", {"conda_env": script.environment}, "R")
        method = self._method(found)
        self._post("/methods", method, "R")
        self.outcome["R"] = "y"
        try:
            self._train(method)
        finally:  # by then a node has described the options of libraries
            self.outcome["P"] = "y" if self._is_read(method["name"]) else "n"

    def _name(self) -> str:
        """Return what is started, once it lies in the script root."""
        script = self._script
        if script.source:
            (self._site.home / "scripts" / script.start).write_text(script.source)
        elif script.is_file:
            return self._put(script.start, script.beside)
        return script.start

    def _is_read(self, method: str) -> bool:
        """Return whether all options of the training are known; those of libraries are once the node has looked.

        Of a module of the environment, whether those that the row gives are: on another node it may be another version.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            stages = self._site.get(f"/methods/{method}/parameters")["stages"]
            training = next((stage for stage in stages if stage["stage"] == "training"), None)
            if training is None or not training["partly_read"]:
                return training is not None
            as_module = {remark["code"] for remark in training["remarks"]} == {"read_module"}
            if as_module and self._script.parameters.keys() <= training["schema"]["properties"].keys():
                return True
            time.sleep(1)
        return False

    def _method(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return the proposed method with what the person writes, and with the other stages."""
        method = json.loads(json.dumps(found["method"]))
        method["name"] = self._script.name.replace("(", "").replace(")", "").replace("/", "-")
        method["stages"]["training"] |= self._script.writes
        files = {stage: self._other(stage, file) for stage, file in self._script.stages.items()}
        if "saving" in files:
            method["lifecycle"] = ["customized", "complete"]
            method["stages"]["saving"] = files["saving"]
        if "inference-customized" in files:
            method["stages"]["inference-customized"] = files["inference-customized"]
            method["inference"] = {"customized": True}
        if "deployment" in files:
            method["lifecycle"].append("online")
            custom = {"target": "shelf-by-script", **files["deployment"]}
            method["deployment"] = {"target": "shelf"} if self._script.stages["deployment"] == "ours" else custom
        return dict(method)

    def _other(self, stage: str, file: str) -> dict[str, Any]:
        ours = {"saving": "save_model.py", "inference-customized": "ask_model.py", "deployment": "deploy_ollama.py"}
        if file == "ours":
            source = PRESETS / "shared" / ours[stage]
            return {"file": self._put_file(source, f"ours_{ours[stage]}"), "conda_env": self._script.environment}
        return {"file": self._put(file), "conda_env": self._script.environment}

    def _put(self, file: str, beside: Sequence[str] = ()) -> str:
        """Copy a file of a checkout into the script root, where its project has it; return its path there."""
        source = self._checkouts / file
        place = file.removeprefix(DX) if file.startswith(DX) else f"{source.parent.name}/{source.name}"
        for other in beside:
            self._put_file(source.with_name(other), f"{Path(place).parent}/{other}")
        return self._put_file(source, place)

    def _put_file(self, source: Path, place: str) -> str:
        target = self._site.home / "scripts" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return place

    def _train(self, method: Mapping[str, Any]) -> None:
        """Submit the whole chain and follow it; ask the model that the training made."""
        script = self._script
        body = {
            "method": method["name"],
            "base_model": _base(script),
            "dataset": script.rows,
            "through": method["lifecycle"][-1],
            "parameters": dict(script.parameters),
        }
        chain = {job["stage"]: job["id"] for job in self._post("/jobs", body, "S")["chain"]}
        training = self._end_of(chain["training"], "T")
        self.outcome["T"] = self.outcome["S"] = "y"
        found = {"curve": bool(self._site.curve(training["id"])), "progress": bool(training["progress"])}
        self.outcome["M"] = "y" if all(found.values()) else "p" if any(found.values()) else "n"
        said = [f"no {name}" for name, there in found.items() if not there]
        for kind, letter in (("saving", "V"), ("deployment", "D")):
            if kind in chain:
                try:
                    self._end_of(chain[kind], letter)
                    self.outcome[letter] = "y"
                except _Stopped as stopped:
                    said.append(f"{letter}: {stopped}")
        if "inference-customized" in script.stages:
            said += self._ask(training["id"])
        self.why = "; ".join(said)

    def _ask(self, training: str) -> list[str]:
        model = next(one["id"] for one in self._site.get("/models")["items"] if one["job_id"] == training)
        try:
            pieces, _ = self._site.ask(model, "2 plus 3?")
        except AssertionError as error:
            self.outcome["A"] = "n"
            return [f"A: {str(error)[:300]}"]
        self.outcome["A"] = "y" if "".join(pieces).strip() else "n"
        if not self._answers_as_base(model):
            return []
        self.outcome["A"] = "p"
        return ["A: the base model's answers, as a warning says"]

    def _answers_as_base(self, model: str) -> bool:
        """Return whether the comparison that follows the first question found the base model's answer."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = self._site.get(f"/models/{model}")
            compared = found["details"].get("comparison")
            if compared is not None and compared["alike"] is not None:
                return bool(found["warnings"])
            time.sleep(1)
        return False  # a script that loads an adapter ends at the base model: nothing is to be said of it

    def _post(self, path: str, body: Any, letter: str) -> Any:
        answer = self._site.request("POST", path, json=body)
        if answer.status_code >= 300:
            self.outcome[letter] = "n"
            problem = answer.json()
            details = "; ".join(error["detail"] for error in problem.get("errors", ())) or problem["detail"]
            raise _Stopped(details)
        return answer.json()

    def _end_of(self, job: str, letter: str) -> Any:
        """Return the job once it has ended well."""
        try:
            ended = self._site.wait(job)
        except AssertionError:  # it has another end
            ended = self._site.get(f"/jobs/{job}")
        if ended["status"] == "succeeded":
            return ended
        text = self._site.request("GET", f"/jobs/{job}/logs").json().get("text", "")
        self.outcome[letter] = "n"
        if letter == "T":
            self.outcome["S"] = "n" if any(error in text for error in ARGUMENT_ERRORS) else "y"
        raise _Stopped(f"{ended['reason']}: {ended['reason_detail']} … {text[-300:]}")


def _base(script: Script) -> str:
    if script.base:
        return script.base
    if script.rows == "pictures":
        return "seeing"
    return "older" if script.environment in OLDER else "tiny"


class _Stopped(Exception):
    """Why a script came no further."""


def chosen(options: argparse.Namespace, environments: Mapping[str, Path]) -> Iterator[Script]:
    """Yield the scripts that are there, say which are not."""
    for script in SCRIPTS:
        there = not script.is_file or bool(script.source) or (options.checkouts / script.start).is_file()
        if options.only and not any(one in script.name for one in options.only):
            continue
        if there and script.environment in environments:
            yield script
        else:
            print(f"left out: {script.name} ({'no environment ' + script.environment if there else 'no such file'})")


def prepare(site: Installation, base: Path, ollama: str) -> None:
    """Bring the base model, in today's form and in that of transformers 4, the rows and a deploy target."""
    for name in ("tiny", "older", "deep"):
        folder = site.home / "models" / name
        shutil.copytree(base, folder)
        if name == "deep":
            _deepen(folder, layers=16)
        if name == "older":
            config = json.loads((folder / "tokenizer_config.json").read_text())
            config |= {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_input_names": ["input_ids", "attention_mask"],
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            config = json.loads((folder / "config.json").read_text())
            config["rope_theta"] = config["rope_parameters"]["rope_theta"]
            (folder / "config.json").write_text(json.dumps(config))
        site.post("/base-models", {"name": name, "path": name})
    for name, rows in ROWS.items():
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        site.call("PUT", f"/datasets/{name}/file", status=201, content=text.encode())
    pictures = site.home / "datasets" / "pictures"
    draw_all(PICTURES, pictures / "images")
    (pictures / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in SEEN * 4))
    site.post("/datasets", {"name": "pictures", "path": "pictures"})
    split = site.home / "datasets" / "split"
    split.mkdir()
    for part in ("train", "valid", "test"):
        (split / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS["text"]))
    site.post("/datasets", {"name": "split", "path": "split"})
    for target, kind in (("shelf", "ollama"), ("shelf-by-script", "custom")):
        site.post("/deploy-targets", {"name": target, "kind": kind, "url": ollama})


def _deepen(folder: Path, *, layers: int) -> None:
    """Give the base model so many layers: its first one, again and again."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:1] * layers}
    (folder / "config.json").write_text(json.dumps(config))
    content = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    weights, header, offset = [], {}, 0
    for name, tensor in json.loads(content[8:start]).items():
        first = ".layers.0."
        if name == "__metadata__" or (".layers." in name and first not in name):
            continue
        begin, end = tensor["data_offsets"]
        for layer in range(layers if first in name else 1):
            place = [offset, offset := offset + end - begin]
            header[name.replace(first, f".layers.{layer}.")] = {**tensor, "data_offsets": place}
            weights.append(content[start + begin : start + end])
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *weights]))


def main() -> None:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, required=True)
    parser.add_argument("--environment", action="append", default=[], metavar="NAME=PREFIX")
    parser.add_argument("--base", type=Path, required=True, help="folder of a small base model")
    parser.add_argument("--vision-base", type=Path, help="folder of a small base model that sees")
    parser.add_argument("--only", action="append", help="part of a name")
    options = parser.parse_args()
    environments = {name: Path(prefix) for name, _, prefix in (one.partition("=") for one in options.environment)}
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        ollama = stack.enter_context(ollama_stand_in())
        site = stack.enter_context(running_service(redis=True, environments=environments))
        prepare(site, options.base, ollama.url)
        if options.vision_base:
            shutil.copytree(options.vision_base, site.home / "models" / "seeing")
            site.post("/base-models", {"name": "seeing", "path": "seeing"})
        print(f"\n{'script':48} R P  S T M  V A D  a person writes; why it came no further")
        for script in chosen(options, environments):
            trial = Trial(site, options.checkouts, script)
            trial.run()
            letters = "  ".join(" ".join(trial.outcome[letter] for letter in group) for group in ("RP", "STM", "VAD"))
            written = json.dumps(script.writes) if script.writes else "nothing"
            print(f"{script.name:48} {letters}  {written}; {trial.why}", flush=True)


if __name__ == "__main__":
    main()
