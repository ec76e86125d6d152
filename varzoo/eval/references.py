"""What samples are compared with: statistics, and features where they are kept, in a file that says what it holds.

The layout is ADM's .npz (mu, sigma; mu_s, sigma_s of the spatial features; arr_0 images), to which `varzoo` adds a JSON
text (type, name, count, extractor and its hash) and `features` float32 [m, D]. Files of other origin have no such text:
those that the field shares are known by name, of others the type must be given.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varzoo.core.checkpoint import atomic_path
from varzoo.core.errors import unknown
from varzoo.eval.features import FeatureExtractor
from varzoo.eval.moments import Gaussian
from varzoo.eval.protocol import REFERENCE_TYPES

TEXT = "varzoo"
# Files of other origin that are known by name: (type, name)
KNOWN = {
    "VIRTUAL_imagenet256_labeled.npz": ("train", "imagenet256_train"),
    "VIRTUAL_imagenet512.npz": ("train", "imagenet512_train"),
    "adm_in256_stats.npz": ("train", "imagenet256_train"),
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of the images that samples are compared with.

    Attributes:
        gaussian: of the extractor's features.
        name: what they are, in words.
        kind: "train", "validation", "images" or "clips".
        count: number of images, None if it is not known.
        spatial: of the extractor's spatial features, for sFID.
        features: `[m, D]`, for precision, recall and KID.
        extractor: name of the extractor and hash of its weights, None if it is not known.
        covariance: "unbiased" or "biased".
    """

    gaussian: Gaussian
    name: str = "images"
    kind: str = "images"
    count: int | None = None
    spatial: Gaussian | None = None
    features: Tensor | None = None
    extractor: tuple[str, str] | None = None
    covariance: str = "unbiased"

    def __post_init__(self) -> None:
        if self.kind not in REFERENCE_TYPES:
            raise unknown("reference type", self.kind, REFERENCE_TYPES)

    @property
    def hash(self) -> str:
        """Hash of mean and covariance, rounded so that it does not depend on the order of additions."""
        statistics = torch.cat([self.gaussian.mean, self.gaussian.covariance.flatten()]).numpy().round(6)
        return hashlib.sha256(statistics.tobytes()).hexdigest()[:12]

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise ValueError if these are another extractor's statistics."""
        if self.extractor is not None and self.extractor != (extractor.name, extractor.weights_hash()):
            raise ValueError(f"the reference {self.name} has statistics of extractor {' '.join(self.extractor)}, the "
                             f"samples are looked at by {extractor.name} {extractor.weights_hash()}; build it anew "
                             "(reference=build).")
        if len(self.gaussian.mean) != extractor.dim:
            raise ValueError(f"the reference {self.name} has features of {len(self.gaussian.mean)} dimensions, the "
                             f"samples of {extractor.dim}: two different extractors.")

    def save(self, path: str | Path) -> None:
        """Write an .npz that `read` reads; where it is Inception's, ADM's evaluator and torch-fidelity's fork too."""
        about = {"type": self.kind, "name": self.name, "count": self.count, "extractor": self.extractor,
                 "covariance": self.covariance}
        arrays = {"mu": self.gaussian.mean.numpy().astype(np.float32), "sigma": self.gaussian.covariance.numpy(),
                  "mean": self.gaussian.mean.numpy(), TEXT: np.array(json.dumps(about))}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean.numpy().astype(np.float32), "sigma_s": self.spatial.covariance.numpy(),
                       "mean_s": self.spatial.mean.numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle

    @classmethod
    def read(cls, path: str | Path, kind: str | None = None) -> Reference:
        """Read an .npz with mu and sigma.

        Args:
            path: the file.
            kind: its type, for a file that does not say it.

        Raises:
            ValueError: the file has no statistics, is damaged, is of no known type, or of another than the one given.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                if "mu" not in file or "sigma" not in file:
                    raise ValueError(f"it has no statistics mu and sigma, only {', '.join(file.files)}")
                arrays = {name: file[name] for name in file.files if name != "arr_0"}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no file of reference statistics: {error}.") from error
        about = json.loads(str(arrays[TEXT])) if TEXT in arrays else {}
        known: tuple[Any, Any] = about.get("type"), about.get("name")
        if not about:
            known = KNOWN.get(path.name, (None, path.name))
        if kind is None and known[0] is None:
            raise ValueError(f"{path} does not say what it holds; give reference_type=train for statistics of training "
                             f"images, or another of {', '.join(REFERENCE_TYPES)}.")
        if kind is not None and known[0] not in (None, kind):
            raise ValueError(f"{path} is of type {known[0]!r}, not {kind!r}; leave reference_type out.")

        def gaussian(mean: str, mu: str, sigma: str) -> Gaussian | None:
            if sigma not in arrays:
                return None
            values = torch.from_numpy(arrays.get(mean, arrays[mu])).double()
            covariance = torch.from_numpy(arrays[sigma]).double()
            if not (values.isfinite().all() and covariance.isfinite().all()):
                raise ValueError(f"{mu} or {sigma} of {path} is not finite; the file is broken.")
            return Gaussian(values, covariance)

        extractor = about.get("extractor")
        whole = gaussian("mean", "mu", "sigma")
        if whole is None:
            raise ValueError(f"{path} holds no statistics mu and sigma.")
        return cls(
            gaussian=whole, spatial=gaussian("mean_s", "mu_s", "sigma_s"), name=known[1],
            kind=kind or known[0], count=about.get("count"), extractor=tuple(extractor) if extractor else None,
            features=torch.from_numpy(arrays["features"]) if "features" in arrays else None,
            covariance=about.get("covariance", "unbiased"))
