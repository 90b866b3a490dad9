"""A convolutional network on the 8 by 8 digits that come with scikit-learn.

1,797 scanned digits, ten classes. The network has no batch normalisation, so its output for one
image does not depend on the others in the batch, and every per-example quantity is defined.
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

VALIDATION_SIZE = 360

Batch = tuple[Tensor, Tensor]


class DigitsConvNet(L.LightningModule):
    """Two convolutions and a linear layer, 9,930 parameters at the default width.

    The defaults keep gradient noise, weight decay and momentum large enough that training ends in
    a stationary state within a few thousand steps.

    Args:
        channels: Channels after the first convolution; the second doubles them.
        lr: Learning rate of the stochastic gradient descent.
        momentum: Its momentum.
        weight_decay: Its weight decay, coupled to the gradient.

    Shapes:
        Input `[N, 1, 8, 8]`, output `[N, 10]`: logits.
    """

    def __init__(
        self,
        channels: int = 16,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 4 * 4, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class logits.

        Args:
            x: Standardised images.

        Returns:
            One logit per class.

        Shapes:
            `x [N, 1, 8, 8]` to `[N, 10]`.
        """
        logits: Tensor = self.layers(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy of the batch in nats, logged as `train_loss`."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `val_loss` in nats and `val_acc`, the share of digits named right."""
        x, y = batch
        logits = self(x)
        accuracy = (logits.argmax(dim=-1) == y).float().mean()
        self.log("val_loss", F.cross_entropy(logits, y), batch_size=len(x))
        self.log("val_acc", accuracy, prog_bar=True, batch_size=len(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Stochastic gradient descent at a constant learning rate."""
        return torch.optim.SGD(
            self.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )


def digits_loaders(
    batch_size: int = 16, seed: int = 0
) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Training and validation batches of the digits.

    Pixels are shifted and scaled by the mean and the standard deviation of all training pixels.
    The last, shorter training batch of an epoch is dropped: gradient noise is compared between
    batches of one size.

    Args:
        batch_size: Examples in a training batch.
        seed: Fixes the split and the order of the training batches; the global random state is
            not used for either.

    Returns:
        The training loader (1,437 images) and the validation loader (360 images, one batch).

    Shapes:
        Each batch is `x [N, 1, 8, 8]` float32 and `y [N]` int64.
    """
    digits = load_digits()
    x = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    y = torch.as_tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    val, train = order[:VALIDATION_SIZE], order[VALIDATION_SIZE:]
    x = (x - x[train].mean()) / x[train].std()
    train_loader = DataLoader(
        TensorDataset(x[train], y[train]),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=generator,
    )
    val_loader = DataLoader(TensorDataset(x[val], y[val]), batch_size=VALIDATION_SIZE)
    return train_loader, val_loader
