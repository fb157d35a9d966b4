"""What each figure of a report means, what is good, and when figures say that something is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.record import Measurement
from eval.report.tables import number

# The first pattern that a figure's name begins with says what it means.
MEANINGS = (
    (
        r"PSNR, pooled",
        "PSNR of the squared error's mean over all images, which a few bad images pull down.",
    ),
    (
        r"PSNR",
        "How near reconstructions are to their originals, pixel by pixel: a mean over images. "
        "About 20 dB is blurred, 30 dB is hard to tell apart at a glance.",
    ),
    (
        r"SSIM",
        "Likeness of local contrast and structure, 1 for equal images; below 0.7 the blur shows.",
    ),
    (
        r"LPIPS",
        "Distance of reconstructions in a trained network's eyes: 0 for equal images, "
        "below 0.1 they look alike.",
    ),
    (
        r"r(FID|FD)",
        "Fréchet distance between the features of reconstructions and of their originals. "
        "0 is perfect; only figures of the same mark, N and reference compare.",
    ),
    (
        r"codebook usage",
        "Share of the codes that any held-out image uses. Below about 90 % codes are dead: "
        "they cost bits and carry nothing.",
    ),
    (
        r"corrected perplexity",
        "Perplexity as it would be of very many images (Miller and Madow's correction).",
    ),
    (
        r"perplexity",
        "As many codes, equally used, would carry as much. The number of codes is the most; "
        "half of it and more is healthy.",
    ),
    (
        r"code entropy per position",
        "Mean over the positions of what a code there carries; less than the entropy of all "
        "codes where places differ, such as an empty border.",
    ),
    (r"code entropy", "What one code carries on average, at most log2 of the number of codes."),
    (
        r"information, ",
        "What a code tells of the one beside it. What neighbours share, a prior can save.",
    ),
    (r"rate, fixed", "Bits of an image's codes when each takes log2 of the number of codes."),
    (
        r"rate, unigram",
        "Bits of an image's codes when each costs by how often it comes: what a prior has to beat.",
    ),
    (r"rate(, | per pixel, )", "What the codes of an image cost, coded in this way."),
    (
        r"NLL",
        "What the prior still does not know of held-out codes. Even guessing costs ln of the "
        "number of codes; a bound is never below the exact figure.",
    ),
    (
        r"F(ID|D)∞",
        "The distance that very many samples would have, extrapolated from several N: "
        "it takes away the bias of few samples.",
    ),
    (
        r"F(ID|D).* of real images",
        "The same distance between two sets of real images: what a perfect generator would get.",
    ),
    (
        r"F(ID|D)",
        "Fréchet distance between the features of samples and of real images. Near the figure "
        "of real images is as good as this N can tell.",
    ),
    (
        r"K(ID|D)",
        "Kernel distance of features, without bias: 0 on average for equal distributions, "
        "so that it may be below 0.",
    ),
    (
        r"CMMD",
        "Kernel distance of CLIP's features: 0 for equal distributions, and steadier than FID "
        "for few samples.",
    ),
    (
        r"IS",
        "Inception score: high where each sample is surely of one class and all classes come. "
        "The figure of real images is the one to reach.",
    ),
    (r"precision", "Share of the samples that lie among real images: how good each one is."),
    (r"recall", "Share of the real images that lie among samples: how much variety there is."),
    (r"density", "Like precision, without its weakness for outliers; about 1 for real images."),
    (r"coverage", "Share of the real images that have a sample near; about 1 for real images."),
    (
        r"class agreement",
        "Share of the samples that the classifier takes for the class that was asked for. "
        "Its accuracy on real images is the most to hope for.",
    ),
    (
        r"classifier accuracy",
        "How often the classifier is right on real held-out images: how far it is to be trusted.",
    ),
    (
        r"nearer to train",
        "Share of the samples that lie nearer to a training image than real held-out images do. "
        "50 % is what real images get; far above it the prior copies.",
    ),
    (r"probe", "What a linear classifier reads from these features: how much meaning they hold."),
)
COPIES, DEAD, LOST, WEAK = 70, 80, 0.6, 80  # percent; of the classifier's accuracy


def meaning(name: str) -> str:
    """A sentence or two; empty for a figure that nobody has explained."""
    return next((text for pattern, text in MEANINGS if re.match(pattern, name)), "")


def warnings(figures: Sequence[Measurement]) -> list[str]:
    """A line for each figure that says that something is wrong."""

    def value(pattern: str) -> float | None:
        return next((f.value for f in figures if re.match(pattern, f.name)), None)

    found = []
    prior, unigram, fixed = (
        value(rf"rate, {which}") for which in (r"prior .*bits/image", "unigram", "fixed")
    )
    if prior is not None and fixed is not None and prior > fixed:
        found.append(
            f"The prior's held-out codes cost {number(prior)} bits an image, more than even "
            f"guessing ({number(fixed)}): it has overfitted, or was trained on other codes. "
            "Train it for fewer steps, with more dropout, or on more images."
        )
    elif prior is not None and unigram is not None and prior > unigram:
        found.append(
            f"The prior's held-out codes cost {number(prior)} bits an image, more than by how "
            f"often each code comes ({number(unigram)}): it has learnt nothing that generalises."
        )
    usage = value("codebook usage")
    if usage is not None and usage < DEAD:
        found.append(
            f"{number(usage)} % of the codes are used: the others are dead. A smaller codebook, "
            "restarts, or another quantizer use more (docs/tokenizers.md)."
        )
    accuracy, agreement = value("classifier accuracy"), value("class agreement")
    if accuracy is not None and accuracy < WEAK:
        found.append(
            f"The classifier knows {number(accuracy)} % of the real images: figures that rest on "
            "it say little."
        )
    elif accuracy is not None and agreement is not None and agreement < LOST * accuracy:
        found.append(
            f"The classifier takes {number(agreement)} % of the samples for their class, and "
            f"{number(accuracy)} % of the real images: most samples do not show what was asked."
        )
    nearer = value("nearer to train")
    if nearer is not None and nearer > COPIES:
        found.append(
            f"{number(nearer)} % of the samples lie nearer to a training image than held-out "
            "images do (50 % is what real images get): the prior copies. Look at the nearest ones."
        )
    return found
