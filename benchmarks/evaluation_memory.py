"""Memory and time of scoring many images of 256 x 256, with the features of precision and recall on disk.

    python benchmarks/evaluation_memory.py --network stand_in --count 50000 --folder FOLDER
    python benchmarks/evaluation_memory.py --network inception --count 256 --folder FOLDER

The first streams that many images through everything but the network, for which a random projection of pooled pixels to
2048 features, 2023 spatial ones and 1008 logits stands in: the memory of a whole pass. The second runs Inception itself
(random weights: only its time matters) on few images: seconds per 1000 images, and the accumulators' share.
Precision and recall themselves, quadratic in the number of images, are left out unless --manifold is given.
"""

from __future__ import annotations

import argparse
import io
import resource
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from varzoo.eval.feature_bank import FeatureBank
from varzoo.eval.features import FeatureExtractor
from varzoo.eval.inception import InceptionFeatures
from varzoo.eval.manifold import precision_recall
from varzoo.eval.score import Scorer


class StandIn(FeatureExtractor):
    """Random projections in place of Inception, with outputs of the same shapes."""

    name, metric, dim, classes, spatial_dim = "stand_in", "fd_stand_in", 2048, 1008, 2023

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(192, 2048 + 1008 + 2023) / 50)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        features, logits, spatial = (F.adaptive_avg_pool2d(images.float(), 8).flatten(1) @ self.weight).split(
            [2048, 1008, 2023], dim=1)
        return {"features": features, "logits": logits, "spatial": spatial}


def random_inception(folder: Path) -> InceptionFeatures:
    """The real network with random weights."""
    load, empty = FeatureExtractorInceptionV3.load_state_dict, io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    FeatureExtractorInceptionV3.load_state_dict = load
    torch.save(network.state_dict(), folder / "random_inception.pth")
    return InceptionFeatures(weights=folder / "random_inception.pth")


def resident() -> float:
    """Memory of this process that no file backs, in GB: pages of a feature file are the system's to drop."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("stand_in", "inception"), required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--manifold", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    extractor = StandIn() if options.network == "stand_in" else random_inception(options.folder)
    path = options.folder / "features.npy"
    path.unlink(missing_ok=True)
    scorer = Scorer(extractor=extractor, count=options.count, features=path, is_formula="consecutive",
                    metrics=("fd", "sfd", "inception_score", "precision_recall"))
    most, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.2):
            most = max(most, resident())

    threading.Thread(target=watch, daemon=True).start()
    extracting = accumulating = 0.0
    for start in range(0, options.count, options.batch):
        indices = torch.arange(start, min(start + options.batch, options.count))
        images = torch.randint(0, 256, (len(indices), 3, 256, 256), dtype=torch.uint8)
        before = time.perf_counter()
        output = extractor(images)
        between = time.perf_counter()
        scorer.samples.fresh(indices)
        scorer.add(output, indices)
        extracting += between - before
        accumulating += time.perf_counter() - between
    done.set()
    print(f"{options.network}, {options.count} images, batches of {options.batch}, {torch.get_num_threads()} threads")
    print(f"largest memory {most:.2f} GB without pages of files, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB with; features on disk "
          f"{path.stat().st_size / 1e9:.2f} GB")
    print(f"per 1000 images: extraction {1000 * extracting / options.count:.1f} s, accumulators "
          f"{1000 * accumulating / options.count:.2f} s, {100 * accumulating / extracting:.1f} % of it")
    if options.manifold:
        reference = FeatureBank(dim=extractor.dim, count=min(10000, options.count))
        reference.features.copy_(scorer.bank.features[:len(reference.features)])
        before = time.perf_counter()
        precision_recall(scorer.bank.features, reference.features, half=False)
        print(f"precision and recall: {time.perf_counter() - before:.0f} s")


if __name__ == "__main__":
    main()
