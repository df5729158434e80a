"""Two PyTorch peers: the loop of a notebook, and `torch.func` over seeds. On a CUDA device where there is one."""

import os

import numpy as np
import torch
from torch import nn
from torch.func import grad, vmap
from workloads import Size, Weights, layers_of

torch.set_num_threads(int(os.environ["BENCH_CORES"]))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loop(size: Size, weights: Weights):
    """A fresh `nn.Sequential` for every depth and seed, `backward`, the norm of each `weight.grad`."""
    x, t, w, b = (torch.from_numpy(a).to(DEVICE) for a in weights)

    def measure():
        out = _empty(size, len(w))
        for i, depth in enumerate(size.depths):
            for s in range(len(w)):
                linears = [nn.Linear(size.width, size.width, device=DEVICE) for _ in range(depth)]
                with torch.no_grad():
                    for linear, l in zip(linears, layers_of(depth), strict=True):
                        linear.weight.copy_(w[s, l].T)
                        linear.bias.copy_(b[s, l])
                net = nn.Sequential(linears[0], *(m for linear in linears[1:] for m in (nn.Tanh(), linear)))
                loss = 0.5 * (net(x) - t).square().sum() / size.batch
                loss.backward()
                out[s, i, :depth] = [torch.linalg.norm(linear.weight.grad).item() for linear in linears]
        return np.log(out)

    return measure


def func(size: Size, weights: Weights):
    """vmap over seeds of the gradient with respect to a list of weights, one depth at a time."""
    x, t = (torch.from_numpy(a).to(DEVICE) for a in (weights.x, weights.t))
    # One contiguous tensor a layer: slices of a stacked one would each have a gradient as large as the stack.
    w, b = ([torch.from_numpy(np.ascontiguousarray(a[:, l])).to(DEVICE) for l in range(a.shape[1])] for a in weights[2:])

    def loss(w, b):
        z = torch.addmm(b[0], x, w[0])
        for w_l, b_l in zip(w[1:], b[1:], strict=True):
            z = torch.addmm(b_l, torch.tanh(z), w_l)
        return 0.5 * (z - t).square().sum() / size.batch

    grads = vmap(grad(loss))

    def measure():
        out = _empty(size, len(weights.w))
        for i, depth in enumerate(size.depths):
            of = layers_of(depth)
            norms = [torch.linalg.matrix_norm(g) for g in grads([w[l] for l in of], [b[l] for l in of])]
            out[:, i, :depth] = torch.stack(norms, 1).cpu().numpy()
        return np.log(out)

    return measure


def _empty(size, num_seeds):
    return np.full((num_seeds, len(size.depths), size.depths[-1]), np.nan, np.float32)


def product(a: np.ndarray, b: np.ndarray):
    """A function that multiplies them once and waits for the result."""
    left, right = torch.from_numpy(a).to(DEVICE), torch.from_numpy(b).to(DEVICE)

    def once():
        torch.mm(left, right)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return once


def device() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
