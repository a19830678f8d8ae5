"""Put a trained teacher and its students into the package, in half precision.

python examples/zoo/assemble.py --pipeline runs/unet/pipeline --student linfusion=runs/student
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

import linfusion
from linfusion.lit.whole import load_whole
from linfusion.pipelines.load import load as load_pipeline
from linfusion.students.low_rank import save_low_rank
from linfusion.students.student import LinFusion

ZOO = Path(__file__).parents[2] / "linfusion" / "zoo"
LIMIT = 24_000_000  # bytes of a teacher and its students
LIMIT_WHOLE = 32_000_000  # where a student is a second model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="emoji")
    parser.add_argument("--pipeline", type=Path, default=Path("runs/unet/pipeline"))
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="subfolder it gets, and where it was trained; repeat",
    )
    parser.add_argument(
        "--rank", type=int, help="keep students as a difference of that rank to the teacher"
    )
    parser.add_argument("--whole", type=Path, help="a student that is a whole transformer")
    args = parser.parse_args()
    students = [student.partition("=")[::2] for student in args.student]
    if not all(name and folder for name, folder in students):
        parser.error(f"--student: expected NAME=FOLDER, got {args.student}")

    tmp = ZOO / f"{args.name}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    pipe = load_pipeline(str(args.pipeline), dtype=torch.float16)
    if not (students or args.whole or isinstance(pipe, linfusion.LinGenPipeline)):
        parser.error(f"--student: expected one or more of a {type(pipe).__name__}, got none")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.half()  # T5 keeps some of its own in float32
    if args.whole:
        load_whole(pipe, args.whole).save_pretrained(tmp / "teacher")
    pipe.save_pretrained(tmp)
    for name, folder in students:
        if args.rank is None:
            student = LinFusion.from_pretrained(folder, dtype=torch.float16)
            student.save_pretrained(tmp / name)
        else:
            linfusion.linearize(pipe, weights=folder)
            print(name, save_low_rank(pipe, tmp / name, rank=args.rank))
            linfusion.restore(pipe)
    for file in tmp.rglob("*.json"):  # where it was trained is nobody's concern
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = sum(file.stat().st_size for file in tmp.rglob("*") if file.is_file())
    limit = LIMIT_WHOLE if args.whole else LIMIT
    if size > limit:
        shutil.rmtree(tmp)
        raise SystemExit(f"{size:,} bytes; the package has room for {limit:,}")
    target = ZOO / args.name
    card = target / "README.md"
    if card.exists():
        shutil.copy2(card, tmp / card.name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(tmp, target)
    print(f"{target}: {size:,} bytes")


if __name__ == "__main__":
    main()
