"""One layer of every kind that can have a palette, side by side, for one conversion of all."""

from __future__ import annotations

from torch import Tensor, nn

from dkm_export.compress import finalize, prepare
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel, load_state
from dkm_export.spec import CompressionSpec, LayerRule
from tests.zoo import lively


class Kinds(nn.Module):
    """Every kind of layer, and a weight that two of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 24)
        self.linear = nn.Linear(24, 24)
        self.line = nn.Conv1d(24, 24, 3)
        self.image = nn.Conv2d(24, 24, 3)
        self.grouped = nn.Conv2d(24, 24, 3, groups=2)
        self.depthwise = nn.Conv2d(24, 48, 3, groups=24)
        self.volume = nn.Conv3d(24, 24, 2)
        self.up_line = nn.ConvTranspose1d(24, 24, 2)
        self.up_image = nn.ConvTranspose2d(24, 24, 2)
        self.up_grouped = nn.ConvTranspose2d(24, 24, 2, groups=2)
        self.up_volume = nn.ConvTranspose3d(24, 24, 2)
        self.tied = nn.Linear(24, 24, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.linear(self.embedding(tokens)).transpose(1, 2)
        image = x.unsqueeze(-1) * x.unsqueeze(-2)
        volume = image.unsqueeze(-1) * x[:, :, None, None, :3]
        images = (self.image, self.grouped, self.depthwise, self.up_image, self.up_grouped)
        return (
            self.line(x),
            self.up_line(x),
            *(layer(image) for layer in images),
            self.volume(volume),
            self.up_volume(volume),
            self.tied(x.transpose(1, 2)),
        )


KINDS = ModelSource(
    name="kinds",
    factory="none:none",
    inputs=(InputSpec(name="tokens", shape=(1, 5), dtype="int32", high=24),),
    outputs=tuple(f"output{index}" for index in range(10)),
)


def palettize_kinds(rule: LayerRule) -> tuple[PalettizedModel, nn.Module]:
    """The palettes of one rule, and the model that computes with them."""
    rules = [rule]
    if rule.axis == 1 and rule.dim > 1:
        rules.append(LayerRule(pattern="depthwise*", skip=True))  # its axis 1 has one element
    module = lively(Kinds())
    prepare(module, CompressionSpec(rules=tuple(rules), small_layer_size=0))
    model = finalize(module, KINDS)
    reference = lively(Kinds())
    load_state(reference, model.state_dict(), "reference")
    return model, reference.requires_grad_(False)
