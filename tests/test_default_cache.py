"""The default sampling cache, forward passes on the rows that a row sees, draws what a family's own cache draws."""

import torch
from conftest import KINDS, build_model, conditions, for_each, seeded

from hf_pixelcnn.caching_causal_image import ForwardCache


@for_each("kind", KINDS)
def test_forward_passes_draw_the_images_of_the_fast_cache(family, kind, monkeypatch):
    model = build_model(family, **kind, image_size=[9, 4], num_hidden_layers=1).double()
    assert model.sampling_cache_class is not ForwardCache
    scored = {**conditions(model, 2), "output_scores": True, "return_dict_in_generate": True}
    fast = model.generate(num_images=2, generator=seeded(), **scored)
    with monkeypatch.context() as patch:
        patch.setattr(model, "sampling_cache_class", ForwardCache)
        slow = model.generate(num_images=2, generator=seeded(), **scored)
        drawn = model.generate(num_images=2, generator=seeded(), **conditions(model, 2))
    for scores, expected in zip(slow.scores, fast.scores, strict=True):
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-11)
    assert torch.equal(slow.sequences, fast.sequences)
    assert torch.equal(drawn, fast.sequences)


def test_forward_passes_run_on_the_rows_that_are_seen_only(monkeypatch):
    model = build_model("pixelcnn", image_size=[12, 3], num_hidden_layers=1, first_kernel_size=3)
    monkeypatch.setattr(model, "sampling_cache_class", ForwardCache)
    rows = []
    model.model.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[2]))
    model.generate()
    assert rows == [r for row in range(12) for r in [min(row + 1, 3)] * 3]  # itself and two rows above
    ForwardCache(model, batch=1000, height=2**40, width=3)  # takes memory for those rows only
