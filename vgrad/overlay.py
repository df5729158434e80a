"""What theory says of a study, as variables of the same labelled data set: drawn over what was measured.

    predicted_log_delta, predicted_log_grad_w, predicted_log_grad_b, predicted_log_h    [phi, init, depth, layer]

are ln(E ||.||^2) / 2 at infinite width. The measured curves are medians over seeds, of the typical network: they differ from theory
by O(L / N), which is the finite width itself.
"""

import concurrent.futures
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vgrad import nested

__all__ = ["predicted"]


def predicted(config: Any, source: Any, schemes: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for an `xarray.Dataset`: name -> (dimensions, values, attributes).

    Args:
      config: `vgrad.study.Config`.  source: `vgrad.data.Data`.
      schemes: by activation, the `vgrad.study.Scheme` of every entry of config.init.
    Returns:
      The four fields of the module docstring. NaN past a network's last layer, and for an initializer whose weights have a mean:
        the prediction for those, `vgrad.prediction.predict`, takes longer than measuring them.
    """
    x, t = source.batch(config.batch, config.key)
    loss = "cross_entropy" if t.ndim == 1 else "squared_error"
    shape = (len(config.phi), len(config.init), len(config.depths), config.depths[-1])
    fields = {name: np.full(shape, np.nan) for name in nested.NestedPrediction._fields}
    options: dict[str, Any] = dict(width=config.width, depths=config.depths, out_dim=source.out_dim, loss=loss)

    def one(phi):
        which = [j for j, s in enumerate(schemes[phi]) if s.weights in nested.ZERO_MEAN]
        if not which:
            return which, ()
        sigma_w = np.array([schemes[phi][j].sigma_w for j in which])
        return which, jax.device_get(nested.predict_depths(phi, (x, t), sigma_w=sigma_w, sigma_b=config.sigma_b, **options))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # most of it is compilation, which takes one core each
        for i, (which, found) in enumerate(pool.map(one, config.phi)):
            for values, new in zip(fields.values(), found, strict=bool(which)):
                values[i, which] = new
    about = {"units": "nat", "long_name": "mean field, ln(E ||.||^2) / 2"}
    return {f"predicted_{name}": (("phi", "init", "depth", "layer"), values, about) for name, values in fields.items()}
