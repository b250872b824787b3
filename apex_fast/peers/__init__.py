"""Other groups' one-step methods behind the training loop's interface, to be compared with on equal terms.

A method is a :class:`~apex_fast.peers.base.Peer`: an object to which the loop hands a whole step, ``step(x,
condition, negative, ...)``, and which does every forward and backward of it. It asks the network through the same
plain velocity callables as :class:`apex_fast.ApexObjective`: ``velocities.generator`` is trained,
``velocities.real`` is the teacher or the average that targets come from. So data, encoding, averages, learning
rates, checkpoints, validation and export are those of any other run (``loss: dmd2``, ``dmd2_lora``, ``twinflow`` or
``rcgm``), and only the loss differs. Whatever else a method trains, such as the fake score of DMD2 with its own
optimizer, belongs to it and is saved with it. Each states what it costs: ``peer.passes``, in forwards of a batch for
one step of the optimizer, and ``peer.copies``, the weights that it holds.

Everything is written from the papers' equations and, where those leave something open, from what the released code
does, which the modules name; docs/peers.md lists both and what differs. Nothing here knows of trainers, diffusers or
peft: :mod:`apex_fast.training.peers` builds a peer for a run.
"""

from .base import Copies, Peer, PeerSettings
from .dmd2 import Dmd2, FakeScore
from .rcgm import Rcgm
from .twinflow import TwinFlow

__all__ = ["Copies", "Dmd2", "FakeScore", "Peer", "PeerSettings", "Rcgm", "TwinFlow"]
