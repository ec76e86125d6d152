"""What a Fréchet distance between real images is, and how far chance moves it: the floor beneath every score.

    python benchmarks/real_versus_real.py --weights mobilenet_v2-b0353104.pth [--train 20000] [--heldout 5000]

Fashion-MNIST (32 x 32) by MobileNetV2's features: `fd_mobilenet`, which is no FID. Random disjoint subsets of training
images against one another, held-out images against training images, and held-out images that were slightly damaged.
Features are kept in --cache, so that a second run takes seconds.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from varzoo.data import FashionMNIST
from varzoo.eval.moments import Gaussian, Moments, frechet_distance
from varzoo.eval.pretrained import MobileNetFeatures
from varzoo.tokenizers.base import to_uint8

SIZES, TRIALS = (500, 1000, 2500, 5000), 5


def jpeg(images: Tensor, quality: int = 75) -> Tensor:
    def one(image: Tensor) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)

    return torch.stack([one(image) for image in images])


def blurred(images: Tensor) -> Tensor:
    kernel = torch.tensor([0.1, 0.8, 0.1])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images.float(), (1,) * 4, mode="replicate"), kernel, groups=3).round().to(torch.uint8)


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda images: images,
    "one grey level darker": lambda images: images.clamp(min=1) - 1,
    "JPEG, quality 75": jpeg,
    "slightly blurred": blurred,
    "a tenth of them noise": lambda images: torch.cat([torch.randint_like(images[:len(images) // 10], 256),
                                                       images[len(images) // 10:]]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--heldout", type=int, default=5000)
    parser.add_argument("--cache", type=Path, default=Path("fashion_features"))
    options = parser.parse_args()
    extractor = MobileNetFeatures(weights=options.weights)
    options.cache.mkdir(parents=True, exist_ok=True)

    def features(name: str, split: str, count: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        path = options.cache / f"{name.replace(' ', '_')}_{count}.npy"
        if not path.exists():
            dataset = FashionMNIST(split=split)
            images = change(torch.stack([to_uint8(dataset[index]["image"]) for index in range(count)]))
            rows = torch.cat([extractor(batch)["features"] for batch in images.split(100)])
            np.save(path, rows.numpy())
        return torch.from_numpy(np.load(path))

    train = features("train", "train", options.train, lambda images: images)
    random = torch.Generator().manual_seed(0)
    print(f"| images of each of two sets | fd_mobilenet, mean over {TRIALS} draws | standard deviation | least | most "
          "|\n"
          "| --- | --- | --- | --- | --- |")
    for size in SIZES:
        values = []
        for _ in range(TRIALS):
            rows = torch.randperm(len(train), generator=random)[:2 * size]
            values.append(frechet_distance(gaussian(train[rows[:size]]), gaussian(train[rows[size:]])))
        print(f"| {size} | {statistics.mean(values):.2f} | {statistics.stdev(values):.3f} | {min(values):.2f} | "
              f"{max(values):.2f} |", flush=True)
    reference = gaussian(train)
    print(f"\n| {options.heldout} held-out images against {options.train} training images | fd_mobilenet |\n| --- | "
          "--- |")
    for name, change in DAMAGES.items():
        own = gaussian(features(name, "heldout", options.heldout, change))
        print(f"| {name} | {frechet_distance(own, reference):.2f} |", flush=True)


def gaussian(features: Tensor) -> Gaussian:
    moments = Moments(dim=features.shape[1])
    for rows in features.split(1000):
        moments.update(rows)
    return moments.gaussian()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
