"""Train two encoders with gigabatch's contrastive loss in your own DDP loop.

    torchrun --standalone --nproc-per-node 2 examples/ddp_loop.py

It runs on CPUs in seconds, on synthetic pairs. Every process encodes its slice of the batch; the
negatives come from all processes. The printed losses are the same for 1, 2 or 4 processes, because
the gradient is exactly that of the complete batch.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gigabatch.kernels import ContrastiveLoss

STEPS, BATCH, IMAGE_DIM, TEXT_DIM, LATENT_DIM = 60, 256, 64, 48, 16


class TwoTowers(nn.Module):
    """An image encoder, a text encoder and the learned logit scale, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(IMAGE_DIM, 64), nn.GELU(), nn.Linear(64, 32))
        self.text = nn.Sequential(nn.Linear(TEXT_DIM, 64), nn.GELU(), nn.Linear(64, 32))
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The loss takes dot products, so normalize for cosines.
        image, text = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return image, text, self.log_scale.exp()


def synthetic_pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Return images [BATCH, 64] and texts [BATCH, 48] made from the same latent vectors."""
    fixed = torch.Generator().manual_seed(0)
    to_image = torch.randn(LATENT_DIM, IMAGE_DIM, generator=fixed)
    to_text = torch.randn(LATENT_DIM, TEXT_DIM, generator=fixed)
    latent = torch.randn(BATCH, LATENT_DIM, generator=torch.Generator().manual_seed(seed))
    return latent @ to_image, latent @ to_text


def main() -> None:
    dist.init_process_group("gloo")  # with GPUs: "nccl", and move model and batch to the device
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(TwoTowers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss_fn = ContrastiveLoss()  # uses the default process group

    for step in range(1, STEPS + 1):
        # A data loader with a DistributedSampler would do this split.
        images, texts = (x.chunk(world_size)[rank] for x in synthetic_pairs(step))
        image, text, scale = model(images, texts)
        loss = loss_fn(image, text, scale)
        optimizer.zero_grad()
        loss.backward()  # DDP averages gradients over processes, as the loss expects
        optimizer.step()
        if rank == 0 and step % 20 == 0:
            # By default the value is the loss of the complete batch on every process.
            print(f"step {step}  loss {loss.item():.4f}", flush=True)

    if rank == 0:
        with torch.no_grad():
            image, text, _ = model.module(*synthetic_pairs(seed=10**6))
        recall = ((image @ text.T).argmax(1) == torch.arange(BATCH)).float().mean()
        print(f"recall@1 of {BATCH} new pairs: {recall.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
