"""A script whose parser is made of dataclasses, with every kind of field that such parsers know."""

SCRIPT = '''
import dataclasses
import enum
import sys
from dataclasses import dataclass, field
from typing import ClassVar, List, Literal, Optional, Union

from transformers import HfArgumentParser

RATES = {"slow": 1e-5}


class Kind(enum.Enum):
    FULL = "full"
    LORA = "lora"


@dataclass
class Model:
    model_name_or_path: str = field(metadata={"help": "Model or its folder."})
    plain: bool = field(metadata={"help": "Without a default."})
    revision: Optional[str] = field(default=None, metadata={"help": "Which of them."})
    kind: Kind = Kind.LORA.value
    dtype: Literal["auto", "bfloat16"] = "auto"
    rank: int = field(default=8, metadata={"aliases": ["-r", "--lora_rank"]})
    heads: Union[int, None] = None
    rate: "float" = RATES["slow"]
    fast: bool = True
    quiet: bool = False
    perhaps: Optional[bool] = None
    layers: List[str] = field(default_factory=lambda: ["q", "v"])
    sizes: list[int] = dataclasses.field(default_factory=list)
    words: Optional[list[str]] = None
    level: str = field(default="low", metadata={"choices": ["low", "high"]})
    options: Optional[Union[dict, str]] = None
    many: ClassVar[int] = 3
    computed: int = field(init=False, default=0)

    def __post_init__(self):
        self.computed = self.rank * 2


@dataclass
class Data(Model):
    """The fields of the other class first."""

    quiet: bool = True
    train_file: Optional[str] = None


def make_parser():
    return HfArgumentParser(Data)


def main():
    parser = make_parser()
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        (data,) = parser.parse_json_file(json_file=sys.argv[1])
    else:
        (data,) = parser.parse_args_into_dataclasses()
    print(dataclasses.asdict(data))


if __name__ == "__main__":
    main()
'''
