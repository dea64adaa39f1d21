"""A reward of your own: half a point for a reasoning that weighs at least two options, if the answer is right.

    veripo synth corpus --train 48 --heldout 24
    python examples/own_reward.py --grpo.steps 10

Everything behind the file's name is an option of `veripo train`. A run of the command line takes the same function by
`reward.terms`: docs/recipes.md. The function sees one prompt with all its completions, and returns a number for each.
"""

import sys
from pathlib import Path

import veripo_fast


def weighs_options(asked, least=2):
    """1 for a completion whose reasoning names at least `least` of the options, else 0."""
    column = []
    for completion in asked.completions:
        words = (completion.think or "").replace(".", " ").split()
        named = {letter for letter in "ABCD"[:len(asked.prompt.options)] if letter in words}
        column.append(float(len(named) >= least))
    return column


TERMS = f"""[{{use: accuracy}}, {{use: format, weight: 0.5}},
             {{use: "{__file__}:weighs_options", weight: 0.5, 'on': accuracy > 0, options: {{least: 2}}}}]"""

if __name__ == "__main__":
    tiny = Path(__file__).parents[1] / "configs" / "tiny.yaml"
    veripo_fast.train(veripo_fast.load_config(tiny, ["--reward.terms", TERMS, *sys.argv[1:]]))
