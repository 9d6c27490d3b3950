"""The reference: mLSTM one token at a time, in plain eager torch. Every fast kernel is compared with this file.

Shapes: B batch, NH heads, T tokens, K = DHQK, V = DHHV.
Formulas: xLSTM (arXiv 2405.04517) and xLSTM 7B (arXiv 2503.13427); i and f come soft-capped.
All gate and state arithmetic is done in the state's dtype (float32 in use, float64 as a reference).
"""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]  # C (B, NH, K, V), n (B, NH, K), m (B, NH, 1)

# Gate pre-activations of a padded token: its write weight exp(-1e4 - m) is 0 and its decay exp(logsigmoid(1e4)) is 1,
# so state and later outputs are untouched to the bit. Finite, because inf - inf is NaN.
PAD_I, PAD_F = -1e4, 1e4


def log_sigmoid(f: Tensor) -> Tensor:
    """log(sigmoid(f)), accurate where |f| is large, also where the compiler writes log1p(x) as log(1 + x).

    Inductor does so on Metal, which loses everything below 6e-8: for f = 12 that is 1 % of the value, every token.
    The correction of log1p is the classical one (Kahan; HP-15C manual): log(u) x / (u - 1) with u = 1 + x rounded.
    """
    x = torch.exp(-f.abs())
    u = 1 + x
    log1p = torch.where(u == 1, x, torch.log(u) * x / torch.where(u == 1, 1, u - 1))
    return torch.clamp(f, max=0) - log1p


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, *, i: Tensor, f: Tensor, state: State, eps: float = 1e-6
) -> tuple[Tensor, State]:
    """One token.

    q, k (B, NH, K)   v (B, NH, V)   i, f (B, NH) gate pre-activations   state (C, n, m) of one dtype
    Returns h (B, NH, V) in q's dtype and the new state.
    """
    C, n, m = state
    acc = C.dtype
    i, f = i.to(acc).unsqueeze(-1), f.to(acc).unsqueeze(-1)
    qs, ks, vs = q.to(acc) * q.shape[-1] ** -0.5, k.to(acc), v.to(acc)
    logf, before = log_sigmoid(f), m
    m = torch.maximum(logf + before, i)
    # Any m will do, as long as the decay fits it: (logf + before) - m would lose a logf below m's last digit, and over
    # 20,000 tokens with f = 15 and m = 15 all forgetting (6e-3).
    keep, write = torch.exp(logf + (before - m)), torch.exp(i - m)
    C = keep.unsqueeze(-1) * C + write.unsqueeze(-1) * (ks.unsqueeze(-1) * vs.unsqueeze(-2))
    n = keep * n + write * ks
    numerator = (qs.unsqueeze(-1) * C).sum(-2)
    denominator = torch.maximum((qs * n).sum(-1, keepdim=True).abs(), torch.exp(-m)) + eps
    return (numerator / denominator).to(q.dtype), (C, n, m)


def mlstm_sequence(
    q: Tensor, k: Tensor, v: Tensor, *, i: Tensor, f: Tensor, state: State, eps: float = 1e-6
) -> tuple[Tensor, State]:
    """T tokens in strict time order.

    q, k (B, NH, T, K)   v (B, NH, T, V)   i, f (B, NH, T)   Returns h (B, NH, T, V) and the new state.
    """
    outputs = []
    for t in range(q.shape[2]):
        h, state = mlstm_step(q[:, :, t], k[:, :, t], v[:, :, t], i=i[:, :, t], f=f[:, :, t], state=state, eps=eps)
        outputs.append(h)
    return torch.stack(outputs, 2), state
