"""`python -m generate.inpaint RUN IMAGE --box 8,8,12,12`: fill, extend or vary an image with a
trained prior."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from generate.sample import (
    add_class_options,
    add_sampling_options,
    check_counts,
    chosen_classes,
    find_prior,
    sampling_options,
)
from training.command import Parser, run_command
from training.errors import UserError


def numbers(count: int) -> Any:
    """An argument of so many whole numbers with commas between."""

    def parse(text: str) -> tuple[int, ...]:
        values = tuple(int(part) for part in text.split(","))
        if len(values) != count:
            raise ValueError
        return values

    parse.__name__ = f"{count} numbers"
    return parse


def shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m generate.inpaint",
        description="Make part of an image anew with a trained prior. Without a hole all of it is: say what to --keep.",
    )
    parser.add_argument(
        "run", type=Path, help="a prior's run folder, or a root folder that holds prior/"
    )
    parser.add_argument("image", help="a picture file, or train:N or held_out:N of the data")
    holes = parser.add_mutually_exclusive_group()
    holes.add_argument(
        "--mask",
        type=Path,
        help="picture that is white where to fill; cut and resized as the image",
    )
    holes.add_argument(
        "--box",
        type=numbers(4),
        metavar="Y,X,H,W",
        help="fill a box, in pixels of the resized image",
    )
    holes.add_argument(
        "--shift",
        type=numbers(2),
        metavar="DOWN,RIGHT",
        help="move the image and fill the gap: --shift=-8,0",
    )
    holes.add_argument("--border", type=int, metavar="PIXELS", help="fill the outermost pixels")
    parser.add_argument(
        "--keep",
        type=shares,
        default=(0.0,),
        metavar="SHARE",
        help="of the hole's codes, or one per level: 1,0.3 (0)",
    )
    parser.add_argument(
        "--dilate", type=int, default=1, help="codes around the hole that are drawn too (1)"
    )
    parser.add_argument(
        "--no-composite", action="store_true", help="leave the pixels outside the hole as decoded"
    )
    add_class_options(parser, "the image's own, none of a file")
    parser.add_argument("--num", type=int, default=6, help="results of each class (6)")
    parser.add_argument("--out", type=Path, help="output folder (edits/ beside the prior)")
    add_sampling_options(parser)
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    check_counts(arguments, "num", "batch_size")

    import torch

    from generate import edit
    from generate.drawing import Request
    from priors.record import read_record
    from tokenizer.run import load_config
    from training import distributed

    folder = find_prior(arguments.run)
    record = read_record(folder)
    data = load_config(record.tokenizer_folder(folder)).data
    image, label = edit.open_image(arguments.image, data, folder / record.tokens)
    size = tuple(image.shape[1:])
    if arguments.mask:
        hole = edit.read_picture(arguments.mask, data)[0] >= 128
    elif arguments.box:
        hole = edit.box(size, *arguments.box)
    elif arguments.border is not None:
        hole = edit.border(size, arguments.border)
    elif arguments.shift:
        image, hole = edit.shifted(image, *arguments.shift)
    else:
        hole = torch.ones(size, dtype=torch.bool)
        if not any(arguments.keep):
            raise UserError(
                "nothing says what to make anew: give --mask, --box, --shift, --border, or --keep a share"
            )
    if arguments.classes or arguments.unconditional or label is None:
        arguments.unconditional |= not arguments.classes
        classes = chosen_classes(arguments, record.class_names)
    else:
        classes = (label,)
    options = sampling_options(arguments, record.sampling)
    request = Request(arguments.num * len(classes), classes, options, precision=arguments.precision)
    wanted = edit.Edit(hole, arguments.keep, arguments.dilate, not arguments.no_composite)
    distributed.start()
    out = arguments.out or folder.parent / "edits"
    edit.write_edits(folder, record, image, wanted, request, out, arguments.batch_size)
    distributed.finish()


if __name__ == "__main__":
    run_command(main)
