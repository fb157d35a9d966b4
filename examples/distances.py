"""Distances between two folders of images, or two uint8 tensors (N, 3, H, W)."""

from eval import frechet_distance, psnr


def features(images):
    """(B, 3, H, W) uint8 -> (B, D): any network of yours."""
    return images.float().mean(dim=(2, 3))


print(frechet_distance("samples", "photos", extractor=features))
# frechet_distance("samples", "photos", inception_weights="weights-inception-2015-12-05-6726825d.pth") is FID
print(psnr("samples", "photos"))  # of files of the same name
# lpips("samples", "photos", weights="squeezenet1_1-b8a52dc0.pth")
