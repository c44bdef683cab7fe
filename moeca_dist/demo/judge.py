"""An independent reader of digits. It sees no generated and no augmented image before it is asked.

Shape suffixes: N images, H and W pixels, C channels, P pixels of a flattened 8x8 image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor

from moeca_dist.demo.data import IMAGE_SIZE, load_split

MIN_HELD_OUT_ACCURACY = 0.97


@dataclass(frozen=True)
class Judge:
    """A support vector machine (RBF kernel) over 8x8 pixels, fitted to scikit-learn's real digits.

    ``held_out_accuracy`` is measured on real digits that were not fitted.
    """

    classifier: SVC
    held_out_accuracy: float

    @classmethod
    def train(cls, seed: int = 0) -> "Judge":
        """Fit a judge to the training part of ``load_split(seed)``. The same seed gives the same judge."""
        training, held_out = load_split(seed)
        classifier = SVC(C=10.0, gamma="scale").fit(training.ink_NHW.flatten(1).numpy(), training.labels_N.numpy())
        accuracy = float(classifier.score(held_out.ink_NHW.flatten(1).numpy(), held_out.labels_N.numpy()))
        assert accuracy >= MIN_HELD_OUT_ACCURACY, f"the judge reads only {accuracy:.1%} of held-out real digits"
        return cls(classifier, accuracy)

    def read(self, images_NHWC: NDArray[np.uint8] | Tensor) -> NDArray[np.int64]:
        """Read the digit in each image: uint8 [N, 16, 16, 1] to int64 [N]."""
        return self.classifier.predict(features(images_NHWC)).astype(np.int64)

    def accuracy(self, images_NHWC: NDArray[np.uint8] | Tensor, labels_N: NDArray[np.int64] | Tensor) -> float:
        """Return the share of images (uint8 [N, 16, 16, 1]) that are read as their label."""
        return float((self.read(images_NHWC) == np.asarray(labels_N)).mean())


@dataclass(frozen=True)
class DigitNetwork:
    """The demo's feature network, in the role of the Inception network. Only its last layer is learned.

    - ``pooled``: ink in 8x8 cells, the judge's features.
    - ``spatial``: the 16x16 pixels before that pooling.
    - ``probabilities``: those of the ten digits, by a logistic regression on the pooled features, fitted to real
      digits. Unlike the judge's, its confidence is calibrated: the mean is within 1% of the accuracy on held-out
      digits.
    """

    shape_HWC: ClassVar[tuple[int, int, int]] = (IMAGE_SIZE, IMAGE_SIZE, 1)
    widths: ClassVar[Mapping[str, int]] = {"pooled": 64, "spatial": IMAGE_SIZE**2, "probabilities": 10}

    classifier: LogisticRegression

    @classmethod
    def train(cls, seed: int = 0) -> "DigitNetwork":
        """Fit a network to the training part of ``load_split(seed)``. The same seed gives the same network."""
        training, _ = load_split(seed)
        classifier = LogisticRegression(C=10.0, max_iter=2000)
        return cls(classifier.fit(training.ink_NHW.flatten(1).numpy(), training.labels_N.numpy()))

    def features(self, images_NHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[np.float32]]:
        """Compute float32 features [N, width] of every layer from uint8 [N, 16, 16, 1]."""
        pooled_NF = features(images_NHWC)
        return {
            "pooled": pooled_NF,
            "spatial": images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32) / 255,
            "probabilities": self.classifier.predict_proba(pooled_NF).astype(np.float32),
        }


def features(images_NHWC: NDArray[np.uint8] | Tensor) -> NDArray[np.float32]:
    """Compute the ink in each cell of 2x2 pixels, which undoes the upsampling: uint8 [N, 16, 16, 1] to float32 [N,
    64].
    """
    images = torch.as_tensor(images_NHWC)
    if images.dtype != torch.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 1):
        raise ValueError(
            f"the judge reads uint8 images [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 1], not {images.dtype} {list(images.shape)}"
        )
    return F.avg_pool2d(images[..., 0].float()[:, None] / 255, 2).flatten(1).numpy()
