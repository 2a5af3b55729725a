"""Checkpoints: the train state on disk through Orbax, one item a kind, written in the background, restored on any mesh.

    workdir/checkpoints/<step>/{params, opt, extras}    arrays, at global shape: no mesh is baked in
                              /{data, meta}             JSON: where the data order stands; whatever describes the run

A step directory appears whole or not at all: what a killed run left half written is never listed, and the next start
clears it. What the disk did to a whole one is noticed: `meta` holds a checksum of every item. A damaged checkpoint is
never deleted; a run that went on from an older one moves it to checkpoints/<step>.corrupt, so that it can save that
step again. With several processes every one of them makes every call here, in the same order; Orbax settles who writes,
and what one of them cannot read, none of them takes.
"""

from regvit_jax.checkpoint.faults import CheckpointDamaged, CheckpointMismatch, CheckpointNotSaved
from regvit_jax.checkpoint.store import ARRAYS, Checkpoints

__all__ = ["ARRAYS", "CheckpointDamaged", "CheckpointMismatch", "CheckpointNotSaved", "Checkpoints"]
