"""What scripts that train and ask language models import, done before a script is known.

A script that says `DEEPE_WARM = "warm_trl"` may be started where this file has run. It sets what such scripts set
before their own imports (`deepe_llm.prepare_environment`), and touches no accelerator.
"""

import contextlib
import importlib
import os

QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
MODULES = (
    "torch",
    "datasets",
    "peft",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
)

for name, value in QUIET_AND_OFFLINE.items():
    os.environ.setdefault(name, value)
for name in MODULES:
    with contextlib.suppress(ImportError):  # the script says what it misses
        importlib.import_module(name)
