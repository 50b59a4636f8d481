"""Train two encoders with gigabatch's contrastive loss in a plain PyTorch loop.

    python examples/plain_loop.py

It runs on a CPU in seconds, on synthetic pairs. Some samples of a batch share an id, like several
captions of one image: all pairs of equal ids are positives, not negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.kernels import contrastive_loss

STEPS, BATCH, ITEMS, IMAGE_DIM, TEXT_DIM = 60, 256, 400, 64, 48


def synthetic_pairs(seed: int, noise: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [BATCH] of random items, and noisy images [BATCH, 64] and texts [BATCH, 48]."""
    fixed = torch.Generator().manual_seed(0)
    item_images = torch.randn(ITEMS, IMAGE_DIM, generator=fixed)
    item_texts = torch.randn(ITEMS, TEXT_DIM, generator=fixed)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ITEMS, (BATCH,), generator=g)
    images = item_images[ids] + noise * torch.randn(BATCH, IMAGE_DIM, generator=g)
    texts = item_texts[ids] + noise * torch.randn(BATCH, TEXT_DIM, generator=g)
    return ids, images, texts


def main() -> None:
    torch.manual_seed(0)
    image_encoder = nn.Sequential(nn.Linear(IMAGE_DIM, 256), nn.GELU(), nn.Linear(256, 64))
    text_encoder = nn.Sequential(nn.Linear(TEXT_DIM, 256), nn.GELU(), nn.Linear(256, 64))
    log_scale = nn.Parameter(torch.tensor(2.5))
    parameters = [*image_encoder.parameters(), *text_encoder.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)

    def embed(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        # The loss takes dot products, so normalize for cosines.
        return F.normalize(image_encoder(images), dim=1), F.normalize(text_encoder(texts), dim=1)

    for step in range(1, STEPS + 1):
        ids, images, texts = synthetic_pairs(step)
        image, text = embed(images, texts)
        # No matrix of logits is stored: memory grows with the batch, not with its square.
        loss = contrastive_loss(image, text, log_scale.exp(), ids_q=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)

    ids, images, texts = synthetic_pairs(seed=10**6)
    with torch.no_grad():
        image, text = embed(images, texts)
    recall = (ids[(image @ text.T).argmax(1)] == ids).float().mean()
    print(f"recall@1 of {BATCH} new pairs: {recall.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
