"""Towers: encoders and projection heads that map a modality's micro-batch to unit vectors."""

from gigabatch.trainer.towers.build import build_towers
from gigabatch.trainer.towers.model import Towers, further_head, seed_everything

__all__ = ["Towers", "build_towers", "further_head", "seed_everything"]
