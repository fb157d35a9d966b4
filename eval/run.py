"""Measure a pipeline or its tokenizer, or compare several: python -m eval.run COMMAND FOLDER."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from training.command import Parser, run_command
from training.errors import UserError
from training.precision import HELP as PRECISION_HELP
from training.precision import PRECISIONS
from training.text import printable

if TYPE_CHECKING:
    from eval.pipeline import Options, Pipeline
    from eval.record import Record

MOST = 10**9  # images: more is a slip of the hand
PROTOCOLS = (
    "adm",
    "llamagen",
    "clean-fid",
    "torch-fidelity",
)  # eval.extractors.fid_protocols', named here for --help alone


def main() -> None:
    arguments = parse()
    from training import distributed

    distributed.start()
    if arguments.command in OTHERS:
        OTHERS[arguments.command](arguments)
    else:
        COMMANDS[arguments.command](options(arguments))
    distributed.finish()


def reconstruction(options: Options) -> None:
    """a tokenizer on held-out images: PSNR, SSIM, LPIPS, rFD, codebook, rate"""
    from eval.pipeline import Pipeline
    from eval.reconstruction import measure_reconstruction

    pipeline = Pipeline(options)
    show(pipeline, [measure_reconstruction(pipeline, *options.protocol)])


def codebook(options: Options) -> None:
    """how held-out images use the codes: usage, perplexity, dead codes, entropy by position,
    neighbours"""
    from eval.pipeline import Pipeline
    from eval.token_records import measure_codebook

    pipeline = Pipeline(options)
    show(pipeline, [measure_codebook(pipeline)])


def rate(options: Options) -> None:
    """what held-out codes cost: fixed, by unigrams, by a prior, and as files; beside picture
    formats if asked for"""
    from eval.pipeline import Pipeline
    from eval.record import claim_pages, write_pages
    from eval.report.rate_distortion import markdown, plot
    from eval.token_records import measure_rate, measure_rate_distortion, read_rate_distortion
    from training import distributed

    pipeline = Pipeline(options)
    if options.rate_distortion:
        distributed.on_main(lambda: claim_pages(pipeline.report_folder, RATE_DISTORTION))
    show(pipeline, [measure_rate(pipeline)])
    if options.rate_distortion:
        record = measure_rate_distortion(pipeline)
        show(pipeline, [record])
        if distributed.is_main():
            measured = read_rate_distortion(record)
            write_pages(pipeline.report_folder, {RATE_DISTORTION: plot(measured)})
            print(f"\n{markdown(measured)}\n{pipeline.report_folder / RATE_DISTORTION}", flush=True)


def probe(options: Options) -> None:
    """what a linear classifier reads from a tokenizer's features and codes, and from pixels"""
    from eval.metrics.probe import measure_probe
    from eval.pipeline import Pipeline

    pipeline = Pipeline(options)
    show(pipeline, [measure_probe(pipeline)])


def quantizers(options: Options) -> None:
    """the tokenizers' runs in FOLDER side by side: FOLDER/quantizers.md, quantizers.json and
    pictures"""
    from eval.quantizers import compare_quantizers

    compare_quantizers(options)


def priors(options: Options) -> None:
    """the priors in a pipeline's folder side by side: RUN/priors.md, priors.json and pictures"""
    from eval.priors import compare_priors

    compare_priors(options)


def likelihood(options: Options) -> None:
    """RUN/prior on held-out codes: nats per token, bits per pixel, bits per image, exact or a
    bound"""
    from eval.metrics.likelihood import measure_likelihood
    from eval.pipeline import Pipeline

    pipeline = Pipeline(options)
    show(pipeline, [measure_likelihood(pipeline, options.prior or pipeline.folder / "prior")])


def generation(options: Options) -> None:
    """RUN/samples against real images: FD, IS, precision and recall, memorisation, class
    agreement"""
    from eval.generation import measure_generation
    from eval.pipeline import Pipeline

    pipeline = Pipeline(options)
    show(pipeline, [measure_generation(pipeline)])
    if options.protocol:
        from eval.fid_protocol_records import measure_protocols

        show(pipeline, [measure_protocols(pipeline)])


def report(options: Options) -> None:
    """all that concerns a pipeline, and RUN/report/report.html, report.md and report.json from
    it"""
    from eval.pipeline import Pipeline
    from eval.report.report import collect_records, write_report
    from eval.report.stages import find_stages
    from eval.report.tables import headlines, text_table, unique_figures
    from training import distributed

    pipeline = Pipeline(options)
    records = collect_records(pipeline)
    if not distributed.is_main():
        return
    stages = find_stages(pipeline.folder, [pipeline.tokenizer_folder, pipeline.extractor_folder])
    title = f"{pipeline.folder.resolve().name} on {pipeline.held_out.name}"
    written = write_report(
        pipeline.report_folder, title, records, stages, pipeline.tokens.class_names
    )
    for note in dict.fromkeys(note for record in records for note in record.notes):
        print(printable(note))
    print(text_table(headlines(unique_figures(records))))
    state = "written" if written else "up to date"
    print(f"{pipeline.report_folder / 'report.html'}: {state}", flush=True)


def reference_stats(arguments: argparse.Namespace) -> None:
    """statistics of a set of images, for figures against it: python -m eval.run generation RUN
    --reference FILE"""
    from eval.reference import choose_extractor, write_reference
    from training import distributed

    extractor = choose_extractor(arguments.extractor, arguments.inception_weights)
    made = write_reference(
        arguments.data,
        arguments.out,
        extractor,
        split=arguments.split,
        image_size=arguments.image_size,
        num=arguments.num,
        batch_size=arguments.batch_size,
        workers=arguments.workers or 0,
    )
    if distributed.is_main():
        about = (
            f"{made.settings['reference_n']:,} images by {extractor.name}@{extractor.sha256[:8]}"
        )
        print(f"{arguments.out}: {about}, SHA-256 {made.settings['reference_sha256']}", flush=True)


def distance(arguments: argparse.Namespace) -> None:
    """two folders of images: the Fréchet distance, and of files of the same name PSNR and LPIPS"""
    from eval.distance import print_distances

    print_distances(arguments)


def show(pipeline: Pipeline, records: list[Record]) -> None:
    from eval.report.tables import text_table, unique_figures
    from training import distributed

    if distributed.is_main():
        for note in dict.fromkeys(note for record in records for note in record.notes):
            print(printable(note))
        print(text_table(unique_figures(records)))
        print(
            ", ".join(str(pipeline.report_folder / f"{record.kind}.json") for record in records),
            flush=True,
        )


COMMANDS = {
    "reconstruction": reconstruction,
    "generation": generation,
    "codebook": codebook,
    "rate": rate,
    "likelihood": likelihood,
    "probe": probe,
    "report": report,
    "quantizers": quantizers,
    "priors": priors,
}
REFERENCE, DISTANCE = "reference-stats", "distance"
OTHERS = {REFERENCE: reference_stats, DISTANCE: distance}  # of no pipeline
RATE_DISTORTION = "rate_distortion.png"  # in the report's folder
PIPELINE = ("RUN", "the pipeline's folder, which holds tokens/")
EITHER = (
    "RUN",
    "a tokenizer's run folder, a pipeline's, which holds tokens/, or published:NAME, with --data",
)
FOLDERS = dict.fromkeys(("reconstruction", "codebook", "rate", "probe"), EITHER)
FOLDERS["quantizers"] = ("FOLDER", "folder of tokenizers' run folders")
# Groups of flags, by the commands that have them.
LPIPS = ("distance", "reconstruction", "generation", "rate", "report", "quantizers", "priors")
EXTRACTORS = (
    "distance",
    "reconstruction",
    "generation",
    "report",
    "quantizers",
    "priors",
    REFERENCE,
)
TOWERS = ("reconstruction", "generation", "report", "quantizers", "priors")
SAMPLES = ("generation", "report")
PRIOR = ("rate", "likelihood", "report")


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m eval.run", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in {**COMMANDS, **OTHERS}.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        add = command.add_argument
        if name == REFERENCE:
            add(
                "data",
                metavar="DATA",
                help="embedded name, folder, parquet, hub:owner/name, or .npz file of images",
            )
            add("--out", type=Path, required=True, metavar="FILE", help=".npz file to write")
            add(
                "--split",
                default="all",
                choices=("all", "train", "held_out"),
                help="which images (all); the others are what training splits them into",
            )
            add(
                "--image-size",
                type=int,
                help="the side of the images; an in-domain extractor knows its own",
            )
        elif name == DISTANCE:
            for place in ("a", "b"):
                add(place, metavar=place.upper(), help="folder of images, parquet, hub:owner/name")
            add("--image-size", type=int, help="pixels per side (the first image's shorter side)")
        else:
            metavar, explained = FOLDERS.get(name, PIPELINE)
            add("run", type=Path, metavar=metavar, help=explained)
            add("--fresh", action="store_true", help="measure again; extractors stay")
            add(
                "--precision",
                choices=PRECISIONS,
                default="auto",
                help=f"{PRECISION_HELP}; extractors are fp32",
            )
        if name in ("reconstruction", "codebook", "rate"):
            add(
                "--data",
                metavar="DATA",
                help="the images that a published tokenizer is measured on",
            )
        if name == DISTANCE:
            _add_networks(add, name)
            continue
        add("--num", type=int, help="measure at most so many images of each set")
        add("--batch-size", type=int, default=100)
        owners = "none" if name == REFERENCE else "as many as the tokenizer was trained with"
        add("--workers", type=int, metavar="N", help=f"processes that read images ({owners})")
        _add_networks(add, name)
        if name in TOWERS:
            add(
                "--dinov2", type=Path, metavar="FOLDER", help="facebook/dinov2-large, for FD-DINOv2"
            )
        if name in SAMPLES:
            add(
                "--clip",
                type=Path,
                metavar="FOLDER",
                help="openai/clip-vit-large-patch14-336, for CMMD",
            )
            add(
                "--reference",
                type=Path,
                metavar="FILE",
                help=".npz of statistics or images, such as ADM's, for FID",
            )
        if name in PRIOR:
            add("--prior", type=Path, metavar="RUN", help="the prior; a pipeline's is RUN/prior")
        if name == "generation":
            add(
                "--protocol",
                nargs="+",
                default=(),
                choices=PROTOCOLS,
                help="what other evaluators would say",
            )
        if name in ("reconstruction", "quantizers"):
            add("--protocol", choices=PROTOCOLS, help="measure as another evaluator does")
        if name == "rate":
            explained = "beside JPEG, WebP and AVIF, too, on N images (100)"
            add("--rate-distortion", nargs="?", const=100, type=int, metavar="N", help=explained)
        if name == "probe":
            explained = "folder or Hub name of the pretrained encoder that the run began with"
            add("--encoder", metavar="NAME", help=explained)
        if name in ("quantizers", "priors"):
            add(
                "--allow-differences",
                nargs="+",
                default=(),
                metavar="FIELD",
                help="settings that may differ",
            )
    arguments = parser.parse_args()
    for name, least in (("num", 2), ("batch_size", 1), ("rate_distortion", 1), ("workers", 0)):
        value = getattr(arguments, name, None)
        if value is not None and not least <= value <= MOST:
            limit = f"at least {least}" if value < least else f"at most {MOST:,}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {limit}")
    return arguments


def _add_networks(add: Callable[..., object], name: str) -> None:
    """The flags of LPIPS and of extractors, for the commands that have them."""
    if name in LPIPS:
        add(
            "--lpips-weights",
            type=Path,
            metavar="PATH",
            help="trunk of LPIPS, torchvision's file",
        )
        add("--lpips-net", default="squeeze", choices=("squeeze", "alex", "vgg"))
    if name in EXTRACTORS:
        add(
            "--inception-weights",
            type=Path,
            metavar="PATH",
            help="weights-inception-2015-12-05-6726825d.pth",
        )
        add(
            "--extractor",
            type=Path,
            metavar="RUN",
            help="in-domain extractor, trained before; else RUN/extractor",
        )


def options(arguments: argparse.Namespace) -> Options:
    from eval.pipeline import Options

    given = {
        name: value for name, value in vars(arguments).items() if name not in ("command", "data")
    }
    data = getattr(arguments, "data", None)
    if str(arguments.run).startswith("published:"):
        from tokenizer.published.imports import folder_of

        given["run"] = folder_of(str(arguments.run), data)
    elif data is not None:
        raise UserError(f"--data {data}: {arguments.run} says itself which images it is of")
    protocol = given.pop("protocol", None) or ()
    return Options(
        protocol=(protocol,) if isinstance(protocol, str) else tuple(protocol),
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
        },
    )


if __name__ == "__main__":
    run_command(main)
