"""More of the same: models that generate, compare, act, recommend, detect, and structured inputs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .scripts import B, ConvNet, Script, T, V, sgd
from .test_calls import draws, whole


def at(i):
    return slice(i, i + 1)


def lines(net, optimizer, shown, loss):
    """The step that most scripts take."""

    def step(monitor):
        with monitor.micro_batch(*shown):
            loss().backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    return step


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(16, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.fc3, self.fc4 = nn.Linear(2, 6), nn.Linear(6, 16)

    def forward(self, x):
        h = F.relu(self.fc1(x.view(-1, 16)))
        mu, logvar = self.fc21(h), self.fc22(h)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def vae():
    """A summed loss of several terms, and noise drawn in the forward pass."""
    net = VAE().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    x = draws(B, 1, 4, 4).sigmoid()

    def loss():
        recon, mu, logvar = net(x)
        bce = F.binary_cross_entropy(recon, x.view(-1, 16), reduction="sum")
        return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    def step(monitor):
        torch.manual_seed(3)
        with monitor.micro_batch(x):
            loss().backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    def parts():
        torch.manual_seed(3)
        recon, mu, logvar = net(x)
        bce = F.binary_cross_entropy(recon, x.view(-1, 16), reduction="none").sum(1)
        return list(bce - 0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1))

    def call(i):
        image = x[at(i)].clone().requires_grad_()
        return net(image)[1][0], [image]

    return Script(
        net,
        optimizer,
        step,
        parts,
        call,
        loss="refused: SubBackward0 is none of torch's losses",
        probe="kernel and Jacobian are those of tensor 1",
        probe_is_read=True,
        remedy={"output": 1},
    )


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1), nn.Sigmoid())

    def forward(self, x):
        return self.main(x).view(-1)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh())

    def forward(self, z):
        return self.main(z)


def gan(of_generator=True):
    torch.manual_seed(0)
    g, d = Generator().double(), Discriminator().double()
    opt_g = torch.optim.Adam(g.parameters(), lr=0.0, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(d.parameters(), lr=0.0, betas=(0.5, 0.999))
    real, z, criterion = draws(B, 4), draws(B, 3, seed=1), nn.BCELoss()
    label = torch.ones(B, dtype=torch.float64)

    def step(monitor):
        d.zero_grad()
        if not of_generator:
            monitor.begin_micro_batch(real)
        criterion(d(real), label).backward()
        fake = g(z)
        criterion(d(fake.detach()), label * 0).backward()
        if not of_generator:
            monitor.end_micro_batch()
            monitor.before_step()
        opt_d.step()
        g.zero_grad()
        if of_generator:
            monitor.begin_micro_batch(z)
            fake = g(z)
        criterion(d(fake), label).backward()
        if of_generator:
            monitor.end_micro_batch()
            monitor.before_step()
        opt_g.step()

    def call(i):
        x = (z if of_generator else real)[at(i)].clone().requires_grad_()
        return (g if of_generator else d)(x).flatten(), [x]

    if of_generator:

        def parts():
            return [criterion(d(g(z[at(i)])), label[at(i)]) for i in range(B)]

        return Script(
            g, opt_g, step, parts, call, loss="refused: between the network's output and the loss stands"
        )

    def parts_of_both():
        return [
            criterion(d(real[at(i)]), label[at(i)]) + criterion(d(g(z[at(i)]).detach()), label[at(i)] * 0)
            for i in range(B)
        ]

    return Script(d, opt_d, step, parts_of_both, call, loss="refused: the step makes several backward passes")


def generator_behind_a_discriminator():
    return gan()


def discriminator_with_two_backward_passes():
    return gan(of_generator=False)


def generator_whose_fake_is_made_before():
    """The forward pass is outside the micro-batch."""
    script = gan()
    g, opt_g = script.net, script.optimizer
    d, z, label = Discriminator().double(), draws(B, 3, seed=1), torch.ones(B, dtype=torch.float64)

    def step(monitor):
        fake = g(z)
        with monitor.micro_batch(z):
            F.binary_cross_entropy(d(fake), label).backward()
        monitor.before_step()
        opt_g.step()
        opt_g.zero_grad()

    def inside(monitor):
        with monitor.micro_batch(z):
            F.binary_cross_entropy(d(g(z)), label).backward()
        monitor.before_step()
        opt_g.step()
        opt_g.zero_grad()

    script.parts = lambda: [F.binary_cross_entropy(d(g(z[at(i)])), label[at(i)]) for i in range(B)]
    script.loss = "refused: the network itself was not called"
    script.step, script.mended = step, inside
    script.noise = "Put the forward pass inside it too"
    return script


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.conv = nn.Linear(1, 3), nn.Conv2d(1, 3, 3, padding=1)
        self.out = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x, t):
        return self.out(F.silu(self.conv(x) + self.time(t[:, None].to(x) / 10)[:, :, None, None]))


class GaussianDiffusion(nn.Module):
    """Draws times and noise itself, and returns a loss weighted by time."""

    def __init__(self, model, weighted):
        super().__init__()
        self.model, self.weighted = model, weighted
        self.register_buffer("alphas", torch.linspace(0.9, 0.1, 10, dtype=torch.float64))

    def forward(self, x, generator=None):
        t = torch.randint(0, 10, (len(x),))
        noise = torch.randn_like(x)
        a = self.alphas[t][:, None, None, None]
        predicted = self.model(a.sqrt() * x + (1 - a).sqrt() * noise, t)
        if not self.weighted:
            return F.mse_loss(predicted, noise)
        loss = F.mse_loss(predicted, noise, reduction="none").flatten(1).mean(1)
        return (loss * (1 + self.alphas[t])).mean()


def diffusion(weighted=True):
    net = GaussianDiffusion(Denoiser(), weighted).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    x = draws(B, 1, 2, 2)

    def drawn():
        torch.manual_seed(3)
        t, noise = torch.randint(0, 10, (B,)), torch.randn_like(x)
        a = net.alphas[t][:, None, None, None]
        return a.sqrt() * x + (1 - a).sqrt() * noise, t, noise

    def step(monitor):
        torch.manual_seed(3)
        with monitor.micro_batch(x):
            loss = net(x)
            loss.backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    def parts():
        noisy, t, noise = drawn()
        weight = 1 + net.alphas[t] if weighted else torch.ones(B)
        return [F.mse_loss(net.model(noisy[at(i)], t[at(i)]), noise[at(i)]) * weight[i] for i in range(B)]

    def call(i):
        noisy, t, _ = drawn()
        image = noisy[at(i)].clone().requires_grad_()
        return net.model(image, t[at(i)]).flatten(), [image]

    return Script(
        net, optimizer, step, parts, call, loss="refused: MulBackward0 is none" if weighted else "mse_loss"
    )


def diffusion_that_weighs_times():
    return diffusion()


def diffusion_that_draws_noise():
    return diffusion(weighted=False)


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.projector = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.projector(F.relu(self.backbone(x)))


def contrastive():
    """SimCLR: both views in one batch, the other examples are the negatives."""
    net = Projected().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    batches = [torch.cat([draws(B, 4, seed=n), draws(B, 4, seed=9 + n)]) for n in range(3)]
    images = batches[0]

    def loss(images):
        features = F.normalize(net(images), dim=1)
        similarity = features @ features.T / 0.5
        similarity = similarity.masked_fill(torch.eye(2 * B, dtype=torch.bool), -1e9)
        return F.cross_entropy(similarity, (torch.arange(2 * B) + B) % (2 * B))

    def step(monitor):
        for images in batches:
            with monitor.micro_batch(images):
                (loss(images) / len(batches)).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    def call(i):
        x = images[at(i)].clone().requires_grad_()
        return net(x)[0], [x]

    return Script(
        net,
        optimizer,
        step,
        lambda: list(map(loss, batches)),
        call,
        size=2 * B,
        count=2 * B,
        loss="refused: between the network's output and the loss stands",
    )


def triplet():
    """One network, called three times."""
    net = Projected().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    a, p, n = draws(B, 4), draws(B, 4, seed=1), draws(B, 4, seed=2)
    criterion = nn.TripletMarginLoss(margin=1.0)

    def call(i):
        x = a[at(i)].clone().requires_grad_()
        return net(x)[0], [x]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (a,), lambda: criterion(net(a), net(p), net(n))),
        lambda: [criterion(net(a[at(i)]), net(p[at(i)]), net(n[at(i)])) for i in range(B)],
        call,
        loss="refused: ",
    )


class QNet(nn.Module):
    def __init__(self, actions=3):
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(4, 6), nn.Linear(6, actions)

    def forward(self, x):
        return self.layer2(F.relu(self.layer1(x)))


def deep_q_network(double=False):
    """Tuples of five, a target network; double: the network itself is first asked without gradients."""
    net = QNet().double()
    target_net = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, amsgrad=True)
    states, rewards, following = draws(B, 4), draws(B, seed=1), draws(B, 4, seed=2)
    actions, dones = whole(3, B), whole(2, B, seed=3).double()
    criterion = nn.SmoothL1Loss()

    def loss(i=slice(None)):
        with torch.no_grad():
            if double:
                best = net(following[i]).argmax(1, keepdim=True)
                ahead = target_net(following[i]).gather(1, best)[:, 0]
            else:
                ahead = target_net(following[i]).max(1).values
        expected = rewards[i] + 0.99 * ahead * (1 - dones[i])
        values = net(states[i]).gather(1, actions[i][:, None])
        return criterion(values, expected[:, None])

    def call(i):
        x = (following if double else states)[at(i)].clone().requires_grad_()
        return net(x)[0], [x]

    shown = ((states, actions, rewards, following, dones),)
    return Script(
        net,
        optimizer,
        lines(net, optimizer, shown, loss),
        lambda: [loss(at(i)) for i in range(B)],
        call,
        loss="refused: between",
    )


def double_deep_q_network():
    return deep_q_network(double=True)


class Agent(nn.Module):
    """Called by methods of its own, and has no forward."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.actor = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def act(self, x, action):
        logits = self.actor(x)
        distribution = torch.distributions.Categorical(logits=logits)
        return distribution.log_prob(action), distribution.entropy(), self.critic(x)[:, 0]


def proximal_policy():
    """The agent's parts are called, never the agent."""
    net = Agent().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, eps=1e-5)
    x, actions, old = draws(B, 4), whole(3, B), draws(B, seed=1) - 1
    advantages, returns = draws(B, seed=2), draws(B, seed=3)

    def loss(i=slice(None)):
        log_prob, entropy, value = net.act(x[i], actions[i])
        ratio = (log_prob - old[i]).exp()
        clipped = torch.max(-advantages[i] * ratio, -advantages[i] * ratio.clamp(0.8, 1.2)).mean()
        return clipped - 0.01 * entropy.mean() + 0.5 * 0.5 * ((value - returns[i]) ** 2).mean()

    def call(i):
        a = x[at(i)].clone().requires_grad_()
        return net.actor(a)[0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (x,), loss),
        lambda: [loss(at(i)) for i in range(B)],
        call,
        probe="Agent has no usable forward. Pass forward=lambda model, x: ...",
        loss="refused: ",
        remedy={"forward": lambda net, x: net.actor(x)},
    )


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.affine, self.action_head, self.value_head = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 1)

    def forward(self, x):
        x = F.relu(self.affine(x))
        return F.softmax(self.action_head(x), -1), self.value_head(x)


def actor_critic():
    """One state at a time, collected over an episode; one backward pass at its end."""
    net = ActorCritic().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    states, actions, returns = draws(B, 4), whole(2, B), draws(B, seed=1)

    def loss(p, v, i):
        return -p[actions[i]].log() * (returns[i] - v.item()) + F.smooth_l1_loss(v[0], returns[i])

    def step(monitor):
        saved = [net(state) for state in states]  # the episode
        with monitor.micro_batch(states):
            optimizer.zero_grad()
            torch.stack([loss(p, v, i) for i, (p, v) in enumerate(saved)]).sum().backward()
        monitor.before_step()
        optimizer.step()

    def inside(monitor):
        optimizer.zero_grad()
        with monitor.micro_batch(states):
            p, v = net(states)
            torch.stack([loss(p[i], v[i], i) for i in range(B)]).sum().backward()
        monitor.before_step()
        optimizer.step()

    def call(i):
        a = states[at(i)].clone().requires_grad_()
        return net(a)[0][0], [a]

    return Script(
        net,
        optimizer,
        step,
        lambda: [loss(*net(states[i]), i) for i in range(B)],
        call,
        probe="are no tensor and have no 'logits', got tuple. Pass forward=",
        loss="refused: the network itself was not called",
        noise="Put the forward pass inside it too",
        mended=inside,
    )


class GraphConv(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x, edges):
        return self.linear(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]) + x)


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = GraphConv(3, 5), nn.Linear(5, 2)

    def forward(self, x, edge_index, batch):
        x = F.relu(self.conv(x, edge_index))
        count = int(batch.max()) + 1
        mean = x.new_zeros(count, 5).index_add(0, batch, x) / batch.bincount()[:, None]
        return self.out(mean)


class Data:
    """A batch of graphs as an object."""

    def __init__(self, **tensors):
        self.__dict__.update(tensors)


def graphs(as_object=False):
    """Nodes of all graphs below each other, and the graph of each."""
    net = GraphNet().double()
    inner = net
    if as_object:
        net = OfData(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    nodes, y = draws(4, 3, 3), whole(2, 4)
    edges = torch.tensor([[0, 1, 2], [1, 0, 1]]).expand(4, 2, 3).clone()
    edges[1, 0, 2] = 0
    batch = torch.arange(4).repeat_interleave(3)
    below = torch.cat([edges[g] + 3 * g for g in range(4)], 1)
    x = nodes.flatten(0, 1)
    data = Data(x=x, edge_index=below, batch=batch, y=y)

    def alone(x, edges):
        return inner(x, edges, torch.zeros(3, dtype=torch.int64))

    def forward(net, tensors):
        return torch.cat([alone(*graph) for graph in zip(*tensors, strict=True)])

    def loss():
        out = net(data) if as_object else net(x, below, batch)
        return F.cross_entropy(out, y)

    def call(i):
        a = nodes[i].clone().requires_grad_()
        return alone(a, edges[i])[0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (data,) if as_object else (x, y), loss),
        lambda: [F.cross_entropy(alone(nodes[i], edges[i]), y[at(i)]) for i in range(4)],
        call,
        count=4,
        without=("conv", "net.conv"),
        probe="Pass forward=, which maps model and batch to outputs [N, O], and batches whose tensors",
        noise="which dimension counts the examples could not be found",
        loss="refused: the network's own call could not be made out",
        remedy={"forward": forward},
        mended=lines(net, optimizer, ((nodes, edges),), loss),
    )


class OfData(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, data):
        return self.net(data.x, data.edge_index, data.batch)


def graphs_as_objects():
    return graphs(as_object=True)


class Citations(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, adjacency):
        return F.log_softmax(adjacency @ self.second(F.relu(adjacency @ self.first(x))), 1)


def nodes_of_one_graph():
    """All nodes are one batch, and the loss is of some of them."""
    net = Citations().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, weight_decay=5e-4)
    x, y, train = draws(10, 3), whole(2, 10), torch.arange(4)
    adjacency = (draws(10, 10, seed=1) > 0.5).double() + torch.eye(10, dtype=torch.float64)
    adjacency = adjacency / adjacency.sum(1, keepdim=True)

    def loss():
        return F.nll_loss(net(x, adjacency)[train], y[train])

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (x, y), loss),
        None,
        None,
        probe="it cannot be called with the first example alone",
        noise="it cannot be called with the first example alone",
        loss="refused: between the network's output and the loss stands Index",
    )


def distilled():
    """A teacher without gradients, and soft targets beside the hard ones."""
    net, teacher = QNet().double(), QNet().double().eval()
    optimizer = sgd(net)
    x, y = draws(B, 4), whole(3, B)

    def loss(i=slice(None)):
        with torch.no_grad():
            soft = F.softmax(teacher(x[i]) / 2, -1)
        logits = net(x[i])
        kl = F.kl_div(F.log_softmax(logits / 2, -1), soft, reduction="batchmean") * 4
        return 0.5 * kl + 0.5 * F.cross_entropy(logits, y[i])

    def call(i):
        a = x[at(i)].clone().requires_grad_()
        return net(a)[0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (x, y), loss),
        lambda: [loss(at(i)) for i in range(B)],
        call,
        loss="refused: it is a sum",
    )


class Distiller(nn.Module):
    """The same as one module: the teacher is a part of it."""

    def __init__(self):
        super().__init__()
        self.teacher, self.student = QNet(), QNet()
        self.teacher.requires_grad_(False)

    def forward(self, x, y):
        with torch.no_grad():
            soft = self.teacher(x).softmax(-1)
        return F.mse_loss(self.student(x).softmax(-1), soft)


def distilled_as_one_module():
    net = Distiller().double()
    optimizer = torch.optim.SGD(net.student.parameters(), lr=0.0)
    x, y = draws(B, 4), whole(3, B)

    def call(i):
        a = x[at(i)].clone().requires_grad_()
        return net.student(a)[0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (x, y), lambda: net(x, y)),
        lambda: [net(x[at(i)], y[at(i)]) for i in range(B)],
        call,
        loss="refused: between the network's output and the loss stands Softmax",
    )


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.kind, self.age = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        x = F.relu(self.trunk(x))
        return {"kind": self.kind(x), "age": self.age(x)}


def two_heads():
    net = TwoHeads().double()
    optimizer = sgd(net)
    x, y = draws(B, 4), {"kind": whole(3, B), "age": draws(B, 1, seed=1)}

    def loss(i=slice(None)):
        out = net(x[i])
        return F.cross_entropy(out["kind"], y["kind"][i]) + 0.1 * F.mse_loss(out["age"], y["age"][i])

    def call(i):
        a = x[at(i)].clone().requires_grad_()
        return net(a)["kind"][0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (x,), loss),
        lambda: [loss(at(i)) for i in range(B)],
        call,
        loss="refused: it is a sum",
    )


class Detector(nn.Module):
    """A list of images of different sizes, a list of dictionaries, and a dictionary of losses."""

    def __init__(self):
        super().__init__()
        self.backbone, self.box, self.label = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, images, targets=None):
        features = torch.stack([F.relu(self.backbone(image[None])).mean((2, 3))[0] for image in images])
        boxes, labels = self.box(features), self.label(features)
        if not self.training:
            return [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
        true_boxes = torch.stack([target["boxes"][0] for target in targets])
        true_labels = torch.cat([target["labels"] for target in targets])
        return {"box": F.smooth_l1_loss(boxes, true_boxes), "label": F.cross_entropy(labels, true_labels)}


def detector():
    net = Detector().double()
    optimizer = sgd(net)
    images = draws(B, 1, 4, 4)
    targets = [{"boxes": draws(1, 4, seed=i), "labels": whole(2, 1, seed=i)} for i in range(B)]

    def loss(i=slice(None)):
        return sum(net(list(images[i]), targets[i]).values())

    def forward(net, tensors):
        return torch.stack([found["boxes"] for found in net(list(tensors))])

    def call(i):
        a = images[at(i)].clone().requires_grad_()
        return forward(net, a)[0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (list(images), targets), loss),
        lambda: [loss(at(i)) for i in range(B)],
        call,
        without=("backbone",),
        probe="Pass forward=",
        noise="which dimension counts the examples could not be found",
        loss="refused: it is a sum of several terms",
        remedy={"forward": forward},
        mended=lines(net, optimizer, (images,), loss),
    )


class Factorised(nn.Module):
    def __init__(self, users=5, items=7, factors=3, sparse=False):
        super().__init__()
        self.user_factors, self.item_factors = (
            nn.Embedding(users, factors, sparse=sparse),
            nn.Embedding(items, factors, sparse=sparse),
        )
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, user, item):
        return (self.user_factors(user) * self.item_factors(item)).sum(1) + self.bias


def matrix_factorisation():
    net = Factorised().double()
    optimizer = sgd(net)
    user, item, rating = whole(5, B), whole(7, B, seed=1), draws(B, seed=2)

    return Script(
        net,
        optimizer,
        lines(net, optimizer, ((user, item), rating), lambda: F.mse_loss(net(user, item), rating)),
        lambda: [F.mse_loss(net(user[at(i)], item[at(i)]), rating[at(i)]) for i in range(B)],
        lambda i: (net(user[at(i)], item[at(i)]), []),
        loss="mse_loss",
    )


class Speech(nn.Module):
    """Spectra ``[B, F, T]``, log probabilities ``[T, B, C]``."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(3, 5, 3, padding=1), nn.Linear(5, V)

    def forward(self, x):
        return F.log_softmax(self.fc(F.gelu(self.conv(x)).permute(2, 0, 1)), 2)


def speech(t=9):
    net = Speech().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    x, labels = draws(B, 3, t), whole(V - 1, B, 3) + 1
    lengths = torch.full((B,), t), whole(2, B, seed=4) + 2
    criterion = nn.CTCLoss(blank=0)

    def call(i):
        a = x[at(i)].clone().requires_grad_()
        return net(a)[-1, 0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, ((x, labels, *lengths),), lambda: criterion(net(x), labels, *lengths)),
        lambda: [criterion(net(x[at(i)]), labels[at(i)], *(n[at(i)] for n in lengths)) for i in range(B)],
        call,
        loss="refused: ",
    )


class SkipGram(nn.Module):
    """Returns its loss; positions, contexts, and contexts that are none."""

    def __init__(self, sparse=True):
        super().__init__()
        self.u, self.v = nn.Embedding(V, 3, sparse=sparse), nn.Embedding(V, 3, sparse=sparse)

    def forward(self, center, context, negatives):
        u = self.u(center)
        score = F.logsigmoid((u * self.v(context)).sum(1).clamp(-10, 10))
        noise = F.logsigmoid(-torch.bmm(self.v(negatives), u[:, :, None])[:, :, 0].clamp(-10, 10)).sum(1)
        return -(score + noise).mean()


def skip_gram(sparse=False):
    net = SkipGram(sparse).double()
    optimizer = torch.optim.SparseAdam(net.parameters(), lr=1e-30) if sparse else sgd(net)
    center, context, negatives = whole(V, B), whole(V, B, seed=1), whole(V, B, 4, seed=2)

    def loss(i):
        return net(center[i], context[i], negatives[i])

    def step(monitor):
        for half in (slice(0, 4), slice(4, 8)):
            with monitor.micro_batch((center[half], context[half], negatives[half])):
                (loss(half) / 2).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    return Script(
        net,
        optimizer,
        lines(net, optimizer, ((center, context, negatives),), lambda: loss(slice(None))),
        lambda: [loss(slice(0, 4)), loss(slice(4, 8))],
        lambda i: ((net.u(center[at(i)]) * net.v(context[at(i)])).sum(1), []),
        size=4,
        count=4,
        probe="the network returns no tensor that grows with the examples",
        noise="which dimension counts the examples could not be found",
        loss="refused: NegBackward0 is none of torch's losses",
        remedy={"forward": lambda net, x: (net.u(x[0]) * net.v(x[1])).sum(1, keepdim=True)},
        mended=step,
    )


def sparse_skip_gram():
    return skip_gram(sparse=True)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x, t):
        return self.net(torch.cat([x, t], 1))


def physics_informed():
    """A derivative of the network in its loss, and a boundary term."""
    net = Field().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    x, t = draws(B, 1).requires_grad_(), draws(B, 1, seed=1).requires_grad_()
    edge, value = draws(B, 1, seed=2), draws(B, 1, seed=3)
    halves = slice(0, 4), slice(4, 8)

    def loss(i=slice(None)):
        a, b = x[i], t[i]
        u = net(a, b)
        u_t = torch.autograd.grad(u, b, torch.ones_like(u), create_graph=True)[0]
        u_x = torch.autograd.grad(u, a, torch.ones_like(u), create_graph=True)[0]
        u_xx = torch.autograd.grad(u_x, a, torch.ones_like(u_x), create_graph=True)[0]
        residual = u_t + u * u_x - 0.01 * u_xx
        return (residual**2).mean() + F.mse_loss(net(edge[i], torch.zeros_like(edge[i])), value[i])

    def call(i):
        a = [x[at(i)].detach().clone().requires_grad_(), t[at(i)].detach().clone().requires_grad_()]
        return net(*a)[0], a

    def step(monitor):
        for half in halves:
            with monitor.micro_batch((x[half], t[half])):
                (loss(half) / 2).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    return Script(
        net,
        optimizer,
        lines(net, optimizer, ((x, t),), loss),
        lambda: [loss(half) for half in halves],
        call,
        size=4,
        mended_count=4,
        noise="the gradient is more than the sum over the examples",
        loss="refused: it is a sum of several terms",
        mended=step,
    )


class Tabular(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeds = nn.ModuleDict({"colour": nn.Embedding(4, 3), "shop": nn.Embedding(5, 3)})
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, batch):
        columns = [embed(batch[name]) for name, embed in self.embeds.items()]
        return self.layers(torch.cat([*columns, batch["size"][:, None], batch["price"][:, None]], 1))[:, 0]


def table_of_columns():
    net = Tabular().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    batch = {
        "colour": whole(4, B),
        "shop": whole(5, B, seed=1),
        "size": draws(B),
        "price": draws(B, seed=1),
        "target": whole(2, B, seed=3).double(),
    }

    def some(i):
        return {name: column[i] for name, column in batch.items()}

    def loss(i=slice(None)):
        return F.binary_cross_entropy_with_logits(net(some(i)), batch["target"][i])

    def call(i):
        row = some(at(i))
        inputs = [row[name].clone().requires_grad_() for name in ("size", "price")]
        return net({**row, "size": inputs[0], "price": inputs[1]}), inputs

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (batch,), loss),
        lambda: [loss(at(i)) for i in range(B)],
        call,
        without=("embeds",),
        loss="binary_cross_entropy_with_logits",
    )


class Mixture(nn.Module):
    """Every token is given to its two best experts; a second output balances their load."""

    def __init__(self, width=4, experts=3):
        super().__init__()
        self.gate, self.out = nn.Linear(width, experts), nn.Linear(width, 3)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(experts)])

    def forward(self, x):
        probabilities = self.gate(x).softmax(-1)
        weights, chosen = probabilities.topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place][:, None])
        load = F.one_hot(chosen[:, 0], len(self.experts)).to(x).mean(0)
        return self.out(x + out), (probabilities.mean(0) * load).sum() * len(self.experts)


def mixture_of_experts():
    net = Mixture().double()
    optimizer = sgd(net)
    x, y = draws(B, 4), whole(3, B)

    def loss(i):
        logits, balance = net(x[i])
        return F.cross_entropy(logits, y[i]) + 0.01 * balance

    def step(monitor):
        for half in (slice(0, 4), slice(4, 8)):
            with monitor.micro_batch(x[half], y[half]):
                (loss(half) / 2).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    def call(i):
        a = x[at(i)].clone().requires_grad_()
        return net(a)[0][0], [a]

    return Script(
        net,
        optimizer,
        step,
        lambda: [loss(slice(0, 4)), loss(slice(4, 8))],
        call,
        size=4,
        count=4,
        loss="refused: it is a sum of several terms",
    )


class LowRank(nn.Module):
    """A frozen layer and what is learned beside it, which begins at nothing."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


def low_rank():
    net = nn.Sequential(LowRank(nn.Linear(4, 6)), nn.ReLU(), LowRank(nn.Linear(6, 3))).double()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.0)
    x, y = draws(B, 4), whole(3, B)

    def call(i):
        a = x[at(i)].clone().requires_grad_()
        return net(a)[0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (x, y), lambda: F.cross_entropy(net(x), y)),
        lambda: [F.cross_entropy(net(x[at(i)]), y[at(i)]) for i in range(B)],
        call,
        loss="cross_entropy",
    )


def head_on_a_frozen_backbone():
    net = nn.Sequential(ConvNet(classes=5), nn.ReLU(), nn.Linear(5, 3)).double()
    net[0].requires_grad_(False).eval()
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.0)
    x, y = draws(B, 1, 4, 4), whole(3, B)

    def call(i):
        a = x[at(i)].clone().requires_grad_()
        return net(a)[0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (x, y), lambda: F.cross_entropy(net(x), y)),
        lambda: [F.cross_entropy(net(x[at(i)]), y[at(i)]) for i in range(B)],
        call,
        loss="cross_entropy",
    )


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Embedding(V, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, text, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(text), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (hidden, _) = self.lstm(packed)
        return self.fc(hidden[-1])


def packed_sequences():
    net = Packed().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    text, lengths, y = whole(V, B, T), whole(T, B, seed=1) + 1, whole(2, B, seed=2)
    return Script(
        net,
        optimizer,
        lines(net, optimizer, ((text, lengths), y), lambda: F.cross_entropy(net(text, lengths), y)),
        lambda: [F.cross_entropy(net(text[at(i)], lengths[at(i)]), y[at(i)]) for i in range(B)],
        lambda i: (net(text[at(i)], lengths[at(i)])[0], []),
        loss="cross_entropy",
    )


class BatchLast(nn.Module):
    """Images ``[C, H, W, B]``."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x.permute(3, 0, 1, 2))).mean((2, 3)))


def images_with_the_batch_last():
    net = BatchLast().double()
    optimizer = sgd(net)
    x, y = draws(1, 4, 4, B), whole(3, B)

    def call(i):
        a = x[..., at(i)].clone().requires_grad_()
        return net(a)[0], [a]

    return Script(
        net,
        optimizer,
        lines(net, optimizer, (x, y), lambda: F.cross_entropy(net(x), y)),
        lambda: [F.cross_entropy(net(x[..., at(i)]), y[at(i)]) for i in range(B)],
        call,
        loss="cross_entropy",
    )


SCRIPTS = {
    "images_with_the_batch_last",
    "vae",
    "generator_behind_a_discriminator",
    "discriminator_with_two_backward_passes",
    "generator_whose_fake_is_made_before",
    "diffusion_that_weighs_times",
    "diffusion_that_draws_noise",
    "contrastive",
    "triplet",
    "deep_q_network",
    "double_deep_q_network",
    "proximal_policy",
    "actor_critic",
    "graphs",
    "graphs_as_objects",
    "nodes_of_one_graph",
    "distilled",
    "distilled_as_one_module",
    "two_heads",
    "detector",
    "matrix_factorisation",
    "speech",
    "skip_gram",
    "sparse_skip_gram",
    "physics_informed",
    "table_of_columns",
    "mixture_of_experts",
    "low_rank",
    "head_on_a_frozen_backbone",
    "packed_sequences",
}
"""Those that are run; the other functions help to make them."""
