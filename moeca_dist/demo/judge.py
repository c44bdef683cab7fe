"""An independent reader of digits: it never sees a generated image, nor any augmented one, before it is asked.

Shape suffixes: N images, H and W pixels, C channels, P pixels of a flattened 8x8 image.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import Tensor

from moeca_dist.demo.data import IMAGE_SIZE, load_split

MIN_HELD_OUT_ACCURACY = 0.97


@dataclass(frozen=True)
class Judge:
    """A support vector machine (RBF kernel) over 8x8 pixels, fitted to real digits as scikit-learn ships them.

    ``held_out_accuracy`` is measured on real digits that were not fitted.
    """

    classifier: SVC
    held_out_accuracy: float

    @classmethod
    def train(cls, seed: int = 0) -> "Judge":
        """Fits to the training part of ``load_split(seed)``; the same seed gives the same judge."""
        training, held_out = load_split(seed)
        classifier = SVC(C=10.0, gamma="scale").fit(training.ink_NHW.flatten(1).numpy(), training.labels_N.numpy())
        accuracy = float(classifier.score(held_out.ink_NHW.flatten(1).numpy(), held_out.labels_N.numpy()))
        assert accuracy >= MIN_HELD_OUT_ACCURACY, f"the judge reads only {accuracy:.1%} of held-out real digits"
        return cls(classifier, accuracy)

    def read(self, images_NHWC: NDArray[np.uint8] | Tensor) -> NDArray[np.int64]:
        """The digit seen in each image: uint8 [N, 16, 16, 1] to int64 [N]."""
        return self.classifier.predict(features(images_NHWC)).astype(np.int64)

    def accuracy(self, images_NHWC: NDArray[np.uint8] | Tensor, labels_N: NDArray[np.int64] | Tensor) -> float:
        """The share of images (uint8 [N, 16, 16, 1]) that are read as their label."""
        return float((self.read(images_NHWC) == np.asarray(labels_N)).mean())


def features(images_NHWC: NDArray[np.uint8] | Tensor) -> NDArray[np.float32]:
    """uint8 [N, 16, 16, 1] to float32 [N, 64]: the ink in each cell of 2x2 pixels, which undoes the upsampling."""
    images = torch.as_tensor(images_NHWC)
    if images.dtype != torch.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 1):
        raise ValueError(
            f"the judge reads uint8 images [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 1], not {images.dtype} {list(images.shape)}"
        )
    return F.avg_pool2d(images[..., 0].float()[:, None] / 255, 2).flatten(1).numpy()
