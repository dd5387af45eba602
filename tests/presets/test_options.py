"""Options of the libraries' own configuration classes reach what the trainers hold, or are refused with a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import JobKind
from app.domain.known_parameters import KNOWN
from app.domain.library_options import OptionClass
from app.domain.rendering import filled_arguments
from app.executor.environments import environment_probe
from app.executor.environments.environment_probe import describe
from app.presets import catalogue
from tests import training_environment
from tests.argspec.reading import read_shipped
from tests.presets.conftest import NewHome
from tests.presets.stage import Home, dataset

# Runs a script's main function for each case up to the training, and tells what its trainer holds then.
DRIVER = """
import contextlib, importlib.util, io, json, sys
from pathlib import Path

script, cases = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
spec = importlib.util.spec_from_file_location("stage", script)
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)
import deepe_llm as llm

held = []

def train(trainer, rows, args):
    llm.options_of(args).fit(trainer)
    adapter, given = trainer.model.peft_config["default"], args.options.given
    held[:] = [{
        "trainer": {name: getattr(trainer.args, name) for name in given if hasattr(trainer.args, name)},
        "adapter": {name: getattr(adapter, name) for name in given if hasattr(adapter, name)},
        "epochs": trainer.args.num_train_epochs,
        "by": [trainer.args.lr_scheduler_type.value, trainer.args.optim.value],
        "kind": type(adapter).__name__,
        "whole": [name for name, one in trainer.model.named_parameters() if one.requires_grad and "lm_head" in name],
    }]

llm.train = train
llm.save_adapter = lambda trainer, args: None
answers = []
for words in cases:
    held.clear()
    sys.argv = [script, *words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            stage.main()
        answers.append(held[0])
    except SystemExit as refusal:
        answers.append({"refused": str(refusal), "loaded": "InitializingModel" in said.getvalue()})
print("answers " + json.dumps(answers, default=str))
"""
OPTION_SCRIPTS = (
    *("sft-demo.py", "peft-demo.py", "dpo-demo.py", "grpo-demo.py", "ppo-demo.py", "vl-demo.py", "embedding-demo.py"),
    *("reward-demo.py", "reranker-demo.py"),
)
Answers = dict[str, dict[str, Any]]
Holds = Callable[[str, Path, Path, dict[str, list[str]]], Answers]


@pytest.fixture(scope="module")
def holds(new_home: NewHome) -> Holds:
    """Return what tells what the trainers of a script hold in named cases; one process for all cases."""
    home = new_home("options")
    (home.scripts / "driver.py").write_text(DRIVER)

    def run(script: str, base: Path, rows: Path, cases: dict[str, list[str]]) -> Answers:
        paths = [f"--model_path={base}", f"--dataset_path={rows}", f"--output_dir={home.path}/out"]
        small = ["--max_samples=40", "--eval_fraction=0", "--batch_size=4", "--max_steps=2"]
        file = home.path / f"{script}.json"
        file.write_text(json.dumps([[*paths, *small, *words] for words in cases.values()]))
        finished = home.run("driver.py", script, str(file))
        assert finished.code == 0, finished.stderr
        (line,) = [line for line in finished.stdout.splitlines() if line.startswith("answers ")]
        return dict(zip(cases, json.loads(line.removeprefix("answers ")), strict=True))

    return run


@pytest.fixture(scope="module")
def found(holds: Holds, tiny_base: Path) -> Answers:
    return holds(
        "sft-demo.py",
        tiny_base,
        dataset("sft-demo"),
        {
            "many": [
                "--neftune_noise_alpha=5",
                "--use_rslora=True",
                '--modules_to_save=["lm_head"]',
                "--lr_scheduler_kwargs={}",
                "--adam_beta2=0.95",
                "--num_train_epochs=3",
                "--weight_decay=0.1",
                "--max_grad_norm=0.3",
                "--lora_dropout=0.05",
                # of the platform, which no class has
                "--num_generations=2",
                "--train_env=trl",
                "--train_file_name=sft-demo.py",
            ],
            "measured": [
                "--eval_fraction=0.5",
                "--eval_on_start=true",
                "--load_best_model_at_end=true",
                "--metric_for_best_model=eval_loss",
                "--eval_steps=2",
                "--save_steps=2",
            ],
            "measured without rows": ["--eval_on_start=true"],
            "early without rows": ["--early_stopping_patience=2"],
            "early without a match": ["--eval_fraction=0.5", "--early_stopping_patience=2", "--save_steps=7"],
            "best without a match": ["--eval_fraction=0.5", "--load_best_model_at_end=true", "--save_steps=7"],
            "unknown": ["--neftune_alpha=5"],
            "of the platform": ["--run_name=mine"],
            "streamed": ["--streaming=true"],
            "other name": ["--max_length=99"],
            "wrong type": ["--adam_beta2=high"],
            "twice": ["--adam_beta2=0.9", "--adam_beta2=0.8"],
            "wrong module": ['--target_modules=["nowhere"]'],
            "scheduler": ["--lr_scheduler=inverse_sqrt", "--optim=sgd"],
            "no scheduler": ["--lr_scheduler=cosin"],
            "none": [],
        },
    )


@pytest.mark.training
@pytest.mark.xdist_group("options")
class TestSft:
    def test_trainer_and_adapter_hold_what_was_given(self, found: Answers) -> None:
        assert found["many"] == {
            "trainer": {
                "neftune_noise_alpha": 5.0,
                "lr_scheduler_kwargs": {},
                "adam_beta2": 0.95,
                "weight_decay": 0.1,
                "max_grad_norm": 0.3,
            },
            "adapter": {"use_rslora": True, "modules_to_save": ["lm_head"], "lora_dropout": 0.05},
            "epochs": 3.0,
            "by": ["cosine", "adamw_torch_fused"],
            "kind": "LoraConfig",
            "whole": found["many"]["whole"],
        }
        assert any("modules_to_save" in name for name in found["many"]["whole"])
        assert found["none"] == {
            "trainer": {},
            "adapter": {},
            "epochs": 1.0,
            "by": ["cosine", "adamw_torch_fused"],
            "kind": "LoraConfig",
            "whole": [],
        }
        assert found["scheduler"]["by"] == ["inverse_sqrt", "sgd"]

    def test_best_checkpoint_is_taken_where_rows_are_held_out(self, found: Answers) -> None:
        assert found["measured"]["trainer"] == {
            "eval_on_start": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }

    @pytest.mark.parametrize(
        ("case", "sentence"),
        [
            ("measured without rows", "eval_on_start would have no effect"),
            ("early without rows", "early_stopping_patience needs rows to measure on"),
            ("early without a match", "save_steps (7) must be a multiple of eval_steps (100)"),
            ("best without a match", "the library does not accept load_best_model_at_end=True: "),
            (
                "unknown",
                "there is no parameter neftune_alpha, neither of the script nor of trl.SFTConfig, peft.LoraConfig",
            ),
            ("unknown", "did you mean neftune_noise_alpha"),
            ("unknown", "(trl 1."),
            ("of the platform", "run_name cannot be set: the platform sets it; leave it out"),
            ("streamed", "streaming cannot be set: the rows are prepared by the method itself"),
            ("other name", "use max_seq_length"),
            ("wrong type", "adam_beta2 must be a number, it is 'high' (trl.SFTConfig)"),
            ("twice", "adam_beta2 is given twice"),
            ("no scheduler", "lr_scheduler_type must be one of linear, cosine, "),
            ("wrong module", "the library does not accept target_modules=['nowhere']"),
        ],
    )
    def test_what_cannot_be_is_refused_with_a_sentence(self, found: Answers, case: str, sentence: str) -> None:
        assert sentence in found[case]["refused"]


@pytest.mark.training
@pytest.mark.xdist_group("options")
class TestOthers:
    def test_preferences(self, holds: Holds, styles_base: Path) -> None:
        found = holds(
            "dpo-demo.py",
            styles_base,
            dataset("dpo-demo"),
            {
                "ipo": ["--loss_type=ipo"],
                "several": ['--loss_type=["hinge"]', "--label_smoothing=0.1", "--use_rslora"],
                "kto": ["--objective=kto", "--desirable_weight=1.5"],
                "orpo": ["--objective=orpo", "--disable_dropout=False"],
                "of another": ["--desirable_weight=1.5"],
                "both": ["--sft_weight=1", "--loss_type=ipo"],
            },
        )

        rewards = holds(
            "reward-demo.py",
            styles_base,
            dataset("dpo-demo"),
            {"centred": ["--center_rewards_coefficient=0.01", "--adam_beta2=0.9", "--use_rslora"]},
        )

        assert rewards["centred"]["trainer"] == {"center_rewards_coefficient": 0.01, "adam_beta2": 0.9}
        assert rewards["centred"]["adapter"] == {"use_rslora": True}
        assert found["ipo"]["trainer"] == {"loss_type": ["ipo"]}
        assert found["several"]["trainer"] == {"loss_type": ["hinge"], "label_smoothing": 0.1}
        assert found["several"]["adapter"] == {"use_rslora": True}
        assert found["kto"]["trainer"] == {"desirable_weight": 1.5}
        assert found["orpo"]["trainer"] == {"disable_dropout": False}
        assert "it is an option of trl.KTOConfig, with objective=kto; leave it out" in found["of another"]["refused"]
        assert "both say what the loss is made of" in found["both"]["refused"]

    def test_rewards(self, holds: Holds, styles_base: Path) -> None:
        found = holds(
            "grpo-demo.py",
            styles_base,
            dataset("grpo-demo"),
            {
                "many": [
                    *("--epsilon_high=0.28", "--scale_rewards=batch", "--num_iterations=2"),
                    *("--top_p=0.9", "--mask_truncated_completions=False", "--num_generations=4"),
                ],
                "other name": ["--beta=0.1"],
            },
        )

        assert found["many"]["trainer"] == {
            "epsilon_high": 0.28,
            "scale_rewards": "batch",
            "num_iterations": 2,
            "top_p": 0.9,
            "mask_truncated_completions": False,
        }
        assert "use kl_coef" in found["other name"]["refused"]

    def test_kinds_of_adapter(self, holds: Holds, tiny_base: Path) -> None:
        found = holds(
            "peft-demo.py",
            tiny_base,
            dataset("sft-demo"),
            {
                "lora": ["--adapter=lora", "--use_dora=true", "--init_lora_weights=gaussian", "--lora_r=4"],
                "oft": ["--adapter=oft", "--coft=true"],
                "loha": ["--adapter=loha", "--rank_dropout=0.1"],
                "lokr": ["--adapter=lokr", "--decompose_both=true"],
                "adalora": ["--adapter=adalora", "--target_r=5"],
                "ia3": ["--adapter=ia3", "--init_ia3_weights=false"],
                "vera": ["--adapter=vera", "--d_initial=0.2"],
                "prompt_tuning": ["--adapter=prompt_tuning", "--prompt_tuning_init=RANDOM"],
                "of another": ["--adapter=ia3", "--use_rslora=true"],
                "against itself": ["--adapter=dora", "--use_dora=false"],
            },
        )

        assert {case: (one["kind"], one["adapter"]) for case, one in found.items() if "kind" in one} == {
            "lora": ("LoraConfig", {"use_dora": True, "init_lora_weights": "gaussian"}),
            "oft": ("OFTConfig", {"coft": True}),
            "loha": ("LoHaConfig", {"rank_dropout": 0.1}),
            "lokr": ("LoKrConfig", {"decompose_both": True}),
            "adalora": ("AdaLoraConfig", {"target_r": 5}),
            "ia3": ("IA3Config", {"init_ia3_weights": False}),
            "vera": ("VeraConfig", {"d_initial": 0.2}),
            "prompt_tuning": ("PromptTuningConfig", {"prompt_tuning_init": "RANDOM"}),
        }
        assert "use_rslora has no effect here: it is an option of peft.LoraConfig" in found["of another"]["refused"]
        assert "contradict each other" in found["against itself"]["refused"]


@pytest.mark.training
@pytest.mark.xdist_group("options")
@pytest.mark.parametrize("script", ["ppo-demo", "embedding-demo"])
def test_loops_of_our_own_take_the_adapters_options(torch_home: Home, styles_base: Path, script: str) -> None:
    base = training_environment.base_model("tiny-encoder") if script == "embedding-demo" else styles_base
    rows = dataset("embedding-demo" if script == "embedding-demo" else "grpo-demo")
    paths = [f"--model_path={base}", f"--dataset_path={rows}", "--output_dir=out"]
    small = ["--max_samples=16", "--eval_fraction=0", "--max_steps=1", "--batch_size=4", "--max_grad_norm=0.5"]
    small += ["--rollouts=4"] if script == "ppo-demo" else []

    run = torch_home.run(f"{script}.py", *paths, *small, "--use_rslora=true", '--modules_to_save=["norm"]')
    other = torch_home.run(f"{script}.py", *paths[:2], "--output_dir=other", *small, "--adapter=hra")
    refused = torch_home.run(f"{script}.py", *paths, *small, "--neftune_noise_alpha=5")

    assert run.code == 0, run.stderr
    config = json.loads((torch_home.scripts / "out" / "adapter_config.json").read_text("utf-8"))
    assert (config["use_rslora"], config["modules_to_save"]) == (True, ["norm"])
    assert other.code == 0, other.stderr
    config = json.loads((torch_home.scripts / "other" / "adapter_config.json").read_text("utf-8"))
    assert config["peft_type"] == "HRA"
    assert refused.code == 1
    assert "there is no parameter neftune_noise_alpha" in refused.stderr


@pytest.mark.training
@pytest.mark.xdist_group("options")
@pytest.mark.parametrize(
    ("script", "word", "sentence"),
    [
        ("dpo-demo", "--loss_type=simpel", "accept loss_type=['simpel']: Unknown loss type: simpel"),
        ("sft-demo", "--use_liger_kernel=true", "use_liger_kernel=true needs the package liger-kernel"),
    ],
)
def test_value_that_only_the_training_looks_at_is_refused_with_a_sentence(
    torch_home: Home, styles_base: Path, script: str, word: str, sentence: str
) -> None:
    paths = [f"--model_path={styles_base}", f"--dataset_path={dataset(script)}", "--output_dir=out"]

    run = torch_home.run(f"{script}.py", *paths, "--max_samples=8", "--eval_fraction=0", "--max_steps=1", word)

    assert run.code == 1
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.training
@pytest.mark.xdist_group("options")
def test_environment_describes_every_class_that_scripts_name(
    training_python: Path, mlx_python: Path, option_paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_probe, "LOWEST_PRIORITY", 0)  # beside other tests it would hardly get a turn
    described, trouble, ended = describe(training_python.parent.parent, option_paths, {"PATH": "/usr/bin:/bin"})
    mlx = [use.path for use in read_shipped("mlx-demo.py").option_classes]
    of_mlx, trouble_of_mlx, _ = describe(mlx_python.parent.parent, mlx, {"PATH": "/usr/bin:/bin"})

    assert (trouble, trouble_of_mlx, ended) == ({}, {}, True)
    found = {one.path: one for one in described}
    assert list(found) == option_paths
    described = [*described, *of_mlx]
    optimizer = of_mlx[0].find("optimizer")
    assert optimizer is not None
    assert (optimizer.default, optimizer.choices) == ("adam", ("adam", "adamw", "muon", "sgd", "adafactor"))
    assert of_mlx[0].library == "mlx_lm"
    sft = found["trl.SFTConfig"]
    assert (sft.library, len(sft.fields) > 100) == ("trl", True)
    assert all(one.help for one in sft.fields)
    for one in described:
        assert OptionClass.model_validate(one.document()).digest == one.digest
        assert len(json.dumps(one.document())) < 100_000
    fields = {one.path: one.names for one in described}
    table = catalogue.option_table()
    missing = [name for name in table.chosen if not any(name in names for names in fields.values())]
    assert missing == []


@pytest.fixture(scope="module")
def option_paths() -> list[str]:
    """Return the classes that the shipped scripts of the `trl` environment name."""
    paths: dict[str, None] = {}
    for name in OPTION_SCRIPTS:
        script = read_shipped(name)
        assert not script.partly_read, script.unread
        paths |= dict.fromkeys(use.path for use in script.option_classes)
    return list(paths)


def test_scripts_ignore_just_what_the_platform_passes_to_all(home: Home) -> None:
    program = "import deepe_options as o, json; print(json.dumps(sorted(o.PASSED_BY_PLATFORM | o.PASSED_TO_ALL)))"
    (home.scripts / "names.py").write_text(program)
    declared = {"train_id", "seq", "model_name", "model_path", "dataset_path", "output_dir"}

    passed = json.loads(home.run("names.py").stdout)

    filled = {*filled_arguments(JobKind.TRAINING), *filled_arguments(JobKind.SAVING)}
    assert set(passed) == KNOWN.keys() | filled - declared
