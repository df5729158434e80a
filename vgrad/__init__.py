"""vgrad: does the gradient survive the depth of a network, and if not, why?"""

from vgrad import activations, backprop, finite_width, fit, gaussian, initializers, layers, losses, meanfield, testing
from vgrad.base import Affine, Block, Estimate, Network, Params, Profile
from vgrad.diagnose import diagnose, tap
from vgrad.diagnosis import Diagnosis
from vgrad.monitor import monitor
from vgrad.network import mlp, stack
from vgrad.profile import profile
from vgrad.reduction import sweep_statistics
from vgrad.summary import monitor_summary
from vgrad.sweep import sweep

__all__ = [
    "Affine", "Block", "Diagnosis", "Estimate", "Network", "Params", "Profile", "activations", "backprop", "diagnose",
    "finite_width", "fit", "gaussian", "initializers", "layers", "losses", "meanfield", "mlp", "monitor", "monitor_summary",
    "profile", "stack", "sweep", "sweep_statistics", "tap", "testing",
]  # fmt: skip
