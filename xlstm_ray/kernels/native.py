"""The reference: mLSTM and sLSTM one token at a time, in plain eager torch. Every fast kernel is compared with it.

Shapes: B batch, NH heads, T tokens, K = DHQK, V = DHHV, DH the head dimension of an sLSTM.
Formulas: xLSTM (arXiv 2405.04517) and xLSTM 7B (arXiv 2503.13427); the mLSTM's i and f come soft-capped.
Gates and states are computed in the state's dtype: float32 in runs, float64 as a reference.
"""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]  # C (B, NH, K, V), n (B, NH, K), m (B, NH, 1)
SlstmState = tuple[Tensor, Tensor, Tensor, Tensor]  # h, c, n, m (B, NH, DH); fresh: all zeros

# Gate pre-activations of a padded token: its write weight exp(-1e4 - m) is 0 and its decay exp(logsigmoid(1e4)) is 1,
# so the state and later outputs stay the same to the bit. Finite, because inf - inf is NaN.
PAD_I, PAD_F = -1e4, 1e4


def log_sigmoid(f: Tensor) -> Tensor:
    """log(sigmoid(f)), accurate for large |f| even if the compiler writes log1p(x) as log(1 + x).

    Inductor does so on Metal and loses everything below 6e-8: for f = 12 that is 1 % of the value at every token.
    The correction of log1p is the classical one (Kahan; HP-15C manual): log(u) x / (u - 1) with u = 1 + x rounded.
    """
    x = torch.exp(-f.abs())
    u = 1 + x
    log1p = torch.where(u == 1, x, torch.log(u) * x / torch.where(u == 1, 1, u - 1))
    return torch.clamp(f, max=0) - log1p


NEAR_1 = -1 / 128  # above it exp(d) is computed as 1 + expm1(d); below it, errors fade within 128 tokens


def decayed(old: Tensor, d: Tensor, new: Tensor) -> Tensor:
    """exp(d) old + new, for d up to 0; d broadcasts to old.

    A gate at its cap keeps exp(-3e-7), which is rounded by up to 3e-8, always to the same side: 2e-4 of the state over
    80,000 tokens. In old + (expm1(d) old + new) the factor is exact, and the sum is rounded up as often as down.
    Below NEAR_1, exp(d) is good enough and is one operation.
    """
    if d.dtype == torch.float64:
        missing = torch.expm1(d)
    else:  # Inductor on Metal has no expm1; in this short range the series is exact to float32
        x = torch.clamp(d, min=NEAR_1)
        missing = ((x / 6 + 0.5) * x + 1) * x
    near = d > NEAR_1
    return torch.where(near, old, 0) + (torch.where(near, missing, torch.exp(d)) * old + new)


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
    # The brackets matter: (logf + before) - m would lose a logf that is below m's last digit. With f = 15 and m = 15
    # that is all forgetting over 20,000 tokens (6e-3).
    decay, write = logf + (before - m), torch.exp(i - m)
    C = decayed(C, decay.unsqueeze(-1), write.unsqueeze(-1) * (ks.unsqueeze(-1) * vs.unsqueeze(-2)))
    n = decayed(n, decay, write * ks)
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


MAX_F = 15.0  # published models clamp the sLSTM's forget gate here; above it float32 cannot express the forgetting


def slstm_step(x: Tensor, *, recurrent: Tensor, token: Tensor, state: SlstmState) -> SlstmState:
    """One token: the new state, whose h is the output.

    x (B, NH, 4, DH): W x + b of the gates i, f, z, o   recurrent (NH, DH, 4 DH): what h adds to each gate
    token (B, 1) bool: false is padding, and the row keeps its state to the bit   state (h, c, n, m) of one dtype
    """
    h, c, n, m = state
    acc = c.dtype
    from_h = torch.bmm(h.transpose(0, 1), recurrent.to(acc)).transpose(0, 1)  # (B, NH, 4 DH)
    i, f, z, o = (x.to(acc) + from_h.unflatten(-1, (4, -1))).unbind(2)
    logf = log_sigmoid(torch.clamp(f, max=MAX_F))
    # Before the first token n is 0 and m means nothing. With i in place of m, m' is i and n' is 1, however small i is.
    before = torch.where(n == 0, i, m)
    m_new = torch.maximum(logf + before, i)
    # The published min(exp, 1) is left out: both exponents are at most 0 up to rounding, and with it rounding would go
    # to one side only and forget too much. The brackets are there for the same reason as in mlstm_step.
    decay, write = logf + (before - m_new), torch.exp(i - m_new)
    c_new = decayed(c, decay, write * torch.tanh(z))
    n_new = decayed(n, decay, write)
    h_new = torch.sigmoid(o) * c_new / n_new
    token = token.unsqueeze(-1)
    return (
        torch.where(token, h_new, h),
        torch.where(token, c_new, c),
        torch.where(token, n_new, n),
        torch.where(token, m_new, m),
    )


def slstm_sequence(x: Tensor, *, recurrent: Tensor, token: Tensor, state: SlstmState) -> tuple[Tensor, SlstmState]:
    """T tokens in strict time order: h feeds the gates, so there is no closed form.

    x (B, NH, T, 4, DH)   recurrent (NH, DH, 4 DH)   token (B, 1, T) bool
    Returns h (B, NH, T, DH) in x's dtype, finite but meaningless for padding, and the new state.
    """
    outputs = []
    for t in range(x.shape[2]):
        state = slstm_step(x[:, :, t], recurrent=recurrent, token=token[:, :, t], state=state)
        outputs.append(state[0].to(x.dtype))
    # Fixed strides: with one head or row they would follow x's and cause another compilation.
    h, c, n, m = (part.clone(memory_format=torch.contiguous_format) for part in state)
    return torch.stack(outputs, 2), (h, c, n, m)
