"""Measure a pipeline or its tokenizer, or compare tokenizers: python -m eval.run COMMAND FOLDER."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from training.command import Parser, UserError, run_command

if TYPE_CHECKING:
    from eval.pipeline import Options, Pipeline
    from eval.record import Record


def main() -> None:
    arguments = parse()
    import torch

    from training import distributed

    torch.backends.cudnn.allow_tf32 = False  # a GPU's default, worth a percent of a distance
    distributed.start()
    COMMANDS[arguments.command](options(arguments))
    distributed.finish()


def reconstruction(options: Options) -> None:
    """a tokenizer on held-out images: PSNR, SSIM, LPIPS, rFD, codebook, rate"""
    from eval.pipeline import Pipeline
    from eval.reconstruction import measure_reconstruction

    pipeline = Pipeline(options)
    show(pipeline, [measure_reconstruction(pipeline)])


def probe(options: Options) -> None:
    """what a linear classifier reads from a tokenizer's features and codes, and from pixels"""
    from eval.pipeline import Pipeline
    from eval.probe import measure_probe

    pipeline = Pipeline(options)
    show(pipeline, [measure_probe(pipeline)])


def quantizers(options: Options) -> None:
    """the tokenizers' runs in FOLDER side by side: FOLDER/quantizers.md, quantizers.json and pictures"""
    from eval.quantizers import compare_quantizers

    compare_quantizers(options)


def generation(options: Options) -> None:
    """RUN/samples against real images: FD, IS, precision and recall, class agreement"""
    from eval.generation import measure_generation
    from eval.pipeline import Pipeline

    pipeline = Pipeline(options)
    show(pipeline, [measure_generation(pipeline)])


def report(options: Options) -> None:
    """reconstruction and generation, and RUN/report/report.html, report.md and report.json from them"""
    from eval.generation import measure_generation
    from eval.pipeline import Pipeline
    from eval.reconstruction import measure_reconstruction
    from eval.report import find_stages, write_report
    from eval.tables import headlines, text_table, unique_figures
    from training import distributed

    pipeline = Pipeline(options)
    records = [measure_reconstruction(pipeline), measure_generation(pipeline)]
    if not distributed.is_main():
        return
    extractor = options.extractor or pipeline.folder / "extractor"
    stages = find_stages(pipeline.folder, [pipeline.tokenizer_folder, extractor])
    title = f"{pipeline.folder.resolve().name} on {pipeline.held_out.name}"
    written = write_report(pipeline.report_folder, title, records, stages, pipeline.tokens.class_names)
    for note in dict.fromkeys(note for record in records for note in record.notes):
        print(note)
    print(text_table(headlines(unique_figures(records))))
    state = "written" if written else "up to date"
    print(f"{pipeline.report_folder / 'report.html'}: {state}", flush=True)


def show(pipeline: Pipeline, records: list[Record]) -> None:
    from eval.tables import text_table, unique_figures
    from training import distributed

    if distributed.is_main():
        for note in dict.fromkeys(note for record in records for note in record.notes):
            print(note)
        print(text_table(unique_figures(records)))
        print(", ".join(str(pipeline.report_folder / f"{record.kind}.json") for record in records), flush=True)


COMMANDS = {
    "reconstruction": reconstruction,
    "generation": generation,
    "report": report,
    "probe": probe,
    "quantizers": quantizers,
}
PIPELINE = ("RUN", "the pipeline's folder, which holds tokens/")
EITHER = ("RUN", "a tokenizer's run folder, or a pipeline's, which holds tokens/")
FOLDERS = {"reconstruction": EITHER, "probe": EITHER, "quantizers": ("FOLDER", "folder of tokenizers' run folders")}


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m eval.run", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        metavar, explained = FOLDERS.get(name, PIPELINE)
        command.add_argument("run", type=Path, metavar=metavar, help=explained)
        command.add_argument("--num", type=int, help="measure at most so many images of each set")
        command.add_argument("--batch-size", type=int, default=100)
        command.add_argument("--fresh", action="store_true", help="measure again; extractors stay")
        if name == "probe":
            command.add_argument(
                "--encoder", metavar="NAME", help="folder or Hub name of the pretrained encoder that the run began with"
            )
            continue
        command.add_argument("--lpips-weights", type=Path, metavar="PATH", help="trunk of LPIPS, torchvision's file")
        command.add_argument("--lpips-net", default="squeeze", choices=("squeeze", "alex", "vgg"))
        command.add_argument(
            "--inception-weights", type=Path, metavar="PATH", help="weights-inception-2015-12-05-6726825d.pth"
        )
        command.add_argument(
            "--extractor", type=Path, metavar="RUN", help="in-domain extractor; a pipeline's is RUN/extractor"
        )
        if name == "quantizers":
            command.add_argument(
                "--allow-differences", nargs="+", default=(), metavar="FIELD", help="settings that may differ"
            )
    return parser.parse_args()


def options(arguments: argparse.Namespace) -> Options:
    from eval.pipeline import Options

    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    for name, least in (("num", 2), ("batch_size", 1)):
        if given[name] is not None and given[name] < least:
            raise UserError(f"--{name.replace('_', '-')} {given[name]}: must be at least {least}")
    if "allow_differences" in given:
        given["allow_differences"] = tuple(given["allow_differences"])
    return Options(**given)


if __name__ == "__main__":
    run_command(main)
