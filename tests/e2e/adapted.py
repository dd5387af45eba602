"""Custom01 as somebody adapts it: a training that can be slowed down and made to fail."""

from app.presets.catalogue import script_path

DECLARED = '    parser.add_argument("--save_steps"'
PAUSE = '    parser.add_argument("--pause", type=float, default=0.0, help="seconds to rest after each step")\n'
HURRY = '    parser.add_argument("--hurry", default="", help="file from whose appearance on nothing rests")\n'
NEEDS = '    parser.add_argument("--needs", default="", help="file without which the training fails")\n'
LEARN = "        loss = model.learn(batch, rate)\n"
REST = "        if args.pause and not Path(args.hurry).is_file():\n            time.sleep(args.pause)\n"
BEGIN = "    output = Path(args.output_dir)\n"
CHECK = '    if args.needs and not Path(args.needs).is_file():\n        raise ValueError(f"{args.needs} is missing")\n'


def adapted_custom01() -> str:
    """Return the template with the parameters `pause`, `hurry` and `needs` of our own."""
    text = script_path("custom01.py").read_text("utf-8")
    for place, more in (
        ("import sys\n", "import sys\nimport time\n"),
        (DECLARED, f"{PAUSE}{HURRY}{NEEDS}{DECLARED}"),
        (LEARN, f"{LEARN}{REST}"),
        (BEGIN, f"{CHECK}{BEGIN}"),
    ):
        assert text.count(place) == 1, place
        text = text.replace(place, more)
    return text
