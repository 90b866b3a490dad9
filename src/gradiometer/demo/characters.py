"""A causal transformer that predicts the next character of Python's help topics.

The text comes with every CPython as `pydoc_data.topics`: about 465,000 characters in Python 3.11.
It differs between Python versions, so a result should be quoted with `topics_fingerprint`.
"""

from __future__ import annotations

import hashlib
import string
from pydoc_data.topics import topics

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ALPHABET = string.printable
UNKNOWN = len(ALPHABET)
VOCABULARY_SIZE = len(ALPHABET) + 1
CONTEXT = 64

Batch = tuple[Tensor, Tensor]


class PositionEmbedding(nn.Module):
    """Adds a learned vector per position.

    Args:
        context: Longest sequence.
        width: Width `D` of the residual stream.

    Shapes:
        `[N, T, D]` to `[N, T, D]`, `T <= context`.
    """

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(context, width))

    def forward(self, x: Tensor) -> Tensor:
        """`x` plus the vectors of its first `T` positions."""
        return x + self.weight[: x.shape[-2]]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and the positions before it.

    Args:
        width: Width `D` of the residual stream.
        heads: Number of heads; divides `width`.

    Shapes:
        `[N, T, D]` to `[N, T, D]`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide width, got heads={heads} and width={width}.")
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with those before it."""
        qkv = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.transpose(-4, -2).unbind(dim=-3)  # each [N, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.projection(mixed.transpose(-3, -2).flatten(-2))
        return output


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a two-layer perceptron, each added on.

    Args:
        width: Width `D` of the residual stream.
        heads: Number of attention heads.

    Shapes:
        `[N, T, D]` to `[N, T, D]`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after this block."""
        x = x + self.attention(self.attention_norm(x))
        output: Tensor = x + self.perceptron(self.perceptron_norm(x))
        return output


class CharacterTransformer(L.LightningModule):
    """A pre-norm causal transformer over characters, without dropout.

    About 117,000 parameters at the default size.

    Args:
        layers: Number of blocks.
        width: Width `D` of the residual stream.
        heads: Attention heads per block.
        lr: Learning rate of AdamW.
        weight_decay: Its decoupled weight decay, on all parameters.

    Shapes:
        Input `[N, T]` int64 with `T <= 64`, output `[N, T, V]`: logits of the next character,
        `V = 101`.
    """

    def __init__(
        self,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, width)
        self.position_embedding = PositionEmbedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY_SIZE, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the character that follows each position.

        Args:
            tokens: Character indices, as `encode` gives them.

        Returns:
            One logit per character of the alphabet, and one for any other.

        Shapes:
            `tokens [N, T]` to `[N, T, V]`.
        """
        x = self.position_embedding(self.token_embedding(tokens))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy per character in nats, logged as `train_loss`."""
        tokens, following = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `val_loss` in nats per character and `val_acc`, the share of characters foreseen."""
        tokens, following = batch
        logits = self(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        accuracy = (logits.argmax(dim=-1) == following).float().mean()
        self.log("val_loss", loss, batch_size=len(tokens))
        self.log("val_acc", accuracy, prog_bar=True, batch_size=len(tokens))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at a constant learning rate."""
        return torch.optim.AdamW(
            self.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay
        )


def topics_text() -> str:
    """All help topics of this Python, joined in alphabetical order."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def topics_fingerprint() -> tuple[int, str]:
    """Which text this Python carries.

    Returns:
        Its length in characters, and the SHA-256 of its UTF-8 bytes in hexadecimal.
    """
    text = topics_text()
    return len(text), hashlib.sha256(text.encode()).hexdigest()


def encode(text: str) -> Tensor:
    """Turn characters into indices.

    The alphabet is fixed (`string.printable`), so that a checkpoint means the same under every
    Python version; all other characters share the last index.

    Args:
        text: Any string.

    Returns:
        One index below `VOCABULARY_SIZE` per character.

    Shapes:
        `[len(text)]` int64.

    Example:
        >>> encode("01a…").tolist()
        [0, 1, 10, 100]
    """
    index = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([index.get(character, UNKNOWN) for character in text], dtype=torch.int64)


def topics_loaders(
    batch_size: int = 32, context: int = CONTEXT, seed: int = 0
) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Training and validation batches of the help topics.

    The text is cut into windows that do not overlap, so the data set is finite and its size means
    something; the last tenth of the windows is for validation. The last, shorter training batch of
    an epoch is dropped: gradient noise is compared between batches of one size.

    Args:
        batch_size: Windows in a training batch.
        context: Characters in a window, at most 64 for `CharacterTransformer`.
        seed: Fixes the order of the training batches; the global random state is not used for it.

    Returns:
        The training and the validation loader.

    Shapes:
        Each batch is `tokens [N, context]` int64 and `following [N, context]` int64, the same text
        one character later.
    """
    tokens = encode(topics_text())
    windows = (len(tokens) - 1) // context
    x = tokens[: windows * context].unflatten(0, (windows, context))
    y = tokens[1 : windows * context + 1].unflatten(0, (windows, context))
    split = windows - windows // 10
    train_loader = DataLoader(
        TensorDataset(x[:split], y[:split]),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    val_loader = DataLoader(TensorDataset(x[split:], y[split:]), batch_size=256)
    return train_loader, val_loader
