"""Training scripts in the structures that public ones have, each with the same by hand for one example.

A script takes its step as its author would, with the monitor's lines in it. Rates are 0, so that all steps
are the same; everything is in float64.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .test_calls import draws, whole

B, T, V = 8, 5, 6


@dataclass
class Script:
    """A training script.

    Args:
        net: What is handed to the monitor.
        optimizer: The same.
        step: One optimizer step, as the script makes it.
        parts: The losses of the parts of the batch whose gradients the noise is made of.
        size: Examples in each part.
        call: Outputs ``[O]`` of one example alone, and the inputs that they are differentiated by.
        count: Examples of the probe: those of the first micro-batch.
        without: Parameters that single examples are not seen of, by the beginning of their names.
        loss: Name of the loss that is read off the graph, or where it is refused.
        probe: What is said where the probe cannot be found; empty where it is found.
        probe_is_read: Whether kernel and Jacobian are read all the same.
        noise: The same for the noise.
        remedy: Arguments that the message names.
        mended: The step as the message says to write it.
        mended_count: Examples of the probe then.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Any], None]
    parts: Callable[[], Sequence[Tensor]] | None
    call: Callable[[int], tuple[Tensor, list[Tensor]]] | None
    size: int = 1
    count: int = B
    without: tuple[str, ...] = ()
    loss: str = ""
    probe: str = ""
    probe_is_read: bool = False
    noise: str = ""
    remedy: dict[str, Any] = field(default_factory=dict)
    mended: Callable[[Any], None] | None = None
    mended_count: int | None = None


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters() if p.requires_grad], lr=0.0)


# -- language ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(c, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    """Scores and loss together; without targets the scores of the last position; embedding and head tied."""

    def __init__(self, width=8, tied=True):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, width),
                "wpe": nn.Embedding(T, width),
                "h": nn.ModuleList([Block(width), Block(width)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, V, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        position = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1)


def gpt_accumulated():
    """Micro-batches, a loss divided by their number, clipping afterwards, a scaler that is off."""
    net, n = GPT().double(), 4
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    tokens = whole(V, n, B, T + 1)
    x, y = tokens[..., :-1], tokens[..., 1:].contiguous()

    def step(monitor):
        for micro in range(n):
            with monitor.micro_batch(x[micro], y[micro]):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
                    _, loss = net(x[micro], y[micro])
                    loss = loss / n
                scaler.scale(loss).backward()
        monitor.before_step()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Script(
        net,
        optimizer,
        step,
        parts=lambda: [net(x[i], y[i])[1] for i in range(n)],
        size=B,
        loss="cross_entropy",
        call=lambda i: (net(x[0, i : i + 1], y[0, i : i + 1])[0][0, -1], []),
    )


def gpt_in_one_batch():
    """The same without accumulation: positions and tied weights have no single examples, so it is split."""
    net = GPT().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    tokens = whole(V, B, T + 1)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(monitor):
        with monitor.micro_batch(x, y):
            _, loss = net(x, y)
            loss.backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Script(
        net,
        optimizer,
        step,
        parts=lambda: [net(x[i : i + 1], y[i : i + 1])[1] for i in range(B)],
        call=lambda i: (net(x[i : i + 1], y[i : i + 1])[0][0, -1], []),
        without=("transformer.wpe", "transformer.wte"),
        loss="cross_entropy",
    )


class ModelOutput(OrderedDict):
    """As in transformers: a mapping, an object with attributes and a tuple."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def to_tuple(self):
        return tuple(self.values())


class Encoder(nn.Module):
    """Mean of embedded tokens under a mask, and a head; the loss where there are labels."""

    def __init__(self, classes=3):
        super().__init__()
        self.embeddings, self.dense = nn.Embedding(V, 7), nn.Linear(7, 7)
        self.classifier = nn.Linear(7, classes)

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=True):
        hidden = torch.tanh(self.dense(self.embeddings(input_ids)))
        mask = attention_mask[:, :, None].to(hidden)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
        return ModelOutput({} if loss is None else {"loss": loss}, logits=logits)


def keyword_batch():
    """``model(**batch)`` and ``outputs.loss``."""
    net = Encoder().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    batch = {
        "input_ids": whole(V, B, T),
        "attention_mask": (torch.arange(T) < whole(T, B, seed=1)[:, None] + 1).long(),
        "labels": whole(3, B, seed=2),
    }

    def step(monitor):
        with monitor.micro_batch(batch):
            outputs = net(**batch)
            outputs.loss.backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    def some(i):
        return net(**{key: value[i : i + 1] for key, value in batch.items()})

    return Script(
        net,
        optimizer,
        step,
        parts=lambda: [some(i).loss for i in range(B)],
        call=lambda i: (some(i).logits[0], []),
        loss="cross_entropy",
    )


def keyword_batch_with_ignored_labels():
    """A loss per token that divides by the number of labels that count."""
    net = Tagger().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    batch = {"input_ids": whole(V, B, T), "labels": whole(3, B, T, seed=2)}
    batch["labels"][torch.arange(T) > whole(T, B, seed=1)[:, None]] = -100

    def step(monitor):
        with monitor.micro_batch(batch):
            net(**batch)["loss"].backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    return Script(
        net,
        optimizer,
        step,
        parts=None,
        call=lambda i: (net(batch["input_ids"][i : i + 1])["logits"][0, -1], []),
        loss="cross_entropy",
        noise="divides by the number of targets that are not ignored",
    )


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(V, 6), nn.LSTM(6, 4, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.lstm(self.embed(input_ids))[0])
        loss = None if labels is None else F.cross_entropy(logits.transpose(1, 2), labels)
        return {"loss": loss, "logits": logits}


class Seq2Seq(nn.Module):
    """An encoder and a decoder step by step, sequence first, with the target so far at hand."""

    def __init__(self, width=6):
        super().__init__()
        self.source, self.target = nn.Embedding(V, width), nn.Embedding(V, width)
        self.encoder, self.decoder = nn.GRU(width, width), nn.GRUCell(width, width)
        self.out = nn.Linear(width, V)

    def forward(self, src, trg, teacher_forcing_ratio=0.5):
        _, hidden = self.encoder(self.source(src))
        hidden, token, scores = hidden[0], trg[0], []
        for t in range(1, len(trg)):
            hidden = self.decoder(self.target(token), hidden)
            scores.append(self.out(hidden))
            forced = torch.rand(()) < teacher_forcing_ratio
            token = trg[t] if forced else scores[-1].argmax(1)
        return torch.stack(scores)


def seq2seq_with_teacher_forcing():
    net = Seq2Seq().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    src, trg = whole(V, T, B), whole(V, T + 1, B, seed=1)

    def loss_of(src, trg):
        return F.cross_entropy(net(src, trg, 1.0).view(-1, V), trg[1:].reshape(-1))

    def step(monitor):
        with monitor.micro_batch(src, trg):
            loss_of(src, trg).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    return Script(
        net,
        optimizer,
        step,
        parts=lambda: [loss_of(src[:, i : i + 1], trg[:, i : i + 1]) for i in range(B)],
        call=lambda i: (net(src[:, i : i + 1], trg[:, i : i + 1], 1.0)[-1, 0], []),
        loss="cross_entropy",
    )


class WordModel(nn.Module):
    """Tokens ``[T, B]`` and the state of the last batch; scores of all positions below each other."""

    def __init__(self, width=6):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.0), nn.Embedding(V, width)
        self.rnn, self.decoder = nn.LSTM(width, width, 2), nn.Linear(width, V)

    def forward(self, x, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(x)), hidden)
        return self.decoder(self.drop(output)).view(-1, V), hidden

    def init_hidden(self, count):
        weight = next(self.parameters())
        return weight.new_zeros(2, count, 6), weight.new_zeros(2, count, 6)


def word_model(t=T):
    net = WordModel().double()
    optimizer = sgd(net)
    data, target = whole(V, t, B), whole(V, t, B, seed=1)
    hidden = net.init_hidden(B)
    state = {"hidden": tuple(torch.ones_like(h) * 0.1 for h in hidden)}
    first = state["hidden"]

    def step(monitor):
        with monitor.micro_batch(data, target):
            hidden = tuple(h.detach() for h in first)
            output, state["hidden"] = net(data, hidden)
            F.cross_entropy(output, target.view(-1)).backward()
        monitor.before_step()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.25)
        optimizer.step()
        optimizer.zero_grad()

    def some(i):
        return net(data[:, i : i + 1], tuple(h[:, i : i + 1].contiguous() for h in first))[0]

    return Script(
        net,
        optimizer,
        step,
        parts=lambda: [F.cross_entropy(some(i), target[:, i]) for i in range(B)],
        call=lambda i: (some(i)[-1], []),
        loss="cross_entropy",
    )


def word_model_with_as_many_steps_as_examples():
    return word_model(B)


class Translator(nn.Module):
    """nn.Transformer, sequence first, with masks of times and of padding ``[B, T]``."""

    def __init__(self, width=8):
        super().__init__()
        self.source, self.target = nn.Embedding(V, width), nn.Embedding(V, width)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor")
            self.transformer = nn.Transformer(width, 2, 1, 1, 12, dropout=0.0)
        self.generator = nn.Linear(width, V)

    def forward(self, src, trg, trg_mask, src_padding_mask):
        out = self.transformer(
            self.source(src), self.target(trg), tgt_mask=trg_mask, src_key_padding_mask=src_padding_mask
        )
        return self.generator(out)


def translator(t=T):
    net = Translator().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    src, trg = whole(V, t, B), whole(V, t + 1, B, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(t, dtype=torch.float64)
    padding = torch.zeros(B, t, dtype=torch.bool)
    padding[::2, -1] = True

    def scores(i):
        return net(src[:, i], trg[:-1, i], mask, padding[i])

    def step(monitor):
        with monitor.micro_batch(src, trg):
            logits = net(src, trg[:-1], mask, padding)
            F.cross_entropy(logits.reshape(-1, V), trg[1:].reshape(-1)).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    return Script(
        net,
        optimizer,
        step,
        parts=lambda: [F.cross_entropy(scores(slice(i, i + 1))[:, 0], trg[1:, i]) for i in range(B)],
        call=lambda i: (scores(slice(i, i + 1))[-1, 0], []),
        loss="cross_entropy",
    )


def translator_with_as_many_steps_as_examples():
    return translator(B)


# -- images -----------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self, classes=3, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), norm(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def classifier(criterion, count=16, **expected):
    net = ConvNet().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    x, y = draws(count, 1, 4, 4), whole(3, count)

    def step(monitor):
        with monitor.micro_batch(x, y):
            criterion(net(x), y).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def call(i):
        image = x[i : i + 1].clone().requires_grad_()
        return net(image)[0], [image]

    half = count // 2
    halves = [slice(0, half), slice(half, count)]
    return Script(
        net,
        optimizer,
        step,
        parts=lambda: [criterion(net(x[part]), y[part]) for part in halves],
        size=half,
        call=call,
        count=count,
        loss="cross_entropy",
        **expected,
    )


def image_classifier_with_batch_norm():
    return classifier(nn.CrossEntropyLoss(label_smoothing=0.1))


def image_classifier_with_class_weights():
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64))
    script = classifier(weighted, noise="divides by class weights")
    script.parts = None
    return script


def image_classifier_with_mixup():
    """A convex sum of two losses, and of pairs of inputs."""
    net = ConvNet(norm=nn.Identity).double()
    optimizer = sgd(net)
    x, y = draws(B, 1, 4, 4), whole(3, B)
    order, weight = torch.tensor([3, 1, 0, 2, 7, 4, 6, 5]), 0.3
    mixed = weight * x + (1 - weight) * x[order]

    def criterion(out, i):
        return weight * F.cross_entropy(out, y[i]) + (1 - weight) * F.cross_entropy(out, y[order][i])

    def step(monitor):
        with monitor.micro_batch(x, y):
            criterion(net(weight * x + (1 - weight) * x[order]), slice(None)).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    def call(i):
        image = mixed[i : i + 1].clone().requires_grad_()
        return net(image)[0], [image]

    return Script(
        net,
        optimizer,
        step,
        parts=lambda: [criterion(net(mixed[i : i + 1]), slice(i, i + 1)) for i in range(B)],
        call=call,
        without=("norm",),
        loss="refused: it is a sum of several terms",
    )


class UNet(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.inc, self.down = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.outc = nn.Conv2d(6, classes, 1)

    def forward(self, x):
        x1 = F.relu(self.inc(x))
        x2 = F.relu(self.down(F.max_pool2d(x1, 2)))
        return self.outc(torch.cat([x1, self.up(x2)], 1))


def segmented(ignored, criterion=None, **expected):
    net = UNet().double()
    optimizer = torch.optim.RMSprop(net.parameters(), lr=0.0)
    batch = {"image": draws(B, 1, 2, 2), "mask": whole(2, B, 2, 2, seed=1)}
    if ignored:
        batch["mask"][0, 0, 0] = 255
    criterion = criterion or nn.CrossEntropyLoss(ignore_index=255)

    def step(monitor):
        images, masks = batch["image"], batch["mask"]
        with monitor.micro_batch(images, masks):
            criterion(net(images), masks).backward()
        monitor.before_step()
        torch.nn.utils.clip_grad_value_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def call(i):
        image = batch["image"][i : i + 1].clone().requires_grad_()
        return net(image)[0].flatten(), [image]

    def parts():
        pairs = zip(batch["image"].split(1), batch["mask"].split(1), strict=True)
        return [criterion(net(image), mask) for image, mask in pairs]

    return Script(net, optimizer, step, parts=None if ignored else parts, call=call, **expected)


def segmentation():
    return segmented(ignored=False, loss="cross_entropy")


def segmentation_with_ignored_pixels():
    return segmented(
        ignored=True, loss="cross_entropy", noise="divides by the number of targets that are not ignored"
    )


def dice(scores, masks):
    """Of each image, and their mean."""
    shown = scores.softmax(1)[:, 1].flatten(1)
    target = (masks == 1).to(shown).flatten(1)
    overlap = (shown * target).sum(1)
    return (1 - (2 * overlap + 1) / (shown.sum(1) + target.sum(1) + 1)).mean()


def segmentation_with_dice():
    return segmented(
        ignored=False,
        criterion=lambda scores, masks: F.cross_entropy(scores, masks) + dice(scores, masks),
        loss="refused: it is a sum of several terms",
    )


SCRIPTS = {
    "gpt_accumulated",
    "gpt_in_one_batch",
    "keyword_batch",
    "keyword_batch_with_ignored_labels",
    "seq2seq_with_teacher_forcing",
    "word_model",
    "word_model_with_as_many_steps_as_examples",
    "translator",
    "translator_with_as_many_steps_as_examples",
    "image_classifier_with_batch_norm",
    "image_classifier_with_class_weights",
    "image_classifier_with_mixup",
    "segmentation",
    "segmentation_with_ignored_pixels",
    "segmentation_with_dice",
}
"""Those that are run; the other functions help to make them."""
