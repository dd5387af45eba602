"""What a script without a parser reads, read from its text and through the bounded reader."""

from app.argspec.client import BoundedReader
from app.argspec.inputs import Inputs, Named, Variable, Word

SCRIPT = b"""
import os, sys
from datasets import load_dataset
model_name = sys.argv[1] if len(sys.argv) > 1 else "distilbert-base-uncased"
other = "org/data"
twice = "a"
twice = "b"
folder: str = "output/" + model_name + "-here"
folder_of_data = os.environ["DATA_DIR"]
epochs = int(os.getenv("EPOCHS", "3"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
    pass
model = SentenceTransformer(model_name)
tokenizer = AutoTokenizer.from_pretrained("org/tokenizer")
rows = load_dataset(other, split="train")
load_dataset(twice)
args = TrainingArguments(output_dir=folder)
"""


def test_what_a_script_reads_and_names_itself() -> None:
    reader = BoundedReader()
    try:
        found = reader.inputs(SCRIPT)
        assert reader.inputs(b"def (") == Inputs()
    finally:
        reader.close()
    assert list(found.variables) == [Variable("DATA_DIR", True, 9), Variable("EPOCHS", False, 10)]
    assert list(found.words) == [Word(1, "model_name", 4)]
    assert list(found.named) == [
        Named("model", "org/tokenizer", 15),
        Named("data", "org/data", 16),
        Named("output", "output/…", 18),
    ]
