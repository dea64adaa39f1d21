"""Data of your own: a table with one question per row becomes the JSONL that veripo trains on.

    python examples/own_data.py questions.csv questions.jsonl
    veripo inspect questions.jsonl --out seen                      # what would be skipped, and why; what it costs
    veripo train --config configs/tiny.yaml --data.train questions.jsonl --data.eval []

The table has the columns video, question, answer, and A to D: empty for a question without options. Videos are paths
from the table's folder. Other layouts that are read as they are: README.md.
"""

import csv
import json
import sys
from pathlib import Path

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.prompts import load_prompts


def record(row: dict[str, str], number: int, folder: Path) -> dict[str, object]:
    """One line of the JSONL file."""
    options = [f"{letter}. {row[letter]}" for letter in "ABCD" if row[letter]]
    is_number = row["answer"].replace(".", "", 1).isdigit()
    return {"problem_id": f"own-{number}", "problem": row["question"], "options": options, "solution": row["answer"],
            "problem_type": "multiple choice" if options else "numerical" if is_number else "free-form",
            "data_type": "video", "path": str(folder / row["video"]), "data_source": "own"}


def main(table: Path, out: Path) -> None:
    with table.open(newline="", encoding="utf-8") as file:
        rows = [record(row, number, table.parent.resolve()) for number, row in enumerate(csv.DictReader(file))]
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    prompts, skipped = load_prompts([str(out)], DataConfig())
    print(f"{len(prompts)} prompts, {len(skipped)} skipped")
    for item in skipped:
        print(f"{item.record}: {item.reason}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
