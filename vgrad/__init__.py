"""vgrad: does the gradient survive the depth of a network, and if not, why?"""

from vgrad import activations, initializers, layers, losses, network, scaled
from vgrad.base import Affine, Block, Estimate, Network, Params, Profile
from vgrad.network import mlp, stack
from vgrad.profile import profile
