"""Every model learns what a single frame does not show: where a digit moves. Run with: pytest -m learn

Scikit-learn's 8x8 digits move left, right, up or down on a picture whose opposite sides are joined, from a random
place: each frame by itself looks the same whichever way the digit goes, so TSN, which sees single frames, stays at
chance.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tempops import models

pytestmark = pytest.mark.learn

DIRECTIONS = torch.tensor([(0, -2), (0, 2), (-2, 0), (2, 0)])  # rows and columns a frame
CHANCE = 1 / len(DIRECTIONS)
SIDE, T = 32, 4
STEPS, BATCH = 150, 32


@pytest.fixture(scope="module")
def digits() -> dict[str, Tensor]:
    """Grey 8x8 pictures, none of them in two of the parts."""
    load_digits = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's").load_digits
    pictures = torch.from_numpy(load_digits().images).float() / 16
    return {"train": pictures[:1200], "check": pictures[1200:1500], "test": pictures[1500:]}


def moving(pictures: Tensor, clips: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips [clips, frames, 3, SIDE, SIDE] and their directions."""
    directions = torch.randint(len(DIRECTIONS), (clips,), generator=generator)
    chosen = pictures[torch.randint(len(pictures), (clips,), generator=generator)]
    start = torch.randint(SIDE, (clips, 1, 2), generator=generator)
    place = start + DIRECTIONS[directions][:, None] * torch.arange(frames)[:, None]  # [clips, frames, 2]
    rows, columns = ((place[..., axis, None] + torch.arange(8)) % SIDE for axis in (0, 1))
    canvas = torch.zeros(clips, frames, SIDE, SIDE)
    index = torch.arange(clips)[:, None, None, None], torch.arange(frames)[:, None, None]
    canvas[(*index, rows[..., :, None], columns[..., None, :])] = chosen[:, None].expand(-1, frames, -1, -1)
    return canvas[:, :, None].expand(-1, -1, 3, -1, -1), directions


def windows(clip: Tensor, n_segment: int, frames: int) -> Tensor:
    """[N, T, 3*frames, H, W]: from each of the first T frames, or every other one where there are twice as many."""
    stacked = clip.unfold(1, frames, 1).movedim(-1, 2).flatten(2, 3)
    return stacked[:, :: 2 if stacked.size(1) >= 2 * n_segment else 1][:, :n_segment]


def batch(name: str, pictures: Tensor, clips: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the model takes, and the directions."""
    frames = {"tdn": T + 4, "menet": 2 * T + 4}.get(name, T)
    clip, directions = moving(pictures, clips, frames, generator)
    if name == "menet":
        return (windows(clip, T, 5), windows(clip, 2 * T, 4)), directions
    return (windows(clip, T, 5 if name == "tdn" else 1),), directions


@torch.no_grad()
def accuracy(name: str, model: torch.nn.Module, pictures: Tensor, clips: int, generator: torch.Generator) -> float:
    model.eval()
    x, directions = batch(name, pictures, clips, generator)
    right = model(*x).argmax(1) == directions
    model.train()
    return right.float().mean().item()


@pytest.mark.parametrize("name", models.list_models())
def test_learns_motion(name, digits, capsys):
    generator = torch.Generator().manual_seed(0)
    layers = (1, 2, 1, 1) if name == "tefe" else (1, 1, 1, 1)  # a block for TE, one for FE
    model = models.create_model(name, len(DIRECTIONS), n_segment=T, layers=layers, width=16, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    for step in range(STEPS):
        x, directions = batch(name, digits["train"], BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(*x), directions).backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 24 and accuracy(name, model, digits["check"], 100, generator) > 0.97:
            break
    reached = accuracy(name, model, digits["test"], 400, generator)
    with capsys.disabled():
        print(f"\n{name}: {reached:.1%} of the directions after {step + 1} steps, chance {CHANCE:.0%}")
    if name == "tsn":
        assert reached < CHANCE + 0.1
    else:
        assert reached > 0.9
