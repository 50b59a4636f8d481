"""Tower kind `mean_color`: a linear map of each image's mean color."""

from typing import Literal

from torch import Tensor, nn

from gigabatch.trainer.fields import Count
from gigabatch.trainer.towers.base import TowerInput, TowerKind, tower_kind


@tower_kind("image")
class MeanColorTower(TowerKind):
    """A linear map of the mean color."""

    kind: Literal["mean_color"]
    """Kind of image tower; mean_color: a linear map of each image's mean color."""
    width: Count = 8
    """Width of the linear map."""

    def build(self, data: TowerInput) -> nn.Module:
        return MeanColorEncoder(data.image.channels, self.width)


class MeanColorEncoder(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(channels, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))
