"""How the next token is chosen: the parameters (without torch), the rows' sampler on the device, log-probabilities."""

from xlstm_ray.sampling.params import Sampling

__all__ = ["Sampling"]
